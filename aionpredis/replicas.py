"""Not only the primary server: an item is stored when so many of its replicas have it, too (command ``WAIT``)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aionpredis.errors import NotReplicated, UsageError
from aionpredis.wire import resp
from aionpredis.wire.resp import Reply

if TYPE_CHECKING:
    from aionpredis.client import Client
    from aionpredis.wire.connection import Connection

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

    async def check(self, connection: Connection) -> None:
        """See that there are so many: at once, or ``GRACE_SECONDS`` later. The connection is a new one.

        Raises:
            NotReplicated: there are fewer.
            ServerError: the user may not ask.
        """
        await self._wait(connection, GRACE_SECONDS)  # nothing was written over it, so each replica that follows counts

    async def acknowledge(self, connection: Connection) -> None:
        """Return when they have what was stored over this connection before.

        Raises:
            NotReplicated: they do not, yet.
            ServerError: it is no primary any more.
            ConnectionLost: what they have is not known.
        """
        await self._wait(connection, WAIT_SECONDS)

    async def _wait(self, connection: Connection, seconds: float) -> None:
        milliseconds = max(1, int(1000 * min(seconds, self._most_seconds)))
        reply = connection.submit(resp.encode("WAIT", self._count, milliseconds), Reply())
        await connection.wait(reply)
        acknowledged = reply.result()
        if acknowledged < self._count:
            raise NotReplicated(self._count, acknowledged)
