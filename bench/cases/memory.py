"""Memory: how much a client needs beyond the array itself. CPU: whether appending costs more when much is stored."""

from __future__ import annotations

import contextlib
import resource
import time

import numpy as np

import aionpredis
from bench import frames
from bench.cases.replay import append_all, make_replay
from bench.harness import Case, Contender, Ratio, Sample

HUGE = 500_000_000
STORED = 5_000_000_000
SHARE = 4096  # transitions for one figure: ~50 MB


class Extra(Contender):
    """``ru_maxrss`` is a high-water mark, so a process can measure one transfer only: its first."""

    kind = "ours"
    figure: float | None = None

    async def open(self) -> None:
        self.stack = contextlib.AsyncExitStack()
        self.client = await self.stack.enter_async_context(aionpredis.connect(self.work.url))
        self.array = np.full(self.work.size(HUGE), 7, np.uint8)
        self.key = f"memory:{self.name}"

    def high_water(self) -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    async def transfer(self) -> None:
        raise NotImplementedError

    async def run(self) -> Sample:
        if self.figure is None:
            await self.client.set("memory:warm-up", self.array[:1000])
            before = self.high_water()
            await self.transfer()
            self.figure = (self.high_water() - before) / self.array.nbytes
        else:
            await self.transfer()
        return Sample(1, self.array.nbytes, {"extra": self.figure})

    async def check(self) -> None: ...

    async def close(self) -> None:
        await self.client.delete(self.key)
        await self.stack.aclose()


class WriteExtra(Extra):
    name = "set, 500 MB"

    async def transfer(self) -> None:
        await self.client.set(self.key, self.array)


class ReadExtra(Extra):
    name = "get(out=), 500 MB"

    async def open(self) -> None:
        await super().open()
        await self.client.set(self.key, self.array)
        self.array[:] = 0

    async def transfer(self) -> None:
        await self.client.get(self.key, out=self.array)

    async def check(self) -> None:
        assert (self.array == 7).all()


class ReadFresh(ReadExtra):
    """The array that ``get`` makes is the payload; so one array's worth is subtracted."""

    name = "get(), 500 MB"

    async def transfer(self) -> None:
        nbytes = self.array.nbytes
        del self.array
        self.array = np.empty(0, np.uint8)
        loaded = await self.client.get(self.key)
        assert loaded is not None
        assert loaded.nbytes == nbytes
        self.array = loaded


class Growth(Contender):
    """An actor's CPU time per transition with 50 MB stored in the run, and with 5 GB."""

    name = "append, 50 MB … 5 GB stored"
    kind = "growth"
    own_core = True

    async def open(self) -> None:
        self.stack = contextlib.AsyncExitStack()
        self.client = await self.stack.enter_async_context(aionpredis.connect(self.work.url))
        self.replay = make_replay(self.client, "growth")

    async def run(self) -> Sample:
        await self.replay.begin_run()
        async with self.replay.actor() as actor:
            await actor.join()

            async def cpu(count: int) -> float:
                before = time.process_time()
                await append_all(actor, count)
                return (time.process_time() - before) / count

            await cpu(SHARE // 4)  # warm up
            first = await cpu(SHARE)
            await cpu(self.work.size(STORED) // frames.NBYTES)
            last = await cpu(SHARE)
        total = SHARE * 2 + self.work.size(STORED) // frames.NBYTES
        return Sample(total, total * frames.NBYTES, {"growth": last / first})

    async def close(self) -> None:
        await self.replay.begin_run()
        await self.stack.aclose()


CASE = Case(
    "memory",
    "Peak memory beyond the array, and growth",
    (WriteExtra, ReadExtra, ReadFresh, Growth),
    (
        Ratio("write_extra_memory", WriteExtra.name, "", "<= 0.01", "extra"),
        Ratio("read_extra_memory", ReadExtra.name, "", "<= 0.01", "extra"),
        Ratio("append_cpu_growth", Growth.name, "", "<= 1.15", "growth"),
    ),
    metrics=("bytes", "cpu", "extra", "growth"),
)
