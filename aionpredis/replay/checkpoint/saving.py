"""A run on its way to the disk: chunks are received and become bundles, each of them one file."""

from __future__ import annotations

import threading
import warnings
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from contextlib import aclosing
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import anyio
import anyio.lowlevel
import anyio.to_thread
import numpy as np
from numpy.typing import NDArray

from aionpredis import codecs, streams
from aionpredis.errors import ReplayGone, SchemaMismatch, ServerError
from aionpredis.pipeline import Pipeline, slices
from aionpredis.replay import runs
from aionpredis.replay.checkpoint import files
from aionpredis.replay.checkpoint.files import Arrays, Extra
from aionpredis.replay.checkpoint.transfer import Progress, silent, transfer
from aionpredis.replay.chunk import open_chunk
from aionpredis.replay.log import Begin, ChunkId, LogReader, Names, look_again, parse_begin
from aionpredis.replay.schema import Schema
from aionpredis.requests import IN_THREAD, ValueReply, get_command
from aionpredis.wire import resp
from aionpredis.wire.resp import Buffer, Reply

if TYPE_CHECKING:
    from aionpredis.client import Client

__all__ = ["save", "save_any"]

T = TypeVar("T")

BUNDLE_BYTES = 64 << 20
"""Bytes of transitions in one file, or a single chunk more."""

ROW_COST = 1 + 8 + 8 + 8
"""Bytes of what the log knows of one transition, at most."""

GROUP = 64
"""Chunks in one request, however small."""


class _Wanted(NamedTuple):
    """A chunk that is asked for: its number in the run, and about how many bytes it has."""

    number: int
    key: bytes
    size: int


class _Bundle:
    """Chunks that become one file, filled up one by one; ``columns``: ``(rows, *shape)``, ``rows`` is the room."""

    def __init__(self, schema: Schema, rows: int) -> None:
        self.columns: Arrays = {name: np.empty((rows, *shape), dtype) for name, (dtype, shape) in schema.items()}
        self.chunks: list[ChunkId] = []
        self.rows = 0
        self.seen = 0
        """Transitions of its chunks, those that were lost included."""

    def add(self, chunk: ChunkId, record: Arrays) -> None:
        for name, column in self.columns.items():
            column[self.rows : self.rows + chunk.rows] = record[name]
        self.chunks.append(chunk)
        self.rows += chunk.rows

    def write(self, path: Path) -> int:
        """Write a file and let go of the memory; its size."""
        record = {name: column[: self.rows] for name, column in self.columns.items()} | self._log()
        size = files.write_record(path, record)
        self.columns.clear()  # the worker thread may refer to this bundle for some time
        return size

    def _log(self) -> Arrays:
        """The columns of :data:`files.LOG`."""
        incarnations = np.frombuffer(b"".join(chunk.incarnation for chunk in self.chunks), np.uint8)
        ends = [
            np.unpackbits(np.frombuffer(chunk.ends or b"\0", np.uint8), count=chunk.rows, bitorder="little")
            for chunk in self.chunks
        ]
        return {
            "log.incarnation": incarnations.reshape(-1, 8),
            "log.seq": np.array([chunk.seq for chunk in self.chunks], np.int64),
            "log.rows": np.array([chunk.rows for chunk in self.chunks], np.int64),
            "log.episode_end": np.concatenate(ends).view(np.bool_),
        }


class _Saving:
    """One run on its way to the disk. ``facts``: what ``replay.json`` will say."""

    def __init__(
        self, client: Client, names: Names, schema: Schema, run: int, folder: Path, progress: Progress | None
    ) -> None:
        self.facts: dict[str, Any] = {
            "format": files.FORMAT,
            "version": files.VERSION,
            "name": names.name,
            "run": run,
            "columns": {name: {"dtype": dtype.name, "shape": shape} for name, (dtype, shape) in schema.items()},
            "transitions": 0,
            "chunks": 0,
            "evicted": 0,
            "missing": 0,
            "policy": None,
            "bundles": [],
            "extra": [],
        }
        self._client = client
        self._names = names
        self._schema = schema
        self._run = run
        self._folder = folder
        self._report = progress or silent
        self._chunks: list[ChunkId] = []
        self._total = 0

    async def save(self, extra: Extra) -> None:
        weights = await self._client.policy(self._names.name).latest()
        log = LogReader(self._client, self._names, self._run, max_rows=self._schema.max_chunk)
        await log.read_all(self._chunks)
        self._total = sum(chunk.rows for chunk in self._chunks)
        self._report(0, self._total)
        if weights is not None:
            path, metadata = self._folder / "policy.safetensors", {"version": str(weights.version)}
            await _to_its_end(partial(files.write_record, path, weights.weights, metadata))
            self.facts["policy"] = weights.version
        for name, record in extra.items():
            await _to_its_end(partial(files.write_record, files.extra_path(self._folder, name), record))
            self.facts["extra"].append(name)
        await transfer(self._bundles(), self._write)

    async def _bundles(self) -> AsyncGenerator[_Bundle]:
        """Bundles filled with what is on the server."""
        left = self._total
        room = BUNDLE_BYTES // (self._schema.row_nbytes + ROW_COST) + 1
        largest = max((chunk.rows for chunk in self._chunks), default=0)
        bundle: _Bundle | None = None
        async with aclosing(self._values()) as values:
            async for chunk, value in values:
                if bundle is None:
                    bundle = _Bundle(self._schema, min(left, room + largest))
                if value is None:
                    value = await self._look_again(chunk)
                if value is not None:
                    bundle.add(chunk, await self._open(chunk, value))
                bundle.seen += chunk.rows
                left -= chunk.rows
                if not left or bundle.rows >= room:
                    yield bundle
                    bundle = None

    async def _write(self, bundles: AsyncIterator[_Bundle]) -> None:
        """Write bundles as they come."""
        done = 0
        async for bundle in bundles:
            if bundle.rows:
                name = f"transitions-{len(self.facts['bundles']):05}.safetensors"
                size = await _to_its_end(partial(bundle.write, self._folder / name))
                self.facts["bundles"].append(
                    {"file": name, "bytes": size, "transitions": bundle.rows, "chunks": len(bundle.chunks)}
                )
                self.facts["transitions"] += bundle.rows
                self.facts["chunks"] += len(bundle.chunks)
            done += bundle.seen
            self._report(done, self._total)

    async def _values(self) -> AsyncGenerator[tuple[ChunkId, NDArray[np.uint8] | None]]:
        """The chunks as they are on the server, in order; ``None`` for one that is not there."""
        pipeline: Pipeline[list[_Wanted]] = Pipeline(self._client, immutable=True)
        wanted = (
            _Wanted(number, self._names.data(self._run, chunk), chunk.rows * self._schema.row_nbytes)
            for number, chunk in enumerate(self._chunks)
        )
        held: dict[int, NDArray[np.uint8] | None] = {}  # one of another shard comes before them
        settled = 0
        groups = slices(self._client.topology, wanted, attrgetter("key"), attrgetter("size"), GROUP)
        try:
            while True:
                while not pipeline.full and (group := next(groups, None)):
                    keys = [one.key for one in group]
                    pipeline.put(partial(_gets, keys), keys[0], sum(one.size for one in group), group)
                if not len(pipeline):
                    return
                reply, group = await pipeline.next()
                for one, value in zip(group, reply.values, strict=True):
                    if isinstance(value, ServerError):
                        raise value.about("GET", one.key)
                    held[one.number] = value
                while settled in held:
                    yield self._chunks[settled], held.pop(settled)
                    settled += 1
        finally:
            pipeline.abandon()

    async def _open(self, chunk: ChunkId, value: NDArray[np.uint8]) -> Arrays:
        """The chunk's columns, views on ``value`` unless that was compressed."""
        decode = partial(open_chunk, value, self._schema, self._names, self._run, chunk)
        in_thread = len(value) >= IN_THREAD and codecs.compressed(value.data)
        return await anyio.to_thread.run_sync(decode) if in_thread else decode()

    async def _look_again(self, chunk: ChunkId) -> NDArray[np.uint8] | None:
        """A chunk that GET did not find; ``None``, and counted, if it stays so."""
        value, evicted = await look_again(self._client, self._names, self._run, chunk)
        if value is None:
            self.facts["evicted" if evicted else "missing"] += 1
            if not evicted:
                key = self._names.data(self._run, chunk)
                said = f"chunk {key!r} is in the log, but not on the server: saved without it"
                warnings.warn(said, RuntimeWarning, stacklevel=2)
        return value


def _gets(keys: list[bytes]) -> tuple[Sequence[Buffer], Reply]:
    return [b"".join(map(get_command, keys))], ValueReply(len(keys))


async def _to_its_end(step: Callable[[], T]) -> T:
    """Do it in a worker thread, and return, or let a cancellation out, when it is done.

    A ``task.cancel()`` of asyncio's, ``asyncio.timeout`` too, knows nothing of anyio's shields: it ends the wait for the
    thread, which goes on.
    """
    await anyio.lowlevel.checkpoint_if_cancelled()
    outcome: Future[T] = Future()
    lock = threading.Lock()

    def work() -> None:
        with lock:  # until a thread is done that nobody waits for any more
            if outcome.done():
                return
            try:
                outcome.set_result(step())
            except BaseException as error:
                outcome.set_exception(error)

    cancellation: BaseException | None = None
    with anyio.CancelScope(shield=True):
        while not outcome.done():
            try:
                await anyio.to_thread.run_sync(work)
            except anyio.get_cancelled_exc_class() as error:
                cancellation = error
    if cancellation is not None:
        raise cancellation
    return outcome.result()


async def save(
    client: Client,
    names: Names,
    schema: Schema,
    run: int,
    folder: Path,
    *,
    progress: Progress | None,
    extra: Extra | None = None,
) -> dict[str, Any]:
    """What :meth:`aionpredis.Replay.save` does; returns what ``replay.json`` says."""
    extra = extra or {}
    for name in extra:
        files.extra_path(folder, name)
    begin = await _begin_of(client, names, run)
    if begin.schema != schema.digest:
        raise SchemaMismatch(
            f"run {run} of {names.name!r} was begun with other columns than {schema!r}", replay=names.name, run=run
        )
    partial_folder = files.beside(folder)
    saving = _Saving(client, names, schema, run, partial_folder, progress)
    named = False

    def finish() -> None:
        nonlocal named
        files.finish(partial_folder, folder, saving.facts)
        named = True

    try:
        await _to_its_end(partial(files.make_beside, folder, partial_folder))
        await saving.save(extra)
        await _to_its_end(finish)
    except BaseException:
        with anyio.CancelScope(shield=True):  # deletes at most what was written: no end of time
            await _to_its_end(partial(files.discard, partial_folder, folder if named else None))
        raise
    return saving.facts


async def save_any(
    client: Client, name: str, folder: Path, run: int | None, progress: Progress | None
) -> dict[str, Any]:
    """Save a run (default: the newest) of whatever columns; returns what ``replay.json`` says.

    Raises:
        ReplayGone: there is no such run, or it has no chunk, so that nobody can say which columns it has.
    """
    names = Names(name)
    begin = await runs.latest(client, names) if run is None else await _begin_of(client, names, run)
    if begin is None:
        raise ReplayGone(f"no run of {name!r} was begun", replay=name)
    schema = await _stored_schema(client, names, begin)
    return await save(client, names, schema, begin.run, folder, progress=progress)


async def _begin_of(client: Client, names: Names, run: int) -> Begin:
    entries = await streams.page(client, names.log, f"{run}-0", f"{run}-0")
    if not entries:
        raise ReplayGone(f"run {run} of {names.name!r} is not there (any more)", replay=names.name, run=run)
    return parse_begin(names, run, entries[0][1])


async def _stored_schema(client: Client, names: Names, begin: Begin) -> Schema:
    """The columns of a run, from one of its chunks."""
    run = begin.run
    chunks: list[ChunkId] = []
    await LogReader(client, names, run).read_all(chunks)
    for chunk in reversed(chunks):  # the newest ones are not evicted so soon
        key = names.data(run, chunk)
        value = await client.get_value(key)
        if value is not None:
            record = codecs.open_record(value.data, max_bytes=resp.MAX_BULK, key=key)
            schema = Schema(**{name: (array.dtype, array.shape[1:]) for name, array in record.items()})
            if schema.digest == begin.schema:
                return schema
    raise ReplayGone(f"run {run} of {names.name!r} has no transitions yet", replay=names.name, run=run)
