"""Not only the primary server: an item is stored when so many of its replicas have it, too (command ``WAIT``)."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from contextlib import suppress
from typing import TYPE_CHECKING, Protocol

import anyio

from aionpredis.errors import (
    ConnectError,
    ConnectionLost,
    NotReplicated,
    ServerError,
    ServerUnavailable,
    UsageError,
)
from aionpredis.names import is_count
from aionpredis.wire import resp
from aionpredis.wire.resp import Reply

if TYPE_CHECKING:
    from aionpredis.client import Client
    from aionpredis.retry import Retry
    from aionpredis.wire.connection import Connection
    from aionpredis.wire.shard import Shard

__all__ = ["Replicas"]

WAIT_SECONDS = 1.0
"""That one WAIT may last: it ends as soon as enough replicas have answered, and nothing else is sent meanwhile."""

GRACE_SECONDS = 2.0
"""For those that were not there when they were first asked for: a replica counts from its first answer on, which it gives
once a second."""


class Sent(Protocol):
    """What travelled together."""

    @property
    def over(self) -> set[Connection]:
        """It was sent over these, as far as replicas are not known to have it."""


class Replicas:
    """``count``: how many of each primary's. WAIT blocks its connection and counts the writes that came over it, so nobody
    else may use that: see :meth:`Client.twin`.

    Raises:
        UsageError: ``count`` is no positive number.
    """

    def __init__(self, client: Client, count: int) -> None:
        if not is_count(count):
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

    async def acknowledge(self, sent: Sent, inflight: Collection[Sent], retry: Retry) -> None:
        """Return when they have it. One WAIT is for all that was sent before it, so it is asked for again only when more has
        been sent meanwhile: ``inflight``, as it is at each time.

        Raises:
            NotReplicated: they do not, and ``retry`` says that it has been tried for long enough.
            ServerUnavailable: it is no primary any more.
            ConnectionLost: what they have is not known.
        """
        for connection in tuple(sent.over):
            while connection in sent.over:
                covered = [sent, *(other for other in inflight if connection in other.over)]
                try:
                    await self._wait(connection, WAIT_SECONDS)
                except NotReplicated as error:
                    await anyio.sleep(retry.after(error))
                else:
                    for each in covered:
                        each.over.discard(connection)

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
