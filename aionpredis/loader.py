"""Batches ahead of time: receiving goes on while the training step works in a thread or on a device."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from types import TracebackType
from typing import Generic, TypeVar

import anyio
import anyio.lowlevel
from anyio.abc import TaskGroup

from aionpredis.errors import UsageError
from aionpredis.names import is_count

__all__ = ["Loader"]

T = TypeVar("T")

CLOSE_SECONDS = 1.0
"""Seconds that an async generator has for its cleanup."""


def _outside() -> UsageError:
    return UsageError("use the loader inside of its `async with` block")


class Loader(Generic[T]):
    """Keeps up to ``prefetch`` batches of any async iterator ready, by a task of its own::

        async with Loader(await replay.epoch(), prefetch=2) as batches:
            async for batch in batches:
                await anyio.to_thread.run_sync(train, batch)

    It pays when the training step leaves the event loop free (a worker thread, a device); a step that computes in the
    event loop leaves it no time, and without a loader the socket's buffers hold the next ~4 MB anyway. Memory: at most
    ``prefetch + 2`` batches exist. An exception of the iterator is raised in the ``async for``.
    """

    def __init__(self, batches: AsyncIterator[T], *, prefetch: int = 2) -> None:
        if not is_count(prefetch):
            raise UsageError(f"prefetch is at least 1 batch, not {prefetch!r}")
        self._batches = batches
        self._prefetch = prefetch
        self._tasks: TaskGroup | None = None
        self._error: Exception | None = None

    async def __aenter__(self) -> Loader[T]:
        if self._tasks is not None:
            raise UsageError("a loader is for one `async with` block")
        self._send, self._receive = anyio.create_memory_object_stream[T](self._prefetch)
        self._tasks = anyio.create_task_group()
        await self._tasks.__aenter__()
        self._tasks.start_soon(self._load)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._tasks is not None
        self._tasks.cancel_scope.cancel()
        cancelled = isinstance(error, anyio.get_cancelled_exc_class())
        try:
            await self._tasks.__aexit__(*((kind, error, trace) if cancelled else (None, None, None)))
        finally:
            self._receive.close()
            self._send.close()

    async def _load(self) -> None:
        with self._send:
            try:
                async for batch in self._batches:
                    await self._send.send(batch)
            except Exception as error:
                self._error = error
            finally:
                if isinstance(self._batches, AsyncGenerator):  # the loader ends in the middle: so does it, here
                    with anyio.move_on_after(CLOSE_SECONDS, shield=True):
                        await self._batches.aclose()

    def __aiter__(self) -> Loader[T]:
        return self

    async def __anext__(self) -> T:
        if self._tasks is None:
            raise _outside()
        try:
            return await self._receive.receive()
        except anyio.ClosedResourceError:
            raise _outside() from None
        except anyio.EndOfStream:
            if self._error is not None:
                raise self._error from None
            await anyio.lowlevel.checkpoint()  # the loading task may be gone because all of this is being cancelled
            raise StopAsyncIteration from None
