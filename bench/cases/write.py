"""One key per array: 80x80 uint16, 20,000 keys that exist already."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import anyio

import aionpredis
from bench import frames, peers
from bench.ceilings import CClient, SocketPair
from bench.frames import COUNT, NBYTES, PIPELINE
from bench.harness import Case, Contender, Ratio, Sample


class Writing(Contender):
    """Writes the frames; :meth:`check` reads some of them back with stock redis-py."""

    async def open(self) -> None:
        self.frames = frames.frames()
        self.count = self.work.size(COUNT)
        self.keys = [frames.key(index) for index in range(self.count)]  # their making is not what is compared

    def sample(self) -> Sample:
        return Sample(self.count, self.count * NBYTES)

    def load(self, value: bytes) -> Any:
        return frames.unpack(value)

    async def check(self) -> None:
        client = peers.redis_sync(self.work.url)
        for index in (0, 1, self.count // 2, self.count - 1):
            value = client.get(frames.key(index))
            assert isinstance(value, bytes)
            frames.expect(self.load(value), index, self.frames)
        client.close()


class Recipe(Writing):
    name = "recipe: set(pack(shape) + tobytes())"
    kind = "recipe"

    async def open(self) -> None:
        await super().open()
        self.client = peers.redis_sync(self.work.url)

    async def run(self) -> Sample:
        for index in range(self.count):
            self.client.set(self.keys[index], frames.pack(self.frames[index % 4]))
        return self.sample()


class RedisPipeline(Recipe):
    name = "redis-py pipeline"
    kind = "sequential"

    async def run(self) -> Sample:
        for start in range(0, self.count, PIPELINE):
            pipeline = self.client.pipeline(transaction=False)
            for index in range(start, min(start + PIPELINE, self.count)):
                pipeline.set(self.keys[index], frames.pack(self.frames[index % 4]))
            pipeline.execute()
        return self.sample()


class AsyncPeer(Writing):
    """Pipelines of 64; ``lanes`` of them in flight."""

    lanes = 1

    async def batch(self, indices: range) -> None:
        raise NotImplementedError

    async def run(self) -> Sample:
        starts = iter(range(0, self.count, PIPELINE))

        async def lane() -> None:
            for start in starts:
                await self.batch(range(start, min(start + PIPELINE, self.count)))

        await asyncio.gather(*(lane() for _ in range(self.lanes)))
        return self.sample()


class RedisAsyncio(AsyncPeer):
    name = "redis.asyncio pipeline"
    kind = "sequential"

    async def open(self) -> None:
        await super().open()
        self.client = peers.redis_async(self.work.url)

    async def batch(self, indices: range) -> None:
        pipeline = self.client.pipeline(transaction=False)
        for index in indices:
            pipeline.set(self.keys[index], frames.pack(self.frames[index % 4]))
        await pipeline.execute()

    async def close(self) -> None:
        await self.client.aclose()


class RedisAsyncioLanes(RedisAsyncio):
    name = "redis.asyncio pipeline x3"
    kind = "peer"
    lanes = 3


class Coredis(AsyncPeer):
    name = "coredis pipeline"
    kind = "sequential"
    needs = "coredis"

    async def open(self) -> None:
        await super().open()
        self.stack = contextlib.AsyncExitStack()
        self.client = peers.coredis(self.work.url)
        if hasattr(self.client, "__aenter__"):
            await self.stack.enter_async_context(self.client)

    async def batch(self, indices: range) -> None:
        async with self.client.pipeline(transaction=False) as pipeline:
            for index in indices:
                pipeline.set(self.keys[index], frames.pack(self.frames[index % 4]))

    async def close(self) -> None:
        await self.stack.aclose()


class CoredisLanes(Coredis):
    name = "coredis pipeline x3"
    kind = "peer"
    lanes = 3


class Glide(AsyncPeer):
    name = "valkey-glide batch"
    kind = "sequential"
    needs = "glide"

    async def open(self) -> None:
        await super().open()
        self.client = await peers.glide(self.work.url)

    async def batch(self, indices: range) -> None:
        from glide import Batch

        batch = Batch(is_atomic=False)
        for index in indices:
            batch.set(self.keys[index], frames.pack(self.frames[index % 4]))
        await self.client.exec(batch, raise_on_error=True)

    async def close(self) -> None:
        await self.client.close()


class GlideLanes(Glide):
    name = "valkey-glide batch x3"
    kind = "peer"
    lanes = 3


class Ours(Writing):
    kind = "ours"

    async def open(self) -> None:
        await super().open()
        self.stack = contextlib.AsyncExitStack()
        self.client = await self.stack.enter_async_context(aionpredis.connect(self.work.url))

    def load(self, value: bytes) -> Any:
        import io

        import numpy as np

        return np.load(io.BytesIO(value))

    async def close(self) -> None:
        await self.stack.aclose()


class OurSet(Ours):
    name = "aionpredis set, 64 tasks"

    async def run(self) -> Sample:
        indices = iter(range(self.count))

        async def task() -> None:
            for index in indices:
                await self.client.set(self.keys[index], self.frames[index % 4])

        async with anyio.create_task_group() as tasks:
            for _ in range(64):
                tasks.start_soon(task)
        return self.sample()


class OurWriter(Ours):
    name = "aionpredis writer"
    copy = True

    async def run(self) -> Sample:
        async with self.client.writer(copy=self.copy) as writer:
            for index in range(self.count):
                await writer.put(self.keys[index], self.frames[index % 4])
        return self.sample()


class OurWriterBorrowing(OurWriter):
    name = "aionpredis writer, copy=False"
    copy = False


class OurActor(Ours):
    """Transitions in chunks of 16, each chunk SET with a lease, committed to the log and kept."""

    name = "aionpredis actor"

    async def open(self) -> None:
        await super().open()
        schema = aionpredis.Schema(state=("uint16", (80, 80)), action="int64", reward="float32", terminated="bool")
        self.replay = self.client.replay("bench-write", schema)
        self.run_ = await self.replay.begin_run()
        self.actor = await self.stack.enter_async_context(self.replay.actor())
        await self.actor.join()

    async def run(self) -> Sample:
        # Each round is a run of its own, so that the data of the last one is freed, as in real use.
        self.run_ = await self.replay.begin_run(keep=1)
        await self.actor.join()
        append = self.actor.append
        for index in range(self.count):
            await append(state=self.frames[index % 4], action=index, reward=1.0, terminated=False)
        await self.actor.flush()
        return self.sample()

    async def check(self) -> None:
        seen = 0
        async for batch in await self.replay.epoch(self.run_):
            seen += len(batch["action"])
            for state, action in zip(batch["state"], batch["action"], strict=True):
                frames.expect(state, int(action), self.frames)
        assert seen == self.count


class CWrite(CClient):
    command = "set"
    count = COUNT
    nbytes = NBYTES


class CWrite1(CWrite):
    name = "redis-benchmark -c 1"
    connections = 1


class CWrite2(CWrite):
    name = "redis-benchmark -c 2"
    connections = 2


class CWrite4(CWrite):
    name = "redis-benchmark -c 4"
    connections = 4


class Ceiling(SocketPair):
    receives = False
    size = NBYTES
    count = COUNT


CASE = Case(
    "write",
    "One key per array, 80x80 uint16, overwritten",
    (
        Recipe,
        RedisPipeline,
        RedisAsyncio,
        RedisAsyncioLanes,
        Coredis,
        CoredisLanes,
        Glide,
        GlideLanes,
        OurSet,
        OurWriter,
        OurWriterBorrowing,
        OurActor,
        CWrite1,
        CWrite2,
        CWrite4,
        Ceiling,
    ),
    (
        Ratio("write_vs_recipe", OurWriter.name, "recipe", ">= 15"),
        Ratio("write_vs_best_python_peer", OurWriter.name, "peer", ">= 1.8"),
        Ratio("write_vs_best_python_peer_sequential", OurWriter.name, "sequential", ">= 2.8"),
        Ratio("write_vs_c_client", OurWriter.name, "c", ">= 0.95"),
        Ratio("append_vs_c_client", OurActor.name, "c", ">= 1.1"),
    ),
)
