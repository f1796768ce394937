"""Memory for what is received: aligned, and handed out again only when nobody can see it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

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
