"""Batching writes with backpressure."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING

import anyio
import anyio.lowlevel
from anyio.abc import TaskGroup

from aionpredis import codecs
from aionpredis.codecs import Codec
from aionpredis.errors import ConnectError, ConnectionLost, ServerError, UsageError, WriteFailed
from aionpredis.pipeline import ATTEMPTS, BACKOFF
from aionpredis.requests import (
    Key,
    encode_array,
    encode_record,
    key_bytes,
    ok_reply,
    set_command,
    ttl_options,
)
from aionpredis.wire.connection import Connection
from aionpredis.wire.resp import Buffer, Reply

if TYPE_CHECKING:
    from aionpredis.client import Client

__all__ = ["Writer"]

BATCH_BYTES = 256 * 1024
"""Bytes of commands sent together: about 20 arrays of 80x80 uint16. From ~200 kB on more brings nothing."""

BATCH_ITEMS = 256
"""Commands sent together, however small."""


class _Batch:
    """Commands that travel together. ``size`` is what it counts for the bound."""

    __slots__ = ("arena", "buffers", "keys", "reply", "size", "used")

    def __init__(self, arena: bytearray | None) -> None:
        self.arena = arena  # snapshots lie here, one behind the other; None: memory is borrowed
        self.used = 0
        self.size = 0 if arena is None else len(arena)
        self.keys: list[Key] = []
        self.buffers: list[Buffer] = []
        self.reply: Reply | None = None

    def fits(self, size: int) -> bool:
        """Whether a snapshot of another command has room."""
        return self.arena is not None and self.used + size <= len(self.arena) and len(self.keys) < BATCH_ITEMS

    def commands(self) -> list[Buffer]:
        return self.buffers if self.arena is None else [memoryview(self.arena)[: self.used]]


class Writer:
    """Stores arrays in batches, while at most ``max_inflight`` bytes are neither stored nor failed::

        async with client.writer(max_inflight=64 << 20) as writer:
            await writer.put(key, array)

    Made by :meth:`aionpredis.Client.writer`. A batch leaves when it is full, or at once when nothing else is travelling:
    under load batches fill up, and a lone item waits for nobody. Items of one key are stored in the order of their puts.

    ``max_inflight``: bytes. When they are reached, :meth:`put` waits: the producer is slowed down to what the server takes.
    ``copy``: ``True`` takes a snapshot, so the array may be changed as soon as :meth:`put` returns (simulators reuse
    their observation buffers). ``False`` sends the caller's own memory: do not touch it before :meth:`flush`.
    ``ttl``, ``codec``: defaults for :meth:`put`.

    Leaving the block stores what was put, and raises :class:`WriteFailed` with the keys that were not stored. A
    cancelled block drops what was not sent.
    """

    def __init__(
        self, client: Client, *, max_inflight: int, copy: bool, ttl: float | None, codec: str | Codec | None
    ) -> None:
        if isinstance(max_inflight, bool) or not isinstance(max_inflight, int) or max_inflight < 1:
            raise UsageError(f"max_inflight is a positive number of bytes, not {max_inflight!r}")
        self._client = client
        self._bound = max_inflight
        self._copy = copy
        self._options = ttl_options(ttl)
        self._codec = client.codec if codec is None else codecs.resolve(codec)
        # At least two batches fit the bound, so that one travels while the next is filled.
        self._arena_size = min(BATCH_BYTES, max(1, max_inflight // 2))
        self._arenas: list[bytearray] = []
        self._current: _Batch | None = None
        self._queued: deque[_Batch] = deque()
        self._inflight: deque[_Batch] = deque()
        self._held = 0
        self._failures: list[tuple[Key, Exception]] = []
        self._connection: Connection | None = None
        self._tasks: TaskGroup | None = None
        self._work = anyio.Event()
        self._room = anyio.Event()

    async def __aenter__(self) -> Writer:
        if self._tasks is not None:
            raise UsageError("a writer is for one `async with` block")
        self._connection = await self._client.connection()
        self._tasks = anyio.create_task_group()
        await self._tasks.__aenter__()
        self._tasks.start_soon(self._pump)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        assert self._tasks is not None
        cancelled = error is not None and not isinstance(error, Exception)
        failed: WriteFailed | None = None
        try:
            if not cancelled:
                try:
                    await self.flush()
                except WriteFailed as failure:
                    failed = failure
        finally:
            self._tasks.cancel_scope.cancel()
            self._abandon()
            await self._tasks.__aexit__(*((kind, error, trace) if cancelled else (None, None, None)))
        if failed is not None:
            if error is None:
                raise failed
            error.add_note(f"Besides, {failed}")
        return None

    @property
    def inflight(self) -> int:
        """Bytes that are held at the moment: put, and neither stored nor failed."""
        return self._held

    async def put(self, key: Key, array: object, *, ttl: float | None = None) -> None:
        """Accept an array for storing under ``key``; waits while ``max_inflight`` bytes are held.

        An array longer than half of the bound is not copied: its call returns when it is stored.

        Raises:
            EncodeError: it cannot be stored; nothing was accepted.
            WriteFailed: items put before could not be stored. Each is reported once. This one was **not** accepted.
        """
        if self._codec is None:
            await self._put(key, encode_array(array, None, key), ttl)
        else:
            await self._put(key, await self._client.encode_value(encode_array, array, self._codec, key), ttl)

    async def put_record(self, key: Key, record: Mapping[str, object], *, ttl: float | None = None) -> None:
        """Accept a record; otherwise like :meth:`put`."""
        await self._put(key, await self._client.encode_value(encode_record, record, self._codec, key), ttl)

    async def flush(self) -> None:
        """Return when everything that was put is stored.

        Raises:
            WriteFailed: what could not be stored, unless it was reported before.
        """
        self._close_batch()
        while self._held or self._queued or self._inflight:
            await self._wait_for_room()
        self._report()

    async def _put(self, key: Key, value: list[Buffer], ttl: float | None) -> None:
        if self._tasks is None:
            raise UsageError("use the writer inside of its `async with` block")
        options = self._options if ttl is None else ttl_options(ttl)
        commands = set_command(key_bytes(key), value, options)
        size = sum(map(len, commands))
        if self._failures:
            self._report()
        if not self._copy or size > self._bound // 2:
            await self._borrow(key, commands, size)
            return
        batch = self._current
        if batch is None or not batch.fits(size):
            batch = await self._next_batch(size)
        assert batch.arena is not None
        at = batch.used
        for buffer in commands:
            end = at + len(buffer)
            batch.arena[at:end] = buffer
            at = end
        batch.used = at
        batch.keys.append(key)
        if len(batch.keys) == 1 and not self._inflight:
            self._work.set()

    async def _next_batch(self, size: int) -> _Batch:
        """Send the current batch; one with room for ``size`` bytes."""
        self._close_batch()
        await anyio.lowlevel.checkpoint()
        size = max(size, self._arena_size)
        while self._current is None and self._held and self._held + size > self._bound:
            await self._wait_for_room()
        if self._current is not None:  # another task has begun one meanwhile
            return self._current if self._current.fits(size) else await self._next_batch(size)
        pooled = size == self._arena_size and self._arenas
        self._current = batch = _Batch(self._arenas.pop() if pooled else bytearray(size))
        self._held += batch.size
        return batch

    async def _borrow(self, key: Key, commands: list[Buffer], size: int) -> None:
        """Accept without a copy. If a copy was promised, the call lasts until the bytes are stored."""
        self._close_batch()
        while self._held and self._held + size > self._bound:
            await self._wait_for_room()
        batch = self._current
        if batch is None:
            self._current = batch = _Batch(None)
        batch.buffers += commands
        batch.keys.append(key)
        batch.size += size
        self._held += size
        if self._copy:
            self._close_batch()
            while batch in self._queued or batch in self._inflight:
                await self._wait_for_room()
        elif batch.size >= BATCH_BYTES or len(batch.keys) >= BATCH_ITEMS:
            self._close_batch()
            await anyio.lowlevel.checkpoint()
        elif not self._inflight:
            self._work.set()

    def _close_batch(self) -> None:
        batch, self._current = self._current, None
        if batch is not None:
            self._queued.append(batch)
            self._submit()
            self._work.set()

    def _submit(self) -> None:
        """Hand queued batches to the connection, in order. A broken one is the pump's business."""
        connection = self._connection
        while self._queued and connection is not None and connection.lost is None:
            batch = self._queued[0]
            batch.reply = connection.submit(batch.commands(), ok_reply(len(batch.keys)))
            self._inflight.append(self._queued.popleft())

    async def _wait_for_room(self) -> None:
        if self._room.is_set():
            self._room = anyio.Event()
        await self._room.wait()

    async def _pump(self) -> None:
        """Settle the batches in flight, in order, and send the current one when nothing else travels."""
        attempt = 0
        while True:
            if not (self._inflight or self._queued):
                if self._current is not None and self._current.keys:
                    self._close_batch()
                else:
                    self._work = anyio.Event()
                    await self._work.wait()
                continue
            try:
                self._connection = await self._client.connection()
                self._submit()
                batch = self._inflight[0]
                assert batch.reply is not None
                await self._connection.wait(batch.reply)
            except (ConnectionLost, ConnectError) as error:
                attempt += 1
                # Storing the same values again is harmless; in order, so that the last put of a key wins.
                self._connection = None
                self._queued.extendleft(reversed(self._inflight))
                self._inflight.clear()
                if attempt < ATTEMPTS:
                    await anyio.sleep(BACKOFF.compute(attempt))
                else:
                    attempt = 0
                    self._give_up(error)
            else:
                attempt = 0
                self._inflight.popleft()
                self._settle(batch, batch.reply)

    def _give_up(self, error: Exception) -> None:
        for batch in self._queued:
            self._failures += ((key, error) for key in batch.keys)
            self._free(batch)
        self._queued.clear()

    def _settle(self, batch: _Batch, reply: Reply) -> None:
        for key, value in zip(batch.keys, reply.values, strict=False):
            if isinstance(value, ServerError):
                self._failures.append((key, value))
        self._free(batch)

    def _free(self, batch: _Batch) -> None:
        self._held -= batch.size
        if batch.arena is not None and len(batch.arena) == self._arena_size:
            self._arenas.append(batch.arena)
        self._room.set()

    def _report(self) -> None:
        failures, self._failures = self._failures, []
        if failures:
            raise WriteFailed(failures)

    def _abandon(self) -> None:
        """Let go of all borrowed memory; only after a cancellation is there any left."""
        if self._connection is not None:
            for batch in self._inflight:
                if batch.reply is not None:
                    self._connection.abandon(batch.reply)
