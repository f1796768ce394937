"""Consumer groups: at least once, acknowledged, reclaimed."""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Collection
from typing import Any

import anyio
import anyio.lowlevel
import pytest
import redis

import aionpredis
from aionpredis import Batches, Client, ConnectionLost, Replay, UsageError
from aionpredis.replay.log import Begin, ChunkId

from .replays import fill, kill_connections, replay_of

pytestmark = pytest.mark.anyio


async def appended(replay: Replay, numbers: range) -> None:
    async with replay.actor() as actor:
        await actor.join()
        await fill(actor, numbers)


async def consume(batches: Batches, seen: list[int], *, acknowledge: bool = True) -> None:
    async for batch in batches:
        assert (batch["state"] == (batch["uid"] % 256)[:, None]).all()
        seen += batch["uid"].tolist()
        if acknowledge:
            await batches.acknowledge()


async def prepared(client: Client, count: int = 200) -> Replay:
    replay = replay_of(client)
    await replay.begin_run()
    await appended(replay, range(count))
    return replay


async def test_readers_of_a_group_share_a_run_that_grows_and_ends(url: str) -> None:
    async with aionpredis.connect(url) as client:
        replay = await prepared(client)
        run = await replay.latest_run()
        seen: list[list[int]] = [[], [], []]
        async with anyio.create_task_group() as tasks:
            for mine in seen:
                tasks.start_soon(consume, await replay.consume(run, group="g", batch=6), mine)
            await appended(replay, range(200, 1000))
            await replay.begin_run(keep=2)
        assert Counter(uid for mine in seen for uid in mine) == Counter(range(1000))


async def test_groups_do_not_disturb_each_other(url: str) -> None:
    async with aionpredis.connect(url) as client:
        replay = await prepared(client)
        run = await replay.latest_run()
        await replay.begin_run(keep=2)
        for group in ("a", "b"):
            seen: list[int] = []
            await consume(await replay.consume(run, group=group), seen)
            assert sorted(seen) == list(range(200))


async def test_what_a_reader_did_not_acknowledge_goes_to_another(url: str) -> None:
    async with aionpredis.connect(url) as client:
        replay = await prepared(client)
        run = await replay.latest_run()
        dead = await replay.consume(run, group="g", batch=8, reclaim=0.3)
        lost = (await anext(dead))["uid"].tolist()
        await dead.acknowledge()
        lost_and_unacknowledged = (await anext(dead))["uid"].tolist()
        await replay.begin_run(keep=2)
        seen: list[int] = []
        await consume(await replay.consume(run, group="g", batch=8, reclaim=0.3), seen)
        assert set(seen) >= set(lost_and_unacknowledged)
        assert not set(seen) & set(lost)
        assert set(seen + lost) == set(range(200))  # twice what it did not acknowledge within that time itself


async def test_a_batch_that_is_not_full_is_not_held_back(url: str) -> None:
    async with aionpredis.connect(url) as client:
        replay = await prepared(client, 10)
        batches = await replay.consume(group="g", batch=256, reclaim=0.4)
        with anyio.fail_after(20):
            batch = await anext(batches)
        assert sorted(batch["uid"].tolist()) == list(range(10))
        await batches.acknowledge()


@pytest.mark.parametrize("ended", [False, True])
async def test_a_batch_that_is_not_full_comes_however_short_the_steps_are(url: str, ended: bool) -> None:
    """Repeated, a step does not begin to wait anew."""
    async with aionpredis.connect(url) as client:
        replay = await prepared(client, 10)
        run = await replay.latest_run()
        if ended:
            await replay.begin_run(keep=2)
        batches = await replay.consume(run, group="g", batch=256)
        found: list[int] = []
        with anyio.fail_after(20):
            while not found:
                with anyio.move_on_after(0.2):
                    found = (await anext(batches))["uid"].tolist()
        assert sorted(found) == list(range(10))


async def test_a_batch_is_full_while_chunks_come_one_by_one(url: str) -> None:
    """Whoever is faster than the actors does not train on less."""
    async with aionpredis.connect(url) as client, anyio.create_task_group() as tasks:
        replay = await prepared(client, 0)
        batches = await replay.consume(group="g", batch=12)

        async def act() -> None:
            async with replay.actor() as actor:
                await actor.join()
                for start in range(0, 12, 4):
                    await anyio.sleep(0.05)
                    await fill(actor, range(start, start + 4))
                    await actor.flush()

        tasks.start_soon(act)
        assert sorted((await anext(batches))["uid"].tolist()) == list(range(12))


def let_lie(stock: redis.Redis, run: Begin, consumer: str, ids: list[bytes], seconds: int) -> None:
    """These are given to the reader of this name, as of so many seconds ago."""
    stock.execute_command("XCLAIM", "{r}:log", f"g:{run.run}", consumer, 0, *ids, "IDLE", seconds * 1000)  # type: ignore[no-untyped-call]


async def test_what_waits_for_its_batch_longer_than_reclaim_is_not_in_it_twice(url: str, stock: redis.Redis) -> None:
    async with aionpredis.connect(url) as client:
        replay = await prepared(client, 10)
        run = await replay.latest_run()
        assert run is not None
        batches = await replay.consume(run, group="g", batch=256)
        with anyio.move_on_after(0.5):
            await anext(batches)
        ids = [b"%d-%d" % (run.run, number) for number in range(1, 4)]
        let_lie(stock, run, batches._source._consumer, ids, 120)  # type: ignore[attr-defined]
        assert sorted((await anext(batches))["uid"].tolist()) == list(range(10))


@pytest.mark.parametrize("ask", ["_read", "_claim"])
async def test_what_a_cancelled_step_was_given_comes_with_the_next_and_nothing_twice(
    url: str, stock: redis.Redis, monkeypatch: pytest.MonkeyPatch, ask: str
) -> None:
    """And what was handed out has lain as long as before: a learner that only reads on is slow, too."""
    async with aionpredis.connect(url) as client:
        replay = await prepared(client, 8)
        run = await replay.latest_run()
        assert run is not None
        batches = await replay.consume(run, group="g", batch=4, reclaim=1000)
        source: Any = batches._source
        found = (await anext(batches))["uid"].tolist()
        let_lie(stock, run, source._consumer, [b"%d-1" % run.run], 500)
        await appended(replay, range(8, 16))
        if ask == "_claim":
            ids = [b"%d-3" % run.run, b"%d-4" % run.run]
            stock.xreadgroup(f"g:{run.run}", "dead", {"{r}:log": ">"})
            let_lie(stock, run, "dead", ids, 2000)
        scope = anyio.CancelScope()
        given = getattr(source, ask)

        async def cancelled(*arguments: Any) -> Any:
            entries = await given(*arguments)
            if entries:
                scope.cancel()
                await anyio.lowlevel.checkpoint()
            return entries

        monkeypatch.setattr(source, ask, cancelled)
        with scope:
            while True:
                found += (await anext(batches))["uid"].tolist()
        assert scope.cancelled_caught
        monkeypatch.undo()
        with anyio.fail_after(10):
            while len(found) < 16:
                found += (await anext(batches))["uid"].tolist()
        assert sorted(found) == list(range(16))
        pending: Any = stock.xpending_range("{r}:log", f"g:{run.run}", f"{run.run}-1", f"{run.run}-1", 1)
        assert pending[0]["time_since_delivered"] >= 500_000


async def test_what_a_lost_reply_had_given_comes_when_its_connection_is_known_to_be_broken(
    url: str, stock: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of it twice, though a loader's user acknowledges meanwhile; and what is deleted holds nobody up."""
    async with aionpredis.connect(url) as client:
        replay = await prepared(client, 8)
        run = await replay.latest_run()
        assert run is not None
        batches = await replay.consume(run, group="g", batch=4)
        found = (await anext(batches))["uid"].tolist()
        await appended(replay, range(8, 20))
        consumer = batches._source._consumer  # type: ignore[attr-defined]
        stock.xreadgroup(f"g:{run.run}", consumer, {"{r}:log": ">"})
        stock.xdel("{r}:log", f"{run.run}-5")
        await replay.begin_run(keep=2)
        kill_connections(stock)
        call = client.call

        async def meanwhile(*arguments: Any, **options: Any) -> Any:
            answer = await call(*arguments, **options)
            if arguments[0] == "XPENDING":
                monkeypatch.undo()
                await batches.acknowledge()
            return answer

        monkeypatch.setattr(client, "call", meanwhile)
        with anyio.fail_after(10):
            await consume(batches, found)
        assert sorted(found) == list(range(16))
        assert stock.xpending("{r}:log", f"g:{run.run}")["pending"] == 0


async def test_a_broken_connection_loses_nothing(url: str, stock: redis.Redis) -> None:
    async with aionpredis.connect(url) as client:
        replay = await prepared(client)
        run = await replay.latest_run()
        seen: list[int] = []
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(consume, await replay.consume(run, group="g", batch=4, reclaim=0.2), seen)
            for start in range(200, 600, 40):
                await appended(replay, range(start, start + 40))
                kill_connections(stock)
            await replay.begin_run(keep=2)
        assert set(seen) == set(range(600))


async def test_groups_of_older_runs_are_deleted_and_end_their_readers(url: str, stock: redis.Redis) -> None:
    async with aionpredis.connect(url) as client:
        replay = await prepared(client)
        first = await replay.latest_run()
        old = await replay.consume(first, group="g", batch=8)
        await anext(old)
        second = await replay.begin_run(keep=2)
        await appended(replay, range(1000, 1010))
        await replay.begin_run(keep=3)
        seen: list[int] = []
        await consume(await replay.consume(second, group="g"), seen)
        assert sorted(seen) == list(range(1000, 1010))
        assert [group["name"] for group in stock.xinfo_groups("{r}:log")] == [f"g:{second.run}".encode()]
        await consume(old, seen, acknowledge=False)  # ends


async def test_a_reader_of_a_group_has_no_position_and_nothing_goes_on_after_it(url: str) -> None:
    """It does not know what the others of its group have read."""
    async with aionpredis.connect(url) as client:
        replay = await prepared(client, 8)
        run = await replay.latest_run()
        await replay.begin_run(keep=2)
        batches = await replay.consume(run, group="g", batch=4)

        async def check() -> None:
            with pytest.raises(UsageError, match="position"):
                _ = batches.position
            with pytest.raises(UsageError, match="Go on with consume"):
                await replay.epoch(run, after=batches)

        await check()
        async for _ in batches:
            await check()
            await batches.acknowledge()
        await check()


def take_away(stock: redis.Redis, run: Begin, *, evict: bool) -> None:
    """The data of all chunks behind the second, and their entries."""
    entries: Any = stock.xrange("{r}:log", f"{run.run}-3", f"{run.run}-999")
    for entry_id, fields in entries:
        incarnation, seq, _ = struct.unpack_from("<8sII", fields[b"c"])
        stock.delete(b"r:%d:%b:%d" % (run.run, incarnation.hex().encode(), seq))
        if evict:
            stock.xdel("{r}:log", entry_id)


@pytest.mark.filterwarnings("ignore:chunk")
@pytest.mark.parametrize("evict", [False, True])
async def test_chunks_that_are_gone_do_not_keep_a_reader_from_its_end(
    url: str, stock: redis.Redis, evict: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last batches have no row, so nobody is handed out anything to acknowledge; and the step may be cancelled."""
    async with aionpredis.connect(url) as client:
        replay = await prepared(client, 40)
        run = await replay.latest_run()
        assert run is not None
        await replay.begin_run(keep=2)
        batches = await replay.consume(run, group="g", batch=8)  # reclaim: 60 s
        await batches._source.more()  # it has taken them, and then:
        batches._groups = batches._next_groups()
        await anyio.to_thread.run_sync(lambda: take_away(stock, run, evict=evict))
        seen: list[int] = []
        scope = anyio.CancelScope()
        acknowledge = batches._source.acknowledge  # type: ignore[attr-defined]

        async def cancelled_once(chunks: Collection[ChunkId]) -> None:
            if len(chunks) == 8 and not scope.cancel_called:
                scope.cancel()
            await acknowledge(chunks)

        monkeypatch.setattr(batches._source, "acknowledge", cancelled_once)
        with anyio.fail_after(20):
            with scope:
                await consume(batches, seen)
            assert scope.cancelled_caught
            await consume(batches, seen)
        assert seen == list(range(8))
        assert (batches.stats.missing, batches.stats.evicted) == ((0, 8) if evict else (8, 0))
        assert stock.xpending("{r}:log", f"g:{run.run}")["pending"] == 0


async def test_what_is_handed_out_while_others_are_acknowledged_is_acknowledged_next_time(
    url: str, stock: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by a loader, which reads on in a task of its own."""
    async with aionpredis.connect(url) as client:
        replay = await prepared(client, 24)
        run = await replay.latest_run()
        assert run is not None
        batches = await replay.consume(run, group="g", batch=8)
        await anext(batches)
        call = client.call

        async def meanwhile(*arguments: Any, **options: Any) -> Any:
            monkeypatch.undo()
            answer = await call(*arguments, **options)
            await anext(batches)
            return answer

        async def broken(*arguments: Any, **options: Any) -> Any:
            monkeypatch.undo()
            await anext(batches)
            raise ConnectionLost("broken")

        monkeypatch.setattr(client, "call", meanwhile)
        await batches.acknowledge()
        assert stock.xpending("{r}:log", f"g:{run.run}")["pending"] == 4
        monkeypatch.setattr(client, "call", broken)
        with pytest.raises(ConnectionLost):
            await batches.acknowledge()
        await batches.acknowledge()
        assert stock.xpending("{r}:log", f"g:{run.run}")["pending"] == 0


async def test_wrong_use_is_a_usage_error(url: str) -> None:
    async with aionpredis.connect(url) as client:
        replay = await prepared(client, 4)
        with pytest.raises(UsageError, match="consume"):
            await (await replay.epoch()).acknowledge()
        with pytest.raises(UsageError, match="reclaim"):
            await replay.consume(group="g", reclaim=0)
        with pytest.raises(UsageError, match="name"):
            await replay.consume(group="a:b")
