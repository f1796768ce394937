"""Single transitions, wherever they lie in their chunks, into the rows of contiguous arrays.

A chunk is a file of columns. Of a **large** column the rows that are wanted are asked for by ``GETRANGE`` and received in
place; the **small** ones (a reward, an action) come as a whole, once for each chunk, and their rows are picked out here.
Rows that are the whole chunk come by one ``GET``, which Valkey answers without copying the value.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from operator import attrgetter
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from aionpredis.errors import ServerError
from aionpredis.pipeline import Pipeline, slices
from aionpredis.replay.chunk import open_chunk
from aionpredis.replay.index import Ids, Index
from aionpredis.replay.log import Names
from aionpredis.replay.plan import Plan, make_plan
from aionpredis.replay.schema import Schema
from aionpredis.replay.singles import Singles, place
from aionpredis.requests import ValueReply, get_command
from aionpredis.wire.resp import Buffer, Pattern, Template

if TYPE_CHECKING:
    from aionpredis.client import Client

__all__ = ["Arrays", "Fetcher"]

Arrays = dict[str, NDArray[Any]]
_Memory = dict[str, NDArray[np.uint8]]

KEPT_BYTES = 64 << 20
"""Bytes of small columns that a learner keeps, for each length of chunks. 1 M transitions of 80x80 states with an action, a
reward and a flag need 13 MB."""

MAX_CHUNKS = 4096
"""Transitions, so at most chunks, of which the small columns are needed at once."""

MAX_RUNS = 32
"""Rows, or series of rows, in one request."""


class _Run(NamedTuple):
    """``length`` of a chunk's ``rows`` rows from ``row`` on, which go to the batch from ``target`` on.

    ``slot``: where the chunk's small columns are, or go, in their pool; ``is_kept``: they are there; ``is_first``: else this
    run brings them, not another one of the same chunk.
    """

    chunk: int
    key: bytes
    rows: int
    row: int
    length: int
    target: int
    slot: int
    is_first: bool
    is_kept: bool


class _Part(NamedTuple):
    """A command, and what it answers: the bytes ``head``, then what goes to ``places``."""

    command: bytes
    head: bytes
    places: list[memoryview]


class _Pool:
    """The small columns of chunks of one length, kept: a chunk never changes. Beyond ``KEPT_BYTES`` the oldest go."""

    def __init__(self, width: int, *, keeps: bool) -> None:
        self._keeps = keeps
        self._most = max(2 * MAX_CHUNKS, KEPT_BYTES // max(width, 1))
        self._owners: list[bytes | None] = []
        self._slots: dict[bytes, int] = {}
        self._next = 0
        self.memory = np.empty((0, width), np.uint8)

    def reserve(self, keys: list[bytes]) -> list[tuple[int, bool]]:
        """For each chunk its slot, and whether it is there already. A new one counts as there when it is :meth:`keep`-ed."""
        if not self._keeps:
            if len(keys) > len(self.memory):
                self.memory = np.empty((len(keys), self.memory.shape[1]), np.uint8)
            return [(slot, False) for slot in range(len(keys))]
        held = {self._slots[key] for key in keys if key in self._slots}
        reserved: list[tuple[int, bool]] = []
        for key in keys:
            slot = self._slots.get(key)
            if slot is None:
                reserved.append((self._take(held), False))
            else:
                reserved.append((slot, True))
        if len(self._owners) > len(self.memory):
            more = max(len(self._owners), min(2 * len(self.memory), self._most))
            grown = np.empty((more, self.memory.shape[1]), np.uint8)
            grown[: len(self.memory)] = self.memory
            self.memory = grown
        return reserved

    def _take(self, held: set[int]) -> int:
        while self._next in held:
            self._next += 1
        slot = self._next
        if slot == len(self._owners):
            self._owners.append(None)
        owner, self._owners[slot] = self._owners[slot], None
        if owner is not None:
            del self._slots[owner]
        self._next = (slot + 1) % self._most
        return slot

    def keep(self, key: bytes, slot: int) -> None:
        if self._keeps:
            self._owners[slot] = key
            self._slots[key] = slot


class _Job:
    """What one call of :meth:`Fetcher.fetch` asks for, and where it goes."""

    def __init__(self, plans: dict[int, Plan], pools: dict[int, _Pool], memory: _Memory) -> None:
        self._plans = plans
        self._rows = {name: (array.reshape(-1).data, array.shape[1]) for name, array in memory.items() if array.size}
        self._small = {
            rows: (pool.memory.reshape(-1).data if pool.memory.size else memoryview(b""), pool.memory.shape[1])
            for rows, pool in pools.items()
        }

    def plan(self, run: _Run) -> Plan:
        return self._plans[run.rows]

    def parts(self, run: _Run) -> list[_Part]:
        """The commands for a run."""
        plan = self.plan(run)
        key, target, length = run.key, run.target, run.length
        small, width = self._small[plan.rows]
        at = run.slot * width
        # What is kept is not received again: were this cancelled in the midst of replies that are not as predicted, other
        # bytes could be left there.
        is_new = run.is_first and not run.is_kept
        if is_new and length == plan.rows and plan.all_wanted:
            places: list[memoryview] = []
            for part in plan.order:
                if part.__class__ is int:
                    places.append(small[at : at + part])
                    at += part
                else:
                    memory, size = self._rows[part]
                    places.append(memory[target * size : (target + length) * size])
            return [_Part(get_command(key), plan.head, places)]
        parts: list[_Part] = []
        if is_new:
            for start, stop in plan.blocks:
                head = plan.head if not start else b""
                size = stop - start - len(head)
                parts.append(_Part(_getrange(key, start, stop), head, [small[at : at + size]] if size else []))
                at += size
        for name, start, size in plan.large:
            memory, _ = self._rows[name]
            command = _getrange(key, start + run.row * size, start + (run.row + length) * size)
            parts.append(_Part(command, b"", [memory[target * size : (target + length) * size]]))
        return parts

    def size(self, run: _Run) -> int:
        """Bytes that a run asks for."""
        plan = self.plan(run)
        if not plan.large and (run.is_kept or not run.is_first):
            return 0
        return run.length * plan.row_bytes + plan.small_bytes


class Fetcher:
    """Fetches transitions of one run by their numbers in an index. For one task at a time."""

    def __init__(self, client: Client, names: Names, schema: Schema, run: int, index: Index) -> None:
        self._client = client
        self._names = names
        self._schema = schema
        self._run = run
        self._index = index
        self._plans: dict[tuple[int, tuple[str, ...]], Plan] = {}
        self._pools: dict[int, _Pool] = {}  # by rows of a chunk
        self._patterns: dict[Any, Pattern] = {}
        self._singles: dict[tuple[str, ...], Singles] = {}

    async def fetch(self, ids: Ids, out: Arrays) -> NDArray[np.bool_]:
        """Receive the transitions into ``out``: by column, shape ``(len(ids), *shape)``, C-contiguous, writable.

        Columns that are not in ``out`` do not travel, as far as they are large. Returns shape ``(len(ids),)``: ``False``
        where the chunk is not on the server any more; such rows are undefined. Cancelled, nothing is written any more.

        Raises:
            SchemaMismatch: a chunk has other columns.
            ServerError, ConnectionLost, ConnectError: as for :meth:`aionpredis.Client.get`.
        """
        found = np.ones(len(ids), np.bool_)
        for start in range(0, len(ids), MAX_CHUNKS):
            part = slice(start, start + MAX_CHUNKS)
            found[part] = await self._fetch(ids[part], {name: array[part] for name, array in out.items()})
        return found

    async def _fetch(self, ids: Ids, out: Arrays) -> NDArray[np.bool_]:
        found = np.ones(len(ids), np.bool_)
        memory = {name: _bytes(array) for name, array in out.items()}
        chunks, rows = self._index.locate(ids)
        lengths = self._index.lengths(chunks)
        if (lengths == 1).all():
            plan = self._plan(1, tuple(out))
            if plan.large and plan.all_wanted:
                return await self._fetch_singles(plan, chunks, out, memory)
        length_of = dict(zip(chunks.tolist(), lengths.tolist(), strict=True))
        numbers = list(length_of)
        keys = dict(zip(numbers, self._names.data_of(self._run, self._index.origins(np.array(numbers))), strict=True))
        plans = {length: self._plan(length, tuple(out)) for length in set(length_of.values())}
        slots: dict[int, tuple[int, bool]] = {}
        for length, plan in plans.items():
            pool = self._pools.get(length)
            if pool is None:
                # A chunk of one large transition comes by one GET, small columns and all.
                pool = self._pools[length] = _Pool(plan.scratch_bytes, keeps=length > 1 or not plan.large)
            alike = [number for number in numbers if length_of[number] == length]
            slots.update(zip(alike, pool.reserve([keys[number] for number in alike]), strict=True))
        runs = _runs(chunks, rows, keys, slots, length_of)
        pools = {length: self._pools[length] for length in plans}
        job = _Job(plans, pools, memory)
        lost = {run.chunk for run in await self._receive(runs, job, tuple(out))}
        for number in numbers:
            if number not in lost:
                self._pools[length_of[number]].keep(keys[number], slots[number][0])
        for number in lost:
            await self._fetch_whole(number, chunks, rows, out, found)
        lengths[np.isin(chunks, list(lost))] = 0
        slot = np.array([slots[number][0] for number in chunks.tolist()])
        for length, plan in plans.items():
            chosen = np.flatnonzero(lengths == length)
            small = pools[length].memory[slot[chosen]]
            for name, size, offset in plan.small:
                if name in out and size and len(chosen):
                    column = small[:, offset : offset + length * size].reshape(len(chosen), length, size)
                    memory[name][chosen] = column[np.arange(len(chosen)), rows[chosen]]
        return found

    async def _fetch_singles(self, plan: Plan, chunks: Ids, out: Arrays, memory: _Memory) -> NDArray[np.bool_]:
        wanted = tuple(out)
        singles = self._singles.get(wanted)
        if singles is None:
            singles = self._singles[wanted] = Singles(self._client, plan)
        keys = self._names.data_of(self._run, self._index.origins(chunks))
        lost = await singles.fetch(keys, out)
        found = np.ones(len(chunks), np.bool_)
        for name, size, offset in plan.small:
            if name in out and size:
                memory[name][:] = singles.small[: len(chunks), offset : offset + size]
        rows = np.zeros(len(chunks), np.int64)
        for number in set(chunks[lost].tolist()):
            await self._fetch_whole(number, chunks, rows, out, found)
        return found

    def _plan(self, rows: int, wanted: tuple[str, ...]) -> Plan:
        plan = self._plans.get((rows, wanted))
        if plan is None:
            self._plans[rows, wanted] = plan = make_plan(self._schema, rows, wanted)
        return plan

    async def _receive(self, runs: list[_Run], job: _Job, wanted: tuple[str, ...]) -> list[_Run]:
        """Returns the runs that are not there, or in another file than expected."""
        pipeline: Pipeline[list[_Run]] = Pipeline(self._client, immutable=True)
        asking = (run for run in runs if job.size(run))
        groups = slices(self._client.topology, asking, attrgetter("key"), job.size, MAX_RUNS)
        lost: list[_Run] = []
        try:
            while True:
                while not pipeline.full and (group := next(groups, None)):
                    size = sum(map(job.size, group))
                    pipeline.put(partial(self._request, group, job, wanted), group[0].key, size, group)
                if not len(pipeline):
                    return lost
                reply, asked = await pipeline.next()
                if not reply.matched:
                    values = iter(reply.values)
                    for run in asked:
                        fits = [
                            place(_checked(next(values), part.command), part.head, part.places)
                            for part in job.parts(run)
                        ]
                        if not all(fits):
                            lost.append(run)
        finally:
            pipeline.abandon()

    def _request(self, group: list[_Run], job: _Job, wanted: tuple[str, ...]) -> tuple[Sequence[Buffer], ValueReply]:
        parts = [part for run in group for part in job.parts(run)]
        signature = wanted, *[(run.rows, run.length, run.is_first, run.is_kept) for run in group]
        pattern = self._patterns.get(signature)
        if pattern is None:
            if len(self._patterns) >= 1024:
                self._patterns.clear()
            self._patterns[signature] = pattern = _pattern(parts)
        payloads = [place for part in parts for place in part.places]
        return [b"".join([part.command for part in parts])], ValueReply(len(parts), Template(pattern, payloads))

    async def _fetch_whole(self, number: int, chunks: Ids, rows: Ids, out: Arrays, found: NDArray[np.bool_]) -> None:
        """A chunk that is gone, or is another file than expected."""
        chunk = self._index.chunk(number)
        key = self._names.data(self._run, chunk)
        chosen = np.flatnonzero(chunks == number)
        value = await self._client.get_value(key)
        if value is None:
            found[chosen] = False
            return
        record = open_chunk(value, self._schema, self._names, self._run, chunk)
        for name, array in out.items():
            array[chosen] = record[name][rows[chosen]].reshape(len(chosen), *array.shape[1:])


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


def _checked(value: Any, command: bytes) -> Any:
    if isinstance(value, ServerError):
        _, _, name, _, key, *_ = command.split(b"\r\n")
        raise value.about(name.decode(), key)
    return value


def _runs(
    chunks: Ids, rows: Ids, keys: dict[int, bytes], slots: dict[int, tuple[int, bool]], length_of: dict[int, int]
) -> list[_Run]:
    """Series of rows that follow each other both in their chunk and in the batch."""
    starts = np.flatnonzero(np.r_[True, (np.diff(chunks) != 0) | (np.diff(rows) != 1)])
    counts = np.diff(starts, append=len(chunks))
    runs: list[_Run] = []
    seen: set[int] = set()
    for chunk, row, count, start in zip(
        chunks[starts].tolist(), rows[starts].tolist(), counts.tolist(), starts.tolist(), strict=True
    ):
        slot, is_kept = slots[chunk]
        runs.append(_Run(chunk, keys[chunk], length_of[chunk], row, count, start, slot, chunk not in seen, is_kept))
        seen.add(chunk)
    return runs


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
