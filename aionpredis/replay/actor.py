"""An actor: appends transitions, in chunks that are committed to the log of the present run."""

from __future__ import annotations

import enum
import os
import time
from collections import deque
from collections.abc import Awaitable, Generator
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any

import anyio
import anyio.lowlevel
from anyio.abc import TaskGroup

from aionpredis import streams
from aionpredis.errors import (
    AionpredisError,
    ConnectError,
    ConnectionLost,
    ReplayGone,
    RunEnded,
    SchemaMismatch,
    ServerError,
    ServerFull,
    UsageError,
)
from aionpredis.pipeline import ATTEMPTS, BACKOFF
from aionpredis.replay import runs
from aionpredis.replay.chunk import ChunkBuffer, make_rows
from aionpredis.replay.log import FIELD, Begin, ChunkId, Names, pack
from aionpredis.replay.schema import Schema
from aionpredis.wire import resp
from aionpredis.wire.connection import Connection
from aionpredis.wire.resp import Blob, Reply

if TYPE_CHECKING:
    from aionpredis.client import Client

__all__ = ["Actor", "ActorStats"]

BUFFERS = 4
"""Chunk buffers that circulate in one actor: one is filled while three travel. Few stay in the CPU's cache: copying a
12.8 kB state costs 0.7 µs with 4 of 205 kB, 1.4 with 64."""


@dataclass
class ActorStats:
    """Transitions, counted over all runs: ``appended == acknowledged + stale + pending``.

    ``acknowledged``: committed to the log, in the primary's memory. ``stale``: of a run that ended before they were
    committed. ``pending``: appended and neither. ``chunks``: committed. ``waits``: how often an append had to wait
    because all buffers were travelling.
    """

    appended: int = 0
    acknowledged: int = 0
    stale: int = 0
    chunks: int = 0
    waits: int = 0

    @property
    def pending(self) -> int:
        return self.appended - self.acknowledged - self.stale


class _Done:
    """What :meth:`Actor.append` returns when there is nothing to wait for: awaiting it costs 0.1 µs and no switch."""

    def __await__(self) -> Generator[Any, None, None]:
        return
        yield


class _Step(enum.Enum):
    """The command that a chunk's commit has to send next."""

    SET = "SET"
    RENEW = "PEXPIRE"
    LOG = "XADD"
    KEEP = "PERSIST"
    CHECK = "EXISTS"
    DROP = "UNLINK"


class _Commit:
    """A chunk on its way: SET with a lease → XADD → PERSIST. Until then its buffer is held.

    Every data key is either named in the log or has a time to live, whatever dies when.
    """

    __slots__ = ("buffer", "chunk", "key", "leased", "reply", "run", "step", "value")

    def __init__(self, buffer: ChunkBuffer, run: int, key: bytes, chunk: ChunkId) -> None:
        self.buffer = buffer
        self.run = run
        self.key = key
        self.chunk = chunk
        self.value = Blob(buffer.value(chunk.rows))
        self.leased = 0.0  # when the lease was last begun anew
        self.reply: Reply | None = None
        self.step = _Step.SET


class Actor:
    """Appends transitions to a replay. Made by :meth:`aionpredis.Replay.actor`; use it with ``async with``::

        async with replay.actor("simulator-7") as actor:
            while True:
                run = await actor.join()            # the newest run; waits if there is none newer than the last
                try:
                    ...
                    await actor.append(state=state, action=action, reward=reward, …)
                except RunEnded:
                    continue                        # a newer run has begun: fetch its policy

    :meth:`append` copies the transition and returns at once, until all buffers are travelling; then it waits. So memory
    is bounded by ``buffers`` chunks. A transition is **acknowledged** when its chunk is in the log: see :attr:`stats`
    and :meth:`flush`. It is in the primary server's memory then; what the server does to keep it is its configuration.

    Leaving the block commits what was appended. One task at a time may append.
    """

    def __init__(
        self,
        client: Client,
        names: Names,
        schema: Schema,
        name: str,
        *,
        chunk: int,
        lease: float,
        buffers: int = BUFFERS,
    ) -> None:
        self.name = name
        self.stats = ActorStats()
        self.run: Begin | None = None
        """The run that is appended to; ``None`` before :meth:`join` and after :class:`RunEnded`."""
        self.incarnation = os.urandom(8)
        """Identifies this start of the actor: one that is restarted, or a zombie, is another."""
        self._client = client
        self._names = names
        self._schema = schema
        self._length = chunk
        self._lease = lease
        self._seq = 0
        self._last_run = 0
        self._free = [ChunkBuffer(schema, chunk) for _ in range(buffers)]
        self._current: ChunkBuffer | None = None
        self._commits: deque[_Commit] = deque()  # in the order of their requests on the connection
        self._backlog: deque[_Commit] = deque()  # to be sent (again)
        self._connection: Connection | None = None
        self._failure: AionpredisError | None = None
        self._ended = False
        self._gone = False
        self._tasks: TaskGroup | None = None
        self._work = anyio.Event()
        self._settled = anyio.Event()
        self._rows = make_rows(schema, full=self._chunk_full, full_error=self._no_room, done=_Done())
        self.append = self._rows.append
        """``append(*, column=value, …) -> Awaitable[None]``: add one transition; keyword arguments as in the schema.

        Always ``await`` it. It copies the values, so observation buffers may be reused at once.

        Raises:
            EncodeError: a value has the wrong shape or dtype; nothing was added.
            TypeError: a column is missing, or there is no such column.
            RunEnded: a newer run has begun; what was not committed is stale. ``join()`` before appending again.
            ConnectionLost, ServerError: the server could not be reached again, or refused. Nothing acknowledged is lost.
        """

    async def __aenter__(self) -> Actor:
        if self._tasks is not None:
            raise UsageError("an actor is for one `async with` block")
        self._tasks = anyio.create_task_group()
        await self._tasks.__aenter__()
        self._tasks.start_soon(self._commit_loop)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        assert self._tasks is not None
        cancelled = error is not None and not isinstance(error, Exception)
        failure: AionpredisError | None = None
        try:
            if not cancelled and self.run is not None:
                try:
                    await self.flush()
                except AionpredisError as caught:
                    failure = caught
        finally:
            self._tasks.cancel_scope.cancel()
            await self._tasks.__aexit__(*((kind, error, trace) if cancelled else (None, None, None)))
            for commit in self._commits:
                if commit.reply is not None and self._connection is not None:
                    self._connection.abandon(commit.reply)
        if failure is not None:
            if error is None:
                raise failure
            error.add_note(f"Besides, on leaving the actor: {failure}")
        return None

    # --- runs --------------------------------------------------------------------------------------------------------

    async def join(self) -> Begin:
        """Go to the newest run. If that is the present one already, commit what was appended and wait for a newer one.

        Raises:
            SchemaMismatch: the run was begun with other columns.
        """
        if self._tasks is None:
            raise UsageError("use the actor inside of its `async with` block")
        if self.run is not None:
            try:
                await self.flush()
            except RunEnded:
                pass
        while self._commits or self._backlog:
            await self._wait_settled()
        self._failure, self._ended, self._gone = None, False, False
        while True:
            begin = await runs.latest(self._client, self._names)
            if begin is not None and begin.run > self._last_run:
                break
            await streams.read_blocking(self._client, self._names.log, (self._last_run, streams.RIGHT_MAX), 1)
        if begin.schema != self._schema.digest:
            raise SchemaMismatch(
                f"run {begin.run} of {self._names.name!r} was begun with other columns than {self._schema!r}",
                replay=self._names.name,
                run=begin.run,
            )
        self.run, self._last_run, self._seq = begin, begin.run, 0
        self._begin_chunk()
        return begin

    # --- appending ---------------------------------------------------------------------------------------------------

    def _begin_chunk(self) -> None:
        self._current = self._free.pop()
        self._rows.switch(self._current.columns, self._length)

    def _no_room(self) -> None:
        if self.run is None:
            raise UsageError("no run to append to: `await actor.join()` first, and again after RunEnded")
        raise UsageError("await each append(): the last one is still waiting for a free buffer")

    def _chunk_full(self) -> Awaitable[None]:
        self._commit_current()
        if self._free:
            self._begin_chunk()
            return self._pause()
        self.stats.waits += 1
        return self._wait_for_buffer()

    def _commit_current(self) -> None:
        """Hand the rows that are written to the committing task."""
        rows, buffer = self._rows.count(), self._current
        if buffer is None:
            return
        self._rows.switch(buffer.columns, 0)  # no row to write
        self._current = None
        assert self.run is not None
        if not rows:
            self._free.append(buffer)
            return
        self.stats.appended += rows
        if self._over:
            self.stats.stale += rows
            self._free.append(buffer)
            return
        chunk = ChunkId(self.incarnation, self._seq, rows, buffer.episode_ends(rows))
        self._seq += 1
        self._backlog.append(_Commit(buffer, self.run.run, self._names.data(self.run.run, chunk), chunk))
        connection = self._connection
        if connection is not None and connection.lost is None and len(self._backlog) == 1:
            self._submit(connection)
        self._work.set()

    async def _pause(self) -> None:
        await anyio.lowlevel.checkpoint()
        self._check()

    async def _wait_for_buffer(self) -> None:
        self._check()
        while not self._free:
            await self._wait_settled()
            self._check()
        self._begin_chunk()

    @property
    def _over(self) -> bool:
        return self._ended or self._gone or self._failure is not None

    def _check(self) -> None:
        """Raise what has happened to the run, or to the server."""
        if not self._over:
            return
        run, name = self.run, self._names.name
        assert run is not None
        self._commit_current()
        self.run = None
        if self._failure is not None:
            raise self._failure
        if self._gone:
            raise ReplayGone(f"the log of {name!r} was deleted", replay=name, run=run.run)
        raise RunEnded(f"run {run.run} of {name!r} has ended: a newer one has begun", replay=name, run=run.run)

    async def flush(self) -> None:
        """Commit what was appended, a partial chunk if need be, and return when all of it is acknowledged.

        Raises:
            RunEnded: a newer run has begun; what was not committed is stale.
            ConnectionLost, ServerError: as for :attr:`append`.
        """
        if self.run is None:
            raise UsageError("no run to flush to: `await actor.join()` first")
        self._commit_current()
        while self._commits or self._backlog:
            await self._wait_settled()
        self._check()
        self._begin_chunk()

    async def _wait_settled(self) -> None:
        if self._settled.is_set():
            self._settled = anyio.Event()
        await self._settled.wait()

    # --- committing --------------------------------------------------------------------------------------------------

    async def _commit_loop(self) -> None:
        attempt = 0
        while True:
            if not (self._commits or self._backlog):
                self._work = anyio.Event()
                await self._work.wait()
                continue
            try:
                self._connection = connection = await self._client.connection()
                self._submit(connection)
                commit = self._commits[0]
                assert commit.reply is not None
                await connection.wait(commit.reply)
                self._commits.popleft()
                self._advance(commit, commit.reply.values[0])
                attempt = 0
            except (ConnectionLost, ConnectError, ServerFull) as error:
                attempt += 1
                if not isinstance(error, ServerFull):
                    self._start_again()
                    if attempt >= ATTEMPTS:
                        self._fail(error)
                        attempt = 0
                        continue
                await anyio.sleep(BACKOFF.compute(attempt))
            except ServerError as error:
                self._fail(error)

    def _start_again(self) -> None:
        """After a broken connection nothing is known about what travelled: each chunk begins with its SET again."""
        self._backlog.extendleft(reversed(self._commits))
        self._commits.clear()
        for commit in self._backlog:
            commit.step = _Step.SET

    def _fail(self, error: AionpredisError) -> None:
        """Give up what is not committed. What was sent keeps its lease, so nothing stays on the server for ever."""
        self._failure = error
        for commit in self._commits:
            if commit.reply is not None and self._connection is not None:
                self._connection.abandon(commit.reply)
        self._start_again()
        while self._backlog:
            self._settle(self._backlog.popleft(), stale=True)

    def _settle(self, commit: _Commit, *, stale: bool) -> None:
        if stale:
            self.stats.stale += commit.chunk.rows
        else:
            self.stats.acknowledged += commit.chunk.rows
            self.stats.chunks += 1
        self._free.append(commit.buffer)
        self._settled.set()

    def _submit(self, connection: Connection) -> None:
        while self._backlog:
            commit = self._backlog[0]
            commit.reply = connection.submit(self._command(commit), Reply())
            self._commits.append(self._backlog.popleft())

    def _command(self, commit: _Commit) -> list[resp.Buffer]:
        lease = round(self._lease * 1000)
        match commit.step:
            case _Step.SET:
                commit.leased = time.monotonic()
                # NX: an earlier SET of this chunk, whose reply was lost, may be committed by now and live for ever.
                return resp.encode("SET", commit.key, commit.value, "NX", "PX", lease)
            case _Step.RENEW:
                commit.leased = time.monotonic()
                return resp.encode("PEXPIRE", commit.key, lease)
            case _Step.LOG:
                entry = pack(commit.chunk)
                return resp.encode("XADD", self._names.log, "NOMKSTREAM", f"{commit.run}-*", FIELD, entry)
            case step:
                return resp.encode(step.value, commit.key)

    def _advance(self, commit: _Commit, value: Any) -> None:
        """Take the reply to the commit's command; queue its next one, or settle it."""
        if isinstance(value, ServerError):
            value.command = commit.step.value
            if commit.step is _Step.LOG and streams.is_stale(value):
                self._ended = True
                self._queue(commit, _Step.DROP)
                return
            self._queue(commit, commit.step)
            raise value
        match commit.step:
            case _Step.SET:
                self._queue(commit, _Step.LOG if value is not None else _Step.RENEW)
            case _Step.RENEW:
                self._queue(commit, _Step.LOG if value else _Step.SET)
            case _Step.LOG if value is None:
                self._gone = True
                self._queue(commit, _Step.DROP)
            case _Step.LOG:
                self._queue(commit, _Step.KEEP)
            case _Step.KEEP | _Step.CHECK if value:
                self._settle(commit, stale=False)
            case _Step.KEEP:  # it had no time to live, or does not exist
                self._queue(commit, _Step.CHECK)
            case _Step.CHECK:  # the lease ran out before PERSIST
                self._queue(commit, _Step.SET)
            case _Step.DROP:
                self._settle(commit, stale=True)

    def _queue(self, commit: _Commit, step: _Step) -> None:
        if step is _Step.LOG and time.monotonic() - commit.leased > self._lease / 2:
            step = _Step.RENEW  # else the key could be gone between XADD and PERSIST
        commit.step = step
        self._backlog.append(commit)
