"""Calls that are cancelled at every await, many at once on one connection, and what must hold nevertheless.

``python -m tests.cancelling [cancellations]``: so many (default 20,000) on three loops, with figures.
"""

from __future__ import annotations

import ast
import asyncio
import itertools
import logging
import os
import random
import sys
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from traceback import walk_tb
from typing import Any, TypeVar

import anyio
import anyio.lowlevel
import numpy as np
import redis
from numpy.typing import NDArray

import aionpredis
from aionpredis import Actor, Batches, Client, Loader, Sampler
from aionpredis.errors import ConnectError, ConnectionLost, OutcomeUnknown, WriteFailed
from aionpredis.lane import Lane
from aionpredis.policy import PolicyWatch
from aionpredis.replay.commit import Committer
from aionpredis.server import Server

from .proxy import Faults, Proxy, Seeded
from .replays import fill, replay_of, unnamed_without_ttl
from .servers import until

PACKAGE = Path(aionpredis.__file__).parent
Array = NDArray[np.int64]
T = TypeVar("T")
Await = tuple[str, int]
"""File and line of an await in the package."""

POISON = -1
"""What an array is filled with when a call has let go of it. It never belongs on the server or to a reader."""

STEP = 1 << 32
"""Values are ``key * STEP + generation``, so each item says whose it is."""

ANYIO = tuple(map(int, version("anyio").split(".")[:2]))
SWALLOWS_NONE = 4, 16
"""Before, a ``task.cancel()`` in the very turn in which a scope ends by its own deadline was lost (anyio's issue 1214)."""

WORKERS = 5
KEYS = 6
"""Of each worker, who alone writes to them."""

SIZES = (1, 40, 1600, 1600, 50_000, 200_000)
"""Items of int64. The last: too long for a copy of its rest when a SET of it is cancelled half-sent."""
SMALL_SIZES = (1, 3, 8, 8, 8, 30)
"""For connections that pass on some bytes at a time."""


# --- cancelling one call -----------------------------------------------------------------------------------------------


@dataclass
class Figures:
    """``calls``: made; ``cancelled``: of them, before they had a result; ``failed``: by a broken connection. ``at``: how
    often at each await of the package; ``paths``: at each series of awaits, the outermost first. ``checked``: values whose
    items said whose they are.
    """

    calls: int = 0
    cancelled: int = 0
    failed: int = 0
    checked: int = 0
    at: Counter[Await] = field(default_factory=Counter)
    paths: Counter[tuple[Await, ...]] = field(default_factory=Counter)

    def note(self, error: BaseException) -> None:
        """Where this cancellation came through."""
        path = tuple(
            (Path(name).relative_to(PACKAGE).as_posix(), line)
            for name, line in ((frame.f_code.co_filename, line) for frame, line in walk_tb(error.__traceback__))
            if name.startswith(f"{PACKAGE}{os.sep}")
        )
        self.paths[path] += 1
        self.at.update(set(path))
        # trio: a task group raises another one, for the one that it got.
        for cause in (error.__cause__, *(error.exceptions if isinstance(error, BaseExceptionGroup) else ())):
            if isinstance(cause, anyio.get_cancelled_exc_class() | BaseExceptionGroup):
                self.note(cause)


class Stepped:
    """Awaits a call; when it suspends for the ``step``-th time (0: the first), ``cancel`` is called.

    ``wanted``: set when somebody has asked for a cancellation. A call that takes it and has a result all the same has
    swallowed it.
    """

    def __init__(
        self,
        call: Awaitable[Any],
        figures: Figures,
        step: int | None = None,
        cancel: Callable[[], object] | None = None,
    ) -> None:
        self._call = call
        self._figures = figures
        self.step = step
        self.cancel = cancel
        self.wanted: Callable[[], bool] = bool
        self.suspended = 0
        self.cancelled = False

    def __await__(self) -> Generator[Any, Any, Any]:
        steps = self._call.__await__()
        kind = anyio.get_cancelled_exc_class()
        resume: Callable[[], Any] = lambda: next(steps)  # noqa: E731
        cancellation: BaseException | None = None
        where: list[str] = []
        while True:
            try:
                asked = resume()
            except StopIteration as stop:
                # trio's comes again at the next checkpoint; if there is none, the call has made its way just in time.
                assert cancellation is None or kind is not asyncio.CancelledError, (
                    f"swallowed a cancellation at {where}"
                )
                return stop.value
            except BaseException as error:
                if isinstance(error, kind) and self.wanted():
                    self._figures.note(error)
                    self.cancelled = True
                raise
            if self.suspended == self.step and self.cancel is not None:
                self.cancel()
            self.suspended += 1
            try:
                value = yield asked
            except BaseException as error:
                arrived: object = error
                resume = lambda error=error: steps.throw(error)  # type: ignore[misc] # noqa: E731
            else:
                arrived = getattr(value, "error", None)  # so trio does it
                resume = lambda value=value: steps.send(value)  # type: ignore[misc] # noqa: E731
            if isinstance(arrived, kind) and self.wanted():
                cancellation = arrived
                where = [*suspended_at(self._call)]


def suspended_at(call: Any) -> Iterator[str]:
    """Where a coroutine is suspended, and those that it awaits."""
    while call is not None:
        frame = getattr(call, "cr_frame", None)
        if frame is not None:
            yield f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
        call = getattr(call, "cr_await", None)


async def stepped(call: Callable[[], Awaitable[Any]], figures: Figures, step: int) -> bool:
    """Cancel a call when it suspends for the ``step``-th time; whether it came to that."""
    with anyio.CancelScope() as scope:
        one = Stepped(call(), figures, step, scope.cancel)
        one.wanted = lambda: scope.cancel_called
        figures.calls += 1
        await one
    figures.cancelled += one.cancelled
    return scope.cancel_called


async def at_random(call: Callable[[], Awaitable[Any]], figures: Figures, rng: random.Random) -> None:
    """Cancel a call at any time, in any of the ways that there are."""
    ways = [by_step, by_deadline, by_time_out, by_task_group]
    if anyio.get_cancelled_exc_class() is asyncio.CancelledError and ANYIO >= SWALLOWS_NONE:
        ways.append(by_task)
    one = Stepped(call(), figures)
    figures.calls += 1
    await rng.choice(ways)(one, rng)
    figures.cancelled += one.cancelled


def soon(rng: random.Random) -> float:
    return rng.choice((0.0, 10 ** rng.uniform(-5, -1.7)))


async def by_step(one: Stepped, rng: random.Random) -> None:
    with anyio.CancelScope() as scope:
        one.wanted = lambda: scope.cancel_called
        one.step, one.cancel = int(2 ** rng.uniform(0, 6)) - 1, scope.cancel
        await one


async def by_deadline(one: Stepped, rng: random.Random) -> None:
    with anyio.move_on_after(soon(rng)) as scope:
        one.wanted = lambda: scope.cancel_called
        await one


async def by_time_out(one: Stepped, rng: random.Random) -> None:
    try:
        with anyio.fail_after(soon(rng)) as scope:
            one.wanted = lambda: scope.cancel_called
            await one
    except TimeoutError:
        assert one.cancelled


async def by_task_group(one: Stepped, rng: random.Random) -> None:
    async def run() -> None:
        await one

    async with anyio.create_task_group() as tasks:
        one.wanted = lambda: tasks.cancel_scope.cancel_called
        tasks.start_soon(run)
        for _ in range(int(2 ** rng.uniform(0, 7)) - 1):
            await anyio.lowlevel.checkpoint()
        tasks.cancel_scope.cancel()


async def by_task(one: Stepped, rng: random.Random) -> None:
    """As a program does that knows asyncio alone. Such a cancellation comes once."""

    async def run() -> None:
        await one

    task = asyncio.create_task(run())
    wanted = False
    one.wanted = lambda: wanted
    await asyncio.wait([task], timeout=soon(rng))
    wanted = not task.done()
    task.cancel()
    await asyncio.wait([task])
    if not task.cancelled():
        task.result()


# --- many calls ----------------------------------------------------------------------------------------------------------


class World:
    """Workers that share a client, and a run of a replay. Everything says whose it is: see :data:`STEP`."""

    def __init__(
        self,
        client: Client,
        url: str,
        sizes: tuple[int, ...],
        figures: Figures,
        folder: Path,
        seed: int,
        *,
        lossy: bool,
    ) -> None:
        self.folder = folder
        self.lossy = lossy  # connections break: calls may fail
        self.client = client
        self.url = url
        self.sizes = sizes
        self.figures = figures
        self.attempted = [0] * (WORKERS * KEYS)  # the newest generation that was written
        self.stored = [0] * (WORKERS * KEYS)  # and that was acknowledged
        self.counted = 0
        self.uids = itertools.count()
        self.kept: set[int] = set()  # uids that were acknowledged
        self.replay = replay_of(client, lease=60)
        self.run = 0
        self.workers = [Worker(self, index, random.Random(f"{seed} {index}")) for index in range(WORKERS)]

    async def prepare(self, other: Client) -> None:
        for key in range(len(self.stored)):
            await other.set(f"k{key}", self.value(key))
        await other.set_record("record", {"a": self.value(0), "b": self.value(0)})
        await self.replay.policy.publish({"a": np.zeros(9, np.int64), "b": np.zeros(1, np.int64)})
        self.run = (await self.replay.begin_run()).run

    def value(self, key: int) -> Array:
        return np.full(self.sizes[key % KEYS], key * STEP + self.attempted[key], np.int64)

    def check(self, array: object, key: int, least: int) -> None:
        """A value that was read: this key's, all of one generation, not older than what was acknowledged before."""
        self.figures.checked += 1
        assert isinstance(array, np.ndarray), f"k{key} is gone"
        assert array.shape == (self.sizes[key % KEYS],)
        whose, generation = divmod(int(array[0]), STEP)
        assert whose == key, f"got the value of {whose} for that of {key}"
        assert (array == array[0]).all(), "parts of another reply"
        assert least <= generation <= self.attempted[key], f"{least} <= {generation} <= {self.attempted[key]}"

    def check_rows(self, batch: Any) -> list[int]:
        uids: list[int] = batch["uid"].tolist()
        self.figures.checked += len(uids)
        assert (batch["state"] == (batch["uid"] % 256)[:, None]).all()
        assert (batch["terminated"] == (batch["uid"] % 10 == 9)).all()
        return uids

    async def finish(self, other: Client) -> None:
        """Look at everything again, by a client of which nothing was cancelled."""
        for key, least in enumerate(self.stored):
            self.check(await other.get(f"k{key}"), key, least)
        for worker in self.workers:
            worker.check_released()
        replay = replay_of(other, lease=60)
        await replay.begin_run(keep=2)
        committed: list[int] = []
        async for batch in await replay.epoch(self.run):
            committed += self.check_rows(batch)
        assert len(set(committed)) == len(committed)
        assert self.kept <= set(committed)
        for worker in self.workers:
            async for batch in worker.follower:
                worker.followed += self.check_rows(batch)
            assert sorted(worker.followed) == sorted(committed), "follow() lost or doubled something"
        consumed = {uid for worker in self.workers for uid in (*worker.consumed, *worker.taken)}
        async for batch in (rest := await replay.consume(self.run, group="g", reclaim=0.05)):
            consumed |= set(self.check_rows(batch))
            await rest.acknowledge()
        assert consumed == set(committed), "consume() lost something"


CALLS = [
    *("get", "get_into", "mget", "mget_into", "mget_with_gaps", "set", "mset", "compressed", "record", "delete"),
    *("execute", "write", "append", "act", "follow", "epoch", "sample", "consume", "publish", "latest", "watch"),
    *("train", "open"),
]


class Worker:
    """One task's calls, by name in :data:`CALLS`, each with a look at what it got."""

    follower: Batches
    group: Batches
    sampler: Sampler
    actor: Actor
    watcher: PolicyWatch

    def __init__(self, world: World, index: int, rng: random.Random) -> None:
        self.world = world
        self.client = world.client
        self.mine = range(index * KEYS, (index + 1) * KEYS)
        self.rng = rng
        self.released: deque[Array] = deque()
        self.followed: list[int] = []
        self.consumed: list[int] = []
        self.taken: list[int] = []  # of the group, and not acknowledged
        self.version = 0
        self.calls: dict[str, Callable[[], Awaitable[Any]]] = {name: getattr(self, name) for name in CALLS}

    @asynccontextmanager
    async def ready(self) -> AsyncIterator[None]:
        """The readers and the actor that outlive a call."""
        world = self.world
        self.follower = await world.replay.follow(world.run, batch=7)
        self.group = await world.replay.consume(world.run, group="g", batch=7, reclaim=0.5)
        self.sampler = await world.replay.sampler(world.run, batch=5)
        self.watcher = world.replay.policy.watch()
        async with world.replay.actor() as self.actor:
            await self.actor.join()
            uid = next(world.uids)
            await fill(self.actor, range(uid, uid + 1))
            await self.actor.flush()
            yield
            if self.actor.run is not None:
                await self.call("act")()  # tells of a broken connection, if need be

    def call(self, name: str) -> Callable[[], Awaitable[None]]:
        """One of :attr:`calls`, which may fail if connections break."""

        async def call() -> None:
            try:
                await self.calls[name]()
            except (ConnectError, ConnectionLost, WriteFailed):
                if not self.world.lossy:
                    raise
                self.world.figures.failed += 1

        return call

    async def work(self, rounds: int) -> None:
        """Random calls, cancelled at random."""
        for _ in range(rounds):
            with anyio.fail_after(60):
                await at_random(self.call(self.rng.choice(list(self.calls))), self.world.figures, self.rng)

    async def step_through(self) -> None:
        """Each call, cancelled at its first await, at its second, and so on until it comes to its end twice."""
        for name in self.calls:
            ends = 0
            for step in itertools.count():
                with anyio.fail_after(60):
                    ends += not await stepped(self.call(name), self.world.figures, step)
                if ends == 2:
                    break

    async def go_on(self) -> None:
        """Random calls, not cancelled by anybody, until the task is."""
        while True:
            with anyio.fail_after(60):
                await self.call(self.rng.choice(list(self.calls)))()

    # memory

    def array(self, *shape: int) -> Array:
        """Memory for a call, often that of a call that was cancelled."""
        for index, array in enumerate(self.released):
            if array.shape == shape and self.rng.random() < 0.5:
                self._check_one(array)
                del self.released[index]
                return array
        return np.zeros(shape, np.int64)

    @contextmanager
    def lent(self, *arrays: Array) -> Iterator[None]:
        """To a call. When it is over, whatever was its end, nobody may read or write these arrays any more."""
        try:
            yield
        finally:
            for array in arrays:
                array[...] = POISON
                self.released.append(array)
            while len(self.released) > 40:
                self._check_one(self.released.popleft())

    def _check_one(self, array: Array) -> None:
        assert (array == POISON).all(), "written after the call was over"

    def check_released(self) -> None:
        for array in self.released:
            self._check_one(array)

    def new(self, key: int) -> Array:
        """The next generation of a key."""
        self.world.attempted[key] += 1
        array = self.array(self.world.sizes[key % KEYS])
        array[...] = self.world.value(key)
        return array

    def some(self, least: int, most: int) -> list[int]:
        return self.rng.choices(range(len(self.world.stored)), k=self.rng.randint(least, most))

    def alike(self, most: int) -> list[int]:
        """Keys whose values are of one size."""
        return [key - key % KEYS + self.rng.choice((2, 3)) for key in self.some(1, most)]

    # arrays

    async def get(self) -> None:
        (key,) = self.some(1, 1)
        least = self.world.stored[key]
        self.world.check(await self.client.get(f"k{key}"), key, least)

    async def get_into(self) -> None:
        (key,) = self.some(1, 1)
        least = self.world.stored[key]
        out = self.array(self.world.sizes[key % KEYS])
        with self.lent(out):
            self.world.check(await self.client.get(f"k{key}", out=out), key, least)

    async def mget(self) -> None:
        keys = self.some(1, 9)
        least = [self.world.stored[key] for key in keys]
        for key, array, bound in zip(keys, await self.client.mget([f"k{key}" for key in keys]), least, strict=True):
            self.world.check(array, key, bound)

    async def mget_into(self) -> None:
        keys = self.alike(40)
        least = [self.world.stored[key] for key in keys]
        out = self.array(len(keys), self.world.sizes[2])
        with self.lent(out):
            assert (await self.client.mget([f"k{key}" for key in keys], out=out)).all()
            for key, array, bound in zip(keys, out, least, strict=True):
                self.world.check(array, key, bound)

    async def mget_with_gaps(self) -> None:
        """Replies that are not as predicted."""
        keys = [key if self.rng.random() < 0.8 else -1 for key in self.alike(40)]
        out = self.array(len(keys), self.world.sizes[2])
        with self.lent(out):
            found = await self.client.mget([f"k{key}" for key in keys], out=out)
            for key, array, there in zip(keys, out, found, strict=True):
                assert there == (key >= 0)
                if there:
                    self.world.check(array, key, 0)
                else:
                    assert not array.any()

    async def set(self) -> None:
        key = self.rng.choice(self.mine)
        array = self.new(key)
        generation = self.world.attempted[key]
        with self.lent(array):
            await self.client.set(f"k{key}", array, codec=self.rng.choice((None, None, "lz4")))
        self.world.stored[key] = generation

    async def mset(self) -> None:
        keys = self.rng.sample(self.mine, 3)
        arrays = {f"k{key}": self.new(key) for key in keys}
        generations = [self.world.attempted[key] for key in keys]
        with self.lent(*arrays.values()):
            await self.client.mset(arrays)
        self._store(keys, generations)

    def _store(self, keys: list[int], generations: list[int]) -> None:
        for key, generation in zip(keys, generations, strict=True):
            self.world.stored[key] = max(self.world.stored[key], generation)

    async def compressed(self) -> None:
        """In worker threads, if it is large; and of a kind that no prediction fits."""
        size = self.world.sizes[-1]
        array, out = self.array(size), self.array(size)
        key = f"z{self.mine[0]}"
        with self.lent(array, out):
            array[...] = numbers = np.random.default_rng(seed := self.rng.randrange(STEP)).integers(0, STEP >> 12, size)
            array[0] = numbers[0] = seed
            await self.client.set(key, array, codec="lz4")
            for got in (await self.client.get(key), await self.client.get(key, out=out)):
                self.world.figures.checked += 1
                assert got is not None
                assert (got == numbers).all()
            array[...] = numbers
            await self.client.set_record(key, {"n": array}, codec="lz4")
            record = await self.client.get_record(key)
            assert record is not None
            assert (record["n"] == numbers).all()

    async def delete(self) -> None:
        mine = f"d{self.mine[0]}"
        await self.client.set(mine, np.zeros(3))
        assert await self.client.exists(mine, "none") == 1
        try:
            assert await self.client.delete(mine) == 1
        except OutcomeUnknown as error:
            self._check_large(error)

    async def write(self) -> None:
        keys, generations = [], []
        copy = self.rng.random() < 0.5
        borrowed = []
        bound = self.rng.choice((10_000, 1 << 20, 64 << 20))
        codec = self.rng.choice((None, None, "lz4"))
        try:
            async with self.client.writer(copy=copy, max_inflight=bound, codec=codec) as writer:
                await writer.put_record("record", {"a": self.world.value(0), "b": self.world.value(0)})
                for _ in range(self.rng.randint(1, 12)):
                    keys.append(key := self.rng.choice(self.mine))
                    array = self.new(key)
                    generations.append(self.world.attempted[key])
                    if copy:
                        with self.lent(array):
                            await writer.put(f"k{key}", array)
                    else:
                        borrowed.append(array)
                        await writer.put(f"k{key}", array)
                    if self.rng.random() < 0.1:
                        await writer.flush()
                        self._store(keys, generations)
        finally:
            with self.lent(*borrowed):
                pass
        self._store(keys, generations)

    async def record(self) -> None:
        columns = {name: self.array(self.world.sizes[2]) for name in "ab"}
        mark = self.rng.randrange(STEP)
        for array in columns.values():
            array[...] = mark
        with self.lent(*columns.values()):
            await self.client.set_record("record", columns)
        got = await self.client.get_record("record")
        assert got is not None
        self.world.figures.checked += 1
        assert (got["a"] == got["a"][0]).all()
        assert (got["b"] == got["a"][0]).all()

    async def execute(self) -> None:
        mark = f"{self.mine} {self.rng.random()}"
        self.world.figures.checked += 1
        assert await self.client.execute("ECHO", mark) == mark.encode()
        self.world.counted += 1
        try:
            assert int(await self.client.execute("INCR", "counter")) <= self.world.counted
        except OutcomeUnknown as error:
            self._check_large(error)

    def _check_large(self, error: OutcomeUnknown) -> None:
        """The 1.6 MB of somebody else's SET were half sent when it was cancelled."""
        if "large request" not in str(error):
            raise error

    # the replay

    async def append(self) -> None:
        """A whole life of an actor."""
        uids = [next(self.world.uids) for _ in range(self.rng.randint(1, 20))]
        async with self.world.replay.actor() as actor:
            await actor.join()
            for uid in uids:
                await fill(actor, range(uid, uid + 1))
            if self.rng.random() < 0.5:
                await actor.flush()
                self.world.kept |= set(uids)
        self.world.kept |= set(uids)

    async def act(self) -> None:
        """An actor goes on after calls that were cancelled."""
        if self.actor.run is None:
            await self.actor.join()
        uids = [next(self.world.uids) for _ in range(self.rng.randint(1, 20))]
        for uid in uids:
            await fill(self.actor, range(uid, uid + 1))
        await self.actor.flush()
        self.world.kept |= set(uids)

    async def _briefly(self, items: AsyncIterator[T]) -> T | None:
        """The next one, if it comes soon."""
        with anyio.move_on_after(0.01):
            return await anext(items)
        await anyio.lowlevel.checkpoint()  # trio: a cancellation from outside at the same moment is still to come
        return None

    async def follow(self) -> None:
        if batch := await self._briefly(self.follower):
            self.followed += self.world.check_rows(batch)

    async def epoch(self) -> None:
        least = set(self.world.kept)
        found: list[int] = []
        batches = await self.world.replay.epoch(self.world.run, batch=self.rng.choice((5, 64)))
        if self.rng.random() < 0.5:
            async for batch in batches:
                found += self.world.check_rows(batch)
        else:
            async with Loader(batches) as loaded:
                async for batch in loaded:
                    found += self.world.check_rows(batch)
        assert len(set(found)) == len(found)
        assert set(found) >= least

    async def sample(self) -> None:
        self.world.check_rows(await self.sampler.sample())

    async def consume(self) -> None:
        if self.taken:
            await self.group.acknowledge()
            self.consumed += self.taken
            self.taken = []
        if batch := await self._briefly(self.group):
            self.taken += self.world.check_rows(batch)

    # the policy

    def _check_policy(self, found: Any) -> None:
        self.world.figures.checked += 1
        assert (found.weights["a"] == found.weights["b"][0]).all()

    async def publish(self) -> None:
        mark = self.rng.randrange(STEP)
        a, b = self.array(9), self.array(1)
        a[...] = b[...] = mark
        with self.lent(a, b):
            await self.world.replay.policy.publish({"a": a, "b": b})

    async def latest(self) -> None:
        self._check_policy(await self.world.replay.policy.latest())

    async def watch(self) -> None:
        if found := await self._briefly(self.watcher):
            assert found.version > self.version, "a watcher saw a version again"
            self.version = found.version
            self._check_policy(found)

    # a trainer, and the client

    async def train(self) -> None:
        """A replay of this worker's own, from its first run to its end."""
        replay = replay_of(self.client, name=f"own{self.mine[0]}", lease=60)
        await replay.delete()  # what a call that was cancelled has left
        first = await replay.begin_run({"a": np.zeros(9), "b": np.zeros(1)})
        async with replay.vector_actor(2) as lanes:
            await lanes.join()
            for uid in range(6):
                rows = np.full(2, uid)
                await lanes.append(state=np.full((2, 3), uid, np.uint8), uid=rows, terminated=rows == 9)
            await lanes.flush()
        assert await replay.count(first) == 12
        found = await replay.policy.get(first.policy)
        assert found is not None
        self._check_policy(found)
        folder = self.world.folder / f"{self.mine[0]} {next(self.world.uids)}"
        try:
            assert await replay.save(folder) == 12
        except BaseException:
            assert not folder.exists()
            raise
        second = await replay.restore(folder, keep=2)
        assert await replay.count(second) == 12
        await replay.drop(first)
        await replay.delete()

    async def open(self) -> None:
        async with aionpredis.connect(self.world.url) as client:
            key = self.mine[0]
            least = self.world.stored[key]
            self.world.check(await client.get(f"k{key}"), key, least)


# --- the package's awaits --------------------------------------------------------------------------------------------------


@contextmanager
def background_noted(figures: Figures) -> Iterator[None]:
    """Count where the package's own tasks are cancelled, too."""

    def noted(work: Callable[..., Awaitable[None]]) -> Callable[..., Awaitable[None]]:
        async def task(*arguments: Any) -> None:
            one = Stepped(work(*arguments), figures)
            one.wanted = lambda: True
            await one

        return task

    originals: dict[tuple[type, str], Callable[..., Awaitable[None]]] = {
        (Lane, "pump"): Lane.pump,
        (Committer, "_drive"): Committer._drive,
    }
    for (owner, name), work in originals.items():
        setattr(owner, name, noted(work))
    try:
        yield
    finally:
        for (owner, name), work in originals.items():
            setattr(owner, name, work)


def awaits(module: str) -> Iterator[tuple[int, int]]:
    """First and last line of each ``await``, ``async for`` and ``async with`` in a file of the package."""
    for node in ast.walk(ast.parse((PACKAGE / module).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Await):
            yield node.lineno, node.end_lineno or node.lineno
        elif isinstance(node, ast.AsyncFor):
            yield node.lineno, node.iter.end_lineno or node.lineno
        elif isinstance(node, ast.AsyncWith):
            yield node.lineno, node.items[-1].context_expr.end_lineno or node.lineno


def never_cancelled(figures: Figures, modules: Iterable[str]) -> list[str]:
    """The awaits of these files at which no call was cancelled, as ``file:line: text``."""
    missed = []
    for module in modules:
        lines = (PACKAGE / module).read_text(encoding="utf-8").splitlines()
        for first, last in sorted(awaits(module)):
            if not any(figures.at[module, line] for line in range(first, last + 1)):
                missed.append(f"{module}:{first}: {lines[first - 1].strip()}")
    return missed


# --- all together --------------------------------------------------------------------------------------------------------


def open_things(stock: redis.Redis) -> tuple[int, int]:
    """Connections that the server has, and file descriptors that this process has."""
    files = Path("/proc/self/fd")
    return len(stock.client_list()), sum(1 for _ in files.iterdir()) if files.exists() else 0


async def trouble(
    url: str,
    stock: redis.Redis,
    figures: Figures,
    seed: int,
    *,
    rounds: int = 0,
    proxy: Proxy | None = None,
    lossy: bool = False,
) -> None:
    """Workers whose calls are cancelled, ``rounds`` times each, or (0) one whose calls are stepped through; beside them
    one whose calls are not. All by one client, through ``proxy`` if there is one. ``lossy``: its connections break all the
    time. Then everything is looked at.
    """
    before = open_things(stock)
    stock.flushall()
    try:
        async with aionpredis.connect(url) as other:
            way, sizes = (url, SIZES) if proxy is None else (proxy.url, SMALL_SIZES)
            async with (
                aionpredis.connect(way, timeout=3) as client,
                AsyncExitStack() as stack,
            ):
                folder = stack.enter_context(TemporaryDirectory())
                world = World(client, way, sizes, figures, Path(folder), seed, lossy=lossy)
                await world.prepare(other)
                for worker in world.workers:
                    await stack.enter_async_context(worker.ready())
                honest, *others = world.workers
                async with anyio.create_task_group() as tasks:
                    if lossy:
                        assert proxy is not None
                        tasks.start_soon(vandalize, proxy, figures, seed)
                    tasks.start_soon(honest.go_on)
                    async with anyio.create_task_group() as cancelled:
                        for worker in others if rounds else others[:1]:
                            if rounds:
                                cancelled.start_soon(worker.work, rounds)
                            else:
                                cancelled.start_soon(worker.step_through)
                    tasks.cancel_scope.cancel()
                assert all((place / "replay.json").exists() for place in world.folder.iterdir()), "half of a checkpoint"
                await stack.aclose()
                with anyio.fail_after(60):
                    await world.finish(other)
                assert len(client.topology.shard(b"")._spare) <= 3 * WORKERS
        assert unnamed_without_ttl(stock) == set()
        until(lambda: open_things(stock) <= before, f"{before} connections and files are open, and no more")
    except BaseException as error:
        error.add_note(f"seed {seed}")
        raise


async def vandalize(proxy: Proxy, figures: Figures, seed: int) -> None:
    """Cut connections as often as calls come to something in between, however slow the machine is; or it would be for ever."""
    rng = random.Random(seed)
    proxy.script = Seeded(seed)
    try:
        while True:
            checked = figures.checked
            await anyio.sleep(rng.uniform(0.01, 0.05))
            with anyio.move_on_after(1):
                while figures.checked == checked:
                    await anyio.sleep(0.01)
            proxy.cut()
    finally:
        proxy.script = iter(())
        proxy.cut()


LOOPS: dict[str, dict[str, Any]] = {
    "asyncio": {"backend": "asyncio", "backend_options": {"use_uvloop": False}},
    "uvloop": {"backend": "asyncio", "backend_options": {"use_uvloop": True}},
    "trio": {"backend": "trio"},
}

WAYS: dict[str, dict[str, Any]] = {
    "step by step": {},
    "at random": {"rounds": 50},
    "between the bytes": {"rounds": 20, "faults": Faults(chunk=40, pause=0.0001)},
    "late": {"rounds": 20, "faults": Faults(delay=0.002)},
    "between faults": {"rounds": 30, "faults": Faults(), "lossy": True},
}
"""How calls are cancelled, and what their connections are like."""


async def go(way: str, url: str, stock: redis.Redis, folder: Path, figures: Figures, seed: int) -> None:
    """:func:`trouble` of this kind."""
    options = dict(WAYS[way])
    if (faults := options.pop("faults", None)) is None:
        await trouble(url, stock, figures, seed, **options)
    else:
        with Proxy(url, folder, itertools.repeat(faults)) as proxy:
            await trouble(url, stock, figures, seed, proxy=proxy, **options)


def main(cancellations: int) -> None:
    everything = Figures()
    logging.getLogger("aionpredis").setLevel(logging.ERROR)  # connections break all the time
    with Server() as server, redis.Redis.from_url(server.url) as stock, TemporaryDirectory() as folder:
        for loop, options in LOOPS.items():
            figures = Figures()
            started = time.monotonic()
            with background_noted(figures):
                for seed, way in enumerate(itertools.cycle(WAYS)):
                    if figures.cancelled >= cancellations / len(LOOPS):
                        break
                    anyio.run(go, way, server.url, stock, Path(folder), figures, seed, **options)
            print(
                f"{loop}: {figures.calls:,} calls, {figures.cancelled:,} cancelled at {len(figures.at)} awaits on "
                f"{len(figures.paths)} ways to them, {figures.failed:,} failed by faults; {figures.checked:,} values "
                f"checked, 0 wrong; 0 connections or files leaked; {time.monotonic() - started:.0f} s",
                flush=True,
            )
            everything.at.update(figures.at)
    files = [path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py")]
    files = [name for name in files if not name.startswith(("demo/", "cli"))]
    missed = never_cancelled(everything, sorted(files))
    count = sum(len(list(awaits(name))) for name in files)
    print(f"Of {count} awaits calls were cancelled at {count - len(missed)}; not at these:", *missed, sep="\n")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 20_000)
