"""Without async: the same names, one loop a process, and nothing left behind by threads, forks, Ctrl-C and exits."""

from __future__ import annotations

import copy
import gc
import inspect
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from types import FrameType
from typing import Any, assert_type

import anyio
import numpy as np
import pytest
import redis
from numpy.typing import NDArray

import aionpredis
from aionpredis import (
    EncodeError,
    PolicyVersion,
    Prioritized,
    Run,
    RunEnded,
    Sample,
    Schema,
    UsageError,
    WriteFailed,
    blocking,
)
from aionpredis.blocking import loop
from aionpredis.policy import PolicyWatch

from .proxy import Proxy
from .replays import SCHEMA, kept_keys, unnamed_without_ttl
from .servers import until

PAIRS = [
    (aionpredis.Client, blocking.Client),
    (aionpredis.Writer, blocking.Writer),
    (aionpredis.Replay, blocking.Replay),
    (aionpredis.Actor, blocking.Actor),
    (aionpredis.VectorActor, blocking.VectorActor),
    (aionpredis.Batches, blocking.Batches),
    (aionpredis.Sampler, blocking.Sampler),
    (aionpredis.Policy, blocking.Policy),
    (PolicyWatch, blocking.PolicyWatch),
    (aionpredis.Loader, blocking.Loader),
]
FOR_MODULES = {
    aionpredis.Client: {
        *("block_seconds", "blocking", "call", "call_many", "connection", "count_keys", "encode_value"),
        *(
            "live_connection",
            "open_record",
            "reach",
            "receive_parts",
            "request",
            "scan_pages",
            "send",
            "topology",
            "twin",
        ),
    },
    aionpredis.Writer: {"accept_item", "encode_item", "failed", "has_room", "report", "settle_item"},
    aionpredis.Actor: {"append_from_thread", "cut", "forsake"},
    aionpredis.VectorActor: {"cut", "rows"},
}
"""What the async classes have for the modules built on them, and not for users."""
SPECIAL = {"__aiter__": "__iter__", "__anext__": "__next__", "__aenter__": "__enter__", "__aexit__": "__exit__"}


@pytest.fixture
def client(url: str) -> Iterator[blocking.Client]:
    with blocking.connect(url) as client:
        yield client
    assert [thread.name for thread in threading.enumerate() if "portal" in thread.name] == []


# --- the same names ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ours", "theirs"), PAIRS, ids=lambda kind: kind.__name__)
def test_whatever_the_async_class_has_the_blocking_one_has(ours: type, theirs: type) -> None:
    for name, member in vars(ours).items():
        public = not name.startswith("_") and name not in FOR_MODULES.get(ours, ())
        if not (public or name in SPECIAL or name == "__len__"):
            continue
        other = inspect.getattr_static(theirs, SPECIAL.get(name, name))
        if not inspect.isfunction(member):
            assert type(other) is type(member), name
        elif public:
            assert inspect.signature(other) == inspect.signature(member), name
            assert not inspect.iscoroutinefunction(other), name
            assert other.__doc__ == member.__doc__, name


def test_connect_takes_the_same_arguments() -> None:
    assert inspect.signature(blocking.connect) == inspect.signature(aionpredis.connect)
    names = {name for name in aionpredis.__all__ if inspect.isclass(getattr(aionpredis, name))}
    for name in names & set(blocking.__all__):
        assert (getattr(aionpredis, name), getattr(blocking, name)) in PAIRS


def test_attributes_of_an_actor_are_there(client: blocking.Client) -> None:
    """Those that are no class attributes."""
    with client.replay("r", SCHEMA).actor("a") as actor:
        assert (actor.name, len(actor.incarnation), actor.run) == ("a", 8, None)
        assert actor.buffers > 3


def types_are_those_of_the_async_calls(client: blocking.Client, schema: Schema) -> None:
    """For mypy."""
    assert_type(client.get("a"), NDArray[Any] | None)
    assert_type(client.exists("a"), int)
    replay = client.replay("r", schema, chunk=3)
    assert_type(replay, blocking.Replay)
    assert_type(replay.begin_run(), Run)
    assert_type(replay.policy.latest(), PolicyVersion | None)
    with replay.actor() as actor, client.writer(max_inflight=1) as writer:
        assert_type(actor, blocking.Actor)
        assert_type(writer, blocking.Writer)
    with blocking.Loader(replay.follow(batch=3), prefetch=1) as loader:
        for batch in loader:
            assert_type(batch, dict[str, NDArray[Any]])
    for sample in replay.sampler(selection=Prioritized()):
        assert_type(sample, Sample)
    client.set("a")  # type: ignore[call-arg]
    client.get("a", inn=3)  # type: ignore[call-arg]


# --- what it does --------------------------------------------------------------------------------------------------------


def test_arrays_and_records(client: blocking.Client) -> None:
    client.set("a", np.eye(3), ttl=60)
    assert np.array_equal(client.get("a"), np.eye(3))  # type: ignore[arg-type]
    assert client.get("b") is None
    client.mset({f"k{i}": np.full(3, i) for i in range(50)})
    out = np.empty((51, 3), np.int64)
    found = client.mget([f"k{i}" for i in range(51)], out=out)
    assert (found.sum(), out[:50].sum()) == (50, 3 * 1225)
    client.set_record("r", {"x": np.arange(3)})
    assert list(client.get_record("r") or {}) == ["x"]
    assert client.exists("a", "r", "b") == 2
    assert client.execute("STRLEN", "a") > 72
    assert {*client.scan("a*")} == {b"a"}
    value = client.get_value("a")
    assert value is not None
    assert len(value) == client.execute("STRLEN", "a")
    assert client.stats().requests > 5
    assert client.delete("a", "r") == 2


def test_errors_come_as_themselves(client: blocking.Client) -> None:
    with pytest.raises(EncodeError, match="object"):
        client.set("a", np.array([{}]))
    with pytest.raises(UsageError, match="SELECT"):
        client.execute("SELECT", 1)
    error = ZeroDivisionError()
    with pytest.raises(ZeroDivisionError) as caught, client.writer() as writer:
        writer.put("a", np.eye(2))
        raise error
    assert caught.value is error
    assert client.exists("a") == 1


def test_writer_stores_what_was_put_as_it_was_then(client: blocking.Client) -> None:
    frame = np.zeros(1000, np.int64)
    with client.writer(max_inflight=100_000) as writer:
        for i in range(200):
            frame[:] = i
            writer.put(f"k{i % 150}", frame)
            assert writer.inflight <= 100_000
        writer.put_record("record", {"x": frame})
        large = np.ones(20_000)
        writer.put("large", large)
        large[:] = 0
        writer.flush()
        assert writer.inflight == 0
        assert client.exists(*[f"k{i}" for i in range(150)], "record", "large") == 152
        writer.put("last", frame)
    assert np.array_equal(client.get("large"), np.ones(20_000))  # type: ignore[arg-type]
    values = client.mget([f"k{i}" for i in range(150)])
    assert [set(value) for value in values] == [{i if i >= 50 else i + 150} for i in range(150)]
    assert client.exists("last") == 1
    with pytest.raises(UsageError, match="block"):
        writer.put("a", frame)


@pytest.mark.one_server("a cluster refuses by server")
def test_writer_says_what_was_refused(client: blocking.Client, stock: redis.Redis) -> None:
    stock.config_set("maxmemory", 1)
    try:
        with blocking.connect(client.url, retry_timeout=0) as other:
            with pytest.raises(WriteFailed) as caught, other.writer() as writer:
                writer.put("a", np.eye(2))
                with pytest.raises(WriteFailed, match="a"):
                    writer.flush()
                writer.put("b", np.eye(2))
            assert [key for key, _ in caught.value.failures] == ["b"]
            with pytest.raises(EncodeError), other.writer() as writer:
                writer.put("c", {})
    finally:
        stock.config_set("maxmemory", 0)


def test_threads_share_a_client_and_a_writer(client: blocking.Client) -> None:
    with client.writer() as writer, ThreadPoolExecutor(8) as threads:

        def work(number: int) -> bool:
            for i in range(100):
                writer.put(f"w{number}:{i}", np.full(100, i))
                client.set(f"s{number}", np.full(100, i))
            return bool((client.get(f"s{number}") == 99).all())  # type: ignore[union-attr]

        assert all(threads.map(work, range(8)))
    assert client.exists(*[f"w{n}:{i}" for n in range(8) for i in range(100)]) == 800


def fill(actor: blocking.Actor, uids: range) -> None:
    for uid in uids:
        actor.append(state=np.full(3, uid % 256, np.uint8), uid=uid, terminated=uid % 10 == 9)


def test_replay_has_every_transition_once(client: blocking.Client, stock: redis.Redis) -> None:
    replay = client.replay("r", SCHEMA, chunk=4)
    run = replay.begin_run({"w": np.ones(3)})
    with replay.actor() as actor:
        assert actor.join() == run
        fill(actor, range(1001))
        assert actor.stats.appended == 1001
        actor.flush()
        assert (actor.stats.acknowledged, actor.stats.pending) == (1001, 0)
        fill(actor, range(1001, 1003))
    assert replay.count() == 1003
    for batches in (replay.epoch(batch=100), replay.epoch(run, batch=64, shuffle=False)):
        uids = [uid for batch in batches for uid in batch["uid"].tolist()]
        assert sorted(uids) == list(range(1003))
        assert batches.stats.transitions == 1003
    assert uids == list(range(1003))
    assert batches.position.run == batches.run == run.run
    assert list(replay.epoch(after=batches)) == []  # type: ignore[arg-type]
    assert list(replay.epoch(after=batches.position)) == []
    assert unnamed_without_ttl(stock) == set()
    assert len(kept_keys(stock)) == 252


def test_actor_learns_that_its_run_has_ended(client: blocking.Client) -> None:
    replay = client.replay("r", SCHEMA, chunk=4)
    replay.begin_run()
    with replay.actor() as actor:
        with pytest.raises(UsageError, match="join"):
            fill(actor, range(1))
        actor.join()
        fill(actor, range(10))
        run = replay.begin_run()
        with pytest.raises(RunEnded):
            fill(actor, range(1_000_000))
        assert actor.run is None
        assert actor.join() == run
        fill(actor, range(7))
    assert actor.stats.pending == 0
    assert replay.count(run) == 7


def test_append_waits_when_all_buffers_travel(client: blocking.Client, stock: redis.Redis, server: Any) -> None:
    replay = client.replay("r", SCHEMA, chunk=1)
    replay.begin_run()
    with replay.actor() as actor:
        actor.join()
        fill(actor, range(5000))
    assert actor.stats.waits > 0
    assert (actor.stats.acknowledged, actor.stats.chunks) == (5000, 5000)


def test_append_refuses_what_does_not_fit(client: blocking.Client) -> None:
    replay = client.replay("r", SCHEMA)
    replay.begin_run()
    with replay.actor() as actor, replay.vector_actor(2) as lanes:
        actor.join()
        lanes.join()
        with pytest.raises(EncodeError, match="state"):
            actor.append(state=np.zeros(4, np.uint8), uid=1, terminated=False)
        with pytest.raises(EncodeError, match="2 lanes"):
            lanes.append(state=np.zeros((3, 3), np.uint8), uid=[1, 2, 3], terminated=[False] * 3)


def test_vector_actor_keeps_lanes_apart(client: blocking.Client) -> None:
    replay = client.replay("r", SCHEMA, chunk=4)
    run = replay.begin_run()
    with replay.vector_actor(3) as actor:
        assert (actor.join(), actor.run, actor.lanes) == (run, run, 3)
        for step in range(50):
            uid = np.array([step, 1000 + step, 2000 + step])
            actor.append(state=np.zeros((3, 3), np.uint8), uid=uid, terminated=np.zeros(3, bool))
        actor.flush()
        assert actor.stats.acknowledged == 150
    for sample in replay.sampler(batch=20, length=5):
        assert (np.diff(sample["uid"], axis=1) == 1).all()
        break


def test_sampler_and_priorities(client: blocking.Client) -> None:
    replay = client.replay("r", SCHEMA, chunk=4)
    replay.begin_run()
    with replay.actor() as actor:
        actor.join()
        fill(actor, range(100))
    sampler = replay.sampler(batch=32, selection=Prioritized(), seed=1)
    sample = sampler.sample()
    assert (sampler.refresh(), len(sampler), sampler.stats.sampled) == (0, 100, 32)
    priorities = np.full(32, 1e-6)
    priorities[sample["uid"] == sample["uid"][0]] = 1e6
    sampler.update_priorities(sample.ids, priorities)
    assert (sampler.sample()["uid"] == sample["uid"][0]).sum() > 28
    with blocking.Loader(sampler, prefetch=1) as loader:
        sampler.update_priorities(sample.ids, priorities)
        assert len(next(loader)) == 3
    assert len(next(sampler).ids) == 32
    with pytest.raises(UsageError, match="one priority"):
        sampler.update_priorities(sample.ids, priorities[1:])


def test_policy(client: blocking.Client) -> None:
    policy = client.policy("p")
    watch = policy.watch()
    assert policy.latest() is None
    with ThreadPoolExecutor(1) as threads:
        first = threads.submit(next, watch)
        assert policy.publish({"w": np.ones(3)}) == 1
        version: Any = first.result(10)
        assert (version.version, version.weights["w"].sum()) == (1, 3)
    assert policy.get(7) is None
    policy.delete()
    assert policy.latest() is None


def test_group_save_and_restore(client: blocking.Client, tmp_path: Path) -> None:
    replay = client.replay("r", SCHEMA, chunk=4)
    replay.begin_run({"w": np.ones(3)})
    with replay.actor() as actor:
        actor.join()
        fill(actor, range(40))
    done: list[int] = []
    assert replay.save(tmp_path / "saved", progress=lambda now, _: done.append(now)) == 40
    assert done[-1] == 40
    batches = replay.consume(group="g", batch=16)
    first = next(batches)
    batches.acknowledge()
    assert len(first["uid"]) == 16
    run = replay.restore(tmp_path / "saved")
    assert replay.count(run) == 40
    assert replay.delete_runs_before(run) == 0
    replay.delete()


def test_loader_is_ahead_and_gives_everything_in_order(client: blocking.Client) -> None:
    replay = client.replay("r", SCHEMA, chunk=4)
    replay.begin_run()
    with replay.actor() as actor:
        actor.join()
        fill(actor, range(100))
    batches = replay.epoch(batch=10, shuffle=False)
    with blocking.Loader(batches, prefetch=3) as loader:
        first = next(loader)["uid"].tolist()
        deadline = time.monotonic() + 10
        while batches.stats.transitions < 40 and time.monotonic() < deadline:
            time.sleep(0.001)
        assert batches.stats.transitions >= 40
        assert first + [uid for batch in loader for uid in batch["uid"].tolist()] == list(range(100))
    with pytest.raises(UsageError, match="inside of its"):
        next(loader)
    with pytest.raises(UsageError, match="list"):
        blocking.Loader([1, 2])  # type: ignore[arg-type]


# --- one loop a process ------------------------------------------------------------------------------------------------------


def portals() -> int:
    return sum("portal" in thread.name for thread in threading.enumerate())


@pytest.mark.one_server("threads are the point")
def test_clients_share_a_thread_that_ends_with_the_last(url: str) -> None:
    with blocking.connect(url) as first:
        second = blocking.connect(url)
        first.set("a", np.eye(2))
        assert portals() == 1
    assert second.exists("a") == 1
    second.close()
    second.close()
    assert portals() == 0
    for call in (lambda: second.get("a"), second.__enter__, second.writer, lambda: first.get("a")):
        with pytest.raises(UsageError, match="connect"):
            call()
    with blocking.connect(url) as third:
        assert third.exists("a") == 1
    with pytest.raises(aionpredis.ConnectError):
        blocking.connect("unix:///nowhere/s.sock")
    assert portals() == 0


def test_closed_client_says_connect_again_while_another_is_open(client: blocking.Client) -> None:
    other = blocking.connect(client.url)
    replay = other.replay("r", SCHEMA)
    says = r"the client is closed: call blocking\.connect\(\) again$"
    with pytest.raises((UsageError, WriteFailed), match=says), other.writer() as writer:
        other.close()
        writer.put("a", np.eye(2))
    calls: list[Callable[[], object]] = [
        *(lambda: other.get("a"), lambda: next(other.scan()), lambda: other.execute("PING"), other.__enter__),
        *(other.writer().__enter__, replay.begin_run, lambda: next(replay.policy.watch())),
    ]
    for call in calls:
        with pytest.raises(UsageError, match=f"^{says}"):
            call()


def test_errors_of_use_speak_of_calls_without_async(client: blocking.Client) -> None:
    replay = client.replay("r", SCHEMA)
    replay.begin_run()
    transition = {"state": np.zeros(3, np.uint8), "uid": 1, "terminated": False}
    lanes = {name: np.array([value]) for name, value in transition.items()}
    loader = blocking.Loader(replay.epoch())
    with replay.actor() as actor, replay.vector_actor(1) as vector_actor:
        calls: list[tuple[str, Callable[[], object]]] = [
            ("of its `with` block", lambda: client.writer().put("a", np.eye(2))),
            ("of its `with` block", lambda: client.writer().put_record("a", {"x": np.eye(2)})),
            ("of its `with` block", replay.actor().join),
            ("of its `with` block", lambda: next(loader)),
            (r"`actor\.join\(\)`", lambda: actor.append(**transition)),
            (r"`actor\.join\(\)`", actor.flush),
            (r"`actor\.join\(\)`", lambda: vector_actor.append(**lanes)),
        ]
        for says, call in calls:
            with pytest.raises(UsageError, match=says) as caught:
                call()
            assert "async" not in str(caught.value)
            assert "await" not in str(caught.value)


def test_leaving_a_block_that_was_never_entered_is_a_usage_error(client: blocking.Client) -> None:
    replay = client.replay("r", SCHEMA)
    replay.begin_run()
    for never in (client.writer(), replay.actor(), replay.vector_actor(1), blocking.Loader(replay.epoch())):
        with pytest.raises(UsageError, match="never entered: use it in a `with` block"):
            never.__exit__(None, None, None)


@pytest.mark.one_server("connections are counted on it")
def test_client_that_nobody_knows_any_more_is_closed(url: str, stock: redis.Redis) -> None:
    before = len(stock.client_list())
    with blocking.connect(url):
        forgotten = blocking.connect(url)
        replay, host = forgotten.replay("r", SCHEMA), weakref.ref(forgotten._host)
        del forgotten
        gc.collect()
        assert replay.latest_run() is None  # it keeps its client
        del replay
        gc.collect()
        deadline = time.monotonic() + 10
        while len(stock.client_list()) > before + 1 and time.monotonic() < deadline:
            time.sleep(0.001)
        assert len(stock.client_list()) == before + 1
        while host() is not None and time.monotonic() < deadline:
            time.sleep(0.001)
        assert host() is None


@pytest.mark.one_server("loops are the point")
@pytest.mark.parametrize("kind", ["asyncio", "trio"])
def test_works_beside_a_loop_that_runs_in_the_same_thread(url: str, kind: str) -> None:
    """As in Jupyter."""

    async def cell() -> int:
        with blocking.connect(url) as client, client.writer() as writer:
            writer.put("a", np.eye(2))
            replay = client.replay("r", SCHEMA)
            replay.begin_run()
            with replay.actor() as actor:
                actor.join()
                fill(actor, range(40))
            with blocking.Loader(replay.epoch()) as loader:
                return sum(len(batch["uid"]) for batch in loader)

    assert anyio.run(cell, backend=kind) == 40


@pytest.mark.one_server("threads are the point")
def test_a_call_from_the_loop_itself_is_refused(client: blocking.Client, tmp_path: Path) -> None:
    replay = client.replay("r", SCHEMA)
    replay.begin_run()
    with replay.actor() as actor:
        actor.join()
        fill(actor, range(10))

    def progress(done: int, of: int) -> None:
        client.get("a")

    with pytest.raises(UsageError, match="thread of the event loop"):
        replay.save(tmp_path / "saved", progress=progress)


@pytest.mark.one_server("no server is asked")
def test_clients_do_not_travel(client: blocking.Client) -> None:
    for send in (pickle.dumps, copy.copy):
        with pytest.raises(UsageError, match="another process"):
            send(client)


# --- forks ---------------------------------------------------------------------------------------------------------------


def in_child(work: Callable[[], None]) -> None:
    """Run in a fork, which has 30 s; it must succeed."""
    context: Any = multiprocessing.get_context("fork")
    child = context.Process(target=work)
    child.start()
    child.join(30)
    if child.is_alive():
        child.kill()
        child.join()
        pytest.fail("the child hangs")
    assert child.exitcode == 0


forks = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")  # of 3.12: that there are threads is the point


@forks
def test_a_fork_is_told_to_connect_and_may(client: blocking.Client, url: str, stock: redis.Redis) -> None:
    replay = client.replay("r", SCHEMA, chunk=4)
    replay.begin_run()
    with client.writer() as writer, replay.actor() as actor:
        actor.join()
        fill(actor, range(6))
        writer.put("a", np.eye(2))

        def work() -> None:
            for call in (
                lambda: client.get("a"),
                lambda: writer.put("b", np.eye(2)),
                lambda: fill(actor, range(1)),
                lambda: replay.actor(),
            ):
                with pytest.raises(UsageError, match=r"fork: call blocking\.connect"):
                    call()
            client.close()
            with blocking.connect(url) as mine:
                mine.set("child", np.eye(3))
            client.__exit__(None, None, None)

        for _ in range(3):
            in_child(work)
            writer.put("a", np.eye(3))
            fill(actor, range(6, 12))
            assert client.exists("child") == 1
        actor.flush()
        assert actor.stats.acknowledged == 24
    assert client.exists("a", "b") == 1


@forks
@pytest.mark.one_server("processes are the point")
@pytest.mark.parametrize("end", ["sys.exit()", "os._exit(0)", "del client; gc.collect()", "raise ZeroDivisionError"])
def test_the_end_of_a_fork_disturbs_nobody(url: str, end: str) -> None:
    """Also of one that leaves all blocks of its parent."""
    code = f"""
        import gc, os, sys, warnings
        import numpy as np
        from aionpredis import blocking

        warnings.filterwarnings("ignore", ".*fork", DeprecationWarning)
        client = blocking.connect({url!r})
        try:
            with client, client.writer() as writer:
                writer.put("a", np.eye(2))
                child = os.fork()
                if not child:
                    {end}
                    os._exit(0)
                os.waitpid(child, 0)
                for i in range(100):
                    writer.put(f"k{{i}}", np.eye(2))
                    client.set("b", np.eye(2))
        except ZeroDivisionError:
            os._exit(0)
        print("done", client.url)
    """
    assert run(code) == f"done {url}\n"


def run(code: str) -> str:
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


# --- ends ------------------------------------------------------------------------------------------------------------------


SILENCE = 40.0
"""Seconds after which a server that does not answer is given up."""


@pytest.mark.one_server("processes are the point")
def test_what_is_never_closed_ends_with_the_interpreter(url: str) -> None:
    code = f"""
        import atexit, threading
        import numpy as np

        def count():
            for thread in threading.enumerate():
                if thread is not threading.main_thread():
                    thread.join(10)  # anyio tells its worker threads to end, and does not wait for that
            print(threading.active_count(), "thread")

        atexit.register(count)  # the first to come is the last to go

        from aionpredis import Schema, blocking

        client = blocking.connect({url!r})
        client.set("a", np.eye(2))
        writer = client.writer().__enter__()
        writer.put("b", np.eye(2))
        replay = client.replay("r", Schema(x="int64"))
        replay.begin_run()
        actor = replay.actor().__enter__()
        actor.join()
        actor.append(x=1)
        print("end")
    """
    assert run(code) == "end\n1 thread\n"


def ctrl_c_when_it_waits() -> None:
    """Interrupt this thread in the next call that waits, when it has done so for a moment."""
    ours = threading.get_ident()

    def waits() -> bool:
        return sys._current_frames()[ours].f_code is loop._Call.wait.__code__

    def interrupt() -> None:
        until(waits, "it waits", 30)
        time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()


@contextmanager
def ended_by_ctrl_c() -> Iterator[None]:
    """Long before a server that does not answer is given up."""
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        yield
    assert time.monotonic() - start < SILENCE / 2


@pytest.mark.one_server("a key that never comes")
def test_ctrl_c_cancels_the_call_and_nothing_is_written_afterwards(proxy: Proxy) -> None:
    with blocking.connect(proxy.url, timeout=SILENCE) as client:
        client.set("a", np.ones(1000))
        out = np.zeros(1000)
        watch = client.policy("p").watch()
        proxy.stalled = True
        ctrl_c_when_it_waits()
        with ended_by_ctrl_c():
            client.get("a", out=out)
        proxy.stalled = False
        assert client.exists("a") == 1  # behind what was asked for before
        assert not out.any()
        ctrl_c_when_it_waits()
        with ended_by_ctrl_c():
            next(watch)
        assert client.exists("a") == 1


@pytest.mark.one_server("a server that does not answer")
def test_ctrl_c_leaves_a_block_without_waiting(proxy: Proxy) -> None:
    with blocking.connect(proxy.url, timeout=SILENCE) as client:
        replay = client.replay("r", SCHEMA, chunk=4)
        replay.begin_run()
        with ended_by_ctrl_c(), client.writer() as writer, replay.actor() as actor:
            actor.join()
            proxy.stalled = True
            writer.put("a", np.eye(2))
            fill(actor, range(10))
            ctrl_c_when_it_waits()
            actor.flush()
        proxy.stalled = False
        assert client.exists("nothing") == 0


@pytest.mark.one_server("no server is asked")
def test_ctrl_c_just_behind_the_entry_of_a_block_leaves_it(
    client: blocking.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    wait = loop._Call.wait

    def interrupted(call: loop._Call[Any]) -> None:
        wait(call)
        monkeypatch.undo()
        raise KeyboardInterrupt

    writer = client.writer()
    monkeypatch.setattr(loop._Call, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt), writer:
        pass
    open_writers = client._target.counters.writers
    deadline = time.monotonic() + 10
    while open_writers and time.monotonic() < deadline:
        time.sleep(0.001)
    assert not open_writers


@pytest.mark.one_server("a server that does not answer")
def test_a_call_that_waits_when_its_client_is_closed_is_told(url: str, stock: redis.Redis) -> None:
    client = blocking.connect(url)
    watch = client.policy("p").watch()
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(next, watch)
        time.sleep(0.05)
        client.close()
        with pytest.raises((UsageError, aionpredis.ConnectionLost)):
            waiting.result(10)
    assert loop._loop is None


# --- Ctrl-C, anywhere ------------------------------------------------------------------------------------------------------

PLACES = str(Path(aionpredis.__file__).parent), "<string>"
"""The package's code: what it compiles itself, too."""


def soon_over(work: Callable[[], object]) -> None:
    """In a thread of its own, which has 30 s."""
    errors: list[BaseException | None] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)
        else:
            errors.append(None)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(30)
    assert errors, "it hangs"
    if errors[0] is not None:
        raise errors[0]


def interrupted(work: Callable[[], object], place: int) -> bool:
    """Do it, and interrupt it in the n-th place where the interpreter looks for signals while it runs this package: at the
    begin of a function, and behind a call. Whether there are so many.
    """

    def look(frame: FrameType, event: str, argument: object) -> None:
        nonlocal place
        if event in ("call", "c_return") and frame.f_code.co_filename.startswith(PLACES):
            place -= 1
            if place < 0:
                sys.setprofile(None)
                raise KeyboardInterrupt

    def run() -> None:
        sys.setprofile(look)
        try:
            work()
        finally:
            sys.setprofile(None)

    try:
        soon_over(run)
    except KeyboardInterrupt:
        return True
    return False


@pytest.mark.one_server("no server is asked")
def test_ctrl_c_anywhere_in_a_call_neither_hangs_nor_lets_it_go_on(client: blocking.Client) -> None:
    home = client._loop
    running = 0

    async def work() -> None:
        nonlocal running
        running += 1
        try:
            await anyio.sleep(0.1)
        finally:
            running -= 1

    for place in count():
        if not interrupted(lambda: home.call(work), place):
            break
        home.call(anyio.sleep, 0)  # what was posted before has begun
        assert running == 0
    assert place > 5


@pytest.mark.one_server("what a thread hands over is the point")
def test_ctrl_c_anywhere_in_an_append_loses_no_other_transition(client: blocking.Client) -> None:
    replay = client.replay("r", SCHEMA, chunk=2)
    replay.begin_run()
    with replay.actor() as actor:
        actor.join()
        free = len(actor._target._free)
        kept = set()
        uid = 0

        def append_two() -> None:
            fill(actor, range(uid, uid + 2))

        for work, flushes in ((append_two, False), (append_two, True), (actor.flush, False)):
            for place in count():
                before = actor.stats.appended
                again = interrupted(work, place)
                assert 0 <= actor.stats.appended - before <= 2
                if flushes:
                    actor.flush()
                    assert actor.stats.pending == 0
                kept |= {*range(uid + 2, uid + 5)}
                fill(actor, range(uid + 2, uid + 5))
                uid += 5
                if not again:
                    break
            assert place > 5
        actor.flush()
        stats = actor.stats
        assert len(actor._target._free) == free
    stored = [uid for batch in replay.epoch(batch=100, shuffle=False) for uid in batch["uid"].tolist()]
    assert len(stored) == len(set(stored)) == stats.appended == stats.acknowledged
    assert kept <= set(stored)


@pytest.mark.one_server("a server that does not answer")
def test_ctrl_c_in_a_large_put_gives_the_array_back(proxy: Proxy) -> None:
    with blocking.connect(proxy.url, timeout=SILENCE) as client, client.writer(max_inflight=100_000) as writer:
        proxy.stalled = True
        for i in range(9):
            writer.put(f"k{i}", np.ones(1250))
        large = np.ones(10_000)
        ctrl_c_when_it_waits()
        with ended_by_ctrl_c():
            writer.put("large", large)  # waits for room
        proxy.stalled = False
        large[:] = 0
        writer.flush()
        assert client.exists("k8", "large") == 1


@pytest.mark.one_server("a call that is cancelled")
def test_an_interrupted_put_is_not_sent_twice(client: blocking.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    with client.writer() as writer:
        accept = writer._target.accept_item

        async def take_and_be_cancelled() -> bool:
            with anyio.CancelScope() as scope:

                async def accept_late(*item: Any) -> bool:
                    scope.cancel()
                    return await accept(*item)

                monkeypatch.setattr(writer._target, "accept_item", accept_late)
                await writer._take()
            return scope.cancelled_caught

        monkeypatch.setattr(writer._loop, "spawn", lambda function: None)
        writer.put("a", np.ones(100_000))  # fills a batch
        assert client._loop.call(take_and_be_cancelled)
        assert not writer._outbox
    assert client.exists("a") == 1


@pytest.mark.one_server("no server is asked")
def test_ctrl_c_at_the_end_of_a_writers_block_leaves_it(
    client: blocking.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), client.writer() as writer:
        monkeypatch.setattr(writer._loop, "spawn", lambda function: None)
        writer.put("a", np.eye(2))
        assert writer.inflight > 0
        monkeypatch.setattr(writer, "_take", interrupt)
    assert not client._target.counters.writers
    assert writer.inflight == 0


@pytest.mark.one_server("the process' loop is the point")
@pytest.mark.parametrize("waits", [False, True])
def test_a_put_that_comes_when_the_block_ends_harms_no_other_call(
    client: blocking.Client, monkeypatch: pytest.MonkeyPatch, waits: bool
) -> None:
    writer = client.writer(max_inflight=1000)
    encode = writer._target.encode_item

    def be_late(*arguments: Any) -> Any:
        item = encode(*arguments)
        writer.__exit__(None, None, None)
        return item

    with client.writer():
        writer.__enter__()
        monkeypatch.setattr(writer._target, "encode_item", be_late)
        with pytest.raises(UsageError, match="inside of its"):
            writer.put("a", np.eye(20 if waits else 2))  # a large one waits, and is told; a small one does not
            soon_over(lambda: client.set("b", np.eye(2)))
            writer.flush()
        soon_over(lambda: client.set("b", np.eye(2)))
    assert client.exists("a", "b") == 1


@pytest.mark.one_server("the process' loop is the point")
def test_a_task_that_fails_and_one_that_cannot_begin_harm_no_other_call(client: blocking.Client) -> None:
    async def fail() -> None:
        raise ZeroDivisionError

    client._loop.spawn(fail)
    soon_over(lambda: client.exists("a"))
    call = loop._Call(fail, (), {})

    async def too_late() -> None:
        async with anyio.create_task_group() as tasks:
            pass
        call.start(tasks)

    client._loop.call(too_late)
    soon_over(call.wait)
    with pytest.raises(RuntimeError):
        call.result()


@pytest.mark.one_server("the process' loop is the point")
def test_a_client_may_be_collected_while_its_loop_is_called(
    client: blocking.Client, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = client._loop
    others = [blocking.connect(url)]
    soon = home._soon

    def collect(*arguments: Any) -> object:
        if others:
            others.clear()
            gc.collect()
        return soon(*arguments)

    monkeypatch.setattr(home, "_soon", collect)
    soon_over(lambda: client.exists("a"))
    assert home.forgotten == 1


@pytest.mark.one_server("the process' loop is the point")
def test_ctrl_c_is_not_hidden_by_the_end_of_the_loop(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for enters in (False, True):
        client = blocking.connect(url)
        writer = client.writer()

        def interrupt(call: loop._Call[Any], client: blocking.Client = client) -> None:
            monkeypatch.undo()
            client.close()
            raise KeyboardInterrupt

        monkeypatch.setattr(loop._Call, "wait", interrupt)
        with pytest.raises(KeyboardInterrupt):
            writer.__enter__() if enters else client.exists("a")
