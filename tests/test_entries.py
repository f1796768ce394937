"""Entries that a failover took from the log, while their data stayed: who added them adds them again.

The end of the log is deleted here as if it had never come; tests/test_cluster_replay.py has it taken by a real failover.
"""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import anyio
import anyio.lowlevel
import numpy as np
import pytest
import redis

import aionpredis
from aionpredis import Client, RunEnded
from aionpredis.replay.entries import KEPT, KEPT_SECONDS, TOGETHER, LastEntries
from aionpredis.replay.log import ChunkId, Names, pack

from .replays import (
    SCHEMA,
    data_keys,
    fill,
    kept_keys,
    kill_connections,
    log_entries,
    named_keys,
    replay_of,
    uids,
    unnamed_without_ttl,
)
from .servers import make_server

pytestmark = pytest.mark.anyio

LOG = "{r}:log"


def take_entries(stock: redis.Redis, count: int) -> None:
    """The log's last ones, and all connections with them."""
    entries: Any = stock.xrevrange(LOG, count=count)
    assert len(entries) == count
    stock.xdel(LOG, *(entry for entry, _ in entries))
    kill_connections(stock)


def numbers(stock: redis.Redis) -> list[int]:
    """Of the chunks in the log, in order."""
    return [seq for _, _, seq, _ in log_entries(stock)]


async def spoil(client: Client) -> None:
    """Have the client notice that its connections were killed."""
    for key in client.topology.each():
        await client.execute("GET", key or b"any")


@pytest.mark.parametrize("lost", [3, 2 * TOGETHER + 5])
async def test_entries_that_the_log_has_lost_are_added_again_in_order(url: str, stock: redis.Redis, lost: int) -> None:
    async with aionpredis.connect(url) as client, aionpredis.connect(url) as other:
        replay = replay_of(client, chunk=1)
        run = await replay.begin_run()
        follower = await replay_of(other, chunk=1).follow(run, batch=1)
        read: list[int] = []

        async def follow() -> None:
            async for batch in follower:
                read.extend(batch["uid"].tolist())

        async with anyio.create_task_group() as tasks, replay.actor() as actor:
            tasks.start_soon(follow)
            await actor.join()
            await fill(actor, range(200))
            await actor.flush()
            with anyio.fail_after(20):
                while len(read) < 200:
                    await anyio.sleep(0.01)
            take_entries(stock, lost)
            for uid in range(200, 240):
                await fill(actor, range(uid, uid + 1))
                await anyio.sleep(0.004)  # some come while others are added again
            await actor.flush()
            assert numbers(stock)[:200] == [*range(200)]
            # On a cluster these met the faults of three connections.
            assert sorted(numbers(stock)[200:]) == [*range(200, 240)]
            assert not unnamed_without_ttl(stock)
            assert sorted(await uids(await replay.epoch(run, shuffle=False))) == [*range(240)]
            assert await replay.count(run) == 240
            with anyio.fail_after(20):
                while len(read) < 240:
                    await anyio.sleep(0.01)
            assert sorted(read) == [*range(240)]  # once each
            assert follower.stats.gaps == 0
            tasks.cancel_scope.cancel()


async def test_what_is_too_old_to_be_lost_is_forgotten(
    url: str, stock: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thousand actors would hold 700 MB otherwise."""
    passed = 0.0
    monkeypatch.setattr("aionpredis.replay.entries.time", SimpleNamespace(monotonic=lambda: time.monotonic() + passed))
    async with aionpredis.connect(url) as client:
        run = await replay_of(client).begin_run()
        entries = LastEntries(client, Names("r"), b"60000")

        def add(seqs: range) -> None:
            for seq in seqs:
                chunk = ChunkId(b"actor123", seq, 1, b"")
                stock.set(Names("r").data(run.run, chunk), b"data")
                entries.add(run.run, pack(chunk), seq + 1)

        add(range(10))
        passed += KEPT_SECONDS + 1
        add(range(10, 13))
        client.counters.changes += 1
        await entries.restore()
        assert numbers(stock) == [10, 11, 12]
        passed += KEPT_SECONDS + 1
        add(range(13, 14))
        take_entries(stock, 3)
        await spoil(client)
        await entries.restore()
        assert numbers(stock) == [13]


async def test_they_are_added_again_while_the_actor_waits_for_a_run(url: str, stock: redis.Redis) -> None:
    """The trainer may be waiting for them."""
    async with aionpredis.connect(url) as client, aionpredis.connect(url) as other:
        replay = replay_of(client)
        run = await replay.begin_run()
        async with replay_of(other).actor() as actor, anyio.create_task_group() as tasks:
            await actor.join()
            await fill(actor, range(40))
            tasks.start_soon(actor.join)
            with anyio.fail_after(20):
                while actor.run is not None:
                    await anyio.sleep(0.01)
                take_entries(stock, 4)
                while await replay.count(run) < 40:
                    await anyio.sleep(0.01)
            tasks.cancel_scope.cancel()


async def test_they_are_added_again_before_the_actor_is_left(url: str, stock: redis.Redis) -> None:
    """If anybody has noticed a fault."""
    async with aionpredis.connect(url) as client:
        replay = replay_of(client)
        run = await replay.begin_run()
        async with replay.actor() as actor:
            await actor.join()
            await fill(actor, range(40))
            await actor.flush()
            take_entries(stock, 4)
            await spoil(client)
        assert await replay.count(run) == 40


async def test_what_was_evicted_does_not_come_back(
    url: str, stock: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aionpredis.replay.commit.EVICT_SECONDS", 20)  # no commit follows the last one that evicts
    async with aionpredis.connect(url) as client:
        replay = client.replay("r", SCHEMA, chunk=4, capacity=200)
        run = await replay.begin_run()
        async with replay.actor() as actor:
            await actor.join()
            await fill(actor, range(800))
            await actor.flush()
            with anyio.fail_after(20):
                while numbers(stock) != [*range(148, 200)]:  # every sixth commit evicts, and nobody waits for that
                    await anyio.sleep(0.01)
            # One was lost with its data: it does not come back, either.
            stock.unlink(*(key for key in named_keys(stock) if key.endswith(b":180")))
            take_entries(stock, 32)
            await fill(actor, range(800, 804))
            await actor.flush()
            left = [*range(148, 180), *range(181, 201)]
            assert numbers(stock) == left
            assert await replay.count(run) == 4 * len(left)


@pytest.mark.parametrize("how", ["next run", "another run of that number", "deleted"])
async def test_data_whose_entry_can_no_longer_be_added_are_gone_after_one_lease(
    url: str, stock: redis.Redis, how: str
) -> None:
    async with aionpredis.connect(url) as client, aionpredis.connect(url) as other:
        replay, trainer = replay_of(client), replay_of(other)
        run = await trainer.begin_run()
        async with replay.actor() as actor:
            await actor.join()
            await fill(actor, range(40))
            await actor.flush()
            take_entries(stock, 4)
            if how == "next run":
                await trainer.begin_run(keep=2)
            elif how == "deleted":
                await trainer.delete()
                await trainer.begin_run()
            else:  # the beginning was lost, too
                stock.delete(LOG)
                stock.xadd(LOG, {"begin": b"another", "policy": 0, "schema": SCHEMA.digest}, id=f"{run.run}-0")
            assert len(unnamed_without_ttl(stock)) == (10 if how == "another run of that number" else 4)
            with pytest.raises((RunEnded, aionpredis.ReplayGone)):
                await fill(actor, range(40, 100_000))
            await actor.join()
            assert not unnamed_without_ttl(stock)
            assert all(stock.pttl(key) <= 60_000 for key in data_keys(stock))  # the lease
            assert len(data_keys(stock) - named_keys(stock)) == (10 if how == "another run of that number" else 4)
            assert numbers(stock) == ([*range(6)] if how == "next run" else [])


async def test_data_that_were_lent_again_by_their_own_failover_are_kept(url: str, stock: redis.Redis) -> None:
    """Its replica had missed the PERSIST."""
    async with aionpredis.connect(url) as client:
        replay = replay_of(client)
        await replay.begin_run()
        async with replay.actor() as actor:
            await actor.join()
            await fill(actor, range(40))
            await actor.flush()
            for key in kept_keys(stock):
                stock.pexpire(key, 60_000)
            take_entries(stock, 4)
            await fill(actor, range(40, 44))
            await actor.flush()
            assert kept_keys(stock) == {key for key in named_keys(stock) if int(key.rpartition(b":")[2]) > 5}


async def test_flush_says_so_if_another_run_has_taken_the_place_of_the_lost_one(url: str, stock: redis.Redis) -> None:
    async with aionpredis.connect(url) as client:
        replay = replay_of(client)
        run = await replay.begin_run()
        async with replay.actor() as actor:
            await actor.join()
            await fill(actor, range(40))
            await actor.flush()
            take_entries(stock, 4)
            stock.delete(LOG)
            stock.xadd(LOG, {"begin": b"another", "policy": 0, "schema": SCHEMA.digest}, id=f"{run.run}-0")
            await spoil(client)
            with pytest.raises(RunEnded):
                await actor.flush()
            await actor.join()  # and goes on in that one
            await fill(actor, range(4))
            await actor.flush()
        assert numbers(stock) == [11]  # 10 is left out: no slice leads from one run to the other


async def test_a_full_server_is_waited_for(url: str, stock: redis.Redis) -> None:
    if "cluster_enabled:1" in str(stock.info("cluster")) or isinstance(stock, redis.RedisCluster):
        pytest.skip("its servers would have to be filled one by one")
    async with aionpredis.connect(url) as client, anyio.create_task_group() as tasks:
        replay = replay_of(client, lease=20)
        run = await replay.begin_run()
        async with replay.actor() as actor:
            await actor.join()
            await fill(actor, range(40))
            await actor.flush()
            take_entries(stock, 4)
            stock.config_set("maxmemory", 1)
            try:
                await spoil(client)
                await actor.flush()  # there is nothing to commit
                tasks.start_soon(fill, actor, range(40, 44))
                await anyio.sleep(0.1)
                assert numbers(stock) == [*range(6)]
            finally:
                stock.config_set("maxmemory", 0)
            with anyio.fail_after(20):
                while await replay.count(run) < 44:
                    await anyio.sleep(0.01)
            assert numbers(stock) == [*range(11)]


@pytest.mark.one_server("it counts commands")
async def test_a_fault_that_took_nothing_costs_one_request(url: str, stock: redis.Redis) -> None:
    """However much was added: a thousand actors come back at once after a failover."""
    async with aionpredis.connect(url) as client:
        replay = replay_of(client, chunk=1)
        await replay.begin_run()
        async with replay.actor() as actor:
            await actor.join()
            await fill(actor, range(KEPT + 100))
            await actor.flush()
            kill_connections(stock)
            stock.config_resetstat()
            await fill(actor, range(1))
            await actor.flush()
            facts: Any = stock.info("commandstats")
            assert facts["cmdstat_xrange"]["calls"] <= TOGETHER + 2  # and for the run's beginning
            assert "cmdstat_pttl" not in facts
            assert facts["cmdstat_xadd"]["calls"] == 2  # the chunk's, and the refused one of the run's beginning


@pytest.mark.one_server("it is full of what is remembered")
async def test_only_so_many_are_remembered(url: str, stock: redis.Redis) -> None:
    async with aionpredis.connect(url) as client:
        replay = replay_of(client, chunk=1)
        await replay.begin_run()
        async with replay.actor() as actor:
            await actor.join()
            state = np.zeros(3, np.uint8)
            for uid in range(KEPT + 100):
                await actor.append(state=state, uid=uid, terminated=False)
            await actor.flush()
            take_entries(stock, KEPT + 50)
            await fill(actor, range(1))
            await actor.flush()
            assert numbers(stock) == [*range(50), *range(100, KEPT + 101)]


class Unrest:
    """Faults of other servers that never end: what the client counts grows with every step of its loop."""

    def __init__(self, client: Client) -> None:
        self._client = client

    async def go_on(self) -> None:
        while True:
            self._client.counters.changes += 1
            await anyio.lowlevel.checkpoint()


async def test_entries_come_back_while_other_servers_faults_go_on(url: str, stock: redis.Redis) -> None:
    async with aionpredis.connect(url) as client, anyio.create_task_group() as tasks:
        run = await replay_of(client).begin_run()
        actors = [LastEntries(client, Names("r"), b"60000") for _ in range(50)]
        for number, entries in enumerate(actors):
            for seq in range(TOGETHER):
                chunk = ChunkId(b"actor%03d" % number, seq, 1, b"")
                stock.set(Names("r").data(run.run, chunk), b"data")
                entries.add(run.run, pack(chunk), number * TOGETHER + seq + 1)
        tasks.start_soon(Unrest(client).go_on)
        await anyio.lowlevel.checkpoint()
        with anyio.fail_after(20):
            async with anyio.create_task_group() as restoring:
                for entries in actors:
                    restoring.start_soon(entries.restore)
        assert len(log_entries(stock)) == len(set(log_entries(stock))) == len(actors) * TOGETHER
        tasks.cancel_scope.cancel()


async def test_an_actor_goes_on_in_order_while_other_servers_faults_go_on(url: str, stock: redis.Redis) -> None:
    async with aionpredis.connect(url) as client, anyio.create_task_group() as tasks:
        replay = replay_of(client, chunk=1)
        await replay.begin_run()
        async with replay.actor() as actor:
            await actor.join()
            await fill(actor, range(20))
            await actor.flush()
            tasks.start_soon(Unrest(client).go_on)
            take_entries(stock, 4)
            with anyio.fail_after(20):
                for uid in range(20, 30):
                    await fill(actor, range(uid, uid + 1))
                    await actor.flush()
            assert numbers(stock) == [*range(30)]
            tasks.cancel_scope.cancel()


async def test_a_server_that_is_gone_raises_doubt_once_and_not_with_every_attempt() -> None:
    with make_server("valkey") as server:
        async with aionpredis.connect(server.url, retry_timeout=1) as client:
            server.stop()
            with pytest.raises(aionpredis.ConnectError):
                await client.get("k")
            assert client.stats().errors["ConnectError"] > 2
            assert client.faults.changes <= 1


async def test_what_a_replaced_server_says_afterwards_is_looked_at_again(url: str, stock: redis.Redis) -> None:
    """Its last replies may be taken when the new one has been looked at already."""
    async with aionpredis.connect(url) as client:
        run = await replay_of(client).begin_run()
        entries = LastEntries(client, Names("r"), b"60000")
        sent = client.faults.changes
        client.counters.changes += 1  # another task has met the failover
        await entries.restore()
        chunk = ChunkId(b"actor123", 0, 1, b"")
        stock.set(Names("r").data(run.run, chunk), b"data")
        entries.add(run.run, pack(chunk), 1)
        entries.sent(sent)
        assert entries.doubtful
        await entries.restore()
        assert not entries.doubtful
        assert numbers(stock) == [0]
