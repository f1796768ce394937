"""Transitions by the batch: chunks are received straight into the rows of contiguous arrays."""

from __future__ import annotations

import logging
import math
import warnings
from bisect import bisect_left
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise, takewhile
from operator import attrgetter
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from aionpredis import codecs
from aionpredis.errors import AionpredisError, ServerError, UsageError
from aionpredis.formats import safetensors
from aionpredis.formats.safetensors import Layout
from aionpredis.memory import Empty, Recycler, aligned_empty
from aionpredis.pipeline import Pipeline, slices
from aionpredis.replay.chunk import open_chunk
from aionpredis.replay.group import GroupSource
from aionpredis.replay.lag import Progress
from aionpredis.replay.log import ChunkId, LogReader, Names, look_again
from aionpredis.replay.schema import MAX_ROWS, Schema
from aionpredis.replay.selection import TRIES
from aionpredis.requests import ValueReply, get_command
from aionpredis.wire.resp import Buffer, Pattern, Template

if TYPE_CHECKING:
    from aionpredis.client import Client

__all__ = ["Batches", "Position", "ReadStats", "where_ended"]

logger = logging.getLogger(__name__)

Arrays = dict[str, NDArray[Any]]


class Position(NamedTuple):
    """How far a reader of a run has come: three ints, to be stored with what was made of the batches so far.

    All chunks up to ``entry`` in the log were handed out, of that one itself the first ``row`` transitions.
    """

    run: int
    entry: int
    row: int


@dataclass
class ReadStats:
    """What one reader has met. ``transitions``: handed out; ``chunks``: received; ``duplicates``: log entries of chunks
    that were read before, skipped; ``evicted``: chunks whose log entry went, too, before they were read; ``missing``:
    chunks that the log names and the server does not have; ``gaps``: chunks that were numbered and never committed,
    and numbers that no chunk has: an actor leaves out one when it goes on in a run after an error, and Stable-Baselines3's
    at a reset, so that no trajectory leads across.
    """

    transitions: int = 0
    chunks: int = 0
    duplicates: int = 0
    evicted: int = 0
    missing: int = 0
    gaps: int = 0


class Source(Protocol):
    """Which chunks are read, in which order."""

    def take(self) -> ChunkId | None:
        """The next chunk, if it is known already."""

    async def more(self) -> bool:
        """Learn of more chunks, waiting for them if need be; ``False``: there will be none. Without any: ask again."""

    def lose(self, chunk: ChunkId) -> bool:
        """The chunk is not on the server: it is not named again. Whether that is news."""

    def substitute(self, chunk: ChunkId) -> ChunkId | None:
        """What to read instead of a chunk that was lost; ``None``: its rows are left out."""

    @property
    def in_order(self) -> bool:
        """Whether chunks are read in the order of the log."""

    @property
    def hands_over(self) -> bool:
        """Whether to hand out a batch that is not full, if there is nothing more at the moment."""


class _NoSubstitute:
    hands_over = False
    in_order = False

    def lose(self, chunk: ChunkId) -> bool:
        return True  # each is named once

    def substitute(self, chunk: ChunkId) -> ChunkId | None:
        return None


class EpochSource(_NoSubstitute):
    """Every chunk that is committed when reading begins, once; shuffled if there is a generator. ``rest``: chunks that an
    earlier reader left out.
    """

    def __init__(self, log: LogReader, rng: np.random.Generator | None, rest: list[ChunkId], *, in_order: bool) -> None:
        self.in_order = in_order
        self._log = log
        self._rng = rng
        self._found = rest
        self._chunks: Iterator[ChunkId] | None = None

    def take(self) -> ChunkId | None:
        return None if self._chunks is None else next(self._chunks, None)

    async def more(self) -> bool:
        if self._chunks is not None:
            return False
        await self._log.read_all(self._found)
        chunks, self._found = self._found, []
        order = range(len(chunks)) if self._rng is None else self._rng.permutation(len(chunks))
        self._chunks = iter([chunks[index] for index in order])
        return True


class FollowSource(_NoSubstitute):
    """Every chunk of a run, in the order of commits, until the run has ended."""

    in_order = True

    def __init__(self, log: LogReader) -> None:
        self._log = log
        self._chunks: deque[ChunkId] = deque()

    def take(self) -> ChunkId | None:
        return self._chunks.popleft() if self._chunks else None

    async def more(self) -> bool:
        if not self._log.ended:
            self._chunks += await self._log.read(wait=True)
            return True  # perhaps only seconds passed, or all was for other learners
        await self._log.read_all(self._chunks)  # what came between the last look and the end
        return bool(self._chunks)


class DrawSource:
    """Chunks drawn uniformly, with replacement, for ever, from all that are committed by then.

    Each comes as a whole, so each transition has the same share in the batches, however long its chunk is.
    ``capacity``: chunks that the run keeps, 0: all.
    """

    hands_over = False
    in_order = False

    def __init__(self, log: LogReader, rng: np.random.Generator, capacity: int) -> None:
        self._log = log
        self._rng = rng
        self._capacity = capacity
        self._known: list[ChunkId] = []  # in the order of the log
        self._left = 0

    def take(self) -> ChunkId | None:
        if not (self._left and self._known):
            return None
        self._left -= 1
        return self._known[int(self._rng.integers(len(self._known)))]

    async def more(self) -> bool:
        await self._log.read_all(self._known)
        while not self._known and not self._log.ended:
            self._known += await self._log.read(wait=True)
        if self._capacity and self._known:
            # They are evicted by now, or will be soon.
            until = self._known[-1].entry - self._capacity
            del self._known[: sum(1 for _ in takewhile(lambda chunk: chunk.entry <= until, self._known))]
        self._left = LOOK_AGAIN
        return bool(self._known)

    def lose(self, chunk: ChunkId) -> bool:
        """It may have been drawn several times, and each of them finds that it is gone."""
        at = bisect_left(self._known, chunk.entry, key=attrgetter("entry"))
        if self._known[at : at + 1] != [chunk]:
            try:
                at = self._known.index(chunk)  # after a failover, numbers do not ascend
            except ValueError:
                return False
        del self._known[at]
        return True

    def substitute(self, chunk: ChunkId) -> ChunkId | None:
        """Another chunk of that length, for one that is gone."""
        if self._known:
            for at in self._rng.integers(len(self._known), size=TRIES).tolist():
                other = self._known[int(at)]
                if other.rows == chunk.rows:
                    return other
        alike = [other for other in self._known if other.rows == chunk.rows]
        return alike[int(self._rng.integers(len(alike)))] if alike else None


class _Batch:
    """Arrays that are being filled: ``filled`` rows are spoken for, ``pending`` chunks are still travelling."""

    def __init__(self, schema: Schema, size: int, recyclers: dict[str, Recycler], empty: Empty = aligned_empty) -> None:
        self.arrays: Arrays = {}
        self.rows: dict[str, tuple[memoryview, int]] = {}  # memory, bytes a row
        for name, (dtype, shape) in schema.items():
            row = dtype.itemsize * math.prod(shape)
            if name not in recyclers:
                recyclers[name] = Recycler(size * row, empty)
            memory = recyclers[name].take()
            self.arrays[name] = memory.view(dtype).reshape(size, *shape) if row else np.empty((size, *shape), dtype)
            self.rows[name] = memory.data, row
        self.filled = 0
        self.pending = 0
        self.row = 0  # of its chunk, the first one here
        self.holes: list[slice] = []
        self.chunks: list[ChunkId] = []  # whose last row is here
        self.last = 0, 0  # the entry of the last chunk here, and the row up to which it is

    def finish(self) -> Arrays:
        """The rows that came."""
        if not self.holes and self.filled == len(next(iter(self.arrays.values()))):
            return self.arrays
        keep = np.zeros(len(next(iter(self.arrays.values()))), np.bool_)
        keep[: self.filled] = True
        for hole in self.holes:
            keep[hole] = False
        return {name: array[keep] for name, array in self.arrays.items()}


LOOK_AGAIN = 1024
"""Draws after which the log is read again; nothing travels meanwhile."""


class _Place(NamedTuple):
    """The rows of a chunk from ``start`` to ``stop`` go to ``batch``, from row ``first`` on."""

    batch: _Batch
    first: int
    start: int
    stop: int


class _Wanted:
    """A chunk and the rows that it goes to."""

    __slots__ = ("chunk", "key", "lost", "places")

    def __init__(self, chunk: ChunkId, key: bytes) -> None:
        self.chunk = chunk
        self.key = key
        self.places: list[_Place] = []
        self.lost = False


MAX_GROUP = 64
"""Chunks in one request, however small. Each request costs ~20 µs, and wakes the server."""


class Batches:
    """``async for batch in …``: dicts of contiguous arrays, ``(rows, *shape)`` by column, memory of their own.

    A batch that nobody refers to any more gives its memory to a later one; one that is kept keeps it.

    Every batch has ``batch`` rows but the last one (and one from which the server lost a chunk). Made by
    :meth:`aionpredis.Replay.epoch` and :meth:`~aionpredis.Replay.follow`. Nothing has to be closed; a cancelled step can
    be repeated and loses nothing. ``stats``: see :class:`ReadStats`.
    """

    def __init__(
        self,
        client: Client,
        names: Names,
        schema: Schema,
        log: LogReader,
        source: Source,
        batch: int,
        drop_last: bool,
        position: Position | None,
        progress: Progress | None = None,
        *,
        empty: Empty,
    ) -> None:
        self.stats = ReadStats()
        self._client = client
        self._names = names
        self._schema = schema
        self._log = log
        self._source = source
        self._size = batch
        self._drop_last = drop_last
        self._progress = progress
        self._position = position
        self._ended = False
        self._groups: Iterator[list[_Wanted]] = iter(())
        self._held: list[ChunkId] = []  # taken, and there was no memory for its rows
        self._pipeline: Pipeline[list[_Wanted]] = Pipeline(client, immutable=True)
        self._arrived: deque[tuple[_Wanted, NDArray[np.uint8] | None]] = deque()  # have to be placed yet
        self._batches: deque[_Batch] = deque()
        self._empty = empty
        self._recyclers: dict[str, Recycler] = {}  # by column
        self._layouts: dict[int, Layout] = {}  # by rows: what chunks of that length look like
        self._patterns: dict[tuple[tuple[int, ...], ...], Pattern] = {}  # by rows and cuts of a group's chunks

    @property
    def run(self) -> int:
        """The run that is read."""
        return self._log.run

    @property
    def position(self) -> Position:
        """How far the batches that were handed out have come, for ``after=`` of another reader, perhaps in another process.

        To go on there exactly once, store it together with what was made of the batches, in one step (one record, one
        transaction).

        Raises:
            UsageError: chunks do not come in the order of the log, and not all of them have come yet.
        """
        if self._position is None:
            raise UsageError(
                "only follow() and epoch(shuffle=False) have a position at any time, a shuffled epoch at its end"
            )
        return self._position

    @property
    def log(self) -> LogReader:
        """What is known of the run."""
        return self._log

    async def acknowledge(self) -> None:
        """Of a group's reader (:meth:`Replay.consume`): the batches so far were processed, nobody gets their chunks again."""
        if not isinstance(self._source, GroupSource):
            raise UsageError("acknowledge() is for the batches of consume()")
        await self._source.acknowledge(tuple(self._source.handed_out))  # a loader's task may add more meanwhile

    def __aiter__(self) -> Batches:
        return self

    async def __anext__(self) -> Arrays:
        while True:
            if self._batches and self._batches[0].filled == self._size and not self._batches[0].pending:
                if self._progress is not None:
                    await self._progress.note(self._batches[0].last[0])
                arrays = self._finish()
                if arrays is not None:
                    return arrays
                continue
            while not self._pipeline.full and (group := next(self._groups, None)):
                self._ask(group)
            if self._arrived:
                wanted, value = self._arrived[0]
                if not wanted.lost:  # else the last step ended with the warning of it
                    try:
                        await self._place(wanted, value)
                    except AionpredisError:
                        self._arrived[0] = wanted, None  # looked for again if somebody calls again: it may be mended
                        raise
                other = self._source.substitute(wanted.chunk) if wanted.lost else None
                self._arrived.popleft()
                if other is None:
                    self._settle(wanted)
                else:
                    wanted.chunk, wanted.key, wanted.lost = other, self._names.data(self._log.run, other), False
                    self._ask([wanted])
            elif len(self._pipeline):
                reply, group = await self._pipeline.next()
                if reply.matched:
                    for wanted in group:
                        self._settle(wanted)
                else:
                    self._take(group, reply.values)
            elif self._held:  # perhaps what was handed out meanwhile has freed memory
                self._groups = self._next_groups()
            elif self._progress is not None and not self._progress.said(self._log.entry):
                # All that is known has arrived; there may be nothing more until the actors go on.
                await self._progress.note(self._log.entry, now=True)
            else:
                more = await self._source.more()
                self._groups = self._next_groups()
                self.stats.duplicates, self.stats.gaps = self._log.duplicates, self._log.gaps
                if not more and (self._drop_last or not self._batches):
                    # Of a group's readers none has read the log up to there.
                    if not self._batches and self._position is None and not isinstance(self._source, GroupSource):
                        self._position = Position(self._log.run, self._log.entry, MAX_ROWS)
                    self._ended = True
                    raise StopAsyncIteration
                if self._batches and (self._source.hands_over or not more):
                    arrays = self._finish()
                    if arrays is not None:
                        return arrays

    def _finish(self) -> Arrays | None:
        batch = self._batches[0]
        assert not batch.pending, "a batch has rows that did not come"
        arrays = batch.finish()  # may lack memory: then it can be called again
        self._batches.popleft()
        if isinstance(self._source, GroupSource):
            self._source.hand_out(batch.chunks)
        self._position = Position(self._log.run, *batch.last) if self._source.in_order else None
        rows = len(next(iter(arrays.values())))
        self.stats.transitions += rows
        self.stats.duplicates = self._log.duplicates
        return arrays if rows else None

    def _settle(self, wanted: _Wanted) -> None:
        self.stats.chunks += not wanted.lost
        for batch, first, start, stop in wanted.places:
            batch.pending -= 1
            if wanted.lost:
                batch.holes.append(slice(first, first + stop - start))

    def _next_groups(self) -> Iterator[list[_Wanted]]:
        """The chunks for one request each, as far as chunks are known at the moment."""
        return slices(self._client.topology, self._assigned(), attrgetter("key"), self._bytes, MAX_GROUP)

    def _assigned(self) -> Iterator[_Wanted]:
        """Chunks with their rows, as far as there is memory. Lacking it is an error only if nothing else can go on first."""
        held, self._held = self._held, []
        is_first = True
        for chunk in chain(held, iter(self._source.take, None)):
            try:
                wanted = self._assign(chunk)
            except Exception:
                self._held = [chunk]
                if is_first:
                    raise
                return  # an error would take along those that were assigned and not asked for
            is_first = False
            yield wanted

    def _bytes(self, wanted: _Wanted) -> int:
        return wanted.chunk.rows * self._schema.row_nbytes

    def _assign(self, chunk: ChunkId) -> _Wanted:
        """Assign a chunk to rows of the batch that is being filled, and on into the next one. An error changes nothing."""
        wanted = _Wanted(chunk, self._names.data(self._log.run, chunk))
        row = self._log.begun.get(chunk[:2], 0)
        if row:  # an earlier reader handed them out
            wanted.places.append(_Place(_Batch(self._schema, row, {}), 0, 0, row))
        fresh: list[_Batch] = []
        room = self._size - self._batches[-1].filled if self._batches else 0
        while room < chunk.rows - row:
            fresh.append(_Batch(self._schema, self._size, self._recyclers, self._empty))
            room += self._size
        while row < chunk.rows:
            if not self._batches or self._batches[-1].filled == self._size:
                self._batches.append(fresh.pop())
                self._batches[-1].row = row
            batch = self._batches[-1]
            count = min(chunk.rows - row, self._size - batch.filled)
            wanted.places.append(_Place(batch, batch.filled, row, row + count))
            batch.filled += count
            batch.pending += 1
            batch.last = chunk.entry, row + count
            row += count
        if wanted.places:
            wanted.places[-1].batch.chunks.append(chunk)
        return wanted

    def _ask(self, group: list[_Wanted]) -> None:
        self._pipeline.put(lambda: self._request(group), group[0].key, sum(map(self._bytes, group)), group)

    def _request(self, group: list[_Wanted]) -> tuple[Sequence[Buffer], ValueReply]:
        command = b"".join([get_command(wanted.key) for wanted in group])
        kinds = tuple([(wanted.chunk.rows, *[place.stop for place in wanted.places]) for wanted in group])
        pattern = self._patterns.get(kinds)
        if pattern is None:
            if len(self._patterns) >= 1024:
                self._patterns.clear()
            self._patterns[kinds] = pattern = self._predict(kinds)
        payloads = []
        for wanted in group:
            for name in self._layout(wanted.chunk.rows).order:
                for batch, first, start, stop in wanted.places:
                    memory, size = batch.rows[name]
                    payloads.append(memory[first * size : (first + stop - start) * size])
        return [command], ValueReply(len(group), Template(pattern, payloads))

    def _layout(self, rows: int) -> Layout:
        """What a chunk looks like: as one of that length did, or as an actor of this schema makes it."""
        layout = self._layouts.get(rows)
        if layout is None:
            self._layouts[rows] = layout = self._schema.layout(rows)
        return layout

    def _predict(self, kinds: tuple[tuple[int, ...], ...]) -> Pattern:
        """The replies to a group: of each chunk its file's header, then for each column the rows between the cuts."""
        items: list[bytes | int] = []
        literal = b""
        for rows, *stops in kinds:
            layout = self._layout(rows)
            items.append(literal + b"$%d\r\n%b" % (layout.size, layout.header))
            for name in layout.order:
                column = layout.columns[name]
                size = (column.stop - column.start) // rows
                items += [(stop - start) * size for start, stop in pairwise((0, *stops))]
            literal = b"\r\n"
        return Pattern([*items, literal])

    def _take(self, group: list[_Wanted], values: list[Any]) -> None:
        """The replies to a group that was not as predicted: arrays, ``None`` or errors."""
        refused = [wanted for wanted, value in zip(group, values, strict=True) if isinstance(value, ServerError)]
        self._arrived += [pair for pair in zip(group, values, strict=True) if not isinstance(pair[1], ServerError)]
        if refused:
            self._ask(refused)  # if somebody calls again
            error: ServerError = next(value for value in values if isinstance(value, ServerError))
            raise error.about("GET", refused[0].key)

    async def _place(self, wanted: _Wanted, value: NDArray[np.uint8] | None) -> None:
        """Take a chunk that was not predicted: the first of its length, or one that is not there."""
        if value is None:
            value, evicted = await look_again(self._client, self._names, self._log.run, wanted.chunk)
            if value is None:
                wanted.lost = True
                if self._source.lose(wanted.chunk):
                    self._count_lost(wanted, evicted)
                return
        record = open_chunk(value, self._schema, self._names, self._log.run, wanted.chunk)
        for batch, first, start, stop in wanted.places:
            for name, array in record.items():
                batch.arrays[name][first : first + stop - start] = array[start:stop]
        if codecs.detect(value.data) is codecs.Kind.RECORD:
            found = safetensors.parse(value.data)
            if found.header != self._layout(wanted.chunk.rows).header:
                self._layouts[wanted.chunk.rows] = found
                self._patterns.clear()

    def _count_lost(self, wanted: _Wanted, evicted: bool) -> None:
        self._log.miss(wanted.chunk, evicted)
        if evicted:
            if not self.stats.evicted:
                logger.warning(
                    "%s: chunks were evicted before they were read; the first: %r", self._names.name, wanted.key
                )
            self.stats.evicted += 1
            self._client.counters.evicted += 1
        else:
            logger.warning("%s: chunk %r is in the log, but not on the server", self._names.name, wanted.key)
            self.stats.missing += 1
            self._client.counters.lost += 1
            warnings.warn(
                f"chunk {wanted.key!r} is in the log, but not on the server: it was lost, or an actor died while "
                "committing it",
                RuntimeWarning,
                stacklevel=2,
            )


def where_ended(reader: Batches) -> tuple[LogReader, Position | None, list[ChunkId]]:
    """For a reader that goes on there: what is known of the run, the position if there is one, and the chunks that
    ``drop_last`` has left out; the first rows of one of them may have been handed out.

    Raises:
        UsageError: it has not come to its end, or is one of a group.
    """
    if isinstance(reader._source, GroupSource):
        raise UsageError(
            "after= cannot be a reader of consume(): what was read its group knows, and not one of its readers. Go on with "
            "consume() of the same group"
        )
    if not reader._ended:
        raise UsageError(
            "after= is a reader that has not come to its end: nobody would read what it has not handed out. Read on until it "
            "ends; or go on from its position, which follow() and epoch(shuffle=False) have at any time"
        )
    log = reader._log.copy()
    rest: list[ChunkId] = []
    for batch in reader._batches:  # one at most
        missing = {hole.start for hole in batch.holes}
        row = 0
        for chunk in batch.chunks:
            begun = log.begun.get(chunk[:2], 0) if row else batch.row
            if row not in missing:  # else none of its rows was handed out, and it may be committed again
                log.begun[chunk[:2]] = begun
                rest.append(chunk)
            row += chunk.rows - begun
    return log, reader._position, sorted(rest, key=attrgetter("entry"))
