"""Ctrl-C and SIGTERM as cancellation, so that everything that was started is also ended."""

from __future__ import annotations

import signal
from collections.abc import Awaitable, Callable
from typing import TypeVar

import anyio
from anyio.abc import TaskStatus

__all__ = ["Interrupted", "until_interrupted"]

T = TypeVar("T")


class Interrupted(Exception):
    """A signal asked the program to end. ``exit_code``: 128 + the signal's number, as shells have it."""

    def __init__(self, number: int) -> None:
        super().__init__(f"interrupted by {signal.Signals(number).name}")
        self.exit_code = 128 + number


async def until_interrupted(work: Callable[[], Awaitable[T]]) -> T:
    """Await ``work()``; the first SIGINT or SIGTERM cancels it. More of them change nothing, from then on to the end of
    the process: cleaning up is short.

    Raises:
        Interrupted: when ``work`` has ended because of that.
    """
    scope = anyio.CancelScope()
    received: list[int] = []

    async def listen(*, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
            task_status.started()
            async for number in signals:
                received.append(number)
                scope.cancel()

    async with anyio.create_task_group() as tasks:
        await tasks.start(listen)
        with scope:
            result = await work()
        tasks.cancel_scope.cancel()
    if scope.cancelled_caught:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        raise Interrupted(received[0])
    return result
