"""The trainer: begin a run, collect, read, learn; publish the policy with the next run; and count everything."""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Protocol

import anyio
import anyio.from_thread
import anyio.to_thread
import numpy as np
from numpy.typing import NDArray

import aionpredis
from aionpredis.client import Client
from aionpredis.demo.environments import make
from aionpredis.demo.fleet import Fleet
from aionpredis.demo.policy_gradient import Policy, Trainer
from aionpredis.demo.result import Result, RunResult
from aionpredis.demo.settings import LEASE, Settings, schema_of
from aionpredis.demo.simulator import UID_BITS
from aionpredis.errors import AionpredisError
from aionpredis.replay import Batches, Replay, Run
from aionpredis.server import Server

__all__ = ["Progress", "demo"]

Columns = dict[str, NDArray[Any]]

LEARNED_FROM = ("state", "action", "logp", "return_")

CLEAN_UP_SECONDS = 5.0
"""For deleting the demo's keys from a server that goes on, after Ctrl-C or an error."""


class Progress(Protocol):
    """Whoever wants to see how it goes."""

    def phase(self, run: int, what: str, done: int = 0, total: int = 0, rate: float = 0.0) -> None:
        """``what`` is being done for the run (0: before the first), ``done`` of ``total`` transitions so far."""

    def finished(self, run: RunResult) -> None: ...

    def note(self, text: str) -> None: ...


class Tally:
    """What the trainer was handed, counted by ``uid``: without any help of the library's own bookkeeping."""

    def __init__(self) -> None:
        self._uids: list[NDArray[np.uint64]] = []

    def add(self, batch: Columns) -> None:
        self._uids.append(batch["uid"].copy())

    def compare(self, reports: list[dict[str, Any]], result: Result) -> None:
        """Set this against what the actors report, environment by environment, so that errors cannot cancel out."""
        uids = np.concatenate([np.empty(0, np.uint64), *self._uids])
        distinct = np.unique(uids)
        environments, counts = np.unique(distinct >> np.uint64(UID_BITS), return_counts=True)
        read = dict(zip(environments.tolist(), counts.tolist(), strict=True))
        for simulator, report in enumerate(reports):
            for index, stats in enumerate(report["environments"]):
                result.acknowledged += stats["acknowledged"]
                result.stale += stats["stale"]
                result.lost += max(0, stats["acknowledged"] - read.get(simulator << 16 | index, 0))
        result.read = len(uids)
        result.duplicates = len(uids) - len(distinct)


class Reading:
    """A run's transitions: those that the trainer learns from, and later the tail that came while it learned."""

    def __init__(self, run: Run, number: int, tally: Tally) -> None:
        self.run = run
        self.result = RunResult(number, 0, None, 0.0, 0.0, 0.0)
        self.started = time.monotonic()
        self.batches: Batches
        self._tally = tally
        self._scores: list[NDArray[np.float32]] = []

    def take(self, batch: Columns) -> None:
        self._tally.add(batch)
        self._scores.append(batch["score"][batch["terminated"] | batch["truncated"]])
        self.result.transitions += len(batch["uid"])
        scores = np.concatenate(self._scores)
        self.result.mean_return = float(scores.mean()) if len(scores) else None


async def demo(settings: Settings, progress: Progress, url: str | None = None) -> Result:
    """The whole demo: on the server at ``url``, or an embedded one. It leaves nothing behind, however it ends.

    Raises:
        AionpredisError: the server cannot be used, or a simulator failed.
    """
    started = time.monotonic()
    progress.phase(0, "starting")
    # Also tells what is wrong with the environment, before anything is started.
    environment = await anyio.to_thread.run_sync(make, settings.env)
    environment.close()
    async with _server(url) as address, aionpredis.connect(address) as client:
        name = f"demo-{os.urandom(4).hex()}"
        replay = client.replay(name, schema_of(environment), chunk=settings.chunk, lease=LEASE)
        common = {"url": address, "replay": name, "quota": settings.quota, **settings.as_dict()}
        tasks = [{**common, "simulator": number} for number in range(settings.simulators)]
        rng = np.random.default_rng(settings.seed)
        policy = Policy.init(environment.state_shape, environment.actions, settings.hidden, rng)
        trainer = Trainer(policy, learning_rate=settings.learning_rate)
        result = Result(settings)
        try:
            async with Fleet(list(tasks)) as fleet:
                await fleet.ready()
                await _runs(replay, trainer, rng, fleet, result, progress)
            progress.phase(settings.runs, f"deleting, then looking for what is left after {LEASE:g} s")
            await replay.delete()
            await anyio.sleep(LEASE)
            result.leftover_keys = len(await _keys_of(client, name))
        except BaseException:
            if url is not None:
                await _clean_up(replay, progress)
            raise
    result.seconds = time.monotonic() - started
    return result


async def _runs(
    replay: Replay, trainer: Trainer, rng: np.random.Generator, fleet: Fleet, result: Result, progress: Progress
) -> None:
    settings = result.settings
    tally = Tally()
    previous: Reading | None = None
    for number in range(1, settings.runs + 1):
        # From here on the server refuses what belongs to the previous run. Its data stays for one run more: an actor
        # may still be about to finish a commit that the log has already. The data of the run before that is deleted.
        run = await replay.begin_run(trainer.policy.weights, keep=2)
        reading = Reading(run, number, tally)
        if previous is not None:
            await _read_tail(replay, previous, progress)
            result.runs.append(previous.result)
        previous = reading
        await _collect(replay, reading, settings.transitions, progress)
        columns = await _read(replay, reading, settings, progress)
        progress.phase(number, "learning", reading.result.transitions, settings.transitions)
        await anyio.to_thread.run_sync(_learn, trainer, columns, settings, rng)
        reading.result.seconds = time.monotonic() - reading.started
    progress.phase(settings.runs, "stopping the simulators")
    reports = await fleet.stop()
    assert previous is not None
    await _read_tail(replay, previous, progress)
    result.runs.append(previous.result)
    tally.compare(reports, result)


async def _collect(replay: Replay, reading: Reading, target: int, progress: Progress) -> None:
    """Wait until so many transitions are committed."""
    while True:
        count = await replay.count(reading.run)
        rate = count / max(time.monotonic() - reading.started, 1e-9)
        progress.phase(reading.result.run, "collecting", count, target, rate)
        if count >= target:
            reading.result.append_per_s = rate
            return
        await anyio.sleep(0.05)


async def _read(replay: Replay, reading: Reading, settings: Settings, progress: Progress) -> Columns:
    """All that is committed now, in shuffled batches; they become one array a column, for several passes."""
    progress.phase(reading.result.run, "reading", 0, settings.transitions)
    started = time.monotonic()
    reading.batches = await replay.epoch(reading.run, batch=settings.batch, seed=settings.seed)
    batches = [batch async for batch in reading.batches]
    seconds = time.monotonic() - started
    for batch in batches:
        reading.take(batch)
    reading.result.read_per_s = reading.result.transitions / max(seconds, 1e-9)
    return {name: np.concatenate([batch[name] for batch in batches]) for name in LEARNED_FROM}


async def _read_tail(replay: Replay, reading: Reading, progress: Progress) -> None:
    """What was committed to the run while the trainer learned: nothing can be added any more. It is only counted."""
    tail = await replay.epoch(reading.run, batch=4096, shuffle=False, after=reading.batches)
    async for batch in tail:
        reading.take(batch)
    progress.finished(reading.result)


def _learn(trainer: Trainer, columns: Columns, settings: Settings, rng: np.random.Generator) -> None:
    """Several passes over a run, in a new order each time. In a worker thread, so that the event loop stays free."""
    rows = len(columns["action"])
    size = min(settings.batch, rows)
    for _ in range(settings.passes):
        order = rng.permutation(rows)
        for start in range(0, rows - size + 1, size):
            anyio.from_thread.check_cancelled()
            chosen = order[start : start + size]
            trainer.step({name: column[chosen] for name, column in columns.items()})


@asynccontextmanager
async def _server(url: str | None) -> AsyncIterator[str]:
    if url is not None:
        yield url
        return
    server = Server()
    try:
        await anyio.to_thread.run_sync(server.start)
        yield server.url
    finally:
        with anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(server.stop)


async def _keys_of(client: Client, name: str) -> set[bytes]:
    """Every key of this demo that is on the server, whatever it is for."""
    found: set[bytes] = set()
    for pattern in (f"{name}:*", f"{{{name}}}:*"):
        cursor: bytes | int = 0
        while cursor != b"0":
            cursor, keys = await client.execute("SCAN", cursor, "MATCH", pattern, "COUNT", 10_000)
            found.update(keys)
    return found


async def _clean_up(replay: Replay, progress: Progress) -> None:
    with anyio.move_on_after(CLEAN_UP_SECONDS, shield=True):
        try:
            await replay.delete()
        except AionpredisError as error:
            progress.note(f"{error}; keys that contain {replay.name!r} may be left on the server")
        return
    progress.note(f"the server does not answer; keys that contain {replay.name!r} may be left there")
