"""A service that Sentinels watch: whoever is its primary is found, again after each failover."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import numpy as np
import pytest
import redis
from redis.sentinel import Sentinel

import aionpredis
from aionpredis.errors import AuthenticationError, ConnectError, ConnectionLost
from aionpredis.server import Server
from aionpredis.wire.connection import Connection
from aionpredis.wire.dial import Dialer
from aionpredis.wire.resp import MAX_BULK, Reply, encode

from .nodes import Node
from .sentinel import SERVICE, Sentinels
from .servers import binary_of, free_port
from .test_tls import listener, stay_silent
from .tls import Certificates, tls_server

pytestmark = pytest.mark.anyio

ARRAY = np.arange(100)


def dialer(source: Any, connect_timeout: float = 5.0, **options: Any) -> Dialer:
    return Dialer(source, connect_timeout=connect_timeout, timeout=5.0, max_bulk=MAX_BULK, **options)


def url_of(*sentinels: Node | int, service: str = SERVICE) -> str:
    places = (f"127.0.0.1:{each if isinstance(each, int) else each.port}" for each in sentinels)
    return f"redis+sentinel://{','.join(places)}/{service}"


async def ask(connection: Connection, *command: str) -> Any:
    reply = connection.submit(encode(*command), Reply())
    await connection.wait(reply)
    return reply.result()


async def port_dialed(made: Dialer) -> int:
    connection = await made.dial()
    info = (await ask(connection, "INFO", "server")).decode()
    connection.close()
    return int(info.partition("tcp_port:")[2].split()[0])


# --- failovers -------------------------------------------------------------------------------------------------------


@pytest.mark.one_loop("servers are killed, which takes seconds")
async def test_client_goes_on_when_the_primary_is_killed(sentinels: Sentinels) -> None:
    async with aionpredis.connect(sentinels.url, retry_timeout=50) as client:
        assert client.url == sentinels.url
        await client.set("k", ARRAY)
        async with client.blocking() as connection:
            assert (await ask(connection, "ROLE"))[0] == b"master"
        sentinels.kill(sentinels.primary())
        await client.set("k", ARRAY + 1)  # waits for the next primary
        found = await client.get("k")
        assert found is not None
        assert (found == ARRAY + 1).all()
        with pytest.raises(ConnectionLost):  # one that was kept
            async with client.blocking() as connection:
                await ask(connection, "ROLE")
        async with client.blocking() as connection:
            assert (await ask(connection, "ROLE"))[0] == b"master"
        assert client.stats().reconnects == 1


@pytest.mark.one_loop("servers are killed, which takes seconds")
async def test_client_goes_on_when_roles_are_swapped(sentinels: Sentinels) -> None:
    async with aionpredis.connect(sentinels.url, retry_timeout=50) as client:
        await client.set("k", ARRAY)
        await anyio.to_thread.run_sync(sentinels.failover)
        await client.set("k", ARRAY + 1)  # the old one answers, as a replica
        found = await client.get("k")
        assert found is not None
        assert (found == ARRAY + 1).all()


async def test_server_that_is_no_primary_is_refused() -> None:
    """Between a failover and a Sentinel's hearing of it."""
    with Sentinels(sentinels=1) as sentinels:
        made = dialer(sentinels.url)
        primary, replica = sentinels.primary(), sentinels.servers[1]
        assert await port_dialed(made) == primary.port
        sentinels.sentinels[0].call("SENTINEL", "SET", SERVICE, "down-after-milliseconds", 60_000)  # no failover now
        primary.call("REPLICAOF", replica.address, replica.port)
        with pytest.raises(ConnectError, match=rf"the Sentinels say 127.0.0.1:{primary.port}, which is no primary"):
            await made.dial()


async def test_sentinel_that_has_not_heard_of_a_failover_is_passed_over(sentinels: Sentinels) -> None:
    with Sentinels(sentinels=1) as outdated:
        made = dialer(url_of(outdated.sentinels[0], sentinels.sentinels[0]))
        old = outdated.primary()
        assert await port_dialed(made) == old.port
        replica = outdated.servers[1]
        old.call("REPLICAOF", replica.address, replica.port)
        assert await port_dialed(made) == sentinels.primary().port
        (watched,) = outdated.sentinels
        outdated.stop(watched)
        began = time.monotonic()
        assert await port_dialed(made) == sentinels.primary().port
        assert time.monotonic() - began < 1  # from now on the other one is asked first


# --- Sentinels -------------------------------------------------------------------------------------------------------


async def test_all_sentinels_are_tried_within_one_connect_timeout(sentinels: Sentinels) -> None:
    silent, good = sentinels.sentinels[:2]
    sentinels.stop(silent)

    async def seconds(made: Dialer) -> float:
        began = time.monotonic()
        assert await port_dialed(made) == sentinels.primary().port
        return time.monotonic() - began

    async def first() -> Dialer:
        made = dialer(url_of(free_port(), silent, good), connect_timeout=3)
        assert 0.7 < await seconds(made) < 3
        return made

    try:
        made = await first()
    except ConnectError:  # the machine stood still for one of the four shares of the three seconds
        made = await first()
    assert min([await seconds(made) for _ in range(3)]) < 0.7  # the one that knew is asked first


async def test_no_connection_to_a_sentinel_remains(sentinels: Sentinels) -> None:
    watched = sentinels.sentinels[0]

    def connected() -> int:  # the other Sentinels come and go
        return sum(not client["name"].startswith("sentinel-") for client in watched.admin.client_list())

    before = connected()
    for _ in range(3):
        await port_dialed(dialer(url_of(watched)))
    with anyio.fail_after(20):
        while connected() > before:
            await anyio.sleep(0.01)


async def test_database_and_other_options_are_the_servers(sentinels: Sentinels) -> None:
    connection = await dialer(f"{sentinels.url}/3?client_name=me").dial()
    info = (await ask(connection, "CLIENT", "LIST")).decode()
    connection.close()
    (line,) = [line for line in info.splitlines() if " name=me " in line]
    assert " db=3 " in line


async def test_other_server_of_the_service(sentinels: Sentinels) -> None:
    """With its credentials, and without asking the Sentinels."""
    (replica,) = [node for node in sentinels.servers if node is not sentinels.primary()]
    made = dialer(f"{sentinels.url}/2").at(replica.address, replica.port)
    assert made.url == f"redis://127.0.0.1:{replica.port}/2"
    assert await port_dialed(made) == replica.port


async def test_errors_name_the_service_and_its_sentinels(sentinels: Sentinels) -> None:
    with pytest.raises(ConnectError, match=r"of 'pong': 127.0.0.1:\d+: it watches 'mymaster'"):
        await dialer(url_of(sentinels.sentinels[0], service="pong")).dial()
    one, two = free_port(), free_port()
    with pytest.raises(ConnectError) as raised:
        await dialer(url_of(one, two)).dial()
    message = str(raised.value)
    assert f"redis+sentinel://127.0.0.1:{one},127.0.0.1:{two}/{SERVICE}" in message
    assert message.count("refused") == 2
    with pytest.raises(ConnectError, match="unknown command"):
        await dialer(url_of(sentinels.primary())).dial()  # a server, no Sentinel


async def test_silent_sentinels_take_no_longer_than_connect_timeout() -> None:
    with listener(stay_silent) as one, listener(stay_silent) as two:
        for _ in range(3):
            began = time.monotonic()
            with pytest.raises(ConnectError) as raised:
                await dialer(url_of(one, two), connect_timeout=1.2).dial()
            if (seconds := time.monotonic() - began) < 1.2:  # else the machine stood still for one of its three shares
                break
        assert seconds < 1.2
        assert re.search("Sentinel.*Timeout.*Timeout", str(raised.value))


async def test_primary_that_is_down_is_said_to_be() -> None:
    with Sentinels(replicas=0, sentinels=1) as sentinels:
        made = dialer(sentinels.url)
        sentinels.kill(sentinels.primary())
        with anyio.fail_after(50):
            while True:
                with pytest.raises(ConnectError) as raised:
                    await made.dial()
                if "is down" in str(raised.value):
                    break
                assert "refused" in str(raised.value)  # the Sentinel has not noticed yet
                await anyio.sleep(0.05)


# --- credentials and TLS ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["valkey", "redis"])
def locked(request: pytest.FixtureRequest) -> Iterator[Sentinels]:
    with Sentinels(0, 1, binary=binary_of(request.param), password="s/erver", sentinel_password="w@tch") as sentinels:
        yield sentinels


async def test_sentinels_have_a_password_of_their_own(locked: Sentinels) -> None:
    port = locked.primary().port
    assert await port_dialed(dialer(locked.url)) == port
    url = url_of(*locked.sentinels)
    assert await port_dialed(dialer(url, password="s/erver", sentinel_password="w@tch")) == port
    named: dict[str, Any] = {
        "username": "default",
        "password": "s/erver",
        "sentinel_username": "default",
        "sentinel_password": "w@tch",
    }
    assert await port_dialed(dialer(url, **named)) == port
    with pytest.raises(AuthenticationError, match="sentinel_password="):
        await dialer(url, password="s/erver").dial()
    with pytest.raises(AuthenticationError, match="sentinel_password="):
        await dialer(url, password="s/erver", sentinel_password="s/erver").dial()
    with pytest.raises(AuthenticationError, match="refused to let us in"):
        await dialer(url, sentinel_password="w@tch", password="another").dial()


async def test_rights_that_a_sentinel_wants(locked: Sentinels) -> None:
    """docs/security.md names them."""
    (sentinel,) = locked.sentinels
    made = dialer(url_of(sentinel), username="few", password="pw", sentinel_username="few", sentinel_password="pw")
    for node in locked.nodes:
        node.call("ACL", "SETUSER", "few", "reset", "on", ">pw", "+info")
    with pytest.raises(AuthenticationError, match=r"sentinel\|masters"):
        await made.dial()
    sentinel.call("ACL", "SETUSER", "few", "+sentinel|masters")
    assert await port_dialed(made) == locked.primary().port  # without ROLE it is believed


@pytest.fixture
def encrypted(tmp_path: Path) -> Iterator[tuple[int, Certificates]]:
    """A Sentinel and the server that it watches, both with TLS only and a certificate for 127.0.0.1: its port."""
    certificates = Certificates(tmp_path / "c", "127.0.0.1")
    program = tmp_path / "sentinel"
    program.write_text(f'#!/bin/sh\nexec {binary_of("redis")} "$@" --sentinel\n')
    program.chmod(0o700)
    port = free_port()
    config = {
        "tls-port": str(port),
        "tls-replication": "yes",
        "tls-auth-clients": "no",
        "tls-cert-file": str(certificates.server),
        "tls-key-file": str(certificates.server_key),
        "tls-ca-cert-file": str(certificates.ca_file),
    }
    with tls_server("redis", certificates) as watched, Server(binary=program, config=config) as sentinel:
        with redis.Redis.from_url(sentinel.url) as admin:
            admin.execute_command("SENTINEL", "MONITOR", SERVICE, "127.0.0.1", watched, 1)
        yield port, certificates


async def test_tls_to_sentinels_and_server(encrypted: tuple[int, Certificates], tmp_path: Path) -> None:
    port, certificates = encrypted
    tls: dict[str, Any] = {"ssl_ca_certs": str(certificates.ca_file)}
    url = f"rediss+sentinel://127.0.0.1:{port}/{SERVICE}"
    made = dialer(url, **tls)
    connection = await made.dial()
    assert await ask(connection, "PING") == b"PONG"
    connection.close()
    assert made.at("h", 1).url == "rediss://h:1"
    stranger = Certificates(tmp_path / "o").ca_file
    with pytest.raises(ConnectError, match=r"no Sentinel of .*CERTIFICATE_VERIFY_FAILED"):
        await dialer(url, ssl_ca_certs=str(stranger)).dial()
    with pytest.raises(ConnectError, match=r"no Sentinel of .*CERTIFICATE_VERIFY_FAILED.*'localhost'"):
        await dialer(url.replace("127.0.0.1", "localhost"), **tls).dial()
    # As a client of redis-py says it, the two may differ.
    finder: Any = Sentinel(  # type: ignore[no-untyped-call]
        [("127.0.0.1", port)], sentinel_kwargs={"ssl": True, **tls}, ssl=True, ssl_ca_certs=str(stranger)
    )
    with pytest.raises(ConnectError, match=r"no connection to rediss\+sentinel://.*CERTIFICATE_VERIFY_FAILED"):
        await dialer(finder.master_for(SERVICE)).dial()
    connection = await dialer(finder.master_for(SERVICE), **tls).dial()
    connection.close()
