"""The sum-tree: slots are drawn in proportion to their values, whatever was set before."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from numpy.typing import NDArray

from aionpredis.errors import UsageError
from aionpredis.replay.sumtree import SumTree

SLOTS = st.integers(0, 40)
VALUES = st.one_of(st.just(0.0), st.floats(0, 1e300), st.floats(0, 10))
TINY = st.floats(0, 1e-300)
"""Not all bits of a float64 are left."""
COUNTS = st.integers(1, 70)


def tree_of(values: Sequence[float] | NDArray[np.float64]) -> SumTree:
    tree = SumTree()
    tree.set(np.arange(len(values)), np.array(values, np.float64))
    return tree


class Fixed:
    """In the place of a generator: every number is this one."""

    def __init__(self, number: float) -> None:
        self.number = number

    def random(self, count: int) -> NDArray[np.float64]:
        return np.full(count, self.number)


FIXED = [0.0, 0.5, math.nextafter(1, 0)]
"""The lowest number that a generator gives, one between, and the highest."""


# --- values ----------------------------------------------------------------------------------------------------------


@given(st.lists(st.lists(st.tuples(SLOTS, VALUES), max_size=20), max_size=8))
def test_values_total_and_minimum_are_those_of_a_dict(batches: list[list[tuple[int, float]]]) -> None:
    tree, model = SumTree(), dict[int, float]()
    for batch in batches:
        tree.set(np.array([slot for slot, _ in batch], np.int64), np.array([value for _, value in batch], np.float64))
        model.update(batch)  # of duplicates the last one stays
        assert tree.get(np.arange(70)).tolist() == [model.get(slot, 0.0) for slot in range(70)]
        assert tree.total == pytest.approx(math.fsum(model.values()), rel=1e-14)
        assert tree.minimum == min((value for value in model.values() if value > 0), default=math.inf)


def test_last_of_duplicates_counts() -> None:
    tree = SumTree()
    tree.set(np.array([3, 1, 3, 3, 1]), np.array([9.0, 8.0, 7.0, 2.0, 5.0]))
    assert tree.get(np.array([3, 1, 3, 0])).tolist() == [2, 5, 2, 0]
    assert (tree.total, tree.minimum) == (7, 2)
    slots = np.arange(100_000) % 1000
    tree.set(slots, np.arange(100_000.0))
    assert tree.get(np.arange(1000)).tolist() == list(range(99_000, 100_000))


def test_tree_grows_by_doubling_and_keeps_what_it_has() -> None:
    tree = SumTree()
    assert tree.capacity == 1
    sizes = []
    for slot in range(1025):
        tree.set(np.array([slot]), np.array([slot + 1.0]))
        sizes.append(tree.capacity)
        assert tree.total == (slot + 1) * (slot + 2) / 2
        assert tree.minimum == 1
    assert sizes == [1 << slot.bit_length() for slot in range(1025)]
    assert tree.get(np.arange(1025)).tolist() == list(range(1, 1026))
    tree.set(np.array([100_000]), np.array([0.5]))  # many times as large at once
    assert tree.capacity == 1 << 17
    assert tree.total == 1025 * 1026 / 2 + 0.5
    assert tree.minimum == 0.5
    assert tree.get(np.array([0, 1024, 1025, 99_999, 100_000])).tolist() == [1, 1025, 0, 0, 0.5]


def test_slots_that_were_never_set_have_the_value_0() -> None:
    tree = tree_of([1, 2, 3])
    assert tree.get(np.array([2, 3, 4, 1 << 40])).tolist() == [3, 0, 0, 0]
    assert tree.capacity == 4


def test_rounding_errors_do_not_accumulate() -> None:
    rng = np.random.default_rng(1)
    tree, expected = SumTree(), np.zeros(1000)
    for _ in range(1000):
        slots = rng.integers(0, 1000, 100)
        values = 10.0 ** rng.uniform(-12, 12, 100)
        tree.set(slots, values)
        expected[slots] = values
    assert tree.total == tree_of(expected).total  # not one bit of 100,000 updates remains
    assert tree.total == pytest.approx(math.fsum(expected), rel=1e-9)
    # Had the sums been incremented, the error of the larger values would remain.
    tree.set(np.arange(1000), np.full(1000, 1e-12))
    assert tree.total == pytest.approx(1e-9, rel=1e-9, abs=0)
    assert tree.minimum == 1e-12


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=40), st.floats(0, 1))
def test_minimum_normalises_importance_weights(values: list[float], beta: float) -> None:
    tree = tree_of([*values, 0.0])
    weights = (tree.minimum / tree.get(np.arange(len(values)))) ** beta
    naive = [(len(values) * value / tree.total) ** -beta for value in values]
    assert weights.tolist() == pytest.approx([weight / max(naive) for weight in naive])
    assert weights.max() == 1


# --- draws -----------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=40).filter(any), COUNTS, st.integers(0, 1 << 32))
def test_each_segment_of_the_total_gives_the_slot_that_a_plain_search_finds(
    values: list[int], count: int, seed: int
) -> None:
    slots = tree_of(values).draw(count, np.random.default_rng(seed))  # whole numbers: no sum is rounded
    assert slots.shape == (count,)
    assert slots.dtype == np.int64
    for segment, (slot, number) in enumerate(zip(slots, np.random.default_rng(seed).random(count), strict=True)):
        at = (segment + number) / count * sum(values)
        expected = next(i for i in range(len(values)) if at < sum(values[: i + 1]))
        assert slot == expected


@given(st.lists(st.one_of(VALUES, TINY), min_size=1, max_size=40).filter(any), COUNTS, st.integers(0, 1 << 32))
@example([5e-324, 5e-324], 70, 0)
@example([5e-324, 1e-323, 0.0, 2e-308], 64, 1)
def test_no_slot_is_drawn_more_or_less_often_than_its_segments_allow(
    values: list[float], count: int, seed: int
) -> None:
    tree = tree_of(values)
    hits = np.bincount(tree.draw(count, np.random.default_rng(seed)), minlength=len(values))
    for hit, value in zip(hits, values, strict=True):
        assert abs(hit - count * (value / tree.total)) < 2 + 1e-9  # a part of a segment on either side


@pytest.mark.parametrize(("count", "times"), [(1, 12_000), (3, 4_000), (64, 300)])
def test_frequencies_are_proportional_to_the_values(count: int, times: int) -> None:
    values = np.array([5, 0, 1, 2, 0, 0, 8, 0.5, 3, 3, 0, 13, 0.25])
    tree, rng = tree_of(values), np.random.default_rng(2)
    hits = np.bincount(np.concatenate([tree.draw(count, rng) for _ in range(times)]), minlength=len(values))
    assert hits[values == 0].sum() == 0
    drawn = values > 0
    expected = values[drawn] / values.sum() * count * times
    # 9 values, 8 degrees of freedom: more than 26.12 in one case of 1,000. Stratified draws only vary less.
    assert ((hits[drawn] - expected) ** 2 / expected).sum() < 26.12


@given(
    st.lists(st.one_of(st.just(0.0), st.floats(0, 1e300), st.just(5e-324)), min_size=1, max_size=70).filter(any),
    COUNTS,
    st.sampled_from(FIXED),
)
def test_a_value_of_0_is_never_drawn_not_even_at_the_edge_of_a_segment(
    values: list[float], count: int, number: float
) -> None:
    tree = tree_of(values)
    slots = tree.draw(count, cast("np.random.Generator", Fixed(number)))
    assert (tree.get(slots) > 0).all()
    assert (np.diff(slots) >= 0).all()


@pytest.mark.parametrize("number", FIXED)
def test_a_value_that_was_set_to_0_is_drawn_no_more(number: float) -> None:
    tree = tree_of([0.1] * 1000)
    kept = np.array([17, 333, 998])
    tree.set(np.setdiff1d(np.arange(1000), kept), np.zeros(997))
    slots = tree.draw(300, cast("np.random.Generator", Fixed(number)))
    assert np.unique(slots).tolist() == kept.tolist()


def test_the_same_seed_draws_the_same() -> None:
    tree = tree_of([1, 2, 3, 4])
    first, second = (tree.draw(50, np.random.default_rng(7)) for _ in range(2))
    assert first.tolist() == second.tolist()


# --- misuse ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("slots", "values"),
    [
        ([0, -1], [1.0, 1.0]),
        ([0, 1], [1.0, -1e-300]),
        ([0, 1], [1.0, math.nan]),
        ([0, 1], [1.0, math.inf]),
        ([0, 1], [1.0]),
        ([0, 1], 1.0),
        ([0, 1], [[1.0, 1.0]]),
        ([0, 1], ["1", "2"]),
        ([0, 1], [1j, 1]),
        ([[0, 1]], [[1.0, 1.0]]),
        (0, 1.0),
        ([0.0, 1.0], [1.0, 1.0]),
        ([False, True], [1.0, 1.0]),
    ],
)
def test_bad_slots_and_values_are_refused_and_nothing_is_set(slots: Any, values: Any) -> None:
    tree = tree_of([4, 2])
    with pytest.raises(UsageError):
        tree.set(np.array(slots), np.array(values))
    assert tree.get(np.array([0, 1])).tolist() == [4, 2]
    assert (tree.total, tree.minimum) == (6, 2)


@pytest.mark.parametrize("slots", [[-1], [0.0], [[0]], 0, [True], ["0"]])
def test_bad_slots_are_not_looked_up(slots: Any) -> None:
    with pytest.raises(UsageError):
        tree_of([1]).get(np.array(slots))


@pytest.mark.parametrize("count", [0, -1, 1.0, True, "1", None])
def test_a_count_that_is_not_positive_is_refused(count: Any) -> None:
    with pytest.raises(UsageError, match="count"):
        tree_of([1]).draw(count, np.random.default_rng())


@pytest.mark.parametrize("values", [[], [0.0], [0.0, 0.0, 0.0], [1e308, 1e308]])
def test_nothing_is_drawn_from_a_total_of_0_or_infinity(values: list[float]) -> None:
    tree = tree_of(values)
    with pytest.raises(UsageError, match="sum of all values"):
        tree.draw(1, np.random.default_rng())
    tree.set(np.arange(len(values) + 1), np.ones(len(values) + 1))
    assert tree.total == len(values) + 1
