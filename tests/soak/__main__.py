"""``python -m tests.soak [--cluster | --hosts] [SEED]``: 1 if anything was lost, doubled, mixed up or left over, or grew.

Six simulators and two learners (processes on asyncio, uvloop and trio), and a trainer that begins a run every ten seconds,
deletes the one before and publishes policies. The first process of each kind is never killed: its memory and its open
files must stay as they are.

One server, each process behind a proxy of its own: for ``SOAK_SECONDS`` (600) something goes wrong twice a second.
``--cluster``: 3 primaries with a replica each; ``SOAK_FAULTS`` (20) failovers and as many migrations of slots.
``--hosts``: the same on hosts of their own, which are cut off from each other.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import random
import sys
import tempfile
import time
from pathlib import Path

import anyio
import anyio.to_thread
from rich.console import Console

from aionpredis import Server

from ..cluster import Cluster
from ..hosts import Hosts, hosts
from ..proxy import Proxy
from .chaos import Chaos
from .fleet import SIMULATORS, Fleet, usage
from .ledger import Verdict
from .report import report
from .storm import Storm
from .trainer import PATIENCE, leftover, train
from .work import LEARNERS

PROCESSES = LEARNERS + SIMULATORS
NODES = 6
SHARED = 3
"""Simulators that run on the host of a node, so that both are cut off from everybody else together."""


def one_server(folder: Path, rng: random.Random, stack: contextlib.ExitStack) -> tuple[Fleet, Chaos, str]:
    """The processes, what goes wrong, and where the trainer finds the server."""
    server = stack.enter_context(Server(config={"appendonly": "yes", "appendfsync": "no", "dir": str(folder)}))
    proxies: list[Proxy] = []
    for slot in range(PROCESSES + 1):
        (folder / f"p{slot}").mkdir()
        proxies.append(stack.enter_context(Proxy(server.url, folder / f"p{slot}")))
    network = stack.enter_context(Hosts(1))
    urls = [proxy.url for proxy in proxies]
    fleet = Fleet(network, folder, rng, url=urls.__getitem__, host=lambda slot: 0, kept_by=lambda slot: "disk")
    seconds = float(os.environ.get("SOAK_SECONDS", "600"))
    return fleet, Chaos(server, proxies, fleet.kill, rng, seconds), urls[-1]


def whole_cluster(
    folder: Path, rng: random.Random, stack: contextlib.ExitStack, *, separate: bool
) -> tuple[Fleet, Storm, str]:
    """The same of a cluster. ``separate``: each node and each process on a host of its own, but ``SHARED``."""
    count = NODES + PROCESSES - SHARED if separate else 1
    network = stack.enter_context(hosts(count) if separate else Hosts(1))
    if separate and not (network.separate and network.reachable):
        raise SystemExit("no network namespaces: they want iproute2, util-linux and root")
    cluster = stack.enter_context(Cluster(hosts=network if separate else None))
    fleet = Fleet(
        network,
        folder,
        rng,
        url=lambda slot: cluster.url,
        host=lambda slot: (NODES + slot) % count,
        # Who is cut off with a primary loses something.
        kept_by=lambda slot: "replica" if slot < PROCESSES - SHARED else "memory",
    )
    faults = int(os.environ.get("SOAK_FAULTS", "20"))
    return fleet, Storm(cluster, fleet, rng, faults, network if separate else None, SHARED), cluster.url


def main() -> None:
    logging.basicConfig(level=logging.ERROR)
    parser = argparse.ArgumentParser(prog="python -m tests.soak")
    parser.add_argument("seed", type=int, nargs="?", default=random.randrange(1 << 32))
    parser.add_argument("--cluster", action="store_true")
    parser.add_argument("--hosts", action="store_true")
    chosen = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(f"{SIMULATORS} simulators, {LEARNERS} learners; seed {chosen.seed}")
    rng = random.Random(chosen.seed)
    verdicts: list[Verdict] = []
    samples: dict[str, list[tuple[int, int]]] = {}
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="soak-")))
        fleet: Fleet
        chaos: Chaos | Storm
        if chosen.cluster or chosen.hosts:
            fleet, chaos, url = whole_cluster(folder, rng, stack, separate=chosen.hosts)
        else:
            fleet, chaos, url = one_server(folder, rng, stack)
        portal = stack.enter_context(anyio.from_thread.start_blocking_portal())
        trainer = portal.start_task_soon(train, url, folder, verdicts)
        stack.callback(trainer.cancel)
        fleet.begun()
        sampled = time.monotonic()
        while not chaos.over:
            time.sleep(rng.uniform(0, 1))
            chaos.step()
            fleet.check()
            if trainer.done():
                trainer.result()
            if time.monotonic() - sampled > 0.5:
                sampled = time.monotonic()
                for name, pid in fleet.constant.items():
                    samples.setdefault(name, []).append(usage(pid))
        chaos.heal()
        (folder / "stop").touch()
        trainer.result(PATIENCE + 10)
        fleet.join(PATIENCE)
        good = report(console, folder, chaos, verdicts, portal.call(leftover, url), samples)
    sys.exit(not good)


if __name__ == "__main__":
    main()
