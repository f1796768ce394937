"""Random interleavings of everything that actors, trainers and the network do, against a model of what must hold."""

from __future__ import annotations

import random

import anyio
import pytest
import redis
from anyio.abc import TaskGroup, TaskStatus

import aionpredis
from aionpredis import Actor, Client, RunEnded

from .replays import data_keys, fill, kept_keys, kill_connections, named_keys, replay_of, uids, unnamed_without_ttl

pytestmark = [pytest.mark.anyio, pytest.mark.filterwarnings("ignore:chunk")]

LEASE = 0.3


class Simulator:
    """One actor that is restarted now and then.

    By run: ``sent``, in order; ``safe``: what of it is acknowledged; ``buried``: how much of it earlier starts have sent.
    """

    def __init__(self, client: Client, tasks: TaskGroup, first: int) -> None:
        self.client = client
        self.tasks = tasks
        self.next = first
        self.actor: Actor
        self.scope: anyio.CancelScope
        self.leave: anyio.Event
        self.sent: dict[int, list[int]] = {}
        self.safe: dict[int, set[int]] = {}
        self.buried: dict[int, int] = {}

    async def start(self) -> None:
        await self.tasks.start(self._live)

    async def _live(self, *, task_status: TaskStatus[None]) -> None:
        self.leave = leave = anyio.Event()
        with anyio.CancelScope() as self.scope:
            async with replay_of(self.client, chunk=3, lease=LEASE).actor() as self.actor:
                await self.actor.join()
                task_status.started()
                await leave.wait()

    async def append(self, count: int) -> None:
        assert self.actor.run is not None
        for _ in range(count):
            self.sent.setdefault(self.actor.run.run, []).append(self.next)
            self.next += 1
            try:
                await fill(self.actor, range(self.next - 1, self.next))
            except RunEnded:
                await self.actor.join()
                return

    async def flush(self) -> None:
        run = self.actor.run
        assert run is not None
        try:
            await self.actor.flush()
        except RunEnded:
            await self.actor.join()
        else:  # all of it that this incarnation has sent; earlier ones may have died with theirs
            sent = self.sent.get(run.run, [])
            self.safe.setdefault(run.run, set()).update(sent[self.buried.get(run.run, 0) :])

    async def die(self) -> None:
        """As good as SIGKILL: nothing is flushed."""
        self.scope.cancel()
        self.buried = {run: len(sent) for run, sent in self.sent.items()}
        await self.start()


@pytest.mark.parametrize("seed", range(2))
async def test_nothing_acknowledged_is_lost_doubled_mixed_up_or_left_over(
    url: str, stock: redis.Redis, seed: int
) -> None:
    rng = random.Random(f"{seed}")
    connect = aionpredis.connect
    async with connect(url) as trainer, connect(url) as a, connect(url) as b, anyio.create_task_group() as tasks:
        replay = replay_of(trainer, lease=LEASE)
        kept = [(await replay.begin_run(keep=2)).run]
        simulators = [Simulator(client, tasks, 10_000 * n) for n, client in enumerate((a, b, b))]
        for simulator in simulators:
            await simulator.start()

        async def check() -> None:
            for run in kept:
                found = await uids(await replay.epoch(run, batch=rng.randint(1, 20)))
                assert len(found) == len(set(found))
                assert set(found) <= {uid for s in simulators for uid in s.sent.get(run, [])}
                assert {uid for s in simulators for uid in s.safe.get(run, set())} <= set(found)
            assert unnamed_without_ttl(stock) == set()

        for _ in range(60):
            simulator = rng.choice(simulators)
            action = rng.choices(["append", "flush", "begin", "kill", "die", "check"], weights=[10, 4, 1, 2, 2, 2])[0]
            if action == "append":
                await simulator.append(rng.randint(1, 20))
            elif action == "flush":
                await simulator.flush()
            elif action == "begin":
                kept = [*kept[-1:], (await replay.begin_run(keep=2)).run]
            elif action == "kill":
                kill_connections(stock)
            elif action == "die":
                await simulator.die()
            else:
                await check()
        for simulator in simulators:
            await simulator.flush()
        await check()
        for simulator in simulators:
            simulator.leave.set()
        await anyio.sleep(LEASE + 0.05)
        await check()
        assert data_keys(stock) == kept_keys(stock) <= named_keys(stock)
        assert await replay.leftover_keys(kept[0]) == []
