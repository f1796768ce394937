"""A saved run on its way to the server: looked through as a whole, then committed as actors do."""

from __future__ import annotations

import copy
import os
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import anyio
import anyio.lowlevel
import anyio.to_thread
import numpy as np

from aionpredis.errors import CorruptValue, ReplayGone, RunEnded, SchemaMismatch
from aionpredis.formats.npy import ml_dtype
from aionpredis.replay.checkpoint.files import LOG, Arrays, opened, read_header, read_record, saved_facts
from aionpredis.replay.checkpoint.transfer import Progress, silent, transfer
from aionpredis.replay.chunk import ChunkBuffer
from aionpredis.replay.commit import Committer
from aionpredis.replay.log import ChunkId, Names
from aionpredis.replay.schema import Schema

if TYPE_CHECKING:
    from aionpredis.client import Client
    from aionpredis.replicas import Replicas

__all__ = ["Saved", "look_through", "restore_any"]

TRAVELLING_BYTES = 4 << 20
"""Bytes of chunks that are on their way to the server while a run is restored."""

MAX_TRAVELLING = 32
"""Their number, however small they are."""

STEPS = 200
"""How often progress is reported, at most."""


class _File(NamedTuple):
    """A bundle on the disk, and the chunks in it, in order."""

    path: Path
    chunks: list[ChunkId]


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
        self.weights = None if facts["policy"] is None else read_record(folder / "policy.safetensors")
        self._schema = schema
        self._files = [_look_through(folder / bundle["file"], schema) for bundle in facts["bundles"]]
        self.transitions = sum(chunk.rows for file in self._files for chunk in file.chunks)
        if self.transitions != facts["transitions"]:
            raise CorruptValue(
                f"{folder}: there are {self.transitions:,} transitions, replay.json says {facts['transitions']:,}"
            )
        found: set[tuple[bytes, int]] = set()  # of two with one name, the server would take one
        for file in self._files:
            for chunk in file.chunks:
                if chunk[:2] in found:
                    raise CorruptValue(f"{file.path}: chunk {chunk.seq} of {chunk.incarnation.hex()} is there twice")
                found.add(chunk[:2])

    async def write(
        self,
        client: Client,
        names: Names,
        run: int,
        *,
        lease: float,
        replicas: Replicas | None,
        progress: Progress | None,
    ) -> None:
        """Commit all chunks to the run, as actors do. ``replicas``: who has to have them; the client is a twin then.

        Raises:
            RunEnded, ReplayGone: a newer run has begun, the log was deleted.
            ServerError, ConnectionLost, ConnectError: the server could not be reached again, or refused.
        """
        report = progress or silent
        report(0, self.transitions)
        if self._files:
            rows = max(chunk.rows for file in self._files for chunk in file.chunks)
            count = max(2, min(MAX_TRAVELLING, TRAVELLING_BYTES // self._schema.layout(rows).size))
            buffers = [ChunkBuffer(self._schema, rows) for _ in range(count)]
            writing = _Writing(client, names, run, lease, replicas, buffers, report, self.transitions)
            await transfer(self._read(), writing.write)

    async def _read(self) -> AsyncGenerator[tuple[_File, Arrays]]:
        for file in self._files:
            yield file, await anyio.to_thread.run_sync(read_record, file.path)


class _Writing:
    """Chunks of saved bundles on their way to a run, in the same steps as an actor's."""

    def __init__(
        self,
        client: Client,
        names: Names,
        run: int,
        lease: float,
        replicas: Replicas | None,
        buffers: list[ChunkBuffer],
        report: Progress,
        total: int,
    ) -> None:
        self._committer = Committer(client, names, lease=lease, replicas=replicas, settled=self._settled)
        self._names = names
        self._run = run
        self._lease = lease
        self._free = buffers
        # An actor that wrote some of it may be alive and join this run, too: its own numbers are not taken there.
        self._salt = int.from_bytes(os.urandom(8))
        self._report = report
        self._total = total
        self._done = self._reported = 0

    async def write(self, bundles: AsyncIterator[tuple[_File, Arrays]]) -> None:
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._committer.work)
                async for file, columns in bundles:
                    await self._commit(file, columns)
                while self._committer.busy:
                    await self._progress()
                self._check()
                tasks.cancel_scope.cancel()
            self._tell(0)
        finally:
            self._committer.close()

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
            incarnation = (int.from_bytes(chunk.incarnation) ^ self._salt).to_bytes(8)
            self._committer.commit(buffer, self._run, chunk._replace(incarnation=incarnation))
            await anyio.lowlevel.checkpoint()
            self._tell(self._total // STEPS)

    async def _progress(self) -> None:
        with anyio.move_on_after(self._lease) as scope:
            await self._committer.progress()
        # Actors wait until a full server has room again; here that is an error.
        if scope.cancelled_caught and self._committer.full is not None:
            raise self._committer.full
        self._tell(self._total // STEPS)

    def _tell(self, least: int) -> None:
        """Report progress if there is more of it than this."""
        if self._done - self._reported > least:
            self._reported = self._done
            self._report(self._done, self._total)

    def _settled(self, buffer: ChunkBuffer, rows: int, committed: bool) -> None:
        self._done += rows if committed else 0
        self._free.append(buffer)

    def _check(self) -> None:
        """Raise what has happened to the run, or to the server."""
        name, run = self._names.name, self._run
        if self._committer.failure is not None:
            raise copy.copy(self._committer.failure)
        if self._committer.gone:
            raise ReplayGone(f"the log of {name!r} was deleted", replay=name, run=run)
        if self._committer.ended:
            raise RunEnded(f"run {run} of {name!r} has ended: a newer one has begun", replay=name, run=run)


def _check_columns(folder: Path, columns: Mapping[str, Any], name: str, schema: Schema) -> None:
    saved = {column: (facts["dtype"], facts["shape"]) for column, facts in columns.items()}
    wanted = {column: (dtype.name, shape) for column, (dtype, shape) in schema.items()}
    for column in saved | wanted:
        there, here = saved.get(column), wanted.get(column)
        if there != here:
            raise SchemaMismatch(
                f"column {column!r} is {_described(there)} in {folder}, and {_described(here)} in the schema of {name!r}",
                replay=name,
            )


def _described(column: tuple[str, tuple[int, ...]] | None) -> str:
    return "not there" if column is None else f"{column[0]} {column[1]}"


def _look_through(path: Path, schema: Schema) -> _File:
    """The chunks in a bundle, after its header was compared with the schema and its size."""
    with opened(path) as file:
        layout = read_header(path, file)
        log: Arrays = {}
        for name, (dtype, shape) in LOG.items():
            column = layout.columns.get(name)
            if column is None or column.dtype != dtype or column.shape[1:] != shape:
                raise CorruptValue(f"{path}: no column {name!r} of {dtype}")
            if column.start == column.stop:
                raise CorruptValue(f"{path}: no transitions are in it")
            file.seek(len(layout.header) + column.start)
            log[name] = np.frombuffer(file.read(column.stop - column.start), column.dtype).reshape(-1, *shape)
    incarnations, seqs, rows, ends = (log[name] for name in LOG)
    found = {name: (column.dtype, column.shape) for name, column in layout.columns.items() if name not in LOG}
    if found != {name: (dtype, (len(ends), *shape)) for name, (dtype, shape) in schema.items()}:
        raise CorruptValue(f"{path}: its columns are not those that replay.json names")
    limit = 1 << 32
    if (
        not len(rows) == len(seqs) == len(incarnations)
        or not ((rows > 0) & (rows < limit) & (seqs >= 0) & (seqs < limit)).all()
        or rows.sum() != len(ends)
    ):
        raise CorruptValue(f"{path}: its chunks do not add up to its {len(ends):,} transitions")
    chunks = []
    row = 0
    for incarnation, seq, count in zip(incarnations, seqs.tolist(), rows.tolist(), strict=True):
        flags = ends[row : row + count]
        packed = np.packbits(flags, bitorder="little").tobytes() if flags.any() else b""
        chunks.append(ChunkId(incarnation.tobytes(), seq, count, packed))
        row += count
    return _File(path, chunks)


async def look_through(folder: Path, name: str, schema: Schema) -> Saved:
    """:class:`Saved`, in a worker thread."""
    return await anyio.to_thread.run_sync(Saved, folder, name, schema)


async def restore_any(
    client: Client, folder: Path, name: str | None, keep: int, progress: Progress | None
) -> dict[str, Any]:
    """Restore whatever was saved, under this name or its own; name, run and number of transitions."""
    facts = await anyio.to_thread.run_sync(saved_facts, folder)
    columns: dict[str, Any] = {}
    for column, about in facts["columns"].items():
        dtype = about["dtype"]
        if dtype.startswith(("bfloat", "float8")):
            dtype = ml_dtype(dtype, np.dtype("u2" if dtype == "bfloat16" else "u1"))
        columns[column] = dtype, about["shape"]
    replay = client.replay(name or facts["name"], Schema(**columns))
    run = await replay.restore(folder, keep=keep, progress=progress)
    return {"name": replay.name, "run": run.run, "transitions": facts["transitions"], "policy": run.policy}
