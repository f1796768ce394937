"""The replay: appending from several processes, reading epochs, following, all in chunks of 16 transitions of ~12.8 kB."""

from __future__ import annotations

import contextlib
import multiprocessing
import time
from multiprocessing.connection import Connection
from typing import Any, ClassVar

import anyio

import aionpredis
from bench import frames
from bench.cases.read import BATCHES, Coredis, CRead1, CRead2, CRead4, Glide, RedisAsyncio, RedisMget
from bench.cases.read import prepare as fill_keys
from bench.ceilings import SocketPair
from bench.frames import BATCH, COUNT, NBYTES
from bench.harness import Case, Contender, Ratio, Sample

CHUNK = 16


SCHEMA = aionpredis.Schema(state=("uint16", (80, 80)), action="int64", reward="float32", terminated="bool")


def make_replay(client: aionpredis.Client, name: str, chunk: int = CHUNK) -> aionpredis.Replay:
    return client.replay(f"bench-{name}", SCHEMA, chunk=chunk)


async def append_all(actor: aionpredis.Actor, count: int, first: int = 0) -> None:
    known = frames.frames()
    append = actor.append
    for index in range(first, first + count):
        await append(state=known[index % 4], action=index, reward=1.0, terminated=False)
    await actor.flush()


class Replaying(Contender):
    kind = "ours"
    replay_name: ClassVar[str]

    async def open(self) -> None:
        self.count = self.work.size(COUNT)
        self.frames = frames.frames()
        self.stack = contextlib.AsyncExitStack()
        self.client = await self.stack.enter_async_context(aionpredis.connect(self.work.url))
        self.replay = make_replay(self.client, self.replay_name)
        self.run_ = await self.replay.begin_run()

    def sample(self) -> Sample:
        return Sample(self.count, self.count * NBYTES)

    async def check(self) -> None:
        """Every transition once, and as it was appended."""
        seen: set[int] = set()
        async for batch in await self.replay.epoch(self.run_, batch=BATCH):
            for state, action in zip(batch["state"], batch["action"], strict=True):
                frames.expect(state, int(action), self.frames)
                seen.add(int(action))
        assert len(seen) == self.count

    async def close(self) -> None:
        await self.stack.aclose()


def _append_process(pipe: Connection, url: str, name: str) -> None:
    async def main() -> None:
        async with aionpredis.connect(url) as client, make_replay(client, name).actor() as actor:
            while (order := pipe.recv()) is not None:
                first, count = order
                await actor.join()
                pipe.send(None)
                pipe.recv()  # all are ready
                cpu = time.process_time()
                await append_all(actor, count, first)
                pipe.send(time.process_time() - cpu)

    aionpredis.run(main)


class Append(Replaying):
    """Actors in ``processes`` processes of their own."""

    own_core = False
    processes: ClassVar[int]

    async def open(self) -> None:
        await super().open()
        context = multiprocessing.get_context("spawn")
        self.pipes: list[Connection] = []
        self.children: list[Any] = []
        for _ in range(self.processes):
            mine, theirs = context.Pipe()
            child = context.Process(target=_append_process, args=(theirs, self.work.url, self.replay.name[6:]))
            child.start()
            self.pipes.append(mine)
            self.children.append(child)

    async def run(self) -> Sample:
        self.run_ = await self.replay.begin_run()
        share = self.count // self.processes
        self.count = share * self.processes
        for index, pipe in enumerate(self.pipes):
            pipe.send((index * share, share))
        for pipe in self.pipes:
            pipe.recv()
        start = time.perf_counter()
        for pipe in self.pipes:
            pipe.send(None)
        cpu = sum(pipe.recv() for pipe in self.pipes)
        sample = self.sample()
        sample.metrics["actor_cpu"] = cpu / self.count
        sample.seconds = time.perf_counter() - start
        return sample

    async def close(self) -> None:
        for pipe in self.pipes:
            pipe.send(None)
        for child in self.children:
            child.join(5)
        await super().close()


class Append1(Append):
    name = "append, 1 process"
    replay_name = "append-1"
    processes = 1


class Append2(Append):
    name = "append, 2 processes"
    replay_name = "append-2"
    processes = 2


class Append4(Append):
    name = "append, 4 processes"
    replay_name = "append-4"
    processes = 4


class Epoch(Replaying):
    """Shuffled batches of 256."""

    name = "epoch"
    replay_name = "epoch"

    async def open(self) -> None:
        await super().open()
        async with self.replay.actor() as actor:
            await actor.join()
            await append_all(actor, self.count)

    async def run(self) -> Sample:
        seen = 0
        async for batch in await self.replay.epoch(self.run_, batch=BATCH):
            seen += len(batch["action"])
        assert seen == self.count
        return self.sample()


class Follow(Replaying):
    """An actor appends and a learner follows, in one process."""

    name = "follow while appending"
    replay_name = "follow"

    async def run(self) -> Sample:
        self.run_ = await self.replay.begin_run()
        async with self.replay.actor() as actor, anyio.create_task_group() as tasks:
            await actor.join()
            tasks.start_soon(append_all, actor, self.count)
            seen = 0
            async for batch in await self.replay.follow(self.run_, batch=BATCH, drop_last=True):
                seen += len(batch["action"])
                if seen + BATCH > self.count:
                    break
        return self.sample()


class Sampling(Replaying):
    """Batches of 256 transitions, each drawn on its own; the peers draw keys for them beforehand."""

    chunk: ClassVar[int]

    async def open(self) -> None:
        await super().open()
        self.batches = self.work.size(BATCHES)
        self.replay = make_replay(self.client, self.replay_name, self.chunk)
        self.run_ = await self.replay.begin_run()
        async with self.replay.actor() as actor:
            await actor.join()
            await append_all(actor, self.count)
        self.sampler = await self.replay.sampler(self.run_, batch=BATCH, seed=1)

    async def run(self) -> Sample:
        for _ in range(self.batches):
            self.last = await self.sampler.sample()
        return Sample(self.batches * BATCH, self.batches * BATCH * NBYTES)

    async def check(self) -> None:
        for state, action in zip(self.last["state"], self.last["action"], strict=True):
            frames.expect(state, int(action), self.frames)


class SampleChunk16(Sampling):
    name = "sample, chunk 16"
    replay_name = "sample-16"
    chunk = 16


class SampleChunk1(Sampling):
    name = "sample, chunk 1"
    replay_name = "sample-1"
    chunk = 1


class SamplePrioritized(Sampling):
    name = "sample, chunk 1, prioritized"
    replay_name = "sample-per"
    chunk = 1

    async def open(self) -> None:
        await super().open()
        selection = aionpredis.Prioritized()
        self.sampler = await self.replay.sampler(self.run_, batch=BATCH, selection=selection, seed=1)

    async def run(self) -> Sample:
        for _ in range(self.batches):
            self.last = await self.sampler.sample()
            self.sampler.update_priorities(self.last.ids, self.last["reward"])
        return Sample(self.batches * BATCH, self.batches * BATCH * NBYTES)


class DrawChunks16(Sampling):
    """Whole chunks."""

    name = "draw_chunks, chunk 16"
    replay_name = "draw-16"
    chunk = 16

    async def run(self) -> Sample:
        left = self.batches
        async for batch in await self.replay.draw_chunks(self.run_, batch=BATCH):
            self.last = aionpredis.Sample(batch)
            left -= 1
            if not left:
                break
        return Sample(self.batches * BATCH, self.batches * BATCH * NBYTES)


class Ceiling(SocketPair):
    name = "socketpair, 205 kB"
    receives = True
    size = CHUNK * NBYTES
    count = COUNT // CHUNK

    async def run(self) -> Sample:
        sample = await super().run()
        sample.units *= CHUNK
        return sample


CASE = Case(
    "replay",
    "Replay: chunks of 16 transitions, 80x80 uint16 states",
    (
        Append1,
        Append2,
        Append4,
        Epoch,
        Follow,
        SampleChunk16,
        SampleChunk1,
        SamplePrioritized,
        DrawChunks16,
        RedisMget,
        RedisAsyncio,
        Coredis,
        Glide,
        CRead1,
        CRead2,
        CRead4,
        Ceiling,
    ),
    (
        Ratio("sample_chunk_16_vs_best_python_peer", DrawChunks16.name, "peer", ">= 3"),
        Ratio("sample_chunk_1_vs_best_python_peer", SampleChunk1.name, "peer", ">= 2"),
        Ratio("prioritized_vs_uniform", SamplePrioritized.name, SampleChunk1.name, ">= 0.8"),
        Ratio("epoch_vs_c_client", Epoch.name, "c", ">= 1.3"),
        Ratio("epoch_vs_socket_ceiling", Epoch.name, "socket", ">= 0.65", metric="bytes"),
    ),
    prepare=fill_keys,
)
