"""The loader: ahead, but not far; in order; and gone when its block is left."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator

import anyio
import pytest

from aionpredis import Loader, UsageError

from .cancelling import Figures, stepped

pytestmark = pytest.mark.anyio


class Source:
    """Counts what was taken, and whether it was closed."""

    def __init__(self, count: int, error: Exception | None = None) -> None:
        self.taken = 0
        self.closed = False
        self.count = count
        self.error = error

    async def batches(self) -> AsyncIterator[int]:
        try:
            for number in range(self.count):
                await anyio.lowlevel.checkpoint()
                self.taken += 1
                yield number
            if self.error is not None:
                raise self.error
        finally:
            self.closed = True


async def test_everything_comes_in_order() -> None:
    async with Loader(Source(100).batches(), prefetch=3) as loader:
        assert [number async for number in loader] == list(range(100))
        assert [number async for number in loader] == []


@pytest.mark.parametrize("prefetch", [1, 2, 5])
async def test_it_is_ahead_by_prefetch_and_no_more(prefetch: int) -> None:
    source = Source(100)
    async with Loader(source.batches(), prefetch=prefetch) as loader:
        for number in range(3):
            assert await anext(loader) == number
            await anyio.wait_all_tasks_blocked()
            assert source.taken == number + prefetch + 2


async def test_an_exception_comes_behind_the_batches_before_it_and_as_itself() -> None:
    error = ZeroDivisionError("x")
    async with Loader(Source(3, error).batches()) as loader:
        found = []
        with pytest.raises(ZeroDivisionError) as caught:
            while True:
                found.append(await anext(loader))
        assert caught.value is error
        assert found == [0, 1, 2]


async def test_leaving_early_ends_the_source() -> None:
    source = Source(100)
    async with Loader(source.batches()) as loader:
        async for number in loader:
            if number == 2:
                break
    assert source.closed
    assert source.taken < 10


async def test_the_blocks_own_exception_is_raised_as_itself() -> None:
    with pytest.raises(KeyError):
        async with Loader(Source(100).batches()) as loader:
            await anext(loader)
            raise KeyError


async def test_cancellation_ends_the_source() -> None:
    source = Source(100)
    with anyio.move_on_after(0.02) as scope:
        async with Loader(source.batches()) as loader:
            await anext(loader)
            await anyio.sleep_forever()
    assert scope.cancelled_caught
    assert source.closed


async def test_misuse_is_a_usage_error() -> None:
    for prefetch in (0, 2.5, True):
        with pytest.raises(UsageError):
            Loader(Source(1).batches(), prefetch=prefetch)  # type: ignore[arg-type]
    loader = Loader(Source(1).batches())
    with pytest.raises(UsageError, match="inside of its"):
        await anext(loader)
    async with loader:
        pass
    with pytest.raises(UsageError, match="inside of its"):
        await anext(loader)
    with pytest.raises(UsageError, match="one `async with` block"):
        async with loader:
            pass


async def test_cancelled_loader_does_not_look_like_the_end_of_the_data() -> None:
    async def read() -> None:
        async with Loader(Source(5).batches()) as loader:
            seen = [number async for number in loader]
        assert seen == list(range(5)), "ended too early"

    for step in itertools.count():
        if not await stepped(read, Figures(), step):
            break
    assert step > 5
