"""One call at a time: how long ``set`` and ``get`` take, at the median and at the 99th percentile."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import numpy as np

import aionpredis
from aionpredis.formats import npy
from bench import frames, peers
from bench.harness import Case, Contender, Ratio, Sample

SIZES = {"1 kB": (20, 25), "12.8 kB": (80, 80), "1 MB": (500, 1000)}  # shapes, of uint16
CALLS = {"1 kB": 2000, "12.8 kB": 2000, "1 MB": 200}


class Timing(Contender):
    """Calls ``store`` and ``load`` for arrays of each size."""

    async def open(self) -> None:
        rng = np.random.default_rng(3)
        self.arrays = {name: rng.integers(0, 1 << 16, shape, np.uint16) for name, shape in SIZES.items()}

    async def store(self, key: bytes, array: Any) -> None:
        raise NotImplementedError

    async def load(self, key: bytes) -> Any:
        raise NotImplementedError

    async def run(self) -> Sample:
        metrics: dict[str, float] = {}
        calls = 0
        for name, array in self.arrays.items():
            key = b"latency:" + name.encode()
            count = self.work.size(CALLS[name])
            await self._time(metrics, f"set {name}", count, partial(self.store, key, array))
            await self._time(metrics, f"get {name}", count, partial(self.load, key))
            calls += 2 * count
        return Sample(calls, 0, metrics)

    async def _time(self, metrics: dict[str, float], name: str, count: int, call: Callable[[], Awaitable[Any]]) -> None:
        taken = []
        for _ in range(count):
            start = time.perf_counter()
            await call()
            taken.append(time.perf_counter() - start)
        metrics[f"{name} p50"] = 1e6 * float(np.percentile(taken, 50))
        metrics[f"{name} p99"] = 1e6 * float(np.percentile(taken, 99))

    async def check(self) -> None:
        for name, array in self.arrays.items():
            key = b"latency:" + name.encode()
            await self.store(key, array)
            assert np.array_equal(np.asarray(await self.load(key)).reshape(array.shape), array)


class Raw(Timing):
    """A blocking socket, the bytes of SET and GET, and nothing else."""

    name = "raw blocking socket"
    kind = "raw"

    async def open(self) -> None:
        await super().open()
        path = peers.unix_path(self.work.url)
        if path is not None:
            self.sock = socket.socket(socket.AF_UNIX)
            self.sock.connect(path)
        else:
            from urllib.parse import urlsplit

            parts = urlsplit(self.work.url)
            self.sock = socket.create_connection((parts.hostname, parts.port or 6379))
        self.memory = bytearray(4 << 20)

    async def store(self, key: bytes, array: Any) -> None:
        head, payload = npy.encode(array)
        start = b"*3\r\n$3\r\nSET\r\n$%d\r\n%b\r\n$%d\r\n%b" % (len(key), key, len(head) + len(payload), head)
        buffers = [memoryview(start), payload, memoryview(b"\r\n")]
        while buffers:
            sent = self.sock.sendmsg(buffers)
            while buffers and sent >= len(buffers[0]):
                sent -= len(buffers.pop(0))
            if buffers:
                buffers[0] = buffers[0][sent:]
        if self.sock.recv(64) != b"+OK\r\n":
            raise AssertionError("SET failed")

    async def load(self, key: bytes) -> Any:
        self.sock.sendall(b"*2\r\n$3\r\nGET\r\n$%d\r\n%b\r\n" % (len(key), key))
        view, got = memoryview(self.memory), self.sock.recv_into(self.memory)
        stop = self.memory.find(b"\r\n")
        size = stop + 2 + int(self.memory[1:stop]) + 2
        while got < size:
            got += self.sock.recv_into(view[got:])
        return npy.decode(view[stop + 2 : size - 2])

    async def close(self) -> None:
        self.sock.close()


class RedisSync(Timing):
    name = "redis-py"
    kind = "peer"

    async def open(self) -> None:
        await super().open()
        self.client = peers.redis_sync(self.work.url)

    async def store(self, key: bytes, array: Any) -> None:
        self.client.set(key, array.tobytes())

    async def load(self, key: bytes) -> Any:
        return np.frombuffer(self.client.get(key), np.uint16)  # type: ignore[arg-type]


class RedisAsyncio(Timing):
    name = "redis.asyncio"

    async def open(self) -> None:
        await super().open()
        self.client = peers.redis_async(self.work.url)

    async def store(self, key: bytes, array: Any) -> None:
        await self.client.set(key, array.tobytes())

    async def load(self, key: bytes) -> Any:
        return np.frombuffer(await self.client.get(key), np.uint16)

    async def close(self) -> None:
        await self.client.aclose()


class Coredis(RedisAsyncio):
    name = "coredis"
    needs = "coredis"

    async def open(self) -> None:
        await Timing.open(self)
        self.stack = contextlib.AsyncExitStack()
        self.client = peers.coredis(self.work.url)
        if hasattr(self.client, "__aenter__"):
            await self.stack.enter_async_context(self.client)

    async def close(self) -> None:
        await self.stack.aclose()


class Ours(Timing):
    name = "aionpredis"
    kind = "ours"

    async def open(self) -> None:
        await super().open()
        self.stack = contextlib.AsyncExitStack()
        self.client = await self.stack.enter_async_context(aionpredis.connect(self.work.url))
        self.out = {name: np.empty_like(array) for name, array in self.arrays.items()}

    async def store(self, key: bytes, array: Any) -> None:
        await self.client.set(key, array)

    async def load(self, key: bytes) -> Any:
        return await self.client.get(key)

    async def close(self) -> None:
        await self.stack.aclose()


assert frames.NBYTES == 12_800

CASE = Case(
    "latency",
    "Latency of single calls, µs",
    (Raw, RedisSync, RedisAsyncio, Coredis, Ours),
    (
        Ratio("set_latency_vs_raw", Ours.name, "raw", "<= 1.3", "set 12.8 kB p50", smaller_is_better=True),
        Ratio("get_latency_vs_raw", Ours.name, "raw", "<= 1.3", "get 12.8 kB p50", smaller_is_better=True),
        Ratio(
            "set_latency_vs_redis_asyncio",
            Ours.name,
            RedisAsyncio.name,
            "<= 0.5",
            "set 12.8 kB p50",
            smaller_is_better=True,
        ),
    ),
    metrics=tuple(f"{op} {size} {point}" for op in ("set", "get") for size in SIZES for point in ("p50", "p99")),
)
