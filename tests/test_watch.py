"""``aionpredis watch``, and the observer behind it: true numbers, whatever happens to the replay and its servers."""

from __future__ import annotations

import io
import json
import os
import pty
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import anyio
import numpy as np
import pytest
import redis
from rich.console import Console

import aionpredis
from aionpredis import Client
from aionpredis.cli.watch import Trouble, render
from aionpredis.errors import AionpredisError, ServerError
from aionpredis.replay.observer import ActorView, Observer, ReaderView, RunView, ServerView, View
from aionpredis.server import Server

from .cluster import Cluster, slot_of
from .replays import SCHEMA, data_keys, fill, kill_connections, replay_of
from .servers import free_port, make_server, until

pytestmark = [pytest.mark.anyio, pytest.mark.one_loop("what it reads is read by the client, which is tested on each")]

WEIGHTS = {"w": np.ones(3, np.float32)}


@asynccontextmanager
async def observed(url: str, name: str = "r") -> AsyncIterator[tuple[Client, Observer]]:
    """Two clients: one to work with, and the observer's own."""
    async with aionpredis.connect(url) as client, aionpredis.connect(url, retry_timeout=0) as other:
        yield client, Observer(other, name)


async def test_its_numbers_are_those_of_the_replay(url: str, stock: redis.Redis) -> None:
    async with observed(url) as (client, observer):
        replay = replay_of(client)
        before = time.time()
        run = await replay.begin_run(WEIGHTS)
        async with replay.actor("left") as left, replay.actor("right") as right:
            await left.join()
            await right.join()
            await fill(left, range(42))  # 11 chunks of 4, the last of 2; 4 episodes
            await fill(right, range(9))
            await left.flush()
            await right.flush()
            began = time.monotonic()
            view = await observer.look()
            assert view.run is not None
            assert (view.run.run, view.run.policy, view.policy) == (run.run, 1, 1)
            assert view.run.transitions == view.run.committed == await replay.count() == 51
            assert view.run.chunks == len(data_keys(stock)) == 14
            assert view.run.nbytes == sum(stock.strlen(key) for key in data_keys(stock))
            assert view.run.begun is not None
            assert before - 1 <= view.run.begun <= time.time()
            assert {actor.name: (actor.transitions, actor.chunks, actor.episodes) for actor in view.actors} == {
                "left": (42, 11, 4),
                "right": (9, 3, 0),
            }
            assert {actor.incarnation for actor in view.actors} == {left.incarnation.hex(), right.incarnation.hex()}
            assert {actor.seen for actor in view.actors} == {None}
            assert view.rate is None

            await anyio.sleep(0.2)
            await fill(left, range(42, 62))
            await left.flush()
            view = await observer.look()
            seconds = time.monotonic() - began
            assert view.rate is not None
            assert 20 / seconds <= view.rate < 20 / 0.2
            rates = {actor.name: actor.rate for actor in view.actors}
            assert rates == {"left": pytest.approx(view.rate), "right": 0}
            seen = {actor.name: actor.seen for actor in view.actors}
            assert seen["right"] is None
            assert seen["left"] is not None
            assert seen["left"] < seconds
    assert view.denied == []


async def test_what_was_evicted_is_not_counted_as_there(url: str, stock: redis.Redis) -> None:
    async with observed(url) as (client, observer):
        replay = client.replay("r", SCHEMA, chunk=4, capacity=16)
        await replay.begin_run()
        async with replay.actor() as actor:
            await actor.join()
            await fill(actor, range(16))
            await actor.flush()
            first = await observer.look()
            await fill(actor, range(16, 400))
        view = await observer.look()
        assert first.run is not None
        assert view.run is not None
        assert view.run.transitions == await replay.count() < 100
        assert view.run.chunks == len(data_keys(stock))
        assert view.run.nbytes == sum(stock.strlen(key) for key in data_keys(stock))
        assert first.run.transitions < view.run.committed <= 400


async def test_learners_and_groups_are_as_far_behind_as_they_say(url: str) -> None:
    async with observed(url) as (client, observer):
        replay = client.replay("r", SCHEMA, chunk=4, max_lag=1_000)
        run = await replay.begin_run()
        async with replay.actor() as actor:
            await actor.join()
            await fill(actor, range(40))
        follower = await replay.follow(run, batch=4)
        for _ in range(4):  # that a chunk was read is said when the next is asked for
            await anext(follower)
            await anyio.sleep(0.03)
        consumer = await replay.consume(run, group="g", batch=4)
        await anext(consumer)
        view = await observer.look()
        behind = {reader.name: reader for reader in view.readers}
        assert behind.keys() == {"follow:0/1", "consume:g"}
        progress = await client.execute("HGET", "{r}:read", "follow:0/1")
        read = int(progress.split(b":")[1])
        assert 0 < read < 10
        assert behind["follow:0/1"].chunks_behind == 10 - read
        assert behind["follow:0/1"].transitions_behind == 4 * (10 - read)
        group = behind["consume:g"]
        assert group.consumers == 1
        assert group.pending
        assert group.pending + group.chunks_behind == 10


async def test_new_runs_older_ones_and_the_deleted_replay(url: str) -> None:
    async with observed(url) as (client, observer):
        assert (await observer.look()).run is None
        replay = replay_of(client)
        runs = []
        for count in (8, 12, 20):
            runs.append(await replay.begin_run(WEIGHTS, keep=9))
            async with replay.actor(f"actor {count}") as actor:
                await actor.join()
                await fill(actor, range(count))
            view = await observer.look()
            assert view.run is not None
            assert (view.run.run, view.run.transitions) == (runs[-1].run, count)
            assert [actor.name for actor in view.actors] == [f"actor {count}"]
        assert [(run.run, run.transitions) for run in view.older] == [(runs[1].run, 12), (runs[0].run, 8)]
        assert view.policy == 3
        other = Observer(client, "r")  # one that was not there meanwhile
        assert (await other.look()).older == view.older

        await replay.drop(runs[1])
        view = await observer.look()
        assert [run.run for run in view.older] == [runs[0].run]
        await replay.delete()
        assert await client.execute("EXISTS", "{r}:actors") == 0
        view = await observer.look()
        assert (view.run, view.older, view.actors, view.policy) == (None, [], [], 0)
        await replay.begin_run()
        assert (await observer.look()).run is not None


async def test_a_run_whose_beginning_a_failover_has_lost_is_not_shown(url: str, stock: redis.Redis) -> None:
    async with observed(url) as (client, observer):
        replay = replay_of(client)
        first = await replay.begin_run()
        lost = await replay.begin_run(keep=5)
        async with replay.actor() as actor:
            await actor.join()
            begin: Any = {"begin": first.token, "policy": "0", "schema": first.schema}
            stock.delete("{r}:log")
            stock.xadd("{r}:log", begin, id=f"{first.run}-0")
            await fill(actor, range(12))  # the first of them stands where the run began
            await actor.flush()
        assert (await observer.look()).run is None
        newest = await replay.begin_run(keep=5)
        assert newest.run == lost.run + 1
        view = await observer.look()
        assert view.run is not None
        assert view.run.run == newest.run
        assert [older.run for older in view.older] == [first.run]


async def test_beginning_a_run_forgets_the_names_of_actors_that_are_gone(url: str) -> None:
    async with aionpredis.connect(url) as client:
        replay = replay_of(client)
        for name in ("first", "second"):
            await replay.begin_run()
            async with replay.actor(name) as actor:
                await actor.join()
                assert await client.execute("HVALS", "{r}:actors") == [name.encode()]


async def test_every_primary_is_shown(url: str, server: Server | Cluster, stock: redis.Redis) -> None:
    async with observed(url) as (_, observer):
        view = await observer.look()
    assert len(view.servers) == (3 if isinstance(server, Cluster) else 1)
    assert len({each.url for each in view.servers}) == len(view.servers)
    for each in view.servers:
        assert each.used_memory > 100_000
        assert each.clients >= 1
        assert each.maxmemory == 0


@pytest.mark.one_server("it counts commands")
async def test_names_are_asked_for_of_the_runs_actors_only(url: str, stock: redis.Redis) -> None:
    """Not of all that ever joined: restarted ones are others each time."""
    async with observed(url) as (client, observer):
        replay = replay_of(client)
        await replay.begin_run()
        assert (await observer.look()).actors == []
        async with replay.actor("Zoë") as actor:
            await actor.join()
            await fill(actor, range(8))
        for number in range(1000):
            stock.hset("{r}:actors", f"{number:016x}", "of an older run")
        stock.config_resetstat()
        assert [each.name for each in (await observer.look()).actors] == ["Zoë"]
        facts: Any = stock.info("commandstats")
        assert facts["cmdstat_hmget"]["calls"] == facts["cmdstat_hgetall"]["calls"] == 1  # that is {r}:read


@pytest.mark.one_server("ACL SETUSER is for each server")
async def test_what_the_user_may_not_look_at_is_left_out(url: str, stock: redis.Redis) -> None:
    stock.execute_command("ACL", "SETUSER", "looker", "reset", "on", ">p", "(+xinfo|stream +xrange %R~{r}:log)")  # type: ignore[no-untyped-call]
    try:
        async with aionpredis.connect(url) as client:
            replay = replay_of(client)
            await replay.begin_run(WEIGHTS)
            async with replay.actor() as actor:
                await actor.join()
                await fill(actor, range(8))
        async with aionpredis.connect(url, username="looker", password="p", retry_timeout=0) as client:
            view = await Observer(client, "r").look()
            assert view.run is not None
            assert (view.run.transitions, view.run.nbytes) == (8, None)
            assert (view.policy, view.servers) == (0, [])
            assert [actor.name for actor in view.actors] == [""]
            assert len(view.denied) == 6
            assert all("the user's ACL needs +" in reason for reason in view.denied)
            with pytest.raises(ServerError, match="xinfo"):
                await Observer(client, "other").look()
    finally:
        stock.acl_deluser("looker")


@pytest.mark.one_server("a server that is killed")
@pytest.mark.parametrize("kind", ["valkey", "redis"])
async def test_it_goes_on_after_a_restart_of_the_server(kind: str, tmp_path: Path) -> None:
    """With the same numbers if its data are there again, and those of what there is now if not."""
    port = free_port()

    async def look(observer: Observer) -> View:
        for _ in range(500):
            try:
                return await observer.look()
            except AionpredisError:
                await anyio.sleep(0.01)
        raise AssertionError("the observer does not find the server again")

    url = f"redis://127.0.0.1:{port}"
    with make_server(kind, port=port) as server:
        async with observed(url) as (client, observer):
            for count in (20, 12):  # the second server has less, under the same name
                replay = replay_of(client)
                await replay.begin_run(WEIGHTS)
                async with replay.actor() as actor:
                    await actor.join()
                    await fill(actor, range(count))
                for _ in range(2):
                    view = await look(observer)
                    assert view.run is not None
                    assert view.run.transitions == view.run.committed == count
                    assert sum(actor.transitions for actor in view.actors) == count
                    await client.execute("CLIENT", "KILL", "TYPE", "normal")  # of the observer's connection, too
                await anyio.to_thread.run_sync(server.stop)
                with pytest.raises(AionpredisError):
                    await observer.look()
                await anyio.to_thread.run_sync(server.start)
                assert (await look(observer)).run is None


@pytest.mark.one_server("what a failover does, without one")
async def test_the_end_of_the_log_that_a_failover_has_lost_is_not_counted(url: str, stock: redis.Redis) -> None:
    async with observed(url) as (client, observer):
        replay = replay_of(client)
        await replay.begin_run(WEIGHTS)
        async with replay.actor() as actor:
            await actor.join()
            await fill(actor, range(40))
        assert ((await observer.look()).run or pytest.fail("no run")).transitions == 40
        entries: Any = stock.xrange("{r}:log")
        stock.delete("{r}:log")
        for entry, fields in entries[:6]:
            stock.xadd("{r}:log", fields, id=entry)
        kill_connections(stock)
        while True:
            try:
                view = await observer.look()
                break
            except AionpredisError:  # the connection that was killed
                pass
        assert view.run is not None
        assert view.run.transitions == await replay.count() == 20
        assert sum(each.transitions for each in view.actors) == 20


@pytest.mark.one_server("a cluster of its own")
async def test_it_goes_on_after_a_failover(cluster: Cluster) -> None:
    async with observed(cluster.url) as (client, observer):
        replay = replay_of(client, lease=20.0)
        await replay.begin_run(WEIGHTS)
        async with replay.actor() as actor:
            await actor.join()
            await fill(actor, range(20))
            await actor.flush()
            assert (await observer.look()).run is not None
            cluster.failover(slot_of("{r}:log"))
            await fill(actor, range(20, 40))
            await actor.flush()
            with anyio.fail_after(20):
                while True:
                    try:
                        view = await observer.look()
                        break
                    except AionpredisError:
                        await anyio.sleep(0.05)
        assert view.run is not None
        assert view.run.transitions == await replay.count() == 40
        assert len(view.servers) == 3


# --- the picture -----------------------------------------------------------------------------------------------------


def test_it_fits_the_terminal_and_leaves_no_actor_out_of_the_sums() -> None:
    actors = [ActorView(f"{i:016x}", f"simulator-{i}", i, 16 * i, i // 9, float(i), 1.0) for i in range(500)]
    run = RunView(1_795_400_296_674_586, time.time() - 90, 7, 124_750, 1_996_000, 12_345_678, 987_654_321_000)
    view = View("r", time.time(), run, rate=124_750.0, older=[run], actors=actors, policy=7)
    view.readers = [ReaderView("follow:0/1", 123_456, 7_890), ReaderView("consume:learners", 1, 1, 3, 100_000)]
    view.servers = [
        ServerView(f"redis://replay-{i}.example.org:6379", 10**10, 2**34, 0, 9, 1, 123_456, 10**9, 10**9)
        for i in range(3)
    ]
    for height in (24, 60):
        console = Console(width=80, height=height, file=io.StringIO(), color_system=None, highlight=False, markup=False)
        for shown in (view, Trouble("r", view.at + 3, "no connection", view)):
            console.file.seek(0)
            console.file.truncate()
            console.print(render(shown, height=height))
            lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
            assert len(lines) <= max(height, 27)  # what is not actors has 26 here
            assert max(map(len, lines)) <= 80
            assert all("…" not in line.lstrip("…") for line in lines)  # only addresses, and where actors are left out
            (rest,) = (line.split() for line in lines if " more " in line)
            shown_rows = [line.split() for line in lines if line.startswith("simulator-")]
            assert int(rest[1]) + len(shown_rows) == 500
            total = sum(int(row[2].replace(",", "")) for row in shown_rows) + int(rest[4].replace(",", ""))
            assert total == 16 * sum(range(500))


def test_no_name_or_error_can_write_control_codes() -> None:
    bad = "\x1b[31mred\r\n\x9b2J"
    run = RunView(1_795_400_296_674_586, time.time() - 90, 7, 124_750, 1_996_000, 12_345_678, 987_654_321_000)
    view = View("r", time.time(), run, actors=[ActorView("0", bad, 1, 1, 1, 1.0, 1.0)], denied=[bad])
    view.readers = [ReaderView(bad, 1, 1)]
    view.servers = [ServerView(f"redis://{bad}", 10**10, 2**34, 0, 9, 1, 1, 1, 1)]
    console = Console(width=80, file=io.StringIO(), color_system=None, highlight=False, markup=False)
    console.print(render(Trouble("r", view.at + 3, bad, view), height=None))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert text.count("\\x1b[31mred\\r\\n\\x9b2J") >= 4
    assert all(char.isprintable() or char == "\n" for char in text)


# --- the command -----------------------------------------------------------------------------------------------------

COMMAND = [sys.executable, "-m", "aionpredis", "watch"]


@contextmanager
def started(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    environment = {name: value for name, value in os.environ.items() if name != "REDIS_URL"}
    with subprocess.Popen(
        [*COMMAND, *arguments], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def line_of(process: subprocess.Popen[str]) -> Any:
    assert process.stdout is not None
    return json.loads(process.stdout.readline())


@pytest.fixture(scope="module")
def own_server() -> Iterator[Server]:
    with make_server("valkey", port=free_port()) as server:
        yield server


@pytest.mark.one_server("the command")
def test_json_is_a_line_for_each_look_and_ctrl_c_is_a_clean_end() -> None:
    with make_server("valkey", port=free_port()) as server:
        url = f"redis://127.0.0.1:{server.port}"
        with started("r", "--url", url, "--json", "--interval", "0.05") as process:
            assert line_of(process)["run"] is None
            with redis.Redis.from_url(url) as stock:
                stock.xadd("{r}:log", {"begin": "t", "policy": "0", "schema": "s"}, id="7-0")
            until(lambda: (line_of(process)["run"] or {}).get("run") == 7, "the run is shown")
            server.stop()
            until(lambda: "error" in line_of(process), "the fault is shown")
            server.start()
            until(lambda: "error" not in line_of(process), "it goes on")
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=45)
            assert (process.returncode, errors) == (0, "")


@pytest.mark.one_server("the command")
@pytest.mark.parametrize(("arguments", "code"), [([], 0), (["--once"], 130)])
def test_a_single_look_that_was_interrupted_is_no_success(arguments: list[str], code: int) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"redis://127.0.0.1:{silent.getsockname()[1]}"
        with started("r", "--url", url, *arguments) as process:
            connection, _ = silent.accept()
            with connection:
                process.send_signal(signal.SIGINT)
                _, errors = process.communicate(timeout=45)
    assert process.returncode == code
    assert errors == ("aionpredis: interrupted by SIGINT\n" if code else "")


@pytest.mark.one_server("the command")
def test_who_reads_it_may_stop_reading(own_server: Server) -> None:
    with started("r", "--url", own_server.url, "--json", "--interval", "0.05") as process:
        line_of(process)
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        assert process.stderr.read() == ""
        assert process.wait(45) == 1


@pytest.mark.one_server("the command")
def test_live_picture_and_what_happens_to_the_server_meanwhile(own_server: Server) -> None:
    """On a terminal. The alternate screen is left at the end, and the cursor is there again."""
    ours, theirs = pty.openpty()
    environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": "80", "LINES": "24"}
    arguments = ["r", "--url", own_server.url, "--interval", "0.1"]
    with subprocess.Popen(
        [*COMMAND, *arguments], env=environment, stdout=theirs, stderr=theirs, stdin=theirs
    ) as process:
        os.close(theirs)
        output = b""
        while b"calls/s" not in output:
            output += os.read(ours, 65536)
        process.send_signal(signal.SIGINT)
        try:
            while part := os.read(ours, 65536):
                output += part
        except OSError:  # the other end is closed
            pass
        assert process.wait(45) == 0
    os.close(ours)
    assert b"no run: it was deleted, or no trainer has begun one yet" in output
    assert b"\x1b[?1049h" in output
    assert output.index(b"\x1b[?1049l") > output.index(b"\x1b[?1049h")
    assert b"\x1b[?25h" in output


@pytest.mark.one_server("the command")
@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["r"], 2, "which server? --url"),
        (["a name", "--url", "{url}"], 2, "a name has 1 to 128 of"),
        (["r", "--url", "redis://127.0.0.1:1"], 1, "no connection to redis://127.0.0.1:1"),
    ],
)
def test_errors_are_a_line_on_stderr(own_server: Server, arguments: list[str], code: int, says: str) -> None:
    with started(*(argument.format(url=own_server.url) for argument in arguments)) as process:
        output, errors = process.communicate(timeout=45)
    assert (process.returncode, output) == (code, "")
    assert says in errors
    assert errors.count("\n") == 1


@pytest.mark.one_server("the command")
def test_a_single_look_has_no_control_codes(own_server: Server) -> None:
    with started("r", "--url", own_server.url, "--once") as process:
        output, errors = process.communicate(timeout=45)
    assert (process.returncode, errors) == (0, "")
    assert "no run" in output
    assert own_server.url[-16:] in output
    assert "\x1b" not in output
