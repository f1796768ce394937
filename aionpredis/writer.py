"""Batching writes with backpressure."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING

import anyio
import anyio.lowlevel
from anyio.abc import TaskGroup

from aionpredis import codecs
from aionpredis.codecs import Codec
from aionpredis.errors import (
    AionpredisError,
    ConnectError,
    ConnectionLost,
    ServerError,
    ServerFull,
    ServerUnavailable,
    UsageError,
    WriteFailed,
)
from aionpredis.requests import (
    Key,
    encode_array,
    encode_record,
    key_bytes,
    ok_reply,
    set_array,
    set_command,
    ttl_options,
)
from aionpredis.retry import Retry
from aionpredis.wire.connection import Connection
from aionpredis.wire.resp import SMALL, Buffer, Reply

if TYPE_CHECKING:
    from aionpredis.client import Client

__all__ = ["Writer"]

BATCH_BYTES = 512 * 1024
"""Bytes of commands sent together: about 40 arrays of 80x80 uint16. 8.2 µs each with 256 KiB, 7.4 with 512, 7.2 with 1024."""

BATCH_ITEMS = 256
"""Commands sent together, however small."""


class _Batch:
    """Commands that travel together. ``size`` is what it counts for the bound. Without keys: withdrawn, never sent again."""

    __slots__ = ("arena", "buffers", "keys", "reply", "settled", "size", "used")

    def __init__(self, arena: memoryview | None) -> None:
        self.arena = arena  # snapshots lie here, one behind the other; None: memory is borrowed
        self.used = 0
        self.size = 0 if arena is None else len(arena)
        self.keys: list[Key] = []
        self.buffers: list[Buffer] = []
        self.reply: Reply | None = None
        self.settled = False

    def snapshot(self, key: Key, command: Sequence[Buffer], size: int) -> bool:
        """Copy a command of ``size`` bytes behind the others; ``False`` if there is no room."""
        at = self.used
        if self.arena is None or at + size > len(self.arena) or len(self.keys) >= BATCH_ITEMS:
            return False
        arena = self.arena
        for buffer in command:
            end = at + len(buffer)
            arena[at:end] = buffer
            at = end
        self.used = at
        self.keys.append(key)
        return True

    def commands(self) -> list[Buffer]:
        return self.buffers if self.arena is None else [self.arena[: self.used]]


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

    What the server does not take, because it is gone, cannot yet or has no memory left, is sent again for the client's
    ``retry_timeout``; meanwhile :meth:`put` waits when the bound is reached.

    Leaving the block stores what was put, and raises :class:`WriteFailed` with the keys that were not stored. A
    cancelled block drops what was not sent.
    """

    def __init__(
        self,
        client: Client,
        *,
        max_inflight: int,
        copy: bool,
        ttl: float | None,
        codec: str | Codec | None,
        waits_when_full: bool = True,
    ) -> None:
        if isinstance(max_inflight, bool) or not isinstance(max_inflight, int) or max_inflight < 1:
            raise UsageError(f"max_inflight is a positive number of bytes, not {max_inflight!r}")
        self._client = client
        self._counters = client.counters
        self._bound = max_inflight
        self._copy = copy
        self._options = ttl_options(ttl)
        self._codec = client.codec if codec is None else codecs.resolve(codec)
        # At least two batches fit the bound, so that one travels while the next is filled.
        self._arena_size = min(BATCH_BYTES, max(1, max_inflight // 2))
        self._arenas: list[memoryview] = []
        self._current: _Batch | None = None
        self._queued: deque[_Batch] = deque()
        self._inflight: deque[_Batch] = deque()
        self._held = 0
        self._failures: list[tuple[Key, Exception]] = []
        self._last: _Batch | None = None  # the one that was queued last; they are settled in order
        self._closed = False
        self._connection: Connection | None = None
        self._retry = Retry(client.faults)
        self._passing = (ServerUnavailable, ServerFull) if waits_when_full else (ServerUnavailable,)
        self._tasks: TaskGroup | None = None
        self._work = anyio.Event()
        self._room = anyio.Event()

    async def __aenter__(self) -> Writer:
        if self._tasks is not None:
            raise UsageError("a writer is for one `async with` block")
        with suppress(ConnectError):  # the pump tries again
            self._connection = await self._client.connection()
        self._tasks = anyio.create_task_group()
        await self._tasks.__aenter__()
        self._tasks.start_soon(self._pump)
        self._counters.writers.add(self)
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
            self._closed = True
            self._room.set()
            self._abandon()
            self._work.set()  # an idle pump ends by itself: in asyncio, the error of one that is cancelled keeps its frame
            self._tasks.cancel_scope.cancel()
            try:
                await self._tasks.__aexit__(None, None, None)  # the pump raises nothing: only a cancellation comes out
            finally:
                self._counters.writers.discard(self)
                self._retry.reset()
        if failed is not None:
            if error is None:
                try:
                    raise failed
                finally:
                    del failed  # it refers to this frame
            error.add_note(f"Besides, {failed}")
        return None

    @property
    def inflight(self) -> int:
        """Bytes that are held at the moment: put, and neither stored nor failed."""
        return self._held

    async def put(self, key: Key, array: object, *, ttl: float | None = None) -> None:
        """Accept an array for storing under ``key``; waits while ``max_inflight`` bytes are held.

        An array longer than half of the bound is not copied: its call returns when it is stored (or has failed, which the
        next call reports). Cancelled, the call has stored the array or not.

        Raises:
            EncodeError: it cannot be stored; nothing was accepted.
            WriteFailed: items put before could not be stored. Each is reported once. This one was **not** accepted.
        """
        options = self._options if ttl is None else ttl_options(ttl)
        if self._codec is None:
            command = set_array(key, array, options)
        else:
            value = await self._client.encode_value(encode_array, array, self._codec, key)
            command = set_command(key_bytes(key), value, options)
        size = self._check(command)
        # The way that most puts take, without a second coroutine: 0.3 of 4 µs.
        batch = self._current
        if batch is None or not batch.keys or not self._copy or not batch.snapshot(key, command, size):
            await self._accept(key, command, size)

    async def put_record(self, key: Key, record: Mapping[str, object], *, ttl: float | None = None) -> None:
        """Accept a record; otherwise like :meth:`put`."""
        options = self._options if ttl is None else ttl_options(ttl)
        value = await self._client.encode_value(encode_record, record, self._codec, key)
        command = set_command(key_bytes(key), value, options)
        await self._accept(key, command, self._check(command))

    async def flush(self) -> None:
        """Return when everything that was put before is stored.

        Raises:
            WriteFailed: what could not be stored, unless it was reported before.
        """
        self._close_batch()
        if self._last is not None:
            await self._until_settled(self._last)
        self._report()

    def _check(self, command: list[Buffer]) -> int:
        """The bytes of an item's command; raises what has to be said before it is accepted."""
        if self._closed or self._tasks is None:
            self._check_open()
        if self._failures:
            self._report()
        return sum(map(len, command))

    async def _accept(self, key: Key, commands: list[Buffer], size: int) -> None:
        if not self._copy or size > self._bound // 2:
            await self._borrow(key, commands, size)
            return
        batch = self._current
        while batch is None or not batch.snapshot(key, commands, size):
            batch = await self._next_batch(size)
        if len(batch.keys) == 1 and not self._inflight:
            self._work.set()

    async def _next_batch(self, size: int) -> _Batch:
        """Send the current batch; another one, most likely with room for ``size`` bytes."""
        self._close_batch()
        await anyio.lowlevel.checkpoint()
        self._check_open()
        length = max(size, self._arena_size)
        if self._held and self._held + length > self._bound:
            self._counters.waits += 1
        while self._held and self._held + length > self._bound:
            await self._wait_for_room()
            if self._current is not None:
                return self._current  # another task has begun one meanwhile
        self._close_batch()
        if length > self._arena_size:
            self._arenas.clear()  # else they and the large ones would be twice the bound
        pooled = length == self._arena_size and self._arenas
        self._current = batch = _Batch(self._arenas.pop() if pooled else memoryview(bytearray(length)))
        self._held += length
        return batch

    async def _borrow(self, key: Key, commands: list[Buffer], size: int) -> None:
        """Accept without a copy. If a copy was promised, the call lasts until the bytes are stored."""
        if self._held and self._held + size > self._bound:
            self._counters.waits += 1
        while self._held and self._held + size > self._bound:
            self._close_batch()
            await self._wait_for_room()
        if self._copy:
            self._close_batch()  # another task's snapshots
        batch = self._current
        if batch is None:
            self._current = batch = _Batch(None)
        if batch.buffers and len(batch.buffers[-1]) < SMALL:
            # The end of one command and the begin of the next as one buffer: a third fewer for the kernel.
            commands = [bytes(batch.buffers.pop()) + bytes(commands[0]), *commands[1:]]
        batch.buffers += commands
        batch.keys.append(key)
        batch.size += size
        self._held += size
        if self._copy:
            self._close_batch()
            try:
                await self._until_settled(batch)
            except BaseException:
                self._withdraw(batch)
                raise
        elif batch.size >= BATCH_BYTES or len(batch.keys) >= BATCH_ITEMS:
            self._close_batch()
            await anyio.lowlevel.checkpoint()
        elif not self._inflight:
            self._work.set()

    def _close_batch(self) -> None:
        batch, self._current = self._current, None
        if batch is not None:
            self._last = batch
            self._queued.append(batch)
            self._submit()
            self._work.set()

    def _submit(self) -> None:
        """Hand queued batches to the connection, in order. A broken one is the pump's business."""
        connection = self._connection
        while self._queued and connection is not None and connection.lost is None:
            batch = self._queued[0]
            if batch.keys:
                batch.reply = connection.submit(batch.commands(), ok_reply(len(batch.keys)))
            self._inflight.append(self._queued.popleft())

    async def _until_settled(self, batch: _Batch) -> None:
        while not batch.settled:
            await self._wait_for_room()

    async def _wait_for_room(self) -> None:
        self._check_open()
        if self._room.is_set():
            self._room = anyio.Event()
        await self._room.wait()
        self._check_open()

    def _check_open(self) -> None:
        if self._tasks is None or self._closed:
            raise UsageError("use the writer inside of its `async with` block")

    async def _pump(self) -> None:
        """Settle the batches in flight, in order, and send the current one when nothing else travels."""
        while True:
            if not (self._inflight or self._queued):
                if self._closed:
                    return
                self._retry.reset()
                if self._current is not None and self._current.keys:
                    self._close_batch()
                else:
                    self._work = anyio.Event()
                    await self._work.wait()
                continue
            try:
                connection = await self._client.connection()
                if connection is not self._connection:
                    self._requeue()
                    self._connection = connection
                self._submit()
                batch = self._inflight[0]
                if batch.reply is not None:
                    await connection.wait(batch.reply)
                refusal = self._refusal(batch)
                if refusal is None:
                    if self._retry.attempts:
                        self._retry.succeeded()
                    self._settle(self._inflight.popleft())
                    continue
                try:
                    pause = self._retry.after(refusal, connection)
                except ServerError:  # tried for long enough; what else the batch holds may be stored
                    self._settle(self._inflight.popleft())
                    continue
                self._requeue()
            except (ConnectionLost, ConnectError) as error:
                self._requeue()
                try:
                    pause = self._retry.after(error)
                except AionpredisError:
                    self._give_up(error)
                    continue
            except Exception as error:
                self._requeue()
                self._give_up(error)
                continue
            await anyio.sleep(pause)

    def _refusal(self, batch: _Batch) -> ServerError | None:
        """An answer to this batch that may be another one later."""
        if batch.reply is None or not batch.keys:
            return None
        return next((value for value in batch.reply.values if isinstance(value, self._passing)), None)

    def _requeue(self) -> None:
        """The connection broke, or the server refused. What was in flight goes first again, so that the last put of a key wins.

        Storing the same values twice is harmless.
        """
        connection, self._connection = self._connection, None
        for batch in self._inflight:
            self._counters.repeated += len(batch.keys)
            if batch.reply is not None and connection is not None:
                connection.abandon(batch.reply)
            batch.reply = None
        self._queued.extendleft(reversed(self._inflight))
        self._inflight.clear()

    def _give_up(self, error: Exception) -> None:
        self._retry.reset()
        while self._queued:
            batch = self._queued.popleft()
            self._failures += ((key, error) for key in batch.keys)
            self._free(batch)

    def _settle(self, batch: _Batch) -> None:
        if batch.reply is not None and batch.reply.values:  # not as predicted: one of them at least was refused
            for key, value in zip(batch.keys, batch.reply.values, strict=False):
                if isinstance(value, ServerError):
                    self._failures.append((key, value.about("SET", key)))
        self._free(batch)

    def _free(self, batch: _Batch) -> None:
        batch.settled = True
        self._held -= batch.size
        if batch.arena is not None and len(batch.arena) == self._arena_size:
            self._arenas.append(batch.arena)
        self._room.set()

    def _report(self) -> None:
        failures, self._failures = self._failures, []
        if failures:
            raise WriteFailed(failures)

    def _withdraw(self, batch: _Batch) -> None:
        """Let go of a batch's borrowed memory, wherever it is. It stays in its place, empty, until it is settled."""
        batch.keys, batch.buffers = [], []
        if batch.reply is not None and self._connection is not None:
            self._connection.abandon(batch.reply)

    def _abandon(self) -> None:
        """Let go of all borrowed memory; only after a cancellation is there any left."""
        for batch in (*self._inflight, *self._queued):
            self._withdraw(batch)
