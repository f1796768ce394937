"""Batching writes with backpressure: what :mod:`aionpredis.lane` sends to each server is accepted, bounded and told here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any

import anyio
import anyio.lowlevel
import numpy as np
from anyio.abc import TaskGroup

from aionpredis import codecs
from aionpredis.codecs import Codec
from aionpredis.errors import ConnectError, ServerFull, ServerUnavailable, UsageError, WriteFailed
from aionpredis.lane import BATCH_BYTES, BATCH_ITEMS, Batch, Lane
from aionpredis.names import is_count
from aionpredis.replicas import Replicas
from aionpredis.requests import (
    IN_THREAD,
    Key,
    encode_array,
    encode_record,
    key_bytes,
    set_array,
    set_command,
    ttl_options,
)
from aionpredis.wire.resp import SMALL, Buffer
from aionpredis.wire.shard import Shard

if TYPE_CHECKING:
    from aionpredis.client import Client

__all__ = ["Writer"]


class Writer:
    """Stores arrays in batches, while at most ``max_inflight`` bytes are neither stored nor failed::

        async with client.writer(max_inflight=64 << 20) as writer:
            await writer.put(key, array)

    Made by :meth:`aionpredis.Client.writer`. A batch leaves when it is full, or at once when nothing else is travelling:
    under load batches fill up, and a lone item waits for nobody. Items of one key are stored in the order of their puts.
    In a cluster each server has batches of its own, under the same bound: one that does not answer stops the others only
    when its items have used it up.

    ``max_inflight``: bytes. When they are reached, :meth:`put` waits: the producer is slowed down to what the server takes.
    ``copy``: ``True`` takes a snapshot, so the array may be changed as soon as :meth:`put` returns (simulators reuse
    their observation buffers). ``False`` sends the caller's own memory: do not touch it before :meth:`flush`.
    ``ttl``, ``codec``: defaults for :meth:`put`.
    ``replicas``: an item counts as stored when so many replicas of its primary acknowledge it, too (command ``WAIT``). A
    failover then keeps it if as many as there are were asked for; of several, another one may be promoted. The writer has
    connections of its own then. Items that reach fewer for ``retry_timeout`` fail with :class:`NotReplicated`, though the
    primary has them; entering the block raises it if there are fewer at all.

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
        replicas: int = 0,
        waits_when_full: bool = True,
    ) -> None:
        if not is_count(max_inflight):
            raise UsageError(f"max_inflight is a positive number of bytes, not {max_inflight!r}")
        self._client = client
        self._counters = client.counters
        self._bound = max_inflight
        self._copy = copy
        self._options = ttl_options(ttl)
        self._codec = client.codec if codec is None else codecs.resolve(codec)
        self._stored_as: str | Codec = "raw" if self._codec is None else self._codec  # None would be the client's
        self._replicas = None if type(replicas) is int and replicas == 0 else Replicas(client, replicas)
        self._arena_size = 0
        self._arenas: list[memoryview] = []
        self._lanes: dict[Shard, Lane] = {}
        self._only: Lane | None = None  # if there is one server
        self._latest: dict[int, Batch] = {}  # the batch that the last item of a slot went into
        self._held = 0
        self._failures: list[tuple[Key, Exception]] = []
        self._closed = False
        self._passing = (ServerUnavailable, ServerFull) if waits_when_full else (ServerUnavailable,)
        self._tasks: TaskGroup | None = None
        self._room = anyio.Event()

    async def __aenter__(self) -> Writer:
        """
        Raises:
            NotReplicated: a server has fewer ``replicas`` at the moment.
        """
        if self._tasks is not None:
            raise UsageError("a writer is for one `async with` block")
        if self._replicas is not None:
            self._client = await self._client.twin().__aenter__()
        try:
            await self._open(self._replicas)
        except BaseException:
            await self._leave()
            raise
        self._tasks = anyio.create_task_group()
        await self._tasks.__aenter__()
        topology = self._client.topology
        # At least two batches for each server fit the bound, so that one travels while the next is filled.
        self._arena_size = min(BATCH_BYTES, max(1, self._bound // 2 // len(topology.shards)))
        if topology.joins_keys:
            self._only = self._lane(topology.shards[0])
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
            for lane in self._lanes.values():
                lane.close()
            self._tasks.cancel_scope.cancel()
            try:
                await self._tasks.__aexit__(None, None, None)  # the pumps raise nothing: only a cancellation comes out
            finally:
                self._counters.writers.discard(self)
                self._only = None  # lanes refer to this writer, to connections and to memory
                self._lanes.clear()
                self._arenas.clear()
                await self._leave()
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
        if self._codec is None and type(array) is np.ndarray and array.nbytes < IN_THREAD:
            command = set_array(key, array, options)
        else:
            value = await self._client.encode_value(encode_array, array, self._stored_as, key)
            command = set_command(key_bytes(key), value, options)
        size = self._check(command)
        # The way that most puts take, without a second coroutine: 0.3 of 4 µs.
        lane = self._only
        batch = self._current(key) if lane is None else lane.current
        if batch is None or not batch.keys or not self._copy or not batch.snapshot(key, command, size):
            await self._accept(key, command, size)

    async def put_record(self, key: Key, record: Mapping[str, object], *, ttl: float | None = None) -> None:
        """Accept a record; otherwise like :meth:`put`."""
        options = self._options if ttl is None else ttl_options(ttl)
        value = await self._client.encode_value(encode_record, record, self._stored_as, key)
        command = set_command(key_bytes(key), value, options)
        await self._accept(key, command, self._check(command))

    async def flush(self) -> None:
        """Return when everything that was put before is stored.

        Raises:
            WriteFailed: what could not be stored, unless it was reported before.
        """
        for lane in self._lanes.values():
            lane.close_batch()
        for batch in [lane.last for lane in self._lanes.values()]:
            if batch is not None:  # they are settled in order
                await self._until_settled(batch)
        self.report()

    # --- for :mod:`aionpredis.blocking`: an item is encoded in one thread and accepted in the loop's ---------------------

    @property
    def failed(self) -> bool:
        """Whether the next call raises :class:`WriteFailed`."""
        return bool(self._failures)

    def encode_item(
        self, encoder: Callable[[Any, Codec | None, Key], list[Buffer]], key: Key, value: Any, ttl: float | None
    ) -> tuple[list[Buffer], int, bool]:
        """The command that stores it, by ``encode_array`` or ``encode_record``; its bytes; whether its memory is the
        caller's, who was promised a copy, so that it has to be stored before the call returns.
        """
        self._check_open()
        options = self._options if ttl is None else ttl_options(ttl)
        command = set_command(key_bytes(key), encoder(value, self._codec, key), options)
        size = sum(map(len, command))
        settle = self._outlasts(size)
        return ([b"".join(command)] if self._copy and not settle else command), size, settle

    def has_room(self, size: int) -> bool:
        """Whether so many bytes, besides those that are held, keep within the bound."""
        return self._held + size <= self._bound

    async def accept_item(self, key: Key, command: list[Buffer], size: int) -> bool:
        """Accept what was encoded; whether it filled a batch, so that others should run. Cancelled, it was not accepted."""
        batch = await self._lend(key, command, size, settle=False)
        return batch is not batch.lane.current

    async def settle_item(self, key: Key, command: list[Buffer], size: int) -> None:
        """Accept it, and return when it is stored or has failed. Cancelled, its memory is not used any more."""
        await self._until_returned(await self._lend(key, command, size, settle=True))

    # --- how it is done ------------------------------------------------------------------------------------------------

    def _check(self, command: list[Buffer]) -> int:
        """The bytes of an item's command; raises what has to be said before it is accepted."""
        if self._closed or self._tasks is None:
            self._check_open()
        if self._failures:
            self.report()
        return sum(map(len, command))

    def _lane(self, shard: Shard) -> Lane:
        lane = self._lanes.get(shard)
        if lane is None:
            assert self._tasks is not None
            self._lanes[shard] = lane = Lane(
                self._client, shard, settled=self._settled, passing=self._passing, replicas=self._replicas
            )
            self._tasks.start_soon(lane.pump)
        return lane

    def _current(self, key: Key) -> Batch | None:
        """The batch that is being filled for the server that has the key; ``None``: :meth:`_accept` has something to do."""
        slot, shard = self._client.topology.locate(key_bytes(key))
        lane = self._lanes.get(shard)
        if lane is None or lane.current is None:
            return None
        latest = self._latest.get(slot)
        if latest is not None and not latest.settled and latest.lane is not lane:
            return None
        self._latest[slot] = lane.current
        return lane.current

    async def _route(self, key: Key) -> tuple[int, Lane]:
        """The key's slot and lane. While anything of the slot travels in another lane, since it moved meanwhile, this waits:
        nothing may overtake what is going to be redirected.
        """
        if self._only is not None:
            return 0, self._only
        name = key_bytes(key)
        while True:
            slot, shard = self._client.topology.locate(name)
            lane, latest = self._lane(shard), self._latest.get(slot)
            if latest is None or latest.settled or latest.lane is lane:
                return slot, lane
            latest.lane.close_batch()
            await self._wait_for_room()

    def _outlasts(self, size: int) -> bool:
        """Whether the call of so large an item lasts until it is stored: the promised copy would be over half of the bound."""
        return self._copy and size > self._bound // 2

    async def _accept(self, key: Key, command: list[Buffer], size: int) -> None:
        if self._outlasts(size):
            await self.settle_item(key, command, size)
            return
        if not self._copy:
            batch = await self._lend(key, command, size, settle=False)
            if batch is not batch.lane.current:  # it is full
                await anyio.lowlevel.checkpoint()
            return
        length = max(size, self._arena_size)
        waits = False
        while True:
            slot, lane = await self._route(key)
            if lane.current is None and self._held and self._held + length > self._bound:
                self._counters.waits += not waits
                waits = True
                await self._wait_for_room()
                continue
            if lane.current is None:
                lane.current = self._new_batch(lane, length)
            if lane.current.snapshot(key, command, size):
                break
            lane.close_batch()
            await anyio.lowlevel.checkpoint()
            self._check_open()
        self._latest[slot] = lane.current
        if len(lane.current.keys) == 1:
            lane.wake()

    def _new_batch(self, lane: Lane, length: int) -> Batch:
        if length > self._arena_size:
            self._arenas.clear()  # else they and the large ones would be twice the bound
        pooled = length == self._arena_size and self._arenas
        self._held += length
        return Batch(lane, self._arenas.pop() if pooled else memoryview(bytearray(length)))

    async def _until_returned(self, batch: Batch) -> None:
        """Wait until what was lent, where a copy was promised, is stored or has failed; cancelled, take it back."""
        try:
            await self._until_settled(batch)
        except BaseException:
            batch.lane.withdraw(batch)
            raise

    async def _lend(self, key: Key, commands: list[Buffer], size: int, *, settle: bool) -> Batch:
        """Wait for room, then put the caller's memory into a batch; ``settle``: one of its own. No cancellation afterwards."""
        self._check_open()
        waits = False
        while True:
            slot, lane = await self._route(key)
            if not self._held or self._held + size <= self._bound:
                break
            self._counters.waits += not waits
            waits = True
            lane.close_batch()
            await self._wait_for_room()
        if settle:
            lane.close_batch()  # another task's snapshots
        batch = lane.current
        if batch is None:
            lane.current = batch = Batch(lane, None)
        if batch.buffers and len(batch.buffers[-1]) < SMALL:
            # The end of one command and the begin of the next as one buffer: a third fewer for the kernel.
            commands = [bytes(batch.buffers.pop()) + bytes(commands[0]), *commands[1:]]
        batch.buffers += commands
        batch.keys.append(key)
        batch.size += size
        self._held += size
        self._latest[slot] = batch
        if settle or batch.size >= BATCH_BYTES or len(batch.keys) >= BATCH_ITEMS:
            lane.close_batch()
        else:
            lane.wake()
        return batch

    async def _open(self, replicas: Replicas | None) -> None:
        """Reach all servers, if it has to be seen that they have replicas; else the first one will do."""
        if replicas:
            await replicas.check(self._client.topology.shards)
        else:
            with suppress(ConnectError):  # the lanes try again
                await self._client.topology.shards[0].connection()

    async def _leave(self) -> None:
        if self._replicas is not None:
            await self._client.__aexit__(None, None, None)

    async def _until_settled(self, batch: Batch) -> None:
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

    def _settled(self, batch: Batch) -> None:
        """A lane is done with it."""
        batch.settled = True
        self._failures += batch.failures
        self._held -= batch.size
        arena, batch.arena = batch.arena, None
        batch.keys, batch.buffers, batch.failures = [], [], []  # it is remembered until another one takes its slots
        if arena is not None and len(arena) == self._arena_size:
            self._arenas.append(arena)
        self._room.set()

    def report(self) -> None:
        """Raise what could not be stored, and was not reported before."""
        failures, self._failures = self._failures, []
        if failures:
            raise WriteFailed(failures)
