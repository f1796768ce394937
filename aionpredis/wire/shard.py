"""One server: the connection to it that all tasks share, and those that one task has for itself."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import anyio

from aionpredis.errors import ConnectError, ConnectionLost, UsageError
from aionpredis.stats import Counters
from aionpredis.wire.connection import Connection
from aionpredis.wire.dial import Dialer

__all__ = ["Shard"]

REPLACED = "another server has taken its place"

PATIENCE = 1.0
"""Seconds of silence after which others are asked about a server. A cluster takes longer to replace one."""


class Shard:
    """All data over one connection (two or three brought nothing: the server is the limit).

    ``readonly``: the server is a cluster's replica, and shall answer nevertheless. ``on_silence(shard)``: whether a server
    from which nothing comes has been replaced; its connections are given up then.
    """

    def __init__(
        self,
        dialer: Dialer,
        counters: Counters,
        *,
        readonly: bool = False,
        on_silence: Callable[[Shard], Awaitable[bool]] | None = None,
    ) -> None:
        self.dialer = dialer
        self._readonly = readonly
        self._on_silence = on_silence
        self._counters = counters
        self._connection: Connection | None = None
        self._spare: list[Connection] = []
        self._lent: set[Connection] = set()
        self._dialing = anyio.Lock()
        self._dialed = 0
        self._failure: ConnectError | None = None  # of the last attempt
        self._closed = False

    @property
    def live_connection(self) -> Connection | None:
        """The shared data connection, if there is one that works."""
        connection = self._connection
        return connection if connection is not None and connection.lost is None else None

    @property
    def lost(self) -> Exception | None:
        """Why the last shared connection does not work, or could not be made."""
        if self._connection is not None and self._connection.lost is not None:
            return self._connection.lost
        return self._failure

    async def connection(self) -> Connection:
        """The shared data connection; made anew if the last one broke.

        Raises:
            ConnectError: the server cannot be reached. Tasks that waited for one attempt share its outcome.
            UsageError: the client was closed meanwhile.
        """
        connection = self.live_connection
        if connection is not None:
            return connection
        dialed = self._dialed
        async with self._dialing:
            if self._connection is None or self._connection.lost is not None:
                if self._failure is not None and self._dialed != dialed:
                    raise type(self._failure)(*self._failure.args)
                self._failure = None
                try:
                    connection = await self._dial(PATIENCE)
                except ConnectError as error:
                    self._failure = type(error)(*error.args)
                    raise
                finally:
                    self._dialed += 1
                self._counters.reconnects += self._connection is not None
                self._connection = connection
                if self._closed:
                    self._connection.close()
                    raise UsageError("the client was closed")
            return self._connection

    @asynccontextmanager
    async def own(self, block_seconds: float) -> AsyncIterator[Connection]:
        """A connection of one's own, for a command that blocks (so long at most) or spans several requests; kept for the next
        if still good.
        """
        if self._spare:
            connection = self._spare.pop()
        else:
            try:
                connection = await self._dial(PATIENCE + block_seconds)
            except ConnectError as error:
                self._failure = type(error)(*error.args)
                raise
        good = False
        self._lent.add(connection)
        try:
            yield connection
            good = True
        finally:
            self._lent.discard(connection)
            if good and not self._closed and connection.lost is None:
                self._spare.append(connection)
            else:
                connection.close()

    def leave(self) -> None:
        """Another server has taken its place: nobody waits there any longer for what comes some time, or never."""
        for connection in self._lent:
            connection.abort(ConnectionLost(REPLACED))

    async def _dial(self, patience: float) -> Connection:
        ask = self._on_silence
        if ask is None:
            return await self.dialer.dial(readonly=self._readonly)
        connection: Connection | None = None
        failure: Exception = ConnectError(f"{self.dialer.url} says nothing, and {REPLACED}")

        async def give_up(scope: anyio.CancelScope) -> None:
            while True:
                await anyio.sleep(PATIENCE)
                if await ask(self):
                    scope.cancel()

        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(give_up, tasks.cancel_scope)
                try:
                    connection = await self.dialer.dial(readonly=self._readonly)
                except Exception as error:
                    failure = error
                tasks.cancel_scope.cancel()
        except BaseException:  # cancelled when it had just been made
            if connection is not None:
                connection.close()
            raise
        if connection is None:
            try:
                raise failure
            finally:
                del failure  # it refers to this frame

        async def asked() -> None:
            if await ask(self):
                connection.abort(ConnectionLost(f"it says nothing, and {REPLACED}"))

        connection.patience, connection.on_silence = patience, asked
        return connection

    def twin(self) -> Shard:
        """The same server, over connections of its own."""
        return Shard(self.dialer, self._counters)

    def close(self) -> None:
        self._closed = True
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        while self._spare:
            self._spare.pop().close()
