"""What saving and restoring have in common: a bundle is made while the one before it is taken, and somebody is told."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

import anyio

__all__ = ["Progress", "silent", "transfer"]

T = TypeVar("T")

Progress = Callable[[int, int], None]
"""``progress(done, all)``, in transitions: ``done`` never falls, and is ``all`` in the end."""


def silent(done: int, total: int) -> None:
    """Progress that nobody wants to know of."""


async def transfer(items: AsyncGenerator[T], take: Callable[[AsyncIterator[T]], Coroutine[Any, Any, None]]) -> None:
    """Make the next item while the one before it is taken.

    The first error ends both sides, and is raised as it is, not in a group.
    """
    sender, receiver = anyio.create_memory_object_stream[T]()

    async def making() -> None:
        async with sender, aclosing(items):
            async for item in items:
                await sender.send(item)

    async def taking() -> None:
        async with receiver:
            await take(receiver)

    try:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(making)
            tasks.start_soon(taking)
    except BaseExceptionGroup as group:
        error: BaseException = group
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        raise error from error.__cause__
