"""A replay on a cluster while its servers fail, are replaced, and hand slots over."""

from __future__ import annotations

import warnings
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import anyio
import anyio.to_thread
import numpy as np
import pytest

import aionpredis
from aionpredis import Batches, Client, Replay, Run

from .cluster import Cluster, slot_of
from .nodes import Node
from .replays import replay_of

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(90)]

LOG = slot_of("{r}:log")
ACTORS = 3
EACH = 1_000_000
"""More transitions than an actor appends."""


def data_server(cluster: Cluster) -> Node:
    """One that has data, but not the log."""
    return next(node for node in cluster.primaries() if node is not cluster.owner(LOG))


class World:
    """Actors that append, a follower and a sampler, each with a client of its own."""

    def __init__(self, cluster: Cluster, client: Client, replicas: int) -> None:
        self.cluster = cluster
        self.client = client
        self.replay = self.replay_of(client, replicas)
        self.run: Run
        self.appended = [0] * ACTORS
        self.acknowledged = 0
        self.followed: list[int] = []
        self.follower: Batches
        self.samples = 0
        self.lost = 0
        self._replicas = replicas
        self._stop = anyio.Event()
        self._all_appended = anyio.Event()
        self._left = ACTORS

    def replay_of(self, client: Client, replicas: int = 0) -> Replay:
        return replay_of(client, lease=2.0)

    async def go_on(self, count: int = 400) -> None:
        """Until each actor has appended so many more, and the others have read."""
        aims = [appended + count for appended in self.appended]
        samples = self.samples
        with anyio.fail_after(30):
            while any(now < aim for now, aim in zip(self.appended, aims, strict=True)) or samples == self.samples:
                await anyio.sleep(0.01)

    async def act(self, number: int) -> None:
        async with aionpredis.connect(self.cluster.url) as client:
            async with self.replay_of(client, self._replicas).actor() as actor:
                await actor.join()
                while not self._stop.is_set() or self.appended[number] % 4:
                    uid = number * EACH + self.appended[number]
                    await actor.append(state=np.full(3, uid % 256, np.uint8), uid=uid, terminated=uid % 10 == 9)
                    self.appended[number] += 1
                    if not self.appended[number] % 4:
                        await anyio.sleep(0.001)
            assert actor.stats.acknowledged == self.appended[number]
            self.acknowledged += actor.stats.acknowledged
        self._left -= 1

    async def follow(self) -> None:
        async with aionpredis.connect(self.cluster.url) as client:
            self.follower = await self.replay_of(client).follow(self.run, batch=32)
            async for batch in self.follower:
                assert (batch["state"] == (batch["uid"] % 256)[:, None]).all()
                self.followed += batch["uid"].tolist()

    async def sample(self) -> None:
        async with aionpredis.connect(self.cluster.url) as client:
            sampler = await self.replay_of(client).sampler(self.run, batch=32)
            while not self._stop.is_set():
                columns = await sampler.sample()
                assert (columns["state"] == (columns["uid"] % 256)[:, None]).all()
                self.samples += 1
                await anyio.sleep(0.005)

    async def end(self) -> None:
        """Everybody stops; what was appended is committed."""
        self._stop.set()
        with anyio.fail_after(40):
            while self._left:
                await anyio.sleep(0.01)

    async def read_all(self) -> list[int]:
        """What an epoch finds; it says how many are lost."""
        reader = await self.replay.epoch(self.run, batch=64)
        found = [uid async for batch in reader for uid in batch["uid"].tolist()]
        assert not reader.stats.evicted
        self.lost = 4 * (reader.stats.missing + reader.stats.gaps)
        return found


@asynccontextmanager
async def world(cluster: Cluster, replicas: int = 0) -> AsyncIterator[World]:
    async with aionpredis.connect(cluster.url) as client:
        here = World(cluster, client, replicas)
        here.run = await here.replay.begin_run()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "chunk .* is in the log, but not on the server", RuntimeWarning)
            async with anyio.create_task_group() as tasks:
                for number in range(ACTORS):
                    tasks.start_soon(here.act, number)
                tasks.start_soon(here.sample)
                tasks.start_soon(here.follow)
                await here.go_on()
                yield here
                await here.end()
                found = await here.read_all()
                assert len(found) == len({*found})
                appended = {number * EACH + index for number in range(ACTORS) for index in range(here.appended[number])}
                assert {*found} <= appended
                assert len(found) + here.lost == here.acknowledged == len(appended)
                # The follower may have read what was lost afterwards.
                await here.replay.begin_run(keep=2)
            assert len(here.followed) == len({*here.followed})
            assert {*found} <= {*here.followed} <= appended


Fault = Callable[[Cluster], object]

KILLED: dict[str, Fault] = {
    "log": lambda cluster: cluster.failover(LOG),
    "data": lambda cluster: cluster.failover(data_server(cluster)),
}
PLANNED: dict[str, Fault] = {
    "log": lambda cluster: cluster.failover(LOG, graceful=True),
    "data": lambda cluster: cluster.failover(data_server(cluster), graceful=True),
    "slots": lambda cluster: cluster.move_slots(cluster.owner(LOG), data_server(cluster), 100),
    "the log's slot": lambda cluster: cluster.migrate(LOG, data_server(cluster)),
}


@pytest.mark.parametrize("who", KILLED)
async def test_what_a_killed_primary_has_lost_is_counted(cluster: Cluster, who: str) -> None:
    """And nothing is read twice, or after it was lost."""
    async with world(cluster) as here:
        await anyio.to_thread.run_sync(KILLED[who], cluster)
        await here.go_on()


@pytest.mark.parametrize("what", PLANNED)
async def test_nothing_is_lost_when_slots_go_to_another_server(cluster: Cluster, what: str) -> None:
    async with world(cluster) as here:
        await anyio.to_thread.run_sync(PLANNED[what], cluster)
        await here.go_on()
    assert here.lost == 0
