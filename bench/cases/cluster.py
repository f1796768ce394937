"""A cluster of three primaries against one server: the servers share a core, so the point is that nothing is lost.

The keys of every batch are spread over all slots.
"""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np

import aionpredis
from bench import frames, peers
from bench.cases import read, replay, write
from bench.frames import BATCH
from bench.harness import Case, Contender, Ratio, Work


def prepare(work: Work) -> None:
    """Fill the keys that are read, in the cluster and on the one server."""
    with contextlib.ExitStack() as stack:
        for client in (peers.redis_cluster(work.url), peers.redis_sync(work.options["one"])):
            stack.callback(client.close)
            known = frames.frames()
            for start in range(0, frames.COUNT, 200):
                pipeline = client.pipeline()
                for index in range(start, start + 200):
                    frame = known[index % 4]
                    pipeline.set(b"packed:%d" % index, frames.pack(frame))
                    pipeline.set(b"npy:%d" % index, b"".join(aionpredis.formats.npy.encode(frame)))
                pipeline.execute()


class OneServer(Contender):
    """Does the same on one server, over TCP, too."""

    kind = "one"

    def __init__(self, work: Work) -> None:
        super().__init__(Work(work.options["one"], work.quick, work.options))


# --- writing ---------------------------------------------------------------------------------------------------------


class WriteRedis(write.RedisPipeline):
    name = "redis-py RedisCluster pipeline"
    kind = "peer"

    async def open(self) -> None:
        await write.Writing.open(self)
        self.client = peers.redis_cluster(self.work.url)

    async def run(self) -> Any:
        for start in range(0, self.count, frames.PIPELINE):
            pipeline = self.client.pipeline()
            for index in range(start, min(start + frames.PIPELINE, self.count)):
                pipeline.set(self.keys[index], frames.pack(self.frames[index % 4]))
            pipeline.execute()
        return self.sample()

    async def check(self) -> None:
        check_cluster(self)


class WriteRedisAsyncio(write.RedisAsyncioLanes):
    name = "redis.asyncio RedisCluster pipeline x3"

    async def open(self) -> None:
        await write.Writing.open(self)
        self.client = peers.redis_cluster_async(self.work.url)

    async def batch(self, indices: range) -> None:
        pipeline = self.client.pipeline()
        for index in indices:
            pipeline.set(self.keys[index], frames.pack(self.frames[index % 4]))
        await pipeline.execute()

    async def check(self) -> None:
        check_cluster(self)


class WriteCoredis(write.CoredisLanes):
    name = "coredis RedisCluster pipeline x3"

    async def open(self) -> None:
        await write.Writing.open(self)
        self.stack = contextlib.AsyncExitStack()
        self.client = await peers.entered(self.stack, peers.coredis_cluster(self.work.url))

    async def check(self) -> None:
        check_cluster(self)


class WriteGlide(write.GlideLanes):
    name = "valkey-glide cluster batch x3"

    async def open(self) -> None:
        await write.Writing.open(self)
        self.client = await peers.glide_cluster(self.work.url)

    async def batch(self, indices: range) -> None:
        from glide import ClusterBatch

        batch = ClusterBatch(is_atomic=False)
        for index in indices:
            batch.set(self.keys[index], frames.pack(self.frames[index % 4]))
        await self.client.exec(batch, raise_on_error=True)

    async def check(self) -> None:
        check_cluster(self)


class WriteOurs(write.OurWriter):
    name = "aionpredis writer, 3 primaries"

    async def check(self) -> None:
        check_cluster(self)


class WriteOne(OneServer, write.OurWriter):
    name = "aionpredis writer, 1 server"
    kind = "one"


def check_cluster(contender: write.Writing) -> None:
    client = peers.redis_cluster(contender.work.url)
    for index in (0, 1, contender.count // 2, contender.count - 1):
        frames.expect(contender.load(client.get(frames.key(index))), index, contender.frames)
    client.close()


# --- reading ---------------------------------------------------------------------------------------------------------


class ReadRedis(read.Reading):
    name = "redis-py RedisCluster mget_nonatomic + stack"
    kind = "peer"

    async def open(self) -> None:
        await super().open()
        self.client = peers.redis_cluster(self.work.url)

    async def batch(self, keys: list[bytes]) -> Any:
        return np.stack([frames.unpack(value) for value in self.client.mget_nonatomic(keys)])


class ReadRedisAsyncio(read.RedisAsyncio):
    name = "redis.asyncio RedisCluster pipeline + stack"

    async def open(self) -> None:
        await read.Reading.open(self)
        self.client = peers.redis_cluster_async(self.work.url)

    async def batch(self, keys: list[bytes]) -> Any:
        pipeline = self.client.pipeline()
        for key in keys:
            pipeline.get(key)
        return np.stack([frames.unpack(value) for value in await pipeline.execute()])


class ReadCoredis(read.Coredis):
    name = "coredis RedisCluster pipeline + stack"

    async def open(self) -> None:
        await read.Reading.open(self)
        self.stack = contextlib.AsyncExitStack()
        self.client = await peers.entered(self.stack, peers.coredis_cluster(self.work.url))

    async def batch(self, keys: list[bytes]) -> Any:
        async with self.client.pipeline(transaction=False) as pipeline:
            values = [pipeline.get(key) for key in keys]
        return np.stack([frames.unpack(await value) for value in values])


class ReadGlide(read.Glide):
    name = "valkey-glide cluster MGET + stack"

    async def open(self) -> None:
        await read.Reading.open(self)
        self.client = await peers.glide_cluster(self.work.url)


class ReadOurs(read.OurMgetOut):
    name = "aionpredis mget(out=), 3 primaries"


class ReadOne(OneServer, read.OurMgetOut):
    name = "aionpredis mget(out=), 1 server"
    kind = "one"


# --- the replay ------------------------------------------------------------------------------------------------------


class Append(replay.Append):
    name = "append, 2 processes, 3 primaries"
    replay_name = "append-2"
    processes = 2


class AppendOne(OneServer, Append):
    name = "append, 2 processes, 1 server"
    kind = "one"


class Epoch(replay.Epoch):
    name = "epoch, 3 primaries"


class EpochOne(OneServer, replay.Epoch):
    name = "epoch, 1 server"
    kind = "one"


class SampleChunk16(replay.SampleChunk16):
    name = "sample, chunk 16, 3 primaries"


class SampleChunk16One(OneServer, replay.SampleChunk16):
    name = "sample, chunk 16, 1 server"
    kind = "one"


def no_loss(key: str, ours: str, one: str, cpu: str = "cpu") -> tuple[Ratio, Ratio]:
    return (
        Ratio(f"{key}_3_primaries_vs_1", ours, one, ">= 0.9"),
        Ratio(f"{key}_cpu_3_primaries_vs_1", ours, one, "<= 1.15", metric=cpu),
    )


WRITE = Case(
    "cluster-write",
    "One key per array, over 3 primaries that share a core",
    (WriteRedis, WriteRedisAsyncio, WriteCoredis, WriteGlide, WriteOurs, WriteOne),
    (
        *no_loss("write", WriteOurs.name, WriteOne.name),
        Ratio("cluster_write_vs_best_peer", WriteOurs.name, "peer", ">= 2"),
    ),
)

READ = Case(
    "cluster-read",
    f"Random keys into a ({BATCH}, 80, 80) batch, from 3 primaries that share a core",
    (ReadRedis, ReadRedisAsyncio, ReadCoredis, ReadGlide, ReadOurs, ReadOne),
    (
        *no_loss("read", ReadOurs.name, ReadOne.name),
        Ratio("cluster_read_vs_best_peer", ReadOurs.name, "peer", ">= 2"),
    ),
    prepare=prepare,
)

REPLAY = Case(
    "cluster-replay",
    "Replay over 3 primaries that share a core: chunks of 16 transitions, 80x80 uint16 states",
    (Append, AppendOne, Epoch, EpochOne, SampleChunk16, SampleChunk16One),
    (
        *no_loss("append", Append.name, AppendOne.name, "actor_cpu"),
        *no_loss("epoch", Epoch.name, EpochOne.name),
        *no_loss("sample", SampleChunk16.name, SampleChunk16One.name),
    ),
)
