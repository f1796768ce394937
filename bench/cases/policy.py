"""A thousand actors wait for a policy: how long after the trainer published it does the last one know, and have, it."""

from __future__ import annotations

import contextlib
import multiprocessing
import time
import traceback
from multiprocessing.connection import Connection
from typing import Any, ClassVar

import anyio
import anyio.to_thread
import numpy as np

import aionpredis
from aionpredis.policy import Announced, Policy, PolicyVersion
from bench.harness import Case, Contender, Ratio, Sample

WATCHERS = 1000
PROCESSES = 10


class _Noting(Policy):
    """Notes when a new version is known: its weights are fetched next."""

    known = 0.0

    async def _load(self, announced: Announced) -> PolicyVersion | None:
        self.known = time.perf_counter()
        return await super()._load(announced)


def _watch(pipe: Connection, url: str, name: str, clients: int, watchers: int) -> None:
    """A process with so many clients, and so many watchers at each; reports when the last one knew and had a version."""
    had: dict[int, list[tuple[float, float]]] = {}

    async def actor(client: aionpredis.Client) -> None:
        policy = _Noting(client, name)
        async for version, weights in policy.watch():
            now = time.perf_counter()
            assert weights["w"][0] == weights["w"][-1] == version
            del weights  # each has 10 MB of its own
            times = had.setdefault(version, [])
            times.append((policy.known, now))
            if len(times) == clients * watchers:
                pipe.send((version, *(max(column) for column in zip(*times, strict=True))))

    async def main() -> None:
        async with contextlib.AsyncExitStack() as stack:
            opened = [
                await stack.enter_async_context(aionpredis.connect(url, client_name=name)) for _ in range(clients)
            ]
            async with anyio.create_task_group() as tasks:
                for client in opened:
                    for _ in range(watchers):
                        tasks.start_soon(actor, client)
                await anyio.to_thread.run_sync(pipe.recv, abandon_on_cancel=True)
                tasks.cancel_scope.cancel()

    try:
        aionpredis.run(main)
    except BaseException:
        pipe.send(RuntimeError(traceback.format_exc()))


class Watch(Contender):
    """The time runs from the call of ``publish()``. Everything shares the contender's core, except the server."""

    kind = "ours"
    nbytes: ClassVar[int] = 10_000
    alone: ClassVar[bool] = True  # each watcher has a client of its own

    async def open(self) -> None:
        self.count = self.work.size(WATCHERS) // PROCESSES
        self.stack = contextlib.AsyncExitStack()
        self.client = await self.stack.enter_async_context(aionpredis.connect(self.work.url))
        self.name_there = name = f"bench-{type(self).__name__}"
        self.policy = self.client.policy(name)
        await self.policy.delete()
        self.version = 0
        clients, watchers = (self.count, 1) if self.alone else (1, self.count)
        self.connections = PROCESSES * clients
        context = multiprocessing.get_context("spawn")
        self.pipes: list[Connection] = []
        self.processes: list[Any] = []
        for _ in range(PROCESSES):
            pipe, other = context.Pipe()
            process = context.Process(target=_watch, args=(other, self.work.url, name, clients, watchers), daemon=True)
            process.start()
            other.close()
            self.pipes.append(pipe)
            self.processes.append(process)

    async def waiting(self) -> None:
        """Until all of them wait at the server."""
        with anyio.fail_after(60):
            while True:
                clients = (await self.client.execute("CLIENT", "LIST")).decode().splitlines()
                facts = [dict(fact.split("=", 1) for fact in client.split()) for client in clients]
                if sum(f["name"] == self.name_there and "b" in f["flags"] for f in facts) == self.connections:
                    return
                await anyio.sleep(0.1)

    async def run(self) -> Sample:
        await self.waiting()
        self.version += 1
        weights = np.full(self.nbytes // 4, self.version, np.float32)
        start = time.perf_counter()
        assert await self.policy.publish({"w": weights}) == self.version
        reports = [await anyio.to_thread.run_sync(pipe.recv) for pipe in self.pipes]
        for report in reports:
            if isinstance(report, Exception):
                raise report
        assert {report[0] for report in reports} == {self.version}
        known, had = (max(report[column] for report in reports) - start for column in (1, 2))
        units = PROCESSES * self.count
        return Sample(units, units * self.nbytes, {"known_s": known, "weights_s": had}, seconds=had)

    async def close(self) -> None:
        for pipe, process in zip(self.pipes, self.processes, strict=True):
            pipe.send(None)
            process.join(10)
        await self.policy.delete()
        await self.stack.aclose()


class Small(Watch):
    name = "1,000 clients, 10 kB"


class SmallShared(Watch):
    name = "10 clients of 100 watchers, 10 kB"
    alone = False


class LargeShared(Watch):
    name = "10 clients of 100 watchers, 10 MB"
    nbytes = 10_000_000
    alone = False


CASE = Case(
    "policy",
    "A thousand actors wait for a policy: seconds until the last knows, and has, the new version",
    (Small, SmallShared, LargeShared),
    (
        Ratio("watch_wakeup_s", Small.name, "", "<= 1", "weights_s"),
        Ratio("watch_wakeup_s_shared", SmallShared.name, "", "<= 1", "weights_s"),
        Ratio("watch_wakeup_s_10mb", LargeShared.name, "", "<= 1", "known_s"),
    ),
    metrics=("known_s", "weights_s"),
)
