"""What the wire needs of an event loop: wait until a socket is ready, wake another task, let others run.

The one module that knows asyncio by name. Waking a task through a bare future costs 2 µs, through ``anyio.Event`` 5;
a time limit by ``call_later`` 1 µs, by ``anyio.move_on_after`` 8; and waiting for *either* direction needs two tasks in
anyio and none here. :class:`AnyioReadiness` does the same by anyio alone: it serves trio, and Windows' proactor loop.
"""

from __future__ import annotations

import asyncio
import socket
import sys
from collections.abc import Awaitable, Callable
from contextvars import copy_context
from functools import partial
from typing import Any, Protocol

import anyio
import anyio.lowlevel

__all__ = ["Readiness", "Soon", "Waiter", "from_threads", "readiness"]


class Waiter(Protocol):
    """Lets one task sleep until another wakes it; for one use. Waking twice, or before the sleep, is fine."""

    def wake(self) -> None: ...

    def wait(self) -> Awaitable[Any]: ...


class Readiness(Protocol):
    """The event loop's view of one socket."""

    async def wait(self, *, write: bool, timeout: float) -> bool:
        """Sleep until bytes can be read, or (``write``) written, or :meth:`poke`; ``False`` after ``timeout`` seconds.

        At most one task waits at a time.
        """

    def poke(self) -> None:
        """Wake the waiting task, if there is one, so that it looks again."""

    def watch(self, callback: Callable[[], object]) -> None:
        """Call this whenever bytes can be read, until :meth:`unwatch`; no task waits meanwhile. May be called again.

        Where the loop calls nobody back it does nothing: who needs the bytes waits for them later.
        """

    def unwatch(self) -> None: ...

    def closing(self) -> None:
        """The socket is about to be closed: forget it."""

    def pause(self) -> Awaitable[Any]:
        """Let other tasks run once."""

    def waiter(self) -> Waiter: ...


class FutureWaiter:
    __slots__ = ("_future",)

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._future: asyncio.Future[None] = loop.create_future()

    def wake(self) -> None:
        if not self._future.done():
            self._future.set_result(None)

    def wait(self) -> Awaitable[None]:
        return self._future


class AsyncioReadiness:
    """By the loop's own ``add_reader``/``add_writer``, futures and timers (asyncio and uvloop)."""

    def __init__(self, sock: socket.socket) -> None:
        self._loop = asyncio.get_running_loop()
        self._fd = sock.fileno()
        self._waiting: asyncio.Future[bool] | None = None
        self._watched = False

    async def wait(self, *, write: bool, timeout: float) -> bool:
        loop, fd = self._loop, self._fd
        self._waiting = future = loop.create_future()
        loop.add_reader(fd, _settle, future, True)
        if write:
            loop.add_writer(fd, _settle, future, True)
        timer = loop.call_later(timeout, _settle, future, False)
        try:
            ready: bool = await future
        finally:
            timer.cancel()
            if self._waiting is future:  # otherwise closing() has removed them, and the number may be another's now
                self._forget(write)
        return ready

    def _forget(self, write: bool) -> None:
        self._waiting = None
        self._loop.remove_reader(self._fd)
        if write:
            self._loop.remove_writer(self._fd)

    def poke(self) -> None:
        if self._waiting is not None:
            _settle(self._waiting, True)

    def watch(self, callback: Callable[[], object]) -> None:
        if not self._watched:
            self._watched = True
            self._loop.add_reader(self._fd, callback)

    def unwatch(self) -> None:
        if self._watched:
            self._watched = False
            if not self._loop.is_closed():
                self._loop.remove_reader(self._fd)

    def closing(self) -> None:
        self.unwatch()
        if self._waiting is not None:
            _settle(self._waiting, True)
            if not self._loop.is_closed():
                self._forget(True)

    def pause(self) -> Awaitable[None]:
        return asyncio.sleep(0)

    def waiter(self) -> FutureWaiter:
        return FutureWaiter(self._loop)


def _settle(future: asyncio.Future[bool], ready: bool) -> None:
    if not future.done():
        future.set_result(ready)


class EventWaiter:
    __slots__ = ("_event",)

    def __init__(self) -> None:
        self._event = anyio.Event()

    def wake(self) -> None:
        self._event.set()

    def wait(self) -> Awaitable[None]:
        return self._event.wait()


class AnyioReadiness:
    """By anyio's public functions, on any loop that it knows."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._scope: anyio.CancelScope | None = None
        self._poked = False

    async def wait(self, *, write: bool, timeout: float) -> bool:
        self._poked = False
        try:
            with anyio.move_on_after(timeout) as self._scope:
                if write:
                    async with anyio.create_task_group() as tasks:
                        for wait in (anyio.wait_readable, anyio.wait_writable):
                            tasks.start_soon(self._wait_one, wait, tasks.cancel_scope)
                else:
                    await self._wait_one(anyio.wait_readable, None)
                self._poked = True
        finally:
            self._scope = None
        return self._poked

    async def _wait_one(
        self, wait: Callable[[socket.socket], Awaitable[None]], others: anyio.CancelScope | None
    ) -> None:
        try:
            await wait(self._sock)
        except (anyio.ClosedResourceError, ValueError):  # ValueError: closed before it was waited for
            self._poked = True
        if others is not None:
            others.cancel()

    def poke(self) -> None:
        if self._scope is not None:
            self._poked = True
            self._scope.cancel()

    def watch(self, callback: Callable[[], object]) -> None:
        """Nothing: only tasks wait."""

    def unwatch(self) -> None: ...

    def closing(self) -> None:
        anyio.notify_closing(self._sock)

    def pause(self) -> Awaitable[None]:
        return anyio.lowlevel.checkpoint()

    def waiter(self) -> EventWaiter:
        return EventWaiter()


def readiness(sock: socket.socket) -> Readiness:
    """The fastest :class:`Readiness` for the running event loop."""
    try:
        task = asyncio.current_task()
    except RuntimeError:
        return AnyioReadiness(sock)  # trio
    if task is None:
        return AnyioReadiness(sock)  # trio as a guest of asyncio
    if sys.platform == "win32" and isinstance(asyncio.get_running_loop(), asyncio.ProactorEventLoop):
        return AnyioReadiness(sock)
    return AsyncioReadiness(sock)


Soon = Callable[..., object]
"""``soon(function, *arguments)``: have it called, and do not wait for that."""


def from_threads() -> Soon:
    """Lets other threads have functions called in the running loop, asyncio's. It takes them 1 µs, and nothing in anyio does it
    without waiting for the call.
    """
    return partial(asyncio.get_running_loop().call_soon_threadsafe, context=copy_context())
