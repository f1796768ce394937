"""End-to-end backpressure: actors wait when the learners fall behind.

Learners write how far they have read, ``{name}:read``, a field for each; actors that have gone ``max_lag`` beyond the slowest
look there until it has caught up. It costs nothing while nobody lags.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, TypeVar

import anyio

from aionpredis import streams
from aionpredis.errors import CorruptValue
from aionpredis.replay.log import Names

if TYPE_CHECKING:
    from aionpredis.client import Client

__all__ = ["Lag", "Progress", "entries_of", "slowest"]

T = TypeVar("T")

WRITE_SECONDS = 0.02
"""A learner says how far it is at most so often."""

LOOK_SECONDS = 0.01, 0.1
"""Pauses between an actor's looks while it waits: they double from the first to the last."""

_READ = re.compile(rb"(\d{1,20}):(\d{1,20})")


class Progress:
    """What one learner has read of a run, for the actors to see. ``learner``: a name among the run's learners."""

    def __init__(self, client: Client, names: Names, run: int, learner: str) -> None:
        self._client = client
        self._key = names.read
        self._run = run
        self._learner = learner
        self._written = 0  # as actors take it to be before they read it
        self._at = 0.0
        self._changes = client.faults.changes

    def said(self, entry: int) -> bool:
        """Whether the actors know already."""
        if self._client.faults.changes != self._changes:
            # What was written may be lost, and the log may end earlier than it did.
            self._changes, self._written = self._client.faults.changes, 0
        return entry <= self._written

    async def note(self, entry: int, *, now: bool = False) -> None:
        """All chunks up to this entry of the log were read. ``now``: not only once in a while."""
        if not self.said(entry) and (now or time.monotonic() - self._at > WRITE_SECONDS):
            await self._client.call("HSET", self._key, self._learner, f"{self._run}:{entry}", repeatable=True)
            self._written, self._at = entry, time.monotonic()


class Lag:
    """Holds an actor while its run has more than ``most`` chunks that a learner has not read; 0: never.

    It is asked before a chunk is sent: what has been begun is finished, or its lease would run out.
    """

    def __init__(self, client: Client, names: Names, most: int) -> None:
        self._client = client
        self._key = names.read
        self._log = names.log
        self._most = most
        self._run = 0
        self._read = 0

    def is_behind(self, run: int, entry: int) -> bool:
        """Whether ``entry`` is too far ahead of what was read when last looked: of nothing, before there is a learner."""
        if run != self._run:
            self._run, self._read = run, 0
        return bool(self._most) and entry - self._read > self._most

    async def wait(self, run: int, entry: int) -> None:
        """Return when the learners have caught up with ``entry``, or the run has ended."""
        pause = LOOK_SECONDS[0]
        while self.is_behind(run, entry):
            self._read = await self._slowest()
            last = await streams.last_generated(self._client, self._log)
            if last is not None and last[0] == run:
                entry = min(entry, last[1])  # a failover may have lost the end of the log
            if not self.is_behind(run, entry) or last is None or last[0] != run:
                break  # the next commit will find that it has ended
            await anyio.sleep(pause)
            pause = min(2 * pause, LOOK_SECONDS[1])

    async def _slowest(self) -> int:
        fields: list[bytes] = await self._client.call("HVALS", self._key, repeatable=True)
        try:
            return slowest(fields, self._run)
        except CorruptValue as error:
            error.key = self._key
            raise


def slowest(fields: Iterable[bytes], run: int) -> int:
    """The lowest entry among what the learners of a run wrote, ``run:entry`` each; 0 if there is none.

    Raises:
        CorruptValue: one of them wrote something else.
    """
    return min(entries_of(dict(enumerate(fields)), run).values(), default=0)


def entries_of(fields: Mapping[T, bytes], run: int) -> dict[T, int]:
    """The entries among what the learners of a run wrote, by learner.

    Raises:
        CorruptValue: one of them wrote something else.
    """
    entries = {}
    for learner, written in fields.items():
        found = _READ.fullmatch(written)
        if found is None:
            raise CorruptValue(f"a learner's progress is run:entry, not {written[:40]!r}")
        if int(found[1]) == run:
            entries[learner] = int(found[2])
    return entries
