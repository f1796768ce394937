"""Connections of the other clients, on the benchmark's server."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit

import redis
import redis.asyncio


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
