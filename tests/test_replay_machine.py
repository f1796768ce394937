"""Any interleaving of actors, trainers, readers and faults, against a model of what the replay promises.

A Hypothesis state machine on real servers. The event loop runs only inside of a step: what is on its way when a step ends
stays there until the next one. Meanwhile a thread looks at the server, so that "at every moment" is meant.

``AIONPREDIS_MACHINE=2000 pytest tests/test_replay_machine.py`` runs so many examples, other ones each time, and
minimises what fails; ``--hypothesis-seed=…`` repeats them. Without it some that are always the same.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import socket
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import anyio
import pytest
import redis
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

import aionpredis
from aionpredis import (
    Actor,
    Batches,
    Client,
    ConnectError,
    ConnectionLost,
    Replay,
    ReplayGone,
    RunConflict,
    RunEnded,
    Server,
)
from aionpredis.replay.log import unpack
from aionpredis.retry import BACKOFF

from .proxy import Proxy
from .replays import SCHEMA, fill, kill_connections, pause, replay_of, uids
from .servers import make_server

try:
    uvloop: ModuleType | None
    import uvloop
except ImportError:
    uvloop = None

pytestmark = [
    pytest.mark.filterwarnings("ignore:chunk"),
    pytest.mark.timeout(0 if "AIONPREDIS_MACHINE" in os.environ else 300),
]

T = TypeVar("T")

EXAMPLES = int(os.environ.get("AIONPREDIS_MACHINE", "0"))
SETTINGS = settings(
    max_examples=EXAMPLES or 20,
    stateful_step_count=40,
    deadline=None,
    database=None,
    derandomize=not EXAMPLES,
    print_blob=False,
    phases=[Phase.generate, Phase.shrink] if EXAMPLES else [Phase.generate],
    suppress_health_check=list(HealthCheck),
)

CHUNK = 3
CAPACITY = 8
"""Chunks, in the examples that evict."""
LIVENESS = 20
"""Seconds after which an operation that must end counts as hanging."""
TROUBLE = (ConnectionLost, ConnectError)
"""What any operation may raise when connections break again and again."""

LOOK = """
local keys = redis.call('KEYS', ARGV[1])
local left = {}
for i, key in ipairs(keys) do left[i] = redis.call('PTTL', key) end
return {redis.call('XRANGE', KEYS[1], '-', '+'), keys, left}
"""

ChunkKey = tuple[int, bytes, int]
"""Run, incarnation, seq."""


@dataclass
class Look:
    """The server at one moment."""

    begun: set[int] = field(default_factory=set)
    closed: bool = False
    rows: dict[ChunkKey, int] = field(default_factory=dict)
    numbers: dict[int, list[int]] = field(default_factory=lambda: defaultdict(list))  # by run
    ttl: dict[ChunkKey, int] = field(default_factory=dict)
    began: float = field(default_factory=time.monotonic)
    ended: float = 0.0

    @property
    def newest(self) -> int:
        return max(self.begun, default=0)

    @property
    def forgotten(self) -> set[ChunkKey]:
        """Data keys that would stay for ever with nobody knowing of them."""
        return {chunk for chunk, left in self.ttl.items() if left == -1 and chunk not in self.rows}

    def safe_rows(self, run: int, incarnation: bytes) -> int:
        """Transitions of an actor that are named in the log and whose data have no time to live."""
        return sum(
            rows for chunk, rows in self.rows.items() if chunk[:2] == (run, incarnation) and self.ttl.get(chunk) == -1
        )


def look(stock: redis.Redis, name: str) -> Look:
    seen = Look()
    found: Any = stock.eval(LOOK, 1, f"{{{name}}}:log", f"{name}:*")
    seen.ended = time.monotonic()
    entries, keys, left = found
    for entry_id, fields in entries:
        run, number = (int(part) for part in entry_id.split(b"-"))
        if fields[0] == b"c":
            chunk = unpack(fields[1], number)
            seen.rows[run, chunk.incarnation, chunk.seq] = chunk.rows
            seen.numbers[run].append(number)
        elif fields[0] == b"begin":
            seen.begun.add(run)
        else:
            seen.closed = True
    for key, milliseconds in zip(keys, left, strict=True):
        _, run, incarnation, seq = key.split(b":")
        seen.ttl[int(run), bytes.fromhex(incarnation.decode()), int(seq)] = milliseconds
    return seen


class Watch:
    """Looks at the server again and again, in a thread: "Every data key is either named in the log or has a TTL"."""

    def __init__(self, server: Server) -> None:
        self.name = ""
        self.forgotten: set[ChunkKey] = set()
        self.looks = 0
        self._server = server
        self._ended = threading.Event()
        self._looking = threading.Lock()
        self._thread = threading.Thread(target=self._work, daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join(10)

    @contextlib.contextmanager
    def away(self) -> Iterator[None]:
        """Meanwhile the server may be gone."""
        with self._looking:
            yield

    def _work(self) -> None:
        stock: redis.Redis | None = None
        url = ""
        while not self._ended.wait(0.0003):
            with self._looking:
                if not self.name:
                    continue
                if url != self._server.url:
                    url = self._server.url
                    if stock is not None:
                        stock.close()
                    stock = redis.Redis.from_url(url, socket_timeout=30)
                assert stock is not None
                with contextlib.suppress(redis.ConnectionError):
                    self.forgotten |= look(stock, self.name).forgotten
                    self.looks += 1
        if stock is not None:
            stock.close()


class World:
    """What all examples share: a server that survives being killed, a proxy, an event loop, and the thread that looks."""

    def __init__(self, kind: str, folder: Path, loop: asyncio.AbstractEventLoop) -> None:
        # The kernel keeps what was written to the file when only the process dies.
        config = {"appendonly": "yes", "appendfsync": "no", "dir": str(folder), "auto-aof-rewrite-percentage": "0"}
        self.server = make_server(kind, config=config)
        self.loop = loop
        self.examples = 0
        self.stock: redis.Redis
        self.proxy: Proxy
        self.watch: Watch
        self._folder = folder

    @contextlib.contextmanager
    def running(self) -> Iterator[World]:
        with self.server, Proxy(self.server.url, self._folder) as self.proxy, Watch(self.server) as self.watch:
            self._connect()
            yield self
            self.stock.close()

    def _connect(self) -> None:
        self.stock = redis.Redis.from_url(self.server.url, socket_timeout=30)

    def restart(self) -> None:
        """SIGKILL; then another process with the same data."""
        with self.watch.away():
            self.stock.close()
            self.server.stop()
            self.server.start()
            self.proxy.target = self.server.url.removeprefix("unix://")
            self.proxy.cut()
            self._connect()


class Simulator:
    """One start of an actor.

    By run: ``sent`` uids; ``safe``: those that a flush has acknowledged; ``acknowledged``: transitions, as counted by
    ``stats``. ``unsure``: sent since the last flush.
    """

    def __init__(self, client: Client, replay: Replay) -> None:
        self.client = client
        self.run = 0
        self.leaving = asyncio.Event()
        self.sent: dict[int, set[int]] = defaultdict(set)
        self.safe: dict[int, set[int]] = defaultdict(set)
        self.acknowledged: dict[int, int] = defaultdict(int)
        self.unsure: set[int] = set()
        self.actor: Actor = replay.actor("simulator")
        self.task = asyncio.get_running_loop().create_task(self._live())

    async def _live(self) -> None:
        async with self.actor:
            await self.leaving.wait()

    def observe(self) -> None:
        """appended == acknowledged + stale + pending."""
        stats = self.actor.stats
        assert stats.appended == stats.acknowledged + stats.stale + stats.pending
        assert stats.pending >= 0
        assert stats.appended == sum(len(uids) for uids in self.sent.values())
        assert stats.pending == 0 or self.run
        self.acknowledged[self.run] += stats.acknowledged - sum(self.acknowledged.values())

    def settled(self) -> None:
        """A flush has returned."""
        self.safe[self.run] |= self.unsure
        self.unsure.clear()
        assert self.actor.stats.pending == 0


@dataclass
class Reading:
    """An epoch or a follower that has not come to its end. ``owed``: what it must have read then."""

    reader: Batches
    follows: bool
    owed: set[int]
    got: list[int] = field(default_factory=list)
    before: frozenset[int] = frozenset()
    done: bool = False


def spread(least: float, most: float) -> st.SearchStrategy[float]:
    return st.integers(0, 20).map(lambda n: least + (most - least) * (n / 20) ** 2)


OPERATIONS = st.one_of(
    st.tuples(st.just("append"), st.integers(0, 3), st.integers(1, 20)),
    st.tuples(st.just("flush"), st.integers(0, 3), st.just(0)),
    st.tuples(st.just("join"), st.integers(0, 3), st.just(0)),
    st.tuples(st.just("begin"), st.just(0), st.integers(1, 3)),
    st.tuples(st.just("begin"), st.just(1), st.integers(1, 3)),
    st.tuples(st.just("epoch"), st.integers(0, 2), st.integers(1, 9)),
    st.tuples(st.just("sample"), st.just(0), st.integers(1, 9)),
    st.tuples(st.just("delete_before"), st.just(0), st.integers(0, 2)),
    st.tuples(st.just("drop"), st.integers(0, 2), st.just(0)),
)


class Machine(RuleBasedStateMachine):
    world: World

    def __init__(self) -> None:
        super().__init__()
        world = self.world
        self.loop = world.loop
        self.name = f"r{world.examples}"
        world.examples += 1
        world.stock.flushall()
        world.proxy.stalled = False
        world.proxy.cut_up = world.proxy.cut_down = None
        self.timers: list[threading.Timer] = []
        self.capacity: int | None = None
        self.lease = 0.3
        self.patience = 0.5
        self.next_uid = 0
        self.simulators: list[Simulator] = []  # that live
        self.buried: list[Simulator] = []
        self.readings: list[Reading] = []
        self.last_epoch: Reading | None = None
        self.runs: list[int] = []  # that were begun
        self.kept_from = 0
        self.dropped: set[int] = set()
        self.ended: list[int] = []  # runs of which somebody was told that they have ended
        self.old: dict[int, set[ChunkKey]] = {}  # what was committed to them
        self.half_deleted = False
        self.last_look = Look()
        self.begun_here: set[int] = set()
        self.clients: list[Client] = []
        self.run_async(self._open())
        world.watch.forgotten.clear()
        world.watch.name = self.name

    async def _open(self) -> None:
        for _ in range(5):
            client = aionpredis.connect(self.world.proxy.url, timeout=20)
            await client.__aenter__()
            self.clients.append(client)

    def run_async(self, coroutine: Coroutine[Any, Any, T]) -> T:
        async def in_time() -> T:
            async with asyncio.timeout(LIVENESS):
                return await coroutine

        return self.loop.run_until_complete(in_time())

    def replay(self, client: int) -> Replay:
        """Of 0–2: actors. 3: a trainer. 4: readers, and another trainer."""
        return self._replay_on(self.clients[client])

    def _replay_on(self, client: Client) -> Replay:
        capacity = None if self.capacity is None else self.capacity * CHUNK
        return client.replay(self.name, SCHEMA, chunk=CHUNK, lease=self.lease, capacity=capacity)

    # --- the model -----------------------------------------------------------------------------------------------------

    def is_kept(self, run: int) -> bool:
        return run >= self.kept_from and run not in self.dropped

    def sent(self, run: int) -> set[int]:
        return {uid for s in self.simulators + self.buried for uid in s.sent.get(run, ())}

    def safe(self, run: int) -> set[int]:
        return {uid for s in self.simulators + self.buried for uid in s.safe.get(run, ())}

    def look(self) -> Look:
        return look(self.world.stock, self.name)

    def newest(self, seen: Look | None = None) -> int:
        found = (seen or self.look()).newest
        if found and found not in self.runs:
            self.runs.append(found)
            self.runs.sort()
        return found

    def chosen_run(self, back: int) -> int | None:
        kept = [run for run in self.runs if self.is_kept(run)]
        return kept[-1 - back % len(kept)] if kept else None

    @invariant()
    def everything_holds(self) -> None:
        for simulator in self.simulators + self.buried:
            simulator.observe()
        seen = self.look()
        self.newest(seen)
        self._data_is_named_or_has_a_time_to_live(seen)
        self._acknowledged_is_there(seen)
        self._nobody_deletes_what_was_committed(seen)
        self._old_runs_get_nothing_more(seen)
        self._told_the_truth(seen)

    def _data_is_named_or_has_a_time_to_live(self, seen: Look) -> None:
        """Every data key is either named in the log or has a TTL."""
        assert seen.forgotten == set()
        assert self.world.watch.forgotten == set()

    def _acknowledged_is_there(self, seen: Look) -> None:
        """`lost` = acknowledged, not readable, its run still kept."""
        for run in self.runs:
            if self.capacity is not None:
                # Whoever commits entry N evicts everything ≤ N − C.
                numbers = seen.numbers.get(run, [])
                if self.is_kept(run) and numbers:
                    assert set(range(max(1, max(numbers) - self.capacity + 1), max(numbers) + 1)) <= set(numbers)
                continue
            for simulator in self.simulators + self.buried:
                count = simulator.acknowledged.get(run, 0)
                if count and self.is_kept(run):
                    assert seen.safe_rows(run, simulator.actor.incarnation) >= count

    def _nobody_deletes_what_was_committed(self, seen: Look) -> None:
        """Exactly once if neither eviction nor data loss of the server took it. (A lease that ran out may have.)"""
        before, self.last_look = self.last_look, seen
        passed = (seen.ended - before.began) * 1000 + 5
        if self.capacity is not None or passed > self.lease * 900:
            return
        for chunk in before.rows.keys() & seen.rows.keys():
            if self.is_kept(chunk[0]) and (before.ttl.get(chunk, 0) > passed or before.ttl.get(chunk) == -1):
                assert chunk in seen.ttl

    def _old_runs_get_nothing_more(self, seen: Look) -> None:
        """One atomic command fences all actors on all hosts."""
        for run in self.runs:
            if run < seen.newest or seen.closed:
                there = {chunk for chunk in seen.rows if chunk[0] == run}
                assert there <= self.old.setdefault(run, there)
        if seen.begun:  # "it would drop r-0"
            assert {run for run in self.runs if self.is_kept(run)} <= seen.begun

    def _told_the_truth(self, seen: Look) -> None:
        """RunEnded: a newer run has begun. ReplayGone: the log was deleted."""
        for run in self.ended:
            assert run < max(seen.newest, self.kept_from) or seen.closed
        self.ended.clear()

    # --- actors --------------------------------------------------------------------------------------------------------

    def pick(self, index: int) -> Simulator | None:
        return self.simulators[index % len(self.simulators)] if self.simulators else None

    async def _append(self, simulator: Simulator, count: int) -> None:
        for _ in range(count):
            if simulator.actor.run is None:
                return
            assert simulator.actor.run.run == simulator.run
            uid = self.next_uid
            self.next_uid += 1
            before = simulator.actor.stats.appended
            try:
                await fill(simulator.actor, range(uid, uid + 1))
            except (RunEnded, ReplayGone):
                self.ended.append(simulator.run)
            except TROUBLE:
                pass
            finally:  # "A cancelled append may have added its transition."
                if simulator.actor.stats.appended > before:
                    simulator.sent[simulator.run].add(uid)
                    simulator.unsure.add(uid)

    async def _flush(self, simulator: Simulator) -> None:
        if simulator.actor.run is None:
            return
        try:
            await simulator.actor.flush()
        except (RunEnded, ReplayGone):
            self.ended.append(simulator.run)
        except TROUBLE:
            pass
        else:
            simulator.settled()

    async def _join(self, simulator: Simulator) -> None:
        newest = self.newest()
        if newest <= simulator.run and simulator.actor.run is not None:
            return
        if newest < simulator.run or not newest or self.half_deleted:
            return
        try:
            with anyio.move_on_after(0.3 if newest == simulator.run else None):
                begin = await simulator.actor.join()
                simulator.observe()
                assert begin.run >= newest
                simulator.run = begin.run
                simulator.unsure.clear()
        except (RunEnded, ReplayGone):
            self.ended.append(simulator.run)
        except TROUBLE:
            pass

    @initialize(clients=st.lists(st.integers(0, 2), min_size=1, max_size=3))
    def a_run_and_its_actors(self, clients: list[int]) -> None:
        self.begin(1)
        for client in clients:
            self.start(client)

    @rule(client=st.integers(0, 2))
    def start(self, client: int) -> None:
        """Each actor start draws a random id."""
        if len(self.simulators) < 4:
            self.run_async(self._start(client))

    async def _start(self, client: int) -> None:
        simulator = Simulator(self.clients[client], self.replay(client))
        self.simulators.append(simulator)
        await asyncio.sleep(0)
        await self._join(simulator)

    @rule(index=st.integers(0, 3), count=st.integers(1, 20))
    def append(self, index: int, count: int) -> None:
        async def act(simulator: Simulator) -> None:
            if simulator.actor.run is None:
                await self._join(simulator)
            await self._append(simulator, count)

        if simulator := self.pick(index):
            self.run_async(act(simulator))

    @rule(index=st.integers(0, 3))
    def flush(self, index: int) -> None:
        if simulator := self.pick(index):
            self.run_async(self._flush(simulator))

    @rule(index=st.integers(0, 3))
    def join(self, index: int) -> None:
        if simulator := self.pick(index):
            self.run_async(self._join(simulator))

    @rule(index=st.integers(0, 3), counts=st.lists(st.integers(1, 5), max_size=6))
    def append_and_flush(self, index: int, counts: list[int]) -> None:
        async def act(simulator: Simulator) -> None:
            await self._join(simulator)
            for count in counts:
                await self._append(simulator, count)
                await self._flush(simulator)

        if simulator := self.pick(index):
            self.run_async(act(simulator))

    @rule(count=st.integers(1, 9), flush=st.booleans())
    def all_join_and_append(self, count: int, flush: bool) -> None:
        async def each(simulator: Simulator) -> None:
            await self._join(simulator)
            await self._append(simulator, count)
            if flush:
                await self._flush(simulator)

        async def all_of_them() -> None:
            await asyncio.gather(*map(each, self.simulators))

        self.run_async(all_of_them())

    @rule(index=st.integers(0, 3))
    def leave(self, index: int) -> None:
        """Leaving the block commits."""
        if simulator := self.pick(index):
            self.run_async(self._leave(simulator))
            if not self.simulators:
                self.start(index % 3)

    async def _leave(self, simulator: Simulator) -> None:
        self.simulators.remove(simulator)
        self.buried.append(simulator)
        joined = simulator.actor.run is not None
        simulator.leaving.set()
        try:
            await simulator.task
        except (RunEnded, ReplayGone):
            self.ended.append(simulator.run)
        except TROUBLE:
            pass
        else:
            if joined:
                simulator.settled()

    @rule(index=st.integers(0, 3), abort=st.booleans())
    def crash(self, index: int, abort: bool) -> None:
        """As good as SIGKILL: nothing is flushed; with ``abort``, not even what was handed to the connection is sent."""
        if simulator := self.pick(index):
            self.run_async(self._crash(simulator, abort))
            if len(self.simulators) < 2:
                self.start(index % 3)  # restarted under the same human name

    async def _crash(self, simulator: Simulator, abort: bool) -> None:
        self.simulators.remove(simulator)
        self.buried.append(simulator)
        connection = simulator.client.live_connection()
        if abort and connection is not None:
            connection.abort(ConnectionLost("crashed"))
        simulator.task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await simulator.task

    # --- trainers ------------------------------------------------------------------------------------------------------

    async def _begin(self, which: int, keep: int) -> int | None:
        """The run, if it is certain that this call has begun it."""
        try:
            run = await self.replay(3 + which).begin_run(keep=keep)
        except RunConflict:
            return None
        except ReplayGone:
            return None
        except BaseException as error:
            # Whether it has begun a run, and deleted others, is not known.
            self.kept_from = max(self.kept_from, self.newest() - keep + 1)
            if not isinstance(error, TROUBLE):
                raise
            return None
        self.kept_from = max(self.kept_from, run.run - keep + 1)
        assert run.run not in self.begun_here
        self.begun_here.add(run.run)
        if run.run not in self.runs:
            self.runs.append(run.run)
            self.runs.sort()
        return run.run

    @rule(keep=st.integers(1, 3))
    def begin(self, keep: int) -> None:
        """The explicit `r-0` is the compare-and-set: of two trainers one wins."""
        before = self.newest()
        if self.half_deleted:
            self.run_async(self._delete())
        run = self.run_async(self._begin(0, keep))
        if run is not None:
            assert run > before
            assert self.newest() == run

    @rule(keep=st.integers(1, 3), other=st.integers(1, 3))
    def two_trainers(self, keep: int, other: int) -> None:
        """Of two trainers one wins."""

        async def both() -> list[int | None]:
            return list(await asyncio.gather(self._begin(0, keep), self._begin(1, other)))

        begun = [run for run in self.run_async(both()) if run is not None]
        assert len(begun) == len(set(begun))

    @rule(keep=st.integers(1, 3), after=spread(0, 0.004))
    def begin_cancelled(self, keep: int, after: float) -> None:
        """Deleting is idempotent after a crash."""
        self.run_async(self._cancelled(self._begin(0, keep), after))

    async def _cancelled(self, work: Coroutine[Any, Any, object], after: float) -> None:
        with anyio.move_on_after(after):
            await work

    async def _delete(self) -> None:
        self.newest()
        self.kept_from = max([self.kept_from, *(run + 1 for run in self.runs)])
        self.half_deleted = True
        try:
            await self.replay(3).delete()
        except TROUBLE:
            return
        self.half_deleted = False
        assert not self.world.stock.exists(f"{{{self.name}}}:log")

    @rule(anew=st.booleans(), go=st.integers(0, 3))
    def delete(self, anew: bool, go: int) -> None:
        """Actors of an older, deleted replay of the same name are stale too."""
        if go or not self.runs:  # not so often
            return
        self.run_async(self._delete())
        if anew and not self.half_deleted:
            self.run_async(self._begin(0, 1))

    async def _delete_before(self, keep: int) -> None:
        run = self.chosen_run(keep)
        if run is not None:
            self.kept_from = max(self.kept_from, run)
            with contextlib.suppress(*TROUBLE):
                await self.replay(3).delete_runs_before(run)

    async def _drop(self, back: int) -> None:
        run = self.chosen_run(back)
        if run is not None and run < self.newest():
            self.dropped.add(run)
            with contextlib.suppress(*TROUBLE):
                await self.replay(3).drop(run)

    # --- readers -------------------------------------------------------------------------------------------------------

    async def _read(self, reading: Reading, seconds: float | None = None) -> None:
        """Read on. A cancelled step can be repeated and loses nothing."""
        with contextlib.suppress(*TROUBLE), anyio.move_on_after(math.inf if seconds is None else seconds):
            async for batch in reading.reader:
                assert (batch["state"] == (batch["uid"] % 256)[:, None]).all()
                assert (batch["terminated"] == (batch["uid"] % 10 == 9)).all()
                reading.got += batch["uid"].tolist()
            reading.done = True
        self._judge(reading)

    def _judge(self, reading: Reading) -> None:
        """Each committed chunk at most once per reader, and exactly once if neither eviction nor data loss took it."""
        run, got = reading.reader.run, set(reading.got)
        assert len(got) == len(reading.got)
        assert not got & reading.before
        assert got <= self.sent(run)  # nothing of an older run, nothing that nobody appended
        if reading.done and self.capacity is None and self.is_kept(run):
            owed = reading.owed | (self.safe(run) if reading.follows else set())
            assert owed - reading.before <= got

    async def _epoch(self, back: int, batch: int, shuffle: bool = True, after: Reading | None = None) -> Reading | None:
        run = self.chosen_run(back) if after is None else after.reader.run
        if run is None:
            return None
        owed = self.safe(run)
        try:
            reader = await self.replay(4).epoch(
                run, batch=batch, shuffle=shuffle, seed=batch, after=None if after is None else after.reader
            )
        except TROUBLE:
            return None
        before = frozenset() if after is None else after.before | set(after.got)
        return Reading(reader, False, owed, before=before)

    async def _whole_epoch(self, back: int, batch: int) -> None:
        reading = await self._epoch(back, batch)
        if reading is not None:
            await self._read(reading)

    @rule(back=st.integers(0, 2), batch=st.integers(1, 20), shuffle=st.booleans())
    def epoch(self, back: int, batch: int, shuffle: bool) -> None:
        async def read() -> None:
            reading = await self._epoch(back, batch, shuffle)
            if reading is not None:
                await self._read(reading)
                self.last_epoch = reading if reading.done else None

        self.run_async(read())

    @rule(batch=st.integers(1, 20), seconds=spread(0, 0.01))
    def epoch_after_the_last(self, batch: int, seconds: float) -> None:
        """What it has read is left out."""
        last, self.last_epoch = self.last_epoch, None
        if last is None:
            return

        async def read() -> None:
            reading = await self._epoch(0, batch, after=last)
            if reading is not None:
                await self._read(reading, seconds)
                while not reading.done:
                    await self._read(reading)
                self.last_epoch = reading

        self.run_async(read())

    @rule(back=st.integers(0, 2), batch=st.integers(1, 9), follows=st.booleans())
    def begin_to_read(self, back: int, batch: int, follows: bool) -> None:
        run = self.chosen_run(back)
        if run is None or len(self.readings) == 3:
            return
        owed = self.safe(run)
        replay = self.replay(4)
        reader = self.run_async(replay.follow(run, batch=batch) if follows else replay.epoch(run, batch=batch))
        self.readings.append(Reading(reader, follows, owed))

    @rule(index=st.integers(0, 2), seconds=spread(0, 0.01))
    def read_on(self, index: int, seconds: float) -> None:
        if not self.readings:
            return
        reading = self.readings[index % len(self.readings)]
        self.run_async(self._read(reading, seconds))
        if reading.done:
            self.readings.remove(reading)

    @rule(index=st.integers(0, 2))
    def read_to_the_end(self, index: int) -> None:
        """``follow`` ends when the run has ended."""
        if not self.readings:
            return
        reading = self.readings.pop(index % len(self.readings))
        if reading.follows and self.newest() <= reading.reader.run:
            return

        async def read() -> None:
            while not reading.done:
                await self._read(reading)

        self.run_async(read())

    async def _sample(self, batch: int) -> None:
        run = self.chosen_run(0)
        if run is None or self.capacity is not None or not self.safe(run):
            return
        try:
            sampler = await self.replay(4).sampler(run, batch=batch, seed=batch)
            for _ in range(2):
                sample = await sampler.sample()
                assert set(sample["uid"].tolist()) <= self.sent(run)
                assert (sample["state"] == (sample["uid"] % 256)[:, None]).all()
        except TROUBLE:
            pass
        except RunEnded:  # and its data are deleted
            assert not self.is_kept(run)

    @rule(batch=st.integers(1, 20))
    def sample(self, batch: int) -> None:
        self.run_async(self._sample(batch))

    # --- at the same time ----------------------------------------------------------------------------------------------

    @rule(operations=st.lists(st.tuples(spread(0, 0.002), OPERATIONS), min_size=2, max_size=5), cancel=spread(0, 0.02))
    def together(self, operations: list[tuple[float, tuple[str, int, int]]], cancel: float) -> None:
        """Several of these at once, each a moment later; all of them are cancelled after a while, if they still run."""
        busy: set[Simulator] = set()
        works: list[tuple[float, Callable[[], Coroutine[Any, Any, object]]]] = []
        for delay, (kind, index, number) in operations:
            simulator = self.pick(index)
            if kind in ("append", "flush", "join"):
                if simulator is None or simulator in busy:
                    continue
                busy.add(simulator)
                works.append((delay, self._of_actor(kind, simulator, number)))
            else:
                works.append((delay, self._of_others(kind, index, number)))

        async def later(delay: float, work: Callable[[], Coroutine[Any, Any, object]]) -> None:
            await asyncio.sleep(delay)
            await work()

        async def all_of_them() -> None:
            with anyio.move_on_after(cancel if cancel >= 0.001 else None):
                async with anyio.create_task_group() as tasks:
                    for delay, work in works:
                        tasks.start_soon(later, delay, work)

        self.run_async(all_of_them())

    def _of_actor(self, kind: str, simulator: Simulator, number: int) -> Callable[[], Coroutine[Any, Any, object]]:
        if kind == "append":
            return lambda: self._append(simulator, number)
        if kind == "flush":
            return lambda: self._flush(simulator)
        return lambda: self._join(simulator)

    def _of_others(self, kind: str, index: int, number: int) -> Callable[[], Coroutine[Any, Any, object]]:
        match kind:
            case "begin":
                return lambda: self._begin(index, number)
            case "epoch":
                return lambda: self._whole_epoch(index, number)
            case "sample":
                return lambda: self._sample(number)
            case "delete_before":
                return lambda: self._delete_before(number)
            case _:
                return lambda: self._drop(index)

    # --- faults and time -------------------------------------------------------------------------------------------------

    @rule(fault=st.sampled_from(["cut", "lose a reply", "lose a request", "close", "kill"]), count=st.integers(0, 600))
    def fault(self, fault: str, count: int) -> None:
        """``lose …``: in the middle of a command, or of a reply; or the command runs and its reply does not arrive.

        ``kill``: The fence survives an AOF restart; so does what was acknowledged, the server's file being complete.
        """
        match fault:
            case "cut":
                self.world.proxy.cut()
            case "lose a reply":
                self.world.proxy.cut_down = count
            case "lose a request":
                self.world.proxy.cut_up = count
            case "close":
                kill_connections(self.world.stock)
            case _:
                self.world.restart()

    @rule(index=st.integers(0, 3), count=st.integers(3, 12), turns=st.integers(0, 12), keep=st.integers(-2, 3))
    def replies_are_lost(self, index: int, count: int, turns: int, keep: int) -> None:
        """The server has done what an actor asked for last, and the actor does not learn it; perhaps its run ends then."""
        if simulator := self.pick(index):
            self.run_async(self._join(simulator))
            self.run_async(self._append(simulator, count))
            self.run_async(self._turns(turns))
            self.world.proxy.cut_down = 0
            time.sleep(0.002)
            self.world.proxy.cut()
            if keep > 0:
                self.begin(keep)
            self.run_async(self._flush(simulator))

    @rule(wait=st.sampled_from(["stall", "pause", "stand still", "go on", "turn"]), seconds=spread(0.0005, 0.25))
    def time_passes(self, wait: str, seconds: float) -> None:
        """``stall``: nothing arrives for so long. ``pause``: nothing is written. ``stand still``: no host does anything:
        what is on its way stays there, and leases run out. ``go on``, ``turn``: and nothing else happens.
        """
        seconds = min(seconds, self.patience)  # an example sleeps half a second at most
        self.patience -= seconds
        match wait:
            case "stall":
                self.world.proxy.stalled = True
                timer = threading.Timer(seconds, setattr, (self.world.proxy, "stalled", False))
                self.timers.append(timer)
                timer.start()
            case "pause":
                pause(self.world.stock, max(1, round(seconds * 1000)))
            case "stand still":
                time.sleep(seconds)
            case "go on":
                self.run_async(asyncio.sleep(seconds))
            case _:
                self.run_async(self._turns(round(seconds * 80)))

    async def _turns(self, count: int) -> None:
        for _ in range(count):
            await asyncio.sleep(0)

    # --- the end -------------------------------------------------------------------------------------------------------

    def teardown(self) -> None:
        try:
            if sys.exc_info()[0] is None:
                self._end_well()
        finally:
            for timer in self.timers:
                timer.cancel()
            self.world.proxy.stalled = False
            self.world.watch.name = ""
            self.loop.run_until_complete(self._close())

    async def _close(self) -> None:
        for simulator in list(self.simulators):
            await self._crash(simulator, abort=True)
        for client in self.clients:
            await client.__aexit__(None, None, None)
        await asyncio.sleep(0)

    def _end_well(self) -> None:
        """`leftover_keys` is judged after one lease, of what may have been under way for as long as the machine stood still."""
        for timer in self.timers:
            timer.join()
        self.world.proxy.cut_up = self.world.proxy.cut_down = None
        for simulator in list(self.simulators):
            self.run_async(self._leave(simulator))
        self.everything_holds()
        for back in range(sum(map(self.is_kept, self.runs))):
            self.epoch(back, 5, True)
        self.begin(1)
        self.everything_holds()
        ends = time.monotonic() + LIVENESS
        while (leftover := (seen := self.look()).ttl.keys() - seen.rows.keys()) and time.monotonic() < ends:
            assert max(seen.ttl[chunk] for chunk in leftover) <= self.lease * 1000
            time.sleep(0.01)
        assert seen.ttl == {}
        assert seen.rows == {}


def machine(world: World, capacity: int | None, lease: float) -> Any:
    def make() -> Any:
        made = type("Machine", (Machine,), {"world": world})()
        made.capacity, made.lease = capacity, lease
        return made

    return make


@pytest.mark.parametrize("kind", ["valkey", "redis"])
@pytest.mark.parametrize(
    ("capacity", "lease"), [(None, 0.15), (None, 0.3), (CAPACITY, 0.3)], ids=["short lease", "all kept", "capacity"]
)
def test_nothing_acknowledged_is_lost_doubled_mixed_up_or_left_over(
    kind: str, capacity: int | None, lease: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BACKOFF, "compute", lambda failures: 0.002 * failures)
    loop = uvloop.new_event_loop() if uvloop is not None and lease < 0.3 else asyncio.new_event_loop()
    try:
        with World(kind, tmp_path, loop).running() as world:
            run_state_machine_as_test(machine(world, capacity, lease), settings=SETTINGS)
            assert world.watch.looks
    finally:
        loop.close()


class LosesReplies(Proxy):
    """Loses the reply that has ``marker`` in it, once, with its connection; before, it calls ``meanwhile``."""

    marker: bytes | None = None
    meanwhile: Callable[[], object]

    def _chunks(self, source: socket.socket) -> Iterator[bytes]:
        for data in super()._chunks(source):
            if self.marker is not None and self.marker in data:
                self.marker = None
                self.meanwhile()
                return
            yield data


@pytest.mark.one_server("a proxy is in front of it")
@pytest.mark.anyio
async def test_commit_whose_reply_is_lost_while_the_run_ends_is_found_and_kept(
    url: str, stock: redis.Redis, tmp_path: Path
) -> None:
    with LosesReplies(url, tmp_path) as proxy:
        async with aionpredis.connect(url) as trainer, aionpredis.connect(proxy.url) as client:
            run = await replay_of(trainer, lease=5).begin_run()
            begin: Any = {"begin": "token", "policy": "0", "schema": SCHEMA.digest}
            proxy.meanwhile = lambda: stock.xadd("{r}:log", begin, id=f"{run.run + 1}-0")
            with pytest.raises(RunEnded):
                async with replay_of(client, lease=5).actor() as actor:
                    await actor.join()
                    proxy.marker = b"%d-1\r\n" % run.run  # XADD's reply
                    await fill(actor, range(4))
                    await actor.flush()
            assert proxy.marker is None
            assert actor.stats.acknowledged == 4
            assert sorted(await uids(await replay_of(trainer).epoch(run))) == [0, 1, 2, 3]


@pytest.mark.one_server("a proxy is in front of it")
@pytest.mark.anyio
async def test_commit_whose_data_are_being_deleted_does_not_bring_them_back(
    url: str, stock: redis.Redis, tmp_path: Path
) -> None:
    """A trainer has deleted the data of the ended run, and not yet the entries that name them."""
    with LosesReplies(url, tmp_path) as proxy:
        async with aionpredis.connect(url) as trainer, aionpredis.connect(proxy.url) as client:
            run = await replay_of(trainer, lease=5).begin_run()
            begin: Any = {"begin": "token", "policy": "0", "schema": SCHEMA.digest}

            def end_and_half_delete() -> None:
                stock.xadd("{r}:log", begin, id=f"{run.run + 1}-0")
                assert stock.unlink(*stock.keys("r:*")) == 1

            proxy.meanwhile = end_and_half_delete
            with pytest.raises(RunEnded):
                async with replay_of(client, lease=5).actor() as actor:
                    await actor.join()
                    proxy.marker = b"%d-1\r\n" % run.run  # XADD's reply
                    await fill(actor, range(4))
                    await actor.flush()
            assert proxy.marker is None
            assert actor.stats.acknowledged == 0
            assert actor.stats.stale == 4
            assert all(stock.pttl(key) > 0 for key in stock.keys("r:*"))
