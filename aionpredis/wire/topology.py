"""Which connection serves which key. One server so far; the interface asks for keys so that a cluster can answer it."""

from __future__ import annotations

import anyio

from aionpredis.wire.connection import Connection
from aionpredis.wire.dial import Dialer

__all__ = ["OneServer"]


class OneServer:
    """All keys on one server, all data over one connection (two or three brought nothing: the server is the limit)."""

    def __init__(self, dialer: Dialer) -> None:
        self.dialer = dialer
        self._connection: Connection | None = None
        self._dialing = anyio.Lock()

    async def connection(self) -> Connection:
        """The shared data connection; made anew if the last one broke.

        Raises:
            ConnectError: the server cannot be reached.
        """
        connection = self._connection
        if connection is not None and connection.lost is None:
            return connection
        async with self._dialing:
            if self._connection is None or self._connection.lost is not None:
                self._connection = await self.dialer.dial()
            return self._connection

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None
