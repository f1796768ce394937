"""One array of 100 MB against the bare socket, and how long other tasks wait while 500 MB travel."""

from __future__ import annotations

import contextlib
import time
from typing import ClassVar

import anyio
import numpy as np

import aionpredis
from bench.ceilings import SocketPair
from bench.harness import Case, Contender, Ratio, Sample

LARGE = 100_000_000
HUGE = 500_000_000
REPEATS = 4


class Large(Contender):
    kind = "ours"
    nbytes: ClassVar[int] = LARGE

    async def open(self) -> None:
        self.stack = contextlib.AsyncExitStack()
        self.client = await self.stack.enter_async_context(aionpredis.connect(self.work.url))
        self.array = np.random.default_rng(1).integers(0, 255, self.work.size(self.nbytes), np.uint8)
        self.out = np.empty_like(self.array)
        await self.client.set(self.key, self.array)

    @property
    def key(self) -> str:
        return f"large:{type(self).__name__}"

    async def check(self) -> None:
        await self.client.get(self.key, out=self.out)
        assert np.array_equal(self.out, self.array)

    async def close(self) -> None:
        await self.client.delete(self.key)
        await self.stack.aclose()


class SetLarge(Large):
    name = "aionpredis set, 100 MB"

    async def run(self) -> Sample:
        for _ in range(REPEATS):
            await self.client.set(self.key, self.array)
        return Sample(REPEATS, REPEATS * self.array.nbytes)


class GetLarge(Large):
    name = "aionpredis get(out=), 100 MB"

    async def run(self) -> Sample:
        for _ in range(REPEATS):
            await self.client.get(self.key, out=self.out)
        return Sample(REPEATS, REPEATS * self.array.nbytes)


class Lag(Large):
    """Another task wakes up every millisecond: how late, at worst."""

    name = "event loop while 500 MB travel"
    kind = "lag"
    nbytes = HUGE

    async def run(self) -> Sample:
        worst = 0.0

        async def tick() -> None:
            nonlocal worst
            while True:
                due = time.perf_counter() + 0.001
                await anyio.sleep(0.001)
                worst = max(worst, time.perf_counter() - due)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(tick)
            await anyio.sleep(0.01)
            worst = 0.0
            await self.client.set(self.key, self.array)
            await self.client.get(self.key, out=self.out)
            tasks.cancel_scope.cancel()
        return Sample(2, 2 * self.array.nbytes, {"lag_ms": 1e3 * worst})


class CeilingWrite(SocketPair):
    """The same 100 MB between arrays of that size: 1 MB that goes round in the CPU's cache would be 10 to 30% faster."""

    name = "socketpair, writing 100 MB"
    kind = "socket-write"
    receives = False
    size = LARGE
    count = REPEATS
    circulating = 1


class CeilingRead(CeilingWrite):
    name = "socketpair, reading 100 MB"
    kind = "socket-read"
    receives = True


CASE = Case(
    "large",
    "Large arrays",
    (SetLarge, GetLarge, Lag, CeilingWrite, CeilingRead),
    (
        Ratio("large_write_vs_socket_ceiling", SetLarge.name, "socket-write", ">= 0.8", "bytes"),
        Ratio("large_read_vs_socket_ceiling", GetLarge.name, "socket-read", ">= 0.75", "bytes"),
        Ratio("loop_lag_ms_large", Lag.name, "", "<= 5", "lag_ms"),
    ),
    metrics=("bytes", "cpu", "lag_ms"),
)
