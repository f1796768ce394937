"""Connections of the other clients, on the benchmark's server."""

from __future__ import annotations

from contextlib import AsyncExitStack
from typing import Any
from urllib.parse import urlsplit

import redis
import redis.asyncio
import redis.asyncio.cluster
import redis.cluster


def unix_path(url: str) -> str | None:
    return urlsplit(url).path if url.startswith("unix:") else None


def redis_sync(url: str) -> redis.Redis:
    return redis.Redis.from_url(url)


def redis_async(url: str) -> Any:
    return redis.asyncio.Redis.from_url(url)


def coredis(url: str) -> Any:
    import coredis as module

    path = unix_path(url)
    if path is not None:
        return module.Redis(unix_socket_path=path, verify_version=False)
    parts = urlsplit(url)
    return module.Redis(parts.hostname, parts.port, verify_version=False)


async def glide(url: str) -> Any:
    from glide import GlideClient, GlideClientConfiguration, NodeAddress, ProtocolVersion

    path = unix_path(url)
    parts = urlsplit(url)
    address = (
        NodeAddress(unix_socket_path=path)
        if path is not None
        else NodeAddress(parts.hostname or "", parts.port or 6379)
    )
    return await GlideClient.create(
        GlideClientConfiguration([address], request_timeout=60_000, protocol=ProtocolVersion.RESP2)
    )


def _nodes(url: str) -> list[tuple[str, int]]:
    """The servers that a cluster's URL names."""
    places = (place.rpartition(":") for place in urlsplit(url).netloc.split(","))
    return [(host, int(port)) for host, _, port in places]


def redis_cluster(url: str) -> Any:
    module: Any = redis.cluster
    return module.RedisCluster(startup_nodes=[module.ClusterNode(*node) for node in _nodes(url)])


def redis_cluster_async(url: str) -> Any:
    module: Any = redis.asyncio.cluster
    return module.RedisCluster(startup_nodes=[module.ClusterNode(*node) for node in _nodes(url)])


def coredis_cluster(url: str) -> Any:
    import coredis as module

    host, port = _nodes(url)[0]
    return module.RedisCluster(host, port, verify_version=False)


async def entered(stack: AsyncExitStack, client: Any) -> Any:
    """A client that is closed with the stack."""
    return await stack.enter_async_context(client) if hasattr(client, "__aenter__") else client


async def glide_cluster(url: str) -> Any:
    from glide import GlideClusterClient, GlideClusterClientConfiguration, NodeAddress, ProtocolVersion

    addresses = [NodeAddress(*node) for node in _nodes(url)]
    return await GlideClusterClient.create(
        GlideClusterClientConfiguration(addresses, request_timeout=60_000, protocol=ProtocolVersion.RESP2)
    )
