"""Contenders in processes of their own, interleaved: each round runs every contender once, in a new order.

A contender's process stays alive from round to round. All of them are pinned to one core and the server to another,
so that no contender wins by the scheduler's luck.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import random
import resource
import statistics
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any, ClassVar

import aionpredis

__all__ = ["Case", "Contender", "Ratio", "Result", "Sample", "Work", "run_case"]


@dataclass(frozen=True)
class Work:
    """What every contender of a case is told. ``quick``: a tenth of the work, for a look."""

    url: str
    quick: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    def size(self, full: int) -> int:
        return max(1, full // 10) if self.quick else full


@dataclass
class Sample:
    """One timed round. ``units`` were moved, ``nbytes`` together; ``metrics``: what else the contender measured."""

    units: int
    nbytes: int
    metrics: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    cpu: float = 0.0  # user + system of the contender's processes
    rss: int = 0  # peak, bytes
    faults: int = 0  # minor page faults of the server

    def value(self, metric: str) -> float:
        if metric == "rate":
            return self.units / self.seconds
        if metric == "bytes":
            return self.nbytes / self.seconds
        if metric == "cpu":
            return self.cpu / self.units
        return self.metrics.get(metric, math.nan)


class Contender:
    """One way to do a case's work. ``kind``: ours, peer (several batches in flight), sequential, recipe, ceiling."""

    name: ClassVar[str]
    kind: ClassVar[str] = "peer"
    needs: ClassVar[str] = ""  # a module or program that may be missing
    own_core: ClassVar[bool] = True

    def __init__(self, work: Work) -> None:
        self.work = work

    async def open(self) -> None:
        """Connect and prepare; not timed."""

    async def run(self) -> Sample:
        """The timed part."""
        raise NotImplementedError

    async def check(self) -> None:
        """Raise if what the last run did is wrong; not timed."""

    async def close(self) -> None: ...


@dataclass(frozen=True)
class Ratio:
    """``over`` against the best of ``under``, by name or kind; ``target`` as in ``">= 1.8"``."""

    key: str
    over: str
    under: str
    target: str
    metric: str = "rate"
    smaller_is_better: bool = False


@dataclass
class Case:
    name: str
    title: str
    contenders: Sequence[type[Contender]]
    ratios: Sequence[Ratio] = ()
    metrics: Sequence[str] = ("rate", "bytes", "cpu")
    prepare: Callable[[Work], None] | None = None


@dataclass
class Result:
    case: Case
    samples: dict[str, list[Sample]]
    skipped: dict[str, str]

    def median(self, name: str, metric: str) -> float:
        return statistics.median(sample.value(metric) for sample in self.samples[name])

    def best(self, chosen: str, ratio: Ratio) -> str | None:
        """The best contender of that name or kind."""
        names = [c.name for c in self.case.contenders if chosen in (c.name, c.kind) and c.name in self.samples]
        if not names:
            return None
        pick = min if ratio.smaller_is_better else max
        return pick(names, key=lambda name: self.median(name, ratio.metric))

    def ratio(self, ratio: Ratio) -> float | None:
        """The median of the rounds' ratios: a slow moment of the machine hits both sides."""
        over, under = self.best(ratio.over, ratio), self.best(ratio.under, ratio)
        if over is None or under is None:
            return None
        pairs = zip(self.samples[over], self.samples[under], strict=True)
        return statistics.median(a.value(ratio.metric) / b.value(ratio.metric) for a, b in pairs)


def _cpu() -> float:
    own, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


def _serve(pipe: Connection, contender: type[Contender], work: Work, core: int | None) -> None:
    """A contender's process: do what the pipe says."""
    if core is not None:
        os.sched_setaffinity(0, {core})

    async def main() -> None:
        subject = contender(work)
        await subject.open()
        pipe.send(None)
        while (order := pipe.recv()) is not None:
            if order == "run":
                cpu, start = _cpu(), time.perf_counter()
                sample = await subject.run()
                sample.seconds = sample.seconds or time.perf_counter() - start
                sample.cpu = _cpu() - cpu
                sample.rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
                pipe.send(sample)
            else:
                await subject.check()
                pipe.send(None)
        await subject.close()

    try:
        aionpredis.run(main)
    except BaseException:
        pipe.send(RuntimeError(f"{contender.name}: {traceback.format_exc()}"))


class _Process:
    def __init__(self, contender: type[Contender], work: Work, core: int | None) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(other, contender, work, core if contender.own_core else None), daemon=False
        )
        self._process.start()
        other.close()
        self._receive()

    def _receive(self) -> Any:
        answer = self._pipe.recv()
        if isinstance(answer, Exception):
            raise answer
        return answer

    def order(self, what: str) -> Any:
        self._pipe.send(what)
        return self._receive()

    def end(self) -> None:
        try:
            self._pipe.send(None)
        except OSError:
            pass
        self._process.join(10)
        if self._process.is_alive():
            self._process.kill()


def server_faults(pid: int | None) -> int:
    """Minor page faults of the server so far: contenders are comparable only where these are alike."""
    if pid is None:
        return 0
    try:
        with open(f"/proc/{pid}/stat") as stat:  # noqa: PTH123
            return int(stat.read().rsplit(")", 1)[1].split()[7])
    except OSError:
        return 0


def run_case(case: Case, work: Work, *, rounds: int, server_pid: int | None, progress: Callable[[str], None]) -> Result:
    """Every contender once to warm up and be checked, then ``rounds`` times, then once more to be checked."""
    from bench.machine import client_core, missing

    if case.prepare is not None:
        case.prepare(work)
    processes: dict[str, _Process] = {}
    result = Result(case, {}, {})
    try:
        for contender in case.contenders:
            why = missing(contender.needs)
            if why:
                result.skipped[contender.name] = why
                continue
            progress(f"{case.name}: warming up {contender.name}")
            process = _Process(contender, work, client_core())
            processes[contender.name] = process
            process.order("run")
            process.order("check")
            result.samples[contender.name] = []
        order = list(processes)
        for number in range(rounds):
            random.shuffle(order)
            for name in order:
                progress(f"{case.name}: round {number + 1}/{rounds} {name}")
                faults = server_faults(server_pid)
                sample = processes[name].order("run")
                sample.faults = server_faults(server_pid) - faults
                result.samples[name].append(sample)
        for process in processes.values():
            process.order("run")  # the others have written to the same keys since
            process.order("check")
    finally:
        for process in processes.values():
            process.end()
    return result
