"""Limits of a replay: capacity with eviction, learners that fall behind, runs that are dropped, learners that share."""

from __future__ import annotations

import itertools
from collections import Counter
from functools import partial
from typing import Any

import anyio
import numpy as np
import pytest
import redis

import aionpredis
from aionpredis import Actor, Client, Fifo, Replay, RunEnded, Uniform, UsageError
from aionpredis.replay.commit import MAX_SURPLUS
from aionpredis.replay.reader import LOOK_AGAIN
from aionpredis.replay.selection import Selection

from .replays import SCHEMA, data_keys, fill, log_entries, named_keys, replay_of, uids

pytestmark = pytest.mark.anyio


def limited(client: Client, **options: Any) -> Replay:
    return client.replay("r", SCHEMA, chunk=4, lease=20, **options)


async def appended(replay: Replay, numbers: range) -> None:
    async with replay.actor() as actor:
        await actor.join()
        await fill(actor, numbers)


async def test_a_run_keeps_its_capacity_and_loses_the_oldest(url: str, stock: redis.Redis) -> None:
    async with aionpredis.connect(url) as client:
        replay = limited(client, capacity=160)
        run = await replay.begin_run()
        await appended(replay, range(1000))
        kept = sorted(await uids(await replay.epoch(run)))
        assert kept == list(range(1000 - len(kept), 1000))
        assert (
            160 <= len(kept) <= 160 + 2 * 4 * MAX_SURPLUS
        )  # an eviction that is due when the actor leaves is the next one's
        assert data_keys(stock) == named_keys(stock)
        assert stock.xrange("{r}:log", count=1)[0][0] == f"{run.run}-0".encode()  # type: ignore[index]


async def test_many_actors_evict_together_and_what_one_leaves_the_next_takes(url: str, stock: redis.Redis) -> None:
    async with aionpredis.connect(url) as client:
        replay = limited(client, capacity=80)
        await replay.begin_run()
        async with anyio.create_task_group() as tasks:
            for actor in range(4):
                tasks.start_soon(appended, replay, range(1000 * actor, 1000 * actor + 400))
        # Somebody died between its commit and the eviction: chunks that are long over the capacity.
        without = limited(client)
        await appended(without, range(5000, 5200))
        assert len(data_keys(stock)) >= 50 > 20 + MAX_SURPLUS
        await appended(replay, range(6000, 6200))
        assert len(data_keys(stock)) <= 20 + MAX_SURPLUS
        assert data_keys(stock) == named_keys(stock)


async def test_a_sampler_draws_only_what_the_capacity_keeps(url: str, stock: redis.Redis) -> None:
    async with aionpredis.connect(url) as client:
        replay = limited(client, capacity=160)
        await replay.begin_run()
        sampler = await replay.sampler(batch=64)
        async with replay.actor() as actor:
            await actor.join()
            for start in range(0, 2000, 100):
                await fill(actor, range(start, start + 100))
                await actor.flush()
                await sampler.refresh()
                drawn = (await sampler.sample())["uid"]
                assert drawn.min() >= start + 100 - 160
                assert len(sampler) <= 160
        assert sampler.stats.lost == 0


async def test_drawn_chunks_are_only_what_the_capacity_keeps(url: str) -> None:
    async with aionpredis.connect(url) as client:
        replay = limited(client, capacity=160)
        await replay.begin_run()
        batches = await replay.draw_chunks(batch=4 * LOOK_AGAIN)
        async with replay.actor() as actor:
            await actor.join()
            for start in range(0, 2000, 100):
                await fill(actor, range(start, start + 100))
                await actor.flush()
                drawn = (await anext(batches))["uid"]
                assert set(drawn.tolist()) == set(range(max(0, start + 100 - 160), start + 100))
        assert (batches.stats.evicted, batches.stats.missing) == (0, 0)


async def test_readers_count_what_was_evicted_before_they_came_to_it(url: str) -> None:
    async with aionpredis.connect(url) as client:
        replay = limited(client, capacity=80)
        await replay.begin_run()
        await appended(replay, range(80))
        reader = await replay.epoch(shuffle=False, batch=4)
        first = [int(uid) for uid in (await anext(reader))["uid"]]
        await appended(replay, range(80, 400))
        rest = await uids(reader)
        assert len(first + rest) == len(set(first + rest))
        assert len(first) + len(rest) + 4 * reader.stats.evicted == 80
        assert reader.stats.missing == 0


async def test_actors_wait_for_a_learner_that_is_behind_and_go_on_with_it(url: str) -> None:
    async with aionpredis.connect(url) as client:
        replay = limited(client, max_lag=40)
        await replay.begin_run()
        actor: Actor
        async with replay.actor() as actor, anyio.create_task_group() as tasks:
            await actor.join()
            total = 4 * (actor.buffers + 100)
            tasks.start_soon(fill, actor, range(total))
            stalled = -1
            while actor.stats.appended != stalled or stalled < 40:
                stalled = actor.stats.appended
                await anyio.sleep(0.2)
            assert 40 <= stalled <= 40 + 4 * (2 * actor.buffers + 1)
            seen = 0
            async for batch in await replay.follow(batch=4):
                seen += len(batch["uid"])
                if seen == total:
                    break
            assert actor.stats.appended == total


async def draw(replay: Replay) -> None:
    async for _ in await replay.sampler(batch=4):
        await anyio.sleep(0.001)


async def follow(replay: Replay, shard: tuple[int, int] = (0, 1)) -> None:
    async for _ in await replay.follow(batch=4, shard=shard):
        pass


@pytest.mark.parametrize(
    ("slow", "fast"),
    [
        (lambda replay: replay.follow(batch=4), draw),
        (lambda replay: replay.sampler(batch=4, samples_per_insert=1.0), follow),
        (lambda replay: replay.follow(batch=4), partial(follow, shard=(0, 3))),
    ],
    ids=["sampler", "follow", "shard"],
)
async def test_actors_wait_for_the_slowest_of_learners_of_any_kind(url: str, slow: Any, fast: Any) -> None:
    async with aionpredis.connect(url) as client:
        replay = limited(client, max_lag=40)
        await replay.begin_run()
        async with replay.actor() as actor, anyio.create_task_group() as tasks:
            await actor.join()
            slowest = await slow(replay)
            tasks.start_soon(fill, actor, range(100_000))
            for _ in range(10):
                await anext(slowest)
            tasks.start_soon(fast, replay)
            stalled = -1
            while actor.stats.appended != stalled:
                stalled = actor.stats.appended
                await anyio.sleep(0.2)
            assert stalled <= 40 + 40 + 4 * (2 * actor.buffers + 1)
            while actor.stats.appended < stalled + 200:
                await anext(slowest)
            tasks.cancel_scope.cancel()


@pytest.mark.parametrize("learners", [1, 3])
async def test_a_small_lag_holds_nobody_for_ever(url: str, learners: int) -> None:
    async with aionpredis.connect(url) as client:
        replay = limited(client, max_lag=4)
        run = await replay.begin_run()
        found: list[int] = []

        async def learn(index: int) -> None:
            async for batch in await replay.follow(run, batch=3, shard=(index, learners)):
                found.extend(batch["uid"].tolist())

        async with anyio.create_task_group() as tasks:
            for index in range(learners):
                tasks.start_soon(learn, index)
            await appended(replay, range(400))
            await replay.begin_run(keep=2)
        assert sorted(found) == list(range(400))


async def test_samples_per_insert_with_a_lag_holds_the_actors_back(url: str) -> None:
    async with aionpredis.connect(url) as client:
        replay = limited(client, max_lag=40)
        await replay.begin_run()
        sampler = await replay.sampler(batch=8, samples_per_insert=0.5)
        async with anyio.create_task_group() as tasks, replay.actor() as actor:
            await actor.join()
            tasks.start_soon(fill, actor, range(2000))
            for _ in range(50):  # 400 samples, so 800 inserts
                await sampler.sample()
            while actor.stats.appended < 800:
                await anyio.sleep(0.01)
            await anyio.sleep(0.1)
            assert actor.stats.appended <= 800 + 40 + 4 * (2 * actor.buffers + 1)
            tasks.cancel_scope.cancel()


@pytest.mark.parametrize(
    "options",
    [
        {"min_size": 41, "samples_per_insert": 8.0, "batch": 8},
        {"samples_per_insert": 0.5, "batch": 21},
        {"min_size": 11, "samples_per_insert": 8.0, "batch": 8, "shard": (1, 4)},
        {"samples_per_insert": 0.5, "batch": 6, "shard": (0, 4)},
    ],
    ids=str,
)
async def test_limits_that_wait_for_each_other_are_a_usage_error(url: str, options: dict[str, Any]) -> None:
    async with aionpredis.connect(url) as client:
        replay = limited(client, max_lag=40)
        await replay.begin_run()
        with pytest.raises(UsageError, match="max_lag"):
            await replay.sampler(**options)


@pytest.mark.parametrize("options", [{"min_size": 41}, {"min_size": 11, "shard": (1, 4)}], ids=str)
async def test_a_minimum_that_the_capacity_never_keeps_is_a_usage_error(url: str, options: dict[str, Any]) -> None:
    async with aionpredis.connect(url) as client:
        replay = limited(client, capacity=38)  # ten chunks
        await replay.begin_run()
        with pytest.raises(UsageError, match="capacity"):
            await replay.sampler(**options)
        await replay.sampler(**options | {"min_size": options["min_size"] - 1})


async def test_a_minimum_above_the_lag_is_reached_where_all_that_was_seen_counts_as_read(url: str) -> None:
    async with aionpredis.connect(url) as client:
        replay = limited(client, max_lag=8)
        await replay.begin_run()
        async with anyio.create_task_group() as tasks, replay.actor() as actor:
            await actor.join()
            total = 4 * (actor.buffers + 100)
            tasks.start_soon(fill, actor, range(total))
            sampler = await replay.sampler(batch=8, min_size=total, shard=(0, 1))
            with anyio.fail_after(20):
                await sampler.sample()


@pytest.mark.parametrize("selection", [Fifo, Uniform])
async def test_a_queue_of_slices_goes_on_although_not_every_transition_is_the_first_of_one(
    url: str, selection: type[Selection]
) -> None:
    async with aionpredis.connect(url) as client:
        schema = aionpredis.Schema(uid="int64", terminated="bool")
        replay = client.replay("r", schema, chunk=4, max_lag=40)
        await replay.begin_run()
        options: dict[str, Any] = {"length": 4, "max_times_sampled": 1, "samples_per_insert": 1.0}
        sampler = await replay.sampler(batch=8, selection=selection(), **options)

        async def act() -> None:
            async with replay.actor() as actor:
                await actor.join()
                for uid in itertools.count():
                    await actor.append(uid=uid, terminated=uid % 10 == 9)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(act)
            with anyio.fail_after(40):
                while sampler.stats.sampled < 600:
                    await sampler.sample()
            tasks.cancel_scope.cancel()


async def test_an_actor_that_flushes_is_not_held_and_a_group_holds_nobody_back(url: str) -> None:
    async with aionpredis.connect(url) as client:
        replay = limited(client, max_lag=4)
        run = await replay.begin_run()
        async with replay.actor() as actor:
            await actor.join()
            with anyio.fail_after(20):
                for uid in range(40):
                    await fill(actor, range(uid, uid + 1))
                    await actor.flush()
        await replay.begin_run(keep=2)
        batches = await replay.consume(run, group="g", batch=4)
        async for _ in batches:
            await batches.acknowledge()
        assert not await client.call("EXISTS", "{r}:read")


async def test_an_actor_that_waits_for_a_learner_notices_the_next_run(url: str) -> None:
    async with aionpredis.connect(url) as client:
        replay = limited(client, max_lag=8)
        await replay.begin_run()
        async with replay.actor() as actor, anyio.create_task_group() as tasks:
            await actor.join()

            async def act() -> None:
                with pytest.raises(RunEnded):
                    await fill(actor, range(100_000))

            tasks.start_soon(act)
            await anyio.sleep(0.2)
            await replay.begin_run()


async def test_learners_that_share_a_run_read_each_chunk_once_together(url: str) -> None:
    async with aionpredis.connect(url) as client:
        replay = replay_of(client)
        run = await replay.begin_run()
        for actor in range(3):
            await appended(replay, range(1000 * actor, 1000 * actor + 400))
        shares = [await uids(await replay.epoch(run, shard=(index, 3))) for index in range(3)]
        everything = Counter(uid for share in shares for uid in share)
        assert everything == Counter({1000 * actor + uid: 1 for actor in range(3) for uid in range(400)})
        assert min(map(len, shares)) > 200  # of 400: six standard deviations of a random choice of chunks
        again = await uids(await replay.epoch(run, shard=(1, 3), seed=1))
        assert sorted(again) == sorted(shares[1])
        sampler = await replay.sampler(batch=400, shard=(1, 3))
        assert set((await sampler.sample())["uid"].tolist()) <= set(shares[1])


@pytest.mark.parametrize("shard", [(1, 1), (-1, 2), (0, 0)], ids=str)
async def test_a_wrong_shard_is_a_usage_error(url: str, shard: tuple[int, int]) -> None:
    async with aionpredis.connect(url) as client:
        replay = replay_of(client)
        await replay.begin_run()
        with pytest.raises(UsageError, match="shard"):
            await replay.epoch(shard=shard)


async def test_dropping_a_run_deletes_a_commit_that_stands_where_its_lost_beginning_stood(
    url: str, stock: redis.Redis
) -> None:
    async with aionpredis.connect(url) as client:
        replay = replay_of(client)
        first = await replay.begin_run()
        run = await replay.begin_run(keep=5)
        async with replay.actor() as actor:
            await actor.join()
            begin: Any = {"begin": first.token, "policy": "0", "schema": first.schema}
            stock.delete("{r}:log")  # as a failover does
            stock.xadd("{r}:log", begin, id=f"{first.run}-0")
            await fill(actor, range(12))
            await actor.flush()
        assert stock.xrange("{r}:log", f"{run.run}-0", f"{run.run}-0")
        await replay.begin_run(keep=5)
        assert await replay.drop(run) == 3
        assert data_keys(stock) == set()
        assert stock.xrange("{r}:log", f"{run.run}-0", f"{run.run}-99") == []
        assert await replay.drop(run) == 0


async def test_dropping_a_run_deletes_it_and_no_other(url: str, stock: redis.Redis) -> None:
    async with aionpredis.connect(url) as client:
        replay = replay_of(client)
        runs = []
        for number in range(3):
            runs.append(await replay.begin_run(keep=3))
            await appended(replay, range(100 * number, 100 * number + 20))
        assert await replay.drop(runs[1]) == 5
        assert [sorted(await uids(await replay.epoch(run))) for run in runs] == [
            list(range(20)),
            [],
            list(range(200, 220)),
        ]
        assert data_keys(stock) == named_keys(stock)
        assert {run for run, *_ in log_entries(stock)} == {runs[0].run, runs[2].run}
        assert await replay.drop(runs[1]) == 0
        with pytest.raises(UsageError, match="newest"):
            await replay.drop(runs[2])


@pytest.mark.parametrize("option", ["capacity", "max_lag"])
@pytest.mark.parametrize("value", [0, 3, True, 1.5])
async def test_a_limit_below_a_chunk_is_a_usage_error(url: str, option: str, value: object) -> None:
    async with aionpredis.connect(url) as client:
        with pytest.raises(UsageError, match=option):
            limited(client, **{option: value})


async def test_a_full_float_column_survives_eviction_in_between(url: str) -> None:
    """Large columns are asked for row by row while chunks vanish; what comes is always a whole transition."""
    async with aionpredis.connect(url) as client:
        schema = aionpredis.Schema(state=("float64", (800,)), uid="int64")
        replay = client.replay("wide", schema, chunk=4, capacity=64)
        await replay.begin_run()
        sampler = await replay.sampler(batch=32)

        async def act() -> None:
            async with replay.actor() as actor:
                await actor.join()
                for uid in range(3000):
                    await actor.append(state=np.full(800, uid, np.float64), uid=uid)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(act)
            for _ in range(100):
                batch = await sampler.sample()
                assert (batch["state"] == batch["uid"][:, None]).all()
