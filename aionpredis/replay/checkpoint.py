"""A run of a replay as a folder of standard files, and back.

::

    folder/
    ├── replay.json                     name, run, columns, counts, the files below
    ├── transitions-00000.safetensors   ~64 MB of whole chunks, one behind the other, in the order of the log
    ├── …
    ├── policy.safetensors              the newest weights; their version stands in ``__metadata__``
    └── <name>.safetensors              whatever else was saved with them

In a bundle of transitions each column is ``(transitions, *shape)``. What the log knows stands beside them, under names
that no column can have: ``log.incarnation`` ``(chunks, 8)`` uint8, ``log.seq`` and ``log.rows`` ``(chunks,)`` int64, and
``log.episode_end`` ``(transitions,)`` bool. So a restored run has the same chunks, and the same trajectories.

A folder has its name only when it is whole. At most two bundles are in memory, one that travels and one on its way to or
from the disk, which is a worker thread's business.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import warnings
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import aclosing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import anyio
import anyio.lowlevel
import anyio.to_thread
import numpy as np
from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream
from numpy.typing import NDArray

from aionpredis import codecs, streams
from aionpredis.errors import (
    CorruptValue,
    DecodeError,
    ReplayGone,
    RunEnded,
    SchemaMismatch,
    ServerError,
    UsageError,
)
from aionpredis.formats import safetensors
from aionpredis.formats.npy import ml_dtype
from aionpredis.formats.safetensors import Layout
from aionpredis.memory import ALIGNMENT, aligned_empty
from aionpredis.names import check_name
from aionpredis.pipeline import Pipeline
from aionpredis.replay import runs
from aionpredis.replay.chunk import ChunkBuffer
from aionpredis.replay.commit import Committer
from aionpredis.replay.log import Begin, ChunkId, LogReader, Names, parse_begin
from aionpredis.replay.schema import Schema
from aionpredis.requests import IN_THREAD, SLICE, ValueReply
from aionpredis.wire import resp
from aionpredis.wire.resp import Buffer, Reply

if TYPE_CHECKING:
    from aionpredis.client import Client
    from aionpredis.policy import PolicyVersion

__all__ = ["Extra", "Progress", "Saved", "load_extra", "look_through", "restore_any", "save", "save_any", "saved_facts"]

Arrays = dict[str, NDArray[Any]]
Extra = Mapping[str, Mapping[str, object]]
"""Arrays by file and name."""
Progress = Callable[[int, int], None]
"""``progress(done, all)``, in transitions: ``done`` never falls, and is ``all`` in the end."""

FORMAT, VERSION = "aionpredis.replay", 1
"""What ``replay.json`` says that the folder is."""

BUNDLE_BYTES = 64 << 20
"""Bytes of transitions in one file, or a single chunk more."""

TRAVELLING_BYTES = 4 << 20
"""Bytes of chunks that are on their way to the server while a run is restored."""

MAX_TRAVELLING = 32
"""Their number, however small they are."""

GROUP = 64
"""Chunks in one request, however small."""

LOG = {"log.incarnation": "uint8", "log.seq": "int64", "log.rows": "int64", "log.episode_end": "bool"}
ROW_COST = 1 + 8 + 8 + 8
"""Bytes of these columns for one transition, at most."""

_BUNDLE = re.compile(r"transitions-\d{5,9}\.safetensors")


# --- files, in worker threads ----------------------------------------------------------------------------------------


def _write_record(path: Path, record: Mapping[str, object], metadata: Mapping[str, str] | None = None) -> int:
    """Write a ``.safetensors`` file to the disk; its size."""
    header, views = safetensors.encode(record)
    if metadata:
        tree = json.loads(header[8:])
        tree = {safetensors.METADATA: tree.pop(safetensors.METADATA, {}) | metadata} | tree
        text = json.dumps(tree, separators=(",", ":"), ensure_ascii=False).encode()
        text = text.ljust(-(-(8 + len(text)) // ALIGNMENT) * ALIGNMENT - 8)
        header = len(text).to_bytes(8, "little") + text
    return _write(path, [header, *views])


def _write(path: Path, parts: Sequence[Buffer]) -> int:
    with path.open("xb") as file:
        for part in parts:
            file.write(part)
        file.flush()
        os.fsync(file.fileno())
    return sum(map(len, parts))


def _read_record(path: Path) -> Arrays:
    """The record in a whole ``.safetensors`` file. Its arrays share one block of memory that is nobody else's.

    Raises:
        UsageError: there is no such file.
        CorruptValue: it is none, or was cut off.
    """
    with _opened(path) as file:
        size = os.fstat(file.fileno()).st_size
        memory = aligned_empty(size)
        if file.readinto(memory.data) != size:
            raise CorruptValue(f"{path}: it became shorter meanwhile")
    try:
        return safetensors.decode(memory.data)
    except DecodeError as error:
        raise CorruptValue(f"{path}: {error}") from None


def _read_header(path: Path, file: io.BufferedReader) -> Layout:
    """Where everything is in this file, whose size agrees with that."""
    size = os.fstat(file.fileno()).st_size
    head = file.read(8)
    head += file.read(min(size, safetensors.MAX_HEADER, int.from_bytes(head, "little")))
    try:
        layout = safetensors.parse(memoryview(head))
    except DecodeError as error:
        raise CorruptValue(f"{path}: {error}") from None
    if layout.size != size:
        raise CorruptValue(f"{path}: its header promises {layout.size:,} bytes, it has {size:,}")
    return layout


def _opened(path: Path) -> io.BufferedReader:
    try:
        return path.open("rb")
    except (FileNotFoundError, NotADirectoryError):
        raise UsageError(f"{path} is missing") from None


def _sync_folder(folder: Path) -> None:
    if hasattr(os, "O_DIRECTORY"):  # elsewhere a folder cannot be opened
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _make_beside(folder: Path) -> Path:
    """A new folder for what will become ``folder``."""
    if folder.exists() or folder.is_symlink():
        raise UsageError(f"{folder} exists already")
    if not folder.parent.is_dir():
        raise UsageError(f"{folder.parent}: there is no such folder")
    partial_folder = folder.with_name(f"{folder.name}.partial-{os.urandom(4).hex()}")
    partial_folder.mkdir()
    return partial_folder


def _finish(partial_folder: Path, folder: Path, facts: Mapping[str, Any]) -> None:
    """Describe what was written, and give it its name."""
    text = json.dumps(facts, indent=2) + "\n"
    _write(partial_folder / "replay.json", [text.encode()])
    _sync_folder(partial_folder)
    try:
        if folder.exists():  # an empty one would be replaced
            raise FileExistsError
        partial_folder.rename(folder)
    except OSError as error:
        if folder.exists():
            raise UsageError(f"{folder} exists already: somebody made it meanwhile") from error
        raise
    _sync_folder(folder.parent)


def _extra_path(folder: Path, name: str) -> Path:
    check_name(name)
    if name == "policy" or _BUNDLE.fullmatch(f"{name}.safetensors"):
        raise UsageError(f"the file {name}.safetensors of a saved replay is something else already")
    return folder / f"{name}.safetensors"


def load_extra(folder: str | os.PathLike[str], name: str) -> Arrays:
    """The arrays that were saved with a replay as ``extra={name: …}``, in memory of their own. Reads a file: blocks.

    Raises:
        UsageError: there is no such file.
        CorruptValue: it was damaged.
    """
    return _read_record(_extra_path(Path(folder), name))


# --- saving ----------------------------------------------------------------------------------------------------------


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
        size = _write_record(path, self._record())
        self.columns.clear()  # the worker thread may refer to this bundle for some time
        return size

    def _record(self) -> Arrays:
        incarnations = np.frombuffer(b"".join(chunk.incarnation for chunk in self.chunks), np.uint8)
        ends = np.zeros(self.rows, np.bool_)
        row = 0
        for chunk in self.chunks:
            if chunk.ends:
                bits = np.frombuffer(chunk.ends, np.uint8)
                ends[row : row + chunk.rows] = np.unpackbits(bits, count=chunk.rows, bitorder="little")
            row += chunk.rows
        log: Arrays = {
            "log.incarnation": incarnations.reshape(len(self.chunks), 8),
            "log.seq": np.array([chunk.seq for chunk in self.chunks], np.int64),
            "log.rows": np.array([chunk.rows for chunk in self.chunks], np.int64),
            "log.episode_end": ends,
        }
        return {name: column[: self.rows] for name, column in self.columns.items()} | log


class _Saving:
    """One run on its way to the disk. ``facts``: what ``replay.json`` will say."""

    def __init__(
        self, client: Client, names: Names, schema: Schema, run: int, folder: Path, progress: Progress | None
    ) -> None:
        self.facts: dict[str, Any] = {
            "format": FORMAT,
            "version": VERSION,
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
        self._report = progress or _silent

    async def save(self, weights: PolicyVersion | None, extra: Extra) -> None:
        chunks: list[ChunkId] = []
        await LogReader(self._client, self._names, self._run).read_all(chunks)
        total = sum(chunk.rows for chunk in chunks)
        self._report(0, total)
        if weights is not None:
            metadata = {"version": str(weights.version)}
            await anyio.to_thread.run_sync(
                _write_record, self._folder / "policy.safetensors", weights.weights, metadata
            )
            self.facts["policy"] = weights.version
        for name, record in extra.items():
            await anyio.to_thread.run_sync(_write_record, _extra_path(self._folder, name), record)
            self.facts["extra"].append(name)
        sender, receiver = anyio.create_memory_object_stream[_Bundle]()
        await _together(partial(self._receive, chunks, sender), partial(self._write, receiver, total))

    async def _receive(self, chunks: list[ChunkId], sender: MemoryObjectSendStream[_Bundle]) -> None:
        """Fill bundles with what is on the server."""
        left = sum(chunk.rows for chunk in chunks)
        room = BUNDLE_BYTES // (self._schema.row_nbytes + ROW_COST) + 1
        largest = max((chunk.rows for chunk in chunks), default=0)
        bundle: _Bundle | None = None
        async with sender, aclosing(self._values(chunks)) as values:
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
                    await sender.send(bundle)
                    bundle = None

    async def _write(self, receiver: MemoryObjectReceiveStream[_Bundle], total: int) -> None:
        """Write bundles as they come."""
        done = 0
        async with receiver:
            async for bundle in receiver:
                if bundle.rows:
                    name = f"transitions-{len(self.facts['bundles']):05}.safetensors"
                    size = await anyio.to_thread.run_sync(bundle.write, self._folder / name)
                    self.facts["bundles"].append(
                        {"file": name, "bytes": size, "transitions": bundle.rows, "chunks": len(bundle.chunks)}
                    )
                    self.facts["transitions"] += bundle.rows
                    self.facts["chunks"] += len(bundle.chunks)
                done += bundle.seen
                self._report(done, total)

    async def _values(self, chunks: list[ChunkId]) -> AsyncGenerator[tuple[ChunkId, NDArray[np.uint8] | None]]:
        """The chunks as they are on the server, in this order; ``None`` for one that is not there."""
        pipeline: Pipeline[list[ChunkId]] = Pipeline(self._client)
        groups = _groups(chunks, self._schema.row_nbytes)
        try:
            while True:
                while not pipeline.full and (group := next(groups, None)):
                    keys = [self._names.data(self._run, chunk) for chunk in group]
                    size = sum(chunk.rows for chunk in group) * self._schema.row_nbytes
                    pipeline.put(partial(_gets, keys), size, group)
                if not len(pipeline):
                    return
                reply, group = await pipeline.next()
                for chunk, value in zip(group, reply.values, strict=True):
                    if isinstance(value, ServerError):
                        raise value
                    yield chunk, value
        finally:
            pipeline.abandon()

    async def _open(self, chunk: ChunkId, value: NDArray[np.uint8]) -> Arrays:
        """The chunk's columns, views on ``value`` unless that was compressed."""
        key = self._names.data(self._run, chunk)
        decode = partial(codecs.open_record, value.data, max_bytes=resp.MAX_BULK, key=key)
        in_thread = len(value) >= IN_THREAD and codecs.compressed(value.data)
        record = await anyio.to_thread.run_sync(decode) if in_thread else decode()
        for name, (dtype, shape) in self._schema.items():
            array = record.get(name)
            if array is None or array.dtype != dtype or array.shape != (chunk.rows, *shape):
                raise SchemaMismatch(
                    f"chunk {key!r} has another column {name!r} than {self._schema!r}",
                    replay=self._names.name,
                    run=self._run,
                )
        return record

    async def _look_again(self, chunk: ChunkId) -> NDArray[np.uint8] | None:
        """A chunk that GET did not find: evicted if its log entry is gone, too; else once more, then missing."""
        entry, key = f"{self._run}-{chunk.entry}", self._names.data(self._run, chunk)
        for last in (False, True):  # the entry is looked at again: who deletes a chunk deletes its data first
            if not await streams.page(self._client, self._names.log, entry, entry):
                self.facts["evicted"] += 1
                return None
            if not last and (value := await self._client.get_value(key)) is not None:
                return value
        self.facts["missing"] += 1
        warnings.warn(
            f"chunk {key!r} is in the log, but not on the server: saved without it", RuntimeWarning, stacklevel=2
        )
        return None


def _groups(chunks: list[ChunkId], row_nbytes: int) -> Iterator[list[ChunkId]]:
    """What goes into one request together."""
    group: list[ChunkId] = []
    room = SLICE
    for chunk in chunks:
        size = chunk.rows * row_nbytes
        if group and (size > room or len(group) == GROUP):
            yield group
            group, room = [], SLICE
        group.append(chunk)
        room -= size
    if group:
        yield group


def _gets(keys: list[bytes]) -> tuple[Sequence[Buffer], Reply]:
    commands = [b"*2\r\n$3\r\nGET\r\n$%d\r\n%b\r\n" % (len(key), key) for key in keys]
    return [b"".join(commands)], ValueReply(len(keys))


async def save(
    client: Client,
    names: Names,
    schema: Schema,
    run: int,
    folder: Path,
    *,
    progress: Progress | None,
    extra: Extra | None,
) -> dict[str, Any]:
    """What :meth:`aionpredis.Replay.save` does; returns what ``replay.json`` says."""
    for name in extra or {}:
        _extra_path(folder, name)
    begin = await _begin_of(client, names, run)
    if begin.schema != schema.digest:
        raise SchemaMismatch(
            f"run {run} of {names.name!r} was begun with other columns than {schema!r}", replay=names.name, run=run
        )
    partial_folder = await anyio.to_thread.run_sync(_make_beside, folder)
    try:
        saving = _Saving(client, names, schema, run, partial_folder, progress)
        await saving.save(await client.policy(names.name).latest(), extra or {})
        await anyio.to_thread.run_sync(_finish, partial_folder, folder, saving.facts)
    except BaseException:
        with anyio.CancelScope(shield=True):  # deletes at most what was written: no end of time
            await anyio.to_thread.run_sync(partial(shutil.rmtree, partial_folder, ignore_errors=True))
        raise
    return saving.facts


async def _begin_of(client: Client, names: Names, run: int) -> Begin:
    entries = await streams.page(client, names.log, f"{run}-0", f"{run}-0")
    if not entries:
        raise ReplayGone(f"run {run} of {names.name!r} is not there (any more)", replay=names.name, run=run)
    return parse_begin(run, entries[0][1])


# --- restoring -------------------------------------------------------------------------------------------------------


class _File(NamedTuple):
    """A bundle on the disk, and the chunks in it, in order."""

    path: Path
    chunks: list[ChunkId]


def saved_facts(folder: Path) -> dict[str, Any]:
    """What ``replay.json`` says of a saved replay. Reads a file: blocks.

    Raises:
        UsageError: there is no such folder, it is something else, or of a newer version.
        CorruptValue: the file was damaged.
    """
    path = folder / "replay.json"
    if not folder.is_dir():
        raise UsageError(f"{folder}: there is no such folder")
    with _opened(path) as file:
        text = file.read()
    try:
        facts = json.loads(text)
        if facts["format"] != FORMAT or not isinstance(facts["version"], int):
            raise UsageError(f"{path} does not describe a saved replay")
        if facts["version"] > VERSION:
            raise UsageError(f"{path} is of version {facts['version']}; this aionpredis reads up to {VERSION}")
        check_name(facts["name"])
        for column in facts["columns"].values():
            column["shape"] = tuple(column["shape"])
            np.empty((0, *column["shape"]))
            if not isinstance(column["dtype"], str):
                raise TypeError("a dtype is a name")
        if not isinstance(facts["transitions"], int) or not isinstance(facts["policy"], int | None):
            raise TypeError("a count is none")
        for bundle in facts["bundles"]:
            if not _BUNDLE.fullmatch(bundle["file"]):
                raise ValueError(f"{bundle['file']!r} is no bundle's name")
    except UsageError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CorruptValue(f"{path} makes no sense: {type(error).__name__}: {error}") from None
    checked: dict[str, Any] = facts
    return checked


def _saved_schema(facts: Mapping[str, Any]) -> Schema:
    """The columns in :func:`saved_facts`."""
    columns: dict[str, Any] = {}
    for name, column in facts["columns"].items():
        dtype = column["dtype"]
        if dtype.startswith(("bfloat", "float8")):
            dtype = ml_dtype(dtype, np.dtype("u2" if dtype == "bfloat16" else "u1"))
        columns[name] = dtype, column["shape"]
    return Schema(**columns)


class Saved:
    """A saved run, looked through: ``weights`` of its policy, if it had one; ``transitions``, their number.

    Reads the policy, and of the other files the headers and what the log knew: blocks.

    Raises:
        UsageError: a file is missing.
        CorruptValue: a file was damaged.
        SchemaMismatch: the saved columns are others than ``schema``; it names one.
    """

    def __init__(self, folder: Path, name: str, schema: Schema) -> None:
        facts = saved_facts(folder)
        _check_columns(folder, facts["columns"], name, schema)
        self.weights = None if facts["policy"] is None else _read_record(folder / "policy.safetensors")
        self._schema = schema
        self._files = [_look_through(folder / bundle["file"], schema) for bundle in facts["bundles"]]
        self.transitions = sum(chunk.rows for file in self._files for chunk in file.chunks)
        if self.transitions != facts["transitions"]:
            raise CorruptValue(
                f"{folder}: there are {self.transitions:,} transitions, replay.json says {facts['transitions']:,}"
            )

    async def write(
        self, client: Client, names: Names, run: int, *, lease: float, progress: Progress | None = None
    ) -> None:
        """Commit all chunks to the run, as actors do.

        Raises:
            RunEnded, ReplayGone: a newer run has begun, the log was deleted.
            ServerError, ConnectionLost, ConnectError: the server could not be reached again, or refused.
        """
        report = progress or _silent
        report(0, self.transitions)
        if self._files:
            sender, receiver = anyio.create_memory_object_stream[tuple[_File, Arrays]]()
            writing = _Writing(client, names, run, lease, self._buffers(), report, self.transitions)
            await _together(partial(self._read, sender), partial(writing.write, receiver))

    def _buffers(self) -> list[ChunkBuffer]:
        rows = max(chunk.rows for file in self._files for chunk in file.chunks)
        count = max(2, min(MAX_TRAVELLING, TRAVELLING_BYTES // self._schema.layout(rows).size))
        return [ChunkBuffer(self._schema, rows) for _ in range(count)]

    async def _read(self, sender: MemoryObjectSendStream[tuple[_File, Arrays]]) -> None:
        async with sender:
            for file in self._files:
                await sender.send((file, await anyio.to_thread.run_sync(_read_record, file.path)))


class _Writing:
    """Chunks of saved bundles on their way to a run, in the same steps as an actor's."""

    def __init__(
        self,
        client: Client,
        names: Names,
        run: int,
        lease: float,
        buffers: list[ChunkBuffer],
        report: Progress,
        total: int,
    ) -> None:
        self._committer = Committer(client, names, lease=lease, settled=self._settled)
        self._client = client
        self._names = names
        self._run = run
        self._lease = lease
        self._free = buffers
        self._report = report
        self._total = total
        self._done = self._reported = 0

    async def write(self, receiver: MemoryObjectReceiveStream[tuple[_File, Arrays]]) -> None:
        try:
            # The receiver is closed last: an error here ends the sender, not the other way round.
            async with receiver, anyio.create_task_group() as tasks:
                tasks.start_soon(self._committer.work)
                async for file, columns in receiver:
                    await self._commit(file, columns)
                while self._committer.busy:
                    await self._progress()
                self._check()
                tasks.cancel_scope.cancel()
            self._tell(self._total + 1)
        finally:
            self._committer.abandon()

    async def _commit(self, file: _File, columns: Arrays) -> None:
        row = 0
        for chunk in file.chunks:
            while not self._free:
                await self._progress()
            self._check()
            buffer = self._free.pop()
            for name, column in buffer.columns.items():
                column[: chunk.rows] = columns[name][row : row + chunk.rows]
            row += chunk.rows
            self._committer.commit(buffer, self._run, chunk)
            await anyio.lowlevel.checkpoint()
            self._tell()

    async def _progress(self) -> None:
        with anyio.move_on_after(self._lease) as scope:
            await self._committer.progress()
        if scope.cancelled_caught:  # actors wait until a full server has room again; here that is an error
            await self._client.call("SET", f"{self._names.name}:restore", b"", "PX", 1, repeatable=True)
        self._tell()

    def _tell(self, steps: int = 200) -> None:
        """Report progress if there is enough of it."""
        if self._done - self._reported > self._total // steps:
            self._reported = self._done
            self._report(self._done, self._total)

    def _settled(self, buffer: ChunkBuffer, rows: int, committed: bool) -> None:
        self._done += rows if committed else 0
        self._free.append(buffer)

    def _check(self) -> None:
        """Raise what has happened to the run, or to the server."""
        name, run = self._names.name, self._run
        if self._committer.failure is not None:
            raise self._committer.failure
        if self._committer.gone:
            raise ReplayGone(f"the log of {name!r} was deleted", replay=name, run=run)
        if self._committer.ended:
            raise RunEnded(f"run {run} of {name!r} has ended: a newer one has begun", replay=name, run=run)


def _check_columns(folder: Path, saved: Mapping[str, Any], name: str, schema: Schema) -> None:
    for column in [*saved, *schema]:
        there = (saved[column]["dtype"], saved[column]["shape"]) if column in saved else None
        here = (schema[column][0].name, schema[column][1]) if column in schema else None
        if there != here:
            raise SchemaMismatch(
                f"column {column!r} is {_described(there)} in {folder}, and {_described(here)} in the schema of {name!r}",
                replay=name,
            )


def _described(column: tuple[str, tuple[int, ...]] | None) -> str:
    return "not there" if column is None else f"{column[0]} {column[1]}"


def _look_through(path: Path, schema: Schema) -> _File:
    """The chunks in a bundle, after its header was compared with the schema and its size."""
    with _opened(path) as file:
        layout = _read_header(path, file)
        log: Arrays = {}
        for name, dtype in LOG.items():
            column = layout.columns.get(name)
            if column is None or column.dtype != dtype or column.shape[1:] != ((8,) if dtype == "uint8" else ()):
                raise CorruptValue(f"{path}: no column {name!r} of {dtype}")
            if column.start == column.stop:
                raise CorruptValue(f"{path}: no transitions are in it")
            file.seek(len(layout.header) + column.start)
            log[name] = np.frombuffer(file.read(column.stop - column.start), column.dtype).reshape(column.shape)
    ends, rows = log["log.episode_end"], log["log.rows"]
    expected = {name: (dtype, (len(ends), *shape)) for name, (dtype, shape) in schema.items()}
    expected |= {name: (np.dtype(dtype), log[name].shape) for name, dtype in LOG.items()}
    if {name: (column.dtype, column.shape) for name, column in layout.columns.items()} != expected:
        raise CorruptValue(f"{path}: its columns are not those that replay.json names")
    limit = 1 << 32
    if (
        not len(rows) == len(log["log.seq"]) == len(log["log.incarnation"])
        or not ((rows > 0) & (rows < limit) & (log["log.seq"] >= 0) & (log["log.seq"] < limit)).all()
        or sum(rows.tolist()) != len(ends)
    ):
        raise CorruptValue(f"{path}: its chunks do not add up to its {len(ends):,} transitions")
    chunks = []
    row = 0
    for incarnation, seq, count in zip(log["log.incarnation"], log["log.seq"].tolist(), rows.tolist(), strict=True):
        flags = ends[row : row + count]
        packed = np.packbits(flags, bitorder="little").tobytes() if flags.any() else b""
        chunks.append(ChunkId(incarnation.tobytes(), seq, count, packed))
        row += count
    return _File(path, chunks)


# --- without knowing the columns -------------------------------------------------------------------------------------


async def save_any(
    client: Client, name: str, folder: Path, run: int | None, progress: Progress | None
) -> dict[str, Any]:
    """Save a run (default: the newest) of whatever columns; returns what ``replay.json`` says.

    Raises:
        ReplayGone: there is no such run, or it has no chunk, so that nobody can say which columns it has.
    """
    names = Names(name)
    if run is None:
        begin = await runs.latest(client, names)
        if begin is None:
            raise ReplayGone(f"no run of {name!r} was begun", replay=name)
        run = begin.run
    schema = await _stored_schema(client, names, run)
    return await save(client, names, schema, run, folder, progress=progress, extra=None)


async def restore_any(
    client: Client, folder: Path, name: str | None, keep: int, progress: Progress | None
) -> dict[str, Any]:
    """Restore whatever was saved, under this name or its own; name, run and number of transitions."""
    facts = await anyio.to_thread.run_sync(saved_facts, folder)
    replay = client.replay(name or facts["name"], _saved_schema(facts))
    run = await replay.restore(folder, keep=keep, progress=progress)
    return {"name": replay.name, "run": run.run, "transitions": facts["transitions"], "policy": run.policy}


async def _stored_schema(client: Client, names: Names, run: int) -> Schema:
    """The columns of a run, from one of its chunks."""
    begin = await _begin_of(client, names, run)
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


def _silent(done: int, total: int) -> None:
    """Progress that nobody wants to know of."""


async def look_through(folder: Path, name: str, schema: Schema) -> Saved:
    """:class:`Saved`, in a worker thread."""
    return await anyio.to_thread.run_sync(Saved, folder, name, schema)


async def _together(*works: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Do this at the same time. The first error ends the others, and is raised as it is, not in a group."""
    try:
        async with anyio.create_task_group() as tasks:
            for work in works:
                tasks.start_soon(work)
    except BaseExceptionGroup as group:
        error: BaseException = group
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        raise error from error.__cause__
