"""With and without async: the same work, µs each. Both threads of the blocking one share the contenders' core."""

from __future__ import annotations

import contextlib
import time

import numpy as np

import aionpredis
import aionpredis.blocking
from bench import frames
from bench.cases.replay import CHUNK, SCHEMA, append_all, make_replay
from bench.frames import BATCH, COUNT
from bench.harness import Case, Contender, Ratio, Sample

CALLS = 1000
METRICS = ("get", "put", "mget of 256", "append", "batch of epoch", "batch of 8")


class Timed(Contender):
    """Writes ``self.count`` arrays by ``put``, then by ``append``, and reads them again."""

    async def open(self) -> None:
        self.count = self.work.size(COUNT)
        self.keys = [frames.key(index) for index in range(max(self.count, BATCH))]
        self.frames = frames.frames()
        self.out = np.empty((BATCH, *frames.SHAPE), frames.DTYPE)

    seen: int
    """Transitions that were read."""

    def begin(self) -> None:
        self.metrics: dict[str, float] = {}
        self.start = time.perf_counter()

    def lap(self, metric: str, count: int) -> None:
        now = time.perf_counter()
        self.metrics[metric] = 1e6 * (now - self.start) / count
        self.start = time.perf_counter()

    def sample(self) -> Sample:
        return Sample(self.count, self.count * frames.NBYTES, self.metrics)

    async def check(self) -> None:
        for index in range(BATCH):
            frames.expect(self.out[index], index, self.frames)
        assert self.seen == 2 * self.count


class Async(Timed):
    name = "async"
    kind = "async"

    async def open(self) -> None:
        await super().open()
        self.stack = contextlib.AsyncExitStack()
        self.client = await self.stack.enter_async_context(aionpredis.connect(self.work.url))
        self.replay = make_replay(self.client, "async")

    async def run(self) -> Sample:
        calls, batches, self.seen = self.work.size(CALLS), self.work.size(CALLS) // 10, 0
        self.begin()
        async with self.client.writer() as writer:
            for index, key in enumerate(self.keys):
                await writer.put(key, self.frames[index % 4])
        self.lap("put", len(self.keys))
        for _ in range(calls):
            await self.client.get(self.keys[0])
        self.lap("get", calls)
        for _ in range(batches):
            await self.client.mget(self.keys[:BATCH], out=self.out)
        self.lap("mget of 256", batches)
        run = await self.replay.begin_run()
        async with self.replay.actor() as actor:
            await actor.join()
            self.start = time.perf_counter()
            await append_all(actor, self.count)
        self.lap("append", self.count)
        for size, metric in ((BATCH, "batch of epoch"), (8, "batch of 8")):
            async for batch in await self.replay.epoch(run, batch=size):
                self.seen += len(batch["action"])
            self.lap(metric, self.count // size)
        return self.sample()

    async def close(self) -> None:
        await self.stack.aclose()


class Blocking(Timed):
    name = "blocking"
    kind = "blocking"

    async def open(self) -> None:
        await super().open()
        self.client = aionpredis.blocking.connect(self.work.url)
        self.replay = self.client.replay("bench-blocking", SCHEMA, chunk=CHUNK)

    async def run(self) -> Sample:
        calls, batches, self.seen = self.work.size(CALLS), self.work.size(CALLS) // 10, 0
        self.begin()
        with self.client.writer() as writer:
            for index, key in enumerate(self.keys):
                writer.put(key, self.frames[index % 4])
        self.lap("put", len(self.keys))
        for _ in range(calls):
            self.client.get(self.keys[0])
        self.lap("get", calls)
        for _ in range(batches):
            self.client.mget(self.keys[:BATCH], out=self.out)
        self.lap("mget of 256", batches)
        run = self.replay.begin_run()
        with self.replay.actor() as actor:
            actor.join()
            self.start = time.perf_counter()
            append = actor.append
            for index in range(self.count):
                append(state=self.frames[index % 4], action=index, reward=1.0, terminated=False)
        self.lap("append", self.count)
        for size, metric in ((BATCH, "batch of epoch"), (8, "batch of 8")):
            for batch in self.replay.epoch(run, batch=size):
                self.seen += len(batch["action"])
            self.lap(metric, self.count // size)
        return self.sample()

    async def close(self) -> None:
        self.client.close()


CASE = Case(
    "blocking",
    "Without async, µs",
    (Async, Blocking),
    tuple(
        Ratio(f"blocking_{metric.replace(' ', '_')}", "blocking", "async", target, metric, smaller_is_better=True)
        for metric, target in zip(METRICS, ("<= 2", "<= 2", "<= 1.1", "<= 1.3", "<= 1.1", "<= 1.5"), strict=True)
    ),
    metrics=METRICS,
)
