"""A cluster's slots are learned from whichever node answers, and each of its servers can be connected to."""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import pytest
import redis

from aionpredis.errors import AuthenticationError, ConnectError, ServerError, UsageError
from aionpredis.server import Server
from aionpredis.wire.connection import Connection
from aionpredis.wire.discovery import PATIENCE, Address, ClusterDialer, Slots, _parse, open_source
from aionpredis.wire.resp import MAX_BULK, Reply, encode

from .cluster import Cluster, slot_of
from .nodes import Node, new_port
from .servers import binary_of, free_port, make_server
from .test_tls import listener
from .tls import Certificates, tls_server

pytestmark = pytest.mark.anyio


def dialer(source: Any, connect_timeout: float = 5.0, **options: Any) -> ClusterDialer:
    made = open_source(source, connect_timeout=connect_timeout, timeout=5.0, max_bulk=MAX_BULK, **options)
    assert isinstance(made, ClusterDialer)
    return made


def address(node: Node) -> Address:
    return node.address, node.port


def url_of(*nodes: Node | int) -> str:
    return "redis+cluster://" + ",".join(f"127.0.0.1:{node if isinstance(node, int) else node.port}" for node in nodes)


def seen_by(cluster: Cluster) -> list[Slots]:
    """The map, as stock redis-py reads it."""
    map_ = []
    for primary in cluster.primaries():
        slots = sorted(cluster.slots(primary))  # earlier tests may have moved some
        ends = [(a, b) for a, b in pairwise(slots) if b != a + 1]
        firsts, lasts = [slots[0], *(b for _, b in ends)], [*(a for a, _ in ends), slots[-1]]
        replicas = tuple(map(address, cluster.replicas(primary)))
        map_ += [Slots(first, last, address(primary), replicas) for first, last in zip(firsts, lasts, strict=True)]
    return sorted(map_)


async def ask(connection: Connection, *command: str) -> Any:
    reply = connection.submit(encode(*command), Reply())
    await connection.wait(reply)
    return reply.result()


@pytest.fixture(params=["valkey", "redis"])
def single(request: pytest.FixtureRequest) -> Iterator[Server]:
    """A cluster of one, which does not know its own address; it has no slots yet."""
    config = {"cluster-enabled": "yes", "bind": "127.0.0.1"}
    with Server(binary=binary_of(request.param), port=new_port(), config=config) as server:
        yield server


def give_slots(server: Server, *spans: tuple[int, int], **options: Any) -> None:
    with redis.Redis.from_url(server.url, **options) as admin:
        for first, last in spans:
            admin.execute_command("CLUSTER", "ADDSLOTSRANGE", first, last)


def port_of(server: Server) -> int:
    with redis.Redis.from_url(server.url) as admin:
        return int(admin.config_get("port")["port"])


# --- the map ---------------------------------------------------------------------------------------------------------


async def test_all_slots_with_primaries_and_replicas(cluster: Cluster) -> None:
    found = await dialer(cluster.url).discover()
    assert sorted(found) == sorted(seen_by(cluster))
    assert sum(span.last - span.first + 1 for span in found) == 16_384
    assert all(span.replicas for span in found)


async def test_map_after_a_failover(cluster: Cluster) -> None:
    finder = dialer(cluster.url)
    before = await finder.discover()
    await anyio.to_thread.run_sync(cluster.failover, cluster.primaries()[0])
    after = await finder.discover()
    assert sorted(after) == sorted(seen_by(cluster))
    assert {span.primary for span in after} != {span.primary for span in before}


async def test_slots_that_nobody_serves_are_left_out(single: Server) -> None:
    give_slots(single, (0, 99), (200, 16_383))
    here = "127.0.0.1", port_of(single)
    found = await dialer(url_of(here[1])).discover()
    assert found == [Slots(0, 99, here, ()), Slots(200, 16_383, here, ())]


def test_servers_of_unknown_names_are_where_the_map_was_asked_for() -> None:
    answer = [[0, 16_383, [b"?", 1, b"a"], [b"", 2, b"b"], [b"there", 3, b"c"], [b"?", 4, b"d"]]]
    assert _parse(answer, ("here", 9)) == [Slots(0, 16_383, ("here", 1), (("here", 2), ("there", 3), ("here", 4)))]


async def test_node_without_an_address_is_where_it_was_asked(single: Server) -> None:
    give_slots(single, (0, 16_383))
    port = port_of(single)
    (span,) = await dialer(f"redis+cluster://localhost:{port}").discover()
    assert span.primary == ("localhost", port)
    (span,) = await dialer(url_of(port)).discover()
    assert span.primary == ("127.0.0.1", port)


async def test_addresses_are_mapped_to_where_they_are_reached(cluster: Cluster) -> None:
    finder = dialer(cluster.url, address_remap=lambda address: ("elsewhere", address[1] + 1))
    found = await finder.discover()
    spoken = [each for span in seen_by(cluster) for each in (span.primary, *span.replicas)]
    assert {each for span in found for each in (span.primary, *span.replicas)} == {
        ("elsewhere", port + 1) for _, port in spoken
    }
    assert finder.reached(("here", 1)) == ("elsewhere", 2)


async def test_error_of_the_callers_map_comes_as_it_is(cluster: Cluster) -> None:
    with pytest.raises(KeyError, match="127"):
        await dialer(cluster.url, address_remap=lambda address: {}[address]).discover()


# --- who is asked ----------------------------------------------------------------------------------------------------


async def test_any_node_that_answers(cluster: Cluster) -> None:
    dead = free_port()
    for node in cluster.nodes:
        found = await dialer(url_of(dead, node)).discover()
        assert sorted(found) == sorted(seen_by(cluster))


async def test_nodes_that_were_named_are_asked_when_those_in_the_url_are_gone(cluster: Cluster) -> None:
    asked = cluster.replicas(cluster.primaries()[0])[0]
    finder = dialer(url_of(asked))
    await finder.discover()
    cluster.kill(asked)
    assert {span.primary for span in await finder.discover()} == {address(node) for node in cluster.primaries()}


async def test_nodes_in_the_url_are_asked_when_those_that_were_named_are_gone(cluster: Cluster) -> None:
    dead = free_port()
    finder = dialer(cluster.url, address_remap=lambda address: (address[0], dead))
    await finder.discover()
    finder._known = finder._known[1:]  # who answered is gone, too
    assert finder._known == (("127.0.0.1", dead),)
    assert await finder.discover()


async def test_silent_node_costs_half_a_second(cluster: Cluster) -> None:
    silent, other = cluster.nodes[:2]
    cluster.stop(silent)
    began = time.monotonic()
    assert await dialer(url_of(silent, other), connect_timeout=30).discover()
    assert PATIENCE <= time.monotonic() - began < 15


async def test_all_silent_nodes_together_take_about_one_connect_timeout() -> None:
    def greet(connection: Any, ended: Any) -> None:
        while (data := connection.recv(1 << 16)) and b"SLOTS" not in data:
            connection.sendall(b"+OK\r\n" * data.count(b"*"))
        ended.wait(30)

    with listener(lambda connection, ended: ended.wait(30)) as one, listener(greet) as two:
        began = time.monotonic()
        late = rf"{one}: .*[Tt]ime.*out.*rediss://.*{two}: CLUSTER SLOTS timed out after 1 s"
        with pytest.raises(ConnectError, match=rf"no node of redis\+cluster://127.* answered: .*{late}"):
            await dialer(url_of(one, two), connect_timeout=1).discover()
        assert time.monotonic() - began < 20


async def test_cancelled_search_closes_what_it_has_opened() -> None:
    opened, closed = [], []

    def talk(connection: Any, ended: Any) -> None:
        opened.append(connection)
        while connection.recv(1 << 16):
            pass
        closed.append(connection)

    with listener(talk) as one, listener(talk) as two:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(dialer(url_of(one, two), connect_timeout=2.5).discover)
            with anyio.fail_after(20):
                while len(opened) < 2:
                    await anyio.sleep(0.01)
            tasks.cancel_scope.cancel()
        with anyio.fail_after(20):  # redis-py's thread ends with its time-out
            while len(closed) < 2:
                await anyio.sleep(0.01)


async def test_server_that_is_no_cluster() -> None:
    with make_server("valkey", port=(port := free_port())):
        with pytest.raises(ConnectError, match=rf"127.0.0.1:{port} is not known as part of a cluster: .*CLUSTER SLOTS"):
            await dialer(url_of(port)).discover()


async def test_node_without_slots_is_no_part_of_the_cluster(single: Server, cluster: Cluster) -> None:
    port = port_of(single)
    with pytest.raises(ConnectError, match="knows of no slots"):
        await dialer(url_of(port)).discover()
    assert sorted(await dialer(url_of(port, cluster.nodes[0])).discover()) == sorted(seen_by(cluster))


@pytest.mark.parametrize(
    "reply", [b"+OK\r\n", b":1\r\n", b"*1\r\n*1\r\n:1\r\n", b"*1\r\n*3\r\n$1\r\nx\r\n:1\r\n*0\r\n"]
)
async def test_answer_that_is_no_map(reply: bytes) -> None:
    def answer(connection: Any, ended: Any) -> None:
        while data := connection.recv(1 << 16):
            asked = data.count(b"SLOTS")
            connection.sendall(b"+OK\r\n" * (data.count(b"*") - asked) + reply * asked)

    with listener(answer) as port, pytest.raises(ConnectError, match="answers CLUSTER SLOTS with something else"):
        await dialer(url_of(port)).discover()


# --- its servers -----------------------------------------------------------------------------------------------------


async def test_every_server_of_a_cluster_can_be_connected_to(cluster: Cluster) -> None:
    finder = dialer(cluster.url)
    for span in await finder.discover():
        for where in (span.primary, *span.replicas):
            made = finder.at(where)
            assert made.url == f"redis://{where[0]}:{where[1]}"
            connection = await made.dial()
            assert f"tcp_port:{where[1]}\r\n" in (await ask(connection, "INFO", "server")).decode()
            connection.close()


async def test_replica_answers_reads_if_told_to(cluster: Cluster) -> None:
    slot = slot_of("k")
    primary = cluster.owner(slot)
    primary.call("SET", "k", "v")
    primary.call("WAIT", 1, 5000)
    finder = dialer(cluster.url)
    (span,) = [span for span in await finder.discover() if span.first <= slot <= span.last]
    connection = await finder.at(span.replicas[0]).dial(readonly=True)
    assert await ask(connection, "GET", "k") == b"v"
    connection.close()
    connection = await finder.at(span.replicas[0]).dial()
    with pytest.raises(ServerError, match="MOVED"):
        await ask(connection, "GET", "k")
    connection.close()


async def test_server_that_refuses_readonly() -> None:
    with make_server("redis", port=(port := free_port())):
        made = open_source(f"redis://127.0.0.1:{port}", connect_timeout=5, timeout=5, max_bulk=MAX_BULK)
        assert not isinstance(made, ClusterDialer)
        with pytest.raises(ConnectError, match="cluster support disabled"):
            await made.dial(readonly=True)


@pytest.mark.parametrize("kind", ["valkey", "redis"])
async def test_password_and_user_hold_for_every_node(kind: str) -> None:
    with Cluster(1, 1, binary=binary_of(kind), password="pä/ss") as cluster:
        (span,) = await dialer(cluster.url).discover()
        for where in (span.primary, *span.replicas):
            (await dialer(cluster.url).at(where).dial()).close()
        with pytest.raises(AuthenticationError, match=r"no node of redis\+cluster://127.*refused to let us in"):
            await dialer(url_of(*cluster.nodes), password="another").discover()
        for node in cluster.nodes:
            node.call("ACL", "SETUSER", "few", "on", ">pw", "+get", "~*")
        with pytest.raises(ConnectError, match=r"ACL needs \+cluster\|slots"):
            await dialer(url_of(*cluster.nodes), username="few", password="pw").discover()
        for node in cluster.nodes:
            node.call("ACL", "SETUSER", "few", "+cluster|slots")
        finder = dialer(url_of(*cluster.nodes), username="few", password="pw")
        assert await finder.discover() == [span]
        with pytest.raises(AuthenticationError, match="readonly"):
            await finder.at(span.replicas[0]).dial(readonly=True)
        for node in cluster.nodes:
            node.call("ACL", "SETUSER", "few", "+readonly")
        (await finder.at(span.replicas[0]).dial(readonly=True)).close()


async def test_tls_asks_for_the_name_of_each_server(tmp_path: Path) -> None:
    certificates = Certificates(tmp_path / "c", "localhost")
    with tls_server(
        "redis", certificates, cluster_enabled="yes", tls_cluster="yes", cluster_port=str(free_port())
    ) as port:
        tls: dict[str, Any] = {"ssl_ca_certs": str(certificates.ca_file)}
        with redis.Redis.from_url(f"rediss://localhost:{port}", **tls) as admin:
            admin.execute_command("CLUSTER", "ADDSLOTSRANGE", 0, 16_383)
        finder = dialer(f"rediss+cluster://localhost:{port}", **tls)
        (span,) = await finder.discover()
        made = finder.at(span.primary)
        assert made.url == f"rediss://localhost:{port}"
        (await made.dial()).close()
        with pytest.raises(ConnectError, match="connect by a name that is in the server's certificate"):
            await finder.at(("127.0.0.1", port)).dial()


def test_cluster_has_one_database() -> None:
    with pytest.raises(UsageError, match="database than 0"):
        dialer("redis+cluster://h:1?db=3")
    with pytest.raises(UsageError, match="database than 0"):
        dialer("redis+cluster://h:1", db=3)
    with pytest.raises(UsageError, match="leave it out"):
        dialer("redis+cluster://h:1/3")
    assert dialer("redis+cluster://h:1?db=0").url == "redis+cluster://h:1"
