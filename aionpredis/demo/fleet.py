"""The simulator processes, as the trainer sees them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from types import TracebackType
from typing import Any

import anyio
from anyio.abc import Process, TaskGroup
from anyio.streams.buffered import BufferedByteReceiveStream

from aionpredis.demo.failure import DemoFailed

__all__ = ["Fleet"]

START_SECONDS = 60.0
"""For importing NumPy and Gymnasium in all simulators at once, on a machine that is busy otherwise."""

STOP_SECONDS = 15.0
"""From the order to stop to the report. It takes as long as a step of an environment and a commit."""

MAX_LINE = 1 << 20

ONE_THREAD = dict.fromkeys(
    ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "BLIS_NUM_THREADS", "VECLIB_MAXIMUM_THREADS"), "1"
)
"""A simulator multiplies a vector with a small matrix: NumPy's thread pool would only take the cores from the others."""


class Fleet:
    """Starts a simulator for each task, for ``async with``. At the end of the block none is left.

    A simulator that ends by itself cancels the block; `DemoFailed` says what happened.
    """

    def __init__(self, tasks: list[Mapping[str, Any]]) -> None:
        self._todo = tasks
        self._processes: list[Process] = []
        self._ready = [anyio.Event() for _ in tasks]
        self._reports: dict[int, dict[str, Any]] = {}
        self._reported = [anyio.Event() for _ in tasks]
        self._tasks: TaskGroup

    async def __aenter__(self) -> Fleet:
        self._tasks = anyio.create_task_group()
        await self._tasks.__aenter__()
        try:
            for number, task in enumerate(self._todo):
                process = await anyio.open_process(
                    [sys.executable, "-m", "aionpredis.demo.simulator"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=None,
                    env=os.environ | ONE_THREAD,
                    start_new_session=True,  # Ctrl-C in a terminal is for the trainer
                )
                self._processes.append(process)
                await self._tell(number, dict(task))
                self._tasks.start_soon(self._listen, number)
        except BaseException as error:
            await self.__aexit__(type(error), error, error.__traceback__)
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        self._tasks.cancel_scope.cancel()
        with anyio.CancelScope(shield=True):
            for process in self._processes:
                if process.returncode is None:
                    process.kill()
            for process in self._processes:
                await process.aclose()
        return await self._tasks.__aexit__(kind, error, trace)

    async def ready(self) -> None:
        """Return when every simulator has made its environments."""
        with anyio.move_on_after(START_SECONDS):
            for event in self._ready:
                await event.wait()
            return
        raise DemoFailed(f"not every simulator was ready within {START_SECONDS:.0f} s")

    async def stop(self) -> list[dict[str, Any]]:
        """Tell all to commit what they have and to stop; their reports."""
        for number in range(len(self._processes)):
            await self._tell(number, "stop")
        with anyio.move_on_after(STOP_SECONDS):
            for event in self._reported:
                await event.wait()
            return [self._reports[number] for number in range(len(self._processes))]
        raise DemoFailed(f"not every simulator stopped within {STOP_SECONDS:.0f} s")

    async def _tell(self, number: int, message: object) -> None:
        stdin = self._processes[number].stdin
        assert stdin is not None
        try:
            await stdin.send(json.dumps(message).encode() + b"\n")
        except anyio.BrokenResourceError:
            pass  # it has ended: _listen says why

    async def _listen(self, number: int) -> None:
        stdout = self._processes[number].stdout
        assert stdout is not None
        lines = BufferedByteReceiveStream(stdout)
        while True:
            try:
                message = json.loads(await lines.receive_until(b"\n", MAX_LINE))
            except (anyio.EndOfStream, anyio.IncompleteRead, anyio.BrokenResourceError):
                break
            if "error" in message:
                raise DemoFailed(f"simulator {number}: {message['error']}")
            if "ready" in message:
                self._ready[number].set()
            else:
                self._reports[number] = message
                self._reported[number].set()
        if not self._reported[number].is_set():
            code = await self._processes[number].wait()
            raise DemoFailed(f"simulator {number} ended unexpectedly, with exit code {code}")
