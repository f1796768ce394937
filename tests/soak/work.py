"""What the processes of a soak do: simulators, learners, and the calls that are cancelled beside it.

All values are self-describing, so one that reaches the wrong caller shows. A process that meets an error that it should not
meet ends with it, and with it the soak.
"""

from __future__ import annotations

import itertools
import logging
import random
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import anyio
import numpy as np
from numpy.typing import NDArray

import aionpredis
from aionpredis import (
    Client,
    ConnectError,
    ConnectionLost,
    NotReplicated,
    Position,
    Replay,
    ReplayGone,
    RunEnded,
    Schema,
    ServerUnavailable,
)

from .ledger import Ledger, read

T = TypeVar("T")

LEARNERS = 2
LEASE = 5.0
STATE = (64,)
KEYS = 20
"""Arrays that the mixed calls of one process store and load."""
FINISHED = -1
STALLS = "append", "flush", "flush with replicas", "read", "call"
"""What can take long: of an actor, of a learner, of any other task."""
NOTABLE = 0.5
"""Seconds from which on a stall is written down."""


def make_replay(client: Client, *, replicas: int = 0) -> Replay:
    schema = Schema(state=("float32", STATE), uid="int64", terminated="bool")
    return client.replay("soak", schema, chunk=16, lease=LEASE, max_lag=20_000, replicas=replicas)


def state_of(uid: int) -> float:
    return float(uid % (1 << 24))


@dataclass
class Worker:
    """One process, and what it counts. Values that are not what was asked for are written down at once.

    ``kept_by``: what an acknowledgement means here. ``disk``: the server is in its append-only file; ``replica``: a replica has
    it, too; ``memory``: its primary alone has it.
    """

    url: str
    folder: Path
    number: int
    rng: random.Random
    kept_by: str
    cancelled: int = 0
    checked: int = 0

    @property
    def stopping(self) -> bool:
        return (self.folder / "stop").exists()

    def check(self, values: NDArray[Any], expected: Any) -> None:
        self.checked += 1
        self.must(bool((values == expected).all()), f"{values!r} is {expected!r}")

    def must(self, condition: bool, what: str) -> None:
        if not condition:
            logging.error("%s %d: not true: %s", self.kept_by, self.number, what)
            with Ledger(self.folder / f"wrong-{self.number}") as ledger:
                ledger.write(1, 0, 0)

    @contextmanager
    def timing(self, what: str) -> Iterator[None]:
        """Write down if this takes long: in ms of the machine's clock, so that faults can be held against it."""
        began = time.monotonic()
        try:
            yield
        finally:
            took = time.monotonic() - began
            if took > NOTABLE:
                with Ledger(self.folder / f"stalls-{self.number}") as ledger:
                    ledger.write(STALLS.index(what), int(1000 * began), int(1000 * took))

    async def perhaps(
        self, call: Callable[[], Awaitable[Any]], seconds: float = 0.01, what: str = "call"
    ) -> tuple[bool, Any]:
        """Await the call, or cancel it after a random time; whether it came to its end, and its result."""
        limit = 10 ** self.rng.uniform(-5, np.log10(seconds)) if self.rng.random() < 0.3 else None
        with anyio.move_on_after(limit), self.timing(what):
            return True, await call()
        self.cancelled += 1
        return False, None

    def report(self) -> None:
        with Ledger(self.folder / f"counts-{self.number}") as ledger:
            ledger.write(self.cancelled, self.checked, 0)


@asynccontextmanager
async def opened(make: Callable[[], AbstractAsyncContextManager[T]]) -> AsyncIterator[T]:
    """A client, or an actor: opening one is a single attempt, which may meet a fault."""
    async with AsyncExitStack() as stack:
        while True:
            try:
                value = await stack.enter_async_context(make())
            except (ConnectError, ConnectionLost, NotReplicated, ServerUnavailable):
                await anyio.sleep(0.1)
            else:
                break
        yield value


@asynccontextmanager
async def connected(worker: Worker) -> AsyncIterator[Client]:
    """A client. In a cluster, half of the processes have what never changes sent by replicas."""
    async with opened(partial(aionpredis.connect, worker.url, read_replicas=worker.number % 2 == 1)) as client:
        (worker.folder / f"ready-{worker.number}").touch()
        yield client


# --- simulators ------------------------------------------------------------------------------------------------------


async def simulate(worker: Worker) -> None:
    """Append numbered transitions, run after run; write down which are acknowledged."""
    async with connected(worker) as client, anyio.create_task_group() as tasks:
        for index in range(3):
            tasks.start_soon(mixed, worker, client, index)
        tasks.start_soon(watch, worker, client)
        with Ledger(worker.folder / f"acknowledged-{worker.kept_by}-{worker.number}") as ledger:
            await append(worker, client, ledger)
        tasks.cancel_scope.cancel()
        worker.report()


async def append(worker: Worker, client: Client, ledger: Ledger) -> None:
    uid = worker.number << 32
    state = np.zeros(STATE, np.float32)
    flush = "flush with replicas" if worker.kept_by == "replica" else "flush"
    async with opened(make_replay(client, replicas=int(worker.kept_by == "replica")).actor) as actor:
        (worker.folder / f"incarnation-{worker.kept_by}-{actor.incarnation.hex()}").touch()
        run = await actor.join()
        told = uid
        while not worker.stopping:
            try:
                with worker.timing("append"):
                    for _ in range(worker.rng.randrange(1, 200)):
                        state[:] = state_of(uid)
                        uid += 1  # whatever becomes of it, its number is not used again
                        await actor.append(state=state, uid=uid - 1, terminated=uid % 10 == 0)
                done, _ = await worker.perhaps(actor.flush, what=flush)
                if done:
                    ledger.write(run.run, told, uid)
                    told = uid
                await anyio.sleep(worker.rng.uniform(0, 0.02))
            except RunEnded:
                run = await actor.join()
                told = uid
        try:
            await actor.flush()
            ledger.write(run.run, told, uid)
        except RunEnded:
            pass


async def watch(worker: Worker, client: Client) -> None:
    """Policies come whole, and never an older one after a newer one, unless a server may have lost that."""
    newest, changes = 0, client.faults.changes
    async for version in make_replay(client).policy.watch():
        worker.check(version.weights["number"], version.weights["number"][0])
        worker.must(
            version.version > newest or client.faults.changes > changes,
            f"version {version.version} comes after {newest}",
        )
        newest, changes = version.version, client.faults.changes


async def mixed(worker: Worker, client: Client, index: int) -> None:
    """Store and load arrays that say which key they belong to; every third call is cancelled."""
    keys = [f"mixed:{worker.number}:{index}:{number}" for number in range(KEYS)]
    shape = (KEYS, 500)
    expected = np.arange(KEYS) + 1000 * (index + 10 * worker.number)
    for generation in itertools.count():
        values = np.broadcast_to(expected[:, None], shape) + 1e-3 * (generation % 10)
        number = worker.rng.randrange(KEYS)
        key, value = keys[number], values[number]
        out = np.zeros(shape)
        call = worker.rng.randrange(6)
        if call == 0:
            await worker.perhaps(partial(client.set, key, value, ttl=600))
        elif call == 1:
            await worker.perhaps(partial(client.mset, dict(zip(keys, values, strict=True)), ttl=600))
        elif call == 2:
            done, array = await worker.perhaps(partial(client.get, key))
            if done and array is not None:
                worker.check(np.round(array), expected[number])
        elif call == 3:
            done, array = await worker.perhaps(partial(client.get, key, out=out[0]))
            if not done:  # nobody writes there any more
                out[0] = -1
                await anyio.sleep(0.001)
                worker.check(out[0], -1)
            elif array is not None:
                worker.check(np.round(out[0]), expected[number])
        elif call == 4:
            done, found = await worker.perhaps(partial(client.mget, keys, out=out))
            if not done:
                out[:] = -1
                await anyio.sleep(0.001)
                worker.check(out, -1)
            else:
                worker.check(np.round(out[found]), expected[found][:, None])
        else:
            done, arrays = await worker.perhaps(partial(client.mget, keys))
            for array, wanted in zip(arrays or (), expected, strict=False):
                if array is not None:
                    worker.check(np.round(array), wanted)
        await anyio.sleep(worker.rng.uniform(0, 0.01))


# --- learners --------------------------------------------------------------------------------------------------------


async def learn(worker: Worker) -> None:
    """Follow each run to its end; write down what came together with the position, and go on there after a SIGKILL."""
    path = worker.folder / f"read-{worker.number}"
    finished: set[int] = set()
    position: Position | None = None
    for entry in read(path):
        if entry.first == FINISHED:
            finished.add(entry.run)
        else:
            position = Position(entry.run, entry.first, entry.second)
    async with connected(worker) as client, anyio.create_task_group() as tasks:
        tasks.start_soon(sample, worker, client)
        with Ledger(path) as ledger:
            while True:
                runs = [entry.run for entry in read(worker.folder / "runs")]
                run = next((run for run in runs if run not in finished), None)
                if run is None:
                    if (worker.folder / "last").exists():
                        break
                    await anyio.sleep(0.05)
                    continue
                after = position if position is not None and position.run == run else None
                await follow(worker, client, ledger, run, after)
                ledger.write(run, FINISHED, FINISHED)
                finished.add(run)
        tasks.cancel_scope.cancel()
        worker.report()


async def follow(worker: Worker, client: Client, ledger: Ledger, run: int, after: Position | None) -> None:
    reader = await make_replay(client).follow(run, batch=64, shard=(worker.number, LEARNERS), after=after)
    while True:
        try:
            done, batch = await worker.perhaps(reader.__anext__, 0.1, "read")
        except StopAsyncIteration:
            break
        if done:
            worker.check(batch["state"], (batch["uid"] % (1 << 24)).astype(np.float32)[:, None])
            _, entry, row = reader.position
            ledger.write(run, entry, row, batch["uid"])
    stats = reader.stats
    worker.must(not stats.evicted, f"{stats} has evicted none")
    with Ledger(worker.folder / f"missing-{worker.number}") as missing:
        missing.write(run, stats.missing, stats.gaps)


async def sample(worker: Worker, client: Client) -> None:
    """Draw from whichever run is the newest."""
    replay = make_replay(client)
    while True:
        try:
            sampler = await replay.sampler(batch=32, length=worker.rng.choice((1, 4)))
            while True:
                done, batch = await worker.perhaps(sampler.sample, 0.1)
                if done:
                    wanted = (batch["uid"] % (1 << 24)).astype(np.float32)[..., None]
                    worker.check(batch["state"], wanted)
                await anyio.sleep(worker.rng.uniform(0, 0.02))
        except (RunEnded, ReplayGone):
            await anyio.sleep(0.1)


# --- processes -------------------------------------------------------------------------------------------------------

ROLES: dict[str, Callable[[Worker], Awaitable[None]]] = {"simulator": simulate, "learner": learn}


def main(role: str, url: str, folder: str, number: str, seed: str, loop: str, kept_by: str) -> None:
    """One process: ``loop`` is ``asyncio``, ``uvloop`` or ``trio``."""
    logging.basicConfig(level=logging.ERROR)  # a line for each outage would be thousands
    worker = Worker(url, Path(folder), int(number), random.Random(seed), kept_by)
    backend = "trio" if loop == "trio" else "asyncio"
    options = {"use_uvloop": loop == "uvloop"} if backend == "asyncio" else {}
    anyio.run(ROLES[role], worker, backend=backend, backend_options=options)


if __name__ == "__main__":
    main(*sys.argv[1:])
