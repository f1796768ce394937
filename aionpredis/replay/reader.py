"""Transitions by the batch: chunks are received straight into the rows of contiguous arrays."""

from __future__ import annotations

import math
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from aionpredis import codecs, streams
from aionpredis.errors import SchemaMismatch, ServerError
from aionpredis.formats import safetensors
from aionpredis.formats.safetensors import Layout
from aionpredis.memory import Recycler
from aionpredis.pipeline import Pipeline
from aionpredis.replay.log import ChunkId, LogReader, Names
from aionpredis.replay.schema import Schema
from aionpredis.requests import ValueReply
from aionpredis.wire import resp
from aionpredis.wire.resp import Buffer, Pattern, Template

if TYPE_CHECKING:
    from aionpredis.client import Client

__all__ = ["Batches", "ReadStats"]

Arrays = dict[str, NDArray[Any]]


@dataclass
class ReadStats:
    """What one reader has met. ``transitions``: handed out; ``chunks``: received; ``duplicates``: log entries of chunks
    that were read before, skipped; ``evicted``: chunks whose log entry went, too, before they were read; ``missing``:
    chunks that the log names and the server does not have; ``gaps``: chunks that were numbered and never committed.
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
        """Learn of more chunks, waiting for them if need be; ``False``: there will be none."""


class EpochSource:
    """Every chunk that is committed when reading begins, once; shuffled if there is a generator."""

    def __init__(self, log: LogReader, rng: np.random.Generator | None) -> None:
        self._log = log
        self._rng = rng
        self._found: list[ChunkId] = []
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


class FollowSource:
    """Every chunk of a run, in the order of commits, until the run has ended."""

    def __init__(self, log: LogReader) -> None:
        self._log = log
        self._chunks: deque[ChunkId] = deque()

    def take(self) -> ChunkId | None:
        return self._chunks.popleft() if self._chunks else None

    async def more(self) -> bool:
        while not self._log.ended:
            self._chunks += await self._log.read(wait=True)
            if self._chunks:
                return True
        await self._log.read_all(self._chunks)  # what came between the last look and the end
        return bool(self._chunks)


class _Batch:
    """Arrays that are being filled: ``filled`` rows are spoken for, ``pending`` chunks are still travelling."""

    def __init__(self, schema: Schema, size: int, recyclers: dict[str, Recycler]) -> None:
        self.arrays: Arrays = {}
        self.rows: dict[str, tuple[memoryview, int]] = {}  # memory, bytes a row
        for name, (dtype, shape) in schema.items():
            row = dtype.itemsize * math.prod(shape)
            if name not in recyclers:
                recyclers[name] = Recycler(size * row)
            memory = recyclers[name].take()
            self.arrays[name] = memory.view(dtype).reshape(size, *shape) if row else np.empty((size, *shape), dtype)
            self.rows[name] = memory.data, row
        self.filled = 0
        self.pending = 0
        self.holes: list[slice] = []

    def finish(self) -> Arrays:
        """The rows that came."""
        if not self.holes and self.filled == len(next(iter(self.arrays.values()))):
            return self.arrays
        keep = np.zeros(len(next(iter(self.arrays.values()))), np.bool_)
        keep[: self.filled] = True
        for hole in self.holes:
            keep[hole] = False
        return {name: array[keep] for name, array in self.arrays.items()}


@dataclass
class _Place:
    """Rows ``source`` of a chunk go to rows ``target`` of ``batch``."""

    batch: _Batch
    target: slice
    source: slice


@dataclass
class _Wanted:
    chunk: ChunkId
    key: bytes
    places: list[_Place] = field(default_factory=list)
    lost: bool = False


@lru_cache(256)
def _pattern(header: bytes, row_sizes: tuple[int, ...], cuts: tuple[int, ...], size: int) -> Pattern:
    """A chunk's reply: its file's header, then for each column the rows between the cuts."""
    items: list[bytes | int] = [b"$%d\r\n%b" % (size, header)]
    items += [(stop - start) * row for row in row_sizes for start, stop in pairwise(cuts)]
    return Pattern([*items, b"\r\n"])


class Batches:
    """``async for batch in …``: dicts of contiguous arrays, ``(rows, *shape)`` by column, memory of their own.

    A batch that nobody refers to any more gives its memory to a later one; one that is kept keeps it.

    Every batch has ``batch`` rows but the last one (and one from which the server lost a chunk). Made by
    :meth:`aionpredis.Replay.epoch` and :meth:`~aionpredis.Replay.follow`. Nothing has to be closed; a cancelled step can
    be repeated and loses nothing. ``stats``: see :class:`ReadStats`.
    """

    def __init__(
        self, client: Client, names: Names, schema: Schema, log: LogReader, source: Source, batch: int, drop_last: bool
    ) -> None:
        self.stats = ReadStats()
        self._client = client
        self._names = names
        self._schema = schema
        self._log = log
        self._source = source
        self._size = batch
        self._drop_last = drop_last
        self._pipeline: Pipeline[_Wanted] = Pipeline(client)
        self._arrived: tuple[_Wanted, NDArray[np.uint8] | None] | None = None  # has to be placed yet
        self._batches: deque[_Batch] = deque()
        self._recyclers: dict[str, Recycler] = {}  # by column
        self._layouts: dict[int, Layout] = {}  # by rows: what chunks of that length have looked like

    @property
    def run(self) -> int:
        """The run that is read."""
        return self._log.run

    @property
    def log(self) -> LogReader:
        """What is known of the run, for a reader that goes on where this one ended."""
        return self._log

    def __aiter__(self) -> Batches:
        return self

    async def __anext__(self) -> Arrays:
        while True:
            if self._batches and self._batches[0].filled == self._size and not self._batches[0].pending:
                arrays = self._finish()
                if arrays is not None:
                    return arrays
                continue
            while not self._pipeline.full and (chunk := self._source.take()):
                self._want(chunk)
            if self._arrived is not None:
                await self._place(*self._arrived)
                self._settle(self._arrived[0])
                self._arrived = None
            elif len(self._pipeline):
                reply, wanted = await self._pipeline.next()
                if reply.matched:
                    self._settle(wanted)
                elif isinstance(reply.values[0], ServerError):
                    self._ask(wanted)  # if somebody calls again
                    raise reply.values[0]
                else:
                    self._arrived = wanted, reply.values[0]
            elif not await self._source.more():
                self.stats.duplicates, self.stats.gaps = self._log.duplicates, self._log.gaps
                if not self._batches or self._drop_last:
                    raise StopAsyncIteration
                arrays = self._finish()
                if arrays is not None:
                    return arrays

    def _finish(self) -> Arrays | None:
        arrays = self._batches.popleft().finish()
        rows = len(next(iter(arrays.values())))
        self.stats.transitions += rows
        self.stats.duplicates = self._log.duplicates
        return arrays if rows else None

    def _settle(self, wanted: _Wanted) -> None:
        self.stats.chunks += not wanted.lost
        for place in wanted.places:
            place.batch.pending -= 1
            if wanted.lost:
                place.batch.holes.append(place.target)

    def _want(self, chunk: ChunkId) -> None:
        """Assign a chunk to rows of the batch that is being filled, and on into the next one, and ask for it."""
        wanted = _Wanted(chunk, self._names.data(self._log.run, chunk))
        row = 0
        while row < chunk.rows:
            if not self._batches or self._batches[-1].filled == self._size:
                self._batches.append(_Batch(self._schema, self._size, self._recyclers))
            batch = self._batches[-1]
            count = min(chunk.rows - row, self._size - batch.filled)
            wanted.places.append(_Place(batch, slice(batch.filled, batch.filled + count), slice(row, row + count)))
            batch.filled += count
            batch.pending += 1
            row += count
        self._ask(wanted)

    def _ask(self, wanted: _Wanted) -> None:
        self._pipeline.put(lambda: self._request(wanted), wanted.chunk.rows * self._schema.row_nbytes, wanted)

    def _request(self, wanted: _Wanted) -> tuple[Sequence[Buffer], ValueReply]:
        command = resp.encode("GET", wanted.key)
        layout = self._layouts.get(wanted.chunk.rows)
        if layout is None:
            return command, ValueReply()
        places = wanted.places
        row_sizes = tuple(places[0].batch.rows[name][1] for name in layout.order)
        cuts = (0, *(place.source.stop for place in places))
        payloads = []
        for name in layout.order:
            for place in places:
                memory, size = place.batch.rows[name]
                payloads.append(memory[place.target.start * size : place.target.stop * size])
        return command, ValueReply(1, Template(_pattern(layout.header, row_sizes, cuts, layout.size), payloads))

    async def _place(self, wanted: _Wanted, value: NDArray[np.uint8] | None) -> None:
        """Take a chunk that was not predicted: the first of its length, or one that is not there."""
        if value is None:
            value = await self._look_again(wanted)
            if value is None:
                wanted.lost = True
                return
        record = codecs.open_record(value.data, max_bytes=resp.MAX_BULK, key=wanted.key)
        layout = self._schema.layout(wanted.chunk.rows)
        if {name: (array.dtype, array.shape) for name, array in record.items()} != {
            name: (column.dtype, column.shape) for name, column in layout.columns.items()
        }:
            raise SchemaMismatch(
                f"chunk {wanted.key!r} has other columns than {self._schema!r}",
                replay=self._names.name,
                run=self._log.run,
            )
        for place in wanted.places:
            for name, array in record.items():
                place.batch.arrays[name][place.target] = array[place.source]
        if wanted.chunk.rows not in self._layouts and codecs.detect(value.data) is codecs.Kind.RECORD:
            self._layouts[wanted.chunk.rows] = safetensors.parse(value.data)

    async def _look_again(self, wanted: _Wanted) -> NDArray[np.uint8] | None:
        """A chunk that GET did not find: evicted if its log entry is gone, too; else once more, then missing."""
        entry = f"{self._log.run}-{wanted.chunk.entry}"
        value = None
        for last in (False, True):  # the entry is looked at again: who deletes a chunk deletes its data first
            if not await streams.page(self._client, self._names.log, entry, entry):
                self.stats.evicted += 1
                return None
            if not last:
                value = await self._client.get_value(wanted.key)
                if value is not None:
                    return value
        self.stats.missing += 1
        warnings.warn(
            f"chunk {wanted.key!r} is in the log, but not on the server: it was lost, or an actor died while "
            "committing it",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
