"""The servers of a cluster: which has which of the 16,384 slots, and what to do when one says that it is another's now.

redis-py learns the map (:mod:`aionpredis.wire.discovery`). It is learned again when a server cannot be reached, and when one
says that a slot has moved.
"""

from __future__ import annotations

import itertools
import random
import time
from binascii import crc_hqx
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from typing import TypeVar

import anyio
from redis.crc import key_slot

from aionpredis.errors import ConnectError, Redirected, ServerUnavailable
from aionpredis.stats import Counters
from aionpredis.wire import resp
from aionpredis.wire.connection import Connection
from aionpredis.wire.discovery import Address, ClusterDialer, Slots
from aionpredis.wire.resp import SLOTS, Buffer, Reply
from aionpredis.wire.shard import Shard

__all__ = ["Cluster"]

T = TypeVar("T")

MAX_REDIRECTIONS = 16
"""Of one command in a row. More are a map that the servers do not agree on (yet)."""

REFRESH_SECONDS = 0.1
"""The map is not asked for more often on account of slots that have moved: each of them was learned anyway."""

_ASKING = resp.encode("ASKING")

_BRACE = ord("{")


def _slot(key: bytes) -> int:
    """redis-py's ``key_slot()``; without braces in half of its time: 0.11 µs instead of 0.20."""
    return key_slot(key) if _BRACE in key else crc_hqx(key, 0) % SLOTS


class Cluster:
    """Keys by their slots: CRC16 of the key, or of its part in braces, modulo 16,384 (Redis cluster specification).

    ``read_replicas``: replicas are asked for what never changes, in turn; a primary without one is asked itself.
    """

    joins_keys = False

    def __init__(self, dialer: ClusterDialer, counters: Counters, *, read_replicas: bool) -> None:
        self._dialer = dialer
        self._counters = counters
        self._read_replicas = read_replicas
        self._servers: dict[Address, Shard] = {}  # all that were ever talked to as a primary
        self._replicas: dict[Address, Shard] = {}  # as a replica
        self._readers: dict[Shard, Iterator[Shard]] = {}  # by primary
        self._reading: set[Shard] = set()  # replicas that the servers say are there
        self._primaries: dict[Address, Shard] = {}
        self.shards: Sequence[Shard] = ()
        self._found: Sequence[Slots] = ()
        self._slots: list[Shard | None] = [None] * SLOTS
        self._refreshing = anyio.Lock()
        self._refreshed = 0  # how often
        self._refreshed_at = -float("inf")
        self._closed = False

    async def open(self) -> None:
        await self._refresh()
        await self.shards[0].connection()

    def shard(self, key: bytes, *, immutable: bool = False) -> Shard:
        _, shard = self.locate(key)
        return next(self._readers[shard]) if immutable and shard in self._readers else shard

    def locate(self, key: bytes) -> tuple[int, Shard]:
        slot = _slot(key)
        # Of a slot that nobody serves any server says so, or who does by now.
        return slot, self._slots[slot] or self.shards[0]

    def groups(self, items: list[T], key: Callable[[T], bytes]) -> list[list[T]]:
        groups: dict[Shard, list[T]] = {}
        slots, first = self._slots, self.shards[0]
        for item in items:
            groups.setdefault(slots[_slot(key(item))] or first, []).append(item)
        return list(groups.values())

    def each(self) -> list[bytes]:
        keys: dict[Shard | None, bytes] = {}
        candidates = (b"%d" % number for number in itertools.count())
        owners = {self.shard(b""), *self._slots} - {None}
        while owners - keys.keys():
            key = next(candidates)
            keys.setdefault(self.shard(key), key)
        return list(keys.values())

    async def reach(self, key: bytes, *, immutable: bool = False) -> Shard:
        """
        Raises:
            ConnectError: no server of the cluster can be asked for the map.
        """
        shard = self.shard(key, immutable=immutable)
        if shard.lost is not None:
            await self._refresh()
            shard = self.shard(key, immutable=immutable)
        return shard

    async def learn(self, error: Redirected) -> Shard:
        """
        Raises:
            ConnectError: no server of the cluster can be asked for the map.
        """
        address = self._address(error)
        shard = self._server(address)
        if not error.asks:
            self._slots[error.slot] = shard
            # One that was no primary has taken the place of another: that must be known at once, see ``changes``.
            if shard not in self.shards or time.monotonic() - self._refreshed_at > REFRESH_SECONDS:
                await self._refresh(address)  # who has it now knows it first
        return shard

    async def follow(self, request: Sequence[Buffer], reply: Reply) -> set[Connection]:
        commands: list[Sequence[Buffer]] = [request]
        if reply.count > 1:
            commands = [[command] for command in resp.split(b"".join(request))]
        over: set[Connection] = set()
        reply.redirected, reply.refusal = False, None
        for index, value in enumerate(reply.values):
            if isinstance(value, Redirected):
                reply.values[index] = value = await self._follow(commands[index], value, reply, over)
            if isinstance(value, ServerUnavailable):
                reply.refusal = value
        return over

    async def _follow(
        self, command: Sequence[Buffer], error: Redirected, reply: Reply, over: set[Connection]
    ) -> object:
        reply.sent = False  # it did not run there
        for _ in range(MAX_REDIRECTIONS):
            connection = await (await self.learn(error)).connection()
            again = reply.again()
            try:
                await self._ask(connection, command, again, asks=error.asks)
            finally:
                reply.sent = again.sent or reply.count > 1  # others did
            (value,) = again.values
            if not isinstance(value, Redirected):
                over.add(connection)
                if isinstance(value, ServerUnavailable):
                    value.redirected = True
                return value
            error = value
        return ServerUnavailable(f"TRYAGAIN redirected {MAX_REDIRECTIONS} times, at last by: {error.args[0]}")

    async def _ask(self, connection: Connection, command: Sequence[Buffer], reply: Reply, *, asks: bool) -> None:
        if asks:
            connection.submit(_ASKING, Reply(), send=False)  # nobody comes between
        await connection.wait(connection.submit(command, reply))

    def _address(self, error: Redirected) -> Address:
        host, port = error.address
        if host in ("", "?"):  # the server does not know by which name it is reached, but on the same host as itself
            host = next((known for known, other in self._servers if other == port), next(iter(self._servers))[0])
        return self._dialer.reached((host, port))

    def _server(self, address: Address) -> Shard:
        shard = self._servers.get(address)
        if shard is None:
            self._servers[address] = shard = Shard(
                self._dialer.at(address), self._counters, on_silence=self._is_replaced
            )
            if self._closed:
                shard.close()
        return shard

    async def _is_replaced(self, shard: Shard) -> bool:
        with suppress(ConnectError):
            await self._refresh()
        return shard not in self.shards

    async def _is_gone(self, replica: Shard) -> bool:
        with suppress(ConnectError):
            await self._refresh()
        return replica not in self._reading

    async def _refresh(self, first: Address | None = None) -> None:
        refreshed = self._refreshed
        async with self._refreshing:
            if self._refreshed != refreshed and (first is None or first in self._primaries):
                return  # by another task, while this one waited
            found = await self._dialer.discover(first)
            self._refreshed += 1
            self._refreshed_at = time.monotonic()
            known = self._primaries
            gone = known.keys() - self._adopt(found)
            if gone:  # with a failover, what they had acknowledged last may be lost
                self._counters.changes += 1
            for address in gone:
                known[address].leave()

    def _in_turn(self, replicas: Sequence[Address]) -> Iterator[Shard]:
        for address in replicas:
            if address not in self._replicas:
                self._replicas[address] = Shard(
                    self._dialer.at(address), self._counters, readonly=True, on_silence=self._is_gone
                )
        shards = [self._replicas[address] for address in replicas]
        self._reading.update(shards)
        # Each client begins with another one.
        first = random.randrange(len(replicas))
        return itertools.cycle([*shards[first:], *shards[:first]])

    def _adopt(self, found: Sequence[Slots]) -> Collection[Address]:
        """Take this map; returns its primaries."""
        slots: list[Shard | None] = [None] * SLOTS
        primaries: dict[Address, Shard] = {}
        for part in found:
            shard = primaries[part.primary] = self._server(part.primary)
            slots[part.first : part.last + 1] = [shard] * (part.last + 1 - part.first)
        if not primaries:
            raise ConnectError(f"{self._dialer.url}: no server of the cluster has any slots")
        self._reading = set()
        if self._read_replicas:
            self._readers = {primaries[part.primary]: self._in_turn(part.replicas) for part in found if part.replicas}
        self._found, self._slots, self._primaries, self.shards = found, slots, primaries, tuple(primaries.values())
        return primaries.keys()

    def twin(self) -> Cluster:
        twin = Cluster(self._dialer, self._counters, read_replicas=self._read_replicas)
        twin._adopt(self._found)
        return twin

    def close(self) -> None:
        self._closed = True
        for shard in (*self._servers.values(), *self._replicas.values()):
            shard.close()
