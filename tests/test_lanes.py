"""The batching writer on a cluster: all servers at once, in order whatever moves, and within one bound."""

from __future__ import annotations

import random
import signal
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import Any

import anyio
import anyio.to_thread
import numpy as np
import pytest

import aionpredis
from aionpredis import Client, Writer
from aionpredis.errors import ConnectError, ConnectionLost, Redirected, WriteFailed
from aionpredis.lane import BATCH_ITEMS, Lane

from .cluster import PATIENT, Cluster, slot_of
from .nodes import Node, wait
from .servers import binary_of

pytestmark = pytest.mark.anyio

STATE = np.arange(6400, dtype=np.uint16).reshape(80, 80)


async def values(client: Client, keys: list[str]) -> list[Any]:
    return [None if array is None else int(array.flat[0]) for array in await client.mget(keys)]


def another(cluster: Cluster, node: Node) -> Node:
    return next(each for each in cluster.primaries() if each is not node)


def key_of(cluster: Cluster, node: Node) -> str:
    """A key of this server's."""
    return next(key for key in map(str, range(1000)) if cluster.owner(slot_of(key)) is node)


def asks(node: Node) -> int:
    """How often it has said ASK."""
    return int(node.admin.info("errorstats").get("errorstat_ASK", {}).get("count", 0))


async def sent(writer: Writer, key: str, value: int) -> Lane:
    """Put, and send before anything else happens. Its answer is not looked at before something is awaited."""
    await writer.put(key, np.array(value))
    lane = next(lane for lane in writer._lanes.values() if lane.current is not None and lane.current.keys)
    lane.close_batch()
    assert lane.inflight
    return lane


@pytest.mark.parametrize("copy", [True, False])
async def test_everything_is_stored_on_all_servers_at_once(cluster: Cluster, copy: bool) -> None:
    async with aionpredis.connect(cluster.url) as client:
        at_once = 0
        async with client.writer(copy=copy, max_inflight=2 << 20) as writer:
            for i in range(600):
                await writer.put(f"k{i}", STATE + np.uint16(i))
                await writer.put(f"again{i % 7}", np.uint16(i))
                await writer.put_record(f"r{i}", {"n": np.array(i)})
                assert writer.inflight <= 2 << 20
                at_once = max(at_once, sum(bool(lane.inflight) for lane in writer._lanes.values()))
        assert at_once > 1  # of three, if nobody is slow
        assert writer.inflight == 0
        assert await values(client, [f"k{i}" for i in range(600)]) == [*range(600)]
        assert await values(client, [f"again{i % 7}" for i in range(593, 600)]) == [*range(593, 600)]
        assert await client.exists(*(f"r{i}" for i in range(600))) == 600
    sizes = [node.admin.dbsize() for node in cluster.primaries()]
    assert sum(sizes) == 1207
    assert min(sizes) > 0.8 * max(sizes), "not spread evenly"


async def test_mset_stores_on_all_servers_and_names_what_they_refuse(cluster: Cluster) -> None:
    async with aionpredis.connect(cluster.url) as client:
        items = {f"k{i}": STATE + np.uint16(i) for i in range(300)}
        await client.mset(items)
        assert await values(client, list(items)) == [*range(300)]
    for node in cluster.nodes:
        node.call("ACL", "SETUSER", "half", "on", ">secret", "~k*", "+@all")
    try:
        async with aionpredis.connect(cluster.url, username="half", password="secret") as client:
            with pytest.raises(WriteFailed, match="NOPERM") as raised:
                await client.mset({f"{'no' if i % 10 == 3 else 'k'}{i}": np.array(i) for i in range(100)})
            assert sorted(key for key, _ in raised.value.failures) == sorted(f"no{i}" for i in range(3, 100, 10))
            assert await values(client, [f"k{i}" for i in range(100) if i % 10 != 3]) == [
                i for i in range(100) if i % 10 != 3
            ]
    finally:
        for node in cluster.nodes:
            node.call("ACL", "DELUSER", "half")


async def test_a_slot_that_moves_while_it_is_written_to(cluster: Cluster) -> None:
    async with aionpredis.connect(cluster.url) as client:
        keys = [f"{{a}}{i}" for i in range(40)]
        others = [f"other{i}" for i in range(40)]
        slot = slot_of("a")
        target = another(cluster, cluster.owner(slot))
        await client.mset({key: np.array(0) for key in keys})
        async with client.writer() as writer:
            for turn in range(1, 4):
                for key in keys + others:
                    await writer.put(key, np.array(turn))
                await anyio.sleep(0.005)
            with cluster.migrating(slot, target, keys[:20]):  # ASK for these, and for new ones
                for turn in range(4, 8):
                    for key in [*keys, *others, f"{{a}}new{turn}"]:
                        await writer.put(key, np.array(turn))
                await writer.flush()
                for key in keys + others:
                    await writer.put(key, np.array(8))
            for turn in range(9, 12):  # MOVED
                for key in keys + others:
                    await writer.put(key, np.array(turn))
        assert await values(client, keys + others) == [11] * 80
        assert await values(client, [f"{{a}}new{turn}" for turn in range(4, 8)]) == [4, 5, 6, 7]
    assert target.call("CLUSTER", "COUNTKEYSINSLOT", slot) == 44


async def test_what_will_be_redirected_is_not_overtaken_when_another_task_learns_the_map(cluster: Cluster) -> None:
    key, slot = "{a}k", slot_of("a")
    async with aionpredis.connect(cluster.url) as client, client.writer() as writer:
        for _ in range(4):
            target = another(cluster, cluster.owner(slot))
            await writer.put(key_of(cluster, target), STATE)  # its lane is there, and has a connection
            await writer.put(key, np.array(0))
            await writer.flush()
            cluster.migrate(slot, target)
            lane = await sent(writer, key, 1)  # to where it will be redirected from
            await client.topology.learn(Redirected(f"MOVED {slot} {target.address}:{target.port}"))
            assert client.topology.shard(key.encode()) is not lane._shard
            with anyio.fail_after(20):
                await writer.put(key, np.array(2))
                await writer.put("{a}other", np.array(2))
                await writer.flush()
            assert await values(client, [key, "{a}other"]) == [2, 2]


async def test_what_was_redirected_does_not_overtake_what_came_after_the_slot_had_come_back(cluster: Cluster) -> None:
    key, slot = "{a}k", slot_of("a")
    source = cluster.owner(slot)
    target = another(cluster, source)
    async with aionpredis.connect(cluster.url) as client, client.writer() as writer:
        await writer.put("{a}first", np.array(0))
        await writer.flush()
        target.call("CLUSTER", "SETSLOT", slot, "IMPORTING", source.id)
        source.call("CLUSTER", "SETSLOT", slot, "MIGRATING", target.id)
        asked = asks(source)
        lane = await sent(writer, key, 1)  # ASK
        wait(lambda: asks(source) > asked, "it was redirected")
        for node in (source, target):
            node.call("CLUSTER", "SETSLOT", slot, "STABLE")
        await sent(writer, key, 2)  # which the source takes
        assert len(lane.inflight) == 2
        await writer.flush()
        assert await values(client, [key]) == [2]
        await writer.put(key, np.array(3))
        await writer.flush()
        assert not lane._astray
        assert await values(client, [key]) == [3]


@pytest.mark.parametrize("seed", range(2))
async def test_the_last_put_of_a_key_wins_while_its_slot_moves_to_and_fro(cluster: Cluster, seed: int) -> None:
    rng = random.Random(seed)
    tags = ["a", "b", "c"]
    keys = [f"{{{tag}}}{i}" for tag in tags for i in range(3)]
    latest: Counter[str] = Counter()
    moving = True

    def move() -> None:
        for _ in range(8):
            slot = slot_of(rng.choice(tags))
            target = another(cluster, cluster.owner(slot))
            some = [key for key in keys if slot_of(key) == slot and rng.random() < 0.5]
            with cluster.migrating(slot, target, some):
                time.sleep(rng.uniform(0, 0.02))

    async def look() -> None:
        """Another task of the client, by which it learns of moved slots, too."""
        while True:
            for key, found in zip(keys, await values(client, keys), strict=True):
                assert 0 <= found <= latest[key]
            await anyio.sleep(0.001)

    async def put() -> None:
        while moving:
            for _ in range(rng.randrange(60)):
                key = rng.choice(keys)
                latest[key] += 1
                await writer.put(key, np.full(rng.choice((1, 1000)), latest[key]))
                await writer.put(f"other{rng.randrange(100)}", STATE)
            if rng.random() < 0.2:
                await writer.flush()
                assert await values(client, keys) == [latest[key] for key in keys]
            await anyio.sleep(rng.choice((0, 0, 0.003)))

    async with aionpredis.connect(cluster.url) as client:
        await client.mset(dict.fromkeys(keys, np.array(0)))
        async with anyio.create_task_group() as tasks, client.writer(max_inflight=1 << 20) as writer:
            tasks.start_soon(look)
            async with anyio.create_task_group() as putting:
                putting.start_soon(put)
                await anyio.to_thread.run_sync(move)
                moving = False
            await writer.flush()
            assert await values(client, keys) == [latest[key] for key in keys]
            tasks.cancel_scope.cancel()


async def test_a_server_that_is_silent_stops_the_others_only_when_the_bound_is_used_up(cluster: Cluster) -> None:
    dead, *alive = cluster.primaries()
    async with aionpredis.connect(cluster.url, timeout=3) as client:
        mine = {node: [f"{{{key_of(cluster, node)}}}{i}" for i in range(90)] for node in (dead, *alive)}
        async with client.writer(max_inflight=900_000) as writer:
            for keys in mine.values():
                await writer.put(keys[-1], np.array(-1))
            await writer.flush()
            cluster.stop(dead, patience=60_000)
            with anyio.fail_after(20):
                for i in range(20):
                    for keys in mine.values():
                        await writer.put(keys[i], STATE + np.uint16(i))
                for node in alive:
                    while node.admin.dbsize() != 21:
                        await anyio.sleep(0.002)
            with anyio.move_on_after(0.2) as scope:
                for i in range(20, 90):
                    await writer.put(mine[dead][i], STATE)
                await writer.put(mine[alive[0]][20], STATE)
            assert scope.cancelled_caught, "more is held than the bound"
            assert writer.inflight <= 900_000
            cluster.cont(dead)
            with anyio.fail_after(20):
                for i in range(20, 90):
                    for keys in mine.values():
                        await writer.put(keys[i], STATE + np.uint16(i))
                await writer.flush()
        for keys in mine.values():
            assert await values(client, keys) == [*range(90)]


async def test_a_server_that_stays_away_fails_its_own_items_only(cluster: Cluster) -> None:
    dead = cluster.primaries()[1]
    keys = [f"k{i}" for i in range(90)]
    lost = [key for key in keys if cluster.owner(slot_of(key)) is dead]
    async with aionpredis.connect(cluster.url, retry_timeout=0.2) as client:
        with anyio.fail_after(20), pytest.raises(WriteFailed) as raised:
            async with client.writer() as writer:
                await writer.put(lost[0], STATE)
                await writer.flush()
                dead.send(signal.SIGKILL)  # its replica does not take its place soon
                for key in keys:
                    await writer.put(key, STATE)
        assert sorted(key for key, _ in raised.value.failures) == sorted(lost)
        assert all(isinstance(error, ConnectError | ConnectionLost) for _, error in raised.value.failures)
        assert await client.exists(*(key for key in keys if key not in lost)) == len(keys) - len(lost)


@pytest.mark.one_loop("servers are killed, which takes seconds")
async def test_a_primary_is_killed_while_it_is_written_to(cluster: Cluster) -> None:
    dead = cluster.primaries()[0]
    keys = [f"k{i}" for i in range(90)]
    replaced = False

    async def replace() -> None:
        nonlocal replaced
        await anyio.sleep(0.05)
        await anyio.to_thread.run_sync(cluster.failover, dead)
        replaced = True

    async with aionpredis.connect(cluster.url) as client:
        turn = 0
        with anyio.fail_after(50):
            async with client.writer(max_inflight=2 << 20) as writer, anyio.create_task_group() as tasks:
                tasks.start_soon(replace)
                last = False
                while not last:
                    last = replaced and turn > 20
                    turn += 1
                    for key in keys:
                        await writer.put(key, STATE + np.uint16(turn))
                    await anyio.sleep(0.001)
            # What the old primary acknowledged last may be lost, but this was put when it was gone.
            assert await values(client, keys) == [turn] * len(keys)


@pytest.fixture(params=["valkey", "redis"])
def fresh(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """Where nobody was killed before: after that, a primary replaced by CLUSTER FAILOVER came back now and then."""
    with Cluster(binary=binary_of(request.param)) as cluster:
        cluster.patience(PATIENT)
        yield cluster


async def test_a_server_that_became_a_replica_is_left_for_its_successor_with_all_that_it_had_been_sent(
    fresh: Cluster,
) -> None:
    cluster = fresh
    old = cluster.primaries()[0]
    tag = key_of(cluster, old)
    keys = [f"{{{tag}}}{i}" for i in range(2000)]
    async with aionpredis.connect(cluster.url) as client:
        with anyio.fail_after(30):
            async with client.writer() as writer:
                for key in keys:
                    await writer.put(key, np.array(0))
                await writer.flush()
                await anyio.to_thread.run_sync(partial(cluster.failover, old, graceful=True))
                before = client.stats().requests
                for turn in (1, 2):
                    for key in keys:
                        await writer.put(key, np.array(turn))
        # The first batch was redirected, item by item; the others as a whole.
        assert client.stats().requests - before < BATCH_ITEMS + 200
        assert await values(client, keys) == [2] * len(keys)
        assert not client.stats().errors


async def test_a_broken_connection_is_made_anew_to_the_lanes_own_server_though_its_first_key_has_moved(
    cluster: Cluster,
) -> None:
    slot = slot_of("a")
    source = cluster.owner(slot)
    mine = [f"{{{key_of(cluster, source)}}}{i}" for i in range(300)]
    assert slot_of(mine[0]) != slot
    async with aionpredis.connect(cluster.url) as client, client.writer() as writer:
        await writer.put("{a}", np.array(0))
        await writer.flush()
        target = another(cluster, source)
        cluster.migrate(slot, target)
        lane = await sent(writer, "{a}", 1)
        for key in mine:
            await writer.put(key, np.array(1))
        await client.topology.learn(Redirected(f"MOVED {slot} {target.address}:{target.port}"))
        assert lane._connection is not None
        lane._connection.abort(ConnectionLost("for no reason"))
        before = client.stats().requests
        with anyio.fail_after(20):
            await writer.flush()
        assert client.stats().requests - before < 100
        assert await values(client, ["{a}", *mine]) == [1] * 301


async def test_cancelled_put_of_a_large_array_that_is_redirected_lets_go_of_its_memory(cluster: Cluster) -> None:
    slot = slot_of("a")
    target = another(cluster, cluster.owner(slot))
    big = np.ones(12 << 20, np.uint8)
    async with aionpredis.connect(cluster.url) as client, client.writer(max_inflight=16 << 20) as writer:
        await writer.put("{a}", STATE)
        await writer.flush()
        cluster.migrate(slot, target)
        await client.set(key_of(cluster, target), STATE)
        cluster.stop(target, patience=PATIENT)
        with anyio.move_on_after(0.3) as scope:
            await writer.put("{a}", big)
        assert scope.cancelled_caught
        big[:] = 99
        cluster.cont(target)
        with anyio.fail_after(20):
            await writer.put("{a}second", STATE)
            await writer.flush()
        stored = await client.get("{a}")
        assert stored is not None
        assert stored.size == STATE.size or (stored == 1).all()
