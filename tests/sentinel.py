"""A primary with replicas, and sentinels that promote one when it fails: real ones.

::

    with Sentinels() as sentinels:
        connect(sentinels.url)
        sentinels.kill_primary()
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import partial
from typing import Final
from urllib.parse import quote

from .hosts import Hosts
from .nodes import Node, Nodes, wait

__all__ = ["SERVICE", "Sentinels"]

SERVICE: Final = "mymaster"

# Milliseconds. After that much silence the primary counts as failed; a killed one is replaced after about 1.5 s.
_SETTINGS: Final = {"down-after-milliseconds": 500, "failover-timeout": 3000}

# Milliseconds. How often sentinels ask servers who they are, and tell each other: 10 s and 2 s by default. A primary that
# comes back is made a replica after 4 times the latter.
_PERIODS: Final = {"INFO-PERIOD": 500, "PUBLISH-PERIOD": 200}


class Sentinels(Nodes):
    """A primary, ``replicas`` of it, and ``sentinels``, of which a majority decides.

    ``password``: of primary and replicas; ``sentinel_password``: of the sentinels. In memory only: what a node held is
    lost with its process.
    """

    def __init__(
        self,
        replicas: int = 1,
        sentinels: int = 3,
        *,
        binary: str | os.PathLike[str] | None = None,
        password: str | None = None,
        sentinel_password: str | None = None,
        hosts: Hosts | None = None,
        config: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(binary=binary, password=password, hosts=hosts, config=config)
        self._sentinel_password = sentinel_password
        self._replicas = replicas
        self._sentinels = sentinels

    @property
    def servers(self) -> list[Node]:
        """The primary and its replicas."""
        return self.nodes[: 1 + self._replicas]

    @property
    def sentinels(self) -> list[Node]:
        return self.nodes[1 + self._replicas :]

    @property
    def url(self) -> str:
        """The sentinels and the service, as ``redis+sentinel://``."""
        secret = self._sentinel_password
        options = f"?sentinel_password={quote(secret, safe='')}" if secret is not None else ""
        return self._address("redis+sentinel", self.sentinels, self._password) + f"/{SERVICE}{options}"

    def primary(self) -> Node:
        """As the first sentinel that answers says."""
        return self._primary(next(node for node in self.sentinels if node.answers))

    def kill_primary(self) -> Node:
        """SIGKILL, and wait until a replica has taken its place; returns the new primary."""
        old = self.primary()
        self.kill(old)
        return self._replaced(old)

    def failover(self) -> Node:
        """As an operator does it: the old primary goes on as a replica. Returns the new one."""
        old = self.primary()
        # NOGOODSLAVE while it has not heard from a replica that came back just now.
        wait(partial(self.sentinels[0].call, "SENTINEL", "FAILOVER", SERVICE), "a failover begins")
        return self._replaced(old)

    def _replaced(self, old: Node) -> Node:
        # One that stood still for two seconds does nothing for 30: it takes that for a jump of its clock.
        wait(lambda: self.primary() is not old, f"{old} is replaced", 45)
        self.wait_ok()
        return self.primary()

    def _start(self) -> None:
        for _ in range(1 + self._replicas):
            self._add({"repl-diskless-sync-delay": "0"}, password=self._password)
        primary, *replicas = self.nodes
        for node in replicas:
            node.call("REPLICAOF", primary.address, primary.port)
        wait(lambda: all(node.info()["master_link_status"] == "up" for node in replicas), "the replicas follow")
        program = self._folder / "sentinel"
        program.write_text(f'#!/bin/sh\nexec {self._binary} "$@" --sentinel\n')
        program.chmod(0o700)
        for _ in range(self._sentinels):
            self._watch(self._add({}, binary=program, password=self._sentinel_password), primary)
        self.wait_ok()

    def _revive(self, node: Node) -> None:
        node.start()
        if node in self.sentinels:  # its configuration went with its folder
            self._watch(
                node, self._primary(next(other for other in self.sentinels if other.answers and other is not node))
            )

    def _watch(self, sentinel: Node, primary: Node) -> None:
        quorum = self._sentinels // 2 + 1
        sentinel.call("SENTINEL", "DEBUG", *(word for pair in _PERIODS.items() for word in pair))
        sentinel.call("SENTINEL", "MONITOR", SERVICE, primary.address, primary.port, quorum)
        if self._password is not None:
            sentinel.call("SENTINEL", "SET", SERVICE, "auth-pass", self._password)
        sentinel.call("SENTINEL", "SET", SERVICE, *(word for pair in _SETTINGS.items() for word in pair))

    def _primary(self, sentinel: Node) -> Node:
        address, port = sentinel.call("SENTINEL", "GET-MASTER-ADDR-BY-NAME", SERVICE)
        return next(node for node in self.servers if (node.address, node.port) == (address, int(port)))

    def _is_ok(self) -> bool:
        primary = self.primary()
        for node in self.servers:
            if node.answers:
                info = node.info()
                following = info["role"] == "slave" and info["master_port"] == primary.port
                if not (
                    info["role"] == "master" if node is primary else following and info["master_link_status"] == "up"
                ):
                    return False
        for node in self.sentinels:
            if node.answers:
                words = node.call("SENTINEL", "MASTER", SERVICE)
                facts = dict(zip(words[::2], words[1::2], strict=True))
                known = (int(facts["num-slaves"]), int(facts["num-other-sentinels"]))
                if self._primary(node) is not primary or known != (self._replicas, self._sentinels - 1):
                    return False
                if facts["flags"] != "master":  # neither down nor in a failover
                    return False
        return True
