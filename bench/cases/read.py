"""Random keys into a (256, 80, 80) batch."""

from __future__ import annotations

import contextlib
import random
from typing import Any

import numpy as np

import aionpredis
from bench import frames, peers
from bench.ceilings import CClient, SocketPair
from bench.frames import BATCH, COUNT, NBYTES
from bench.harness import Case, Contender, Ratio, Sample, Work

BATCHES = 80


def prepare(work: Work) -> None:
    """Fill the keys, each format under keys of its own; and those that redis-benchmark asks for."""
    client = peers.redis_sync(work.url)
    known = frames.frames()
    for start in range(0, COUNT, 200):
        pipeline = client.pipeline(transaction=False)
        for index in range(start, start + 200):
            frame = known[index % 4]
            pipeline.set(b"packed:%d" % index, frames.pack(frame))
            pipeline.set(b"npy:%d" % index, b"".join(aionpredis.formats.npy.encode(frame)))
            pipeline.set(f"key:{index:012d}", frame.tobytes())
        pipeline.execute()
    client.close()


class Reading(Contender):
    prefix = b"packed:"

    async def open(self) -> None:
        self.frames = frames.frames()
        self.batches = self.work.size(BATCHES)
        rng = random.Random(5)
        self.draws = [rng.sample(range(COUNT), BATCH) for _ in range(self.batches)]  # not timed: all do the same
        self.keys = [[b"%b%d" % (self.prefix, index) for index in draw] for draw in self.draws]

    async def batch(self, keys: list[bytes]) -> Any:
        raise NotImplementedError

    async def run(self) -> Sample:
        for keys in self.keys:
            self.last = await self.batch(keys)
        return Sample(self.batches * BATCH, self.batches * BATCH * NBYTES)

    async def check(self) -> None:
        assert self.last.shape == (BATCH, *frames.SHAPE)
        for index, frame in zip(self.draws[-1], self.last, strict=True):
            frames.expect(frame, index, self.frames)


class Recipe(Reading):
    name = "recipe: frombuffer(get())"
    kind = "recipe"

    async def open(self) -> None:
        await super().open()
        self.client = peers.redis_sync(self.work.url)

    async def batch(self, keys: list[bytes]) -> Any:
        return np.stack([frames.unpack(self.client.get(key)) for key in keys])  # type: ignore[arg-type]


class RedisMget(Recipe):
    name = "redis-py MGET + stack"
    kind = "peer"

    async def batch(self, keys: list[bytes]) -> Any:
        return np.stack([frames.unpack(value) for value in self.client.mget(keys)])  # type: ignore[arg-type]


class RedisAsyncio(Reading):
    name = "redis.asyncio MGET + stack"

    async def open(self) -> None:
        await super().open()
        self.client = peers.redis_async(self.work.url)

    async def batch(self, keys: list[bytes]) -> Any:
        return np.stack([frames.unpack(value) for value in await self.client.mget(keys)])

    async def close(self) -> None:
        await self.client.aclose()


class Coredis(Reading):
    name = "coredis MGET + stack"
    needs = "coredis"

    async def open(self) -> None:
        await super().open()
        self.stack = contextlib.AsyncExitStack()
        self.client = peers.coredis(self.work.url)
        if hasattr(self.client, "__aenter__"):
            await self.stack.enter_async_context(self.client)

    async def batch(self, keys: list[bytes]) -> Any:
        return np.stack([frames.unpack(value) for value in await self.client.mget(keys)])

    async def close(self) -> None:
        await self.stack.aclose()


class Glide(Reading):
    name = "valkey-glide MGET + stack"
    needs = "glide"

    async def open(self) -> None:
        await super().open()
        self.client = await peers.glide(self.work.url)

    async def batch(self, keys: list[bytes]) -> Any:
        return np.stack([frames.unpack(value) for value in await self.client.mget(keys)])

    async def close(self) -> None:
        await self.client.close()


class Ours(Reading):
    kind = "ours"
    prefix = b"npy:"

    async def open(self) -> None:
        await super().open()
        self.stack = contextlib.AsyncExitStack()
        self.client = await self.stack.enter_async_context(aionpredis.connect(self.work.url))
        self.out = np.empty((BATCH, *frames.SHAPE), frames.DTYPE)

    async def close(self) -> None:
        await self.stack.aclose()


class OurMget(Ours):
    name = "aionpredis mget + stack"

    async def batch(self, keys: list[bytes]) -> Any:
        return np.stack(await self.client.mget(keys))


class OurMgetOut(Ours):
    name = "aionpredis mget(out=)"

    async def batch(self, keys: list[bytes]) -> Any:
        assert (await self.client.mget(keys, out=self.out)).all()
        return self.out


class CRead(CClient):
    command = "get"
    count = COUNT
    nbytes = NBYTES


class CRead1(CRead):
    name = "redis-benchmark -c 1"
    connections = 1


class CRead2(CRead):
    name = "redis-benchmark -c 2"
    connections = 2


class CRead4(CRead):
    name = "redis-benchmark -c 4"
    connections = 4


class Ceiling(SocketPair):
    receives = True
    size = NBYTES
    count = COUNT


CASE = Case(
    "read",
    "Random keys into a (256, 80, 80) batch",
    (Recipe, RedisMget, RedisAsyncio, Coredis, Glide, OurMget, OurMgetOut, CRead1, CRead2, CRead4, Ceiling),
    (
        Ratio("read_vs_recipe", OurMgetOut.name, "recipe", ">= 22"),
        Ratio("read_vs_best_python_peer", OurMgetOut.name, "peer", ">= 2.3"),
        Ratio("read_vs_c_client", OurMgetOut.name, "c", ">= 0.85"),
    ),
    prepare=prepare,
)
