"""Stock redis-py on whatever the tests run against: one server, or all servers of a cluster as if they were one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import redis
from redis.cluster import RedisCluster

from aionpredis.server import Server

from .cluster import Cluster

__all__ = ["stock_of"]

_EVERYWHERE = ("client_kill_filter", "client_pause", "client_unpause", "config_resetstat", "config_set")


class _Everywhere:
    """What redis-py's client of a cluster asks of one node, asked of all primaries: the tests mean the server."""

    def __init__(self, client: RedisCluster) -> None:
        self._client: Any = client

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._client, name)
        if name not in _EVERYWHERE:
            return method
        return lambda *args, **options: method(*args, **options, target_nodes=RedisCluster.PRIMARIES)

    def keys(self, pattern: str = "*") -> list[bytes]:
        return list(self._client.scan_iter(pattern))

    def info(self, section: str) -> dict[str, Any]:
        """Numbers are sums."""
        found = list(self._client.info(section, target_nodes=RedisCluster.PRIMARIES).values())
        if section == "commandstats":
            calls: Counter[str] = Counter()
            for facts in found:
                calls.update({name: each["calls"] for name, each in facts.items()})
            return {name: {"calls": count} for name, count in calls.items()}
        return {
            name: sum(facts[name] for facts in found) if isinstance(value, int) else value
            for name, value in found[0].items()
        }


@contextmanager
def stock_of(server: Server | Cluster) -> Iterator[Any]:
    """A :class:`redis.Redis`, or what has its methods."""
    if isinstance(server, Server):
        with redis.Redis.from_url(server.url, socket_timeout=30) as client:
            yield client
    else:
        node = next(node for node in server.nodes if node.answers)
        with RedisCluster(host=node.address, port=node.port, socket_timeout=30) as client:
            yield _Everywhere(client)
