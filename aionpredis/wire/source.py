"""Where the servers are, and how to log in: read from a URL, or from a client of redis-py. Does no IO.

Of a client of redis-py (or valkey-py, whose classes look alike), blocking or asyncio, that is what it was told: addresses,
credentials, TLS. Not its time-outs, retries and hooks, which are for connections of another kind; and its own connections
are not touched.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import redis
import redis.asyncio
from redis.connection import parse_url

from aionpredis.errors import UsageError

__all__ = ["LOOKS_LIKE", "Address", "Servers", "Source", "place", "read"]

Servers = str | redis.Redis | redis.RedisCluster | redis.asyncio.Redis | redis.asyncio.RedisCluster
"""What names them: a URL, or a client of redis-py."""

Address = tuple[str, int]
"""Host and port."""

LOOKS_LIKE = (
    "a URL looks like redis://host:6379/0, rediss://host:6379, unix:///path/to/socket, redis+cluster://host:6379,host:6379 "
    "or redis+sentinel://host:26379,host:26379/service"
)

_ENCODED = "in a URL's user and password, write / as %2F, ? as %3F, # as %23, @ as %40"

_PORTS = {"cluster": 6379, "sentinel": 26379}

_TAKEN = {
    *("host", "port", "path", "db", "username", "password", "credential_provider", "client_name"),
    *("socket_keepalive", "socket_keepalive_options", "socket_type"),
}
"""What else a connection of a client was told is taken over only if it is about TLS (``ssl_…``)."""


@dataclass(frozen=True)
class Source:
    """One server, a service that Sentinels watch, or a cluster. ``url``: it as it may stand in a message."""

    url: str
    nodes: tuple[Address, ...] = ()  # of a cluster
    remap: Callable[[Address], Address] | None = (
        None  # a cluster's addresses, from what its nodes say to what is reached
    )
    sentinels: tuple[Address, ...] = ()
    service: str = ""
    min_other_sentinels: int = 0
    force_ip: str | None = None  # of the server that the Sentinels find
    # With secrets, so in no repr:
    from_url: str = field(default="", repr=False)
    from_client: Mapping[str, Any] = field(default_factory=dict, repr=False)
    from_sentinel: Mapping[str, Any] | None = field(default=None, repr=False)  # how a client's Sentinels are connected

    def settings(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments of redis-py's connection. Options override what a client says, and a URL overrides options.

        Raises:
            ValueError: the URL has an option that is wrong.
        """
        if self.from_url:
            return dict(options) | parse_url(self.from_url)  # type: ignore[no-untyped-call,no-any-return]
        given = dict(self.from_client)
        if not {"username", "password", "credential_provider"}.isdisjoint(options):  # either, never a mixture
            for name in ("username", "password", "credential_provider"):
                given.pop(name, None)
        return given | dict(options)


def read(source: Servers) -> Source:
    """What a URL or a client of redis-py says.

    Raises:
        UsageError: it is neither, or wrong. No message quotes what may be a secret.
    """
    if isinstance(source, str):
        scheme = source.partition("://")[0]
        secure, _, kind = scheme.partition("+")
        if secure in ("redis", "rediss") and kind in _PORTS:
            return _read_many(source, secure, kind)
        shown = without_secrets(source)
        if secure != "unix":
            parts = urlsplit(source)
            _check_database(shown, parts.path, parts.query)
        return Source(shown, from_url=source)
    if hasattr(source, "nodes_manager"):
        return _read_cluster(source.nodes_manager)
    if hasattr(source, "connection_pool"):
        pool = source.connection_pool
        return _read_service(pool) if hasattr(pool, "sentinel_manager") else _read_server(pool)
    raise UsageError(
        f"servers are named by a URL or by a client of redis-py, not by {type(source).__name__}: {LOOKS_LIKE}"
    )


# --- URLs ------------------------------------------------------------------------------------------------------------


def without_secrets(url: str) -> str:
    """The URL of one server as it may stand in a message: no user, no password, no options.

    Raises:
        UsageError: it is none, or it cannot be told where a password in it ends.
    """
    try:
        parts = urlsplit(url)
        place = parts.hostname or ""
        if ":" in place:
            place = f"[{place}]"
        if parts.port is not None:
            place += f":{parts.port}"
    except ValueError:  # it quotes the URL
        parts = None
    if parts is None or "://" not in url or parts.scheme not in ("redis", "rediss", "unix"):
        raise UsageError(f"this is no URL of a server: {LOOKS_LIKE}" + (f"; {_ENCODED}" if "@" in url else ""))
    known = "@" in parts.netloc or (parts.scheme == "unix" and not parts.netloc)
    if not known and "@" in url:
        raise UsageError(f"an @ behind the host: {_ENCODED}")
    return f"{parts.scheme}://{place}{parts.path}"


def _check_database(shown: str, path: str, query: str) -> None:
    """See that a URL names one at most: redis-py leaves out what is no number, and takes 3/4 for 34."""
    name = unquote(path).strip("/")
    if name and not (name.isascii() and name.isdecimal()):
        raise UsageError(f"{shown}: behind the host stands the number of a database, or nothing: …/0")
    if name and parse_qs(query).get("db", [name]) != [name]:
        raise UsageError(f"{shown}: another database than that behind the host stands in ?db=")


def _read_many(url: str, secure: str, kind: str) -> Source:
    """A URL with several hosts, which ``urlsplit`` does not know: the first stands for them where redis-py reads the rest."""
    rest = url.partition("://")[2]
    netloc = re.split("[/?#]", rest, maxsplit=1)[0]
    path, _, query = rest[len(netloc) :].partition("#")[0].partition("?")
    login, at, hosts = netloc.rpartition("@")
    if not at and "@" in url:
        raise UsageError(f"an @ behind the hosts: {_ENCODED}")
    if re.search("@.*,", login):
        raise UsageError(f"user and password stand once, before the first host; {_ENCODED}")
    scheme = f"{secure}+{kind}"
    nodes = tuple(_read_host(host, scheme, _PORTS[kind]) for host in hosts.split(","))
    shown = f"{scheme}://{','.join(map(place, nodes))}"
    first = f"{secure}://{login}{at}{place(nodes[0])}"
    without_secrets(first)  # raises what urlsplit() would, without quoting it
    names = [unquote(name) for name in path.split("/") if name]
    if kind == "cluster":
        if names:
            raise UsageError(
                f"{shown}: nothing stands behind the hosts; a cluster has no other database than 0, leave it out"
            )
        return Source(shown, nodes=nodes, from_url=f"{first}?{query}")
    if not names or len(names) > 2 or not all(name.isdecimal() for name in names[1:]):
        raise UsageError(
            f"{shown}: behind the hosts stands the service's name, and maybe a database: …/service or …/service/0"
        )
    shown = f"{shown}/{'/'.join(names)}"
    _check_database(shown, "".join(names[1:]), query)
    return Source(
        shown,
        sentinels=nodes,
        service=names[0],
        from_url=f"{first}/{''.join(names[1:])}?{query}",
    )


def _read_host(text: str, scheme: str, port: int) -> Address:
    try:
        parts = urlsplit(f"//{text}")
        address = parts.hostname or "", parts.port or port
    except ValueError:  # it quotes the text, which may be a password without its host
        address = "", 0
    if not address[0]:
        raise UsageError(f"a host in the URL is missing or wrong: {scheme}://host:{port},host:{port}; {_ENCODED}")
    return address


def place(address: Address) -> str:
    """As it stands in a URL."""
    host, port = address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


# --- clients ---------------------------------------------------------------------------------------------------------


def _read_server(pool: Any) -> Source:
    settings, secure = _taken(pool.connection_kwargs, pool.connection_class)
    if "path" in settings:
        return Source(f"unix://{settings['path']}", from_client=settings)
    db = f"/{settings['db']}" if settings.get("db") else ""
    return Source(f"{secure}://{place(_address(settings, 6379))}{db}", from_client=settings)


def _read_cluster(manager: Any) -> Source:
    arguments = manager.connection_kwargs
    settings, secure = _taken(arguments, arguments.get("connection_class"))
    nodes = tuple((node.host, int(node.port)) for node in manager.startup_nodes.values())
    settings["host"], settings["port"] = nodes[0]
    return Source(
        f"{secure}+cluster://{','.join(map(place, nodes))}",
        nodes=nodes,
        remap=getattr(manager, "address_remap", None),
        from_client=settings,
    )


def _read_service(pool: Any) -> Source:
    if not pool.is_master:
        raise UsageError("a client made by slave_for() may only read: master_for() makes one that writes, too")
    manager = pool.sentinel_manager
    settings, secure = _taken(pool.connection_kwargs, pool.connection_class)
    pools = [client.connection_pool for client in manager.sentinels]
    sentinels = tuple(_address(each.connection_kwargs, 26379) for each in pools)
    db = f"/{settings['db']}" if settings.get("db") else ""
    return Source(
        f"{secure}+sentinel://{','.join(map(place, sentinels))}/{pool.service_name}{db}",
        sentinels=sentinels,
        service=pool.service_name,
        min_other_sentinels=manager.min_other_sentinels,
        force_ip=getattr(manager, "_force_master_ip", None),  # it has no other name
        from_client=settings,
        from_sentinel=_taken(pools[0].connection_kwargs, pools[0].connection_class)[0],
    )


def _taken(arguments: Mapping[str, Any], kind: type | None) -> tuple[dict[str, Any], str]:
    """The arguments for a blocking connection of redis-py, and the scheme: ``redis`` or ``rediss``."""
    # By name: blocking, asyncio, managed by a Sentinel, of redis-py or valkey-py.
    secure = bool(arguments.get("ssl")) or any(
        base.__name__ == "SSLConnection" for base in getattr(kind, "__mro__", ())
    )
    settings = {
        name: value
        for name, value in arguments.items()
        if value is not None and (name in _TAKEN or (secure and name.startswith("ssl_")))
    }
    if secure:
        settings["connection_class"] = redis.SSLConnection
        if arguments.get("ssl_cert_reqs", "required") is None:
            settings["ssl_cert_reqs"] = "none"  # what None means to redis-py
    elif "path" in settings:
        settings["connection_class"] = redis.UnixDomainSocketConnection
    if not isinstance(
        settings.get("socket_keepalive_options"), Mapping
    ):  # redis-py 8's default is an object of its own
        settings.pop("socket_keepalive_options", None)
    return settings, "rediss" if secure else "redis"


def _address(settings: Mapping[str, Any], port: int) -> Address:
    return settings.get("host") or "localhost", int(settings.get("port") or port)
