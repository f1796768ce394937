"""Not only the primary server: an item is stored when so many of its replicas have it, too (command ``WAIT``)."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from typing import TYPE_CHECKING

from aionpredis.errors import (
    ConnectError,
    ConnectionLost,
    NotReplicated,
    ServerError,
    ServerUnavailable,
    UsageError,
)
from aionpredis.wire import resp
from aionpredis.wire.resp import Reply

if TYPE_CHECKING:
    from aionpredis.client import Client
    from aionpredis.wire.connection import Connection
    from aionpredis.wire.shard import Shard

__all__ = ["Replicas"]

WAIT_SECONDS = 1.0
"""That one WAIT may last: it ends as soon as enough replicas have answered, and nothing else is sent meanwhile."""

GRACE_SECONDS = 2.0
"""For those that were not there when they were first asked for: a replica counts from its first answer on, which it gives
once a second."""


class Replicas:
    """``count``: how many of each primary's. WAIT blocks its connection and counts the writes that came over it, so nobody
    else may use that: see :meth:`Client.twin`.

    Raises:
        UsageError: ``count`` is no positive number.
    """

    def __init__(self, client: Client, count: int) -> None:
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise UsageError(f"replicas is a number, 0 for the primary alone; not {count!r}")
        self._count = count
        self._most_seconds = client.block_seconds

    async def check(self, shards: Iterable[Shard]) -> None:
        """See that there are so many: at once, or ``GRACE_SECONDS`` later. Nothing was written over their connections.

        A server that cannot be asked, or has been replaced, is none that has too few: who writes there tries again.

        Raises:
            NotReplicated: there are fewer.
            ServerError: the user may not ask.
        """
        for shard in shards:
            with suppress(ConnectError, ConnectionLost, ServerUnavailable):
                # Of nothing each replica that follows has all.
                await self._wait(await shard.connection(), GRACE_SECONDS)

    async def acknowledge(self, connection: Connection) -> None:
        """Return when they have what was stored over this connection before.

        Raises:
            NotReplicated: they do not, yet.
            ServerUnavailable: it is no primary any more.
            ConnectionLost: what they have is not known.
        """
        await self._wait(connection, WAIT_SECONDS)

    async def _wait(self, connection: Connection, seconds: float) -> None:
        milliseconds = max(1, int(1000 * min(seconds, self._most_seconds)))
        reply = connection.submit(resp.encode("WAIT", self._count, milliseconds), Reply())
        await connection.wait(reply)
        (acknowledged,) = reply.values
        if isinstance(acknowledged, ServerError):
            if "replica instances" in str(acknowledged):  # it was one until now
                raise ServerUnavailable(f"READONLY {acknowledged}")
            raise acknowledged.about("WAIT")
        if acknowledged < self._count:
            raise NotReplicated(self._count, acknowledged)
