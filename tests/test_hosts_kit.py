"""Hosts with addresses of their own: separate ones, as far as a network can tell."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest

from .cluster import Cluster
from .hosts import Hosts, hosts
from .nodes import wait
from .servers import binary_of

CONNECT = """
import socket, sys
with socket.socket() as client:
    client.settimeout(0.5)
    print(client.connect_ex((sys.argv[1], int(sys.argv[2]))))
"""


@pytest.fixture
def network() -> Iterator[Hosts]:
    with hosts(3) as network:
        if not network.separate:
            pytest.skip("no network namespaces: they want iproute2, util-linux, and root or user namespaces")
        yield network


def connects(network: Hosts, host: int, address: str, port: int) -> bool:
    program = network.run(host, [sys.executable, "-c", CONNECT, address, str(port)], stdout=subprocess.PIPE, text=True)
    return str(program.communicate(timeout=20)[0]) == "0\n"


def test_hosts_meet_only_in_the_network(network: Hosts) -> None:
    with Cluster(1, 0, hosts=network) as cluster:
        (node,) = cluster.nodes
        assert node.address == network.address(0)
        wait(lambda: connects(network, 1, node.address, node.port), "another host can connect")
        assert not connects(network, 1, "127.0.0.1", node.port)
        network.cut(0)
        assert not connects(network, 1, node.address, node.port)
        network.mend(0)
        wait(lambda: connects(network, 1, node.address, node.port), "it can connect again")


@pytest.mark.parametrize("kind", ["valkey", "redis"])
def test_a_host_that_is_cut_off_is_replaced(network: Hosts, kind: str) -> None:
    with Cluster(hosts=network, binary=binary_of(kind)) as cluster:
        old = cluster.primaries()[0]
        (new,) = cluster.replicas(old)
        assert (old.address, new.address) == (network.address(0), network.address(2))
        network.cut(0)
        wait(lambda: new.info()["role"] == "master", "the replica on another host takes over")
        assert old.info()["role"] == "master"  # nobody could tell it
        network.mend(0)
        cluster.wait_ok()
        assert cluster.replicas(new) == [old]


def test_addresses_do_where_there_are_no_namespaces() -> None:
    network = Hosts(3)
    with Cluster(hosts=network) as cluster:
        assert {node.address for node in cluster.nodes} == {"127.0.0.2", "127.0.0.3", "127.0.0.4"}
        assert {primary.address for primary in cluster.primaries()} == {node.address for node in cluster.nodes}
        for node in cluster.nodes:
            wait(lambda node=node: connects(network, 0, node.address, node.port), f"{node} lets us in")  # type: ignore[misc]
