"""What goes wrong in a soak of a cluster: primaries are replaced and slots move, in an order that a seed draws."""

from __future__ import annotations

import itertools
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

from ..cluster import Cluster, slot_of
from ..hosts import Hosts
from ..nodes import Node, wait
from .fleet import Fleet

__all__ = ["Storm"]

LOG = slot_of("{soak}:log")
"""The slot of all that is not data: the log, the policies' stream, what learners have read."""

RANGE = 10
"""Slots that are moved one after another: 0.2% of a primary's, so that the load stays even."""

BATCH = 500


@dataclass
class Storm:
    """``faults``: so many failovers, and as many migrations; with ``network`` (a host for each node, then others) also so many
    cuts. ``shared``: on the hosts of so many nodes, the first ones, a simulator runs, too.
    """

    cluster: Cluster
    fleet: Fleet
    rng: random.Random
    faults: int
    network: Hosts | None = None
    shared: int = 0
    done: Counter[str] = field(default_factory=Counter)
    periods: list[tuple[str, float, float]] = field(default_factory=list)
    """Each fault: what, from when to when."""

    def __post_init__(self) -> None:
        # A primary and its replicas swap roles, but keep their slots among them.
        self._groups = [[node, *self.cluster.replicas(node)] for node in self.cluster.primaries()]
        self.held = [0] * len(self._groups)
        """Bytes of chunks, by shard: the sum of looks at them after each fault."""
        ways: list[tuple[str, list[Callable[[], None]]]] = [
            (
                "failover",
                [self.killed, self.killed_log, self.graceful, self.frozen, self.graceful_log, self.frozen_log],
            ),
            ("migration", [self.log_moves, self.slot_moves, self.slots_move, self.slot_pauses, self.log_pauses]),
            ("process", [self.process]),
        ]
        if "valkey_version" in self.cluster.nodes[0].admin.info("server"):
            ways[1][1].append(self.slot_jumps)
        if self.network is not None:
            ways = [("failover", [self.cut_off, self.cut_off_log]), ("cut", [self.cut]), ways[1]]
        self._plan: list[tuple[str, Callable[[], None]]] = []
        for kind, faults in ways:
            first = self.rng.randrange(len(faults))
            chosen = itertools.islice(itertools.cycle(faults), first, first + self.faults)
            self._plan += [(kind, fault) for fault in chosen]
        self.rng.shuffle(self._plan)

    @property
    def over(self) -> bool:
        return not self._plan

    def step(self) -> None:
        """One fault, from its beginning until all nodes agree again, and all goes on."""
        kind, fault = self._plan.pop()
        began = time.monotonic()
        fault()
        self.cluster.wait_ok()
        self.fleet.goes_on()
        self.periods.append((fault.__name__.replace("_", " "), began, time.monotonic()))
        self.done[kind] += 1
        self._look()

    def heal(self) -> None:
        """Nothing goes wrong any more."""
        self.cluster.heal()

    # --- failovers -----------------------------------------------------------------------------------------------------

    def killed(self, slot: int | None = None) -> None:
        old = self._primary(slot)
        self.cluster.failover(old)
        time.sleep(self.rng.uniform(0, 0.5))
        self.cluster.restart(old)  # empty: not before another one has its slots

    def killed_log(self) -> None:
        self.killed(LOG)

    def graceful(self, slot: int | None = None) -> None:
        self.cluster.failover(self._primary(slot), graceful=True)

    def graceful_log(self) -> None:
        self.graceful(LOG)

    def frozen(self, slot: int | None = None) -> None:
        """It is stopped until it has been replaced, and goes on with what it was about to do."""
        old = self._primary(slot)
        self.cluster.stop(old)
        self._replaced(old)
        time.sleep(self.rng.uniform(0, 1))
        self.cluster.cont(old)

    def frozen_log(self) -> None:
        self.frozen(LOG)

    # --- migrations ----------------------------------------------------------------------------------------------------

    def log_moves(self) -> None:
        self._move(LOG)

    def slot_moves(self) -> None:
        self._move(self._used_slot())

    def slot_jumps(self) -> None:
        """With all its keys at once."""
        slot = self._used_slot()
        target = self._target(slot)
        self.cluster.migrate(slot, target, atomic=True)
        self._replicated(target)

    def slots_move(self) -> None:
        slots = self.cluster.slots(self._primary())
        first = self.rng.randrange(len(slots) - RANGE)
        target = self._target(slots[first])
        for slot in slots[first : first + RANGE]:
            self.cluster.migrate(slot, target)
        self._replicated(target)

    def slot_pauses(self) -> None:
        self._pause(self._used_slot())

    def log_pauses(self) -> None:
        self._pause(LOG)

    # --- processes and hosts ---------------------------------------------------------------------------------------------

    def process(self) -> None:
        self.fleet.kill()

    def cut_off(self, slot: int | None = None) -> None:
        """A primary, and whoever is on its host, see nobody else until it has been replaced."""
        self._cut_off(self._primary(slot))

    def cut_off_log(self) -> None:
        """With a simulator on the same host, which can go on for a moment."""
        old = self._primary(LOG)
        if self.cluster.nodes.index(old) >= self.shared:
            old = self.cluster.failover(old, graceful=True)
        self._cut_off(old)

    def cut(self) -> None:
        """Any host of a process."""
        assert self.network is not None
        host = self.rng.randrange(len(self.cluster.nodes), len(self.network))
        self.network.cut(host)
        time.sleep(self.rng.uniform(0.5, 5))
        self.network.mend(host)

    # --- how -----------------------------------------------------------------------------------------------------------

    def _primary(self, slot: int | None = None) -> Node:
        return self.rng.choice(self.cluster.primaries()) if slot is None else self.cluster.owner(slot)

    def _replaced(self, old: Node) -> None:
        others = self._others(old)
        wait(lambda: any(node.info()["role"] == "master" for node in others), f"a replica replaces {old}")

    def _others(self, node: Node) -> list[Node]:
        (group,) = (group for group in self._groups if node in group)
        return [other for other in group if other is not node]

    def _cut_off(self, old: Node) -> None:
        assert self.network is not None
        host = self.cluster.nodes.index(old)
        self.network.cut(host)
        self._replaced(old)
        time.sleep(self.rng.uniform(0, 2))
        self.network.mend(host)

    def _used_slot(self) -> int:
        """A slot that has data."""
        for _ in range(100):
            key = self._primary().call("RANDOMKEY")
            if key is not None and slot_of(key) != LOG:
                return slot_of(key)
        return 0

    def _target(self, slot: int) -> Node:
        owner = self.cluster.owner(slot)
        return self.rng.choice([node for node in self.cluster.primaries() if node is not owner])

    def _move(self, slot: int) -> None:
        target = self._target(slot)
        self.cluster.migrate(slot, target)
        self._replicated(target)

    def _pause(self, slot: int) -> None:
        """Half-way: some keys have been moved."""
        target = self._target(slot)
        keys = self.cluster.owner(slot).call("CLUSTER", "GETKEYSINSLOT", slot, 100)
        with self.cluster.migrating(slot, target, self.rng.sample(keys, self.rng.randint(0, len(keys)))):
            time.sleep(self.rng.uniform(0.2, 1))
        self._replicated(target)

    def _replicated(self, target: Node) -> None:
        """Keys that MIGRATE brought have reached the replica, too. The servers do not wait for that: a primary that died
        now would lose what it was given, however often it was acknowledged where it came from.
        """
        offset = target.info()["master_repl_offset"]
        (replica,) = self._others(target)
        wait(lambda: replica.info()["slave_repl_offset"] >= offset, f"{replica} has what {target} had")

    def _look(self) -> None:
        """What each shard holds."""
        for index, group in enumerate(self._groups):
            (primary,) = (node for node in group if node.info()["role"] == "master")
            for keys in _batches(primary.admin.scan_iter("soak:[0-9]*", count=1000)):
                with primary.admin.pipeline(transaction=False) as pipeline:
                    for key in keys:
                        pipeline.strlen(key)
                    self.held[index] += sum(pipeline.execute())

    @property
    def unevenness(self) -> float:
        """How far a shard's share is from the mean."""
        mean = sum(self.held) / len(self.held)
        return max(abs(held / mean - 1) for held in self.held) if mean else 0.0

    def during(self, begins: float, ends: float) -> str:
        """The faults of that time."""
        return ", ".join(name for name, first, last in self.periods if first < ends and last > begins) or "nothing"


def _batches(keys: Iterator[str]) -> Iterator[list[str]]:
    return iter(partial(lambda: list(itertools.islice(keys, BATCH))), [])
