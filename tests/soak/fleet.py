"""The processes of a soak: simulators and learners on all three loops; who dies is replaced."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from ..hosts import Hosts
from ..nodes import wait
from .work import LEARNERS

__all__ = ["SIMULATORS", "Fleet", "usage"]

SIMULATORS = 6
LOOPS = ("asyncio", "uvloop", "trio")
_ROOT = Path(__file__).parents[2]


class Fleet:
    """``url(slot)`` and ``host(slot)``: which server a process talks to, and where it runs; learners have the first slots.

    ``kept_by(slot)``: see :class:`Worker`.
    """

    def __init__(
        self,
        network: Hosts,
        folder: Path,
        rng: random.Random,
        *,
        url: Callable[[int], str],
        host: Callable[[int], int],
        kept_by: Callable[[int], str],
    ) -> None:
        self._network = network
        self._folder = folder
        self._rng = rng
        self._url = url
        self._host = host
        self._kept_by = kept_by
        self._loops = rng.sample(LOOPS, len(LOOPS))  # so a seed decides on which the constant ones run
        self._made = LEARNERS  # learners keep their numbers, a simulator that starts anew is another one
        self._names: dict[int, str] = {}  # by pid
        self.slots: list[subprocess.Popen[bytes]] = []
        for slot in range(LEARNERS + SIMULATORS):
            self.slots.append(self._start(slot))

    def _start(self, slot: int) -> subprocess.Popen[bytes]:
        number = slot
        if slot >= LEARNERS:
            number, self._made = self._made, self._made + 1
        role = "learner" if slot < LEARNERS else "simulator"
        loop = self._loops[slot % len(LOOPS)]
        arguments = role, self._url(slot), self._folder, number, self._rng.random(), loop, self._kept_by(slot)
        worker = self._network.run(
            self._host(slot), [sys.executable, "-m", "tests.soak.work", *map(str, arguments)], cwd=_ROOT
        )
        self._names[worker.pid] = f"{role} {number} on {loop}"
        return worker

    def kill(self) -> None:
        """SIGKILL for one of those that may die."""
        slot = self._rng.choice([*range(1, LEARNERS), *range(LEARNERS + 1, LEARNERS + SIMULATORS)])
        self.slots[slot].kill()
        self.slots[slot].wait()
        self.slots[slot] = self._start(slot)

    def begun(self) -> None:
        """Return when all processes have connected."""
        self._until(lambda: len(list(self._folder.glob("ready-*"))) == len(self.slots), "all have connected")

    def goes_on(self) -> None:
        """Return when all learners have read something more."""
        paths = [self._folder / f"read-{number}" for number in range(LEARNERS)]
        before = [path.stat().st_size for path in paths]
        self._until(
            lambda: all(path.stat().st_size > size for path, size in zip(paths, before, strict=True)),
            "all go on reading",
        )

    def _until(self, condition: Callable[[], bool], what: str) -> None:
        def holds() -> bool:
            self.check()
            return condition()

        wait(holds, what, 60)

    @property
    def constant(self) -> dict[str, int]:
        """The process of each kind that is never killed: its memory and its open files must stay as they are."""
        return {self._names[worker.pid]: worker.pid for worker in (self.slots[0], self.slots[LEARNERS])}

    def check(self) -> None:
        """No process has ended with an error."""
        for worker in self.slots:
            if worker.poll():
                raise SystemExit(f"{self._names[worker.pid]} ended with exit code {worker.returncode}")

    def join(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while hanging := [worker for worker in self.slots if worker.poll() is None]:
            self.check()
            if time.monotonic() > deadline:
                names = ", ".join(self._names[worker.pid] for worker in hanging)
                raise SystemExit(f"still running after {seconds:.0f} s: {names}")
            time.sleep(0.05)
        self.check()


def usage(pid: int) -> tuple[int, int]:
    """Resident bytes and open files."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE"), len(os.listdir(f"/proc/{pid}/fd"))  # noqa: PTH208
