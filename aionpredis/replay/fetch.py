"""Single transitions, wherever they lie in their chunks, into the rows of contiguous arrays.

A chunk is a file of columns. Of a **large** column the rows that are wanted are asked for by ``GETRANGE`` and received in
place; the **small** ones (a reward, an action) come as a whole, once for each chunk, and their rows are picked out here.
Rows that are the whole chunk come by one ``GET``, which Valkey answers without copying the value.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from aionpredis import codecs
from aionpredis.errors import SchemaMismatch, ServerError
from aionpredis.pipeline import Pipeline
from aionpredis.replay.index import Ids, Index
from aionpredis.replay.log import ChunkId, Names
from aionpredis.replay.schema import Schema
from aionpredis.requests import SLICE, ValueReply
from aionpredis.wire import resp
from aionpredis.wire.resp import Buffer, Pattern, Template

if TYPE_CHECKING:
    from aionpredis.client import Client

__all__ = ["Arrays", "Fetcher"]

Arrays = dict[str, NDArray[Any]]
_Memory = dict[str, NDArray[np.uint8]]

SMALL = 2048
"""Bytes of a column in one chunk up to which all of it is fetched: another command costs as much as ~10 kB."""

MAX_RUNS = 32
"""Rows, or series of rows, in one request."""


class _Run(NamedTuple):
    """``length`` rows of a chunk from ``row`` on, which go to ``out`` from ``target`` on."""

    chunk: int
    row: int
    length: int
    target: int
    scratch: int  # where the chunk's small columns go; -1: another run brings them


class _Part(NamedTuple):
    """A command, and what it answers: the bytes ``head``, then what goes to ``places``."""

    command: bytes
    head: bytes
    places: list[memoryview]


@dataclass(frozen=True, slots=True)
class _Plan:
    """How chunks of ``rows`` transitions are asked for. Places are bytes from the start of the file.

    ``head``: the file's header, which must be as expected. ``blocks``: first and last byte of what is fetched whole, the
    first one with the header. ``large``: name, first byte, and bytes a row. ``small``: name, bytes a row, and where the
    column lies in the blocks together, without the header. ``order``: for each column of the file its name if it is large,
    else the bytes of all small ones up to the next. ``all_wanted``: no large column is left out. ``row_bytes``: of the large
    columns in a row; ``small_bytes``: of the small ones and the header.
    """

    rows: int
    head: bytes
    blocks: list[tuple[int, int]]
    large: list[tuple[str, int, int]]
    small: list[tuple[str, int, int]]
    order: list[Any]
    scratch_bytes: int
    all_wanted: bool
    row_bytes: int
    small_bytes: int


def _plan(schema: Schema, rows: int, wanted: Sequence[str]) -> _Plan:
    layout = schema.layout(rows)
    start = len(layout.header)
    blocks = [(0, start)]
    large: list[tuple[str, int, int]] = []
    small: list[tuple[str, int, int]] = []
    order: list[Any] = []
    scratch = 0
    for name in layout.order:
        column = layout.columns[name]
        size = column.stop - column.start
        if size > SMALL:
            if name in wanted:
                large.append((name, start + column.start, size // rows))
            order.append(name)
            continue
        if blocks[-1][1] == start + column.start:
            blocks[-1] = (blocks[-1][0], start + column.stop)
        else:
            blocks.append((start + column.start, start + column.stop))
        small.append((name, size // rows, scratch))
        if order and isinstance(order[-1], int):
            order[-1] += size
        elif size:
            order.append(size)
        scratch += size
    complete = len(large) == sum(isinstance(part, str) for part in order)
    row_bytes = sum(size for _, _, size in large)
    return _Plan(rows, layout.header, blocks, large, small, order, scratch, complete, row_bytes, scratch + start)


class _Job:
    """What one call of :meth:`Fetcher.fetch` asks for, and where it goes."""

    def __init__(
        self,
        chunks: list[ChunkId],
        key: Callable[[ChunkId], bytes],
        plans: dict[int, _Plan],
        memory: _Memory,
        count: int,
    ) -> None:
        self._chunks = chunks
        self._key = key
        self.plans = plans
        self._rows = {name: (array.reshape(-1).data, array.shape[1]) for name, array in memory.items() if array.size}
        self._width = max(plan.scratch_bytes for plan in plans.values())
        self.scratch = np.empty((count, self._width), np.uint8)
        self._flat = self.scratch.reshape(-1).data if self.scratch.size else memoryview(b"")

    def plan(self, run: _Run) -> _Plan:
        return self.plans[self._chunks[run.chunk].rows]

    def parts(self, run: _Run) -> list[_Part]:
        """The commands for a run."""
        chunk, row, length, target, scratch = run
        plan = self.plans[self._chunks[chunk].rows]
        key = self._key(self._chunks[chunk])
        at = scratch * self._width
        if length == plan.rows and scratch >= 0 and plan.all_wanted:
            places: list[memoryview] = []
            for part in plan.order:
                if part.__class__ is int:
                    places.append(self._flat[at : at + part])
                    at += part
                else:
                    memory, size = self._rows[part]
                    places.append(memory[target * size : (target + length) * size])
            return [_Part(b"*2\r\n$3\r\nGET\r\n$%d\r\n%b\r\n" % (len(key), key), plan.head, places)]
        parts: list[_Part] = []
        if scratch >= 0:
            for start, stop in plan.blocks:
                head = plan.head if not start else b""
                size = stop - start - len(head)
                parts.append(_Part(_getrange(key, start, stop), head, [self._flat[at : at + size]] if size else []))
                at += size
        for name, start, size in plan.large:
            memory, _ = self._rows[name]
            command = _getrange(key, start + row * size, start + (row + length) * size)
            parts.append(_Part(command, b"", [memory[target * size : (target + length) * size]]))
        return parts

    def groups(self, runs: list[_Run]) -> Iterator[tuple[list[_Run], int]]:
        """What goes into one request together, and its bytes."""
        group: list[_Run] = []
        total = 0
        for run in runs:
            plan = self.plan(run)
            if run.scratch < 0 and not plan.large:
                continue  # it has nothing to ask for
            size = run.length * plan.row_bytes + plan.small_bytes
            if group and (total + size > SLICE or len(group) == MAX_RUNS):
                yield group, total
                group, total = [], 0
            group.append(run)
            total += size
        if group:
            yield group, total


class Fetcher:
    """Fetches transitions of one run by their numbers in an index. For one task at a time."""

    def __init__(self, client: Client, names: Names, schema: Schema, run: int, index: Index) -> None:
        self._client = client
        self._names = names
        self._schema = schema
        self._run = run
        self._index = index
        self._plans: dict[tuple[int, tuple[str, ...]], _Plan] = {}
        self._patterns: dict[Any, Pattern] = {}

    async def fetch(self, ids: Ids, out: Arrays) -> NDArray[np.bool_]:
        """Receive the transitions into ``out``: by column, shape ``(len(ids), *shape)``, C-contiguous, writable.

        Columns that are not in ``out`` do not travel, as far as they are large. Returns shape ``(len(ids),)``: ``False``
        where the chunk is not on the server any more; such rows are undefined. Cancelled, nothing is written any more.

        Raises:
            SchemaMismatch: a chunk has other columns.
            ServerError, ConnectionLost, ConnectError: as for :meth:`aionpredis.Client.get`.
        """
        found = np.ones(len(ids), np.bool_)
        if not len(ids):
            return found
        known = self._index.chunks
        memory = {name: _bytes(array) for name, array in out.items()}
        chunks, rows = self._index.locate(ids)
        runs, place_of = _runs(chunks, rows)
        plans = {length: self._plan(length, tuple(out)) for length in {known[chunk].rows for chunk in place_of}}
        job = _Job(known, partial(self._names.data, self._run), plans, memory, len(place_of))
        lost = {run.chunk for run in await self._receive(runs, job, tuple(out))}
        for chunk in lost:
            await self._fetch_whole(chunk, chunks, rows, out, found)
        numbers = chunks.tolist()
        lengths = np.array([0 if chunk in lost else known[chunk].rows for chunk in numbers])
        at = np.array([place_of[chunk] for chunk in numbers])
        for length, plan in plans.items():
            chosen = np.flatnonzero(lengths == length)
            for name, size, offset in plan.small:
                if name in out and size and len(chosen):
                    column = job.scratch[:, offset : offset + length * size].reshape(len(place_of), length, size)
                    memory[name][chosen] = column[at[chosen], rows[chosen]]
        return found

    def _plan(self, rows: int, wanted: tuple[str, ...]) -> _Plan:
        plan = self._plans.get((rows, wanted))
        if plan is None:
            self._plans[rows, wanted] = plan = _plan(self._schema, rows, wanted)
        return plan

    async def _receive(self, runs: list[_Run], job: _Job, wanted: tuple[str, ...]) -> list[_Run]:
        """Returns the runs that are not there, or in another file than expected."""
        pipeline: Pipeline[list[_Run]] = Pipeline(self._client)
        groups = job.groups(runs)
        lost: list[_Run] = []
        try:
            while True:
                while not pipeline.full and (group := next(groups, None)):
                    pipeline.put(partial(self._request, group[0], job, wanted), group[1], group[0])
                if not len(pipeline):
                    return lost
                reply, asked = await pipeline.next()
                if not reply.matched:
                    values = iter(reply.values)
                    for run in asked:
                        fits = [_place(next(values), part) for part in job.parts(run)]  # each takes its value
                        if not all(fits):
                            lost.append(run)
        finally:
            pipeline.abandon()

    def _request(self, group: list[_Run], job: _Job, wanted: tuple[str, ...]) -> tuple[Sequence[Buffer], ValueReply]:
        parts = [part for run in group for part in job.parts(run)]
        known = self._index.chunks
        signature = wanted, *[(known[run.chunk].rows, run.length, run.scratch >= 0) for run in group]
        pattern = self._patterns.get(signature)
        if pattern is None:
            if len(self._patterns) >= 1024:
                self._patterns.clear()
            self._patterns[signature] = pattern = _pattern(parts)
        payloads = [place for part in parts for place in part.places]
        return [b"".join([part.command for part in parts])], ValueReply(len(parts), Template(pattern, payloads))

    async def _fetch_whole(self, number: int, chunks: Ids, rows: Ids, out: Arrays, found: NDArray[np.bool_]) -> None:
        """A chunk that is gone, or is another file than expected."""
        chunk = self._index.chunks[number]
        key = self._names.data(self._run, chunk)
        chosen = np.flatnonzero(chunks == number)
        value = await self._client.get_value(key)
        if value is None:
            found[chosen] = False
            return
        record = codecs.open_record(value.data, max_bytes=resp.MAX_BULK, key=key)
        for name, (dtype, shape) in self._schema.items():
            array = record.get(name)
            if array is None or array.dtype != dtype or array.shape != (chunk.rows, *shape):
                raise SchemaMismatch(
                    f"chunk {key!r} has another column {name!r} than {self._schema!r}",
                    replay=self._names.name,
                    run=self._run,
                )
            if name in out:
                out[name][chosen] = array[rows[chosen]]


def _pattern(parts: list[_Part]) -> Pattern:
    items: list[bytes | int] = []
    literal = b""
    for _, head, places in parts:
        literal += b"$%d\r\n%b" % (len(head) + sum(map(len, places)), head)
        if places:
            items += (literal, *map(len, places))
            literal = b""
        literal += b"\r\n"
    return Pattern([*items, literal])


def _place(value: Any, part: _Part) -> bool:
    """Copy a reply that came with others than expected; whether it is what this part asked for."""
    if isinstance(value, ServerError):
        raise value
    head, places = part.head, part.places
    if value is None or len(value) != len(head) + sum(map(len, places)) or value[: len(head)].tobytes() != head:
        return False
    at = len(head)
    for place in places:
        place[:] = value[at : at + len(place)].data
        at += len(place)
    return True


def _runs(chunks: Ids, rows: Ids) -> tuple[list[_Run], dict[int, int]]:
    """Series of rows that follow each other both in their chunk and in the batch; each chunk's place in the scratch memory."""
    starts = np.flatnonzero(np.r_[True, (np.diff(chunks) != 0) | (np.diff(rows) != 1)])
    counts = np.diff(starts, append=len(chunks))
    runs: list[_Run] = []
    places: dict[int, int] = {}
    for chunk, row, count, start in zip(
        chunks[starts].tolist(), rows[starts].tolist(), counts.tolist(), starts.tolist(), strict=True
    ):
        scratch = -1 if chunk in places else places.setdefault(chunk, len(places))
        runs.append(_Run(chunk, row, count, start, scratch))
    return runs, places


def _getrange(key: bytes, start: int, stop: int) -> bytes:
    first, last = b"%d" % start, b"%d" % (stop - 1)
    return b"*4\r\n$8\r\nGETRANGE\r\n$%d\r\n%b\r\n$%d\r\n%b\r\n$%d\r\n%b\r\n" % (
        len(key),
        key,
        len(first),
        first,
        len(last),
        last,
    )


def _bytes(array: NDArray[Any]) -> NDArray[np.uint8]:
    """An array's memory, shape ``(rows, bytes a row)``."""
    row = array.dtype.itemsize * math.prod(array.shape[1:])
    if not row:
        return np.empty((len(array), 0), np.uint8)
    return array.reshape(-1).view(np.uint8).reshape(len(array), row)
