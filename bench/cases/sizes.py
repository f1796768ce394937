"""From 64 B to 512 MB, both ways, over a Unix socket and over TCP on loopback."""

from __future__ import annotations

import contextlib
import time
from typing import ClassVar

import numpy as np

import aionpredis
from bench.harness import Case, Contender, Sample

SIZES = {
    "64 B": 64,
    "1 kB": 1_000,
    "12.8 kB": 12_800,
    "200 kB": 200_000,
    "1 MB": 1_000_000,
    "16 MB": 16_000_000,
    "128 MB": 128_000_000,
    "512 MB": (512 << 20) - 256,  # with the header just below what a server takes
}
TOTAL = 128_000_000
MOST = 5_000


class Sizes(Contender):
    """GB/s for each size: many arrays in flight through the writer and ``mget``, or a single large one."""

    kind = "ours"
    transport: ClassVar[str]

    async def open(self) -> None:
        url = self.work.url if self.transport == "unix" else self.work.options.get("tcp", self.work.url)
        self.stack = contextlib.AsyncExitStack()
        self.client = await self.stack.enter_async_context(aionpredis.connect(url))

    async def run(self) -> Sample:
        metrics: dict[str, float] = {}
        moved = 0
        for name, nbytes in SIZES.items():
            if self.work.quick and nbytes > 20_000_000:
                metrics[f"set {name}"] = metrics[f"get {name}"] = float("nan")
                continue
            count = min(MOST, max(1, TOTAL // nbytes))
            batch = np.ones((count, nbytes), np.uint8)
            keys = [f"sizes:{name}:{index}" for index in range(count)]
            start = time.perf_counter()
            async with self.client.writer(copy=False) as writer:
                for key, array in zip(keys, batch, strict=True):
                    await writer.put(key, array)
            metrics[f"set {name}"] = batch.nbytes / (time.perf_counter() - start) / 1e9
            batch[:] = 0
            start = time.perf_counter()
            assert (await self.client.mget(keys, out=batch)).all()
            metrics[f"get {name}"] = batch.nbytes / (time.perf_counter() - start) / 1e9
            assert batch.min() == 1
            for first in range(0, count, 1000):
                await self.client.delete(*keys[first : first + 1000])
            moved += 2 * batch.nbytes
        return Sample(1, moved, metrics)

    async def close(self) -> None:
        await self.stack.aclose()


class Unix(Sizes):
    name = "Unix socket"
    transport = "unix"


class Tcp(Sizes):
    name = "TCP on loopback"
    transport = "tcp"


CASE = Case(
    "sizes",
    "Size of the arrays, GB/s",
    (Unix, Tcp),
    metrics=tuple(f"{op} {name}" for op in ("set", "get") for name in SIZES),
)
