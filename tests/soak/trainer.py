"""The trainer of a soak, in the process that makes things go wrong."""

from __future__ import annotations

import time
from pathlib import Path

import anyio
import numpy as np

import aionpredis

from .ledger import Ledger, Verdict, judge, read
from .work import FINISHED, LEARNERS, LEASE, make_replay

__all__ = ["PATIENCE", "leftover", "train"]

RUN_SECONDS = 10.0
PATIENCE = 120.0
"""Seconds in which what has been disturbed must have caught up."""


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
                        while not _finished(folder, previous):
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


def _finished(folder: Path, run: int) -> bool:
    ends = [entry for path in folder.glob("read-*") for entry in read(path) if entry[:2] == (run, FINISHED)]
    return len(ends) == LEARNERS


async def leftover(url: str) -> list[bytes]:
    """Keys that nobody needs any more, when all is deleted and one lease has passed."""
    async with aionpredis.connect(url) as client:
        await make_replay(client).delete()
        for _ in range(int(10 * (LEASE + 2))):
            found = [await client.call("KEYS", "*", repeatable=True, key=shard) for shard in client.topology.each()]
            keys = [key for part in found for key in part if not key.startswith(b"mixed:")]
            if not keys:
                break
            await anyio.sleep(0.1)
        return keys
