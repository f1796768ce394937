"""What is acknowledged by replicas, too: connections of its own, and nothing lost with the primary."""

from __future__ import annotations

import random
import time
from functools import partial
from typing import Any

import anyio
import anyio.to_thread
import numpy as np
import pytest
import redis

import aionpredis
from aionpredis import Client
from aionpredis.errors import NotReplicated, ServerError, UsageError, WriteFailed

from .cluster import Cluster, slot_of
from .nodes import Node, wait
from .replays import fill, replay_of, uids
from .sentinel import Sentinels

pytestmark = pytest.mark.anyio

STATE = np.arange(6400, dtype=np.uint16).reshape(80, 80)


async def values(client: Client, keys: list[str]) -> list[Any]:
    return [None if array is None else int(array.flat[0]) for array in await client.mget(keys)]


async def test_a_twin_has_the_same_servers_and_connections_of_its_own(cluster: Cluster) -> None:
    async with aionpredis.connect(cluster.url) as client:
        with pytest.raises(UsageError, match="not open"):
            await client.twin().get("k")
        async with client.twin() as twin:
            for i in range(20):
                await twin.set(f"k{i}", np.array(i))
            assert await client.mget([f"k{i}" for i in range(20)]) == [*range(20)]
            assert twin.stats() == client.stats()  # shared
            assert not {shard.live_connection for shard in client.topology.shards} & {
                shard.live_connection for shard in twin.topology.shards
            }
            own = [shard.live_connection for shard in twin.topology.shards]
        assert all(connection is not None and connection.lost for connection in own)
        assert await client.exists("k1") == 1


async def test_a_twin_is_closed_with_its_client_whose_embedded_server_it_uses() -> None:
    async with aionpredis.connect() as client:
        twin = client.twin()
        await twin.__aenter__()
        await twin.set("k", np.array(1))
        own = twin.live_connection()
        assert own is not None
        assert own is not client.live_connection()
    assert own.lost is not None
    with anyio.fail_after(20), pytest.raises(UsageError, match="not open"):
        await twin.get("k")
    await twin.__aexit__(None, None, None)


async def test_a_writer_that_waits_for_replicas_has_connections_of_its_own(cluster: Cluster) -> None:
    async with aionpredis.connect(cluster.url) as client:
        connections = client.counters
        async with client.writer(replicas=1) as writer:
            for i in range(300):
                await writer.put(f"k{i}", STATE + np.uint16(i))
            await writer.flush()
            await client.get("k1")
            shared = {shard.live_connection for shard in client.topology.shards}
            own = {lane._connection for lane in writer._lanes.values()}
            assert len(own) == 3
            assert not own & shared
        assert all(connection is not None and connection.lost for connection in own)
        assert await values(client, [f"k{i}" for i in range(300)]) == [*range(300)]
        assert client.counters is connections


async def test_nothing_counts_as_stored_before_the_replica_has_it(cluster: Cluster) -> None:
    primary = cluster.primaries()[0]
    (replica,) = cluster.replicas(primary)
    keys = [key for key in map(str, range(100)) if cluster.owner(slot_of(key)) is primary]
    async with aionpredis.connect(cluster.url) as client, client.writer(replicas=1) as writer:
        cluster.stop(replica)
        with anyio.fail_after(20):
            for key in keys:
                await writer.put(key, np.array(1))
        with anyio.move_on_after(0.4) as scope:
            await writer.flush()
        assert scope.cancelled_caught
        with anyio.fail_after(20):  # the primary has it, and others are not kept from reading
            while await values(client, keys) != [1] * len(keys):
                await anyio.sleep(0.01)
        assert writer.inflight
        cluster.cont(replica)
        with anyio.fail_after(20):
            await writer.flush()
        cluster.kill(primary)
        await anyio.to_thread.run_sync(partial(wait, lambda: replica.info()["role"] == "master", "it is replaced"))
        assert await values(client, keys) == [1] * len(keys)


@pytest.mark.one_loop("servers are killed, which takes seconds")
async def test_nothing_acknowledged_is_lost_with_the_primary(cluster: Cluster) -> None:
    rng = random.Random()
    acknowledged: dict[str, int] = {}
    killed = over = False

    async def kill(primary: Node) -> None:
        nonlocal killed, over
        while len(acknowledged) <= 5:
            await anyio.sleep(0.001)
        await anyio.sleep(rng.uniform(0.02, 0.2))
        killed = True
        cluster.kill(primary)  # by no thread: between two steps of this loop
        (replica,) = replicas[primary]
        await anyio.to_thread.run_sync(partial(wait, lambda: replica.info()["role"] == "master", "it is replaced"))
        over = True

    primary = rng.choice(cluster.primaries())
    replicas = {node: cluster.replicas(node) for node in cluster.primaries()}
    async with aionpredis.connect(cluster.url) as client, aionpredis.connect(cluster.url) as reader:
        with anyio.fail_after(50):
            try:
                async with client.writer(replicas=1, max_inflight=4 << 20) as writer:
                    async with anyio.create_task_group() as tasks:
                        tasks.start_soon(kill, primary)
                        turn = 0
                        while not over:
                            turn += 1
                            keys = [f"k{turn}:{i}" for i in range(rng.randrange(1, 40))]
                            for key in keys:
                                await writer.put(key, STATE + np.uint16(turn))
                            with anyio.move_on_after(1) as scope:  # until its replica is there again nothing of it is
                                await writer.flush()
                                acknowledged |= dict.fromkeys(keys, turn)
                            if scope.cancelled_caught and killed:
                                break
                    assert await values(reader, [*acknowledged]) == [*acknowledged.values()]
                    await anyio.to_thread.run_sync(cluster.restart, primary)
                    await writer.put("last", STATE)
            except WriteFailed as error:
                pytest.fail(f"the replica came back, and this is not stored: {error}")
        assert await values(reader, [*acknowledged, *keys]) == [*acknowledged.values(), *[turn] * len(keys)]


async def test_what_is_redirected_is_waited_for_where_it_is_stored(cluster: Cluster) -> None:
    slot = slot_of("a")
    source = cluster.owner(slot)
    target = next(node for node in cluster.primaries() if node is not source)
    (replica,) = cluster.replicas(target)
    async with aionpredis.connect(cluster.url) as client, client.writer(replicas=1) as writer:
        await writer.put("{a}", np.array(0))
        await writer.flush()
        cluster.migrate(slot, target)
        cluster.stop(replica)
        await writer.put("{a}", np.array(1))
        with anyio.fail_after(20):
            while await values(client, ["{a}"]) != [1]:
                await anyio.sleep(0.01)  # to ask for the map may take a while: who is silent is asked, too
        with anyio.move_on_after(0.4) as scope:
            await writer.flush()
        assert scope.cancelled_caught
        cluster.cont(replica)
        with anyio.fail_after(20):
            await writer.flush()


@pytest.mark.one_loop("servers are killed, which takes seconds")
@pytest.mark.parametrize("graceful", [True, False])
async def test_writers_and_actors_with_replicas_begin_though_a_primary_has_just_been_replaced(
    cluster: Cluster, graceful: bool
) -> None:
    """Whom this client does not know yet, and who has a replica again only when the old one comes back."""
    old = cluster.primaries()[0]
    slots = cluster.slots(old)
    key = next(f"k{i}" for i in range(100) if slot_of(f"k{i}") in slots)
    async with aionpredis.connect(cluster.url) as client:
        replay = replay_of(client)
        await replay.begin_run()
        cluster.failover(old, graceful=graceful)
        with anyio.fail_after(30):
            async with client.writer(replicas=1) as writer, replay_of(client, replicas=1).actor() as actor:
                if not graceful:
                    await anyio.to_thread.run_sync(cluster.restart, old)
                await writer.put(key, STATE)
                await writer.flush()
                await actor.join()
                await fill(actor, range(100))
                await actor.flush()
        assert await client.exists(key)
        assert sorted(await uids(await replay.epoch())) == [*range(100)]


async def test_items_that_reach_too_few_replicas_fail_and_the_writer_goes_on(cluster: Cluster) -> None:
    primary = cluster.primaries()[0]
    (replica,) = cluster.replicas(primary)
    keys = [f"k{i}" for i in range(60)]
    missed = [key for key in keys if cluster.owner(slot_of(key)) is primary]
    async with aionpredis.connect(cluster.url, retry_timeout=0.5) as client, client.writer(replicas=1) as writer:
        cluster.stop(replica)
        with anyio.fail_after(20), pytest.raises(WriteFailed, match="only 0 of 1 replicas") as raised:
            for key in keys:
                await writer.put(key, STATE)
            await writer.flush()
        # Of the others one that stands still may take too long, too.
        assert {*missed} <= {key for key, _ in raised.value.failures} < {*keys}
        errors = [error for _, error in raised.value.failures]
        assert all(
            isinstance(error, NotReplicated) and (error.replicas, error.acknowledged) == (1, 0) for error in errors
        )
        assert await client.exists(*keys) == len(keys)
        cluster.cont(replica)
        with anyio.fail_after(20):
            for key in keys:
                await writer.put(key, np.array(2))
            await writer.flush()
        assert await values(client, keys) == [2] * len(keys)


async def too_few_are_noticed(url: str, asked: int, there: int) -> None:
    async with aionpredis.connect(url) as client:
        begin = time.monotonic()
        with pytest.raises(NotReplicated, match=f"only {there} of {asked} replicas"):
            async with client.writer(replicas=asked):
                pytest.fail("it was entered")
        assert time.monotonic() - begin < 15  # not the retry_timeout of 30 s
        assert not client._twins


@pytest.mark.one_loop("a server that waits for its replicas, 2 s")
async def test_no_replica_is_noticed_when_a_writer_begins(url: str) -> None:
    await too_few_are_noticed(url, 1, 0)


@pytest.mark.one_loop("a server that waits for its replicas, 2 s")
async def test_too_few_replicas_are_noticed_when_a_writer_begins(cluster: Cluster) -> None:
    await too_few_are_noticed(cluster.url, 2, 1)


async def test_the_right_to_wait_is_needed_and_the_error_names_it(url: str, stock: redis.Redis) -> None:
    stock.execute_command("ACL", "SETUSER", "half", "on", ">secret", "~*", "+@all", "-wait")  # type: ignore[no-untyped-call]
    try:
        async with aionpredis.connect(url, username="half", password="secret") as client:
            with pytest.raises(ServerError, match=r"needs \+wait"):
                async with client.writer(replicas=1):
                    pytest.fail("it was entered")
    finally:
        stock.execute_command("ACL", "DELUSER", "half")  # type: ignore[no-untyped-call]


@pytest.mark.one_loop("servers are killed, which takes seconds")
async def test_one_primary_with_a_replica_that_sentinels_watch(sentinels: Sentinels) -> None:
    keys = [f"k{i}" for i in range(100)]
    async with aionpredis.connect(sentinels.url) as client:
        async with client.writer(replicas=1) as writer:
            for key in keys:
                await writer.put(key, STATE)
            await writer.flush()
            assert len(writer._lanes) == 1
            sentinels.kill(sentinels.primary())
        with anyio.fail_after(30):
            assert await values(client, keys) == [0] * 100


async def test_number_of_replicas_that_is_none_is_refused(url: str) -> None:
    async with aionpredis.connect(url) as client:
        for count in (-1, 1.5, True, "1", None):
            with pytest.raises(UsageError, match="replicas"):
                client.writer(replicas=count)  # type: ignore[arg-type]
