"""Sampling: the right transitions, with the right probabilities, while chunks come and go."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any, ClassVar

import anyio
import numpy as np
import pytest
import redis
import safetensors.numpy
from numpy.typing import NDArray

import aionpredis
from aionpredis import (
    Client,
    EncodeError,
    Fifo,
    Lifo,
    Newest,
    NotAnArray,
    NStep,
    Prioritized,
    Replay,
    RunEnded,
    Sample,
    Sampler,
    Schema,
    Shuffled,
    Uniform,
    UsageError,
    streams,
)
from aionpredis.replay.index import Ids, Index
from aionpredis.replay.log import ChunkId
from aionpredis.replay.reader import DrawSource
from aionpredis.replay.selection import Eligible, Selection

from .replays import data_keys

pytestmark = pytest.mark.anyio

WIDE = 700
"""A row of state in float64: longer than what is fetched as a whole, so it is asked for by itself."""

SCHEMA = Schema(
    state=("float64", (WIDE,)),
    uid="int64",
    reward="float32",
    flags=("uint8", (3,)),
    nothing=("uint8", (0,)),
    terminated="bool",
    truncated="bool",
)
NARROW = Schema(state=("float32", (2,)), uid="int64", reward="float32", terminated="bool", truncated="bool")

ENDLESS = Schema(state=("float32", (2,)), uid="int64", reward="float32")
"""Nothing says where an episode ends: a trajectory is one."""


def row(schema: Schema, uid: int, ends: str = "") -> dict[str, Any]:
    values: dict[str, Any] = {
        "state": np.full(schema["state"][1], uid, schema["state"][0]),
        "uid": uid,
        "reward": float(uid % 7),
        "flags": np.full(3, uid % 256, np.uint8),
        "nothing": np.zeros(0, np.uint8),
        "terminated": ends == "terminated",
        "truncated": ends == "truncated",
    }
    return {name: values[name] for name in schema}


def end_of(uid: int) -> str:
    """Episodes of 10; every third is truncated."""
    return "" if uid % 10 != 9 else "truncated" if uid % 30 == 29 else "terminated"


async def write(replay: Replay, uids: range, *, flush_every: int = 0) -> None:
    """One actor's trajectory; its chunks are full, or shorter after each flush."""
    async with replay.actor() as actor:
        await actor.join()
        for uid in uids:
            await actor.append(**row(replay.schema, uid, end_of(uid)))
            if flush_every and uid % flush_every == 0:
                await actor.flush()


async def filled(
    client: Client, count: int, *, chunk: int = 4, schema: Schema = NARROW, flush_every: int = 0, actors: int = 1
) -> Replay:
    replay = client.replay("r", schema, chunk=chunk)
    await replay.begin_run()
    share = count // actors
    for actor in range(actors):
        await write(replay, range(actor * share, (actor + 1) * share), flush_every=flush_every)
    return replay


def check(batch: Sample, schema: Schema) -> NDArray[np.int64]:
    """The columns belong together; the uids."""
    uids: NDArray[np.int64] = batch["uid"]
    assert (batch["state"] == uids[..., None]).all()
    assert np.array_equal(batch["reward"], (uids % 7).astype(np.float32))
    if "flags" in schema:
        assert (batch["flags"] == (uids % 256)[..., None]).all()
        assert batch["nothing"].shape == (*uids.shape, 0)
    assert np.array_equal(batch["terminated"] | batch["truncated"], uids % 10 == 9)
    return uids


@pytest.mark.parametrize("schema", [SCHEMA, NARROW], ids=["wide", "narrow"])
@pytest.mark.parametrize("chunk", [1, 4, 64])
async def test_every_row_is_the_transition_that_was_appended(url: str, schema: Schema, chunk: int) -> None:
    async with aionpredis.connect(url) as client:
        replay = await filled(client, 150, chunk=chunk, schema=schema, flush_every=13)
        sampler = await replay.sampler(batch=64, seed=1)
        seen: set[int] = set()
        for _ in range(12):
            batch = await sampler.sample()
            assert set(batch) == set(schema)
            assert batch.ids.shape == (64,)
            assert (batch.weights == 1).all()
            seen |= set(check(batch, schema).tolist())
        assert len(sampler) == 150
        assert len(seen) > 140


def chi_square(counts: list[int], expected: list[float]) -> float:
    return sum((count - wanted) ** 2 / wanted for count, wanted in zip(counts, expected, strict=True))


def limit(cells: int) -> float:
    """What a chi-square of so many cells exceeds once in 10,000 times (Wilson and Hilferty's approximation)."""
    degrees = cells - 1
    return degrees * (1 - 2 / (9 * degrees) + 3.72 * math.sqrt(2 / (9 * degrees))) ** 3


async def waits_after(sampler: Sampler, noticed: Callable[[], bool]) -> None:
    """A sample that is waited for: there is nothing to be drawn, which is noticed first."""
    sampled = sampler.stats.sampled
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(sampler.sample)
        with anyio.fail_after(20):
            while not noticed():
                await anyio.sleep(0.005)
        await anyio.sleep(0.1)
        tasks.cancel_scope.cancel()
    assert sampler.stats.sampled == sampled


async def draw(sampler: Sampler, batches: int) -> Counter[int]:
    drawn: Counter[int] = Counter()
    for _ in range(batches):
        drawn.update((await sampler.sample())["uid"].reshape(-1).tolist())
    return drawn


async def test_uniform_is_uniform_over_transitions_not_over_chunks(url: str) -> None:
    async with aionpredis.connect(url) as client:
        replay = await filled(client, 60, chunk=16, flush_every=7)  # chunks of 1 to 7
        sampler = await replay.sampler(batch=500, columns=["uid"], seed=3)
        drawn = await draw(sampler, 40)
        assert chi_square([drawn[uid] for uid in range(60)], [20_000 / 60] * 60) < limit(60)


async def test_drawn_chunks_are_uniform_over_transitions_however_long_they_are(url: str) -> None:
    async with aionpredis.connect(url) as client:
        replay = await filled(client, 60, chunk=16, flush_every=7)
        drawn: Counter[int] = Counter()
        batches = await replay.draw_chunks(batch=500, seed=3)
        async for batch in batches:
            drawn.update(batch["uid"].tolist())
            if drawn.total() == 40_000:
                break
        # The draws are of whole chunks of about 7, so there are as many independent ones.
        assert chi_square([drawn[uid] for uid in range(60)], [40_000 / 60] * 60) < 7 * limit(60)


async def test_priorities_are_the_probabilities(url: str) -> None:
    async with aionpredis.connect(url) as client:
        replay = await filled(client, 40)
        selection = Prioritized(alpha=0.7, beta=0.5)
        sampler = await replay.sampler(batch=200, selection=selection, columns=["uid"], seed=4)
        ids: dict[int, int] = {}
        while len(ids) < 40:
            batch = await sampler.sample()
            ids |= dict(zip(batch["uid"].tolist(), batch.ids.tolist(), strict=True))
        uids = sorted(ids)
        priorities = np.array([0.0 if uid < 3 else 0.1 + uid % 8 for uid in uids])
        sampler.update_priorities(np.array([ids[uid] for uid in uids]), priorities)
        drawn = await draw(sampler, 100)
        exact = priorities**0.7 / (priorities**0.7).sum()
        assert all(drawn[uid] == 0 for uid in range(3))
        assert chi_square([drawn[uid] for uid in uids[3:]], list(20_000 * exact[3:])) < limit(37)
        batch = await sampler.sample()
        chosen = exact[batch["uid"]]
        assert np.allclose(batch.weights, (40 * chosen) ** -0.5 / (40 * exact[exact > 0].min()) ** -0.5, rtol=1e-5)


async def test_priorities_that_change_while_a_batch_travels_do_not_spoil_its_weights(url: str) -> None:
    """A loader receives the next batch while the learner says what it thinks of the last one: 0, perhaps."""
    async with aionpredis.connect(url) as client, anyio.create_task_group() as tasks:
        sampler = await (await filled(client, 40)).sampler(batch=32, selection=Prioritized(), seed=1)
        everything = np.arange(40)

        async def change() -> None:
            while True:
                for half in (0, 1):
                    sampler.update_priorities(everything, (everything % 2 == half).astype(np.float64))
                    await anyio.lowlevel.checkpoint()

        tasks.start_soon(change)
        for _ in range(50):
            weights = (await sampler.sample()).weights
            assert (weights == 1).all(), weights
        tasks.cancel_scope.cancel()


@pytest.mark.parametrize("options", [{"n_step": NStep(2)}, {"length": 4}], ids=["n-step", "slices"])
@pytest.mark.parametrize("flush_every", [0, 3])
async def test_what_can_never_be_drawn_does_not_count_for_the_weights(
    url: str, options: dict[str, Any], flush_every: int
) -> None:
    """The truncated ones of n-step targets, and the last of an episode that no slice fits behind."""
    async with aionpredis.connect(url) as client:
        replay = await filled(client, 60, flush_every=flush_every)
        sampler = await replay.sampler(batch=64, selection=Prioritized(beta=1.0), seed=1, **options)
        drawn: dict[int, int] = {}
        for _ in range(20):
            batch = await sampler.sample()
            drawn |= dict(zip(batch.ids.tolist(), batch["uid"].reshape(64, -1)[:, 0].tolist(), strict=True))
        assert len(sampler) == 60
        hopeless = {29, 59} if "n_step" in options else {uid for uid in range(60) if uid % 10 > 6}
        assert set(drawn.values()) == set(range(60)) - hopeless
        sampler.update_priorities(np.arange(60), np.full(60, 100.0))
        assert ((await sampler.sample()).weights == 1).all()
        sampler.update_priorities(np.array(list(drawn)), np.full(len(drawn), 1000.0))
        assert ((await sampler.sample()).weights == 1).all()


@pytest.mark.parametrize("options", [{"n_step": NStep(3)}, {"length": 4}], ids=["n-step", "slices"])
async def test_what_cannot_be_drawn_yet_is_drawn_later(url: str, options: dict[str, Any]) -> None:
    async with aionpredis.connect(url) as client:
        replay = client.replay("r", NARROW, chunk=4)
        await replay.begin_run()
        sampler = await replay.sampler(batch=32, selection=Prioritized(), seed=1, **options)
        async with replay.actor() as actor:
            await actor.join()
            seen: set[int] = set()
            for start in range(0, 40, 5):
                for uid in range(start, start + 5):
                    await actor.append(**row(NARROW, uid, end_of(uid)))
                await actor.flush()
                await sampler.refresh()
                for _ in range(20):
                    seen |= set((await sampler.sample())["uid"].reshape(32, -1)[:, 0].tolist())
        hopeless = {29} if "n_step" in options else {uid for uid in range(40) if uid % 10 > 6}
        assert seen == set(range(40)) - hopeless


async def test_new_transitions_have_the_highest_priority_so_far(url: str) -> None:
    async with aionpredis.connect(url) as client:
        replay = await filled(client, 20)
        sampler = await replay.sampler(batch=20, selection=Prioritized(alpha=1.0), seed=5)
        batch = await sampler.sample()
        sampler.update_priorities(batch.ids, np.full(20, 1e-9))
        sampler.update_priorities(batch.ids[:1], np.array([50.0]))
        await write(replay, range(100, 104))
        await sampler.refresh()
        drawn = await draw(sampler, 50)
        assert min(drawn[uid] for uid in range(100, 104)) > 100


async def test_bad_priorities_and_priorities_of_what_is_gone(url: str) -> None:
    async with aionpredis.connect(url) as client:
        replay = await filled(client, 8)
        sampler = await replay.sampler(batch=4, selection=Prioritized())
        batch = await sampler.sample()
        for wrong in (np.array([-1.0] * 4), np.array([np.nan] * 4), np.ones(3)):
            with pytest.raises(UsageError, match="priorit"):
                sampler.update_priorities(batch.ids, wrong)
        wrong_ids: list[Any] = [np.ones(4), np.array(["a"] * 4), np.ones(4, np.bool_)]
        for no_ids in wrong_ids:
            with pytest.raises(UsageError, match="ids"):
                sampler.update_priorities(no_ids, np.ones(4))
        with pytest.raises(UsageError, match="priorit"):
            sampler.update_priorities(batch.ids, np.array(["a"] * 4))
        sampler.update_priorities([], [])  # type: ignore[arg-type]
        sampler.update_priorities(batch.ids.astype(np.uint64), np.ones(4))
        sampler.update_priorities(np.array([10_000, -5]), np.ones(2))
        with pytest.raises(UsageError, match="Prioritized"):
            (await replay.sampler()).update_priorities(batch.ids, np.ones(4))


@pytest.mark.parametrize(("alpha", "priority"), [(2.0, 1e200), (1.0, 1.7e308), (1.0, 1e290)])
async def test_priorities_that_are_too_large_are_refused_and_change_nothing(
    url: str, alpha: float, priority: float
) -> None:
    async with aionpredis.connect(url) as client:
        replay = await filled(client, 8)
        sampler = await replay.sampler(batch=8, selection=Prioritized(alpha=alpha), seed=5)
        batch = await sampler.sample()
        with pytest.raises(UsageError, match="too large for alpha"):
            sampler.update_priorities(batch.ids, np.full(8, priority))
        await write(replay, range(100, 108))
        await sampler.refresh()
        drawn = await draw(sampler, 100)
        assert min(drawn[uid] for uid in (*range(8), *range(100, 108))) > 20


async def test_priorities_that_are_nearly_0_are_drawn_all_the_same(url: str) -> None:
    async with aionpredis.connect(url) as client:
        sampler = await (await filled(client, 8)).sampler(batch=8, selection=Prioritized(alpha=5.0), seed=5)
        await sampler.refresh()
        sampler.update_priorities(np.arange(8), np.full(8, 1e-70))
        with anyio.fail_after(5):
            drawn = await draw(sampler, 50)
        assert min(drawn[uid] for uid in range(8)) > 20


async def test_a_priority_of_0_is_never_drawn_with_alpha_0_either(url: str) -> None:
    async with aionpredis.connect(url) as client:
        sampler = await (await filled(client, 8)).sampler(batch=8, selection=Prioritized(alpha=0.0), seed=5)
        await sampler.refresh()
        sampler.update_priorities(np.arange(4), np.zeros(4))
        assert set(await draw(sampler, 20)) == {4, 5, 6, 7}


async def test_without_replacement_every_pass_has_each_transition_once(url: str) -> None:
    async with aionpredis.connect(url) as client:
        replay = await filled(client, 40)
        selection = Shuffled()
        sampler = await replay.sampler(batch=8, selection=selection, seed=6)
        orders = [[uid for _ in range(5) for uid in check(await sampler.sample(), NARROW).tolist()] for _ in range(2)]
        assert [sorted(order) for order in orders] == [list(range(40))] * 2
        assert orders[0] != orders[1]
        assert selection.passes == 2


class Cancelling(Shuffled):
    """Cancels the sample that it has drawn for."""

    scope: anyio.CancelScope | None = None

    def draw(self, count: int, index: Index, eligible: Eligible, rng: np.random.Generator) -> Ids:
        drawn = super().draw(count, index, eligible, rng)
        if self.scope is not None:
            self.scope.cancel()
        return drawn


@pytest.mark.parametrize("options", [{}, {"length": 2}, {"n_step": NStep(1)}], ids=["plain", "slices", "n-step"])
async def test_what_was_drawn_for_a_cancelled_sample_is_in_the_next_one_once(url: str, options: dict[str, Any]) -> None:
    """Also when the sample went from one order on to the next."""
    async with aionpredis.connect(url) as client:
        replay = await filled(client, 40, schema=SCHEMA)
        selection = Cancelling()
        sampler = await replay.sampler(batch=7, selection=selection, seed=6, **options)
        undisturbed = await replay.sampler(batch=7, selection=Shuffled(), seed=6, **options)
        for _ in range(20):
            with anyio.CancelScope() as selection.scope:
                await sampler.sample()
            assert selection.scope.cancelled_caught
            selection.scope = None
            batch = await sampler.sample()
            check(batch, SCHEMA)
            assert np.array_equal(batch.ids, (await undisturbed.sample()).ids)
        assert sampler.stats.sampled == 140


async def test_what_was_drawn_for_a_failed_sample_comes_as_far_as_it_is_still_there(
    url: str, stock: redis.Redis
) -> None:
    async with aionpredis.connect(url) as client:
        replay = await filled(client, 40, schema=SCHEMA)
        selection = Shuffled()
        sampler = await replay.sampler(batch=8, selection=selection, seed=6)
        keys = {int(key.split(b":")[-1]): key for key in data_keys(stock)}
        value: Any = stock.get(keys[0])
        stock.set(keys[0], b"something else")
        seen: list[int] = []
        with pytest.raises(NotAnArray):
            while True:
                seen += check(await sampler.sample(), SCHEMA).tolist()
        stock.set(keys[0], value)
        stock.delete(keys[1])
        while selection.passes == 1:
            seen += check(await sampler.sample(), SCHEMA).tolist()
        left = set(range(40)) - (set(range(4, 8)) - set(seen))
        assert sorted(seen[: len(left)]) == sorted(left)


@pytest.mark.parametrize(
    ("selection", "expected"), [(Fifo, list(range(12))), (Lifo, list(range(39, 27, -1)))], ids=["fifo", "lifo"]
)
async def test_queue_and_stack(url: str, selection: type[Selection], expected: list[int]) -> None:
    async with aionpredis.connect(url) as client:
        replay = await filled(client, 40)
        sampler = await replay.sampler(batch=6, selection=selection(), max_times_sampled=1)
        assert [uid for _ in range(2) for uid in check(await sampler.sample(), NARROW).tolist()] == expected
        assert len(sampler) == 28


async def test_newest_draws_among_the_newest(url: str) -> None:
    async with aionpredis.connect(url) as client:
        replay = await filled(client, 40)
        drawn = await draw(await replay.sampler(batch=50, selection=Newest(5)), 4)
        assert set(drawn) == set(range(35, 40))


@pytest.mark.parametrize("selection", [Uniform, Prioritized, Shuffled, Fifo])
async def test_nothing_is_sampled_more_often_than_allowed(url: str, selection: type[Selection]) -> None:
    async with aionpredis.connect(url) as client:
        replay = await filled(client, 20)
        sampler = await replay.sampler(batch=15, selection=selection(), max_times_sampled=3)
        drawn = await draw(sampler, 4)
        assert drawn == Counter(dict.fromkeys(range(20), 3))
        assert len(sampler) == 0
        with anyio.move_on_after(0.1) as scope:
            await sampler.sample()
        assert scope.cancelled_caught
        await write(replay, range(100, 120))
        assert set(check(await sampler.sample(), NARROW).tolist()) <= set(range(100, 120))


@pytest.mark.parametrize("options", [{"n_step": NStep(3)}, {"length": 8}], ids=["n-step", "slices"])
@pytest.mark.parametrize("selection", [Uniform, Prioritized, Shuffled, Fifo, Lifo])
async def test_a_transition_that_is_used_up_is_there_for_those_that_it_follows(
    url: str, selection: type[Selection], options: dict[str, Any]
) -> None:
    async with aionpredis.connect(url) as client:
        replay = client.replay("r", ENDLESS, chunk=4)
        await replay.begin_run()
        await write(replay, range(320))
        sampler = await replay.sampler(batch=8, selection=selection(), max_times_sampled=1, seed=1, **options)
        drawable = 317 if "n_step" in options else 313
        with anyio.fail_after(20):
            batches = [await sampler.sample() for _ in range(drawable // 8)]
        starts = [uid for batch in batches for uid in batch["uid"].reshape(8, -1)[:, 0].tolist()]
        assert len(starts) == len(set(starts)) == drawable // 8 * 8
        assert max(starts) < drawable
        assert len(sampler) == sampler.stats.transitions == 320 - len(starts)
        if selection is Prioritized:
            # Of those that are used up nothing is known any more.
            used = np.concatenate([batch.ids for batch in batches])
            sampler.update_priorities(used, np.full(len(used), 1e-6))
            await write(replay, range(1000, 1020))
            assert ((await sampler.sample()).weights == 1).all()


async def test_what_is_used_up_does_not_hold_the_samples_per_insert_back(url: str) -> None:
    async with aionpredis.connect(url) as client:
        replay = client.replay("r", ENDLESS, chunk=4)
        await replay.begin_run()
        sampler = await replay.sampler(batch=8, length=4, max_times_sampled=1, samples_per_insert=0.5, min_size=40)
        for start in range(0, 400, 80):
            await write(replay, range(start, start + 80))
            for _ in range(5):
                await sampler.sample()
            assert (sampler.stats.inserted, sampler.stats.sampled) == (start + 80, (start + 80) // 2)
            assert len(sampler) == (start + 80) // 2


@pytest.mark.one_loop("none of them is the point")
@pytest.mark.parametrize("selection", [Uniform, Fifo])
async def test_what_is_used_up_is_forgotten_once_nobody_needs_it(
    url: str, selection: type[Selection], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(aionpredis.replay.sampler, "MIN_IDLE", 64)
    async with aionpredis.connect(url) as client:
        replay = client.replay("r", ENDLESS, chunk=2)
        await replay.begin_run()
        sampler = await replay.sampler(batch=8, selection=selection(), n_step=NStep(3), max_times_sampled=1)
        drawn = 0
        async with replay.actor() as actor:
            await actor.join()
            for start in range(0, 1600, 64):
                for uid in range(start, start + 64):
                    await actor.append(**row(ENDLESS, uid))
                await actor.flush()
                await sampler.refresh()
                while drawn + 8 <= start + 64 - 3:
                    await sampler.sample()
                    drawn += 8
        assert len(sampler) == 1600 - drawn < 16
        index = sampler._index
        assert index.present_count < 400
        assert index.span[1] - index.span[0] < 1000
        assert len(sampler._times) < 400


@pytest.mark.parametrize("schema", [SCHEMA, NARROW], ids=["wide", "narrow"])
async def test_columns_that_are_not_wanted_do_not_come(url: str, schema: Schema) -> None:
    async with aionpredis.connect(url) as client:
        replay = await filled(client, 40, schema=schema)
        batch = await (await replay.sampler(batch=8, columns=["uid", "reward"])).sample()
        assert list(batch) == ["uid", "reward"]
        assert np.array_equal(batch["reward"], (batch["uid"] % 7).astype(np.float32))
        for wrong in (["uid", "nonsense"], []):
            with pytest.raises(UsageError, match="column"):
                await replay.sampler(columns=wrong)


async def test_a_str_is_no_sequence_of_columns(url: str) -> None:
    async with aionpredis.connect(url) as client:
        replay = client.replay("r", Schema(x="int64"))
        await replay.begin_run()
        with pytest.raises(UsageError, match="names"):
            await replay.sampler(columns="x")


@pytest.mark.parametrize("schema", [SCHEMA, NARROW], ids=["wide", "narrow"])
async def test_slices_are_consecutive_and_stay_within_their_episode(url: str, schema: Schema) -> None:
    async with aionpredis.connect(url) as client:
        replay = await filled(client, 200, chunk=7, schema=schema, flush_every=23, actors=2)
        sampler = await replay.sampler(batch=32, length=4, seed=7)
        starts: set[int] = set()
        for _ in range(20):
            uids = check(await sampler.sample(), schema)
            assert uids.shape == (32, 4)
            assert (np.diff(uids, axis=1) == 1).all()
            assert (uids[:, :-1] % 10 != 9).all()
            assert (uids[:, 0] // 100 == uids[:, -1] // 100).all()
            starts |= set(uids[:, 0].tolist())
        assert starts <= {uid for uid in range(200) if uid % 10 <= 6}
        assert len(starts) > 120


async def test_lanes_of_a_vectorized_environment_are_trajectories_of_their_own(url: str) -> None:
    async with aionpredis.connect(url) as client:
        replay = client.replay("r", NARROW, chunk=4)
        run = await replay.begin_run()
        async with replay.vector_actor(3) as actor:
            assert await actor.join() == run == actor.run
            for step in range(50):
                rows = [row(NARROW, 100 * lane + step, end_of(step)) for lane in range(actor.lanes)]
                await actor.append(**{name: np.stack([one[name] for one in rows]) for name in NARROW})
            with pytest.raises(EncodeError, match="lanes"):
                await actor.append(**{name: np.stack([one[name] for one in rows[:2]]) for name in NARROW})
            await actor.flush()
            assert actor.stats.acknowledged == actor.stats.appended == 150
            sampler = await replay.sampler(batch=64, length=5, seed=1)
            for _ in range(10):
                uids = check(await sampler.sample(), NARROW)
                assert (np.diff(uids, axis=1) == 1).all()
            second = await replay.begin_run()
            with pytest.raises(RunEnded):
                while True:
                    await actor.append(**{name: np.stack([one[name] for one in rows]) for name in NARROW})
            assert await actor.join() == second


@pytest.mark.one_loop("none of them is the point")
async def test_lanes_that_had_no_transition_are_left_out(url: str) -> None:
    async with aionpredis.connect(url) as client:
        replay = client.replay("r", NARROW, chunk=4)
        await replay.begin_run()
        async with replay.vector_actor(3) as actor:
            await actor.join()
            for step in range(6):
                rows = [row(NARROW, 100 * lane + step) for lane in range(actor.lanes)]
                columns = {name: np.stack([one[name] for one in rows]) for name in NARROW}
                await actor.append(np.arange(3) != step % 3, **columns)
            for where in ([True, True], np.ones((3, 1), np.bool_), True):
                with pytest.raises(EncodeError, match="where has shape"):
                    await actor.append(where, **columns)  # type: ignore[arg-type]
            for value in (1.0, None, np.float32(1)):
                with pytest.raises(EncodeError, match="'reward' is one value"):
                    await actor.append(**(columns | {"reward": value}))
            with pytest.raises(TypeError, match="reward"):
                await actor.append()
        uids = np.concatenate([batch["uid"] async for batch in await replay.epoch()])
        assert sorted(uids.tolist()) == [
            100 * lane + step for lane in range(3) for step in range(6) if step % 3 != lane
        ]


@pytest.mark.one_loop("none of them is the point")
async def test_batches_lie_in_the_memory_that_was_asked_for(url: str) -> None:
    made: list[NDArray[np.uint8]] = []

    def empty(nbytes: int) -> NDArray[np.uint8]:
        made.append(np.empty(nbytes, np.uint8))
        return made[-1]

    async with aionpredis.connect(url) as client:
        await filled(client, 40)
        replay = client.replay("r", NARROW, chunk=4, empty=empty)
        sample = await (await replay.sampler(batch=8, n_step=NStep(2, columns=["state"]))).sample()
        for batch in (sample, await anext(await replay.epoch(batch=8)), await anext(await replay.draw_chunks(batch=8))):
            for name in [*NARROW, "next_state"]:
                if name in batch:
                    assert any(np.may_share_memory(batch[name], memory) for memory in made), name


async def test_slices_that_do_not_exist_are_waited_for(url: str) -> None:
    async with aionpredis.connect(url) as client:
        replay = await filled(client, 40)
        for selection in (Uniform(), Prioritized(), Fifo(), Shuffled()):
            sampler = await replay.sampler(batch=2, length=11, selection=selection)
            with anyio.move_on_after(0.1) as scope:
                await sampler.sample()
            assert scope.cancelled_caught


def n_step_by_hand(uid: int, steps: int, discount: float) -> tuple[float, float, int]:
    """Return, discount, and the uid of the next state."""
    total = 0.0
    for step in range(steps):
        now = uid + step
        if end_of(now) == "truncated":
            return total, discount**step, now
        total += discount**step * (now % 7)
        if end_of(now) == "terminated":
            return total, 0.0, now
    return total, discount**steps, uid + steps


@pytest.mark.parametrize("steps", [1, 3, 12])
@pytest.mark.parametrize("schema", [SCHEMA, NARROW], ids=["wide", "narrow"])
async def test_n_step_targets_are_those_of_a_plain_loop(url: str, schema: Schema, steps: int) -> None:
    async with aionpredis.connect(url) as client:
        replay = await filled(client, 130, chunk=8, schema=schema, flush_every=11)
        sampler = await replay.sampler(batch=64, n_step=NStep(steps, discount=0.9), seed=8)
        seen: set[int] = set()
        for _ in range(12):
            batch = await sampler.sample()
            for index, uid in enumerate(check(batch, schema).tolist()):
                total, discount, following = n_step_by_hand(uid, steps, 0.9)
                assert batch["return"][index] == pytest.approx(total, rel=1e-5)
                assert batch["discount"][index] == pytest.approx(discount, rel=1e-5)
                assert (batch["next_state"][index] == following).all()
                seen.add(uid)
        assert len(seen) > 100
        assert max(seen) == 129  # the last one terminated; those before it need nothing behind it


async def test_n_step_takes_no_stored_column_away(url: str) -> None:
    async with aionpredis.connect(url) as client:
        schema = Schema(state="int64", reward="float32", team=("float32", (2,)), discount="float32", next_state="int64")
        replay = client.replay("r", schema, chunk=1)
        await replay.begin_run()
        async with replay.actor() as actor:
            await actor.join()
            for number in range(8):
                team = np.ones(2, np.float32)
                await actor.append(state=number, reward=1.0, team=team, discount=0.25, next_state=-1)
        with pytest.raises(UsageError, match=r"'discount'.*columns="):
            await replay.sampler(n_step=NStep(1))
        with pytest.raises(UsageError, match=r"'next_state'.*columns="):
            await replay.sampler(n_step=NStep(1), columns=["state", "next_state"])
        with pytest.raises(UsageError, match=r"'team'.*\(2,\)"):
            await replay.sampler(n_step=NStep(1, reward="team"), columns=["state"])
        batch = await (await replay.sampler(batch=4, n_step=NStep(1, 0.5), columns=["state", "reward"])).sample()
        assert (batch["discount"] == 0.5).all()
        assert np.array_equal(batch["next_state"], batch["state"] + 1)
        batch = await (await replay.sampler(batch=4)).sample()
        assert (batch["discount"] == 0.25).all()


async def test_n_step_takes_rewards_of_shape_1_from_files_of_other_software(url: str, stock: redis.Redis) -> None:
    schema = Schema(state="int64", reward=("float32", (1,)))
    async with aionpredis.connect(url) as client:
        replay = client.replay("r", schema, chunk=4)
        await replay.begin_run()
        async with replay.actor() as actor:
            await actor.join()
            for number in range(8):
                await actor.append(state=number, reward=np.array([number], np.float32))
        for key in sorted(data_keys(stock)):
            record = await client.get_record(key)
            assert record is not None
            await client.set_record(key, record, codec="lz4")
        batch = await (await replay.sampler(batch=8, n_step=NStep(2, 1.0), columns=["state"])).sample()
        assert np.array_equal(batch["return"], 2 * batch["state"] + 1)


async def test_n_step_and_slices_together(url: str) -> None:
    async with aionpredis.connect(url) as client:
        replay = await filled(client, 60)
        batch = await (await replay.sampler(batch=16, length=3, n_step=NStep(2, discount=0.5))).sample()
        assert batch["uid"].shape == (16, 3)
        expected = [n_step_by_hand(uid, 2, 0.5)[0] for uid in batch["uid"][:, 0].tolist()]
        assert np.allclose(batch["return"], expected)


async def test_chunks_that_are_gone_are_drawn_again_and_counted(url: str, stock: redis.Redis) -> None:
    async with aionpredis.connect(url) as client:
        replay = await filled(client, 40, schema=SCHEMA)
        sampler = await replay.sampler(batch=64, seed=9)
        check(await sampler.sample(), SCHEMA)
        gone = sorted(data_keys(stock))[:5]
        stock.delete(*gone)
        for _ in range(5):
            check(await sampler.sample(), SCHEMA)
        assert sampler.stats.lost == 20
        assert len(sampler) == 20
        stock.delete(*data_keys(stock))
        await waits_after(sampler, lambda: len(sampler) == 0)


@pytest.mark.parametrize("options", [{"length": 5}, {"n_step": NStep(4)}], ids=["slices", "n-step"])
async def test_transitions_whose_followers_are_gone_are_not_drawn_again_and_again(
    url: str, stock: redis.Redis, options: dict[str, Any]
) -> None:
    """Each sample from the first chunk needs the second one, and none begins in that."""
    async with aionpredis.connect(url) as client:
        replay = await filled(client, 8)
        sampler = await replay.sampler(batch=8, **options)
        stock.delete(max(data_keys(stock)))
        await waits_after(sampler, lambda: sampler.stats.lost > 0)
        assert (sampler.stats.lost, len(sampler), client.stats().lost) == (4, 4, 1)
        await write(replay, range(100, 108))
        with anyio.fail_after(30):
            batch = await sampler.sample()
        assert batch["uid"].min() >= 100


async def test_a_chunk_in_which_an_episode_ends_goes_on_being_drawn_when_its_neighbour_is_lost(
    url: str, stock: redis.Redis
) -> None:
    async with aionpredis.connect(url) as client:
        replay = await filled(client, 16)  # transition 9 ends an episode
        sampler = await replay.sampler(batch=8, length=3, seed=1)
        stock.delete(sorted(data_keys(stock))[1])
        with anyio.fail_after(30):
            drawn = {uid for _ in range(20) for uid in (await sampler.sample())["uid"].ravel().tolist()}
        assert drawn == {0, 1, 2, 3, 10, 11, 12, 13, 14, 15}
        stats = client.stats()
        assert (sampler.stats.lost, stats.lost, stats.evicted) == (4, 1, 0)


@pytest.mark.parametrize("chunk", [1, 64])
async def test_no_more_travels_if_the_actor_has_the_columns_in_another_order(url: str, chunk: int) -> None:
    async with aionpredis.connect(url) as client:
        received = []
        for schema in (SCHEMA, Schema(**{name: SCHEMA[name] for name in reversed(list(SCHEMA))})):
            await filled(client, 128, chunk=chunk, schema=schema)
            sampler = await client.replay("r", SCHEMA).sampler(batch=16, seed=1)
            before = client.stats().bytes_received
            batch = await sampler.sample()
            received.append(client.stats().bytes_received - before)
            check(batch, SCHEMA)
            assert list(batch) == list(SCHEMA)
        assert abs(received[1] - received[0]) < 1000


async def test_files_of_single_transitions_that_are_not_as_expected(url: str, stock: redis.Redis) -> None:
    """Gone, or written by other software (another header, compressed) among others that are as always."""
    async with aionpredis.connect(url) as client:
        replay = await filled(client, 60, chunk=1, schema=SCHEMA)
        sampler = await replay.sampler(batch=200, seed=9)
        check(await sampler.sample(), SCHEMA)
        keys = sorted(data_keys(stock))
        stock.delete(*keys[:4])
        for number, key in enumerate(keys[4:20]):
            record = await client.get_record(key)
            assert record is not None
            if number % 2:
                await client.set_record(key, dict(reversed(record.items())), codec="lz4")
            else:
                value = safetensors.numpy.save({name: np.array(array) for name, array in record.items()})
                stock.set(key, value)
        for _ in range(5):
            check(await sampler.sample(), SCHEMA)
        assert sampler.stats.lost == 4
        stock.set(keys[30], b"something else")
        with pytest.raises(NotAnArray, match=keys[30].decode()):
            for _ in range(5):
                await sampler.sample()


async def test_drawn_chunks_that_are_gone_are_replaced_and_each_counts_once(url: str, stock: redis.Redis) -> None:
    """However often one was drawn before that was known: many draws of these ten chunks are under way together."""
    async with aionpredis.connect(url) as client:
        replay = await filled(client, 40)
        batches = await replay.draw_chunks(batch=32, seed=1)
        await anext(batches)
        stock.delete(*sorted(data_keys(stock))[:8])
        entries: Any = stock.xrange("{r}:log")
        stock.xdel("{r}:log", *(entry for entry, _ in entries[1:4]))  # the first one begins the run
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(1000):  # what was asked for before comes first
                assert len((await anext(batches))["uid"]) == 32
        assert ["is in the log, but not on the server" in str(one.message) for one in caught] == [True] * 5
        assert batches.stats.missing == client.stats().lost == 5
        assert batches.stats.evicted == client.stats().evicted == 3


class Looked(ChunkId):
    """Counts how often one is looked at."""

    looks: ClassVar = 0

    def __getattribute__(self, name: str) -> Any:
        Looked.looks += 1
        return super().__getattribute__(name)

    def __eq__(self, other: object) -> bool:
        Looked.looks += 1
        return super().__eq__(other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = ChunkId.__hash__


@pytest.mark.parametrize("first", [4000, 3000], ids=["ascending", "numbers-that-were-given-again"])
async def test_a_drawn_chunk_that_is_gone_costs_no_look_at_all_others(first: int) -> None:
    """But after a failover, when entries may have numbers that came before."""
    entries = [*range(4000), *range(first, first + 1000)]
    chunks = [Looked(b"incarnat", seq, 1 + seq % 2, b"", entry) for seq, entry in enumerate(entries)]

    class Log:
        ended = False

        async def read_all(self, known: list[ChunkId]) -> None:
            known += chunks

    log: Any = Log()
    source = DrawSource(log, np.random.default_rng(1), 0)
    await source.more()
    lost = set()
    for _ in range(30):
        chunk = source.take()
        assert chunk is not None
        assert chunk not in lost
        before = Looked.looks
        assert source.lose(chunk)
        other = source.substitute(chunk)
        assert first == 3000 or Looked.looks - before < 100
        lost.add(chunk)
        assert other is not None
        assert other not in lost
        assert other.rows == chunk.rows
        assert not source.lose(chunk)


async def test_sampling_waits_for_the_minimum(url: str) -> None:
    async with aionpredis.connect(url) as client:
        replay = await filled(client, 10)
        sampler = await replay.sampler(batch=4, min_size=30)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(sampler.sample)
            await anyio.sleep(0.05)
            assert sampler.stats.sampled == 0
            await write(replay, range(10, 30))
        assert sampler.stats.sampled == 4
        assert sampler.stats.waits == 1


async def test_samples_per_insert_holds_the_learner_back(url: str) -> None:
    async with aionpredis.connect(url) as client:
        replay = await filled(client, 20)
        sampler = await replay.sampler(batch=10, samples_per_insert=2.0, tolerance=10.0)
        for allowed in (50, 90):
            while sampler.stats.sampled < allowed:
                await sampler.sample()
            with anyio.move_on_after(0.1) as scope:
                await sampler.sample()
            assert scope.cancelled_caught
            assert sampler.stats.sampled == allowed
            await write(replay, range(20, 40))


async def test_waiting_ends_with_the_run(url: str) -> None:
    async with aionpredis.connect(url) as client:
        replay = await filled(client, 10)
        sampler = await replay.sampler(min_size=100)
        await replay.begin_run()
        with pytest.raises(RunEnded):
            await sampler.sample()


async def test_a_cancelled_sample_writes_nothing_afterwards_and_the_next_is_right(url: str, stock: redis.Redis) -> None:
    """Also when chunks vanish meanwhile, so that replies are not as predicted."""
    async with aionpredis.connect(url) as client:
        replay = await filled(client, 400, schema=SCHEMA)
        sampler = await replay.sampler(batch=128, seed=2)
        for delay in (0.0, 0.0002, 0.0005, 0.001, 0.002) * 8:
            stock.delete(*sorted(data_keys(stock))[:2])
            with anyio.move_on_after(delay):
                await sampler.sample()
            check(await sampler.sample(), SCHEMA)
        assert sampler.stats.lost > 100


async def test_a_cancelled_refresh_forgets_nothing(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The log is read in pages; what the first ones named is kept for the next call."""
    monkeypatch.setattr(streams, "PAGE", 2)
    async with aionpredis.connect(url) as client:
        replay = await filled(client, 160)
        for delay in (0.0005, 0.001, 0.002, 0.004):
            sampler = await replay.sampler()
            with anyio.move_on_after(delay):
                await sampler.refresh()
            await sampler.refresh()
            assert len(sampler) == 160


async def test_batches_that_are_kept_are_not_overwritten(url: str) -> None:
    async with aionpredis.connect(url) as client:
        replay = await filled(client, 100, schema=SCHEMA)
        sampler = await replay.sampler(batch=16, n_step=NStep(1), seed=2)
        kept = [await sampler.sample() for _ in range(20)]
        for batch in kept:
            check(batch, SCHEMA)
            assert (batch["next_state"][:, 0] - batch["uid"] <= 1).all()


async def test_two_samplers_with_one_seed_draw_alike(url: str) -> None:
    async with aionpredis.connect(url) as client:
        replay = await filled(client, 100)
        for selection in (Uniform, Prioritized, Shuffled):
            one, two = [await replay.sampler(batch=16, selection=selection(), seed=5) for _ in range(2)]
            for _ in range(5):
                assert np.array_equal((await one.sample())["uid"], (await two.sample())["uid"])


@pytest.mark.parametrize(
    "options",
    [
        {"batch": 0},
        {"length": 0},
        {"min_size": -1},
        {"max_times_sampled": -1},
        {"samples_per_insert": 0.0},
        {"samples_per_insert": math.nan},
        {"tolerance": -1.0},
        {"n_step": NStep(1, columns=["nonsense"])},
        {"n_step": 3},
        {"selection": Prioritized},
        {"selection": "uniform"},
    ],
    ids=str,
)
async def test_wrong_options_are_usage_errors(url: str, options: dict[str, Any]) -> None:
    async with aionpredis.connect(url) as client:
        replay = await filled(client, 4)
        with pytest.raises(UsageError):
            await replay.sampler(**options)


def test_wrong_selections_are_usage_errors() -> None:
    for make in (
        lambda: Newest(0),
        lambda: Prioritized(alpha=-1),
        lambda: Prioritized(alpha=math.inf),
        lambda: Prioritized(beta=2),
        lambda: NStep(0),
        lambda: NStep(1.5),  # type: ignore[arg-type]
        lambda: NStep(True),
        lambda: NStep(columns="state"),
        lambda: Newest(1.5),  # type: ignore[arg-type]
        lambda: Newest(True),
    ):
        with pytest.raises(UsageError):
            make()
