"""An actor: appends transitions, in chunks that are committed to the log of the present run."""

from __future__ import annotations

import enum
import os
import time
from collections import deque
from collections.abc import Awaitable, Generator
from dataclasses import dataclass, replace
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

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
from aionpredis.pipeline import ATTEMPTS, BACKOFF, FINAL
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

BUFFERS = 12
"""Chunk buffers that circulate in one actor: one is filled while five travel. With 4 of 205 kB an actor that does nothing
but append waits now and then (9.6 µs a transition), with 6 never (8.5). Few stay in the CPU's cache: copying a 12.8 kB
state costs 0.7 µs with 4, 1.4 with 64."""

TURN_SECONDS = 2e-4
MAX_EXPONENT = 10
"""From here on the pauses between attempts do not grow anyway, and ``2**attempt`` would become too large for a float."""


@dataclass
class ActorStats:
    """Transitions, counted over all runs: ``appended == acknowledged + stale + pending``.

    ``acknowledged``: committed to the log, in the primary's memory. ``stale``: of a run that ended before they were
    committed, or given up after an error (and then perhaps committed). ``pending``: appended and neither. ``chunks``:
    committed. ``waits``: how often an append had to wait because all buffers were travelling.
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
    FIND = "XREVRANGE"
    DROP = "UNLINK"


class _Commit:
    """A chunk on its way: SET with a lease → XADD → PERSIST. Until then its buffer is held.

    Every data key is either named in the log or has a time to live, whatever dies when.
    """

    __slots__ = ("buffer", "chunk", "key", "leased", "repeated", "run", "searched", "step", "value")

    def __init__(self, buffer: ChunkBuffer, run: int, key: bytes, chunk: ChunkId) -> None:
        self.buffer = buffer
        self.run = run
        self.key = key
        self.chunk = chunk
        self.value = buffer.value(chunk.rows)
        self.leased = 0.0  # when the lease was last begun anew
        self.repeated = False  # it was there already, so it may be in the log, too
        self.searched = f"{run}-{streams.RIGHT_MAX}"  # the log was searched for it down to this entry
        self.step = _Step.SET


class _Round(NamedTuple):
    """The next command of each of these commits, sent together: ``reply`` has a value for each."""

    commits: list[_Commit]
    reply: Reply


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
        self.run: Begin | None = None
        """The run that is appended to; ``None`` before :meth:`join` and after :class:`RunEnded`."""
        self.incarnation = os.urandom(8)
        """Identifies this start of the actor: one that is restarted, or a zombie, is another."""
        self._client = client
        self._names = names
        self._schema = schema
        self._length = chunk
        self._lease = lease
        self._lease_ms = b"%d" % round(lease * 1000)
        self._seq = 0
        self._numbered = 0  # the run whose chunks _seq counts
        self._last_run = 0  # join() waits for a newer one
        self._stats = ActorStats()
        self._free = [ChunkBuffer(schema, chunk) for _ in range(buffers)]
        self._current: ChunkBuffer | None = None
        self._rounds: deque[_Round] = deque()  # in the order of their requests on the connection
        self._backlog: list[_Commit] = []  # to be sent (again)
        self._connection: Connection | None = None
        self._failure: AionpredisError | None = None
        self._ended = False
        self._gone = False
        self._tasks: TaskGroup | None = None
        self._work = anyio.Event()
        self._settled = anyio.Event()
        self._refused = 0  # rounds in a row that a full server refused
        self._unawaited = False
        self._done = _Done()
        self._turn_ends = 0.0
        self._rows = make_rows(schema, full=self._chunk_full, late=self._late, done=self._done)
        self.append = self._rows.append
        """``append(*, column=value, …) -> Awaitable[None]``: add one transition; keyword arguments as in the schema.

        Always ``await`` it. It copies the values, so observation buffers may be reused at once. A cancelled ``append``
        may have added its transition.

        Raises:
            EncodeError: a value has the wrong shape or dtype, or does not fit; nothing was added.
            TypeError: a column is missing, or there is no such column.
            RunEnded: a newer run has begun; what was not committed is stale. ``join()`` before appending again.
            ConnectionLost, ConnectError, ServerError: the server could not be reached again, or refused; what was not
                acknowledged is given up. ``join()`` goes on in the same run. (A full server is waited for.)
        """

    @property
    def stats(self) -> ActorStats:
        """What was appended so far, and what became of it."""
        return replace(self._stats, appended=self._stats.appended + self._rows.count())

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
        cancelled = isinstance(error, anyio.get_cancelled_exc_class())
        failure: AionpredisError | None = None
        try:
            if self.run is not None and (error is None or isinstance(error, Exception)):
                try:
                    await self.flush()
                except AionpredisError as caught:
                    failure = caught
        finally:
            self._tasks.cancel_scope.cancel()
            await self._tasks.__aexit__(*((kind, error, trace) if cancelled else (None, None, None)))
            self._abandon()
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
            else:
                self._commit_current()  # nothing is in it: its buffer is free again
                self.run = None
        while self._rounds or self._backlog:
            await self._wait_settled()
        self._failure, self._ended, self._gone = None, False, False
        fruitless = 0
        while True:
            begin = await runs.latest(self._client, self._names)
            if begin is not None and begin.run > self._last_run:
                break
            if fruitless > 1:  # the log has gone on without a run: it is being deleted
                await anyio.sleep(BACKOFF.compute(min(fruitless, MAX_EXPONENT)))
            after = (self._last_run, streams.RIGHT_MAX)
            fruitless += bool(await streams.read_blocking(self._client, self._names.log, after, 1))
        if begin.schema != self._schema.digest:
            raise SchemaMismatch(
                f"run {begin.run} of {self._names.name!r} was begun with other columns than {self._schema!r}",
                replay=self._names.name,
                run=begin.run,
            )
        if self._numbered != begin.run:
            self._numbered, self._seq = begin.run, 0
        self.run, self._last_run = begin, begin.run
        self._begin_chunk()
        return begin

    # --- appending ---------------------------------------------------------------------------------------------------

    def _begin_chunk(self) -> None:
        self._current = self._free.pop()
        self._rows.switch(self._current.columns, self._length)

    def _late(self, **values: object) -> Awaitable[None]:
        """There is no row to write."""
        if self.run is None:
            raise UsageError("no run to append to: `await actor.join()` first, and again after an error")
        if self._unawaited:
            raise UsageError("await each append(): the last one has to wait for a free buffer")
        return self._append_later(values)

    async def _append_later(self, values: dict[str, object]) -> None:
        """The append before this one was cancelled while it waited."""
        await self._next_chunk()
        await self.append(**values)

    def _chunk_full(self) -> Awaitable[None]:
        if time.monotonic() < self._turn_ends and len(self._free) and not self._over:
            self._commit_current()
            self._begin_chunk()
            return self._done
        self._unawaited = True
        return self._turn()

    async def _turn(self) -> None:
        """Let others run, then send the chunk that is full and go on with the next one.

        In this order: the replies to the last chunk's commands have come meanwhile, and what they lead to goes with it.
        """
        self._unawaited = False
        await anyio.lowlevel.checkpoint()
        self._turn_ends = time.monotonic() + TURN_SECONDS
        await self._next_chunk()

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
        self._stats.appended += rows
        if self._over:
            self._stats.stale += rows
            self._free.append(buffer)
            return
        chunk = ChunkId(self.incarnation, self._seq, rows, buffer.episode_ends(rows))
        self._seq += 1
        self._backlog.append(_Commit(buffer, self.run.run, self._names.data(self.run.run, chunk), chunk))
        connection = self._connection
        if connection is not None and connection.lost is None and not self._refused:
            self._submit(connection)
        self._work.set()

    async def _next_chunk(self) -> None:
        self._check()
        self._commit_current()
        while self._current is None:
            if self._free:
                self._begin_chunk()
            else:
                self._stats.waits += 1
                await self._wait_settled()
                self._check()

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
            self._last_run = run.run - 1
            raise self._failure
        if self._gone:
            raise ReplayGone(f"the log of {name!r} was deleted", replay=name, run=run.run)
        raise RunEnded(f"run {run.run} of {name!r} has ended: a newer one has begun", replay=name, run=run.run)

    async def flush(self) -> None:
        """Commit what was appended, a partial chunk if need be, and return when all of it is acknowledged.

        Raises:
            RunEnded: a newer run has begun; what was not committed is stale.
            ConnectionLost, ConnectError, ServerError: as for :attr:`append`.
        """
        if self.run is None:
            raise UsageError("no run to flush to: `await actor.join()` first")
        self._commit_current()
        while self._rounds or self._backlog:
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
            if not (self._rounds or self._backlog):
                self._work = anyio.Event()
                await self._work.wait()
                continue
            try:
                self._connection = connection = self._client.live_connection or await self._client.connection()
                if not self._rounds:
                    # What is small waits while something travels, and goes with the next chunk: an actor that appends
                    # without a pause fills that now.
                    await anyio.lowlevel.checkpoint()
                    self._submit(connection)
                await connection.wait(self._rounds[0].reply)
                attempt = 0
                while self._rounds and self._rounds[0].reply.done:  # and whatever else has come with it
                    self._take_round()
                self._refused = 0
            except ServerFull:  # until there is room: meanwhile append() waits
                self._refused += 1
                await anyio.sleep(BACKOFF.compute(min(self._refused, MAX_EXPONENT)))
            except (ConnectionLost, ConnectError) as error:
                attempt += 1
                self._start_again()
                if attempt >= ATTEMPTS or isinstance(error, FINAL):
                    self._fail(error)
                    attempt = 0
                else:
                    await anyio.sleep(BACKOFF.compute(attempt))
            except ServerError as error:
                self._fail(error)

    def _take_round(self) -> None:
        """Take the replies to the oldest round; raises the first that is an error, after all were taken."""
        commits, reply = self._rounds[0]
        if reply.error is not None:
            raise reply.error
        self._rounds.popleft()
        failure: ServerError | None = None
        for commit, value in zip(commits, reply.values, strict=True):
            try:
                self._advance(commit, value)
            except ServerError as error:
                failure = failure or error
        if failure is not None:
            raise failure

    def _start_again(self) -> None:
        """After a broken connection nothing is known about what travelled: each chunk begins with its SET again."""
        self._backlog[:0] = [commit for one in self._rounds for commit in one.commits]
        self._rounds.clear()
        for commit in self._backlog:
            commit.step = _Step.SET

    def _fail(self, error: AionpredisError) -> None:
        """Give up what is not committed. What was sent keeps its lease, so nothing stays on the server for ever."""
        self._failure = error
        self._refused = 0
        self._abandon()
        self._start_again()
        for commit in self._backlog:
            self._settle(commit, stale=True)
        self._backlog.clear()

    def _abandon(self) -> None:
        """Nobody waits for the replies any more, and nothing is read from the buffers."""
        for one in self._rounds:
            if self._connection is not None:
                self._connection.abandon(one.reply)

    def _settle(self, commit: _Commit, *, stale: bool) -> None:
        if stale:
            self._stats.stale += commit.chunk.rows
        else:
            self._stats.acknowledged += commit.chunk.rows
            self._stats.chunks += 1
        self._free.append(commit.buffer)
        self._settled.set()

    def _submit(self, connection: Connection) -> None:
        """Send the next command of each commit in the backlog, all of them as one request."""
        if not self._backlog:
            return
        commits = self._backlog
        buffers: list[resp.Buffer] = []
        for commit in commits:
            first, *others = self._command(commit)
            if buffers and len(buffers[-1]) < resp.SMALL:
                first = b"".join((buffers.pop(), first))
            buffers += (first, *others)
        self._rounds.append(_Round(commits, connection.submit(buffers, Reply(len(commits)))))
        self._backlog = []

    def _command(self, commit: _Commit) -> list[resp.Buffer]:
        if commit.step is _Step.LOG and time.monotonic() - commit.leased > self._lease / 2:
            commit.step = _Step.RENEW  # else the key could be gone between XADD and PERSIST
        match commit.step:
            case _Step.SET:
                commit.leased = time.monotonic()
                # NX: an earlier SET of this chunk, whose reply was lost, may be committed by now and live for ever.
                return self._set(commit)
            case _Step.RENEW:
                commit.leased = time.monotonic()
                return resp.encode_bytes([b"PEXPIRE", commit.key, self._lease_ms])
            case _Step.LOG:
                log = self._names.log.encode()
                return resp.encode_bytes([b"XADD", log, b"NOMKSTREAM", b"%d-*" % commit.run, FIELD, pack(commit.chunk)])
            case _Step.FIND:
                return resp.encode(
                    "XREVRANGE", self._names.log, commit.searched, f"{commit.run}-1", "COUNT", streams.PAGE
                )
            case step:
                return resp.encode_bytes([step.value.encode(), commit.key])

    def _set(self, commit: _Commit) -> list[resp.Buffer]:
        """The SET with its lease; a full chunk is one buffer, sent as it is."""
        if len(commit.value) > 1:
            return resp.encode("SET", commit.key, Blob(commit.value), "NX", "PX", self._lease_ms)
        options = b"$2\r\nNX\r\n$2\r\nPX\r\n$%d\r\n%b\r\n" % (len(self._lease_ms), self._lease_ms)
        return resp.encode_set(commit.key, b"", commit.value[0], options, 3)

    def _advance(self, commit: _Commit, value: Any) -> None:
        """Take the reply to the commit's command; queue its next one, or settle it."""
        if isinstance(value, ServerError):
            value.command = commit.step.value
            if commit.step is _Step.LOG and streams.is_stale(value):
                self._ended = True
                self._queue(commit, _Step.FIND if commit.repeated else _Step.DROP)
                return
            self._queue(commit, commit.step)
            raise value
        match commit.step:
            case _Step.SET:
                commit.repeated = value is None
                self._queue(commit, _Step.RENEW if commit.repeated else _Step.LOG)
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
            case _Step.FIND if any(fields == [FIELD, pack(commit.chunk)] for _, fields in value):
                self._queue(commit, _Step.KEEP)  # the run ended after that; its data may still be wanted
            case _Step.FIND if len(value) == streams.PAGE:
                commit.searched = f"({value[-1][0].decode()}"
                self._queue(commit, _Step.FIND)
            case _Step.FIND:
                self._queue(commit, _Step.DROP)
            case _Step.DROP:
                self._settle(commit, stale=True)

    def _queue(self, commit: _Commit, step: _Step) -> None:
        commit.step = step
        self._backlog.append(commit)
