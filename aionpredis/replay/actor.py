"""An actor: appends transitions, in chunks that are committed to the log of the present run."""

from __future__ import annotations

import copy
import math
import os
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Generator
from dataclasses import dataclass, replace
from types import TracebackType
from typing import TYPE_CHECKING, Any

import anyio
import anyio.lowlevel
import numpy as np
from anyio.abc import TaskGroup

from aionpredis import streams
from aionpredis.errors import (
    AionpredisError,
    ReplayGone,
    RunEnded,
    SchemaMismatch,
    ServerError,
    UsageError,
)
from aionpredis.replay import runs
from aionpredis.replay.chunk import ChunkBuffer, make_rows
from aionpredis.replay.commit import Committer
from aionpredis.replay.lag import Lag
from aionpredis.replay.log import Begin, ChunkId, Names
from aionpredis.replay.schema import Schema
from aionpredis.retry import backoff
from aionpredis.wire.ready import Soon

if TYPE_CHECKING:
    from aionpredis.client import Client
    from aionpredis.replicas import Replicas

__all__ = ["Actor", "ActorStats"]

BUFFER_BYTES = 5 << 19
"""Bytes of the chunk buffers that circulate in one actor: one is filled while the others travel, each of them three times to
the server and back. With 6 of 205 kB an actor that does nothing but append waits often (8.6 µs a transition), with 12 hardly
ever (6.9)."""

MIN_BUFFERS, MAX_BUFFERS = 4, 32
"""Their number, however large or small they are."""

TURN_SECONDS = 200e-6
"""An actor that appends without a pause lets other tasks run this often, not at every chunk: what has come from the server
meanwhile is taken at once."""


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


def _now(function: Callable[..., object], *arguments: object) -> None:
    function(*arguments)


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
    is bounded by :attr:`buffers` chunks. A transition is **acknowledged** when its chunk is in the log: see :attr:`stats`
    and :meth:`flush`. It is in the primary servers' memory then, and in that of so many replicas as the replay wants; what
    the servers do to keep it is their configuration.

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
        capacity: int,
        max_lag: int,
        replicas: Replicas | None = None,
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
        self._seq = 0
        self._numbered = 0  # the run whose chunks _seq counts
        self._last: Begin | None = None  # join() waits for another one
        self._stats = ActorStats()
        wanted = BUFFER_BYTES // schema.layout(chunk).size
        self.buffers = max(MIN_BUFFERS, min(MAX_BUFFERS, wanted))
        """How many chunks are filled or travelling at most."""
        self._free = [ChunkBuffer(schema, chunk) for _ in range(self.buffers)]
        self._current: ChunkBuffer | None = None
        self._full: deque[tuple[ChunkBuffer, int, int]] = deque()
        """Chunks that are to be committed: buffer, rows, run."""
        self._tasks: TaskGroup | None = None
        self._replicas = replicas
        self._sender = client if replicas is None else client.twin()
        self._committer = Committer(
            self._sender, names, lease=lease, capacity=capacity, replicas=replicas, settled=self._settled
        )
        self._lag = Lag(client, names, max_lag)
        self._unawaited = False
        self._done = _Done()
        self._turn_ends = 0.0
        self._turn_seconds = TURN_SECONDS
        self._soon: Soon = _now
        self._rows = make_rows(schema, full=self._chunk_full, late=self._late, done=self._done)
        self.append: Callable[..., Awaitable[None]] = self._rows.append
        """``append(*, column=value, …) -> Awaitable[None]``: add one transition; keyword arguments as in the schema.

        Always ``await`` it. It copies the values, so observation buffers may be reused at once. A cancelled ``append``
        may have added its transition.

        Raises:
            EncodeError: a value has the wrong shape or dtype, or does not fit; nothing was added.
            TypeError: a column is missing, or there is no such column.
            RunEnded: a newer run has begun; what was not committed is stale. ``join()`` before appending again.
            ConnectionLost, ConnectError, ServerError: the server could not be reached again within the client's
                ``retry_timeout``, or refused; what was not acknowledged is given up. ``join()`` goes on in the same run.
                (A full server is waited for, however long.)
            NotReplicated: fewer replicas than the replay wants have acknowledged it within that time.
        """

    def append_from_thread(
        self, soon: Soon, wait: Callable[[Callable[[], Awaitable[None]]], None]
    ) -> Callable[..., None]:
        """An ``append`` for another thread than the loop's, instead of this actor's own; for :mod:`aionpredis.blocking`.

        It fills the buffers in that thread. A full one is handed over by ``soon(function, *arguments)``, which calls the
        function in the loop some time; ``wait(function)`` runs it in the loop. Nobody else may call the actor meanwhile.
        """

        def full() -> None:
            if not self._goes_on():
                wait(self._turn)

        async def next_chunk() -> None:
            self._check_joined()
            await self._next_chunk()

        def late(**values: object) -> None:
            wait(next_chunk)
            self.append(**values)  # this thread's own

        self._soon = soon
        self._turn_seconds = math.inf  # the loop's tasks have another thread
        self._rows = make_rows(self._schema, full=full, late=late, done=None)
        self.append = self._rows.append
        return self._rows.append

    def forsake(self) -> None:
        """Take no transition any more; also for :mod:`aionpredis.blocking`, in a process that was forked off."""
        self._rows.switch(dict.fromkeys(self._schema, np.empty(0)), 0)  # no row to write

    @property
    def stats(self) -> ActorStats:
        """What was appended so far, and what became of it."""
        return replace(self._stats, appended=self._stats.appended + self._rows_written())

    async def __aenter__(self) -> Actor:
        if self._tasks is not None:
            raise UsageError("an actor is for one `async with` block")
        if self._replicas is not None:
            await self._sender.__aenter__()
            try:
                await self._replicas.check(self._sender.topology.shards)
            except BaseException:
                await self._sender.__aexit__(None, None, None)
                raise
        self._tasks = anyio.create_task_group()
        await self._tasks.__aenter__()
        self._tasks.start_soon(self._committer.work)
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
            self._close()
            self._tasks.cancel_scope.cancel()
            try:
                await self._tasks.__aexit__(*((kind, error, trace) if cancelled else (None, None, None)))
            finally:
                if self._replicas is not None:
                    await self._sender.__aexit__(None, None, None)
        if failure is not None:
            if error is None:
                try:
                    raise failure
                finally:
                    del failure  # it refers to this frame
            error.add_note(f"Besides, on leaving the actor: {failure}")
        return None

    def _close(self) -> None:
        """Let go of the buffers: an actor refers to itself, by the functions that were compiled for it."""
        self._committer.close()
        self._stats.appended += self._rows_written()
        self.forsake()
        self._current = None
        self._full.clear()
        self._free.clear()
        self.run = None

    # --- runs --------------------------------------------------------------------------------------------------------

    async def join(self) -> Begin:
        """Go to the newest run. If that is the present one already, commit what was appended and wait for a newer one.

        Raises:
            SchemaMismatch: the run was begun with other columns.
        """
        if self._tasks is None or self._tasks.cancel_scope.cancel_called:
            raise UsageError("use the actor inside of its `async with` block")
        if self.run is not None:
            try:
                await self.flush()
            except RunEnded:
                pass
            else:
                self._commit_current()  # nothing is in it: its buffer is free again
                self.run = None
        while self._committer.busy:
            await self._committer.progress()
        fruitless = 0
        while True:
            await self._committer.restore()
            begin = await runs.latest(self._client, self._names)
            if begin is not None and (self._last is None or begin.token != self._last.token):
                break
            if fruitless > 1:  # the log has gone on without a run: it is being deleted
                await anyio.sleep(backoff(fruitless))
            after = (0 if self._last is None else self._last.run, streams.RIGHT_MAX)
            fruitless += bool(await streams.read_blocking(self._client, self._names.log, after, 1))
        if begin.schema != self._schema.digest:
            raise SchemaMismatch(
                f"run {begin.run} of {self._names.name!r} was begun with other columns than {self._schema!r}",
                replay=self._names.name,
                run=begin.run,
            )
        if self._numbered != begin.run:
            self._numbered, self._seq = begin.run, 0
        else:
            self._seq += 1  # what was given up after an error may have ended an episode: no slice leads across it
        await self._say_name()
        self._committer.begin(runs.Beginning(self._client, self._names, begin))
        self.run = self._last = begin
        self._begin_chunk()
        return begin

    async def _say_name(self) -> None:
        """For people who look at the replay: to them, an actor that may not is its incarnation only.

        In the moment of a deletion this makes the key again, some 30 bytes; the next deletion of that name takes it. A time to
        live would have to be renewed as long as the actor works, and be one right more.
        """
        try:
            await self._client.call("HSET", self._names.actors, self.incarnation.hex(), self.name, repeatable=True)
        except ServerError:
            pass

    # --- appending ---------------------------------------------------------------------------------------------------

    def _rows_written(self) -> int:
        """Of the present chunk."""
        return self._rows.count() if self._current is not None else 0

    def _begin_chunk(self) -> None:
        self._current = buffer = self._free[-1]
        self._free.remove(buffer)  # pop() would lose it to Ctrl-C; the loop may add others meanwhile
        self._rows.switch(buffer.columns, self._length)

    def _late(self, /, **values: object) -> Coroutine[Any, Any, None]:
        """There is no row to write."""
        self._check_joined()
        if self._unawaited:
            raise UsageError("await each append(): the last one has to wait for a free buffer")
        return self._append_later(values)

    async def _append_later(self, values: dict[str, object]) -> None:
        """The append before this one was cancelled while it waited."""
        await self._next_chunk()
        await self.append(**values)

    def _check_joined(self) -> None:
        if self.run is None:
            raise UsageError("no run to append to: `await actor.join()` first, and again after an error")

    def _chunk_full(self) -> _Done | Coroutine[Any, Any, None]:
        if self._goes_on():
            return self._done
        self._unawaited = True
        return self._turn()

    def _goes_on(self) -> bool:
        """Send the chunk that is full and begin the next one, unless there is something to wait for."""
        if (
            time.monotonic() < self._turn_ends
            and self._free
            and not self._committer.over
            and not self._lag.is_behind(*self._committer.newest)
        ):
            self._commit_current(self._soon)
            self._begin_chunk()
            return True
        return False

    async def _turn(self) -> None:
        """Let others run, then send the chunk that is full and go on with the next one.

        In this order: the replies to the last chunk's commands have come meanwhile, and what they lead to goes with it.
        """
        self._unawaited = False
        await anyio.lowlevel.checkpoint()
        self._turn_ends = time.monotonic() + self._turn_seconds
        await self._next_chunk()

    def _commit_current(self, soon: Soon = _now) -> None:
        """Hand the rows that are written to the committing task.

        Ctrl-C may interrupt a thread that appends, behind any call in here: the buffer has its place at each of them.
        """
        rows, buffer = self._rows.count(), self._current
        if buffer is not None:
            assert self.run is not None
            if rows:
                chunk = buffer, rows, self.run.run
                self._stats.appended += rows
                self._current = None
                self._full.append(chunk)
            else:
                self._current = None
                self._free.append(buffer)
            self._rows.switch(buffer.columns, 0)  # no row to write
        if self._full:
            soon(self._commit_full)

    def _commit_full(self) -> None:
        while self._full:
            chunk = self._full.popleft()
            try:
                self._commit(*chunk)
            except UsageError:  # the client was closed: whoever calls again is told so, too
                self._full.appendleft(chunk)
                raise

    def _commit(self, buffer: ChunkBuffer, rows: int, run: int) -> None:
        if self._committer.over:
            self._stats.stale += rows
            self._client.counters.stale += rows
            self._free.append(buffer)
            return
        chunk = ChunkId(self.incarnation, self._seq, rows, buffer.episode_ends(rows))
        self._committer.commit(buffer, run, chunk)
        self._seq += 1

    def _settled(self, buffer: ChunkBuffer, rows: int, committed: bool) -> None:
        if committed:
            self._stats.acknowledged += rows
            self._stats.chunks += 1
        else:
            self._stats.stale += rows
        self._free.append(buffer)

    async def _next_chunk(self) -> None:
        await self._lag.wait(*self._committer.newest)
        self._check()
        self._commit_current()
        if not self._free:
            self._stats.waits += 1
            self._client.counters.waits += 1
        while self._current is None:
            if self._free:
                self._begin_chunk()
            else:
                await self._committer.progress()
                self._check()

    def _check(self) -> None:
        """Raise what has happened to the run, or to the server."""
        if not self._committer.over:
            return
        run, name = self.run, self._names.name
        assert run is not None
        self._commit_current()
        if isinstance(self._committer.failure, UsageError):  # the client was closed: as in _commit_full()
            raise copy.copy(self._committer.failure)
        self.run = None
        if self._committer.failure is not None:
            self._last = None
            raise copy.copy(self._committer.failure)
        if self._committer.gone:
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
        while self._committer.busy:
            await self._committer.progress()
        if not self._committer.over and not await self._committer.restore():
            self._committer.ended = True
        self._check()
        self._begin_chunk()

    async def cut(self) -> bool:
        """Flush, and let what comes next not follow what was appended before; whether there was anything in this run. For
        :mod:`aionpredis.frameworks.sb3`.
        """
        await self.flush()
        if not self._seq:
            return False
        self._seq += 1  # a number that never comes: nothing follows the chunk before it
        return True
