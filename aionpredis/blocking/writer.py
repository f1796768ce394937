"""Batching writes with backpressure, without async.

An array is encoded and copied in the caller's thread, which then goes on; the loop takes what has come together meanwhile.
Waiting for the loop with each array would take 30 µs, of 10 that an array takes altogether.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

import anyio
import anyio.lowlevel

import aionpredis
from aionpredis.blocking.facade import Entered, like
from aionpredis.blocking.loop import Loop, without_async
from aionpredis.codecs import Codec
from aionpredis.errors import UsageError
from aionpredis.requests import Key, encode_array, encode_record
from aionpredis.wire.resp import Buffer

__all__ = ["Writer"]

OUTBOX_BYTES = 1 << 20
"""Two batches. A thread that does nothing but put holds the interpreter, so that the loop gets it every 5 ms; it is better to
wait for the loop, then. Of 12.8 kB, CPU and wall clock: 12 and 36 µs, with 256 KiB 17 and 60, without this 13 and 60."""


class Writer(Entered[aionpredis.Writer]):
    """:class:`aionpredis.Writer` without async. Made by :meth:`Client.writer`; use it with ``with``."""

    def __init__(self, loop: Loop, target: aionpredis.Writer, owner: object) -> None:
        super().__init__(loop, target, owner)
        self._lock = threading.Lock()  # of the next three
        self._outbox: deque[tuple[Key, list[Buffer], int]] = deque()
        self._waiting = 0  # bytes in there
        self._posted = False  # somebody will look into it
        self._taking: anyio.Lock | None = None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        if self._loop.forked:  # where another thread may have held the lock
            return super().__exit__(kind, error, trace)
        try:
            if kind is None or issubclass(kind, Exception):
                try:
                    self._loop.call(self._take)
                except BaseException as caught:
                    super().__exit__(type(caught), caught, caught.__traceback__)
                    raise
            return super().__exit__(kind, error, trace)
        finally:
            with self._lock:
                self._outbox.clear()
                self._waiting = 0

    @property
    def inflight(self) -> int:
        """Bytes that are held at the moment: put, and neither stored nor failed."""
        return self._target.inflight + self._waiting

    @like(aionpredis.Writer.put)
    def put(self, key: Key, array: object, *, ttl: float | None = None) -> None:
        self._put(encode_array, key, array, ttl)

    @like(aionpredis.Writer.put_record)
    def put_record(self, key: Key, record: Mapping[str, object], *, ttl: float | None = None) -> None:
        self._put(encode_record, key, record, ttl)

    @like(aionpredis.Writer.flush)
    def flush(self) -> None:
        self._loop.call(self._flush)

    def _put(
        self, encoder: Callable[[Any, Codec | None, Key], list[Buffer]], key: Key, value: Any, ttl: float | None
    ) -> None:
        writer = self._target
        self._loop.check()
        if writer.failed:
            self._loop.call(self._report)
        try:
            command, size, settle = writer.encode_item(encoder, key, value, ttl)
        except UsageError as error:
            without_async(error)
            raise
        if settle:  # never in the outbox: there the caller's memory would outlast an interrupted call
            self._loop.call(self._settle, key, command, size)
            return
        with self._lock:
            waits = self._waiting > OUTBOX_BYTES or not writer.has_room(self._waiting + size)
            self._outbox.append((key, command, size))
            self._waiting += size
            posts, self._posted = not (waits or self._posted), self._posted or not waits
        if waits:
            self._loop.call(self._take)
        elif posts:
            self._loop.spawn(self._take)  # what it raises, the next one to take raises again

    async def _take(self) -> None:
        """Have the writer accept what has come: in order, each once it was accepted out of the outbox."""
        if self._taking is None:
            self._taking = anyio.Lock()
        async with self._taking:
            self._posted = False  # from here on, somebody else has to look
            while self._outbox:
                key, command, size = self._outbox[0]
                others_run = await self._target.accept_item(key, command, size)
                with self._lock:
                    self._outbox.popleft()
                    self._waiting -= size
                if others_run:  # a cancellation finds the item gone: it is not sent again
                    await anyio.lowlevel.checkpoint()

    async def _settle(self, key: Key, command: list[Buffer], size: int) -> None:
        await self._take()
        await self._target.settle_item(key, command, size)

    async def _flush(self) -> None:
        await self._take()
        await self._target.flush()

    async def _report(self) -> None:
        self._target.report()
