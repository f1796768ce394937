"""Actors: what "acknowledged" means, backpressure, and what is left behind when something dies."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anyio
import anyio.lowlevel
import numpy as np
import pytest
import redis

import aionpredis
from aionpredis import Actor, Client, ReplayGone, Run, RunEnded, Schema, SchemaMismatch, Server, ServerError, UsageError
from aionpredis.errors import ConnectError
from aionpredis.replay.actor import MAX_BUFFERS
from aionpredis.replicas import Replicas

from .proxy import Faults, Proxy
from .replays import (
    LEASE,
    SCHEMA,
    data_keys,
    fill,
    kept_keys,
    kill_connections,
    log_entries,
    named_keys,
    pause,
    replay_of,
    uids,
    unnamed_without_ttl,
)
from .servers import make_server, until

pytestmark = pytest.mark.anyio


@asynccontextmanager
async def joined(client: Client, **options: float) -> AsyncIterator[Actor]:
    """An actor in the first run."""
    replay = replay_of(client, **options)  # type: ignore[arg-type]
    await replay.begin_run()
    async with replay.actor() as actor:
        await actor.join()
        yield actor


async def test_acknowledged_is_in_the_log_and_has_no_time_to_live(url: str, stock: redis.Redis) -> None:
    async with aionpredis.connect(url) as client, joined(client) as actor:
        await fill(actor, range(10))
        await actor.flush()
        assert actor.stats.acknowledged == 10
        assert [(seq, rows) for _, _, seq, rows in log_entries(stock)] == [(0, 4), (1, 4), (2, 2)]
        keys = data_keys(stock)
        assert keys == named_keys(stock)
        assert len(keys) == 3
        assert {stock.pttl(key) for key in keys} == {-1}


async def test_acknowledged_grows_only_after_log_and_persist(url: str, stock: redis.Redis) -> None:
    async with aionpredis.connect(url) as client, joined(client, chunk=1) as actor:
        for uid in range(25):
            await fill(actor, range(uid, uid + 1))
            known = actor.stats.acknowledged
            assert known <= sum(rows for *_, rows in log_entries(stock))
            assert known <= len(kept_keys(stock))
            assert unnamed_without_ttl(stock) == set()


async def test_rows_are_pending_until_acknowledged(url: str) -> None:
    async with aionpredis.connect(url) as client, joined(client) as actor:
        await fill(actor, range(3))
        assert (actor.stats.appended, actor.stats.pending) == (3, 3)
        await actor.flush()
        assert (actor.stats.appended, actor.stats.acknowledged, actor.stats.pending) == (3, 3, 0)
        assert actor.stats.chunks == 1


async def test_stats_add_up_over_runs(url: str) -> None:
    async with aionpredis.connect(url) as client, joined(client) as actor:
        replay = replay_of(client)
        await fill(actor, range(6))
        await actor.flush()
        await replay.begin_run(keep=2)
        await fill(actor, range(6, 9))
        with pytest.raises(RunEnded):
            await actor.flush()
        await actor.join()
        assert (actor.stats.acknowledged, actor.stats.stale, actor.stats.pending) == (6, 3, 0)
        await fill(actor, range(20, 22))
        await actor.flush()
        assert (actor.stats.appended, actor.stats.acknowledged, actor.stats.stale) == (11, 8, 3)


async def test_leaving_the_block_commits(url: str) -> None:
    async with aionpredis.connect(url) as client:
        async with joined(client) as actor:
            await fill(actor, range(5))
        assert actor.stats.acknowledged == 5
        assert sorted(await uids(await replay_of(client).epoch())) == list(range(5))


async def test_leaving_the_block_by_an_exception_commits_and_raises_it(url: str) -> None:
    async with aionpredis.connect(url) as client:
        with pytest.raises(ZeroDivisionError):
            async with joined(client) as actor:
                await fill(actor, range(5))
                raise ZeroDivisionError
        assert await replay_of(client).count() == 5


async def test_append_without_a_run_is_a_usage_error(url: str) -> None:
    async with aionpredis.connect(url) as client, replay_of(client).actor() as actor:
        with pytest.raises(UsageError, match="join"):
            await fill(actor, range(1))
        with pytest.raises(UsageError, match="join"):
            await actor.flush()


async def test_a_column_may_be_called_self(url: str) -> None:
    async with aionpredis.connect(url) as client:
        replay = client.replay("r", Schema(self="int64"))
        await replay.begin_run()
        async with replay.actor() as actor:
            with pytest.raises(UsageError, match="join"):
                await actor.append(self=1)


async def test_append_that_is_not_awaited_is_an_error(url: str) -> None:
    async with aionpredis.connect(url) as client, joined(client, chunk=1) as actor:
        row = {"state": np.zeros(3, np.uint8), "uid": 1, "terminated": False}
        forgotten: list[Awaitable[None]] = []
        with pytest.raises(UsageError, match="await"):
            while len(forgotten) < 1000:
                forgotten += [actor.append(**row)]
        for coroutine in forgotten:
            await coroutine
        await actor.flush()
        assert actor.stats.acknowledged == len(forgotten)


async def test_append_that_was_cancelled_while_it_waited_does_not_break_the_actor(url: str, stock: redis.Redis) -> None:
    async with aionpredis.connect(url) as client, joined(client, chunk=1) as actor:
        await actor.flush()
        pause(stock, 20_000)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(fill, actor, range(actor.buffers + 9))
            while not actor.stats.waits:
                await anyio.sleep(0.01)
            tasks.cancel_scope.cancel()
        stock.client_unpause()
        assert actor.stats.waits == 1
        appended = actor.stats.appended
        assert appended == actor.buffers
        await fill(actor, range(appended, actor.buffers + 9))
        await actor.flush()
        assert sorted(await uids(await replay_of(client).epoch())) == list(range(actor.buffers + 9))


async def test_full_buffers_make_append_wait_and_other_tasks_go_on(url: str, stock: redis.Redis) -> None:
    async with aionpredis.connect(url) as client, joined(client) as actor:
        pause(stock, 20_000)
        ticks = 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                await anyio.sleep(0.01)
                ticks += 1

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(tick)
            tasks.start_soon(fill, actor, range(4 * actor.buffers + 20))
            while not (actor.stats.waits and ticks > 3):
                await anyio.sleep(0.01)
            assert actor.stats.pending == actor.stats.appended == 4 * actor.buffers
            tasks.cancel_scope.cancel()
        stock.client_unpause()


async def test_fence_ends_the_run_and_nothing_old_is_in_the_new_run(url: str, stock: redis.Redis) -> None:
    async with aionpredis.connect(url) as client, joined(client) as actor:
        replay = replay_of(client)
        await fill(actor, range(3))
        run = await replay.begin_run(keep=2)
        with pytest.raises(RunEnded) as caught:
            await fill(actor, range(3, 100_000))
        assert caught.value.run == run.run - 1
        with pytest.raises(UsageError):
            await fill(actor, range(1))
        assert await actor.join() == run
        await fill(actor, range(200, 206))
        await actor.flush()
        assert sorted(await uids(await replay.epoch())) == list(range(200, 206))
        assert await uids(await replay.epoch(run.run - 1)) == []
        assert [seq for number, _, seq, _ in log_entries(stock) if number == run.run] == [0, 1]
        assert data_keys(stock) == named_keys(stock)  # what was refused was deleted at once


async def test_join_waits_for_a_newer_run_any_number_of_times(url: str) -> None:
    async with aionpredis.connect(url) as client, joined(client) as actor:
        replay = replay_of(client)
        for number in range(6):
            await fill(actor, range(number, number + 1))
            async with anyio.create_task_group() as waiting:
                waiting.start_soon(actor.join)
                while actor.stats.acknowledged <= number:  # it commits what was appended
                    await anyio.sleep(0.001)
                waiting.cancel_scope.cancel()
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(replay.begin_run)
                await actor.join()
        assert actor.stats.acknowledged == 6


async def test_join_waits_for_the_first_run(url: str) -> None:
    async with aionpredis.connect(url) as client, replay_of(client).actor() as actor:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(replay_of(client).begin_run)
            run = await actor.join()
        assert run == await replay_of(client).latest_run()


async def test_deleted_log_is_replay_gone_and_nothing_is_left(url: str, stock: redis.Redis) -> None:
    async with aionpredis.connect(url) as client, joined(client) as actor:
        stock.delete("{r}:log")
        with pytest.raises(ReplayGone):
            await fill(actor, range(100_000))
        assert not stock.exists("{r}:log")
        while actor.stats.pending:
            await anyio.sleep(0.01)
        assert data_keys(stock) == set()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(replay_of(client).begin_run)
            await actor.join()
        await fill(actor, range(4))
        await actor.flush()


async def test_replay_that_was_deleted_and_made_anew_refuses_old_actors(url: str) -> None:
    async with aionpredis.connect(url) as client, joined(client) as actor:
        replay = replay_of(client)
        for _ in range(3):
            await replay.begin_run()
        with pytest.raises(RunEnded):
            await fill(actor, range(100_000))
        await actor.join()
        await replay.delete()
        await replay.begin_run()  # in the same second
        with pytest.raises((RunEnded, ReplayGone)):
            await fill(actor, range(100_000))
        assert await uids(await replay.epoch()) == []


async def test_other_columns_are_a_schema_mismatch(url: str) -> None:
    async with aionpredis.connect(url) as client:
        await client.replay("r", Schema(x="f4")).begin_run()
        async with replay_of(client).actor() as actor:
            for _ in range(2):
                with pytest.raises(SchemaMismatch):
                    await actor.join()


async def test_several_actors_share_a_client(url: str) -> None:
    async with aionpredis.connect(url) as client:
        replay = replay_of(client)
        await replay.begin_run()

        async def act(first: int) -> None:
            async with replay.actor() as actor:
                await actor.join()
                await fill(actor, range(first, first + 50))

        async with anyio.create_task_group() as tasks:
            for first in range(0, 500, 50):
                tasks.start_soon(act, first)
        assert sorted(await uids(await replay.epoch())) == list(range(500))


@pytest.mark.parametrize("seed", range(2))
async def test_broken_connections_lose_nothing_and_double_nothing(url: str, stock: redis.Redis, seed: int) -> None:
    rng = random.Random(seed)
    async with aionpredis.connect(url) as client, aionpredis.connect(url) as other, joined(client) as actor:
        for uid in range(0, 400, 20):
            await fill(actor, range(uid, uid + 20))
            if rng.random() < 0.5:
                await anyio.sleep(rng.random() * 0.002)
                kill_connections(stock)
                assert unnamed_without_ttl(stock) == set()
        await actor.flush()
        assert actor.stats.acknowledged == 400
        assert sorted(await uids(await replay_of(other).epoch())) == list(range(400))
        assert data_keys(stock) == named_keys(stock)
        assert {stock.pttl(key) for key in data_keys(stock)} == {-1}


async def test_repeated_commit_of_an_ended_run_is_found_in_the_log(url: str, stock: redis.Redis) -> None:
    async with aionpredis.connect(url) as client, joined(client) as actor:
        run = actor.run
        assert run is not None
        key = b"r:%d:%b:0" % (run.run, actor.incarnation.hex().encode())
        # As an earlier attempt left them, whose replies were lost.
        stock.set(key, "data", px=60_000)
        stock.xadd("{r}:log", {"c": actor.incarnation + bytes(4) + (4).to_bytes(4, "little")}, id=f"{run.run}-1")
        await replay_of(client).begin_run(keep=2)
        with pytest.raises(RunEnded):
            await fill(actor, range(4))
            await actor.flush()
        assert stock.pttl(key) == -1
        assert actor.stats.acknowledged == 4


async def test_lease_that_ran_out_is_begun_again(url: str, stock: redis.Redis) -> None:
    async with aionpredis.connect(url) as client, joined(client, lease=0.2) as actor:
        for first in range(0, 16, 4):
            await fill(actor, range(first, first + 4))
            pause(stock, 150)  # more than half a lease, somewhere in a commit
            await actor.flush()
        assert data_keys(stock) == named_keys(stock)
        assert {stock.pttl(key) for key in data_keys(stock)} == {-1}
        assert sorted(await uids(await replay_of(client).epoch())) == list(range(16))


async def test_lease_is_begun_again_before_xadd_if_half_of_it_is_over(
    url: str, stock: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the key could be gone between XADD and PERSIST."""
    passed = 0.0
    monkeypatch.setattr("aionpredis.replay.commit.time", SimpleNamespace(monotonic=lambda: time.monotonic() + passed))
    async with aionpredis.connect(url) as client, joined(client) as actor:
        for seconds, renewed in ((0, False), (31, True)):
            stock.config_resetstat()
            pause(stock, 20_000)
            await fill(actor, range(4))
            while not all(commit.leased for commit in actor._committer._commits()):  # until its SET is sent
                await anyio.sleep(0.001)
            passed += seconds
            stock.client_unpause()
            await actor.flush()
            calls = stock.info("commandstats")
            assert ("cmdstat_pexpire" in calls) == renewed
            assert calls["cmdstat_xadd"]["calls"] == 1


@pytest.mark.one_server("a proxy is in front of it")
async def test_a_renewal_that_arrives_late_does_not_let_acknowledged_data_expire(
    url: str, stock: redis.Redis, tmp_path: Path
) -> None:
    """After more than half of the lease, over a connection that is given up; the chunk is committed over another one."""
    first = Faults()
    with Proxy(url, tmp_path, [first]) as proxy:
        async with aionpredis.connect(proxy.url) as client, aionpredis.connect(url) as other:
            await replay_of(other).begin_run()
            async with replay_of(client, lease=0.4).actor() as actor:
                await actor.join()
                await fill(actor, range(4))
                await actor.flush()
                await fill(actor, range(4, 8))
                time.sleep(0.25)  # noqa: ASYNC251  # this host stands still
                first.stalled = True
                await anyio.sleep(0.01)
                connection = client.live_connection()
                assert connection is not None
                connection.abort(aionpredis.ConnectionLost("no answer"))
                await actor.flush()
                assert actor.stats.acknowledged == 8
                assert proxy.connections == 2
                first.stalled = False
                await anyio.sleep(0.5)
                assert {stock.pttl(key) for key in data_keys(stock)} == {-1}
                assert sorted(await uids(await replay_of(other).epoch())) == list(range(8))


@pytest.mark.one_server("MONITOR shows what one server gets")
async def test_commands_have_the_options_that_the_rules_need(url: str, stock: redis.Redis) -> None:
    async with aionpredis.connect(url) as client, joined(client) as actor:
        stock.rename("{r}:log", "{r}:hidden")
        stock.set("{r}:log", "not a stream")
        with stock.monitor() as monitor:  # type: ignore[no-untyped-call]
            with pytest.raises(ServerError):
                await fill(actor, range(100_000))
            stock.rename("{r}:hidden", "{r}:log")
            await actor.join()  # the same run again
            await fill(actor, range(100, 104))
            await actor.flush()
            stock.echo("end")
            commands: list[str] = []
            while not commands or "end" not in commands[-1]:
                commands.append(monitor.next_command()["command"])
        assert [c.split()[0] for c in commands if c.split()[0] in ("SET", "XADD", "PERSIST")][-3:] == [
            "SET",
            "XADD",
            "PERSIST",
        ]
        assert all(" NX " in c and " PX " in c for c in commands if c.startswith("SET r:"))
        assert all(" NOMKSTREAM " in c for c in commands if c.startswith("XADD"))
        assert all(c.endswith(" XX") for c in commands if c.startswith("PEXPIRE"))
        assert sorted(await uids(await replay_of(client).epoch())) == list(range(100, 104))


async def test_after_an_error_the_actor_joins_the_same_run_again(url: str, stock: redis.Redis) -> None:
    async with aionpredis.connect(url) as client, joined(client, lease=LEASE) as actor:
        await fill(actor, range(4))
        await actor.flush()
        stock.rename("{r}:log", "{r}:hidden")
        stock.set("{r}:log", "not a stream")
        with pytest.raises(ServerError, match="WRONGTYPE"):
            await fill(actor, range(100, 100_000))
        stock.rename("{r}:hidden", "{r}:log")
        run = await actor.join()
        await fill(actor, range(4, 9))
        await actor.flush()
        assert sorted(await uids(await replay_of(client).epoch(run))) == list(range(9))
        until(lambda: data_keys(stock) == named_keys(stock), "what was given up is gone")


@pytest.mark.one_server("each server of a cluster has users of its own")
async def test_no_slice_leads_across_what_was_given_up(url: str, stock: redis.Redis) -> None:
    """The last chunk before it is in the log; an episode may have ended in what was given up."""
    stock.execute_command("ACL", "SETUSER", "half", "on", ">secret", "~*", "+@all", "-persist")  # type: ignore[no-untyped-call]
    try:
        async with aionpredis.connect(url, username="half", password="secret") as client, joined(client) as actor:
            await fill(actor, range(4))
            while not actor._committer.over:
                await anyio.sleep(0.01)
            with pytest.raises(ServerError, match="PERSIST"):
                await fill(actor, range(4, 12))
            stock.execute_command("ACL", "SETUSER", "half", "+persist")  # type: ignore[no-untyped-call]
            await actor.join()
            await fill(actor, range(12, 16))
            await actor.flush()
            assert actor.stats.stale >= 4
            (_, _, before, _), (_, _, after, _) = log_entries(stock)
            assert after > before + 1
    finally:
        stock.execute_command("ACL", "DELUSER", "half")  # type: ignore[no-untyped-call]


async def test_lanes_join_the_same_run_again_after_an_error_of_one(url: str, stock: redis.Redis) -> None:
    async with aionpredis.connect(url) as client:
        await replay_of(client).begin_run()
        async with replay_of(client).vector_actor(2) as lanes:
            await lanes.join()
            stock.rename("{r}:log", "{r}:hidden")
            stock.set("{r}:log", "not a stream")
            row = {"state": np.zeros((2, 3), np.uint8), "uid": np.arange(2), "terminated": np.zeros(2, bool)}
            with anyio.fail_after(20):
                with pytest.raises(ServerError, match="WRONGTYPE"):
                    while True:
                        await lanes.append(**row)
                stock.rename("{r}:hidden", "{r}:log")
                run = await lanes.join()
                for _ in range(8):
                    await lanes.append(**(row | {"uid": np.arange(2, 4)}))
                await lanes.flush()
            assert lanes.run == run
            # Of those before, the lane that had met no error yet may have committed some.
            found = [uid async for batch in await replay_of(client).epoch(run) for uid in batch["uid"]]
            assert sorted(uid for uid in found if uid >= 2) == [2] * 8 + [3] * 8


async def test_lanes_that_join_while_a_run_takes_the_number_of_a_lost_one_go_to_the_same(
    url: str, stock: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with aionpredis.connect(url) as client:
        replay = replay_of(client)
        lost = await replay.begin_run()
        async with replay.vector_actor(3) as lanes:
            join = lanes.actors[1].join

            async def join_later() -> Run:  # than the first
                assert lanes.actors[0].run == lost
                monkeypatch.setattr(lanes.actors[1], "join", join)
                begin: Any = {"begin": "other", "policy": "0", "schema": SCHEMA.digest}
                stock.delete("{r}:log")
                stock.xadd("{r}:log", begin, id=f"{lost.run}-0")
                return await join()

            monkeypatch.setattr(lanes.actors[1], "join", join_later)
            with anyio.fail_after(10):
                run = await lanes.join()
            assert (run.run, run.token) == (lost.run, b"other")
            assert all(actor.run == run for actor in lanes.actors)
            row = {"state": np.zeros((3, 3), np.uint8), "uid": np.arange(3), "terminated": np.zeros(3, bool)}
            await lanes.append(**row)
            await lanes.flush()
        assert await replay.count(run) == 3


@pytest.mark.parametrize("how", ["fails", "is cancelled"])
async def test_lanes_that_were_opened_are_left_when_the_next_one(
    how: str, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    checks = 0
    entered: list[Actor] = []
    left: list[Actor] = []
    enter, leave = Actor.__aenter__, Actor.__aexit__

    async def entering(actor: Actor) -> Actor:
        await enter(actor)
        entered.append(actor)
        return actor

    async def leaving(actor: Actor, *error: Any) -> bool | None:
        left.append(actor)
        return await leave(actor, *error)

    async with aionpredis.connect(url) as client:
        with anyio.CancelScope() as scope:

            async def check(replicas: Replicas, shards: object) -> None:
                nonlocal checks
                checks += 1
                if checks == 3:
                    if how == "fails":
                        raise ConnectError("no replica")
                    scope.cancel()
                await anyio.lowlevel.checkpoint()

            monkeypatch.setattr(Actor, "__aenter__", entering)
            monkeypatch.setattr(Actor, "__aexit__", leaving)
            monkeypatch.setattr(Replicas, "check", check)
            try:
                async with replay_of(client, replicas=1).vector_actor(4):
                    pytest.fail("it was opened")
            except ConnectError:
                assert how == "fails"
        assert scope.cancelled_caught is (how == "is cancelled")
        assert len(entered) == 2
        assert left == entered[::-1]
        await client.execute("PING")


@pytest.mark.parametrize("kind", ["valkey", "redis"])
async def test_actor_waits_while_the_server_is_full(kind: str) -> None:
    with make_server(kind) as server, redis.Redis.from_url(server.url) as stock:
        async with aionpredis.connect(server.url) as client, joined(client, lease=0.3) as actor:
            stock.set("ballast", bytes(20 << 20))
            stock.config_set("maxmemory", "10mb")
            async with anyio.create_task_group() as tasks:
                count = 4 * actor.buffers + 20
                tasks.start_soon(fill, actor, range(count))
                while not actor.stats.waits:
                    await anyio.sleep(0.01)
                await anyio.sleep(0.5)
                assert actor.stats.acknowledged == 0
                assert actor.stats.pending == 4 * actor.buffers
                stock.config_set("maxmemory", "0")
            await actor.flush()
            assert sorted(await uids(await replay_of(client).epoch())) == list(range(count))
            assert data_keys(stock) == named_keys(stock)
            assert {stock.pttl(key) for key in data_keys(stock)} == {-1}


async def test_actor_whose_tasks_are_cancelled_before_its_owner_hears_of_it_is_left_at_once(url: str) -> None:
    async with aionpredis.connect(url) as client:
        replay = replay_of(client)
        await replay.begin_run()
        with anyio.fail_after(20), anyio.CancelScope() as scope:
            async with replay.actor() as actor:
                await actor.join()
                await fill(actor, range(3))
                scope.cancel()
                with anyio.CancelScope(shield=True):
                    await anyio.sleep(0.01)
        assert scope.cancelled_caught


async def test_actor_whose_client_was_closed_says_so_and_ends(url: str) -> None:
    async with aionpredis.connect(url) as client:
        await replay_of(client).begin_run()
    with anyio.fail_after(20), pytest.raises(UsageError, match="not open"):
        async with AsyncExitStack() as stack:
            client = await stack.enter_async_context(aionpredis.connect(url))
            async with replay_of(client).actor() as actor:
                await actor.join()
                await fill(actor, range(2))  # no chunk is full
                await stack.aclose()


@pytest.mark.parametrize("count", [2, 3, 4, 5, 9])
async def test_an_actor_whose_client_was_closed_says_so_at_every_call(url: str, stock: redis.Redis, count: int) -> None:
    """Whether a chunk of 4 is on its way or none: what was given up must not look flushed."""
    async with AsyncExitStack() as stack:
        client = await stack.enter_async_context(aionpredis.connect(url))
        replay = replay_of(client)
        await replay.begin_run()
        with anyio.fail_after(20), pytest.raises(UsageError, match="not open"):
            async with replay.actor() as actor:
                await actor.join()
                pause(stock, 200)
                await fill(actor, range(count))
                await anyio.wait_all_tasks_blocked()
                await stack.aclose()
                for call in (actor.flush, actor.flush, actor.join, lambda: fill(actor, range(4))):
                    with pytest.raises(UsageError, match="not open"):
                        await call()
                assert actor.stats.acknowledged < actor.stats.appended


async def test_flush_of_a_cancelled_actor_is_an_error_and_no_hang(url: str) -> None:
    """Who has shielded it: the tasks that would do the work are gone."""
    async with aionpredis.connect(url) as client:
        replay = replay_of(client)
        await replay.begin_run()
        with anyio.fail_after(20), anyio.CancelScope() as scope:
            async with replay.actor() as actor:
                await actor.join()
                await fill(actor, range(50))
                try:
                    scope.cancel()
                    await anyio.sleep(1)
                finally:
                    with anyio.CancelScope(shield=True), pytest.raises(UsageError, match="cancelled"):
                        await actor.flush()
                    with anyio.CancelScope(shield=True), pytest.raises(UsageError):
                        await fill(actor, range(1000))
        assert scope.cancelled_caught


@pytest.mark.parametrize("delay", [0.0, 0.0005, 0.002])
async def test_cancellation_leaves_nothing_unnamed(url: str, stock: redis.Redis, delay: float) -> None:
    async with aionpredis.connect(url) as client:
        replay = replay_of(client, chunk=1, lease=0.1)
        await replay.begin_run()
        actor = replay.actor()
        with anyio.CancelScope() as scope:
            async with actor:
                await actor.join()
                await fill(actor, range(50))
                scope.deadline = anyio.current_time() + delay
                while True:
                    await fill(actor, range(4))
        assert unnamed_without_ttl(stock) == set()
        until(lambda: data_keys(stock) <= named_keys(stock), "what was not committed is gone")
        assert actor.stats.acknowledged <= len(data_keys(stock))
        assert await client.exists("x") == 0  # the client is usable


KILLED = """
import sys, anyio, numpy as np, aionpredis
from tests.replays import LEASE, fill, replay_of
async def main():
    async with aionpredis.connect(sys.argv[1]) as client, replay_of(client, chunk=2, lease=LEASE).actor() as actor:
        await actor.join()
        uid = 0
        while True:
            await fill(actor, range(uid, uid + 50))
            uid += 50
            print(actor.stats.acknowledged, flush=True)
anyio.run(main)
"""


@pytest.mark.parametrize("seed", range(1))
def test_killed_process_leaves_nothing_unnamed_after_one_lease(url: str, stock: redis.Redis, seed: int) -> None:
    async def begin() -> None:
        async with aionpredis.connect(url) as client:
            await replay_of(client).begin_run()

    anyio.run(begin)
    with subprocess.Popen([sys.executable, "-c", KILLED, url], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        acknowledged = int(process.stdout.readline())
        deadline = time.monotonic() + random.Random(seed).uniform(0, 0.1)
        while time.monotonic() < deadline:
            assert unnamed_without_ttl(stock) == set()
        process.send_signal(signal.SIGKILL)
        acknowledged = max([acknowledged, *map(int, process.stdout.read().split())])
    assert unnamed_without_ttl(stock) == set()
    until(lambda: data_keys(stock) <= named_keys(stock), "what was not committed is gone")
    assert 2 * len(data_keys(stock)) >= acknowledged > 0
    # A chunk that the log names and that is gone was not acknowledged: the actor died between XADD and PERSIST.
    assert len(named_keys(stock) - data_keys(stock)) <= MAX_BUFFERS


HUNGRY = """
import resource, sys, anyio, numpy as np, aionpredis
from aionpredis import Schema
async def main():
    async with aionpredis.connect(sys.argv[1]) as client:
        replay = client.replay("big", Schema(state=("uint8", (1 << 18,))), chunk=4)
        await replay.begin_run()
        state = np.ones(1 << 18, np.uint8)
        async with replay.actor() as actor:
            await actor.join()
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            for number in range(1600):
                await actor.append(state=state)
            await actor.flush()
            after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            print(actor.stats.waits, actor.stats.acknowledged, (after - before) // 1024)
anyio.run(main)
"""


def test_memory_is_bounded_however_slow_the_server_is(tmp_path: Path) -> None:
    """400 MB through a bottleneck of 200 MB/s: a few buffers of 1 MB, and not 400."""
    with Server() as server, Proxy(server.url, tmp_path) as slow:
        slow.pause = slow.chunk / 200e6
        done = subprocess.run(
            [sys.executable, "-c", HUNGRY, slow.url], capture_output=True, text=True, check=True, timeout=50
        )
    waits, acknowledged, grown = map(int, done.stdout.split())
    assert acknowledged == 1600
    assert waits > 20
    assert grown < 4 + 64
