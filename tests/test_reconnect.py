"""The server restarts, refuses, forgets or is replaced: everything goes on afterwards, nothing acknowledged is lost or doubled.

Everything that a program does at once, writer, actor, readers, sampler, consumer, policy, meets each fault in the middle of
its work. What only one of them shows has a test of its own.
"""

from __future__ import annotations

import contextlib
import logging
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import numpy as np
import pytest
import redis

import aionpredis
from aionpredis import (
    AuthenticationError,
    Client,
    ConnectError,
    ConnectionLost,
    RunEnded,
    Server,
    ServerError,
    ServerFull,
    ServerUnavailable,
    UsageError,
    WriteFailed,
)
from aionpredis.replay import Batches
from aionpredis.replay.log import ChunkId, LogReader, Names, look_again, pack

from .proxy import Proxy
from .replays import SCHEMA, fill, kill_connections, replay_of, uids, unnamed_without_ttl
from .replays import pause as pause_writes
from .servers import free_port, make_server, until

pytestmark = pytest.mark.anyio

STATE = np.arange(80 * 80, dtype=np.uint16).reshape(80, 80)
PATIENCE = 40.0
"""Seconds after which something that must go on counts as hanging."""

KINDS = {"asyncio": "valkey", "asyncio+uvloop": "redis", "trio": "valkey"}


@pytest.fixture
def kind(anyio_backend: Any) -> str:
    """One server for each loop: which of the two loops of asyncio it is has no bearing on what the server does."""
    name, options = anyio_backend
    return KINDS[name + "+uvloop" * bool(options.get("use_uvloop"))]


class Place:
    """A server that survives its process, and can be made to misbehave, behind an address that stays."""

    def __init__(self, server: Server, proxy: Proxy) -> None:
        self.server = server
        self.proxy = proxy
        self.url = proxy.url
        self.admin = redis.Redis.from_url(server.url, socket_timeout=30)

    def config(self, **settings: str) -> None:
        for name, value in settings.items():
            self.admin.config_set(name.replace("_", "-"), value)

    def restart(self, seconds: float = 0.2) -> None:
        """SIGKILL; then another process with the same data."""
        self.admin.close()
        self.server.stop()
        time.sleep(seconds)
        self.server.start()
        self.proxy.target = self.server.url.removeprefix("unix://")
        self.admin = redis.Redis.from_url(self.server.url, socket_timeout=30)


@pytest.fixture
def place(kind: str, tmp_path: Path) -> Iterator[Place]:
    folder = tmp_path / "data"
    folder.mkdir()
    config = {"appendonly": "yes", "appendfsync": "no", "dir": str(folder), "enable-debug-command": "local"}
    with make_server(kind, config=config) as server, Proxy(server.url, tmp_path) as proxy:
        place = Place(server, proxy)
        yield place
        place.admin.close()


# --- the faults ------------------------------------------------------------------------------------------------------


def restart(place: Place) -> None:
    place.restart()


def kill(place: Place) -> None:
    for _ in range(20):
        kill_connections(place.admin)
        time.sleep(0.01)


def load(place: Place) -> None:
    """LOADING: it reads its data anew, slowly."""
    with place.admin.pipeline(transaction=False) as pipeline:
        for i in range(300):
            pipeline.set(f"ballast{i}", bytes(1000))
        pipeline.execute()
    place.config(key_load_delay="1000", loading_process_events_interval_bytes="1024")
    place.admin.execute_command("DEBUG", "RELOAD")  # type: ignore[no-untyped-call]
    place.config(key_load_delay="0")


def be_full(place: Place) -> None:
    place.config(maxmemory="1")
    time.sleep(0.3)
    place.config(maxmemory="0")


def be_a_replica(place: Place) -> None:
    """READONLY, and UNBLOCKED for those that wait."""
    place.admin.replicaof("127.0.0.1", "1")
    time.sleep(0.2)
    place.admin.replicaof("NO", "ONE")


def be_a_replica_without_a_master(place: Place) -> None:
    """MASTERDOWN, even for reads."""
    place.config(replica_serve_stale_data="no")
    be_a_replica(place)


def run_a_script(place: Place) -> None:
    """BUSY, until the script is killed."""
    place.config(lua_time_limit="10")
    with redis.Redis.from_url(place.server.url, socket_timeout=30) as other:

        def kill_it() -> None:
            with pytest.raises(redis.ResponseError, match="BUSY"):
                while place.admin.ping():
                    time.sleep(0.01)
            time.sleep(0.3)
            place.admin.script_kill()

        kill_script = threading.Thread(target=kill_it)
        kill_script.start()
        with pytest.raises(redis.ResponseError, match="killed"):
            other.eval("while true do end", 0)
        kill_script.join()


def have_no_place(place: Place) -> None:
    """``max number of clients reached``."""
    assert place.admin.ping()
    place.config(maxclients="1")
    kill_connections(place.admin)
    time.sleep(0.2)
    place.config(maxclients="1000")


def pause(place: Place) -> None:
    place.admin.client_pause(200)
    time.sleep(0.2)


FAULTS = [
    restart,
    kill,
    load,
    be_full,
    be_a_replica,
    be_a_replica_without_a_master,
    run_a_script,
    have_no_place,
    pause,
]


class Life:
    """Everything that a program may do at once, each part counting its ``steps``, until ``over``."""

    def __init__(self, client: Client, other: Client) -> None:
        self.client = client
        self.replay = replay_of(client, lease=20)
        self.reading = replay_of(other, lease=20)
        self.steps: dict[str, int] = {}
        self.over = False
        self.put = 0
        self.appended = 0
        self.followed: list[int] = []
        self.consumed: set[int] = set()

    def _step(self, name: str) -> None:
        self.steps[name] = self.steps.get(name, 0) + 1

    async def _writer(self) -> None:
        async with self.client.writer(max_inflight=400_000) as writer:
            while not self.over:
                await writer.put(f"w{self.put % 100}", np.full(600, self.put))
                self.put += 1
                if self.put % 50 == 0:
                    await writer.flush()
                    self._step("writer")

    async def _mget(self) -> None:
        keys = [f"m{i}" for i in range(40)]
        rows = np.arange(40 * 900).reshape(40, 900)
        await self.client.mset(dict(zip(keys, rows, strict=True)))
        while not self.over:
            out = np.empty_like(rows)
            assert (await self.client.mget(keys, out=out)).all()
            assert (out == rows).all()
            assert (await self.client.get("m7") == rows[7]).all()
            self._step("mget")

    async def _actor(self) -> None:
        async with self.replay.actor() as actor:
            await actor.join()
            while not self.over:
                await fill(actor, range(self.appended, self.appended + 10))
                self.appended += 10
                await anyio.sleep(0.002)
                if self.appended % 50 == 0:
                    await actor.flush()
                    assert actor.stats.acknowledged == self.appended
                    self._step("actor")
            await actor.flush()
            assert (actor.stats.acknowledged, actor.stats.stale) == (self.appended, 0)
        await self.replay.begin_run(keep=2)  # the readers come to their ends

    async def _follow(self) -> None:
        async for batch in await self.reading.follow(batch=8):
            self.followed += batch["uid"].tolist()
            self._step("follow")

    async def _consume(self) -> None:
        batches = await self.reading.consume(group="g", batch=8, reclaim=0.5)
        async for batch in batches:
            self.consumed.update(batch["uid"].tolist())
            await batches.acknowledge()
            self._step("consume")

    async def _epoch(self) -> None:
        run = await self.reading.latest_run()
        while not self.over:
            found = await uids(await self.reading.epoch(run, batch=64))
            assert len(set(found)) == len(found)
            self._step("epoch")

    async def _sampler(self) -> None:
        sampler = await self.reading.sampler(batch=16)
        while not self.over:
            batch = await sampler.sample()
            assert (batch["state"] == (batch["uid"] % 256)[:, None]).all()
            self._step("sampler")

    async def _publish(self) -> None:
        version = 0
        while not self.over:
            with contextlib.suppress(ServerFull):  # for the caller to decide: delete something, or wait
                version = await self.replay.policy.publish({"weight": np.full(100, version + 1)})
                self._step("publish")
            await anyio.sleep(0.005)

    async def _watch(self) -> None:
        latest = 0
        async for version, weights in self.reading.policy.watch():
            assert version > latest
            assert (weights["weight"] == version).all()
            latest = version
            self._step("watch")

    async def live(self, fault: Callable[[], None]) -> None:
        await self.replay.begin_run()
        parts = [self._writer, self._mget, self._actor, self._follow, self._consume, self._epoch, self._sampler]
        with anyio.fail_after(PATIENCE):
            async with anyio.create_task_group() as watching:
                watching.start_soon(self._watch)
                async with anyio.create_task_group() as tasks:
                    for part in (*parts, self._publish):
                        tasks.start_soon(part)
                    await self._progress(len(parts) + 2)
                    await anyio.to_thread.run_sync(fault)
                    self.steps.clear()
                    await self._progress(len(parts) + 2)
                    self.over = True
                watching.cancel_scope.cancel()

    async def _progress(self, parts: int) -> None:
        while len(self.steps) < parts or min(self.steps.values()) < 2:
            await anyio.sleep(0.005)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
async def test_everything_goes_on_after(place: Place, fault: Callable[[Place], None]) -> None:
    async with aionpredis.connect(place.url) as client, aionpredis.connect(place.url) as other:
        life = Life(client, other)
        await life.live(lambda: fault(place))
        assert sorted(life.followed) == list(range(life.appended))
        assert life.consumed == set(range(life.appended))
        for i in range(max(0, life.put - 100), life.put):
            assert (await client.get(f"w{i % 100}") == i).all()  # type: ignore[union-attr]
        assert unnamed_without_ttl(place.admin) == set()


# --- errors that come at once, and those that come in the end --------------------------------------------------------


GIVEN_UP = r"given up after \d+ attempts in (\d+\.\d) s"


def seconds_of(error: BaseException) -> float:
    """For how long it was tried, as it says."""
    found = re.search(GIVEN_UP, str(error))
    assert found is not None
    return float(found[1])


async def test_final_error_says_how_long_it_was_tried(place: Place) -> None:
    async with aionpredis.connect(place.url, retry_timeout=0.3) as client:
        await client.set("k", STATE)
        place.proxy.refusing = True
        place.proxy.cut()
        started = time.monotonic()
        for attempt in (client.get("k"), client.mget(["k"]), client.set("k", STATE), client.exists("k")):
            with pytest.raises((ConnectError, ConnectionLost), match=GIVEN_UP) as raised:
                await attempt
            assert seconds_of(raised.value) >= 0.3
        assert 1.2 <= time.monotonic() - started < 20  # four times; by default each would take 30 s
        place.proxy.refusing = False
        assert (await client.get("k") == STATE).all()  # type: ignore[union-attr]


async def test_retry_timeout_of_0_is_a_single_attempt(place: Place) -> None:
    async with aionpredis.connect(place.url, retry_timeout=0) as client:
        kill_connections(place.admin)
        with pytest.raises(ConnectionLost) as raised:
            await client.get("k")
        assert "given up" not in str(raised.value)
        assert await client.get("k") is None


@pytest.mark.parametrize("seconds", [-1, "30", None, True, float("nan")])
def test_retry_timeout_that_is_no_time_is_refused(seconds: Any) -> None:
    with pytest.raises(UsageError, match="retry_timeout"):
        aionpredis.connect("redis://localhost", retry_timeout=seconds)


async def test_silence_counts_as_long_as_it_lasted(place: Place) -> None:
    """A silent server is noticed after ``timeout``; with more time to try, another connection is made."""
    async with aionpredis.connect(place.url, timeout=0.2, retry_timeout=PATIENCE) as client:
        await client.set("k", STATE)
        place.proxy.stalled = True
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(client.get, "k")
            with anyio.fail_after(PATIENCE):
                while "Stalled" not in client.stats().errors:
                    await anyio.sleep(0.01)
            place.proxy.stalled = False
    async with aionpredis.connect(place.url, timeout=0.2, retry_timeout=0.2) as client:
        place.proxy.stalled = True
        with pytest.raises(aionpredis.Stalled):
            await client.get("k")
        place.proxy.stalled = False


@pytest.mark.parametrize("away", [0.0, 1.5])
async def test_actor_tries_for_retry_timeout_once_not_for_each_of_its_steps(place: Place, away: float) -> None:
    """After a fault it looks for its run's beginning first; that is refused, as its chunks are. ``away``: seconds before that
    in which there is no server at all."""
    async with aionpredis.connect(place.url, retry_timeout=2) as client:
        replay = replay_of(client, lease=20)
        await replay.begin_run()
        async with replay.actor() as actor, anyio.create_task_group() as tasks:
            await actor.join()
            await fill(actor, range(4))
            await actor.flush()
            place.admin.replicaof("127.0.0.1", "1")
            if away:
                place.proxy.refusing = True
                place.proxy.cut()
            else:  # another task has met it: the actor knows of the fault, and has not tried yet
                with anyio.move_on_after(0.1):
                    await client.set("k", STATE)

            async def come_back() -> None:
                await anyio.sleep(away)
                place.proxy.refusing = False

            tasks.start_soon(come_back)
            started = time.monotonic()
            with pytest.raises(ServerUnavailable, match=f"READONLY.*{GIVEN_UP}") as raised:
                await fill(actor, range(4, 100_000))
            seconds = seconds_of(raised.value)
            assert 2 <= seconds < 4
            assert 2 <= time.monotonic() - started < seconds + 1  # with another retry_timeout 1.5 s more, or 2


class GoneAt(Proxy):
    """Is there until a client sends this command."""

    command = b"?"

    def _chunks(self, source: socket.socket) -> Iterator[bytes]:
        for data in super()._chunks(source):
            if self.command in data:
                self.refusing = True
                self.cut()
            yield data


@pytest.mark.one_server("a proxy is in front of it")
async def test_what_a_step_of_an_actor_gave_up_is_not_tried_for_another_retry_timeout(url: str, tmp_path: Path) -> None:
    """The server vanishes while the actor evicts. Each attempt is counted once."""
    with GoneAt(url, tmp_path) as proxy:
        async with aionpredis.connect(proxy.url, retry_timeout=1.5) as client:
            replay = client.replay("r", SCHEMA, chunk=4, capacity=32)
            await replay.begin_run()
            async with replay.actor() as actor:
                await actor.join()
                proxy.command = b"UNLINK"
                started = time.monotonic()
                with pytest.raises((ConnectError, ConnectionLost), match=GIVEN_UP) as raised:
                    await fill(actor, range(100_000))
                seconds = seconds_of(raised.value)
                assert 1.5 <= seconds < 3
                assert 1.5 <= time.monotonic() - started < seconds + 1  # with another retry_timeout 1.5 s more
            stats = client.stats()
            assert sum(stats.errors.values()) == stats.retries + 1


async def test_refusal_is_raised_with_its_command_and_key_in_the_end(place: Place) -> None:
    async with aionpredis.connect(place.url, retry_timeout=0.2) as client:
        await client.set("k", STATE)
        place.admin.replicaof("127.0.0.1", "1")
        for attempt in (client.set("k", STATE), client.execute("SET", "k", "v"), client.delete("k")):
            with pytest.raises(ServerUnavailable, match=r"READONLY.*given up after \d+ attempts") as raised:
                await attempt
            assert raised.value.code == "READONLY"
            assert raised.value.command in ("SET", "UNLINK")
        assert (await client.get("k") == STATE).all()  # type: ignore[union-attr]  # reads it answers
        with pytest.raises(WriteFailed, match="READONLY"):
            await client.mset({"k": STATE})


async def test_refused_command_is_repeated_though_it_must_not_run_twice(place: Place) -> None:
    """What the server refused has not run."""
    async with aionpredis.connect(place.url) as client:
        place.admin.replicaof("127.0.0.1", "1")
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(client.execute, "INCR", "steps")
            await anyio.sleep(0.1)
            place.admin.replicaof("NO", "ONE")
        assert place.admin.get("steps") == b"1"


async def test_command_after_an_idle_disconnect_has_a_known_outcome(kind: str) -> None:
    """On TCP, where the kernel would take a request for a server that has gone."""
    with make_server(kind, port=free_port()) as server, redis.Redis.from_url(server.url) as admin:
        async with aionpredis.connect(f"redis://127.0.0.1:{server.port}") as client:
            await client.execute("INCR", "steps")
            admin.config_set("timeout", "1")
            with anyio.fail_after(PATIENCE):
                while len(admin.client_list(_type="normal")) > 1:
                    await anyio.sleep(0.05)
            await client.execute("INCR", "steps")
            assert admin.get("steps") == b"2"


async def test_refused_password_is_final(place: Place) -> None:
    """NOAUTH: nobody waits, nothing is tried again; with the password all goes on."""
    async with aionpredis.connect(place.url) as client:
        replay = replay_of(client, lease=20)
        run = await replay.begin_run()
        async with replay.actor() as actor:
            await actor.join()
            await fill(actor, range(4))
            await actor.flush()
            place.config(requirepass="secret")
            kill_connections(place.admin)
            with anyio.fail_after(20):  # retry_timeout is 30
                for attempt in (client.get("k"), client.mget(["k"]), client.set("k", STATE)):
                    with pytest.raises(AuthenticationError, match="refused to let us in"):
                        await attempt
                with pytest.raises(WriteFailed, match="refused to let us in"):
                    await client.mset({"k": STATE})
                with pytest.raises(AuthenticationError):
                    await anext(replay.policy.watch())
                with pytest.raises(AuthenticationError):
                    await fill(actor, range(100, 100_000))
            place.admin.auth("secret")
            place.config(requirepass="")
            assert await actor.join() == run
            await fill(actor, range(4, 8))
        assert sorted(await uids(await replay.epoch())) == list(range(8))


async def test_changed_password_is_final(place: Place) -> None:
    place.config(requirepass="hunter2")
    place.admin.auth("hunter2")
    url = place.url.replace("unix://", "unix://:hunter2@")
    async with aionpredis.connect(url) as client:
        place.config(requirepass="new")
        kill_connections(place.admin)
        with anyio.fail_after(20), pytest.raises(AuthenticationError, match="invalid username-password") as raised:
            await client.get("k")
        assert "hunter2" not in str(raised.value)


async def test_full_server_is_told_to_the_caller_at_once(place: Place) -> None:
    """A writer and an actor wait instead: see ``be_full``."""
    async with aionpredis.connect(place.url) as client:
        await client.set("k", STATE)
        place.config(maxmemory="1")
        with anyio.fail_after(20):  # retry_timeout is 30
            with pytest.raises(ServerFull):
                await client.set("other", STATE)
            with pytest.raises(WriteFailed, match="OOM"):
                await client.mset({"other": STATE})
            with pytest.raises(ServerFull):
                await client.policy("p").publish({"w": STATE})
        assert await client.delete("k") == 1


async def test_writer_to_a_full_server_names_what_was_not_stored(place: Place) -> None:
    async with aionpredis.connect(place.url, retry_timeout=0.3) as client:
        with pytest.raises(WriteFailed, match=r"OOM.*given up after") as raised:
            async with client.writer() as writer:
                await writer.put("a", STATE)
                await writer.flush()
                place.config(maxmemory="1")
                for i in range(3):
                    await writer.put(f"b{i}", STATE)
        assert [key for key, _ in raised.value.failures] == ["b0", "b1", "b2"]


class RefusesOnce(Proxy):
    """Says LOADING instead of the next OK."""

    armed = False

    def _chunks(self, source: socket.socket) -> Iterator[bytes]:
        for data in super()._chunks(source):
            if self.armed and b"+OK\r\n" in data:
                self.armed = False
                data = data.replace(b"+OK\r\n", b"-LOADING by the proxy\r\n", 1)
            yield data


@pytest.mark.one_server("a proxy is in front of it")
async def test_writer_keeps_the_order_of_puts_when_an_earlier_one_is_refused(
    url: str, stock: redis.Redis, tmp_path: Path
) -> None:
    """The second put of a key was taken by the server before the first one is sent again: so it is, too."""
    with RefusesOnce(url, tmp_path) as proxy:
        async with aionpredis.connect(proxy.url) as client, client.writer(max_inflight=100_000) as writer:
            await writer.put("first", STATE)
            await writer.flush()
            pause_writes(stock, 20_000)
            proxy.armed = True
            for i in range(6):  # in several batches, all of them on their way
                await writer.put("k", STATE + np.uint16(i))
            stock.client_unpause()
            await writer.flush()
            assert not proxy.armed
            assert client.stats().errors["LOADING"] == 1
            assert (await client.get("k") == STATE + 5).all()  # type: ignore[union-attr]


async def test_writer_may_be_opened_while_the_server_is_away(place: Place) -> None:
    async with aionpredis.connect(place.url) as client:
        place.proxy.refusing = True
        place.proxy.cut()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(client.mset, {"k": STATE})
            await anyio.sleep(0.1)
            place.proxy.refusing = False
        assert (await client.get("k") == STATE).all()  # type: ignore[union-attr]


async def test_server_that_cannot_write_to_its_disk_says_so(kind: str, tmp_path: Path) -> None:
    """MISCONF: reads go on, even over new connections; writes fail at once, with what to do."""
    config = {"dir": str(tmp_path), "save": "3600 1000000", "stop-writes-on-bgsave-error": "yes"}
    with make_server(kind, config=config) as server, redis.Redis.from_url(server.url) as admin:
        async with aionpredis.connect(server.url) as client:
            replay = replay_of(client, lease=20)
            await client.set("k", STATE)
            run = await replay.begin_run()
            obstacle = tmp_path / "dump.rdb"
            obstacle.mkdir()
            admin.bgsave()
            with anyio.fail_after(PATIENCE):
                while admin.info("persistence")["rdb_last_bgsave_status"] != "err":
                    await anyio.sleep(0.01)
            with anyio.fail_after(20):  # retry_timeout is 30
                with pytest.raises(ServerError, match="make room there") as raised:
                    await client.set("k", STATE + 1)
                assert raised.value.code == "MISCONF"
                with pytest.raises(WriteFailed, match="MISCONF"):
                    await client.mset({"k": STATE + 1})
                kill_connections(admin)
                assert (await client.get("k") == STATE).all()  # type: ignore[union-attr]
                async with replay.actor() as actor:
                    await actor.join()
                    with pytest.raises(ServerError, match="MISCONF"):
                        await fill(actor, range(100_000))
                    obstacle.rmdir()
                    admin.bgsave()
                    while admin.info("persistence")["rdb_last_bgsave_status"] != "ok":
                        await anyio.sleep(0.01)
                    assert await actor.join() == run
                    await fill(actor, range(8))
            assert sorted(await uids(await replay.epoch())) == list(range(8))


async def test_output_buffer_limit_does_not_keep_much_from_being_read(kind: str, place: Place) -> None:
    """It holds for what a server has not sent yet, and no more than ~1 MB is asked for at once. A single value may be too long
    for it."""
    rows = np.arange(1500 * 6400, dtype=np.uint16).reshape(1500, 80, 80)
    keys = [f"k{i}" for i in range(len(rows))]
    async with aionpredis.connect(place.url, retry_timeout=0.2) as client:
        await client.mset(dict(zip(keys, rows, strict=True)))
        await client.set("long", np.zeros(12 << 20, np.uint8))
        if kind == "valkey":  # it would count what it has sent already, of values that it does not copy
            place.config(min_string_size_avoid_copy_reply="0")
        place.config(client_output_buffer_limit="normal 6mb 0 0")
        out = np.empty_like(rows)
        place.proxy.pause = 0.0005  # the client is slower than the server
        assert (await client.mget(keys, out=out)).all()
        assert (out == rows).all()
        assert client.counters.reconnects == 0
        place.proxy.pause = 0.0
        with pytest.raises(ConnectionLost, match="given up after"):
            await client.get("long")


# --- failover --------------------------------------------------------------------------------------------------------


class Failover:
    """A server and its replica, over which ``proxy`` decides who is reached. Asynchronous replication can lose the end."""

    def __init__(self, old: Server, new: Server, proxy: Proxy) -> None:
        self.url = proxy.url
        self.old = redis.Redis.from_url(old.url)
        self.new = redis.Redis.from_url(new.url)
        self._proxy = proxy
        self._target = new.url.removeprefix("unix://")
        self._port = old.port

    def replicate(self) -> None:
        """The replica has everything; from now on it gets nothing more."""
        self.new.replicaof("127.0.0.1", str(self._port))

        def is_complete() -> bool:
            master = self.old.info("replication")
            replica = self.new.info("replication")
            return (
                replica.get("master_link_status") == "up"
                and replica["slave_repl_offset"] >= master["master_repl_offset"]
            )

        until(is_complete, "the replica is complete")
        self.new.replicaof("NO", "ONE")

    def happen(self, *, cut: bool = True) -> None:
        self._proxy.target = self._target
        if cut:
            self._proxy.cut()


@pytest.fixture
def failover(kind: str, tmp_path: Path) -> Iterator[Failover]:
    config = {"repl-diskless-sync-delay": "0"}
    with (
        make_server(kind, config=config, port=free_port()) as old,
        make_server(kind, config=config) as new,
        Proxy(old.url, tmp_path) as proxy,
    ):
        failover = Failover(old, new, proxy)
        yield failover
        failover.old.close()
        failover.new.close()


async def followed(batches: Batches, into: list[int]) -> None:
    async for batch in batches:
        into += batch["uid"].tolist()


async def test_reader_finds_what_took_the_ids_of_lost_entries(failover: Failover) -> None:
    """The reader has read entries 1 to 20; the promoted replica knows 10 and gives 11 to 20 away again."""
    found: list[int] = []
    async with aionpredis.connect(failover.url) as client, aionpredis.connect(failover.url) as other:
        replay, reading = replay_of(client, lease=20), replay_of(other, lease=20)
        run = await replay.begin_run()
        sampler = await reading.sampler(batch=8)
        epoch = await reading.epoch(batch=8)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(followed, await reading.follow(run, batch=4), found)
            async with replay.actor() as actor:
                await actor.join()
                await fill(actor, range(40))
                await actor.flush()
                await anyio.to_thread.run_sync(failover.replicate)
                await fill(actor, range(40, 80))
                await actor.flush()
                with anyio.fail_after(PATIENCE):
                    while len(found) < 80:
                        await anyio.sleep(0.005)
                    assert sorted(await uids(epoch)) == list(range(80))
                    await sampler.refresh()
                    failover.happen()
                    await fill(actor, range(80, 120))
                    await actor.flush()
                    entries: Any = failover.new.xrange("{r}:log", f"{run.run}-20")
                    assert [entry for entry, _ in entries] == [b"%d-20" % run.run]
                    while len(found) < 120:
                        await anyio.sleep(0.005)
                    drawn: set[int] = set()
                    while not drawn >= set(range(80, 120)):
                        drawn |= set((await sampler.sample())["uid"].tolist())
                    assert sorted(await uids(await reading.epoch(batch=8, after=epoch))) == list(range(80, 120))
            assert sorted(found) == list(range(120))
            await replay.begin_run()
        assert sorted(found) == list(range(120))


@pytest.mark.parametrize("read", [38, 40], ids=["in a chunk", "at its end"])
async def test_stored_position_is_no_reason_to_leave_out_what_took_the_ids_of_lost_entries(
    failover: Failover, read: int
) -> None:
    """A reader that began at entry 10 has seen the log to its end, and the promoted replica gives 6 to 10 away again."""
    found: list[int] = []
    async with aionpredis.connect(failover.url) as client, aionpredis.connect(failover.url) as other:
        replay, reading = replay_of(client, lease=20), replay_of(other, lease=20)
        await replay.begin_run()
        async with replay.actor() as actor, anyio.create_task_group() as tasks:
            await actor.join()
            await fill(actor, range(20))
            await actor.flush()
            await anyio.to_thread.run_sync(failover.replicate)
            await fill(actor, range(20, 40))
            await actor.flush()
            first = await reading.follow(batch=2)
            for _ in range(read // 2):
                await anext(first)
            second = await reading.follow(batch=2, after=first.position)
            tasks.start_soon(followed, second, found)
            with anyio.fail_after(PATIENCE):
                while second.log.entry < 10 or len(found) < 40 - read:
                    await anyio.sleep(0.005)
                failover.happen()
                await fill(actor, range(40, 60))
                await actor.flush()
                entries: Any = failover.new.xrevrange("{r}:log", count=1)
                assert entries[0][0].endswith(b"-10")
                while len(found) < 60 - read:
                    await anyio.sleep(0.005)
            tasks.cancel_scope.cancel()
    assert found == list(range(read, 60))


async def test_actors_and_a_learner_do_not_wait_for_each_other_after_a_failover(failover: Failover) -> None:
    """``max_lag`` is four chunks. The promoted replica lacks entries 6 to 10, and that the learner has read the first five."""
    found: list[int] = []
    async with aionpredis.connect(failover.url) as client, aionpredis.connect(failover.url) as other:
        replay, reading = (one.replay("r", SCHEMA, chunk=4, lease=20, max_lag=16) for one in (client, other))
        await replay.begin_run()
        async with replay.actor() as actor:
            await actor.join()
            with anyio.fail_after(PATIENCE):
                await fill(actor, range(20))
                await actor.flush()
                await anyio.to_thread.run_sync(failover.replicate)
                reader = await reading.follow(batch=4)
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(followed, reader, found)
                    said: Any = []
                    while not (said and said[0].endswith(b":5")):
                        await anyio.sleep(0.005)
                        said = failover.old.hvals("{r}:read")
                    tasks.cancel_scope.cancel()
                await fill(actor, range(20, 40))
                await actor.flush()
                failover.happen()
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(followed, reader, found)
                    await fill(actor, range(40, 80))
                    await actor.flush()
                    while len(found) < 60:
                        await anyio.sleep(0.005)
                    tasks.cancel_scope.cancel()
    assert found == [*range(20), *range(40, 80)]


async def test_beginning_that_a_failover_lost_is_added_again(failover: Failover) -> None:
    """By the actors and the trainer that know of it. Else the next run would get its number, and what they still send."""
    async with aionpredis.connect(failover.url) as client, aionpredis.connect(failover.url) as other:
        trainer, simulators = replay_of(client, lease=20), replay_of(other, lease=20)
        await trainer.begin_run()
        await anyio.to_thread.run_sync(failover.replicate)
        run = await trainer.begin_run()
        async with simulators.actor() as actor:
            assert await actor.join() == run
            await fill(actor, range(8))
            await actor.flush()
            failover.happen()
            await fill(actor, range(8, 16))
            await actor.flush()
            entries: Any = failover.new.xrange("{r}:log", f"{run.run}-0", f"{run.run}-0")
            assert [fields[b"begin"] for _, fields in entries] == [run.token]
            assert sorted(await uids(await trainer.epoch(run))) == list(range(8, 16))
            next_run = await trainer.begin_run()
            assert next_run.run == run.run + 1
            with pytest.raises(RunEnded):
                await fill(actor, range(100, 100_000))
            assert await actor.join() == next_run
        assert await uids(await trainer.epoch(next_run)) == []


async def test_trainer_does_not_begin_a_run_of_a_lost_ones_number(failover: Failover) -> None:
    """Its actors may not have noticed yet."""
    async with aionpredis.connect(failover.url) as client:
        trainer = replay_of(client, lease=20)
        await trainer.begin_run()
        await anyio.to_thread.run_sync(failover.replicate)
        run = await trainer.begin_run()
        failover.happen()
        assert (await trainer.begin_run()).run == run.run + 1


async def test_server_that_became_a_replica_is_left_for_the_one_at_its_address(failover: Failover) -> None:
    async with aionpredis.connect(failover.url, retry_timeout=5) as client:
        await client.set("k", STATE)
        failover.old.replicaof("127.0.0.1", "1")
        failover.happen(cut=False)
        await client.set("k", STATE + 1)
        assert failover.new.exists("k")
        async with client.writer() as writer:
            await writer.put("other", STATE)
        assert failover.new.exists("other")


async def test_trainer_adds_its_lost_beginning_again(failover: Failover) -> None:
    async with aionpredis.connect(failover.url) as client:
        trainer = replay_of(client, lease=20)
        await trainer.begin_run()
        await anyio.to_thread.run_sync(failover.replicate)
        run = await trainer.begin_run()
        failover.happen()
        assert await trainer.latest_run() == run
        assert (await trainer.begin_run()).run == run.run + 1


async def test_trainer_whose_lost_run_another_one_took_the_number_of_finds_that_one(failover: Failover) -> None:
    async with aionpredis.connect(failover.url) as client:
        trainer = replay_of(client, lease=20)
        await trainer.begin_run()
        await anyio.to_thread.run_sync(failover.replicate)
        run = await trainer.begin_run()
        begin: Any = {"begin": "other", "policy": "0", "schema": trainer.schema.digest}
        failover.new.xadd("{r}:log", begin, id=f"{run.run}-0")
        failover.happen()
        with anyio.fail_after(PATIENCE):
            found = await trainer.latest_run()
            assert found is not None
            assert (found.run, found.token) == (run.run, b"other")
            async with replay_of(client).actor() as actor:
                assert await actor.join() == found
                await fill(actor, range(8))
            assert await trainer.count() == 8
            assert (await trainer.begin_run()).run == run.run + 1


async def test_run_whose_number_another_one_took_has_ended(failover: Failover) -> None:
    found: list[int] = []
    async with aionpredis.connect(failover.url) as client, aionpredis.connect(failover.url) as other:
        replay, reading = replay_of(client, lease=20), replay_of(other, lease=20)
        await replay.begin_run()
        await anyio.to_thread.run_sync(failover.replicate)
        run = await replay.begin_run()
        async with replay.actor() as actor:
            await actor.join()
            await fill(actor, range(8))
            await actor.flush()
            with anyio.fail_after(PATIENCE):
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(followed, await reading.follow(run, batch=4), found)
                    while len(found) < 8:
                        await anyio.sleep(0.005)
                    # Another trainer is faster than all that know the lost one.
                    begin: Any = {"begin": "other", "policy": "0", "schema": replay.schema.digest}
                    failover.new.xadd("{r}:log", begin, id=f"{run.run}-0")
                    failover.happen()
                    with pytest.raises(RunEnded):
                        await fill(actor, range(8, 100_000))
                joined = await actor.join()
            assert (joined.run, joined.token) == (run.run, b"other")
            await fill(actor, range(200, 208))
            await actor.flush()
        assert found == list(range(8))
        assert sorted(await uids(await reading.epoch())) == list(range(200, 208))


async def test_group_that_a_failover_lost_is_made_again(failover: Failover) -> None:
    async with aionpredis.connect(failover.url) as client:
        replay = replay_of(client, lease=20)
        await replay.begin_run()
        async with replay.actor() as actor:
            await actor.join()
            await fill(actor, range(8))
            await actor.flush()
            await anyio.to_thread.run_sync(failover.replicate)
            batches = await replay.consume(group="g", batch=4)
            consumed = set((await anext(batches))["uid"].tolist())
            failover.happen()
            await fill(actor, range(8, 16))
            await actor.flush()
            with anyio.fail_after(PATIENCE):
                while consumed != set(range(16)):
                    consumed |= set((await anext(batches))["uid"].tolist())
                    await batches.acknowledge()


async def test_chunk_that_was_missing_is_read_when_its_actor_sends_it_again(url: str, stock: redis.Redis) -> None:
    """The actor was cut off between XADD and PERSIST for longer than its lease."""
    async with aionpredis.connect(url) as client:
        replay = replay_of(client)
        run = await replay.begin_run()
        batches = await replay.follow(run, batch=4)
        found: list[int] = []
        async with replay.actor() as actor, anyio.create_task_group() as tasks:
            await actor.join()
            packed = actor.incarnation + bytes(4) + (4).to_bytes(4, "little")
            stock.xadd("{r}:log", {"c": packed}, id=f"{run.run}-1")

            async def miss() -> None:
                with anyio.fail_after(PATIENCE):
                    async with anyio.create_task_group() as reading:
                        reading.start_soon(followed, batches, found)
                        while not batches.stats.missing:
                            await anyio.sleep(0.005)
                        reading.cancel_scope.cancel()

            with pytest.warns(RuntimeWarning, match="not on the server"):
                await miss()
            assert batches.stats.missing == 1
            await fill(actor, range(4))  # number 0 of this incarnation, too
            await actor.flush()
            tasks.start_soon(followed, batches, found)
            with anyio.fail_after(PATIENCE):
                while len(found) < 4:
                    await anyio.sleep(0.005)
            tasks.cancel_scope.cancel()
        assert found == list(range(4))


async def test_chunk_that_a_failover_took_is_read_though_its_entry_has_the_same_number_again(
    url: str, stock: redis.Redis
) -> None:
    """The new primary has neither data nor entry, until the actor sends both again; or another chunk has the number."""
    async with aionpredis.connect(url) as client:
        run = await replay_of(client).begin_run()
        entries: Any = stock.xrange("{r}:log")
        ((_, begin),) = entries
        log = LogReader(client, Names("r"), run.run)
        first, other = (ChunkId(b"8 bytes.", seq, 4, b"") for seq in range(2))
        stock.xadd("{r}:log", {"c": pack(first)}, id=f"{run.run}-1")
        (chunk,) = await log.read(wait=False)
        for lost_to in (None, other):
            stock.delete("{r}:log")
            stock.xadd("{r}:log", begin, id=f"{run.run}-0")
            if lost_to is not None:
                stock.xadd("{r}:log", {"c": pack(lost_to)}, id=f"{run.run}-1")
            value, gone = await look_again(client, Names("r"), run.run, chunk)
            assert value is None
            assert gone
            log.miss(chunk, gone)
            stock.xadd("{r}:log", {"c": pack(first)}, id=f"{run.run}-{1 if lost_to is None else 2}")
            kill_connections(stock)
            found = [each[:2] for each in await log.read(wait=False)]
            assert found == [each[:2] for each in (lost_to, first) if each is not None]


# --- the log ---------------------------------------------------------------------------------------------------------


async def test_log_has_one_line_when_an_outage_begins_and_one_when_it_is_over(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "aionpredis")
    async with aionpredis.connect(place.url) as client:
        await client.set("k", STATE)
        for _ in range(2):
            place.proxy.refusing = True
            place.proxy.cut()
            async with anyio.create_task_group() as tasks:
                for _ in range(50):
                    tasks.start_soon(client.get, "k")
                await anyio.sleep(0.05)
                place.proxy.refusing = False
    lines = [(record.levelname, record.name) for record in caplog.records]
    assert lines == [("WARNING", "aionpredis.retry"), ("INFO", "aionpredis.retry")] * 2
    assert "p.sock" in caplog.text


async def again(call: Callable[[], Any]) -> None:
    while True:
        await call()


async def act(client: Client) -> None:
    async with replay_of(client, lease=20).actor() as actor:
        await actor.join()
        await fill(actor, range(1_000_000))


async def write(client: Client) -> None:
    async with client.writer(max_inflight=100_000) as writer:
        await again(lambda: writer.put("k", STATE))


async def watch(client: Client) -> None:
    async for _ in client.policy("r").watch():
        pass


TASKS: list[Callable[[Client], Any]] = [
    lambda client: again(lambda: client.get("k")),
    lambda client: again(lambda: client.mget(["k", "l"])),
    act,
    write,
    watch,
]


async def test_outage_whose_last_caller_was_cancelled_is_news_when_it_is_met_again(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    """It may be another one by then. As long as somebody tries, it is the same one."""
    caplog.set_level(logging.INFO, "aionpredis.retry")

    def levels() -> list[str]:
        found = [record.levelname for record in caplog.records]
        caplog.clear()
        return found

    async def met(client: Client) -> None:
        """A caller is cancelled some time after there is a line."""
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(client.get, "k")
            with anyio.fail_after(PATIENCE):
                while not caplog.records:
                    await anyio.sleep(0.005)
            await anyio.sleep(0.1)
            tasks.cancel_scope.cancel()

    for task in TASKS:
        async with aionpredis.connect(place.url) as client:
            await replay_of(client).begin_run({"w": STATE})
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(task, client)
                await anyio.sleep(0.1)
                place.proxy.refusing = True
                place.proxy.cut()
                with anyio.fail_after(PATIENCE):
                    while not caplog.records:
                        await anyio.sleep(0.005)
                await met(client)
                await anyio.sleep(0.1)
                tasks.cancel_scope.cancel()
            assert levels() == ["WARNING"]
            await met(client)
            assert levels() == ["WARNING"]
            place.proxy.refusing = False
            await client.get("k")
            assert levels() == ["WARNING", "INFO"]
            # One that was lost while nobody waited for anything, and is cancelled while another is made.
            connection = client.live_connection()
            assert connection is not None
            connection.abort(ConnectionLost("by the test"))
            place.proxy.stalled = True
            for _ in range(2):
                await met(client)
                assert levels() == ["WARNING"]
            place.proxy.stalled = False


async def test_who_is_cancelled_leaves_an_outage_to_whoever_is_still_connecting(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "aionpredis.retry")
    async with aionpredis.connect(place.url) as client:
        connection = client.live_connection()
        assert connection is not None
        place.proxy.stalled = True
        connection.abort(ConnectionLost("by the test"))
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(client.get, "k")
            with anyio.fail_after(PATIENCE):
                while not caplog.records:
                    await anyio.sleep(0.005)
            with anyio.move_on_after(0.05):
                await client.get("k")
            place.proxy.stalled = False
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]


async def test_log_has_no_secrets(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "aionpredis")
    place.config(requirepass="hunter2")
    place.admin.auth("hunter2")
    async with aionpredis.connect(place.url.replace("unix://", "unix://:hunter2@"), retry_timeout=1) as client:
        kill_connections(place.admin)
        await client.get("k")
        place.config(requirepass="other")
        kill_connections(place.admin)
        with pytest.raises(AuthenticationError):
            await client.get("k")
    assert caplog.records
    assert "hunter2" not in caplog.text
