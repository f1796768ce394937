"""Epochs and followers: each committed transition once, in contiguous batches."""

from __future__ import annotations

import json
import random
import time
import tracemalloc
import warnings
from typing import Any

import anyio
import anyio.lowlevel
import numpy as np
import pytest
import redis
from numpy.typing import NDArray

import aionpredis
from aionpredis import Batches, Client, Position, Replay, ReplayGone, Run, Schema, SchemaMismatch, UsageError, streams
from aionpredis.replay.log import Seen

from .replays import SCHEMA, data_keys, fill, kill_connections, log_entries, replay_of, uids

pytestmark = pytest.mark.anyio


async def filled(client: Client, count: int, *, chunk: int = 4, flush_every: int = 10**9) -> tuple[Replay, Run]:
    """A run with the transitions 0 … count-1; with ``flush_every`` it has partial chunks, too."""
    replay = replay_of(client, chunk=chunk)
    run = await replay.begin_run()
    async with replay.actor() as actor:
        await actor.join()
        for uid in range(count):
            await fill(actor, range(uid, uid + 1))
            if uid % flush_every == flush_every - 1:
                await actor.flush()
    return replay, run


def key_of(stock: redis.Redis, index: int) -> bytes:
    run, incarnation, seq, _ = log_entries(stock)[index]
    return b"r:%d:%b:%d" % (run, incarnation.hex().encode(), seq)


@pytest.mark.parametrize(
    ("count", "chunk", "flush_every", "batch"),
    [
        (64, 4, 10**9, 8),
        (61, 4, 7, 10),
        (61, 16, 5, 3),
        (50, 7, 10**9, 100),
        (9, 4, 3, 1),
        (0, 4, 1, 8),
        (40, 4, 10**9, 6),
    ],
)
async def test_epoch_has_everything_once_in_batches_of_the_exact_size(
    url: str, count: int, chunk: int, flush_every: int, batch: int
) -> None:
    async with aionpredis.connect(url) as client:
        replay, _ = await filled(client, count, chunk=chunk, flush_every=flush_every)
        sizes = []
        found: list[int] = []
        reader = await replay.epoch(batch=batch, shuffle=False)
        async for columns in reader:
            sizes.append(len(columns["uid"]))
            found += columns["uid"].tolist()
            for name, (dtype, shape) in SCHEMA.items():
                array = columns[name]
                assert array.dtype == dtype
                assert array.shape == (sizes[-1], *shape)
                assert array.flags.c_contiguous
                assert array.flags.writeable
            assert (columns["state"] == (columns["uid"] % 256)[:, None]).all()
        full, rest = divmod(count, batch)
        assert sizes == [batch] * full + ([rest] if rest else [])
        assert found == list(range(count))
        assert reader.stats.transitions == count
        assert reader.stats.chunks == len(await _chunks(replay))
        assert sorted(await uids(await replay.epoch(batch=batch))) == found
        assert len(await uids(await replay.epoch(batch=batch, drop_last=True))) == full * batch


async def _chunks(replay: Replay) -> list[Any]:
    chunks: list[Any] = []
    await (await replay.epoch()).log.read_all(chunks)
    return chunks


async def test_order_is_that_of_the_seed(url: str) -> None:
    async with aionpredis.connect(url) as client:
        replay, _ = await filled(client, 80)
        orders = [await uids(await replay.epoch(batch=10, seed=seed)) for seed in (1, 1, 2)]
        assert orders[0] == orders[1] != orders[2]
        assert orders[0] != list(range(80))
        assert sorted(orders[0]) == list(range(80))


async def test_batches_share_no_memory(url: str) -> None:
    async with aionpredis.connect(url) as client:
        replay, _ = await filled(client, 60)
        batches = [batch async for batch in await replay.epoch(batch=10, shuffle=False)]
        for batch in batches:
            batch["uid"][:] = -1
            batch["state"][:] = 77
        again = [batch["uid"].tolist() async for batch in await replay.epoch(batch=10, shuffle=False)]
        assert [uid for uids in again for uid in uids] == list(range(60))
        for i, one in enumerate(batches):
            for other in batches[i + 1 :]:
                assert not np.shares_memory(one["uid"], other["uid"])
                assert not np.shares_memory(one["state"], other["state"])


async def test_epoch_ends_although_actors_go_on(url: str) -> None:
    async with aionpredis.connect(url) as client, aionpredis.connect(url) as other:
        replay, _ = await filled(client, 100)

        async def go_on() -> None:
            async with replay_of(other, chunk=1).actor() as actor:
                await actor.join()
                while True:
                    await fill(actor, range(1000, 1010))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(go_on)
            with anyio.fail_after(30):
                found = await uids(await replay.epoch(batch=64))
            tasks.cancel_scope.cancel()
        assert set(range(100)) <= set(found)


async def test_after_reads_what_came_since(url: str) -> None:
    async with aionpredis.connect(url) as client:
        replay, run = await filled(client, 20)
        first = await replay.epoch(batch=7)
        assert len(await uids(first)) == 20
        async with replay_of(client).actor() as actor:
            await actor.join()
            await fill(actor, range(20, 30))
        second = await replay.epoch(batch=7, after=first)
        assert sorted(await uids(second)) == list(range(20, 30))
        assert second.run == run.run
        await replay.begin_run()
        with pytest.raises(ValueError, match="after"):
            await replay.epoch(after=first)


async def test_after_a_reader_of_a_share_reads_that_share_and_another_one_is_an_error(url: str) -> None:
    async with aionpredis.connect(url) as client:
        replay, run = await filled(client, 80)
        whole = await replay.epoch(run)
        first = await replay.epoch(run, shard=(0, 2))
        for reader in (whole, first):
            await uids(reader)
        async with replay_of(client).actor() as actor:
            await actor.join()
            await fill(actor, range(80, 160))
        mine = set(await uids(await replay.epoch(run, shard=(0, 2)))) - set(range(80))
        assert 0 < len(mine) < 80
        for shard in (None, (0, 2)):
            assert set(await uids(await replay.epoch(run, after=first, shard=shard))) == mine
        for reader, other in ((first, (1, 2)), (first, (0, 1)), (whole, (0, 2))):
            with pytest.raises(UsageError, match="after= has read shard="):
                await replay.epoch(run, after=reader, shard=other)


async def test_after_a_reader_that_has_not_ended_is_an_error(url: str) -> None:
    """What it has not handed out would be read by nobody."""
    async with aionpredis.connect(url) as client:
        replay, run = await filled(client, 40)
        for first in (await replay.epoch(batch=6, shuffle=False), await replay.follow(batch=6)):
            with pytest.raises(UsageError, match="not come to its end"):
                await replay.epoch(after=first)
            async for _ in first:
                break
            with pytest.raises(UsageError, match="position"):
                await replay.epoch(after=first)
            assert sorted(await uids(await replay.epoch(after=first.position))) == list(range(6, 40))
        await replay.begin_run(keep=2)
        assert len(await uids(first)) == 34
        assert await uids(await replay.epoch(run, after=first)) == []


@pytest.mark.filterwarnings("ignore:chunk")
@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("batch", [6, 9, 16, 100])
async def test_what_drop_last_left_out_is_in_the_epoch_after(
    url: str, stock: redis.Redis, shuffle: bool, batch: int
) -> None:
    """Also what is less than a chunk, again and again, and whoever else goes on from there; but not what was missing."""
    async with aionpredis.connect(url) as client:
        replay, run = await filled(client, 41, flush_every=7)
        stock.delete(key_of(stock, 4))
        found: list[int] = []
        reader: Batches | None = None
        missing = 0
        for count in range(41, 81, 10):
            steps = [
                await replay.epoch(run, batch=batch, shuffle=shuffle, seed=count, drop_last=True, after=reader)
                for _ in range(2)
            ]
            news, again = [await uids(step) for step in steps]
            assert news == again
            found += news
            reader = steps[0]
            missing += reader.stats.missing
            rest = await replay.epoch(run, batch=batch, shuffle=shuffle, after=reader)
            left = await uids(rest)
            assert len(left) < batch
            assert sorted(found + left) == [uid for uid in range(count) if not 14 <= uid < 18]
            assert missing == 1
            assert rest.stats.missing == 0
            if not shuffle:
                assert found + left == sorted(found + left)
                assert await uids(await replay.epoch(run, shuffle=False, after=reader.position)) == left
            async with replay_of(client).actor() as actor:
                await actor.join()
                await fill(actor, range(count, count + 10))


@pytest.mark.filterwarnings("ignore:chunk")
async def test_a_missing_chunk_that_is_committed_again_is_in_the_epoch_after_with_all_its_rows(
    url: str, stock: redis.Redis
) -> None:
    """Also if a part of them was to be in a batch that was handed out without them."""
    async with aionpredis.connect(url) as client:
        replay, run = await filled(client, 12)
        key = key_of(stock, 2)
        value: Any = stock.get(key)
        stock.delete(key)
        reader = await replay.epoch(run, batch=5, shuffle=False, drop_last=True)
        assert await uids(reader) == list(range(8))
        stock.set(key, value)
        entries: Any = stock.xrange("{r}:log")
        stock.xadd("{r}:log", entries[-1][1], id=f"{run.run}-*")
        assert await uids(await replay.epoch(run, after=reader)) == list(range(8, 12))


async def test_after_what_a_shuffled_reader_left_out_there_is_a_position_at_the_end_alone(url: str) -> None:
    """That a part of it is not behind all that was read would be forgotten."""
    async with aionpredis.connect(url) as client:
        replay, run = await filled(client, 40)
        first = await replay.epoch(run, batch=33, drop_last=True, seed=3)
        found = await uids(first)
        second = await replay.epoch(run, batch=3, shuffle=False, after=first)
        for _ in range(2):
            with pytest.raises(UsageError, match="position"):
                _ = second.position
            found += (await anext(second))["uid"].tolist()
        found += await uids(second)
        assert sorted(found) == list(range(40))
        assert await uids(await replay.epoch(run, after=second.position)) == []


@pytest.mark.one_server("requests to several have many shapes, whose patterns are kept")
async def test_a_reader_keeps_nothing_of_what_it_has_handed_out(url: str) -> None:
    """Not a byte for each chunk, however long it reads."""
    async with aionpredis.connect(url) as client, anyio.create_task_group() as tasks:
        replay = replay_of(client, chunk=1)
        run = await replay.begin_run()
        async with replay.actor() as actor:
            await actor.join()
            await fill(actor, range(4000))
            await actor.flush()
            tracemalloc.start()
            try:
                reader = await replay.follow(run, batch=50)
                for _ in range(80):
                    await anext(reader)
                kept = tracemalloc.get_traced_memory()[0]
            finally:
                tracemalloc.stop()
        tasks.cancel_scope.cancel()
    assert kept < 300_000  # with 4,000 chunk ids: 900,000


@pytest.mark.parametrize("shard", [(0, 1), (1, 2)])
async def test_a_stored_position_goes_on_exactly_behind_what_was_handed_out(
    url: str, stock: redis.Redis, shard: tuple[int, int]
) -> None:
    """Whichever batch is the last before the restart, in the midst of a chunk or not, with entries that come twice."""
    async with aionpredis.connect(url) as client:
        replay = replay_of(client)
        run = await replay.begin_run()
        async with replay.actor() as actor:
            await actor.join()
            for start in range(0, 60, 6):
                await fill(actor, range(start, start + 6))
                await actor.flush()  # chunks of 4 and of 2
                entries: Any = stock.xrange("{r}:log")
                stock.xadd("{r}:log", entries[start // 12 + 1][1], id=f"{run.run}-*")
        everything = await uids(await replay.epoch(run, shuffle=False, shard=shard))
        assert len(everything) == (60 if shard == (0, 1) else len(everything))
        first = await replay.epoch(run, batch=5, shuffle=False, shard=shard)
        assert first.position == (run.run, 0, 0)
        positions = [first.position]
        seen = [0]
        async for batch in first:
            positions.append(Position(*json.loads(json.dumps(first.position))))
            seen.append(seen[-1] + len(batch["uid"]))
        assert seen[-1] == len(everything)
        for position, count in zip(positions, seen, strict=True):
            rest = await replay.epoch(run, batch=7, shuffle=False, shard=shard, after=position)
            assert rest.position == position
            assert await uids(rest) == everything[count:]
            shuffled = await replay.epoch(run, batch=7, shard=shard, after=position)
            assert sorted(await uids(shuffled)) == sorted(everything[count:])
            followed = await replay.follow(run, batch=3, shard=shard, after=position)
            if count + 3 <= len(everything):
                batch = await anext(followed)
                assert batch["uid"].tolist() == everything[count : count + 3]
        end = shuffled.position
        assert await uids(await replay.epoch(run, shard=shard, after=end)) == []
        await replay.begin_run()
        with pytest.raises(UsageError, match="after= has read run"):
            await replay.follow(after=end)


@pytest.mark.parametrize(
    "wrong", [(0.5, 2), (True, 2), (0, True), (0,), (0, 1, 2), "ab", 1, (np.float64(0), 2)], ids=str
)
async def test_a_shard_that_is_not_two_ints_is_a_usage_error(url: str, wrong: Any) -> None:
    async with aionpredis.connect(url) as client:
        replay, _ = await filled(client, 4)
        for call in (replay.epoch, replay.follow, replay.draw_chunks, replay.sampler):
            with pytest.raises(UsageError, match="shard="):
                await call(shard=wrong)
        numbers: Any = np.arange(2)
        assert await uids(await replay.epoch(shard=numbers)) == [0, 1, 2, 3]


@pytest.mark.parametrize("wrong", [-1, 0, 10**30, True, 1.5, "x"], ids=str)
async def test_what_is_no_run_is_a_usage_error(url: str, wrong: Any) -> None:
    async with aionpredis.connect(url) as client:
        replay, _ = await filled(client, 4)
        calls = (
            replay.epoch,
            replay.follow,
            replay.count,
            replay.delete_runs_before,
            replay.drop,
            replay.leftover_keys,
        )
        for call in calls:
            with pytest.raises(UsageError, match="a run is"):
                await call(wrong)
        if wrong != 10**30:
            with pytest.raises(UsageError, match="keep"):
                await replay.begin_run(keep=wrong)
        else:
            await replay.begin_run(keep=wrong)
            assert await replay.leftover_keys(streams.RIGHT_MAX) != []


async def test_where_there_is_no_position_the_error_says_what_has_one(url: str) -> None:
    async with aionpredis.connect(url) as client:
        replay, run = await filled(client, 20)
        shuffled = await replay.epoch(run, batch=5)
        await anext(shuffled)
        with pytest.raises(UsageError, match="shuffle=False"):
            _ = shuffled.position
        drawn = await replay.draw_chunks(run, batch=5)
        await anext(drawn)
        with pytest.raises(UsageError, match="shuffle=False"):
            _ = drawn.position
        for wrong in ("position", ("1", "2", "3"), (1, 2), 5):
            with pytest.raises(UsageError, match="three ints"):
                await replay.follow(run, after=wrong)  # type: ignore[arg-type]


async def test_follow_hands_out_what_comes_at_once_and_ends_with_the_run(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Client, "block_seconds", 20.0)
    async with aionpredis.connect(url) as client, aionpredis.connect(url) as other:
        replay = replay_of(client)
        run = await replay.begin_run()
        seen: list[tuple[int, float]] = []
        sent: dict[int, float] = {}

        async def read() -> None:
            async for batch in await replay_of(other).follow(run, batch=4):
                seen.extend((uid, time.monotonic()) for uid in batch["uid"].tolist())

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(read)
            async with replay.actor() as actor:
                await actor.join()
                for uid in range(42):
                    sent[uid] = time.monotonic()
                    await fill(actor, range(uid, uid + 1))
                    if uid % 4 == 3:
                        await anyio.sleep(0.005)
            await replay.begin_run(keep=2)
        assert [uid for uid, _ in seen] == list(range(42))
        delays = sorted(at - sent[uid] for uid, at in seen if uid % 4 == 3)
        assert delays[len(delays) // 2] < 10  # and not when a blocking read returns


async def test_follow_ends_when_the_log_is_emptied_or_deleted(url: str, stock: redis.Redis) -> None:
    async with aionpredis.connect(url, timeout=0.4) as client:  # blocking reads return after half of it
        for end in ("trim", "delete"):
            _, run = await filled(client, 8)
            found: list[int] = []

            async def read(run: Run = run, found: list[int] = found) -> None:
                async for batch in await replay_of(client).follow(run, batch=8):
                    found += batch["uid"].tolist()

            async with anyio.create_task_group() as tasks:
                tasks.start_soon(read)
                with anyio.fail_after(20):
                    while len(found) < 8:
                        await anyio.sleep(0.005)
                if end == "trim":
                    with stock.pipeline() as pipeline:  # nobody sees the next run's first entry
                        pipeline.xadd("{r}:log", {"begin": "x"}, id=f"{run.run + 1}-0")
                        pipeline.xtrim("{r}:log", maxlen=0, approximate=False)
                        pipeline.execute()
                else:
                    stock.delete("{r}:log")
            assert found == list(range(8))
            stock.flushall()


@pytest.mark.parametrize("kind", ["epoch", "follow", "consume"])
async def test_cancelled_steps_lose_and_double_nothing(url: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And hold nothing up: what was to be reclaimed would come a minute later."""
    monkeypatch.setattr(aionpredis.streams, "PAGE", 7)
    rng = random.Random(kind)
    async with aionpredis.connect(url) as client:
        replay, run = await filled(client, 150, chunk=2, flush_every=5)
        await replay.begin_run(keep=2)
        if kind == "consume":
            reader = await replay.consume(run, group="g", batch=9)
        else:
            reader = await (replay.epoch if kind == "epoch" else replay.follow)(run, batch=9)
        found: list[int] = []
        cancelled = 0
        with anyio.fail_after(30):
            while True:
                with anyio.move_on_after(rng.random() * 0.0002 * (1 + cancelled / 10)) as scope:
                    if kind == "consume":
                        await reader.acknowledge()
                    try:
                        batch = await anext(reader)
                    except StopAsyncIteration:
                        break
                    found += batch["uid"].tolist()
                cancelled += scope.cancelled_caught
        assert cancelled > 0
        assert sorted(found) == list(range(150))


@pytest.mark.parametrize("kind", ["epoch", "follow", "consume", "after"])
@pytest.mark.parametrize("failures", [range(2, 3), range(9, 10), range(10, 14), range(0, 200, 2)], ids=str)
async def test_a_step_that_lacked_memory_can_be_repeated_and_loses_nothing(
    url: str, kind: str, failures: range
) -> None:
    """Chunks go on from one batch into the next ones, whose memory is made before anything is asked for."""
    made = 0

    def empty(nbytes: int) -> NDArray[np.uint8]:
        nonlocal made
        made += 1
        if made - 1 in failures:
            raise MemoryError
        return np.full(nbytes, 99, np.uint8)

    async with aionpredis.connect(url) as client:
        _, run = await filled(client, 40, chunk=10, flush_every=16)
        replay = client.replay("r", SCHEMA, empty=empty)
        await replay.begin_run(keep=2)
        skipped = 0
        if kind == "consume":
            reader = await replay.consume(run, group="g", batch=3)
        elif kind == "after":
            skipped = 6
            reader = await replay.follow(run, batch=3, after=(run.run, 1, skipped))
        else:
            reader = await (replay.epoch if kind == "epoch" else replay.follow)(run, batch=3)
        found: list[int] = []
        kept = []  # so that each batch has memory of its own
        with anyio.fail_after(20):
            while True:
                try:
                    batch = await anext(reader)
                except MemoryError:
                    continue
                except StopAsyncIteration:
                    break
                kept.append(batch)
                assert (batch["state"] == (batch["uid"] % 256)[:, None]).all()
                found += batch["uid"].tolist()
                if kind == "consume":
                    await reader.acknowledge()
        assert made > failures[0]
        assert sorted(found) == list(range(skipped, 40))
        assert reader.stats.transitions == 40 - skipped


async def test_memory_that_is_lacking_for_good_is_an_error_of_each_step_behind_what_has_it(url: str) -> None:
    made = 0

    def empty(nbytes: int) -> NDArray[np.uint8]:
        nonlocal made
        made += 1
        if made > 2 * len(SCHEMA):
            raise MemoryError
        return np.full(nbytes, 99, np.uint8)

    async with aionpredis.connect(url) as client:
        await filled(client, 40)
        reader = await client.replay("r", SCHEMA, empty=empty).epoch(batch=6, shuffle=False)
        kept = [await anext(reader), await anext(reader)]  # the third one lacks memory before they have arrived
        for _ in range(3):
            with pytest.raises(MemoryError):
                await anext(reader)
        assert [uid for batch in kept for uid in batch["uid"].tolist()] == list(range(12))


@pytest.mark.filterwarnings("ignore:chunk")
async def test_step_cancelled_while_a_missing_chunk_is_looked_for(
    url: str, stock: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with aionpredis.connect(url) as client:
        replay, _ = await filled(client, 40)
        stock.delete(key_of(stock, 3))
        reader = await replay.epoch(batch=8, shuffle=False)
        get_value = client.get_value
        scope = anyio.CancelScope()

        async def slow(key: Any) -> Any:
            scope.cancel()
            await anyio.lowlevel.checkpoint()
            return await get_value(key)

        monkeypatch.setattr(client, "get_value", slow)
        found: list[int] = []
        with scope:
            async for batch in reader:
                found += batch["uid"].tolist()
        assert scope.cancelled_caught
        monkeypatch.undo()
        found += await uids(reader)
        assert found == [uid for uid in range(40) if not 12 <= uid < 16]


async def test_missing_chunk_is_counted_warned_of_and_skipped(url: str, stock: redis.Redis) -> None:
    async with aionpredis.connect(url) as client:
        replay, _ = await filled(client, 40)
        key = key_of(stock, 3)
        stock.delete(key)
        reader = await replay.epoch(batch=10, shuffle=False)
        with pytest.warns(RuntimeWarning, match=key.decode()):
            found = await uids(reader)
        assert found == [uid for uid in range(40) if not 12 <= uid < 16]
        stats = reader.stats
        assert (stats.missing, stats.evicted, stats.chunks, stats.transitions) == (1, 0, 9, 36)


async def test_a_warning_that_is_an_error_does_not_stop_the_reader(url: str, stock: redis.Redis) -> None:
    async with aionpredis.connect(url) as client:
        replay, _ = await filled(client, 40)
        stock.delete(key_of(stock, 9))
        reader = await replay.epoch(batch=10, shuffle=False)
        found: list[int] = []
        with pytest.raises(RuntimeWarning):
            async for batch in reader:
                found += batch["uid"].tolist()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found += await uids(reader)
        assert found == list(range(36))
        assert reader.stats.missing == client.stats().lost == 1


async def test_all_chunks_missing(url: str, stock: redis.Redis) -> None:
    async with aionpredis.connect(url) as client:
        replay, _ = await filled(client, 10)
        stock.delete(*data_keys(stock))
        reader = await replay.epoch(batch=2)
        with pytest.warns(RuntimeWarning):
            assert await uids(reader) == []
        assert reader.stats.missing == 3


async def test_evicted_chunk_is_counted_and_skipped_without_a_warning(url: str, stock: redis.Redis) -> None:
    async with aionpredis.connect(url) as client:
        replay, _ = await filled(client, 40)
        reader = await replay.epoch(batch=8, shuffle=False)
        chunks: list[Any] = []
        reader._source._found = chunks  # type: ignore[attr-defined]
        await reader.log.read_all(chunks)  # it knows of them, and then:
        entries: Any = stock.xrange("{r}:log")
        stock.delete(key_of(stock, 0), key_of(stock, 9))
        stock.xdel("{r}:log", entries[1][0], entries[10][0])
        assert await uids(reader) == list(range(4, 36))
        assert (reader.stats.evicted, reader.stats.missing) == (2, 0)


async def test_data_that_is_deleted_while_it_is_looked_for_is_not_missing(
    url: str, stock: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with aionpredis.connect(url) as client:
        replay, _ = await filled(client, 8)
        stock.delete(key_of(stock, 0))
        get_value = client.get_value

        async def then_delete(key: Any) -> Any:
            value = await get_value(key)
            stock.xtrim("{r}:log", maxlen=0, approximate=False)
            return value

        monkeypatch.setattr(client, "get_value", then_delete)
        reader = await replay.epoch(shuffle=False)
        assert await uids(reader) == [4, 5, 6, 7]
        assert (reader.stats.evicted, reader.stats.missing) == (1, 0)


async def test_repeated_and_disordered_log_entries(url: str, stock: redis.Redis) -> None:
    """A commit may come twice, and after a full server seq 2 before 1."""
    async with aionpredis.connect(url) as client:
        replay, run = await filled(client, 24)
        entries: Any = stock.xrange("{r}:log")
        fields = [fields for _, fields in entries[1:]]
        stock.xtrim("{r}:log", minid=f"{run.run}-1000", approximate=False)
        for number, seq in enumerate([0, 2, 2, 1, 0, 3, 5, 3, 1]):
            stock.xadd("{r}:log", fields[seq], id=f"{run.run}-{1000 + number}")
        reader = await replay.epoch(run, batch=100, shuffle=False)
        found = await uids(reader)
        assert sorted(found) == [*range(16), *range(20, 24)]
        assert found[4:8] == [8, 9, 10, 11]
        assert (reader.stats.duplicates, reader.stats.gaps) == (4, 1)


def test_seen_is_bounded_by_what_is_in_flight() -> None:
    seen = Seen()
    order = list(range(1000))
    for start in range(0, 1000, 4):
        order[start : start + 4] = reversed(order[start : start + 4])
    for seq in order:
        assert seen.add(seq)
        assert not seen.add(seq)
        assert seen.ranges <= 3
    assert seen.gaps == 0
    for seq in (*range(1001, 3000), *range(3500, 4000), 3200):  # 1000 and others never come
        assert seen.add(seq)
    assert seen.ranges == 4
    assert seen.gaps == 1 + 499
    assert not any(seen.add(seq) for seq in (0, 999, 1001, 2999, 3200, 3500, 3999))
    assert seen.add(1000)
    assert seen.ranges == 3


async def test_entry_that_is_no_commit_is_an_error_each_time(url: str, stock: redis.Redis) -> None:
    async with aionpredis.connect(url) as client:
        replay, run = await filled(client, 8)
        stock.xadd("{r}:log", {"foreign": "x"}, id=f"{run.run}-99")
        reader = await replay.epoch()
        for _ in range(2):
            with pytest.raises(aionpredis.CorruptValue):
                await uids(reader)


async def test_chunk_with_other_columns_is_a_schema_mismatch(url: str) -> None:
    async with aionpredis.connect(url) as client:
        await filled(client, 8)
        other = client.replay("r", Schema(x="f4"))
        with pytest.raises(SchemaMismatch):
            await uids(await other.epoch())


async def test_columns_without_bytes_and_scalars(url: str) -> None:
    schema = Schema(nothing=("float32", (0,)), flag="bool", x=("float64", (2, 1)))
    async with aionpredis.connect(url) as client:
        replay = client.replay("r", schema, chunk=3)
        await replay.begin_run()
        async with replay.actor() as actor:
            await actor.join()
            for i in range(20):
                await actor.append(nothing=np.empty(0, np.float32), flag=i % 2 == 0, x=np.full((2, 1), i, float))
        batches = [batch async for batch in await replay.epoch(batch=8, shuffle=False)]
        assert [batch["nothing"].shape for batch in batches] == [(8, 0), (8, 0), (4, 0)]
        assert np.concatenate([batch["x"] for batch in batches])[:, 1, 0].tolist() == list(range(20))


async def test_leaving_the_loop_leaves_the_client_usable(url: str) -> None:
    async with aionpredis.connect(url) as client:
        replay, _ = await filled(client, 400)
        for _ in range(5):
            async for batch in await replay.epoch(batch=8):
                assert len(batch["uid"]) == 8
                break
            assert await client.get("x") is None
        assert sorted(await uids(await replay.epoch())) == list(range(400))


@pytest.mark.parametrize("kind", ["epoch", "follow"])
async def test_broken_connections_lose_and_double_nothing(url: str, stock: redis.Redis, kind: str) -> None:
    async with aionpredis.connect(url) as client:
        replay, run = await filled(client, 200, chunk=2)
        if kind == "follow":
            await replay.begin_run(keep=2)
        reader = await (replay.epoch(run, batch=10) if kind == "epoch" else replay.follow(run, batch=10))
        found: list[int] = []
        async for batch in reader:
            found += batch["uid"].tolist()
            if len(found) % 50 == 0:
                kill_connections(stock)
        assert sorted(found) == list(range(200))


async def test_follower_survives_that_its_blocking_connection_is_killed(url: str, stock: redis.Redis) -> None:
    async with aionpredis.connect(url) as client, aionpredis.connect(url) as other:
        replay = replay_of(client)
        run = await replay.begin_run()
        found: list[int] = []

        async def read() -> None:
            found.extend(await uids(await replay_of(other).follow(run, batch=4)))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(read)
            async with replay.actor() as actor:
                await actor.join()
                for first in range(0, 40, 8):
                    await fill(actor, range(first, first + 8))
                    await actor.flush()  # four broken connections in a row would be given up
                    kill_connections(stock)
            await replay.begin_run(keep=2)
        assert sorted(found) == list(range(40))  # a chunk whose commit was broken off may come after the next


async def test_without_any_run_there_is_nothing_to_read(url: str) -> None:
    async with aionpredis.connect(url) as client:
        replay = replay_of(client)
        for call in (replay.epoch, replay.follow, replay.count):
            with pytest.raises(ReplayGone):
                await call()
        await replay.begin_run()
        with pytest.raises(ValueError, match="batch"):
            await replay.epoch(batch=0)
