"""Eight simulators and two learners: nothing lost, nothing twice, and no process that grows."""

from __future__ import annotations

import multiprocessing
import os
import statistics
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import anyio
import numpy as np
from rich.console import Console
from rich.table import Table

import aionpredis
from aionpredis import RunEnded
from bench import frames
from bench.servers import target

SIMULATORS = 8
LEARNERS = 2
BATCH = 256


def make_replay(client: aionpredis.Client) -> aionpredis.Replay:
    schema = aionpredis.Schema(state=(frames.DTYPE, frames.SHAPE), uid="int64", terminated="bool")
    return client.replay("fleet", schema, chunk=16, capacity=20_000, max_lag=4_000)


async def simulate(url: str, index: int, pipe: Connection) -> None:
    """Append until the run ends; tell how many were acknowledged."""
    known = frames.frames()
    async with aionpredis.connect(url) as client, make_replay(client).actor() as actor:
        await actor.join()
        uid = index << 32
        try:
            while not pipe.poll():
                for _ in range(1000):
                    await actor.append(state=known[uid % 4], uid=uid, terminated=uid % 100 == 99)
                    uid += 1
            await actor.flush()
        except RunEnded:
            pass
        pipe.send((actor.stats.appended, actor.stats.acknowledged))


async def learn(url: str, index: int, pipe: Connection) -> None:
    """Follow the run to its end; tell how many transitions came, and how many of them twice."""
    known = frames.frames()
    seen = np.zeros((SIMULATORS, 1 << 24), np.bool_)  # only the pages that are written to take memory
    transitions = duplicates = 0
    async with aionpredis.connect(url) as client:
        batches = await make_replay(client).follow(batch=BATCH, shard=(index, LEARNERS))
        async for batch in batches:
            uids = batch["uid"]
            places = uids >> 32, uids & 0xFFFFFFFF
            duplicates += len(uids) - len(np.unique(uids)) + int(seen[places].sum())
            seen[places] = True
            transitions += len(uids)
            assert np.array_equal(batch["state"][0], known[int(uids[0]) % 4])
        pipe.send((transitions, duplicates, batches.stats.evicted + batches.stats.missing))


def _process(work: Any, url: str, index: int, pipe: Connection) -> None:
    aionpredis.run(work, url, index, pipe)


def _rss(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def fleet(console: Console, *, seconds: float) -> dict[str, float]:
    """Run it; the figures. ``memory_growth``: the last third against the one before, of the process that grew most."""
    context = multiprocessing.get_context("spawn")
    with target() as place:
        run = anyio.run(_begin, place.url)
        pipes: list[Connection] = []
        processes = []
        for work, count in ((learn, LEARNERS), (simulate, SIMULATORS)):
            for index in range(count):
                mine, theirs = context.Pipe()
                process = context.Process(target=_process, args=(work, place.url, index, theirs))
                process.start()
                pipes.append(mine)
                processes.append(process)
        start = time.monotonic()
        memory: list[list[int]] = []
        while time.monotonic() - start < seconds:
            time.sleep(1)
            memory.append([_rss(process.pid) for process in processes if process.pid])
        for pipe in pipes[LEARNERS:]:
            pipe.send(None)
        sent = [pipe.recv() for pipe in pipes[LEARNERS:]]
        elapsed = time.monotonic() - start
        anyio.run(_begin, place.url)  # ends the run that is followed
        received = [pipe.recv() for pipe in pipes[:LEARNERS]]
        for process in processes:
            process.join(10)
        leftover = anyio.run(_leftover, place.url, run)
    third = len(memory) // 3 or 1
    figures = {
        "transitions_per_s": sum(acknowledged for _, acknowledged in sent) / elapsed,
        "acknowledged": sum(acknowledged for _, acknowledged in sent),
        "read": sum(transitions for transitions, *_ in received),
        "lost": sum(acknowledged for _, acknowledged in sent) - sum(transitions for transitions, *_ in received),
        "duplicates": sum(duplicates for _, duplicates, _ in received),
        "evicted_or_missing": sum(gone for *_, gone in received),
        "leftover_keys": leftover,
        "memory_growth": max(
            statistics.median(end) / statistics.median(middle)
            for middle, end in zip(
                zip(*(memory[third : 2 * third] or memory), strict=True),
                zip(*memory[-third:], strict=True),
                strict=True,
            )
        ),
    }
    table = Table(title=f"{SIMULATORS} simulators, {LEARNERS} learners, {elapsed:.0f} s", title_justify="left")
    table.add_column("")
    table.add_column("", justify="right")
    for name, value in figures.items():
        table.add_row(name, f"{value:,.3g}" if isinstance(value, float) else f"{value:,}")
    console.print(table)
    return figures


async def _begin(url: str) -> int:
    async with aionpredis.connect(url) as client:
        return (await make_replay(client).begin_run(keep=2)).run


async def _leftover(url: str, run: int) -> int:
    async with aionpredis.connect(url) as client:
        replay = make_replay(client)
        await replay.delete_runs_before(run + 1)
        return len(await replay.leftover_keys(run + 1))
