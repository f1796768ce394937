"""What a learner knows of a run's transitions: which there are, in which chunk each lies, and which follows which."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from aionpredis.replay.log import ChunkId

__all__ = ["Index"]

Ids = NDArray[np.int64]


class Index:
    """Numbers the transitions of a run 0, 1, … in the order of the log. All of it is this process's own knowledge.

    A transition is *present* until its chunk is found to be gone from the server, or it is :meth:`discard`-ed. Memory:
    3 bytes a transition and ~300 a chunk; what lies before the oldest transition that is present is forgotten.
    """

    def __init__(self) -> None:
        self.chunks: list[ChunkId] = []
        self.present_count = 0
        """How many transitions are present."""
        self._first = np.zeros(256, np.int64)  # by chunk: the number of its first transition
        self._next = np.zeros(256, np.int64)  # by chunk: the one behind it in its trajectory, -1: not known
        self._ends = np.zeros(4096, np.bool_)  # by transition: whether an episode ended there
        self._present = np.zeros(4096, np.bool_)
        self._barred = np.zeros(4096, np.bool_)
        self._base = 0  # the number of the first transition in these arrays
        self._stop = 0  # the number that the next transition will get
        self._known: dict[tuple[bytes, int], int] = {}

    @property
    def span(self) -> tuple[int, int]:
        """The lowest number that may be present, and the one behind the highest."""
        return self._base, self._stop

    def add(self, chunks: Iterable[ChunkId]) -> Ids:
        """Number the transitions of chunks that are new in the log; their numbers."""
        start = self._stop
        for chunk in chunks:
            number = len(self.chunks)
            if number == len(self._first):
                self._first = np.concatenate([self._first, np.zeros_like(self._first)])
                self._next = np.concatenate([self._next, np.zeros_like(self._next)])
            self._first[number] = self._stop
            # A chunk may be committed before the one that it follows.
            self._next[number] = self._known.get((chunk.incarnation, chunk.seq + 1), -1)
            before = self._known.get((chunk.incarnation, chunk.seq - 1))
            if before is not None:
                self._next[before] = number
            self._known[chunk.incarnation, chunk.seq] = number
            self.chunks.append(chunk)
            at, stop = self._stop - self._base, self._stop - self._base + chunk.rows
            while stop > len(self._ends):
                self._ends = np.concatenate([self._ends, np.zeros_like(self._ends)])
                self._present = np.concatenate([self._present, np.zeros_like(self._present)])
                self._barred = np.concatenate([self._barred, np.zeros_like(self._barred)])
            self._present[at:stop] = True
            self._barred[at:stop] = False
            self._ends[at:stop] = False
            if chunk.ends:
                bits = np.unpackbits(np.frombuffer(chunk.ends, np.uint8), bitorder="little")[: chunk.rows]
                self._ends[at : at + len(bits)] = bits
            self._stop += chunk.rows
            self.present_count += chunk.rows
        return np.arange(start, self._stop)

    def is_present(self, ids: Ids) -> NDArray[np.bool_]:
        """For each number whether that transition is present; numbers that were never given are not."""
        inside = (ids >= self._base) & (ids < self._stop)
        found: NDArray[np.bool_] = inside & self._present[np.where(inside, ids - self._base, 0)]
        return found

    def present(self) -> Ids:
        """The numbers of all transitions that are present, ascending."""
        return np.flatnonzero(self._present[: self._stop - self._base]) + self._base

    def locate(self, ids: Ids) -> tuple[Ids, Ids]:
        """For each number the place of its chunk in :attr:`chunks`, and its row there."""
        first = self._first[: len(self.chunks)]
        chunk = np.searchsorted(first, ids, side="right") - 1
        return chunk, ids - first[chunk]

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
            rows = np.diff(self._first[: len(self.chunks)], append=self._stop)[chunk]
            behind = self._next[chunk]
            beyond = np.where(behind >= 0, self._first[behind], -1)
            following = np.where(row + 1 < rows, last + 1, beyond)
            path[:, step] = np.where(known & self.is_present(following), following, -1)
        return path

    def ends(self, ids: Ids) -> NDArray[np.bool_]:
        """Whether an episode ended with these transitions; ``False`` for -1. Any shape."""
        inside = ids >= self._base
        found: NDArray[np.bool_] = inside & self._ends[np.where(inside, ids - self._base, 0)]
        return found

    def bar(self, ids: Ids) -> None:
        """Do not draw these any more. They are still there for those that they follow."""
        self._barred[ids - self._base] = True

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

    def committed_until(self, entry: int) -> Ids:
        """The numbers of all transitions that are present of chunks up to this entry of the log."""
        count = bisect_right(self.chunks, entry, key=lambda chunk: chunk.entry)
        stop = int(self._first[count]) if count < len(self.chunks) else self._stop
        return np.flatnonzero(self._present[: stop - self._base]) + self._base

    def rows(self, chunk: int) -> Ids:
        """The numbers of a chunk's transitions."""
        first = int(self._first[chunk])
        return np.arange(first, first + self.chunks[chunk].rows)

    def _forget(self) -> None:
        """Drop the chunks before the first that has something present, if they are half of all."""
        half = len(self.chunks) // 2
        if half < 128 or self._present[: int(self._first[half]) - self._base].any():
            return
        base = int(self._first[half])
        for chunk in self.chunks[:half]:
            del self._known[chunk.incarnation, chunk.seq]
        self._known = {key: number - half for key, number in self._known.items()}
        del self.chunks[:half]
        self._first = self._first[half:].copy()
        self._next = np.maximum(self._next[half:] - half, -1)
        self._ends = self._ends[base - self._base :].copy()
        self._present = self._present[base - self._base :].copy()
        self._barred = self._barred[base - self._base :].copy()
        self._base = base
