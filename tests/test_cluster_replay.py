"""A replay on a cluster while its servers fail, are replaced, and hand slots over."""

from __future__ import annotations

import itertools
import time
import warnings
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager
from pathlib import Path

import anyio
import anyio.to_thread
import numpy as np
import pytest

import aionpredis
from aionpredis import Batches, Client, NotReplicated, Replay, Run, UsageError

from .cluster import PATIENT, Cluster, slot_of
from .nodes import Node, wait
from .replays import SCHEMA, fill, replay_of, unnamed_without_ttl
from .stock import stock_of

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(90), pytest.mark.one_loop("they wait for failovers")]

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
        self.incarnations = [b""] * ACTORS
        self.followed: list[int] = []
        self.follower: Batches
        self.samples = 0
        self.lost = 0
        self.lost_keys: set[str] = set()
        self._replicas = replicas
        self._stop = anyio.Event()
        self._all_appended = anyio.Event()
        self._left = ACTORS

    def replay_of(self, client: Client, replicas: int = 0) -> Replay:
        return client.replay("r", SCHEMA, chunk=4, lease=2.0, replicas=replicas)

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
                self.incarnations[number] = actor.incarnation
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

    def key(self, uid: int) -> str:
        """Of its chunk."""
        number, index = divmod(uid, EACH)
        return f"r:{self.run.run}:{self.incarnations[number].hex()}:{index // 4}"

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
                here.lost_keys = {here.key(uid) for uid in appended - {*found}}
                # The follower may have read what was lost afterwards.
                await here.replay.begin_run(keep=2)
            assert len(here.followed) == len({*here.followed})
            assert {*found} <= {*here.followed} <= appended


Fault = Callable[[Cluster], object]


@contextmanager
def behind(cluster: Cluster, primary: Node) -> Iterator[Node]:
    """Its replica misses what it does meanwhile."""
    (replica,) = cluster.replicas(primary)
    replica.call("CONFIG", "SET", "masterauth", "refused")
    try:
        primary.call("CLIENT", "KILL", "TYPE", "replica")
        yield replica
    finally:
        replica.call("CONFIG", "SET", "masterauth", "")


def replace(cluster: Cluster, primary: Node, replica: Node) -> None:
    cluster.kill(primary)
    wait(lambda: replica.info()["role"] == "master", "the replica takes over")


def replace_by_an_older(cluster: Cluster, primary: Node, missed: int = 0) -> None:
    """Kill it when its replica has missed what it did in the last 300 ms, or longer: so many chunks at least."""
    with behind(cluster, primary) as replica:
        enough = primary.call("DBSIZE") + missed
        time.sleep(0.3)
        wait(lambda: primary.call("DBSIZE") >= enough, "it gets more data")
        replace(cluster, primary, replica)
    cluster.wait_ok()


def half_way(cluster: Cluster, slots: list[int], keys: Sequence[str] = ()) -> None:
    """Let slots be on their way for half a second."""
    target = data_server(cluster)
    with ExitStack() as stack:
        for slot in slots:
            stack.enter_context(cluster.migrating(slot, target, keys))
        time.sleep(0.5)


KILLED: dict[str, Fault] = {
    "log": lambda cluster: cluster.failover(LOG),
    "data": lambda cluster: cluster.failover(data_server(cluster)),
    "log, replica behind": lambda cluster: replace_by_an_older(cluster, cluster.owner(LOG), 20),
    "data, replica behind": lambda cluster: replace_by_an_older(cluster, data_server(cluster), 20),
}
REPLICATED: dict[str, Fault] = {  # where a server gets no more than what waits for its replica
    "log, replica behind": lambda cluster: replace_by_an_older(cluster, cluster.owner(LOG)),
    "data, replica behind": lambda cluster: replace_by_an_older(cluster, data_server(cluster)),
}
PLANNED: dict[str, Fault] = {
    "log": lambda cluster: cluster.failover(LOG, graceful=True),
    "data": lambda cluster: cluster.failover(data_server(cluster), graceful=True),
    "slots": lambda cluster: cluster.move_slots(cluster.owner(LOG), data_server(cluster), 100),
    "the log's slot": lambda cluster: cluster.migrate(LOG, data_server(cluster)),
    "half-way, log not moved": lambda cluster: half_way(cluster, [LOG]),
    "half-way, log moved": lambda cluster: half_way(cluster, [LOG], ["{r}:log"]),
    "half-way, slots of data": lambda cluster: half_way(cluster, cluster.slots(cluster.owner(LOG))[:100]),
}


@pytest.mark.parametrize("who", KILLED)
async def test_what_a_killed_primary_has_lost_is_counted(cluster: Cluster, who: str) -> None:
    """And nothing is read twice, or after it was lost. Only what lay on that server is; nothing else is forgotten."""
    async with world(cluster) as here:
        before = {*cluster.primaries()}
        await anyio.to_thread.run_sync(KILLED[who], cluster)
        await here.go_on()
    assert here.lost or "behind" not in who
    assert {cluster.owner(slot_of(key)) for key in here.lost_keys} <= {*cluster.primaries()} - before
    with stock_of(cluster) as stock:
        assert not unnamed_without_ttl(stock)


@pytest.mark.parametrize("what", PLANNED)
async def test_nothing_is_lost_when_slots_go_to_another_server(cluster: Cluster, what: str) -> None:
    async with world(cluster) as here:
        await anyio.to_thread.run_sync(PLANNED[what], cluster)
        await here.go_on()
    assert here.lost == 0


@pytest.mark.parametrize("who", REPLICATED)
async def test_nothing_is_lost_that_replicas_have_acknowledged(cluster: Cluster, who: str) -> None:
    async with world(cluster, replicas=1) as here:
        for _ in range(2):
            before = {*cluster.primaries()}
            await anyio.to_thread.run_sync(REPLICATED[who], cluster)
            (killed,) = before - {*cluster.primaries()}
            await anyio.to_thread.run_sync(cluster.restart, killed)  # nothing is acknowledged without
            await anyio.to_thread.run_sync(cluster.patience, PATIENT)
            await here.go_on(100)
    assert here.lost == 0


async def test_data_that_an_earlier_connection_made_persistent_are_waited_for_too(cluster: Cluster) -> None:
    """WAIT is for what its own connection wrote."""
    server = data_server(cluster)
    (replica,) = cluster.replicas(server)
    async with aionpredis.connect(cluster.url) as client:
        replay = client.replay("r", SCHEMA, chunk=1, replicas=1)
        run = await replay.begin_run()
        async with replay.actor() as actor:
            await actor.join()
            cluster.stop(replica)
            for seq in itertools.count():
                await actor.append(state=np.zeros(3, np.uint8), uid=seq, terminated=False)
                if cluster.owner(slot_of(f"r:{run.run}:{actor.incarnation.hex()}:{seq}")) is server:
                    break
                await actor.flush()
            for kill in (True, False):
                with anyio.move_on_after(1.0) as scope:
                    await actor.flush()
                assert scope.cancelled_caught
                if kill:
                    server.call("CLIENT", "KILL", "TYPE", "normal")
            cluster.cont(replica)
            with anyio.fail_after(20):
                await actor.flush()
            assert actor.stats.acknowledged == seq + 1


async def test_too_few_replicas_are_an_error_at_once_and_later_after_the_time_to_retry(cluster: Cluster) -> None:
    async with aionpredis.connect(cluster.url, retry_timeout=1.0) as client:
        with pytest.raises(UsageError):
            client.replay("r", SCHEMA, replicas=-1)
        replay = client.replay("r", SCHEMA, replicas=1)
        await replay.begin_run()
        with anyio.fail_after(20), pytest.raises(NotReplicated):
            async with client.replay("r", SCHEMA, replicas=2).actor():
                pass
        async with replay.actor() as actor:
            await actor.join()
            await actor.append(state=np.zeros(3, np.uint8), uid=0, terminated=False)
            for primary in cluster.primaries():
                for replica in cluster.replicas(primary):
                    cluster.stop(replica)
            with anyio.fail_after(20), pytest.raises(NotReplicated):
                await actor.flush()
            assert (actor.stats.acknowledged, actor.stats.stale) == (0, 1)


async def test_a_restored_run_is_what_replicas_have_too(cluster: Cluster, tmp_path: Path) -> None:
    async with aionpredis.connect(cluster.url, retry_timeout=1.0) as client:
        replay = client.replay("r", SCHEMA, chunk=4, replicas=1)
        await replay.begin_run()
        async with replay.actor() as actor:
            await actor.join()
            for uid in range(40):
                await actor.append(state=np.zeros(3, np.uint8), uid=uid, terminated=False)
        await replay.save(tmp_path / "saved")
        run = await replay.restore(tmp_path / "saved")
        assert await replay.count(run) == 40
        with pytest.raises(NotReplicated):
            await client.replay("r", SCHEMA, chunk=4, replicas=2).restore(tmp_path / "saved")
        assert await replay.latest_run() == run  # nothing was begun
        for primary in cluster.primaries():
            for replica in cluster.replicas(primary):
                cluster.stop(replica)
        with anyio.fail_after(20), pytest.raises(NotReplicated):
            await replay.restore(tmp_path / "saved")


async def test_chunks_spread_evenly_over_the_servers(cluster: Cluster) -> None:
    """Within 10 %: of 9,000 chunks that is seven standard deviations of a random choice."""
    async with aionpredis.connect(cluster.url) as client:
        replay = client.replay("r", SCHEMA, chunk=1)
        await replay.begin_run()
        async with replay.actor() as actor:
            await actor.join()
            for uid in range(9000):
                await actor.append(state=np.zeros(3, np.uint8), uid=uid, terminated=False)
        for primary in cluster.primaries():
            share = len(cluster.slots(primary)) / 16384  # a third, but for slots that other tests have moved
            assert abs(primary.call("DBSIZE") - share * 9000) < 300


@pytest.mark.one_loop("a server is killed, which takes seconds")
async def test_data_that_a_failover_has_brought_back_are_deleted_again(cluster: Cluster) -> None:
    async with aionpredis.connect(cluster.url) as client:
        replay = replay_of(client)
        first = await replay.begin_run()
        async with replay.actor() as actor:
            await actor.join()
            await fill(actor, range(200))
        await replay.begin_run(keep=2)
        primary = data_server(cluster)
        assert primary.call("WAIT", 1, 5000) == 1
        with behind(cluster, primary) as replica:
            await replay.drop(first)
            assert await replay.leftover_keys(first.run + 1) == []
            await anyio.to_thread.run_sync(replace, cluster, primary, replica)
        with anyio.fail_after(20):
            assert await replay.leftover_keys(first.run + 1) != []
            await replay.begin_run(keep=2)
            assert await replay.leftover_keys(first.run + 1) == []
