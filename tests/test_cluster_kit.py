"""The clusters that other tests rely on do what those tests rely on: seen by stock redis-py."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
from redis.backoff import NoBackoff
from redis.cluster import RedisCluster
from redis.retry import Retry

from .cluster import Cluster, slot_of
from .nodes import Node
from .servers import exists, until


@pytest.fixture
def stock_cluster(cluster: Cluster) -> Iterator[RedisCluster]:
    with RedisCluster(host=cluster.nodes[0].address, port=cluster.nodes[0].port) as client:
        yield client


def another(cluster: Cluster, primary: Node) -> Node:
    return next(node for node in cluster.primaries() if node is not primary)


def answer(node: Node, command: str) -> str:
    """The first line of the reply as it is: redis-py's exceptions for it differ by version."""
    with socket.create_connection((node.address, node.port), timeout=10) as client:
        client.sendall(command.encode() + b"\r\n")
        return client.makefile().readline().strip()


@pytest.mark.parametrize("atomic", [False, True], ids=["by key", "atomic"])
def test_a_slot_that_moved_is_moved_with_its_keys(cluster: Cluster, stock_cluster: RedisCluster, atomic: bool) -> None:
    if atomic and "valkey_version" not in cluster.nodes[0].admin.info("server"):
        pytest.skip("only Valkey 9 moves slots atomically")
    keys = [f"{{a}}{i}" for i in range(250)]  # more than one batch
    for key in keys:
        stock_cluster.set(key, key)
    slot = slot_of("a")
    source = cluster.owner(slot)
    target = another(cluster, source)
    cluster.migrate(slot, target, atomic=atomic)

    assert cluster.owner(slot) is target
    for node in {*cluster.nodes} - {target}:
        assert answer(node, f"GET {keys[0]}") == f"-MOVED {slot} {target.address}:{target.port}"
    assert target.admin.dbsize() == len(keys)
    assert stock_cluster.mget_nonatomic(keys) == [key.encode() for key in keys]


def test_a_slot_on_its_way_is_asked_for_at_two_places(cluster: Cluster, stock_cluster: RedisCluster) -> None:
    stock_cluster.mset_nonatomic({"{a}moved": 1, "{a}not": 2})
    slot = slot_of("a")
    target = another(cluster, cluster.owner(slot))
    with cluster.migrating(slot, target, ["{a}moved"]) as source:
        for key in ("{a}moved", "{a}new"):
            assert answer(source, f"GET {key}") == f"-ASK {slot} {target.address}:{target.port}"
        assert source.admin.get("{a}not") == "2"
        assert answer(source, "MGET {a}moved {a}not").startswith("-TRYAGAIN")
        assert answer(target, "GET {a}moved").startswith("-MOVED")  # not without ASKING
        assert stock_cluster.get("{a}moved") == b"1"
        stock_cluster.set("{a}new", 3)
    assert cluster.owner(slot) is target
    assert target.admin.mget("{a}moved", "{a}not", "{a}new") == ["1", "2", "3"]


@pytest.mark.parametrize("graceful", [False, True], ids=["killed", "graceful"])
def test_a_replica_takes_the_place_of_its_primary(
    cluster: Cluster, stock_cluster: RedisCluster, graceful: bool
) -> None:
    slot = slot_of("key")
    old = cluster.owner(slot)
    old.admin.set("key", "value")
    assert old.admin.wait(1, 5000) == 1
    new = cluster.failover(slot, graceful=graceful)

    assert cluster.owner(slot) is new is not old
    assert new.admin.get("key") == "value"
    assert old.answers is graceful
    if not graceful:
        cluster.restart(old)
    assert old in cluster.replicas(new)
    assert stock_cluster.get("key") == b"value"


def test_a_stopped_node_is_silent_and_healed(cluster: Cluster) -> None:
    node = cluster.primaries()[0]
    cluster.stop(node)
    with (
        redis.Redis(port=node.port, socket_timeout=0.2, retry=Retry(NoBackoff(), 0)) as client,
        pytest.raises(redis.TimeoutError),
    ):
        client.ping()
    cluster.heal()
    assert node.admin.ping()


ENDS = """
import os
from tests.cluster import Cluster

with Cluster(primaries=1, replicas=0) as cluster:
    print(cluster.nodes[0].pid, cluster._folder, flush=True)
    cluster.stop(cluster.nodes[0])
    {end}
"""


@pytest.mark.parametrize("end", ["pass", "os._exit(0)"], ids=["left", "ended"])
def test_nothing_is_left_of_a_cluster(end: str) -> None:
    root = Path(__file__).parent.parent
    program = subprocess.run(
        [sys.executable, "-c", ENDS.format(end=end)], cwd=root, capture_output=True, text=True, check=True
    )
    pid, folder = program.stdout.split()
    until(lambda: not exists(int(pid)) and not Path(folder).exists(), "neither process nor folder is left")
