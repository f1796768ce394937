"""The way of a writer's batches to one server: sent in order, followed where they are redirected, sent again after a fault."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from itertools import repeat
from typing import TYPE_CHECKING

import anyio

from aionpredis.errors import (
    AionpredisError,
    ConnectError,
    ConnectionLost,
    NotReplicated,
    Redirected,
    ServerError,
)
from aionpredis.requests import Key, key_bytes, ok_reply
from aionpredis.retry import Retry
from aionpredis.wire.connection import Connection
from aionpredis.wire.resp import Buffer, Reply
from aionpredis.wire.shard import Shard

if TYPE_CHECKING:
    from aionpredis.client import Client
    from aionpredis.replicas import Replicas

__all__ = ["BATCH_BYTES", "BATCH_ITEMS", "Batch", "Lane"]

BATCH_BYTES = 512 * 1024
"""Bytes of commands sent together: about 40 arrays of 80x80 uint16. 8.2 µs each with 256 KiB, 7.4 with 512, 7.2 with 1024."""

BATCH_ITEMS = 256
"""Commands sent together, however small."""


class Batch:
    """Commands that travel together. ``size`` is what it counts for the bound. Without keys: withdrawn, never sent again."""

    __slots__ = ("arena", "buffers", "failures", "keys", "lane", "over", "reply", "settled", "size", "used")

    def __init__(self, lane: Lane, arena: memoryview | None) -> None:
        self.lane = lane
        self.arena = arena  # snapshots lie here, one behind the other; None: memory is borrowed
        self.used = 0
        self.size = 0 if arena is None else len(arena)
        self.keys: list[Key] = []
        self.buffers: list[Buffer] = []
        self.reply: Reply | None = None
        self.over: set[Connection] = set()  # it was sent, as far as replicas are not known to have it
        self.failures: list[tuple[Key, Exception]] = []
        self.settled = False

    def snapshot(self, key: Key, command: Sequence[Buffer], size: int) -> bool:
        """Copy a command of ``size`` bytes behind the others; ``False`` if there is no room."""
        at = self.used
        if self.arena is None or at + size > len(self.arena) or len(self.keys) >= BATCH_ITEMS:
            return False
        arena = self.arena
        for buffer in command:
            end = at + len(buffer)
            arena[at:end] = buffer
            at = end
        self.used = at
        self.keys.append(key)
        return True

    def commands(self) -> list[Buffer]:
        return self.buffers if self.arena is None else [self.arena[: self.used]]


class Lane:
    """One for each server: what one of them does not take keeps no other waiting.

    Batches are settled in the order in which they were closed. ``settled(batch)`` is called with each, its failures in it.
    ``passing``: what a server answers that it may answer otherwise later. ``replicas``: who has to have an item besides.
    """

    def __init__(
        self,
        client: Client,
        shard: Shard,
        *,
        settled: Callable[[Batch], None],
        passing: tuple[type[ServerError], ...],
        replicas: Replicas | None,
    ) -> None:
        self.current: Batch | None = None
        """That which is being filled."""
        self.last: Batch | None = None
        """That which was closed last."""
        self.inflight: deque[Batch] = deque()
        self.queued: deque[Batch] = deque()
        self._client = client
        self._home = shard
        self._shard = shard  # another one takes its place while it is no primary
        self._connection = shard.live_connection
        self._settled = settled
        self._passing = passing
        self._replicas = replicas
        self._astray: dict[bytes, Redirected] = {}
        self._astray_until: Batch | None = None
        self._retry = Retry(client.faults)
        self._work = anyio.Event()
        self._closed = False

    def wake(self) -> None:
        """Something is in the current batch. It leaves when nothing else of this lane travels."""
        if not self.inflight:
            self._work.set()

    def close_batch(self) -> None:
        """Let the current batch leave."""
        batch, self.current = self.current, None
        if batch is not None:
            self.last = batch
            self.queued.append(batch)
            self._submit()
            self._work.set()

    def withdraw(self, batch: Batch) -> None:
        """Let go of a batch's borrowed memory, wherever it is. It stays in its place, empty, until it is settled."""
        batch.keys, batch.buffers = [], []
        if batch.reply is not None and self._connection is not None:
            self._connection.abandon(batch.reply)

    def close(self) -> None:
        """Let go of all borrowed memory; only after a cancellation is there any left. Somebody cancels the pump then."""
        for batch in (*self.inflight, *self.queued):
            self.withdraw(batch)
        self._retry.reset()
        self.last, self._connection = None, None  # batches refer to their lane
        self._closed = True
        self._work.set()  # an idle pump ends by itself: in asyncio, the error of one that is cancelled keeps its frame

    async def pump(self) -> None:
        """Settle the batches in flight, in order, and send the current one when nothing else travels."""
        while True:
            if not (self.inflight or self.queued):
                if self._closed:
                    return
                self._retry.reset()
                if self.current is not None and self.current.keys:
                    self.close_batch()
                else:
                    self._work = anyio.Event()
                    await self._work.wait()
                continue
            try:
                connection = await self._connect()
                if connection is not self._connection:
                    self._requeue()
                    self._connection = connection
                self._submit()
                batch = self.inflight[0]
                if batch.reply is not None:
                    await connection.wait(batch.reply)
                    if batch.reply.redirected or self._astray:
                        await self._follow(batch, batch.reply)
                refusal = self._refusal(batch)
                if refusal is None:
                    if batch.over:
                        assert self._replicas is not None
                        await self._replicas.acknowledge(batch, self.inflight, self._retry)
                    if self._retry.attempts:
                        self._retry.succeeded()
                    self._settle(self.inflight.popleft())
                    continue
                try:
                    pause = self._retry.after(refusal, connection)
                except ServerError:  # tried for long enough; what else the batch holds may be stored
                    self._settle(self.inflight.popleft())
                    continue
                self._requeue()
            except NotReplicated as error:
                self._retry.reset()
                while self.inflight and (reply := self.inflight[0].reply) is not None and reply.done:
                    self._settle(self.inflight.popleft(), error)
                continue
            except (ConnectionLost, ConnectError, ServerError) as error:
                self._requeue()
                try:
                    pause = self._retry.after(error)
                except AionpredisError:
                    self._give_up(error)
                    continue
            except Exception as error:
                self._requeue()
                self._give_up(error)
                continue
            await anyio.sleep(pause)

    async def _connect(self) -> Connection:
        """To this lane's server, or to one that has taken its place: then what belongs elsewhere is redirected from there."""
        shards = self._client.topology.shards
        if self._home in shards:
            self._shard = self._home
        connection = self._shard.live_connection if self._shard in shards else None
        if connection is None:
            keys = (key for batch in (*self.inflight, *self.queued) for key in batch.keys)
            self._shard = await self._client.reach(key_bytes(next(keys, b"")))
            connection = await self._shard.connection()
        return connection

    def _submit(self) -> None:
        """Hand queued batches to the connection, in order. A broken one is the pump's business."""
        connection = self._connection
        while self.queued and connection is not None and connection.lost is None:
            batch = self.queued[0]
            if batch.keys:
                batch.reply = connection.submit(batch.commands(), ok_reply(len(batch.keys)))
                if self._replicas is not None:
                    batch.over = {connection}
            self.inflight.append(self.queued.popleft())

    async def _follow(self, batch: Batch, reply: Reply) -> None:
        """Send again what was redirected.

        And what was not, if an earlier value of its key was: the slot may have come back between the two of them.
        """
        topology = self._client.topology
        if topology.joins_keys:
            return  # one server: nobody is asked elsewhere
        values = reply.values or [b"OK"] * len(batch.keys)
        for index, (key, value) in enumerate(zip(map(key_bytes, batch.keys), values, strict=False)):
            if isinstance(value, Redirected):
                self._astray[key] = value
            elif key in self._astray and value == b"OK":
                values[index] = self._astray[key]
                reply.values, reply.redirected = values, True
        if reply.redirected and batch.keys:
            # A copy: a cancelled put takes back the memory that it lent, and only this lane's own connection is told.
            over = await topology.follow([b"".join(batch.commands())], reply)
            if self._replicas is not None:
                batch.over |= over
            self._astray_until = self.inflight[-1]
        if batch is self._astray_until:
            self._astray.clear()

    def _refusal(self, batch: Batch) -> ServerError | None:
        """An answer to this batch that may be another one later."""
        if batch.reply is None or not batch.keys:
            return None
        return next((value for value in batch.reply.values if isinstance(value, self._passing)), None)

    def _requeue(self) -> None:
        """The connection broke, or the server refused. What was in flight goes first again, so that the last put of a key wins.

        Storing the same values twice is harmless.
        """
        connection, self._connection = self._connection, None
        self._astray.clear()
        for batch in self.inflight:
            self._client.counters.repeated += len(batch.keys)
            if batch.reply is not None and connection is not None:
                connection.abandon(batch.reply)
            batch.reply = None
        self.queued.extendleft(reversed(self.inflight))
        self.inflight.clear()

    def _give_up(self, error: Exception) -> None:
        self._retry.reset()
        while self.queued:
            batch = self.queued.popleft()
            batch.failures += ((key, error) for key in batch.keys)
            self._settled(batch)

    def _settle(self, batch: Batch, error: NotReplicated | None = None) -> None:
        """``error``: of what the server has taken."""
        values = [] if batch.reply is None else batch.reply.values
        if values or error is not None:  # not as predicted: one of them at least was refused
            for key, value in zip(batch.keys, values or repeat(b"OK"), strict=False):
                if isinstance(value, ServerError):
                    batch.failures.append((key, value.about("SET", key)))
                elif error is not None:
                    batch.failures.append((key, error))
        self._settled(batch)
