"""raw against lz4: Atari-like frames, noise and float weights; contiguous and strided."""

from __future__ import annotations

import contextlib
import time

import numpy as np
from numpy.typing import NDArray

import aionpredis
from bench.harness import Case, Contender, Sample

COUNT = 200
Arrays = dict[str, NDArray[np.generic]]


def arrays() -> Arrays:
    rng = np.random.default_rng(2)
    frames = np.zeros((8, 210, 160, 3), np.uint8)
    frames[:, 30:190] = (144, 72, 17)  # a background, two paddles and a ball
    for frame in frames:
        top = int(rng.integers(40, 170))
        frame[top : top + 16, 140:144] = (92, 186, 92)
        frame[top : top + 4, int(rng.integers(20, 140)) :][:, :2] = 236
    return {
        "frames": frames,
        "noise": rng.integers(0, 255, (8, 210, 160, 3), np.uint8),
        "weights": rng.standard_normal((512, 400)).astype(np.float32),
    }


class Coding(Contender):
    kind = "ours"
    codec = "raw"
    strided = False

    async def open(self) -> None:
        self.stack = contextlib.AsyncExitStack()
        self.client = await self.stack.enter_async_context(aionpredis.connect(self.work.url, codec=self.codec))
        self.arrays = {name: array[:, ::2] if self.strided else array for name, array in arrays().items()}

    async def run(self) -> Sample:
        metrics: dict[str, float] = {}
        moved = 0
        count = self.work.size(COUNT)
        for name, array in self.arrays.items():
            for step in ("set", "get"):
                start = time.perf_counter()
                for _ in range(count):
                    if step == "set":
                        await self.client.set(f"codec:{name}", array)
                    else:
                        self.loaded = await self.client.get(f"codec:{name}")
                metrics[f"{step} {name}"] = count * array.nbytes / (time.perf_counter() - start) / 1e9
            metrics[f"size {name}"] = await self.client.execute("STRLEN", f"codec:{name}") / array.nbytes
            moved += 2 * count * array.nbytes
        return Sample(1, moved, metrics)

    async def check(self) -> None:
        for name, array in self.arrays.items():
            await self.client.set(f"codec:{name}", array)
            assert np.array_equal(await self.client.get(f"codec:{name}"), array)  # type: ignore[arg-type]

    async def close(self) -> None:
        await self.stack.aclose()


class Raw(Coding):
    name = "raw"


class Lz4(Coding):
    name = "lz4"
    needs = "lz4"
    codec = "lz4"


class RawStrided(Raw):
    name = "raw, every second row"
    strided = True


class Lz4Strided(Lz4):
    name = "lz4, every second row"
    strided = True


CASE = Case(
    "codec",
    "Codecs: GB/s of arrays, and stored bytes per byte",
    (Raw, Lz4, RawStrided, Lz4Strided),
    metrics=tuple(f"{what} {name}" for name in ("frames", "noise", "weights") for what in ("set", "get", "size")),
)
