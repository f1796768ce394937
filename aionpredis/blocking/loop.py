"""The event loop of a process' blocking clients: one thread, started by the first of them, ended with the last.

A call from another thread is handed to the loop and waited for: 30 µs for one that does nothing (uvloop), where anyio's
portal, which waits twice, takes 160. The portal starts and ends the thread.

After a fork the child has neither the thread nor, rightly, the sockets: what the parent opened says so there, and whoever
connects anew gets a loop of the child's own.
"""

from __future__ import annotations

import atexit
import os
import threading
import weakref
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager, suppress
from types import TracebackType
from typing import Any, Generic, NoReturn, TypeVar

import anyio
from anyio.abc import TaskGroup, TaskStatus
from anyio.from_thread import start_blocking_portal

from aionpredis.errors import UsageError, WriteFailed
from aionpredis.loop import backend_options
from aionpredis.wire.ready import from_threads

__all__ = ["CLOSED", "Host", "Loop", "acquire", "release", "without_async"]

CLOSED = "the client is closed: call blocking.connect() again"
HERE = {
    "the client is not open: use it inside of `async with aionpredis.connect(…) as client:`": CLOSED,  # it was opened when made
    "`async with": "`with",
    "`await ": "`",
}
"""What the errors of async classes say, and what is to be done without async."""

T = TypeVar("T")

Reason = tuple[type[BaseException] | None, BaseException | None, TracebackType | None]


class Loop:
    """A thread with an event loop. Made by :func:`acquire`."""

    def __init__(self) -> None:
        self.users = 0
        self.forgotten = 0
        """Of these users, those that were garbage: who collects it may be any thread, and cannot wait for this one's end."""
        self.forked = False
        """Whether this process is a fork of the one that has the thread."""
        self._forsaken: list[weakref.WeakMethod[Callable[[], None]]] = []
        self._ended = False
        # Whoever posts does so before the end, or is told so. Who posts may be interrupted by the garbage collector, and it
        # by a client that forgets its host.
        self._lock = threading.RLock()
        self._manager = start_blocking_portal("asyncio", backend_options())
        self._portal = self._manager.__enter__()
        self._portal.start_task(self._serve)

    async def _serve(self, *, task_status: TaskStatus[None]) -> None:
        try:
            async with anyio.create_task_group() as self._tasks:
                self._soon = from_threads()
                self._thread = threading.get_ident()
                task_status.started()
                await anyio.sleep_forever()
        finally:
            with self._lock:
                self._ended = True

    def post(self, function: Callable[..., object], *arguments: object) -> None:
        """Let the loop call the function soon, and do not wait for that. What one thread posts is called in its order."""
        with self._lock:
            self.check()
            self._soon(function, *arguments)

    def spawn(self, function: Callable[[], Awaitable[object]]) -> None:
        """Let the loop run the function as a task, and do not wait for that. What it raises nobody hears."""
        self.post(_Call(function, (), {}).start, self._tasks)

    def call(self, function: Callable[..., Awaitable[T]], *arguments: Any, **options: Any) -> T:
        """Run the function in the loop, and return what it returns or raise what it raises.

        An interruption (Ctrl-C: :class:`KeyboardInterrupt`) cancels it, and is raised when it has ended.
        """
        if threading.get_ident() == self._thread:
            raise UsageError("this is the thread of the event loop, where a blocking call would wait for itself")
        call = _Call(function, arguments, options)
        try:
            self.post(call.start, self._tasks)
            call.wait()
        except BaseException:
            with suppress(UsageError):  # the loop has ended, and with it the call
                self.post(call.cancel)
                call.wait()
            raise
        return call.result()

    def enter(self, manager: AbstractAsyncContextManager[Any, Any]) -> Host:
        """Enter an async context manager."""
        host = Host(manager)
        try:
            self.call(self._tasks.start, host.live)
        except BaseException:
            with suppress(UsageError):
                self.post(host.abandon)  # interrupted when it had just been entered
            raise
        return host

    def leave(self, host: Host, *reason: Any) -> bool | None:
        """Leave it, for this reason (type, exception, traceback); whether the exception is to be swallowed. In a process that
        was forked off meanwhile nothing happens: there it was never entered.
        """
        return None if self.forked else self.call(host.leave, reason)

    def forget(self, host: Host) -> None:
        """Leave it, as if cancelled, and do not wait for that: its client was collected."""
        with self._lock:
            self.forgotten += 1
            if not (self.forked or self._ended):
                self._soon(host.abandon)

    def check(self) -> None:
        """
        Raises:
            UsageError: there is no such thread.
        """
        if self.forked:
            raise UsageError(
                "this was opened in another process, of which this one is a fork: call blocking.connect() again, here"
            )
        if self._ended:
            raise UsageError(CLOSED)

    def end(self) -> None:
        """Cancel what runs, and end the thread."""
        with self._lock:
            if self.forked:
                return
            if not self._ended:
                self._soon(self._tasks.cancel_scope.cancel)
            self._ended = True
        self._manager.__exit__(None, None, None)

    def forsake_with(self, method: Callable[[], None]) -> None:
        """Call this method (of an object that may be gone by then) in a fork."""
        self._forsaken = [known for known in self._forsaken if known() is not None]
        self._forsaken.append(weakref.WeakMethod(method))

    def forsake(self) -> None:
        """To be called in a fork, which has no such thread; the lock may be held for ever."""
        self.forked = True
        self._lock = threading.RLock()
        for known in self._forsaken:
            if (method := known()) is not None:
                method()


def _raise_kept(owner: _Call[Any] | Host) -> NoReturn:
    """Raise the error that it kept for this, and let neither it nor a frame refer to the error any longer."""
    error, owner._error = owner._error, None
    assert error is not None
    try:
        raise error
    finally:
        del error  # it refers to this frame


def without_async(error: BaseException) -> None:
    """Let an async class' error about its use, or a writer's with such a reason, say what is to be done without async."""
    if isinstance(error, UsageError | WriteFailed):
        text = str(error)
        for theirs, ours in HERE.items():
            text = text.replace(theirs, ours)
        error.args = (text,)


class _Call(Generic[T]):
    """A function that runs in the loop, and the thread that waits for it."""

    __slots__ = ("_arguments", "_done", "_error", "_finished", "_function", "_options", "_scope", "_values")

    def __init__(
        self, function: Callable[..., Awaitable[T]], arguments: tuple[Any, ...], options: dict[str, Any]
    ) -> None:
        self._function = function
        self._arguments = arguments
        self._options = options
        self._values: list[T] = []
        self._error: BaseException | None = None
        self._scope: anyio.CancelScope | None = None
        self._finished = False
        self._done = threading.Lock()  # the cheapest thing that a signal interrupts
        self._done.acquire()

    def start(self, tasks: TaskGroup) -> None:
        """Called in the loop."""
        self._scope = anyio.CancelScope()
        try:
            tasks.start_soon(self._run, self._scope)
        except RuntimeError as error:  # they have ended
            self._error = error
            self._finish()

    async def _run(self, scope: anyio.CancelScope) -> None:
        try:
            with scope:
                self._values.append(await self._function(*self._arguments, **self._options))
        except anyio.get_cancelled_exc_class():
            raise
        except BaseException as error:
            self._error = error
        finally:
            self._finish()

    def _finish(self) -> None:
        self._finished = True
        self._done.release()

    def cancel(self) -> None:
        """Called in the loop, after :meth:`start` or instead of it: an interruption may come before that is posted."""
        if self._scope is None:
            self._finish()
        else:
            self._scope.cancel()

    def wait(self) -> None:
        """Until it has ended. Interrupted, it may be called again: the lock may be taken then, but only after the end."""
        if not self._finished:
            self._done.acquire()

    def result(self) -> T:
        if self._error is not None:
            without_async(self._error)
            _raise_kept(self)
        if not self._values:
            raise UsageError("the client was closed meanwhile")
        return self._values[0]


class Host:
    """The task in which an async context manager is entered and left."""

    def __init__(self, manager: AbstractAsyncContextManager[Any, Any]) -> None:
        self._manager = manager
        self._reason: Reason = None, None, None
        self._result: bool | None = None
        self._error: BaseException | None = None
        self._scope: anyio.CancelScope | None = None

    async def live(self, *, task_status: TaskStatus[None]) -> None:
        self._leaving, self._left = anyio.Event(), anyio.Event()
        entered = False
        try:
            with anyio.CancelScope() as self._scope:
                await self._manager.__aenter__()
                entered = True
                try:
                    task_status.started()
                    await self._leaving.wait()
                except BaseException as error:  # cancelled: abandoned, or the loop ends
                    await self._manager.__aexit__(type(error), error, error.__traceback__)
                    raise
                self._result = await self._manager.__aexit__(*self._reason)
        except anyio.get_cancelled_exc_class():
            raise
        except BaseException as error:
            if not entered:
                raise
            self._error = error
        finally:
            self._reason = None, None, None
            self._left.set()

    async def leave(self, reason: Reason) -> bool | None:
        self._reason = reason
        self._leaving.set()
        try:
            await self._left.wait()
        except anyio.get_cancelled_exc_class():
            self.abandon()
            with anyio.CancelScope(shield=True):
                await self._left.wait()
            raise
        if self._error is not None:
            _raise_kept(self)
        return self._result

    def abandon(self) -> None:
        if self._scope is not None:
            self._scope.cancel()


_lock = threading.Lock()
_loop: Loop | None = None


def acquire() -> Loop:
    """The loop of this process, for one client more."""
    global _loop
    with _lock:
        if _loop is None:
            _loop = Loop()
        _loop.users += 1
        return _loop


def release(loop: Loop) -> None:
    """A client less. The last one ends the thread."""
    global _loop
    with _lock:
        loop.users -= 1
        if loop is not _loop or loop.users > loop.forgotten:
            return
        _loop = None
        loop.end()


@atexit.register
def _at_exit() -> None:
    """What was never closed: a thread must not be in the midst of something when the interpreter ends."""
    global _loop
    loop, _loop = _loop, None
    if loop is not None:
        loop.end()


def _after_fork() -> None:
    global _lock, _loop
    _lock = threading.Lock()  # another thread of the parent may have held it
    loop, _loop = _loop, None
    if loop is not None:
        loop.forsake()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
