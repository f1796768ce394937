"""Servers are named by URLs, or by the clients of redis-py that a program has already."""

from __future__ import annotations

import ssl
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import redis
import redis.asyncio
import redis.asyncio.sentinel
import redis.sentinel

import aionpredis
from aionpredis.errors import AuthenticationError, ConnectError, UsageError
from aionpredis.server import Server
from aionpredis.wire.dial import Dialer
from aionpredis.wire.discovery import ClusterDialer, open_source
from aionpredis.wire.resp import MAX_BULK
from aionpredis.wire.source import read

from .cluster import Cluster
from .sentinel import SERVICE, Sentinels
from .servers import binary_of, free_port, make_server
from .tls import Certificates, Terminator, tls_server

pytestmark = pytest.mark.anyio

# --- URLs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "shown", "nodes"),
    [
        ("redis+cluster://a:1,b:2", "redis+cluster://a:1,b:2", (("a", 1), ("b", 2))),
        ("redis+cluster://u:p,q@a,b/", "redis+cluster://a:6379,b:6379", (("a", 6379), ("b", 6379))),
        ("rediss+cluster://[::1]:1,a:2,[fe80::2]?client_name=x", "rediss+cluster://[::1]:1,a:2,[fe80::2]:6379", None),
        ("redis+cluster://a:1,[::1]:2", "redis+cluster://a:1,[::1]:2", (("a", 1), ("::1", 2))),
    ],
)
def test_url_of_a_cluster(url: str, shown: str, nodes: Any) -> None:
    source = read(url)
    assert source.url == shown
    assert nodes in (None, source.nodes)
    assert source.settings({}).get("password") == ("p,q" if "@" in url else None)


@pytest.mark.parametrize(
    ("url", "shown", "db"),
    [
        ("redis+sentinel://a:1,b/svc", "redis+sentinel://a:1,b:26379/svc", None),
        ("rediss+sentinel://u:p@a,[::1]:2/svc/3", "rediss+sentinel://a:26379,[::1]:2/svc/3", 3),
        ("redis+sentinel://a/my%20svc/", "redis+sentinel://a:26379/my svc", None),
        ("redis+sentinel://a/svc?db=4&sentinel_password=p", "redis+sentinel://a:26379/svc", 4),
    ],
)
def test_url_of_a_service(url: str, shown: str, db: int | None) -> None:
    source = read(url)
    assert source.url == shown
    assert source.sentinels[0][0] == "a"
    assert source.settings({}).get("db") == db


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("redis+cluster://a:1,b:2/3", "leave it out"),
        ("redis+cluster://a?db=1", "leave out db=1"),
        ("redis+cluster://a/x", "leave it out"),
        ("redis+cluster://", "a host in the URL is missing"),
        ("redis+cluster://a,,b", "a host in the URL is missing"),
        ("redis+cluster://a:x", "a host in the URL is missing or wrong"),
        ("redis+cluster://a:70000", "a host in the URL is missing or wrong"),
        ("redis+cluster://[::1", "a host in the URL is missing or wrong"),
        ("redis+cluster://u:p/w@a", "%2F"),
        ("redis+sentinel://a", "service's name"),
        ("redis+sentinel://a/", "service's name"),
        ("redis+sentinel://a/svc/x", "maybe a database"),
        ("redis+sentinel://a/svc/1/2", "maybe a database"),
        ("redis+sentinel://:26379/svc", "a host in the URL is missing"),
        ("redis+sentinel://a/svc?nonsense=1", "nonsense"),
        ("redis+sentinel://a/svc?ssl_ca_certs=x", "ssl_… options are for rediss://"),
        ("rediss+sentinel://a/svc?ssl_ca_certs=/nowhere", "there is no '/nowhere'"),
        ("redis+nothing://a", "a URL looks like"),
        ("unix+cluster://a", "a URL looks like"),
        ("redis://a?sentinel_password=x", "sentinel_password"),
        ("redis://a/abc", "redis://a/abc: behind the host stands the number of a database"),
        ("rediss://a/3/4", "the number of a database"),
        ("redis://a/ 3", "the number of a database"),
        ("redis://a/3?db=4", "redis://a/3: another database"),
        ("redis+sentinel://a/svc/3?db=4", "svc/3: another database"),
        ("redis+cluster://u:p@a:1,u:p@b:2", "stand once, before the first host"),
        ("redis+sentinel://u:p@a:1,u:p@b:2/svc", "stand once, before the first host"),
    ],
)
def test_wrong_url_says_what_to_do(url: str, says: str) -> None:
    with pytest.raises(UsageError) as raised:
        opened(url)
    assert says in str(raised.value)
    assert raised.value.__context__ is None  # which would quote the URL


@pytest.mark.parametrize(
    ("url", "db"),
    [
        *(("redis://a", 0), ("redis://a/", 0), ("redis://a/3", 3), ("rediss://a/3/", 3), ("redis://a?db=4", 4)),
        *(("redis://a/3?db=3", 3), ("redis://a/%33", 3), ("unix:///a/b?db=5", 5), ("unix:///a/7", 0)),
    ],
)
def test_database_of_a_url(url: str, db: int) -> None:
    made = opened(url)
    assert isinstance(made, Dialer)
    assert made.database == db


def opened(source: Any, **options: Any) -> Dialer | ClusterDialer:
    return open_source(source, connect_timeout=5, timeout=5, max_bulk=MAX_BULK, **options)


def test_options_do_not_override_a_url_but_a_client() -> None:
    assert read("redis+cluster://u:p@a").settings({"username": "v"})["username"] == "u"
    client = redis.Redis(host="a", username="u", password="p", db=2)
    assert read(client).settings({"db": 3})["db"] == 3
    # Credentials are one thing: no user with another's password.
    assert "username" not in read(client).settings({"password": "q"})
    provider = redis.UsernamePasswordCredentialProvider("v", "q")
    settings = read(client).settings({"credential_provider": provider})
    assert settings["credential_provider"] is provider
    assert "password" not in settings


@pytest.mark.parametrize("source", [42, None, redis.ConnectionPool(), b"redis://a", redis.Redis, object()])
def test_anything_else_is_named(source: Any) -> None:
    with pytest.raises(UsageError, match=f"not by {type(source).__name__}: a URL looks like"):
        read(source)


def test_client_of_replicas_is_refused() -> None:
    finder: Any = redis.sentinel.Sentinel([("a", 1)])  # type: ignore[no-untyped-call]
    with pytest.raises(UsageError, match="master_for"):
        read(finder.slave_for("svc"))


# --- clients of redis-py ---------------------------------------------------------------------------------------------


class Place:
    """A server on TCP and a Unix socket that wants user and password."""

    user, password = "me", "pä/ss"

    def __init__(self, server: Server, port: int) -> None:
        self.server = server
        self.port = port
        self.path = server.url.removeprefix("unix://")
        self.login: dict[str, Any] = {"username": self.user, "password": self.password, "client_name": "taken", "db": 3}
        self.tcp: dict[str, Any] = {"host": "127.0.0.1", "port": port, **self.login}


@pytest.fixture(scope="module", params=["valkey", "redis"])
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    config = {"bind": "127.0.0.1", "user": "me on >pä/ss ~* &* +@all"}
    with make_server(request.param, port=(port := free_port()), config=config) as server:
        with redis.Redis.from_url(server.url) as admin:
            admin.acl_setuser("default", enabled=False)
            yield Place(server, port)


def provider(place: Place) -> redis.CredentialProvider:
    return redis.UsernamePasswordCredentialProvider(place.user, place.password)


CLIENTS: dict[str, Callable[[Place], Any]] = {
    "TCP": lambda place: redis.Redis(**place.tcp),
    "Unix": lambda place: redis.Redis(unix_socket_path=place.path, **place.login),
    "URL": lambda place: redis.Redis.from_url(f"redis://127.0.0.1:{place.port}/3", **place.login),
    "pool": lambda place: redis.Redis(connection_pool=redis.ConnectionPool(**place.tcp, max_connections=3)),
    "RESP3, decoded": lambda place: redis.Redis(protocol=3, decode_responses=True, socket_timeout=9, **place.tcp),
    "provider": lambda place: redis.Redis(
        port=place.port, db=3, client_name="taken", credential_provider=provider(place)
    ),
    "asyncio TCP": lambda place: redis.asyncio.Redis(**place.tcp),
    "asyncio Unix": lambda place: redis.asyncio.Redis(unix_socket_path=place.path, **place.login),
    "asyncio URL": lambda place: redis.asyncio.Redis.from_url(f"unix://{place.path}", **place.login),
    "asyncio provider": lambda place: redis.asyncio.Redis(
        port=place.port, db=3, client_name="taken", credential_provider=provider(place)
    ),
}


@pytest.mark.parametrize("make", CLIENTS.values(), ids=CLIENTS.keys())
async def test_client_says_where_and_who(place: Place, make: Callable[[Place], Any]) -> None:
    """Address, user, database and name are taken over; the client itself connects to nothing."""
    given = make(place)
    async with aionpredis.connect(given) as client:
        await client.set("k", np.ones(3))
        lines = (await client.execute("CLIENT", "LIST")).decode().splitlines()
    (mine,) = [line for line in lines if "name=taken" in line]
    assert " db=3 " in mine
    assert " user=me " in mine
    assert client.url in (
        f"redis://127.0.0.1:{place.port}/3",
        f"redis://localhost:{place.port}/3",
        f"unix://{place.path}",
    )


async def test_used_client_goes_on_and_shares_nothing(place: Place) -> None:
    with redis.Redis(**place.tcp) as given:
        identity = given.client_id()
        async with aionpredis.connect(given) as client:
            assert await client.execute("CLIENT", "ID") != identity
            given.set("k", b"x")
            assert given.client_id() == identity
        assert given.client_id() == identity


async def test_options_override_what_the_client_says(place: Place) -> None:
    given = redis.Redis(**(place.tcp | {"password": "another"}))
    with pytest.raises(AuthenticationError):
        async with aionpredis.connect(given):
            pass
    async with aionpredis.connect(given, username=place.user, password=place.password, client_name="other") as client:
        assert b" name=other " in await client.execute("CLIENT", "LIST")


@pytest.mark.parametrize("kind", [redis.Redis, redis.asyncio.Redis])
async def test_tls_is_taken_over(place: Place, kind: Any, tmp_path: Path) -> None:
    certificates = Certificates(tmp_path / "c", "localhost")
    with Terminator(place.server.url, certificates.context(clients=True)) as terminator:
        certificate, key = certificates.client()
        tls: dict[str, Any] = {"ssl": True, "ssl_certfile": str(certificate), "ssl_keyfile": str(key)}
        tls |= {"ssl_check_hostname": True, "port": terminator.port, **place.login}
        known = tls | {"ssl_ca_certs": str(certificates.ca_file)}

        async def works(given: Any, **options: Any) -> None:
            async with aionpredis.connect(given, **options) as client:
                assert await client.execute("PING") == b"PONG"
                assert client.url.startswith("rediss://")

        await works(kind(host="localhost", **known))
        await works(kind(host="127.0.0.1", **known | {"ssl_check_hostname": False}))
        unverified = tls | {"ssl_check_hostname": False}
        for requirement in ("none", ssl.CERT_NONE, None):
            await works(kind(host="127.0.0.1", **unverified, ssl_cert_reqs=requirement))
        await works(kind(host="localhost", **tls), ssl_ca_certs=str(certificates.ca_file))
        for wrong in (kind(host="localhost", **tls), kind(host="127.0.0.1", **known)):
            with pytest.raises(ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
                await works(wrong)
        url = f"rediss://me:p%C3%A4%2Fss@localhost:{terminator.port}"
        await works(
            kind.from_url(
                url, ssl_ca_certs=str(certificates.ca_file), ssl_certfile=str(certificate), ssl_keyfile=str(key)
            )
        )


def finders(sentinels: Sentinels, **options: Any) -> list[Any]:
    nodes = [(node.address, node.port) for node in sentinels.sentinels]
    return [kind(nodes, **options) for kind in (redis.sentinel.Sentinel, redis.asyncio.sentinel.Sentinel)]


@pytest.mark.parametrize("kind", ["valkey", "redis"])
async def test_service_of_a_client(kind: str) -> None:
    with Sentinels(1, 1, binary=binary_of(kind), password="pw", sentinel_password="watch") as sentinels:
        for finder in finders(sentinels, sentinel_kwargs={"password": "watch"}, password="pw"):
            async with aionpredis.connect(finder.master_for(SERVICE, db=2), retry_timeout=20) as client:
                assert client.url == f"redis+sentinel://127.0.0.1:{sentinels.sentinels[0].port}/{SERVICE}/2"
                await client.set("k", np.ones(3))
                assert b" db=2 " in await client.execute("CLIENT", "LIST")
        for finder in finders(sentinels, sentinel_kwargs={"password": "wrong"}, password="pw"):
            with pytest.raises(AuthenticationError, match="sentinel_password"):
                async with aionpredis.connect(finder.master_for(SERVICE)):
                    pass
            async with aionpredis.connect(finder.master_for(SERVICE), sentinel_password="watch"):
                pass
        for finder in finders(sentinels, min_other_sentinels=1, sentinel_kwargs={"password": "watch"}, password="pw"):
            with pytest.raises(ConnectError, match="too few Sentinels"):
                async with aionpredis.connect(finder.master_for(SERVICE)):
                    pass
        # Not asyncio's: redis-py 5 does not know it there.
        given = finders(sentinels, force_master_ip="nowhere", sentinel_kwargs={"password": "watch"}, password="pw")[0]
        with pytest.raises(ConnectError, match="nowhere"):
            async with aionpredis.connect(given.master_for(SERVICE)):
                pass


@pytest.mark.parametrize("kind", ["valkey", "redis"])
async def test_cluster_of_a_client(kind: str) -> None:
    with Cluster(1, 1, binary=binary_of(kind), password="pw") as cluster:
        node = cluster.nodes[1]
        where: dict[str, Any] = {"host": node.address, "port": node.port, "password": "pw"}
        url = f"redis://:pw@{node.address}:{node.port}/0"
        found = await discovered(cluster.url)
        with redis.RedisCluster(**where) as one, redis.RedisCluster.from_url(url) as two:
            for given in (one, two, redis.asyncio.RedisCluster(**where), redis.asyncio.RedisCluster.from_url(url)):
                assert await discovered(given) == found
        with pytest.raises(AuthenticationError):
            await discovered(redis.asyncio.RedisCluster(**where), password="another")

        def remap(address: tuple[str, int]) -> tuple[str, int]:
            return "localhost", address[1]

        with redis.RedisCluster(**where, address_remap=remap) as one:
            for given in (one, redis.asyncio.RedisCluster(**where, address_remap=remap)):
                assert {span.primary[0] for span in await discovered(given)} == {"localhost"}


async def discovered(source: Any, **options: Any) -> Any:
    dialer = opened(source, **options)
    assert isinstance(dialer, ClusterDialer)
    return await dialer.discover()


@pytest.mark.parametrize("kind", [redis.RedisCluster, redis.asyncio.RedisCluster])
async def test_tls_of_a_clusters_client(kind: Any, tmp_path: Path) -> None:
    certificates = Certificates(tmp_path / "c")
    config = {"cluster_enabled": "yes", "tls_cluster": "yes", "cluster_port": str(free_port())}
    with tls_server("redis", certificates, **config) as port:
        known = {"ssl_ca_certs": str(certificates.ca_file)}
        with redis.Redis.from_url(f"rediss://localhost:{port}", **known) as admin:
            admin.execute_command("CLUSTER", "ADDSLOTSRANGE", 0, 16_383)
        url = f"rediss://127.0.0.1:{port}"
        for given in (kind(host="127.0.0.1", port=port, ssl=True, **known), kind.from_url(url, **known)):
            (span,) = await discovered(given)
            assert span.primary == ("127.0.0.1", port)
            assert opened(given).url == f"rediss+cluster://127.0.0.1:{port}"
            if kind is redis.RedisCluster:
                given.close()
        stranger = Certificates(tmp_path / "o").ca_file
        with pytest.raises(ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
            await discovered(given, ssl_ca_certs=str(stranger))
