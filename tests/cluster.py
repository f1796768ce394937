"""A cluster of real servers, made, broken and rearranged by stock commands.

::

    with Cluster() as cluster:  # 3 primaries, each with a replica
        connect(cluster.url)
        cluster.migrate(slot_of("key"), cluster.primaries()[0])
        cluster.failover(cluster.primaries()[1])
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Final

from redis.crc import REDIS_CLUSTER_HASH_SLOTS, key_slot

from .hosts import Hosts
from .nodes import Node, Nodes, wait

__all__ = ["PATIENT", "Cluster", "slot_of"]

_CONFIG: Final = {
    "cluster-enabled": "yes",
    # A node that is silent for a second counts as failed: a killed primary is replaced after 1.5 to 3 s.
    "cluster-node-timeout": "1000",
    "cluster-replica-validity-factor": "0",  # a replica may be promoted however old its data are
    "cluster-allow-replica-migration": "no",  # who is whose replica is the tests' decision
    "repl-diskless-sync-delay": "0",
    "repl-ping-replica-period": "1",  # Redis 7.0 lists a replica once it has received anything, and by default that takes 10 s
}

PATIENT: Final = 5000
IMPATIENT: Final = int(_CONFIG["cluster-node-timeout"])

# (first slot, last slot) -> (primary, replicas), by the nodes' ids
_Map = dict[tuple[int, int], tuple[str, frozenset[str]]]


def slot_of(key: str | bytes) -> int:
    """The hash slot of a key."""
    return key_slot(key.encode() if isinstance(key, str) else key)


class Cluster(Nodes):
    """``primaries`` with ``replicas`` each. With 3 or more primaries, a killed one is replaced by its replica.

    Each operation returns when all nodes that answer agree on the outcome. In memory only: what a node held is lost
    with its process. A primary whose slots are all gone remains, but is not among `primaries`.

    ``tls``: the directives about certificates and keys. Then all speak TLS, to each other, too.
    """

    def __init__(
        self,
        primaries: int = 3,
        replicas: int = 1,
        *,
        binary: str | os.PathLike[str] | None = None,
        password: str | None = None,
        hosts: Hosts | None = None,
        config: Mapping[str, str] | None = None,
        tls: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(binary=binary, password=password, hosts=hosts, config=config)
        self._primaries = primaries
        self._replicas = replicas
        self._tls = tls
        self._patience = IMPATIENT

    @property
    def url(self) -> str:
        """All nodes, as ``redis+cluster://`` or ``rediss+cluster://``."""
        scheme = "redis+cluster" if self._tls is None else "rediss+cluster"
        return self._address(scheme, self.nodes, self._password)

    @property
    def ports(self) -> list[int]:
        return [node.port for node in self.nodes]

    def primaries(self) -> list[Node]:
        """Those that own slots, by their first one."""
        return list(dict.fromkeys(self._node(primary) for primary, _ in self._slots().values()))

    def replicas(self, primary: Node) -> list[Node]:
        """Its replicas that are not known to have failed."""
        found = (replicas for owner, replicas in self._slots().values() if owner == primary.id)
        return [self._node(name) for name in sorted(next(found, ()))]

    def owner(self, slot: int) -> Node:
        """The primary of a slot."""
        return next(self._node(name) for (a, b), (name, _) in self._slots().items() if a <= slot <= b)

    def slots(self, primary: Node) -> list[int]:
        """The slots that it owns."""
        mine = (span for span, (name, _) in self._slots().items() if name == primary.id)
        return [slot for a, b in mine for slot in range(a, b + 1)]

    def patience(self, milliseconds: int) -> None:
        """For how long a node may be silent before it counts as failed. A busy machine lets a server stand still for a second:
        who wants no failover is `PATIENT`, and `kill`, `stop` and `failover` are `IMPATIENT` again.
        """
        self._patience = milliseconds
        for node in self.nodes:
            if node.answers:
                node.call("CONFIG", "SET", "cluster-node-timeout", milliseconds)

    def kill(self, node: Node) -> None:
        self.patience(IMPATIENT)
        super().kill(node)

    def stop(self, node: Node, *, patience: int = IMPATIENT) -> None:
        self.patience(patience)
        super().stop(node)

    def flush(self) -> None:
        """Delete all keys, on the replicas, too."""
        for node in self.primaries():
            node.call("FLUSHALL")
            node.call("WAIT", len(self.replicas(node)), 1000)

    def failover(self, primary: Node | int, *, graceful: bool = False) -> Node:
        """Have a primary (or that of a slot) replaced by a replica: killed, or by CLUSTER FAILOVER. Returns the new one."""
        old = self.owner(primary) if isinstance(primary, int) else primary
        patience = self._patience
        self.patience(IMPATIENT)  # a server that was asked in vain waits four times as long before it tries again
        replicas = self.replicas(old)
        for _ in range(3):  # now and then a server that was asked to take over is a replica again at once
            if graceful:
                replicas[0].call("CLUSTER", "FAILOVER")
            else:
                self.kill(old)
            wait(lambda: any(node.info()["role"] == "master" for node in replicas), f"a replica replaces {old}", 40)
            self.wait_ok()
            for node in replicas:
                if node.info()["role"] == "master":
                    if graceful:
                        self.patience(patience)
                    return node
        raise TimeoutError(f"no replica has replaced {old} for good")

    def migrate(self, slot: int, to: Node, *, atomic: bool = False) -> None:
        """Move a slot with its keys to another primary, while clients go on.

        ``atomic``: all at once, as only Valkey 9 can: nobody is ever told to ASK.
        """
        if not atomic:
            with self.migrating(slot, to):
                return
        self.owner(slot).call("CLUSTER", "MIGRATESLOTS", "SLOTSRANGE", slot, slot, "NODE", to.id)
        wait(lambda: self.owner(slot) is to, f"slot {slot} moves")
        self.wait_ok()

    @contextmanager
    def migrating(self, slot: int, to: Node, keys: Iterable[str] = ()) -> Iterator[Node]:
        """A migration that is under way for as long as the block lasts: only ``keys`` have been moved. Yields the source.

        The source answers ASK for keys that it does not have (any more), and TRYAGAIN for those of a command of which it
        has only a part. The end of the block moves the rest.
        """
        source = self.owner(slot)
        to.call("CLUSTER", "SETSLOT", slot, "IMPORTING", source.id)
        source.call("CLUSTER", "SETSLOT", slot, "MIGRATING", to.id)
        self._move(source, to, keys)
        try:
            yield source
        finally:
            source = self.owner(slot)  # its replica may have taken its place
            while rest := source.call("CLUSTER", "GETKEYSINSLOT", slot, 100):
                self._move(source, to, rest)
            # Else the target may choose an epoch that another one has, too, and they disagree about the slot.
            wait(lambda: len({self._epoch(node) for node in self.nodes if node.answers}) == 1, "one epoch")
            # The target first: if the source went first, nobody would own the slot in between.
            for node in [to, *(node for node in self.primaries() if node is not to)]:
                node.call("CLUSTER", "SETSLOT", slot, "NODE", to.id)
            # Replicas may learn of it much later, if two primaries have chosen the same epoch meanwhile.
            wait(lambda: len({str(self._owners(node)) for node in self.primaries()}) == 1, "the primaries agree")

    def move_slots(self, source: Node, to: Node, count: int) -> list[int]:
        """Migrate ``count`` slots, one after another. Returns them."""
        slots = self.slots(source)[:count]
        for slot in slots:
            self.migrate(slot, to)
        return slots

    def _move(self, source: Node, to: Node, keys: Iterable[str]) -> None:
        names = list(keys)
        if names:
            password = ("AUTH", self._password) if self._password is not None else ()
            # REPLACE, as redis-cli does it when a key is at the target already: a command that was told to ASK may arrive there
            # only when its slot has gone back and comes again.
            options = "REPLACE", *password, "KEYS"
            source.call("MIGRATE", to.address, to.port, "", 0, 10_000, *options, *names)

    def _start(self) -> None:
        for i in range(self._primaries * (1 + self._replicas)):
            # Who it is and what it knows of the others: outlives the process, unlike the server's own folder.
            config = _CONFIG | {"cluster-config-file": str(self._folder / f"{i}.conf")}
            if self._tls is not None:
                config |= {"tls-cluster": "yes", "tls-replication": "yes", **self._tls}
            self._add(config, password=self._password, tls=self._tls is not None)
        primaries, replicas = self.nodes[: self._primaries], self.nodes[self._primaries :]
        for node in self.nodes:
            node.id = node.call("CLUSTER", "MYID")
        total = REDIS_CLUSTER_HASH_SLOTS
        for i, node in enumerate(primaries):
            node.call("CLUSTER", "SET-CONFIG-EPOCH", i + 1)  # else they would have to agree on an order first
            first, end = (total * n // len(primaries) for n in (i, i + 1))
            node.call("CLUSTER", "ADDSLOTSRANGE", first, end - 1)
        for i, node in enumerate(self.nodes):
            for other in self.nodes[:i]:  # each pair: waiting for gossip takes longer
                node.call("CLUSTER", "MEET", other.address, other.port)
        for i, node in enumerate(replicas):
            primary = primaries[(i + 1) % len(primaries)]  # with three hosts, it is on another one
            # An error while it does not know it yet.
            wait(partial(node.call, "CLUSTER", "REPLICATE", primary.id), "the nodes know each other")
        self.wait_ok()

    def _node(self, name: str) -> Node:
        return next(node for node in self.nodes if node.id == name)

    def _slots(self, node: Node | None = None) -> _Map:
        """As this node sees them, or the first primary that answers: replicas may learn of a slot's new owner much later."""
        if node is None:
            answering = [node for node in self.nodes if node.answers]
            node = next((node for node in answering if node.info()["role"] == "master"), answering[0])
        return {
            (first, last): (primary[2], frozenset(replica[2] for replica in replicas))
            for first, last, primary, *replicas in sorted(node.call("CLUSTER", "SLOTS"))
        }

    @staticmethod
    def _epoch(node: Node) -> str:
        """The highest epoch that it knows."""
        info: str = node.call("CLUSTER", "INFO")
        return next(line for line in str(info).splitlines() if "cluster_current_epoch" in line)

    def _owners(self, node: Node) -> dict[tuple[int, int], str]:
        return {span: primary for span, (primary, _) in self._slots(node).items()}

    def _is_ok(self) -> bool:
        nodes = [node for node in self.nodes if node.answers]
        seen = self._slots(nodes[0])
        following = frozenset[str]().union(*(replicas for _, replicas in seen.values()))
        for node in nodes:
            info = node.info()
            if info["role"] == "slave" and (info["master_link_status"] != "up" or node.id not in following):
                return False
            if "cluster_state:ok" not in node.call("CLUSTER", "INFO") or self._slots(node) != seen:
                return False
        return True
