"""A simulator process: several environments, each an async task and an actor of its own.

The trainer starts it as ``python -m aionpredis.demo.simulator`` and talks to it in lines of JSON. Standard input: the
task, then ``"stop"``. Standard output: ``{"ready": …}`` once the environments are made, at the end the report
(``{"environments": […]}``) or ``{"error": …}``. End-of-file on standard input means that the trainer is gone, however it
ended; then this process ends at once, too.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any, Final

import anyio
import anyio.lowlevel
import numpy as np

import aionpredis
from aionpredis.demo.environments import make
from aionpredis.demo.failure import cause_of
from aionpredis.demo.policy_gradient import Policy
from aionpredis.demo.rollout import Player
from aionpredis.demo.settings import LEASE, schema_of
from aionpredis.errors import RunEnded
from aionpredis.replay import ActorStats, Replay

__all__ = ["main"]

UID_BITS: Final = 32
"""For the number of the transition; 16 above them for the environment, 16 for the simulator."""


class Inbox:
    """Standard input. At its end the process ends on the spot: nobody is left to report to."""

    def __init__(self) -> None:
        self.stopped = False
        self._rest = b""
        self._waiting: set[anyio.CancelScope] = set()

    def line(self) -> Any:
        """The next line."""
        while b"\n" not in self._rest:
            piece = os.read(0, 65536)
            if not piece:
                os._exit(1)
            self._rest += piece
        line, _, self._rest = self._rest.partition(b"\n")
        return json.loads(line)

    async def watch(self) -> None:
        while True:
            await anyio.wait_readable(0)
            if self.line() == "stop":
                self.stopped = True
                for scope in self._waiting:
                    scope.cancel()

    @contextlib.contextmanager
    def unless_stopped(self) -> Iterator[None]:
        """What is awaited in this block is given up when the order to stop comes."""
        with anyio.CancelScope() as scope:
            self._waiting.add(scope)
            try:
                yield
            finally:
                self._waiting.remove(scope)


class Newest:
    """The newest policy: fetched once for all environments of this process, when it is published."""

    def __init__(self, replay: Replay) -> None:
        self.version = 0
        self.policy: Policy
        self._replay = replay
        self._changed = anyio.Event()

    async def follow(self) -> None:
        async for version, weights in self._replay.policy.watch():
            self.version, self.policy = version, Policy(weights)
            changed, self._changed = self._changed, anyio.Event()
            changed.set()

    async def reach(self, version: int) -> None:
        while self.version < version:
            await self._changed.wait()


async def play(
    player: Player, replay: Replay, name: str, newest: Newest, first_uid: int, quota: int, inbox: Inbox
) -> ActorStats:
    """Play until told to stop, in each run ``quota`` transitions or, with the last episode, some more."""
    uid, score, left = first_uid, 0.0, 0
    # The run may end while the block's end commits the last rows: they count as stale.
    with contextlib.suppress(RunEnded):
        async with replay.actor(name) as actor:
            while not inbox.stopped:
                if left <= 0:
                    with inbox.unless_stopped():
                        run = await actor.join()
                        await newest.reach(run.policy)
                        left = quota
                    continue
                columns = player.step(newest.policy)
                await anyio.lowlevel.checkpoint()  # the other environments' turn
                if columns is None:
                    continue
                rows = len(columns["action"])
                left -= rows
                score += float(columns["reward"].sum())
                columns["score"] = np.zeros(rows, np.float32)
                columns["uid"] = np.arange(uid, uid + rows, dtype=np.uint64)
                uid += rows
                if columns["terminated"][-1] or columns["truncated"][-1]:
                    columns["score"][-1], score = score, 0.0
                for row in zip(*columns.values(), strict=True):
                    try:
                        await actor.append(**dict(zip(columns, row, strict=True)))
                    except RunEnded:  # the rest belongs to the next run
                        run = await actor.join()
                        await newest.reach(run.policy)
                        left = quota
    return actor.stats


async def simulate(task: dict[str, Any], inbox: Inbox) -> dict[str, Any]:
    """Everything from the first connection to the report."""
    number, count = task["simulator"], task["environments"]
    environments = [make(task["env"]) for _ in range(count)]
    seeds = [int(np.random.SeedSequence([task["seed"], number, i]).generate_state(1)[0]) for i in range(count)]
    players = [Player(each, gamma=task["gamma"], seed=seed) for each, seed in zip(environments, seeds, strict=True)]
    stats: dict[int, ActorStats] = {}
    async with aionpredis.connect(task["url"]) as client:
        replay = client.replay(task["replay"], schema_of(environments[0]), chunk=task["chunk"], lease=LEASE)
        newest = Newest(replay)
        say({"ready": number})

        async def one(index: int) -> None:
            first_uid = (number << 16 | index) << UID_BITS
            name = f"simulator-{number}/{index}"
            stats[index] = await play(players[index], replay, name, newest, first_uid, task["quota"], inbox)

        async with anyio.create_task_group() as following:
            following.start_soon(newest.follow)
            following.start_soon(inbox.watch)
            async with anyio.create_task_group() as playing:
                for index in range(count):
                    playing.start_soon(one, index)
            following.cancel_scope.cancel()
    for each in environments:
        each.close()
    return {"environments": [asdict(stats[index]) for index in range(count)]}


def say(message: dict[str, Any]) -> None:
    os.write(1, json.dumps(message).encode() + b"\n")


def main() -> int:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever wants this process to end tells the trainer
    inbox = Inbox()
    task = inbox.line()
    if hasattr(os, "nice"):
        os.nice(5)  # the trainer goes first
    try:
        report = aionpredis.run(simulate, task, inbox)
    except (aionpredis.AionpredisError, BaseExceptionGroup) as error:
        cause = cause_of(error)
        if cause is None:
            raise
        say({"error": str(cause)})
        return 1
    say(report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
