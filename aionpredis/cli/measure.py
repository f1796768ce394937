"""What ``doctor`` and ``bench`` measure: this library and, over a bare socket, what the server gives to anybody.

Everything is short, bounded in memory, and deleted at the end. What a killed process leaves expires, but for a replay's.
"""

from __future__ import annotations

import math
import os
import socket
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any

import anyio
import anyio.to_thread
import numpy as np

from aionpredis import info
from aionpredis.errors import ConnectionLost, ServerError, ServerFull, UsageError
from aionpredis.replay import Schema
from aionpredis.requests import encode_array, set_command, ttl_options, values_command
from aionpredis.wire.resp import Buffer

if TYPE_CHECKING:
    from aionpredis.client import Client
    from aionpredis.replay import Replay

__all__ = ["Latency", "Probe", "frame_of", "latency"]

TTL = 120.0
"""Seconds that the keys live, if nobody deletes them."""

LEASE = 10.0
"""Seconds that chunks live which were under way when they were not wanted any more."""

SLICE_SECONDS = 0.25
"""That one measurement takes at least, unless a pass takes longer."""

BATCH_BYTES = 1 << 20
"""Of commands, or of replies, that are under way on the bare socket, twice."""

MGET_BYTES = 200_000
"""Of one MGET's values, as the library asks for them."""

MAX_KEYS = 4096

MAX_FRAME = 64 << 20
"""Bytes of an array: more would take a server's memory for no better figures."""

SILENCE = 30.0
"""Seconds after which a server that says nothing to the bare socket is given up."""


@dataclass(frozen=True)
class Latency:
    """Seconds, of ``count`` calls one after the other."""

    median: float
    p99: float
    count: int


def latency(seconds: Sequence[float]) -> Latency:
    return Latency(float(np.median(seconds)), float(np.percentile(seconds, 99)), len(seconds))


def frame_of(shape: str, dtype: str) -> np.ndarray[Any, Any]:
    """An array of noise. ``shape``: as ``80,80`` or ``80x80``; ``dtype``: as NumPy names it.

    Raises:
        UsageError, EncodeError: they make no array that can be stored.
    """
    try:
        sizes = tuple(int(size) for size in shape.lower().replace("x", ",").split(",") if size.strip())
        kind = np.dtype(dtype)
        nbytes = math.prod(sizes) * kind.itemsize
        if min(sizes, default=1) < 1 or kind.hasobject or not nbytes:
            raise ValueError
    except (ValueError, TypeError):
        raise UsageError(
            f"no array to measure with: --shape {shape} --dtype {dtype}; try --shape 80,80 --dtype uint16"
        ) from None
    if nbytes > MAX_FRAME:
        raise UsageError(f"an array of {shape} {dtype} has {nbytes:,} bytes: measure with {MAX_FRAME:,} at most")
    noise = np.random.default_rng(7).integers(0, 2 if kind == np.bool_ else 256, nbytes, np.uint8)
    frame: np.ndarray[Any, Any] = noise.view(kind).reshape(sizes)
    encode_array(frame, None)
    return frame


class Probe:
    """Measures with arrays like ``frame``, of which at most ``nbytes`` (or one) are on the servers. For ``async with``.

    Raises:
        ServerFull: on entering: there is no room for that many. Nothing was written.
    """

    def __init__(self, client: Client, frame: np.ndarray[Any, Any], *, nbytes: int) -> None:
        self.frame = frame
        self.nbytes = sum(memoryview(part).nbytes for part in encode_array(frame, None))
        """Of a stored array."""
        self.count = max(1, min(MAX_KEYS, nbytes // self.nbytes))
        """How many there are."""
        self._client = client
        token = os.urandom(6).hex()
        self._replay_name = f"aionpredis-measure-{token}"
        self._keys = [f"aionpredis-measure:{token}:{number}".encode() for number in range(self.count)]
        self._numbers = {key: number for number, key in enumerate(self._keys)}
        self._frames = [np.roll(frame, shift) for shift in range(min(4, self.count))]
        self._out = np.empty((self.count, *frame.shape), frame.dtype)
        self._bare: socket.socket | None = None
        self._bare_keys: list[bytes] = []
        self._replay: Replay | None = None

    async def __aenter__(self) -> Probe:
        await self._check_room()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bare is not None:
            self._bare.close()
        with anyio.CancelScope(shield=True), anyio.move_on_after(10):
            try:
                await self._client.delete(*self._keys)
                if self._replay is not None:
                    await self._replay.delete()
            except Exception:  # the keys expire; and the caller knows already what is wrong with the server
                if kind is None:
                    raise

    async def _check_room(self) -> None:
        """Each server may have to take everything, and as much again while values are replaced."""
        topology = self._client.topology
        for key in topology.each():
            try:
                facts = await info.ask(self._client, key=key)
            except ServerError:
                return  # a user without the right to ask; the writes are bounded anyway
            most, used = info.number(facts, "maxmemory"), info.number(facts, "used_memory")
            needed = 2 * self.count * self.nbytes
            if most and used + needed > most:
                raise ServerFull(
                    f"OOM {topology.shard(key).dialer.url} has {max(0, most - used):,} bytes left of maxmemory {most:,}; "
                    f"to measure takes up to {needed:,}"
                )

    # --- one call after the other ----------------------------------------------------------------------------------------

    async def ping(self, count: int = 200) -> list[float]:
        return await _each(count, lambda _: self._client.execute("PING"))

    async def set(self, count: int = 200) -> list[float]:
        return await _each(count, lambda i: self._client.set(self._key(i), self._frame(i), ttl=TTL))

    async def get(self, count: int = 200) -> list[float]:
        await self._fill()
        return await _each(count, lambda i: self._client.get(self._key(i)))

    def _key(self, number: int) -> bytes:
        return self._keys[number % self.count]

    def _frame(self, number: int) -> np.ndarray[Any, Any]:
        return self._frames[number % len(self._frames)]

    # --- many at once: arrays, or transitions, a second -------------------------------------------------------------------

    async def write(self) -> float:
        """By ``client.writer()``."""
        return await _rate(self._write, self.count)

    async def _write(self) -> float:
        start = time.perf_counter()
        async with self._client.writer(ttl=TTL) as writer:
            for number, key in enumerate(self._keys):
                await writer.put(key, self._frame(number))
        return time.perf_counter() - start

    async def read(self) -> float:
        """By ``mget(out=)``."""
        await self._fill()
        rate = await _rate(self._read, self.count)
        # As bytes: noise may be NaN.
        if any(self._out[number].tobytes() != self._frame(number).tobytes() for number in (0, self.count - 1)):
            raise ConnectionLost("what was read is not what was written: somebody else writes to the keys")
        return rate

    async def _read(self) -> float:
        start = time.perf_counter()
        found = await self._client.mget(self._keys, out=self._out)
        seconds = time.perf_counter() - start
        if not found.all():
            raise ConnectionLost(f"{np.count_nonzero(~found)} of {self.count} keys are gone: the server evicts them")
        return seconds

    async def _fill(self) -> None:
        if await self._client.exists(*self._keys) < self.count:
            await self._write()

    async def append(self) -> float:
        """By one actor, chunks of 16, acknowledged.

        Raises:
            EncodeError: a replay cannot hold this dtype.
            ReplayError: the server may evict keys by itself.
        """
        return await _rate(self._append, self.count)

    async def _append(self) -> float:
        if self._replay is None:
            frame = self.frame
            schema = Schema(state=(frame.dtype, frame.shape), action="int64", reward="float32", terminated="bool")
            chunk = max(1, min(16, schema.max_chunk))
            self._replay = self._client.replay(self._replay_name, schema, chunk=chunk, lease=LEASE)
        await self._replay.begin_run()  # and delete what there was
        async with self._replay.actor() as actor:
            await actor.join()
            start = time.perf_counter()
            for number in range(self.count):
                await actor.append(state=self._frame(number), action=number, reward=1.0, terminated=number % 100 == 99)
            await actor.flush()
            return time.perf_counter() - start

    async def epoch(self) -> float:
        """By one learner, batches of 256."""
        if self._replay is None or await self._replay.latest_run() is None:
            await self._append()
        return await _rate(self._epoch, self.count)

    async def _epoch(self) -> float:
        assert self._replay is not None
        start = time.perf_counter()
        count = 0
        async for batch in await self._replay.epoch(batch=256):
            count += len(batch["reward"])
        if count != self.count:
            raise ConnectionLost(f"{count} of {self.count} transitions are there: the server evicts keys")
        return time.perf_counter() - start

    # --- the ceiling: the same bytes over a bare, blocking socket -----------------------------------------------------------

    async def bare_write(self) -> float:
        """SETs, prepared before, two batches under way; on a cluster to one primary."""
        bare, keys = await self._socket()
        options = ttl_options(TTL)
        commands = [
            b"".join(set_command(key, encode_array(self._frame(self._numbers[key]), None), options)) for key in keys
        ]
        batches = _batches(commands, self.nbytes)
        replies = [b"+OK\r\n" * len(batch) for batch in batches]
        return await _in_thread(bare, [b"".join(batch) for batch in batches], replies, len(keys))

    async def bare_read(self) -> float:
        """MGETs as the library sends them, two batches under way; of what is received only the end is looked at."""
        await self._fill()
        bare, keys = await self._socket()
        joined = self._client.topology.joins_keys
        slices = _batches(keys, self.nbytes, MGET_BYTES)
        commands, replies = [], []
        for batch in _batches(slices, MGET_BYTES):
            commands.append(b"".join(part for each in batch for part in values_command(each, joined=joined)))
            reply: list[Buffer] = []
            for each in batch:
                reply += [b"*%d\r\n" % len(each)] if joined else []
                for key in each:
                    value = encode_array(self._frame(self._numbers[key]), None)
                    reply += [b"$%d\r\n" % self.nbytes, *value, b"\r\n"]
            replies.append(b"".join(reply))
        return await _in_thread(bare, commands, replies, len(keys))

    async def _socket(self) -> tuple[socket.socket, list[bytes]]:
        """A socket to one primary, and those of the keys that it has."""
        topology = self._client.topology
        if self._bare is None:
            self._bare_keys = topology.groups(self._keys, lambda key: key)[0]
            connection = await topology.shard(self._bare_keys[0]).dialer.dial()
            self._bare = connection.detach()
            self._bare.settimeout(SILENCE)
        return self._bare, self._bare_keys


async def _each(count: int, call: Callable[[int], Awaitable[object]]) -> list[float]:
    await call(0)
    seconds = []
    for number in range(count):
        start = time.perf_counter()
        await call(number)
        seconds.append(time.perf_counter() - start)
    return seconds


async def _rate(once: Callable[[], Awaitable[float]], count: int) -> float:
    """``count`` for each call of ``once``, which says how long it took, repeated until it took long enough."""
    passes, seconds = 0, 0.0
    while seconds < SLICE_SECONDS:
        seconds += await once()
        passes += 1
    return passes * count / seconds


def _batches(items: list[Any], nbytes: int, most: int = BATCH_BYTES) -> list[list[Any]]:
    """The items, of so many bytes each, in batches of about ``most`` bytes."""
    size = max(1, most // nbytes)
    return [items[at : at + size] for at in range(0, len(items), size)]


async def _in_thread(bare: socket.socket, commands: list[bytes], replies: list[bytes], count: int) -> float:
    """Send all batches of commands again and again, with the next one under way while one's reply is received."""

    def exchange() -> float:
        start = time.perf_counter()
        memory = memoryview(bytearray(max(map(len, replies))))
        previous: bytes | None = None
        for command, reply in zip(commands, replies, strict=True):
            bare.sendall(command)
            if previous is not None:
                _receive(bare, memory, previous)
            previous = reply
        assert previous is not None
        _receive(bare, memory, previous)
        return time.perf_counter() - start

    try:
        # A pass is short, so a cancellation is waited for; the socket is nobody's who was cancelled.
        return await _rate(lambda: anyio.to_thread.run_sync(exchange), count)
    except ConnectionLost:
        raise
    except OSError as error:
        raise ConnectionLost(f"the bare socket broke: {error}") from error


def _receive(bare: socket.socket, memory: memoryview, expected: bytes) -> None:
    view = memory[: len(expected)]
    done = 0
    while done < len(view):
        received = bare.recv_into(view[done:])
        if not received:
            raise ConnectionLost("the server closed the bare socket")
        if not done and memory[0] == ord("-"):
            raise ServerError(bytes(memory[1:received]).partition(b"\r\n")[0].decode("utf-8", "replace"))
        done += received
    if view[-16:] != expected[-16:]:
        raise ConnectionLost(
            "what came over the bare socket is not what was asked for: somebody else writes to the keys"
        )
