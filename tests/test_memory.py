"""Memory for what is received: aligned, and handed out again only when nobody can see it."""

from __future__ import annotations

import gc
import mmap
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from aionpredis.errors import UsageError
from aionpredis.memory import ALIGNMENT, REFERENCES_ARE_COUNTED, Recycler, aligned_empty


@pytest.mark.parametrize("nbytes", [0, 1, 63, 64, 12_800, 1 << 20])
def test_memory_is_aligned_writable_and_of_the_size_asked_for(nbytes: int) -> None:
    memory = aligned_empty(nbytes)
    assert memory.nbytes == nbytes
    assert memory.flags.writeable
    assert memory.__array_interface__["data"][0] % ALIGNMENT == 0 or not nbytes


HOLDERS: list[Callable[[NDArray[np.uint8]], Any]] = [
    lambda memory: memory,
    lambda memory: memory[10:20],
    lambda memory: memory.view(np.uint16).reshape(8, -1)[::2].T,
    lambda memory: memory.data,
    lambda memory: memory.data[5:6],
    lambda memory: np.frombuffer(memory, np.float32),
]


@pytest.mark.parametrize("hold", HOLDERS)
def test_memory_that_anybody_can_see_is_not_handed_out(hold: Callable[[NDArray[np.uint8]], Any]) -> None:
    recycler = Recycler(1024)
    held = hold(recycler.take())
    others = [recycler.take() for _ in range(10)]
    for other in others:
        assert not np.may_share_memory(np.asarray(held), other)
    assert len({other.__array_interface__["data"][0] for other in others}) == 10


@pytest.mark.skipif(not REFERENCES_ARE_COUNTED, reason="nothing is recycled where references are not counted")
def test_memory_that_nobody_refers_to_is_handed_out_again() -> None:
    recycler = Recycler(1024)
    places = set()
    for _ in range(10):
        memory = recycler.take()
        places.add(memory.__array_interface__["data"][0])
        view = memory.view(np.int64)
        del memory, view
    assert len(places) == 1


def test_foreign_memory_is_recycled_by_the_same_rule() -> None:
    """The array may lie in anything, such as a tensor: NumPy's base of it is no array then."""
    made = []

    def empty(nbytes: int) -> NDArray[np.uint8]:
        block = mmap.mmap(-1, nbytes)
        made.append(block)
        return np.frombuffer(block, np.uint8)

    recycler = Recycler(4096, empty)
    held = recycler.take()[8:16].view(np.int64)
    others = [recycler.take() for _ in range(3)]
    assert len(made) == 4
    assert not any(np.may_share_memory(held, other) for other in others)
    del others, held
    if REFERENCES_ARE_COUNTED:
        for _ in range(10):
            recycler.take()
        assert len(made) == 4


@pytest.mark.parametrize("hold", HOLDERS)
def test_pieces_of_one_pool_are_told_apart(hold: Callable[[NDArray[np.uint8]], Any]) -> None:
    """NumPy gives all slices of an array the same base, and it lives as long as one of them."""
    pool = iter(aligned_empty(1024 * 12).reshape(12, 1024))
    recycler = Recycler(1024, lambda nbytes: next(pool))
    first = hold(recycler.take())
    held = [recycler.take() for _ in range(3)]
    del held[1]
    others = [recycler.take() for _ in range(5)]
    for other in (*held, *others):
        assert not np.may_share_memory(np.asarray(first), other)
    places = [each.__array_interface__["data"][0] for each in (*held, *others)]
    assert len(set(places)) == len(places)


def test_memory_of_a_pool_that_nobody_names_any_more_stays_while_it_is_seen() -> None:
    """The pool's owner unmaps it when the last array is gone, as torch does with pinned memory."""
    pool = mmap.mmap(-1, 2 * 4096)
    alive = weakref.ref(pool)
    pieces = [np.frombuffer(pool, np.uint8)[4096:]]
    recycler = Recycler(4096, lambda nbytes: pieces.pop())
    view = recycler.take()[8:16].view(np.int64)
    del recycler, pool
    gc.collect()
    assert alive() is not None
    view[:] = 7
    del view
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("nbytes", [0, 64])
def test_memory_of_any_size_can_be_taken(nbytes: int) -> None:
    assert Recycler(nbytes).take().shape == (nbytes,)


@pytest.mark.parametrize(
    "empty",
    [
        lambda nbytes: bytearray(nbytes),
        lambda nbytes: np.empty(nbytes + 1, np.uint8),
        lambda nbytes: np.empty(nbytes, np.int8),
        lambda nbytes: np.broadcast_to(np.uint8(0), nbytes),
        lambda nbytes: np.empty(2 * nbytes, np.uint8)[::2],
        lambda nbytes: aligned_empty(nbytes + 1)[1:],
    ],
)
def test_memory_that_cannot_be_received_into_is_refused(empty: Any) -> None:
    with pytest.raises(UsageError, match=r"empty\(1024\)"):
        Recycler(1024, empty).take()
