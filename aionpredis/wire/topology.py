"""Which server has which key: one server, or a cluster's (:mod:`aionpredis.wire.cluster`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

from aionpredis.errors import Redirected
from aionpredis.wire.connection import Connection
from aionpredis.wire.resp import Buffer, Reply
from aionpredis.wire.shard import Shard

__all__ = ["OneServer", "Topology"]

T = TypeVar("T")


class Topology(Protocol):
    """Keys to shards. The empty key stands for any of them."""

    joins_keys: bool
    """Whether one command may name any keys of a shard; else only keys of the same slot."""

    shards: Sequence[Shard]
    """All of them."""

    async def open(self) -> None:
        """Reach it for the first time."""

    def shard(self, key: bytes, *, immutable: bool = False) -> Shard:
        """Which has the key, as far as known. ``immutable``: what is read there never changes, so that a replica may answer,
        which has it or not yet.
        """

    def locate(self, key: bytes) -> tuple[int, Shard]:
        """The key's slot, and which has it, as far as known. A slot's keys move together."""

    def groups(self, items: list[T], key: Callable[[T], bytes]) -> list[list[T]]:
        """The items by the shards of their keys, each group in order."""

    def each(self) -> list[bytes]:
        """A key of each shard, for commands that have none."""

    async def reach(self, key: bytes, *, immutable: bool = False) -> Shard:
        """Which has the key, after looking again if there is a reason to."""

    async def learn(self, error: Redirected) -> Shard:
        """A server says that another one has the key: this one."""

    async def follow(self, request: Sequence[Buffer], reply: Reply) -> set[Connection]:
        """Send those of a request's commands that were redirected to where they belong; their answers take their places.
        Returns the connections over which they came.
        """

    def twin(self) -> Topology:
        """The same, as far as known, with connections of its own."""

    def close(self) -> None:
        """Close all connections."""


class OneServer:
    """All keys on one server."""

    joins_keys = True

    def __init__(self, shard: Shard) -> None:
        self.shards: Sequence[Shard] = (shard,)
        self._shard = shard

    async def open(self) -> None:
        await self._shard.connection()

    def shard(self, key: bytes, *, immutable: bool = False) -> Shard:
        return self._shard

    def locate(self, key: bytes) -> tuple[int, Shard]:
        return 0, self._shard

    def groups(self, items: list[T], key: Callable[[T], bytes]) -> list[list[T]]:
        return [items]

    def each(self) -> list[bytes]:
        return [b""]

    async def reach(self, key: bytes, *, immutable: bool = False) -> Shard:
        return self._shard

    async def learn(self, error: Redirected) -> Shard:
        raise error

    async def follow(self, request: Sequence[Buffer], reply: Reply) -> set[Connection]:
        """Nobody is asked elsewhere: the errors say which URL would do it."""
        return set()

    def twin(self) -> OneServer:
        return OneServer(self._shard.twin())

    def close(self) -> None:
        self._shard.close()
