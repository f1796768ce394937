"""Committing chunks: what one actor has on its way to the server.

A chunk's data travels as ``SET NX`` with a lease, is named in the log by ``XADD``, and then kept by ``PERSIST``. So every
data key is either named in the log or has a time to live, whatever dies when. The steps of one chunk wait for each other;
those of different chunks travel together, as far as they go to the same shard: the log lies on one, the data on any.
"""

from __future__ import annotations

import copy
import enum
import logging
import math
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, NamedTuple

import anyio
import anyio.lowlevel
from anyio.abc import TaskGroup

from aionpredis import streams
from aionpredis.errors import (
    AionpredisError,
    ConnectError,
    ConnectionLost,
    ServerError,
    ServerFull,
    ServerUnavailable,
    UsageError,
)
from aionpredis.replay import runs
from aionpredis.replay.chunk import ChunkBuffer
from aionpredis.replay.entries import ABSENT, LastEntries
from aionpredis.replay.log import FIELD, ChunkId, Names, pack
from aionpredis.retry import Retry
from aionpredis.wire import resp
from aionpredis.wire.connection import Connection
from aionpredis.wire.resp import Blob, Buffer, Reply
from aionpredis.wire.shard import Shard

if TYPE_CHECKING:
    from aionpredis.client import Client
    from aionpredis.replicas import Replicas

__all__ = ["Committer"]

logger = logging.getLogger(__name__)

MAX_SURPLUS = 16
"""Chunks beyond the capacity after which somebody evicts: whoever commits an entry whose number divides by this, so that of
many actors one does, and if it dies the next one. It costs three round trips."""

EVICT_SECONDS = 2.0
"""For an eviction. What one does not finish, the next one does."""

PERSISTENT = -1
"""What ``PTTL`` says of a key without a time to live."""


class _Step(enum.Enum):
    """The command that a chunk's commit has to send next."""

    SET = "SET"
    RENEW = "PEXPIRE"
    LOG = "XADD"
    KEEP = "PERSIST"
    CHECK = "PTTL"
    FIND = "XREVRANGE"
    DROP = "UNLINK"
    FENCE = "PSETEX"
    """Of a key beside the chunk's: if replicas have that, they have all that is older."""


_LOGGED = (_Step.KEEP, _Step.CHECK, _Step.FENCE)
"""The steps of a commit that is in the log."""

_REPLICATED = (_Step.LOG, _Step.KEEP, _Step.FENCE)
"""The steps that replicas are waited for at: what a server did before, it tells them before."""


class _Turn(enum.Enum):
    """Whether a chunk's entry may go to the log: the entries of an actor come in the order of its chunks, though the data go to
    several shards. A chunk that meets a fault is not waited for, and may come later.
    """

    AWAITED = enum.auto()  # its data are on their way: later chunks wait
    READY = enum.auto()  # its data are there: it waits for earlier chunks
    FREE = enum.auto()


class _Commit:
    """A chunk on its way; its buffer is held until it is settled."""

    __slots__ = (
        *("anew", "buffer", "chunk", "key", "leased", "packed", "repeated", "run", "searched", "size", "step", "turn"),
        "value",
    )

    def __init__(self, buffer: ChunkBuffer, run: int, key: bytes, chunk: ChunkId) -> None:
        self.buffer = buffer
        self.run = run
        self.key = key
        self.chunk = chunk
        self.packed = pack(chunk)
        self.value = buffer.value(chunk.rows)
        self.size = sum(map(len, self.value))
        self.leased = 0.0  # when the lease was last begun anew
        self.repeated = False  # it may be in the log already
        self.anew = False  # and its data were gone since, so they may have been deleted with the run
        self.searched = f"{run}-{streams.RIGHT_MAX}"  # the log was searched for it down to this entry
        self.step = _Step.SET
        self.turn = _Turn.FREE


class _Round(NamedTuple):
    """The next command of each of these commits, sent together: ``reply`` has a value for each."""

    commits: list[_Commit]
    buffers: list[Buffer]
    reply: Reply
    over: set[Connection]  # it was sent, as far as replicas are waited for and not known to have it
    changes: int  # ``Faults.changes`` when it was sent


class _Lane:
    """What is on its way to one shard. A fault of that shard is a fault of these commits only; the others go on."""

    __slots__ = ("backlog", "connection", "full", "refusal", "retry", "rounds", "shard", "to_do")

    def __init__(self, shard: Shard, client: Client) -> None:
        self.shard = shard
        self.connection: Connection | None = None
        self.rounds: deque[_Round] = deque()  # in the order of their requests on the connection
        self.backlog: list[_Commit] = []  # to be sent (again)
        self.to_do: anyio.Event | None = None  # while there is nothing
        # A broken connection may last longer than a lease: what has gone meanwhile is set again. So only the client's
        # ``retry_timeout`` says when it is given up. Room on a full server is waited for: a trainer makes it, some time.
        self.retry = Retry(client.faults)
        self.full = Retry(client.faults, math.inf)
        self.refusal: ServerFull | None = None  # the last one

    @property
    def pauses(self) -> bool:
        """Whether nothing is to be sent before the next attempt."""
        return self.retry.attempts > 0 or self.full.attempts > 0

    @property
    def commits(self) -> list[_Commit]:
        """All of them, in order."""
        return [*(commit for one in self.rounds for commit in one.commits), *self.backlog]

    def abandon(self) -> None:
        """Nobody waits for the replies any more, and nothing is read from the buffers."""
        for one in self.rounds:
            if self.connection is not None:
                self.connection.abandon(one.reply)


@lru_cache(16)
def _xadd(log: bytes, run: int) -> bytes:
    """The command that names a chunk in the log, up to its last argument, the packed commit."""
    arguments = [b"XADD", log, b"NOMKSTREAM", b"%d-*" % run, FIELD]
    return b"*6" + bytes(resp.encode_bytes(arguments)[0]).removeprefix(b"*5")


class Committer:
    """Commits the chunks of one actor, by :meth:`work` in a task of its own. ``capacity``: chunks that a run keeps, 0: all.
    ``replicas``: who has to have a chunk besides; the client is a twin of its own then.

    ``settled(buffer, rows, committed)`` is called once for each chunk, and gives the buffer back. ``failure``, ``ended``
    and ``gone`` say why nothing more is committed until :meth:`begin`: an error, a newer run, or a log that was deleted.
    """

    def __init__(
        self,
        client: Client,
        names: Names,
        *,
        lease: float,
        capacity: int = 0,
        replicas: Replicas | None = None,
        settled: Callable[[ChunkBuffer, int, bool], None],
    ) -> None:
        self.failure: AionpredisError | None = None
        self.ended = False
        self.gone = False
        self.beginning: runs.Beginning | None = None
        """Of the run that is committed to."""
        self._client = client
        self._counters = client.counters
        self._names = names
        self._log = names.log.encode()
        self._lease = lease
        self._lease_ms = b"%d" % round(float(lease) * 1000)
        self._faults = client.faults
        self._last = LastEntries(client, names, self._lease_ms)
        self._capacity = capacity
        self._replicas = replicas
        self._evict_every = max(1, min(MAX_SURPLUS, capacity // 8))
        self._evict: tuple[int, int] | None = None  # run and entry: what lies at or before it has to go
        self.newest = 0, 0
        """Run and entry of the last commit."""
        self._settled = settled
        self._lanes: dict[Shard, _Lane] = {}
        self._only: _Lane | None = None  # if there is one server
        self._line: deque[_Commit] = deque()  # from the first that is AWAITED on
        self._pending = 0  # commits that are not settled
        self._tasks: TaskGroup | None = None
        self._closed = anyio.Event()
        self._progress = anyio.Event()
        self._cancelled = False

    @property
    def over(self) -> bool:
        """Whether nothing more is committed."""
        return self.ended or self.gone or self.failure is not None

    @property
    def busy(self) -> bool:
        """Whether there are chunks that are not settled."""
        return self._pending > 0

    @property
    def full(self) -> ServerFull | None:
        """What a server says on which there is no room at the moment."""
        return next((lane.refusal for lane in self._lanes.values() if lane.full.attempts), None)

    @property
    def _doubtful(self) -> bool:
        return self._last.doubtful or (self.beginning is not None and self.beginning.doubtful)

    def begin(self, beginning: runs.Beginning) -> None:
        """Commit to this run from now on, whatever has become of the last one. (One of the lanes may find only now that it
        has ended.)
        """
        self.failure, self.ended, self.gone = None, False, False
        self.beginning = beginning

    def commit(self, buffer: ChunkBuffer, run: int, chunk: ChunkId) -> None:
        """Send a chunk, and with it what waits to be sent of others. Its buffer is borrowed until it is settled."""
        commit = _Commit(buffer, run, self._names.data(run, chunk), chunk)
        lane = self._queue(commit, _Step.SET)  # first: the client may be closed
        self._counters.inflight_bytes += commit.size
        self._pending += 1
        # Of one server the replies come in order anyway; and what has to wait for a fault to pass holds up no other chunk.
        if self._only is None and not lane.pauses:
            commit.turn = _Turn.AWAITED
            self._line.append(commit)
        connection = lane.connection
        if connection is not None and connection.lost is None and not (self._doubtful or lane.pauses):
            self._submit(lane, connection)

    async def restore(self) -> bool:
        """Add what a failover may have taken from the log again, while nothing else is on its way that would lead to that.
        ``False``: there is nothing to add it to, another run has taken the place of the one that is committed to.

        A full server is no error here: it is tried again with the next chunk.
        """
        if self.beginning is None or not self._doubtful:
            return True
        goes_on = True
        with suppress(ServerFull):
            goes_on = await self.beginning.confirm()
            await self._last.restore(ended=not goes_on)
        return goes_on

    async def progress(self) -> None:
        """Wait until at least one chunk was settled.

        Raises:
            UsageError: none will be, :meth:`work` was cancelled.
        """
        if self._cancelled:
            await anyio.lowlevel.checkpoint()  # whoever was cancelled with it hears of that
            raise UsageError("the actor was cancelled: what it had not acknowledged is given up")
        if self._progress.is_set():
            self._progress = anyio.Event()
        await self._progress.wait()

    async def work(self) -> None:
        """Settle what is committed, until :meth:`close`."""
        try:
            async with anyio.create_task_group() as self._tasks:
                for lane in self._lanes.values():
                    self._tasks.start_soon(self._drive, lane)
                await self._closed.wait()  # until then another shard may come
        finally:
            self._tasks = None
            if not self._closed.is_set():  # cancelled, with the actor's task, which may hear of it only later
                self._cancelled = True
                self._progress.set()

    async def _drive(self, lane: _Lane) -> None:
        """Send what goes to one shard, and take the replies."""
        while True:
            if not (lane.rounds or lane.backlog):
                if self._closed.is_set():
                    return
                lane.to_do = anyio.Event()
                await lane.to_do.wait()
                lane.to_do = None
                continue
            try:
                if not lane.rounds:
                    if lane.connection is None or lane.connection.lost is not None:
                        await self._connect(lane)
                        continue
                    # What is small waits while something travels, and goes with the next chunk: an actor that appends
                    # without a pause fills that now.
                    await anyio.lowlevel.checkpoint()
                    begun = self.beginning
                    if begun is not None and begun.doubtful and not await begun.confirm(lane.retry):
                        if self.beginning is begun:  # else the actor has heard of it and joined the next one
                            self.ended = True
                            self._give_up()
                        continue
                    if self._last.doubtful and any(commit.step is _Step.LOG for commit in lane.backlog):
                        # First, so that the log has an actor's chunks in order.
                        await self._last.restore(retry=lane.retry)
                    if lane.connection is None or lane.connection.lost is not None:
                        continue  # else what is sent now goes to the server that was looked at, whatever became of others
                    self._submit(lane, lane.connection)
                    if not lane.rounds:
                        continue
                assert lane.connection is not None
                await lane.connection.wait(lane.rounds[0].reply)
                while lane.rounds and lane.rounds[0].reply.done:  # and whatever else has come with it
                    one = lane.rounds[0]
                    if one.reply.redirected:
                        over = await self._client.topology.follow(one.buffers, one.reply)
                        one.reply.redirected = False
                        if one.over:
                            one.over.update(over)
                    elif one.over and one.reply.error is None:
                        assert self._replicas is not None
                        await self._replicas.acknowledge(one, lane.rounds, lane.retry)
                    else:
                        self._take_round(lane)
                if lane.retry.attempts:
                    lane.retry.succeeded()
                if lane.full.attempts:
                    lane.full.succeeded()
                if self._evict is not None:
                    # To the end, though the actor is left: an entry without data would be taken for a loss.
                    evict, self._evict = self._evict, None
                    with anyio.move_on_after(EVICT_SECONDS, shield=True):
                        await runs.evict(self._client, self._names, *evict)
            except ServerFull as error:  # until there is room: meanwhile append() waits
                lane.refusal = error
                await anyio.sleep(lane.full.after(error))
            except (ConnectionLost, ConnectError, ServerUnavailable) as error:
                self._counters.repeated += sum(len(one.commits) for one in lane.rounds)
                try:
                    self._start_again(lane)
                    pause = lane.retry.after(error, lane.connection)
                except AionpredisError as final:
                    self._fail(final)
                else:
                    await anyio.sleep(pause)
            except (ServerError, UsageError) as error:  # UsageError: the client was closed
                self._fail(error)

    async def _connect(self, lane: _Lane) -> None:
        """Reach the shard (again), or the one that has its keys by now."""
        await self._client.connection(self._key(lane.backlog[0]))
        self._sort_out(lane)
        lane.connection = lane.shard.live_connection
        if not lane.backlog:
            lane.retry.succeeded()

    def close(self) -> None:
        """Nothing is committed any more, and nothing is read from the buffers."""
        # What is idle ends by itself: in asyncio, the error of a task that is cancelled keeps its frame.
        self._closed.set()
        self._counters.inflight_bytes -= sum(commit.size for commit in self._commits())
        for lane in self._lanes.values():
            self._clear(lane)
            lane.connection = None
            lane.retry.reset()
            lane.full.reset()
            if lane.to_do is not None:
                lane.to_do.set()
        self._lanes.clear()
        self._only = None
        self._line.clear()
        self._pending = 0

    def _commits(self) -> list[_Commit]:
        """All that are not settled."""
        commits = [commit for commit in self._line if commit.turn is _Turn.READY]
        for lane in self._lanes.values():
            commits += lane.commits
        return commits

    def _start_again(self, lane: _Lane) -> None:
        """After a fault nothing is known about what travelled, or is still there: each chunk begins again.

        What may be in the log is not set before it is known to be gone. It may be deleted, and a SET whose reply is lost,
        too, could not be told from the first one.
        """
        log = self._client.topology.shard(self._log)  # first: the client may be closed
        commits = lane.commits
        self._clear(lane)
        if lane.shard is log:
            for other in self._lanes.values():
                # Their entries may be lost with the server.
                commits += [commit for commit in other.backlog if commit.step in _LOGGED]
                other.backlog = [commit for commit in other.backlog if commit.step not in _LOGGED]
        for commit in commits:
            commit.repeated |= commit.step is not _Step.SET
            commit.turn = _Turn.FREE
            self._queue(commit, _Step.RENEW if commit.repeated else _Step.SET)
        self._next_turns()

    def _clear(self, lane: _Lane) -> None:
        lane.abandon()
        lane.rounds.clear()
        lane.backlog.clear()

    def _fail(self, error: AionpredisError) -> None:
        logger.warning("%s: chunks on their way are given up: %s", self._names.name, str(error))
        self.failure = copy.copy(error)
        self._give_up()

    def _give_up(self) -> None:
        """Give up what is not committed. What was sent keeps its lease, so nothing stays on the server for ever."""
        commits = self._commits()
        self._line.clear()
        for lane in self._lanes.values():
            lane.retry.reset()
            lane.full.reset()
            self._clear(lane)
        for commit in commits:
            self._settle(commit, committed=False)

    def _settle(self, commit: _Commit, *, committed: bool) -> None:
        self._counters.inflight_bytes -= commit.size
        self._pending -= 1
        if committed:
            self._counters.acknowledged += commit.chunk.rows
        else:
            self._counters.stale += commit.chunk.rows
        self._settled(commit.buffer, commit.chunk.rows, committed)
        self._progress.set()

    # --- to the shards -------------------------------------------------------------------------------------------------

    def _key(self, commit: _Commit) -> bytes:
        return self._log if commit.step in (_Step.LOG, _Step.FIND) else commit.key

    def _lane(self, commit: _Commit) -> _Lane:
        """The lane to the shard that the commit's next command goes to."""
        topology = self._client.topology
        shard = topology.shard(self._key(commit))
        lane = self._lanes.get(shard)
        if lane is None:
            self._lanes[shard] = lane = _Lane(shard, self._client)
            if topology.joins_keys:
                self._only = lane
            if self._tasks is not None:
                self._tasks.start_soon(self._drive, lane)
        return lane

    def _queue(self, commit: _Commit, step: _Step) -> _Lane:
        commit.step = step
        lane = self._only or self._lane(commit)
        lane.backlog.append(commit)
        if lane.to_do is not None:
            lane.to_do.set()
        return lane

    def _next_turns(self) -> None:
        line = self._line
        while line and line[0].turn is not _Turn.AWAITED:
            commit = line.popleft()
            if commit.turn is _Turn.READY:
                commit.turn = _Turn.FREE
                self._queue(commit, commit.step)

    def _sort_out(self, lane: _Lane) -> None:
        """Give to other lanes what is theirs by now: slots move, and servers are replaced."""
        if self._only is None:
            commits, lane.backlog = lane.backlog, []
            for commit in commits:
                self._queue(commit, commit.step)

    # --- the steps -----------------------------------------------------------------------------------------------------

    def _submit(self, lane: _Lane, connection: Connection) -> None:
        """Send the next command of each commit in the backlog, all of them as one request."""
        now = time.monotonic()
        for commit in lane.backlog:
            if commit.step is _Step.LOG and now - commit.leased > self._lease / 2:
                commit.step = _Step.RENEW  # else the key could be gone between XADD and PERSIST
        self._sort_out(lane)
        commits = lane.backlog
        if not commits:
            return
        buffers: list[Buffer] = []
        small = b""  # what lies between two large buffers
        for commit in commits:
            command = self._command(commit)
            if len(command) == 1:
                small += command[0]
            else:
                buffers += (small + command[0], *command[1:-1])
                small = bytes(command[-1])
        buffers.append(small)
        over = set()
        if self._replicas is not None and any(commit.step in _REPLICATED for commit in commits):
            over.add(connection)
        reply = connection.submit(buffers, Reply(len(commits)))
        lane.rounds.append(_Round(commits, buffers, reply, over, self._faults.changes))
        lane.backlog = []

    def _command(self, commit: _Commit) -> list[Buffer]:
        """The command of the commit's next step. If it is long, the caller's memory stands between two short ends."""
        key = commit.key
        match commit.step:
            case _Step.SET:
                commit.leased = time.monotonic()
                commit.anew |= commit.repeated
                # NX: an earlier SET of this chunk, whose reply was lost, may be committed by now and live for ever.
                if len(commit.value) > 1:
                    return resp.encode("SET", key, Blob(commit.value), "NX", "PX", self._lease_ms)
                options = b"$2\r\nNX\r\n$2\r\nPX\r\n$%d\r\n%b\r\n" % (len(self._lease_ms), self._lease_ms)
                return resp.encode_set(key, b"", commit.value[0], options, 3)
            case _Step.LOG:
                return [b"%b$%d\r\n%b\r\n" % (_xadd(self._log, commit.run), len(commit.packed), commit.packed)]
            case _Step.RENEW:
                commit.leased = time.monotonic()
                # XX: if this is delayed until after the PERSIST of another connection, it must not begin a lease again.
                return resp.encode_bytes([b"PEXPIRE", key, self._lease_ms, b"XX"])
            case _Step.FIND:
                return resp.encode("XREVRANGE", self._log, commit.searched, f"{commit.run}-1", "COUNT", streams.PAGE)
            case _Step.FENCE:
                # A key of the same slot, for which the chunk's rights are enough.
                return resp.encode("PSETEX", b"%b:0{%b}" % (self._names.name.encode(), key), 1, b"")
            case _Step.KEEP:
                return [b"*2\r\n$7\r\nPERSIST\r\n$%d\r\n%b\r\n" % (len(key), key)]
            case step:
                return resp.encode_bytes([step.value.encode(), key])

    def _take_round(self, lane: _Lane) -> None:
        """Take the replies to the oldest round; raises the first that is an error, after all were taken."""
        commits, _, reply, _, changes = lane.rounds[0]
        if reply.error is not None:
            raise copy.copy(reply.error)
        lane.rounds.popleft()
        failure: Callable[[], ServerError] | None = None
        for commit, value in zip(commits, reply.values, strict=True):
            if not isinstance(value, ServerError):
                self._advance(commit, value)
                continue
            if commit.step is _Step.LOG and streams.is_stale(value):
                self.ended = True
                self._queue(commit, _Step.FIND if commit.repeated else _Step.DROP)
            else:
                about = self._names.log if commit.step in (_Step.LOG, _Step.FIND) else commit.key
                if commit.turn is _Turn.AWAITED:
                    commit.turn = _Turn.FREE
                    self._next_turns()
                self._queue(commit, commit.step)
                failure = failure or partial(value.about, commit.step.value, about)
        self._last.sent(changes)
        if failure is not None:
            raise failure()

    def _advance(self, commit: _Commit, value: Any) -> None:
        """Take the reply to the commit's command; queue its next one, or settle it."""
        match commit.step:
            case _Step.SET:
                commit.repeated |= value is None
                commit.step = _Step.RENEW if value is None else _Step.LOG
                if self._line and commit.turn is _Turn.AWAITED:
                    commit.turn = _Turn.READY
                    self._next_turns()
                else:
                    self._queue(commit, commit.step)
            case _Step.RENEW:
                self._queue(commit, _Step.LOG if value else _Step.CHECK)
            case _Step.LOG if value is None:
                self.gone = True
                self._queue(commit, _Step.DROP)
            case _Step.LOG:
                entry = int(value.partition(b"-")[2])
                self.newest = commit.run, entry
                if self._capacity and entry > self._capacity and entry % self._evict_every == 0:
                    self._evict = commit.run, entry - self._capacity
                commit.repeated, commit.anew = True, False  # the run went on after the data were there
                self._last.add(commit.run, commit.packed, entry)
                self._queue(commit, _Step.KEEP)
            case _Step.KEEP if value:
                self._settle(commit, committed=True)
            case _Step.KEEP:  # it had no time to live, or does not exist
                self._queue(commit, _Step.CHECK)
            case _Step.CHECK if value == PERSISTENT and self._replicas is not None:
                # WAIT counts what this connection wrote, and the PERSIST was another's.
                self._queue(commit, _Step.FENCE)
            case _Step.CHECK if value == PERSISTENT:  # by an earlier PERSIST, so it is in the log
                self._settle(commit, committed=True)
            case _Step.FENCE:
                self._settle(commit, committed=True)
            case _Step.CHECK:  # the lease ran out; or a SET that was delayed has begun another one
                self._queue(commit, _Step.SET if value == ABSENT else _Step.RENEW)
            case _Step.FIND if any(fields == [FIELD, commit.packed] for _, fields in value):
                if commit.anew:  # who deletes runs deletes the entry next: kept, the data would stay for ever
                    self._settle(commit, committed=False)
                else:
                    self._queue(commit, _Step.KEEP)  # the run ended after that; its data may still be wanted
            case _Step.FIND if len(value) == streams.PAGE:
                commit.searched = f"({value[-1][0].decode()}"
                self._queue(commit, _Step.FIND)
            case _Step.FIND:
                self._queue(commit, _Step.DROP)
            case _Step.DROP:
                self._settle(commit, committed=False)
