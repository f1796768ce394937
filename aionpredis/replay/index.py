"""What a learner knows of a run's transitions: which there are, in which chunk each lies, and which follows which."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from aionpredis.replay.log import ChunkId

__all__ = ["Index"]

Ids = NDArray[np.int64]


class Index:
    """Numbers the transitions of a run 0, 1, … in the order of the log. All of it is this process's own knowledge.

    A transition is *present* until its chunk is found to be gone from the server, or it is discarded. Memory:
    3 bytes a transition and 36 a chunk; what lies before the oldest transition that is present is forgotten.
    """

    def __init__(self) -> None:
        self.chunk_count = 0
        """How many chunks are known; they have the numbers 0 to this, which become less when some are forgotten."""
        self.present_count = 0
        """How many transitions are present."""
        # By chunk. Arrays, because a sample of 256 chunks of a million would miss the cache for each object that it visits:
        # 1.2 µs of 7 for a transition.
        self._first = np.zeros(256, np.int64)  # the number of its first transition; then what the next will get
        self._next = np.zeros(256, np.int64)  # the one behind it in its trajectory, -1: not known
        self._actor = np.zeros(256, np.int32)  # which of the incarnations
        self._seq = np.zeros(256, np.int64)
        self._entry = np.zeros(256, np.int64)
        # By transition.
        self._ends = np.zeros(4096, np.bool_)  # whether an episode ended there
        self._present = np.zeros(4096, np.bool_)
        self._barred = np.zeros(4096, np.bool_)
        self._base = 0  # the number of the first transition in these arrays
        self._stop = 0  # the number that the next transition will get
        self._incarnations: list[bytes] = []
        self._actors: dict[bytes, int] = {}
        # Chunks without a successor, by its name, and those without a predecessor, by their own.
        self._tails: dict[tuple[int, int], int] = {}
        self._heads: dict[tuple[int, int], int] = {}

    @property
    def span(self) -> tuple[int, int]:
        """The lowest number that may be present, and the one behind the highest."""
        return self._base, self._stop

    def add(self, chunks: Sequence[ChunkId]) -> Ids:
        """Number the transitions of chunks that are new in the log; their numbers."""
        start, first = self._stop, self.chunk_count
        rows = np.array([chunk.rows for chunk in chunks], np.int64)
        self.chunk_count += len(chunks)
        self._stop += int(rows.sum())
        self._grow()
        new = slice(first, self.chunk_count)
        self._first[first + 1 : self.chunk_count + 1] = start + np.cumsum(rows)
        self._seq[new] = [chunk.seq for chunk in chunks]
        entries = np.array([*self._entry[first - 1 : first], *(chunk.entry for chunk in chunks)], np.int64)
        # Ascending. After a failover an entry may have a number again that is not higher than those before.
        self._entry[new] = np.maximum.accumulate(entries)[-len(chunks) :] if len(chunks) else entries[:0]
        self._actor[new] = [self._number(chunk.incarnation) for chunk in chunks]
        self._link(first)
        at, stop = start - self._base, self._stop - self._base
        self._present[at:stop] = True
        self._barred[at:stop] = False
        self._ends[at:stop] = False
        for number, chunk in enumerate(chunks, first):
            if chunk.ends:
                bits = np.unpackbits(np.frombuffer(chunk.ends, np.uint8), bitorder="little")[: chunk.rows]
                row = int(self._first[number]) - self._base
                self._ends[row : row + len(bits)] = bits
        self.present_count += self._stop - start
        return np.arange(start, self._stop)

    def _grow(self) -> None:
        while self.chunk_count + 1 > len(self._first):
            for name in ("_first", "_next", "_actor", "_seq", "_entry"):
                array = getattr(self, name)
                setattr(self, name, np.concatenate([array, np.zeros_like(array)]))
        while self._stop - self._base > len(self._ends):
            for name in ("_ends", "_present", "_barred"):
                array = getattr(self, name)
                setattr(self, name, np.concatenate([array, np.zeros_like(array)]))

    def _number(self, incarnation: bytes) -> int:
        number = self._actors.get(incarnation)
        if number is None:
            self._actors[incarnation] = number = len(self._incarnations)
            self._incarnations.append(incarnation)
        return number

    def _link(self, first: int) -> None:
        """Which chunk is behind which, from the chunk ``first`` on. One may be committed before the one that it follows."""
        heads, tails = self._heads, self._tails
        following: list[int] = []
        new = slice(first, self.chunk_count)
        self._next[new] = -1
        for number, name in enumerate(zip(self._actor[new].tolist(), self._seq[new].tolist(), strict=True), first):
            before = tails.pop(name, None)
            if before is None:
                heads[name] = number
            elif before < first:
                self._next[before] = number
            else:
                following[before - first] = number
            behind = (name[0], name[1] + 1)
            after = heads.pop(behind, None)
            if after is None:
                tails[behind] = number
            following.append(-1 if after is None else after)
        self._next[new] = following

    def is_present(self, ids: Ids) -> NDArray[np.bool_]:
        """For each number whether that transition is present; numbers that were never given are not."""
        inside, at = self._places(ids)
        found: NDArray[np.bool_] = inside & self._present[at]
        return found

    def _places(self, ids: Ids) -> tuple[NDArray[np.bool_], Ids]:
        """For each number whether something may be known of it, and where; if not, anywhere."""
        inside = (ids >= self._base) & (ids < self._stop)
        return inside, np.where(inside, ids - self._base, 0)

    def is_open(self, ids: Ids) -> NDArray[np.bool_]:
        """For each number whether that transition is present and not barred."""
        inside, at = self._places(ids)
        found: NDArray[np.bool_] = inside & self._present[at] & ~self._barred[at]
        return found

    def present(self) -> Ids:
        """The numbers of all transitions that are present, ascending."""
        return np.flatnonzero(self._present[: self._stop - self._base]) + self._base

    def locate(self, ids: Ids) -> tuple[Ids, Ids]:
        """For each number its chunk, and its row there."""
        first = self._first[: self.chunk_count]
        chunk = np.searchsorted(first, ids, side="right") - 1
        return chunk, ids - first[chunk]

    def lengths(self, chunks: Ids) -> Ids:
        """How many transitions each of these chunks has."""
        return self._first[chunks + 1] - self._first[chunks]

    def chunk(self, number: int) -> ChunkId:
        """What the log said of a chunk, but for the ends of episodes."""
        incarnation = self._incarnations[int(self._actor[number])]
        rows = int(self._first[number + 1] - self._first[number])
        return ChunkId(incarnation, int(self._seq[number]), rows, b"", int(self._entry[number]))

    def origins(self, chunks: Ids) -> Iterable[tuple[bytes, int]]:
        """The incarnation and sequence number of each of these chunks."""
        incarnations = map(self._incarnations.__getitem__, self._actor[chunks].tolist())
        return zip(incarnations, self._seq[chunks].tolist(), strict=True)

    def follow(self, ids: Ids, steps: int) -> Ids:
        """Shape ``(len(ids), steps)``: each transition, and those behind it in the order in which their actor appended
        them, across chunks and ends of episodes; -1 from where on none is present.
        """
        path = np.full((len(ids), steps), -1, np.int64)
        path[:, 0] = ids
        for step in range(1, steps):
            last = path[:, step - 1]
            known = last >= 0
            chunk, row = self.locate(np.where(known, last, self._base))
            behind = self._next[chunk]
            beyond = np.where(behind >= 0, self._first[behind], -1)
            following = np.where(row + 1 < self.lengths(chunk), last + 1, beyond)
            path[:, step] = np.where(known & self.is_present(following), following, -1)
        return path

    def ends(self, ids: Ids) -> NDArray[np.bool_]:
        """Whether an episode ended with these transitions; ``False`` for -1. Any shape."""
        inside = ids >= self._base
        found: NDArray[np.bool_] = inside & self._ends[np.where(inside, ids - self._base, 0)]
        return found

    def bar(self, ids: Ids) -> Ids:
        """Do not draw these any more. They are still there for those that they follow. Those that were open until now."""
        barred = np.unique(ids[self.is_open(ids)])
        self._barred[barred - self._base] = True
        return barred

    def is_barred(self, ids: Ids) -> NDArray[np.bool_]:
        """For transitions that are present."""
        barred: NDArray[np.bool_] = self._barred[ids - self._base]
        return barred

    def discard(self, ids: Ids) -> Ids:
        """These are not present any more; those that were until now."""
        gone = np.unique(ids[self.is_present(ids)])
        self._present[gone - self._base] = False
        self.present_count -= len(gone)
        self._forget()
        return gone

    def idle(self, steps: int) -> Ids:
        """The numbers of all transitions that are present of chunks that nothing is drawn from: none of their transitions is
        open, nor one that they follow within so many steps. One that is committed after those that follow it finds none.
        """
        chunks = slice(0, self.chunk_count)
        first, stop = self._first[chunks] - self._base, self._stop - self._base
        if not stop:
            return first
        used = np.logical_or.reduceat(self._present[:stop] & ~self._barred[:stop], first)
        (last,) = np.nonzero(used)
        left = np.full(len(last), steps)  # of the steps behind each of these chunks
        while len(last):
            last = self._next[last]
            dead = (last >= 0) & ~used[last]  # behind one that is used all was looked at already, or will be
            last, left = last[dead], left[dead]
            used[last] = True
            left = left - self.lengths(last)
            last, left = last[left > 0], left[left > 0]
        idle = np.repeat(~used, self.lengths(np.arange(self.chunk_count)))
        return np.flatnonzero(idle & self._present[:stop]) + self._base

    def committed_until(self, entry: int) -> Ids:
        """The numbers of all transitions that are present of chunks up to this entry of the log."""
        count = int(np.searchsorted(self._entry[: self.chunk_count], entry, side="right"))
        return np.flatnonzero(self._present[: int(self._first[count]) - self._base]) + self._base

    def rows(self, chunk: int) -> Ids:
        """The numbers of a chunk's transitions."""
        return np.arange(self._first[chunk], self._first[chunk + 1])

    def _forget(self) -> None:
        """Drop the chunks before the first that has something present, if they are half of all."""
        half = self.chunk_count // 2
        base = int(self._first[half])
        if half < 128 or self._present[: base - self._base].any():
            return
        self.chunk_count -= half
        for name in ("_first", "_next", "_actor", "_seq", "_entry"):
            setattr(self, name, getattr(self, name)[half:].copy())
        self._next = np.maximum(self._next - half, -1)
        self._tails = {name: number - half for name, number in self._tails.items() if number >= half}
        self._heads = {name: number - half for name, number in self._heads.items() if number >= half}
        for name in ("_ends", "_present", "_barred"):
            setattr(self, name, getattr(self, name)[base - self._base :].copy())
        self._base = base
