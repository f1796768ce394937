"""``SOAK_SECONDS=60 python -m tests.soak [SEED]``: exits with 1 if anything was lost, doubled, mixed up or left over, or grew.

Six simulators and two learners (processes on asyncio, uvloop and trio, each behind a proxy of its own), a trainer that begins
a run every ten seconds, deletes the one before and publishes policies, and something that goes wrong twice a second. The
first process of each kind is never killed: its memory and its open files must stay as they are.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import random
import statistics
import sys
import tempfile
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import anyio
import anyio.to_thread
import numpy as np
from rich.console import Console
from rich.table import Table

import aionpredis
from aionpredis import Server

from ..proxy import Proxy
from .chaos import Chaos
from .ledger import Ledger, Verdict, judge, read
from .work import FINISHED, LEARNERS, LEASE, make_replay, process

SIMULATORS = 6
RUN_SECONDS = 10.0
LOOPS = ("asyncio", "uvloop", "trio")
PATIENCE = 120.0
"""Seconds in which what has been disturbed must have caught up."""


class Fleet:
    """The processes, each behind its proxy; who dies is replaced."""

    def __init__(self, proxies: list[Proxy], folder: Path, rng: random.Random) -> None:
        self._proxies = proxies
        self._folder = folder
        self._rng = rng
        self._context = multiprocessing.get_context("spawn")
        self._loops = rng.sample(LOOPS, len(LOOPS))  # so a seed decides on which the constant ones run
        self._made = LEARNERS  # learners keep their numbers, a simulator that starts anew is another one
        self.slots: list[BaseProcess] = []
        for slot in range(LEARNERS + SIMULATORS):
            self.slots.append(self._start(slot))

    def _start(self, slot: int) -> BaseProcess:
        number = slot
        if slot >= LEARNERS:
            number, self._made = self._made, self._made + 1
        role = "learner" if slot < LEARNERS else "simulator"
        loop = self._loops[slot % len(LOOPS)]
        arguments = (role, self._proxies[slot].url, str(self._folder), number, f"{self._rng.random()}", loop)
        worker = self._context.Process(target=process, args=arguments, name=f"{role} {number} on {loop}")
        worker.start()
        return worker

    def kill(self) -> None:
        slot = self._rng.choice([*range(1, LEARNERS), *range(LEARNERS + 1, LEARNERS + SIMULATORS)])
        self.slots[slot].kill()
        self.slots[slot].join()
        self.slots[slot] = self._start(slot)

    @property
    def constant(self) -> list[BaseProcess]:
        return [self.slots[0], self.slots[LEARNERS]]

    def check(self) -> None:
        """No process has ended with an error."""
        for worker in self.slots:
            if worker.exitcode not in (None, 0):
                raise SystemExit(f"{worker.name} ended with exit code {worker.exitcode}")

    def join(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while any(worker.exitcode is None for worker in self.slots):
            self.check()
            if time.monotonic() > deadline:
                hanging = [worker.name for worker in self.slots if worker.exitcode is None]
                raise SystemExit(f"still running after {seconds:.0f} s: {', '.join(hanging)}")
            time.sleep(0.05)
        self.check()

    def end(self) -> None:
        for worker in self.slots:
            if worker.exitcode is None:
                worker.kill()
                worker.join()


def usage(pid: int) -> tuple[int, int]:
    """Resident bytes and open files."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE"), len(os.listdir(f"/proc/{pid}/fd"))  # noqa: PTH208


async def train(url: str, folder: Path, verdicts: list[Verdict]) -> None:
    """Begin runs; when the learners have come to the end of one, hold what they read against what was acknowledged."""
    async with aionpredis.connect(url) as client:
        replay = make_replay(client)
        with Ledger(folder / "runs") as runs:
            previous: int | None = None
            while True:
                stopping = (folder / "stop").exists()
                version = len(verdicts) + 1.0
                run = await replay.begin_run({"number": np.full(1000, version, np.float32)}, keep=2)
                if stopping:  # it only ends the one before
                    (folder / "last").touch()
                else:
                    runs.write(run.run, 0, 0)
                if previous is not None:
                    with anyio.fail_after(PATIENCE):
                        while not finished(folder, previous):
                            await anyio.sleep(0.1)
                    verdicts.append(judge(folder, previous))
                    await replay.drop(previous)
                if stopping:
                    return
                previous = run.run
                deadline = time.monotonic() + RUN_SECONDS
                while time.monotonic() < deadline and not (folder / "stop").exists():
                    await replay.policy.publish({"number": np.full(1000, time.monotonic(), np.float32)})
                    await anyio.sleep(0.5)


def finished(folder: Path, run: int) -> bool:
    ends = [entry for path in folder.glob("read-*") for entry in read(path) if entry[:2] == (run, FINISHED)]
    return len(ends) == LEARNERS


async def leftover(url: str) -> int:
    """Keys that nobody needs any more, when all is deleted and one lease has passed."""
    async with aionpredis.connect(url) as client:
        replay = make_replay(client)
        await replay.delete()
        for _ in range(int(10 * (LEASE + 2))):
            keys = [key for key in await client.execute("KEYS", "*") if not key.startswith(b"mixed:")]
            if not keys:
                break
            await anyio.sleep(0.1)
        return len(keys)


def main() -> None:
    logging.basicConfig(level=logging.ERROR)
    seconds = float(os.environ.get("SOAK_SECONDS", "600"))
    seed = int(sys.argv[1]) if len(sys.argv) > 1 else random.randrange(1 << 32)
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(f"{SIMULATORS} simulators, {LEARNERS} learners, {seconds:.0f} s; seed {seed}")
    rng = random.Random(seed)
    verdicts: list[Verdict] = []
    samples: dict[str, list[tuple[int, int]]] = {}
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="soak-")))
        config = {"appendonly": "yes", "appendfsync": "no", "dir": str(folder)}
        server = stack.enter_context(Server(config=config))
        proxies = []
        for slot in range(LEARNERS + SIMULATORS + 1):
            (folder / f"p{slot}").mkdir()
            proxies.append(stack.enter_context(Proxy(server.url, folder / f"p{slot}")))
        fleet = Fleet(proxies, folder, rng)
        stack.callback(fleet.end)
        chaos = Chaos(server, proxies, fleet.kill, rng)
        portal = stack.enter_context(anyio.from_thread.start_blocking_portal())
        trainer = portal.start_task_soon(train, proxies[-1].url, folder, verdicts)
        stack.callback(trainer.cancel)
        started = sampled = time.monotonic()
        while time.monotonic() - started < seconds:
            time.sleep(rng.uniform(0, 1))
            chaos.step()
            fleet.check()
            if trainer.done():
                trainer.result()
            if time.monotonic() - sampled > 0.5:
                sampled = time.monotonic()
                for worker in fleet.constant:
                    samples.setdefault(worker.name, []).append(usage(worker.pid or 0))
        chaos.heal()
        (folder / "stop").touch()
        trainer.result(PATIENCE + 10)
        fleet.join(PATIENCE)
        left = portal.call(leftover, server.url)
        counts = [entry for path in folder.glob("counts-*") for entry in read(path)]
        wrong = [entry for path in folder.glob("wrong-*") for entry in read(path)]
    figures = {
        "runs": len(verdicts),
        "faults": sum(chaos.done.values()),
        "acknowledged transitions": sum(verdict.acknowledged for verdict in verdicts),
        "read": sum(verdict.read for verdict in verdicts),
        "of them not known to be acknowledged": sum(verdict.unknown for verdict in verdicts),
        "cancelled calls": sum(count.run for count in counts),
        "values checked": sum(count.first for count in counts),
    }
    must_be_none = {
        "lost": sum(verdict.lost for verdict in verdicts),
        "duplicates": sum(verdict.duplicates for verdict in verdicts),
        "cross-delivered": len(wrong),
        "leftover keys": left,
    }
    growth = {}
    for name, values in samples.items():
        third = max(1, len(values) // 3)
        middle, end = values[third : 2 * third] or values, values[-third:]
        memory = [statistics.median(value for value, _ in part) for part in (middle, end)]
        files = [max(value for _, value in part) for part in (middle, end)]
        growth[f"memory of the constant {name}"] = memory[1] / memory[0]
        growth[f"open files of the constant {name}"] = files[1] / files[0]
    table = Table(show_header=False)
    for name, value in figures.items():
        table.add_row(name, f"{value:,}")
    for name, value in must_be_none.items():
        table.add_row(name, f"{value:,}", "" if not value else "must be 0")
    for name, factor in growth.items():
        table.add_row(name, f"x{factor:.2f}", "" if factor < 1.2 else "must be flat")
    console.print(table)
    console.print(", ".join(f"{name} {count}" for name, count in sorted(chaos.done.items())))
    sys.exit(any(must_be_none.values()) or any(factor >= 1.2 for factor in growth.values()) or not verdicts)


if __name__ == "__main__":
    main()
