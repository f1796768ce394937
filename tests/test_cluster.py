"""A client of a cluster: every key goes to the server that has it, also while that changes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import anyio
import anyio.to_thread
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

import aionpredis
from aionpredis import ConnectionLost, Redirected, ServerError, ServerUnavailable, streams
from aionpredis.wire import cluster as clusters
from aionpredis.wire import resp
from aionpredis.wire.cluster import _slot
from aionpredis.wire.resp import Reply

from .cluster import PATIENT, Cluster, slot_of
from .nodes import Node, wait
from .replays import fill as fill_actor
from .replays import replay_of, uids

pytestmark = pytest.mark.anyio

KEYS = [f"key{number}" for number in range(300)]


def array(number: int) -> NDArray[np.int64]:
    return np.full(100, number)


def is_array(found: object, number: int) -> bool:
    return isinstance(found, np.ndarray) and np.array_equal(found, array(number))


async def fill(client: aionpredis.Client) -> None:
    for number, key in enumerate(KEYS):
        await client.set(key, array(number))


def other(cluster: Cluster, node: Node) -> Node:
    return next(primary for primary in cluster.primaries() if primary is not node)


@contextmanager
def migrating(cluster: Cluster, key: str, *, moved: bool) -> Iterator[Node]:
    """While the key's slot is on its way to another primary, which has the key already or not."""
    slot = slot_of(key)
    target = other(cluster, cluster.owner(slot))
    with cluster.migrating(slot, target, [key] if moved else []):
        yield target


async def test_every_call_finds_its_keys_wherever_they_are(cluster: Cluster) -> None:
    async with aionpredis.connect(cluster.url) as client:
        await fill(client)
        held = [node.call("DBSIZE") for node in cluster.primaries()]
        assert sum(held) == len(KEYS)
        assert min(held) > 0
        out = np.empty((len(KEYS) + 1, 100), np.int64)
        found = await client.mget([*KEYS, "missing"], out=out)
        assert found.tolist() == [True] * len(KEYS) + [False]
        assert (out[:-1] == np.arange(len(KEYS))[:, None]).all()
        assert not out[-1].any()
        arrays = await client.mget(["missing", *reversed(KEYS)])
        assert arrays[0] is None
        assert [int(one[7]) for one in arrays[1:]] == list(reversed(range(len(KEYS))))
        await client.set_record("record", {"x": array(3)})
        record = await client.get_record("record")
        assert record is not None
        assert np.array_equal(record["x"], array(3))
        assert await client.exists(*KEYS, "missing", KEYS[0]) == len(KEYS) + 1
        assert await client.delete(*KEYS[:100], "missing") == 100
        assert await client.exists(*KEYS) == len(KEYS) - 100


async def test_mget_of_a_key_that_holds_no_string_finds_nothing(cluster: Cluster) -> None:
    async with aionpredis.connect(cluster.url) as client:
        await fill(client)
        for key in KEYS[::50]:
            await client.delete(key)
            await client.execute("LPUSH", key, "x")
        out = np.empty((len(KEYS), 100), np.int64)
        found = await client.mget(KEYS, out=out)
        assert [key for key, is_there in zip(KEYS, found, strict=True) if not is_there] == KEYS[::50]
        arrays = await client.mget(KEYS)
        assert [key for key, one in zip(KEYS, arrays, strict=True) if one is None] == KEYS[::50]


async def test_scan_finds_what_stays_where_it_is_whatever_moves(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aionpredis.client.SCAN_KEYS", 10)
    async with aionpredis.connect(cluster.url) as client:
        await fill(client)
        found: set[bytes] = set()
        moved: list[int] = []
        async for page in client.scan_pages("key*"):
            found.update(page)
            if not moved:
                # These stand for their servers, the first of which is being looked at.
                names = client.topology.each()[:2]
                moved = [slot_of(name) for name in names]
                for name, slot in zip(names, moved, strict=True):
                    target = next(node for node in cluster.primaries() if not {*cluster.slots(node)} & {*moved})
                    await anyio.to_thread.run_sync(cluster.migrate, slot, target)
                    await client.exists(name)  # learns of it
        assert found >= {key.encode() for key in KEYS if slot_of(key) not in moved}


async def test_execute_asks_the_server_for_the_place_of_a_key(cluster: Cluster) -> None:
    async with aionpredis.connect(cluster.url) as client:
        for key in KEYS[:20]:
            await client.execute("SET", key, "1")
            assert await client.execute("INCRBY", key, 4) == 5
            assert await client.execute("EVAL", "return redis.call('GET', KEYS[1])", 1, key) == b"5"
            assert await client.execute("OBJECT", "ENCODING", key) == b"int"
            assert await client.execute("BITCOUNT", key) == 4  # of no table here
        assert await client.execute("PING") == b"PONG"
        with pytest.raises(ServerError, match="NOSUCH"):
            await client.execute("NOSUCH", "x")
        with pytest.raises(ServerError, match=r"\{common\}"):
            await client.execute("RENAME", "a", "b")


@pytest.mark.parametrize("moved", [True, False])
async def test_a_slot_that_moves_is_followed(cluster: Cluster, moved: bool) -> None:
    async with aionpredis.connect(cluster.url) as client:
        await fill(client)
        key = KEYS[11]
        out = np.empty((len(KEYS), 100), np.int64)
        with migrating(cluster, key, moved=moved) as target:
            assert is_array(await client.get(key), 11)
            assert is_array(await client.get(key, out=out[0]), 11)
            assert (await client.mget(KEYS, out=out)).all()
            assert (out == np.arange(len(KEYS))[:, None]).all()
            arrays = await client.mget(KEYS)
            assert [int(one[0]) for one in arrays] == list(range(len(KEYS)))
            await client.set(key, array(-11))
            new = f"{{{key}}}:new"  # only the target takes it
            await client.set(new, array(12))
            assert await client.exists(key, new, KEYS[0]) == 3
            assert await client.execute("STRLEN", new) > 800
            assert target.call("CLUSTER", "COUNTKEYSINSLOT", slot_of(key)) == 1 + moved
        assert is_array(await client.get(key), -11)
        assert is_array(await client.get(new), 12)
        assert await client.delete(key, new) == 2
        assert client.stats().errors == {}


def refuse_first(monkeypatch: pytest.MonkeyPatch) -> list[ServerUnavailable]:
    """Have the first server that another one names refuse. Empty when it has."""
    refusals = [ServerUnavailable("CLUSTERDOWN The cluster is down")]
    ask = clusters.Cluster._ask

    async def refuse(*arguments: Any, asks: bool) -> None:
        *_, reply = arguments
        if refusals:
            reply.values.append(refusals.pop())
        else:
            await ask(*arguments, asks=asks)

    monkeypatch.setattr(clusters.Cluster, "_ask", refuse)
    return refusals


@pytest.mark.one_loop("what a server says is the same on all")
@pytest.mark.parametrize("call", ["get", "mget", "put"])
async def test_a_server_that_redirects_is_not_left_when_the_other_one_cannot_answer_yet(
    cluster: Cluster, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = KEYS[0]
    refusals = refuse_first(monkeypatch)
    async with aionpredis.connect(cluster.url) as client:
        await client.set(key, array(0))
        with migrating(cluster, key, moved=True):
            connection = await client.connection(key.encode())
            if call == "get":
                assert is_array(await client.get(key), 0)
            elif call == "mget":
                assert is_array((await client.mget([key]))[0], 0)
            else:
                async with client.writer() as writer:
                    await writer.put(key, array(1))
            assert not refusals
            assert connection.lost is None


@pytest.mark.one_loop("what a server says is the same on all")
async def test_an_actor_does_not_leave_a_server_that_redirects_when_the_other_one_cannot_answer_yet(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with aionpredis.connect(cluster.url) as client:
        replay = replay_of(client)
        run = await replay.begin_run()
        async with replay.actor() as actor:
            await actor.join()
            await fill_actor(actor, range(40))
            await actor.flush()
            refusals = refuse_first(monkeypatch)
            with migrating(cluster, "{r}:log", moved=True):
                connection = await client.connection(b"{r}:log")
                await fill_actor(actor, range(40, 80))
                await actor.flush()
                assert not refusals
                assert connection.lost is None
        assert sorted(await uids(await replay.epoch(run))) == list(range(80))


async def test_a_moved_slot_is_looked_for_once(cluster: Cluster) -> None:
    async with aionpredis.connect(cluster.url) as client:
        await fill(client)
        slot = slot_of(KEYS[0])
        cluster.migrate(slot, other(cluster, cluster.owner(slot)))
        assert is_array(await client.get(KEYS[0]), 0)
        requests = client.stats().requests
        assert is_array(await client.get(KEYS[0]), 0)
        assert client.stats().requests == requests + 1


async def test_keys_of_one_command_that_are_parted_are_waited_for(cluster: Cluster) -> None:
    keys = "{k}:1", "{k}:2"
    slot = slot_of(keys[0])
    async with aionpredis.connect(cluster.url, retry_timeout=20) as client:
        for key in keys:
            await client.execute("SET", key, key)
        target = other(cluster, cluster.owner(slot))
        found: list[object] = []

        async def ask() -> None:
            found.append(await client.call("MGET", *keys, repeatable=True))

        with anyio.fail_after(30):
            async with anyio.create_task_group() as tasks:
                with cluster.migrating(slot, target, [keys[1]]):
                    tasks.start_soon(ask)
                    while not client.stats().errors.get("TRYAGAIN"):
                        await anyio.sleep(0.01)
                    assert not found
        assert found == [[key.encode() for key in keys]]


@pytest.mark.parametrize("graceful", [True, False])
async def test_a_replica_that_takes_over_is_found(cluster: Cluster, graceful: bool) -> None:
    async with aionpredis.connect(cluster.url, retry_timeout=30) as client:
        await fill(client)
        for node in cluster.primaries():
            node.call("WAIT", 1, 5000)
        stop = anyio.Event()
        read = 0

        async def reads() -> None:
            nonlocal read
            out = np.empty((len(KEYS), 100), np.int64)
            while not stop.is_set():
                assert (await client.mget(KEYS, out=out)).all()
                assert (out == np.arange(len(KEYS))[:, None]).all()
                read += 1

        with anyio.fail_after(60):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(reads)
                old = cluster.owner(slot_of(KEYS[0]))
                new = await anyio.to_thread.run_sync(lambda: cluster.failover(old, graceful=graceful))
                assert new is cluster.owner(slot_of(KEYS[0]))
                before = read
                while read < before + 3:
                    await anyio.sleep(0.01)
                stop.set()
        assert bool(client.stats().errors) is not graceful
        assert client.faults.changes > 0  # what the old one acknowledged last may be lost: followers look again


async def test_a_primary_that_was_replaced_is_noticed_however_recently_the_map_was_asked_for(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Readers look again then: it may have acknowledged what its successor does not have."""
    monkeypatch.setattr("aionpredis.wire.cluster.REFRESH_SECONDS", math.inf)
    async with aionpredis.connect(cluster.url) as client:
        await fill(client)
        changes = client.faults.changes
        old = cluster.owner(slot_of(KEYS[0]))
        cluster.migrate(slot_of(KEYS[0]), other(cluster, old))
        assert is_array(await client.get(KEYS[0]), 0)
        assert client.faults.changes == changes  # nobody was replaced
        key = next(key for key in KEYS if cluster.owner(slot_of(key)) is old)
        cluster.failover(old, graceful=True)
        assert await client.get(key) is not None
        assert client.faults.changes > changes


async def test_a_cluster_that_is_gone_is_an_error_after_the_time_to_retry() -> None:
    with Cluster(replicas=0) as cluster:
        cluster.patience(PATIENT)
        async with aionpredis.connect(cluster.url, retry_timeout=0.5) as client:
            await fill(client)
            cluster.kill(cluster.owner(slot_of("a")))
            with pytest.raises((aionpredis.ConnectError, aionpredis.ConnectionLost, ServerUnavailable)):
                await client.get("a")
            for node in cluster.nodes:
                if node.answers:
                    cluster.kill(node)
            with pytest.raises((aionpredis.ConnectError, aionpredis.ConnectionLost)):
                await client.get("a")


async def test_replicas_answer_what_never_changes(cluster: Cluster) -> None:
    async with aionpredis.connect(cluster.url, read_replicas=True) as client:
        weights = {"w": np.arange(1000.0)}
        policy = client.policy("p")
        for version in range(1, 7):
            await policy.publish(weights)
            for node in cluster.primaries():
                node.call("WAIT", 1, 5000)
            before = [calls(node, "get") for node in cluster.nodes]
            found = await policy.get(version)
            assert found is not None
            assert np.array_equal(found.weights["w"], weights["w"])
            after = [calls(node, "get") for node in cluster.nodes]
            (asked,) = [node for node, b, a in zip(cluster.nodes, before, after, strict=True) if a > b]
            assert asked.info()["role"] == "slave"
        await client.set("k", array(1))
        before = [calls(node, "get") for node in cluster.nodes]
        assert is_array(await client.get("k"), 1)  # may change, so only the primary knows
        after = [calls(node, "get") for node in cluster.nodes]
        (asked,) = [node for node, b, a in zip(cluster.nodes, before, after, strict=True) if a > b]
        assert asked is cluster.owner(slot_of("k"))


async def test_what_a_replica_does_not_have_comes_from_its_primary(cluster: Cluster) -> None:
    owner = cluster.owner(slot_of("k"))
    (replica,) = cluster.replicas(owner)
    async with aionpredis.connect(cluster.url, read_replicas=True) as client:
        await client.set("k", array(5))
        assert owner.call("WAIT", 1, 5000) == 1
        replica.call("CONFIG", "SET", "replica-read-only", "no")
        try:
            replica.call("FLUSHALL")
            before = calls(owner, "get"), calls(replica, "get")
            value = await client.get_value("k", immutable=True)
            assert value is not None
            assert bytes(value[-8:]) == array(5)[-1:].tobytes()
            assert (calls(owner, "get"), calls(replica, "get")) == (before[0] + 1, before[1] + 1)
        finally:
            replica.call("CONFIG", "SET", "replica-read-only", "yes")


def calls(node: Node, command: str) -> int:
    """How often a server ran a command."""
    facts: dict[str, dict[str, int]] = node.call("INFO", "commandstats")
    return facts.get(f"cmdstat_{command}", {}).get("calls", 0)


async def test_a_client_of_one_server_says_that_there_are_more(cluster: Cluster) -> None:
    node = cluster.primaries()[0]
    key = next(key for key in KEYS if cluster.owner(slot_of(key)) is not node)
    async with aionpredis.connect(f"redis://{node.address}:{node.port}") as client:
        with pytest.raises(Redirected, match=r"redis\+cluster://") as caught:
            await client.get(key)
        owner = cluster.owner(slot_of(key))
        assert caught.value.address == (owner.address, owner.port)
        assert caught.value.slot == slot_of(key)
        assert not caught.value.asks


@given(st.text("{}ab").map(str.encode) | st.binary())
def test_slots_are_those_of_redis_py(key: bytes) -> None:
    assert _slot(key) == slot_of(key)


@given(st.lists(st.lists(st.binary(max_size=2000), min_size=1, max_size=4), min_size=1, max_size=6))
def test_a_request_can_be_split_into_its_commands(commands: list[list[bytes]]) -> None:
    whole = [b"".join(bytes(buffer) for buffer in resp.encode(*command)) for command in commands]
    assert [bytes(part) for part in resp.split(b"".join(whole))] == whole


async def test_a_server_that_falls_silent_is_left_when_another_takes_its_place(cluster: Cluster) -> None:
    async with aionpredis.connect(cluster.url, timeout=60) as client:
        await client.set("k", array(1))
        owner = cluster.owner(slot_of("k"))
        assert owner.call("WAIT", 1, 5000) == 1
        cluster.stop(owner)  # its connections stay open, and nothing comes
        try:
            with anyio.fail_after(30):
                assert is_array(await client.get("k"), 1)
            assert client.stats().errors["ConnectionLost"] == 1
        finally:
            cluster.cont(owner)


@pytest.mark.parametrize("known", [True, False], ids=["connected", "to be dialled"])
async def test_a_replica_that_falls_silent_is_not_read_from(cluster: Cluster, known: bool) -> None:
    (replica,) = cluster.replicas(cluster.owner(slot_of("k")))
    async with aionpredis.connect(cluster.url, timeout=60, connect_timeout=60, read_replicas=True) as client:
        await client.set("k", array(1))
        assert cluster.owner(slot_of("k")).call("WAIT", 1, 5000) == 1
        if known:
            await client.get_value("k", immutable=True)
        cluster.stop(replica)
        try:
            with anyio.fail_after(20):
                assert await client.get_value("k", immutable=True) is not None
        finally:
            cluster.cont(replica)


async def test_one_who_waits_at_a_silent_server_is_told_when_another_takes_its_place(cluster: Cluster) -> None:
    found: list[int] = []

    async def watch(client: aionpredis.Client) -> None:
        async for version, _ in client.policy("p").watch():
            found.append(version)
            if version == 2:
                break

    async with aionpredis.connect(cluster.url, timeout=60) as client, aionpredis.connect(cluster.url) as publisher:
        await publisher.policy("p").publish({"w": array(1)})
        for node in cluster.primaries():
            node.call("WAIT", 1, 5000)
        owner = cluster.owner(slot_of("{p}:policy"))
        with anyio.fail_after(45):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(watch, client)
                while not found:
                    await anyio.sleep(0.01)
                await anyio.sleep(0.1)  # it waits for the next one
                (replica,) = cluster.replicas(owner)
                cluster.stop(owner)
                try:
                    while (await anyio.to_thread.run_sync(replica.info))["role"] != "master":
                        await anyio.sleep(0.05)
                    await publisher.policy("p").publish({"w": array(2)})
                    while len(found) < 2:
                        await anyio.sleep(0.05)
                finally:
                    cluster.cont(owner)
        assert found == [1, 2]


async def test_cancelled_mget_that_waits_for_one_server_writes_nothing_of_the_others(cluster: Cluster) -> None:
    first, second = cluster.primaries()[:2]
    keys = [next(key for key in KEYS if cluster.owner(slot_of(key)) is node) for node in (first, second)]
    async with aionpredis.connect(cluster.url) as client:
        for key in keys:
            await client.set(key, array(7))
        out = np.zeros((2, 100), np.int64)
        connection = client.live_connection(keys[1].encode())
        assert connection is not None
        connection.close()
        try:
            for node in (first, second):  # one answers late, the other lets nobody in
                cluster.stop(node, patience=PATIENT)
            with anyio.move_on_after(0.2) as scope:
                await client.mget(keys, out=out)
            assert scope.cancelled_caught
        finally:
            for node in (first, second):
                cluster.cont(node)
        assert is_array(await client.get(keys[0]), 7)  # behind what was asked for before
        assert not out.any()


async def test_what_others_send_is_received_while_one_server_is_waited_for(
    cluster: Cluster, anyio_backend_name: str
) -> None:
    first, second = cluster.primaries()[:2]
    slow = next(key for key in KEYS if cluster.owner(slot_of(key)) is first)
    keys = [slow, *[key for key in KEYS if cluster.owner(slot_of(key)) is second][:20]]
    async with aionpredis.connect(cluster.url) as client:
        for key in keys:
            await client.set(key, array(7))
        out = np.zeros((len(keys), 100), np.int64)
        before = client.stats().bytes_received
        cluster.stop(first, patience=PATIENT)  # when that is over its replica takes its place
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(partial(client.mget, keys, out=out))
                if anyio_backend_name != "trio":  # there only tasks that wait receive
                    with anyio.fail_after(PATIENT / 1000):
                        while client.stats().bytes_received - before < 20 * array(7).nbytes:
                            await anyio.sleep(0.001)
                cluster.cont(first)
        finally:
            cluster.cont(first)
        assert (out == 7).all()


async def test_keys_that_moved_to_a_server_that_is_gone_are_waited_for(cluster: Cluster) -> None:
    """Until its replica takes over: their old server still sends us to it."""
    source, target = cluster.primaries()[:2]
    key, *others = [key for key in KEYS if cluster.owner(slot_of(key)) is source][:3]
    async with aionpredis.connect(cluster.url) as client:
        for number, name in enumerate((key, *others)):
            await client.set(name, array(number))
        out = np.zeros((3, 100), np.int64)
        await client.mget([key, *others], out=out)
        cluster.migrate(slot_of(key), target)
        another = next(name for name in KEYS if name != key and cluster.owner(slot_of(name)) is target)
        target.call("SET", another, "")
        assert target.call("WAIT", 1, 5000) == 1
        cluster.kill(target)
        out[:] = 0
        with anyio.fail_after(30):
            assert (await client.mget([key, *others], out=out)).all()
        assert (out == np.arange(3)[:, None]).all()


async def test_who_waits_at_a_server_that_was_replaced_leaves_it_when_that_is_known(cluster: Cluster) -> None:
    old = cluster.owner(slot_of(KEYS[0]))
    (new,) = cluster.replicas(old)
    far = aionpredis.connect(cluster.url, connect_timeout=60)  # who connects there is not to wait so long, either
    async with far as client, client.blocking(KEYS[0].encode()) as connection:
        connection.patience = math.inf  # it is not to find out by itself
        reply = connection.submit(resp.encode("XREAD", "BLOCK", 0, "STREAMS", KEYS[0], "0"), Reply())
        cluster.stop(old)
        await anyio.to_thread.run_sync(lambda: wait(lambda: new.info()["role"] == "master", "its replica takes over"))
        with anyio.fail_after(20):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(client.get, KEYS[0])
                with pytest.raises(ConnectionLost, match="taken its place"):
                    await connection.wait(reply)


async def test_a_stream_on_its_way_is_waited_for_where_it_is_already(cluster: Cluster) -> None:
    stream = "{stream}:log"
    async with aionpredis.connect(cluster.url, retry_timeout=0.5) as client:
        await client.execute("XADD", stream, "1-0", "a", "b")
        target = other(cluster, cluster.owner(slot_of(stream)))
        with cluster.migrating(slot_of(stream), target, [stream]), anyio.fail_after(20):
            assert await streams.read_blocking(client, stream, (0, 0)) == [((1, 0), {b"a": b"b"})]
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(client.execute, "XADD", stream, "2-0", "c", "d")
                assert [entry for entry, _ in await streams.read_blocking(client, stream, (1, 0))] == [(2, 0)]
        assert await streams.read_blocking(client, stream, (1, 0)) == [((2, 0), {b"c": b"d"})]
