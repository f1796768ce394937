"""Repeatable requests in flight together, answered in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Generic, TypeVar

import anyio

from aionpredis.errors import ConnectError, ConnectionLost, ServerUnavailable
from aionpredis.requests import SLICE
from aionpredis.retry import Retry
from aionpredis.wire.resp import Buffer, Reply

if TYPE_CHECKING:
    from aionpredis.client import Client
    from aionpredis.wire.connection import Connection
    from aionpredis.wire.topology import Topology

__all__ = ["Pipeline", "slices"]

T = TypeVar("T")

MAX_REQUESTS = 64
"""Requests in flight of one caller, however short their replies. More brought nothing, and each is looked at for each."""


def slices(
    topology: Topology, items: Iterable[T], key: Callable[[T], bytes], size: Callable[[T], int], most: int
) -> Iterator[list[T]]:
    """What goes into one request together: items of one shard, ``SLICE`` bytes and ``most`` items at most, on average."""
    shards = len(topology.shards)
    window: list[T] = []
    room = SLICE * shards
    for item in items:
        window.append(item)
        room -= size(item)
        if room < size(item) or len(window) == most * shards:  # most likely the next one is as long
            yield from topology.groups(window, key)
            window, room = [], SLICE * shards
    if window:
        yield from topology.groups(window, key)


class _Entry(Generic[T]):
    __slots__ = ("buffers", "connection", "key", "make", "reply", "size", "tag")

    def __init__(self, make: Callable[[], tuple[Sequence[Buffer], Reply]], key: bytes, size: int, tag: T) -> None:
        self.make = make
        self.key = key
        self.size = size
        self.tag = tag
        self.buffers: Sequence[Buffer] = ()
        self.reply: Reply | None = None
        self.connection: Connection | None = None

    @property
    def travels(self) -> bool:
        return self.reply is not None and self.reply.error is None

    def submit(self, connection: Connection) -> None:
        self.buffers, reply = self.make()
        self.reply = connection.submit(self.buffers, reply)
        self.connection = connection


class Pipeline(Generic[T]):
    """Keeps requests in flight, up to the ``reply_window`` of a connection for each shard there is.

    The requests must be repeatable: they are made and sent again when the connection broke, when the server refused them for
    a reason that may pass, and when a cancelled :meth:`next` is called again. No task and nothing to close belongs to it.
    ``immutable``: what is asked for never changes, so a replica may answer; what is missing there, the primary may have.
    """

    def __init__(self, client: Client, *, immutable: bool = False) -> None:
        self._client = client
        self._immutable = immutable
        self._entries: deque[_Entry[T]] = deque()
        self._window = 0

    def __del__(self) -> None:
        # A reader that is left in the middle has nothing to close.
        self._client.counters.inflight_bytes -= self._window

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def full(self) -> bool:
        """Whether enough is in flight. One request may always be, whatever its size."""
        if not self._entries:
            return False
        shards = len(self._client.topology.shards)
        if len(self._entries) >= MAX_REQUESTS * shards:
            return True
        connection = self._entries[-1].connection
        return connection is None or self._window >= connection.reply_window * shards

    def put(self, make: Callable[[], tuple[Sequence[Buffer], Reply]], key: bytes, size: int, tag: T) -> None:
        """Send the request that ``make`` makes to who has the key; ``size``: bytes of its reply, as far as known."""
        entry = _Entry(make, key, size, tag)
        self._entries.append(entry)
        self._window += size
        self._client.counters.inflight_bytes += size
        connection = self._client.live_connection(key, immutable=self._immutable)
        if connection is not None:  # else next() submits it
            entry.submit(connection)

    async def next(self) -> tuple[Reply, T]:
        """The oldest request's reply and tag.

        Raises:
            ConnectionLost, ConnectError: the server could not be reached again.
        """
        retry: Retry | None = None
        oldest = self._entries[0]
        try:
            while True:
                try:
                    for entry in self._entries:
                        if not entry.travels:
                            entry.submit(await self._client.connection(entry.key, immutable=self._immutable))
                    assert oldest.reply is not None
                    assert oldest.connection is not None
                    if not oldest.reply.done:
                        self._attend_others(oldest.connection)
                    await oldest.connection.wait(oldest.reply)
                    if oldest.reply.redirected:
                        reply, oldest.reply = oldest.reply, None  # asked for again if this fails
                        await self._client.topology.follow(oldest.buffers, reply)
                        oldest.reply = reply
                    refusal = oldest.reply.refusal
                    if refusal is None:
                        if retry is not None:
                            retry.succeeded()
                        return self._pop(oldest, oldest.reply)
                    retry = retry or Retry(self._client.faults)
                    try:
                        pause = retry.after(refusal, oldest.connection)
                    except ServerUnavailable:
                        return self._pop(oldest, oldest.reply)  # who looks at its values raises it
                    oldest.reply = None
                except (ConnectionLost, ConnectError) as error:
                    retry = retry or Retry(self._client.faults)
                    pause = retry.after(error)
                except BaseException:
                    if oldest.reply is not None and oldest.connection is not None:
                        oldest.connection.abandon(oldest.reply)  # another one's server may be what was waited for
                    oldest.reply = None  # asked for again if somebody calls again
                    raise
                await anyio.sleep(pause)
        finally:
            if retry is not None:
                retry.reset()

    def _attend_others(self, connection: Connection) -> None:
        if len(self._client.topology.shards) > 1:
            for other in {entry.connection for entry in self._entries}:
                if other is not None and other is not connection:
                    other.attend()

    def _pop(self, oldest: _Entry[T], reply: Reply) -> tuple[Reply, T]:
        self._entries.popleft()
        self._window -= oldest.size
        self._client.counters.inflight_bytes -= oldest.size
        return reply, oldest.tag

    def abandon(self) -> None:
        """Forget all requests; nothing is written into their memory any more."""
        for entry in self._entries:
            if entry.reply is not None and entry.connection is not None:
                entry.connection.abandon(entry.reply)
        self._entries.clear()
        self._client.counters.inflight_bytes -= self._window
        self._window = 0
