"""Learners that share a run by acknowledging what they have processed: a consumer group of the server's on the log.

**At least once**: what a learner had and did not acknowledge is given to another one. A learner that was only slow then has
it, too. For exactly once, without that, share by ``shard=``.
"""

from __future__ import annotations

import math
import os
import time
from collections import deque
from collections.abc import Awaitable, Collection, Iterable
from typing import TYPE_CHECKING, Any

import anyio

from aionpredis import streams
from aionpredis.errors import CorruptValue, ServerError, UsageError
from aionpredis.replay.log import FIELD, ChunkId, LogReader, Names, parse_commit
from aionpredis.wire.connection import Connection

if TYPE_CHECKING:
    from aionpredis.client import Client

__all__ = ["GroupSource"]

COUNT = 64
"""Chunks that one learner takes at once: what it holds is not for the others until it is reclaimed."""

ALL = (1 << 63) - 1
"""The largest count that the server takes."""


class GroupSource:
    """Chunks of a run that the group gives to this learner, and those of learners that do not acknowledge any more.

    ``reclaim``: seconds after which a chunk that was not acknowledged is given to another learner.
    """

    in_order = False

    def __init__(self, client: Client, names: Names, log: LogReader, group: str, *, reclaim: float) -> None:
        if not 0 < reclaim < 1e9:
            raise UsageError(f"reclaim is a positive number of seconds, not {reclaim!r}")
        self._client = client
        self._names = names
        self._log = log
        self._group = f"{group}:{log.run}"
        self._consumer = os.urandom(8).hex()
        self._idle_ms = round(float(reclaim) * 1000)
        self._pause = min(1.0, client.block_seconds, reclaim / 4)
        self._chunks: deque[ChunkId] = deque()
        self._held: set[ChunkId] = set()  # given to this learner, and not handed out
        self.handed_out: set[ChunkId] = set()
        """Chunks whose last row is in a batch that was handed out, and that were not acknowledged."""
        self._lost: list[ChunkId] = []  # not on the server, and not acknowledged
        self._until = 0.0  # until then a batch that is not full waits for more
        self._made = False
        self._asking = False  # still so: a step was cancelled, perhaps with what it was given
        self._changes = client.faults.changes

    def take(self) -> ChunkId | None:
        return self._chunks.popleft() if self._chunks else None

    def lose(self, chunk: ChunkId) -> bool:
        """It is acknowledged here: it may leave no batch that anybody could acknowledge, and would be reclaimed for ever."""
        self._lost.append(chunk)
        return True

    def substitute(self, chunk: ChunkId) -> ChunkId | None:
        return None

    @property
    def hands_over(self) -> bool:
        """Whether a batch that is not full is handed out rather than held: its chunks would go to another learner."""
        return not self._chunks

    def hand_out(self, chunks: Iterable[ChunkId]) -> None:
        """A batch with the last rows of these is handed out."""
        self._held.difference_update(chunks)
        self.handed_out.update(chunks)

    async def more(self) -> bool:
        if not self._made:
            await self._make()
        if self._lost:
            await self.acknowledge(self._lost)
            self._lost = []
        ended = await self._has_ended()  # before looking, so that nothing is added behind the last look
        try:
            if self._asking or self._client.faults.changes != self._changes:
                self._changes = self._client.faults.changes
                await self._add(self._given())
            if not self._chunks:
                await self._add(self._claim())
            if not self._chunks:
                # Not for the whole pause each time: a step may be cancelled and repeated more often.
                wait = self._until - time.monotonic() if self._held else self._pause
                await self._add(self._read(0 if ended else wait))
            if not self._chunks and not self._held and ended:
                if not await self._pending():
                    return False
                await anyio.sleep(self._pause)  # another learner holds them: they are acknowledged, or reclaimed
        except ServerError as error:
            if "NOGROUP" not in str(error):
                raise
            if await self._has_ended():  # the group of the next run was made
                return False
            self._made = False  # a failover has lost it; what was acknowledged comes again
        return True

    async def acknowledge(self, chunks: Collection[ChunkId]) -> None:
        """They were processed; nobody gets them again."""
        if chunks:
            await self._client.call("XACK", self._names.log, self._group, *map(self._id, chunks), repeatable=True)
            self.handed_out.difference_update(chunks)

    def _id(self, chunk: ChunkId) -> bytes:
        return b"%d-%d" % (self._log.run, chunk.entry)

    async def _make(self) -> None:
        """The group, if it is not there yet; those of older runs are deleted."""
        name, _, _ = self._group.rpartition(":")
        for facts in await self._client.call("XINFO", "GROUPS", self._names.log, repeatable=True):
            other = dict(zip(facts[::2], facts[1::2], strict=True))[b"name"].decode("utf-8", "replace")
            prefix, _, run = other.rpartition(":")
            if prefix == name and run.isdigit() and int(run) < self._log.run:
                await self._client.call("XGROUP", "DESTROY", self._names.log, other, repeatable=True)
        try:
            await self._client.call(
                "XGROUP", "CREATE", self._names.log, self._group, f"{self._log.run}-0", repeatable=True
            )
        except ServerError as error:
            if "BUSYGROUP" not in str(error):
                raise
        self._made = True

    async def _has_ended(self) -> bool:
        last = await streams.last_generated(self._client, self._names.log)
        return last is None or last[0] > self._log.run

    async def _given(self) -> list[Any]:
        """What this learner was given by replies that were cancelled, or lost with their connection.

        XREADGROUP would say it, too, but also begin the ``reclaim`` of all that it has handed out anew.
        """
        known = set(map(self._id, self._held | self.handed_out))  # before asking: some may be acknowledged meanwhile
        command = "XPENDING", self._names.log, self._group, "-", "+", ALL, self._consumer
        pending = await self._client.call(*command, repeatable=True)
        ids = [raw_id for raw_id, *_ in pending if raw_id not in known]
        looks = [("XRANGE", self._names.log, raw_id, raw_id) for raw_id in ids]
        entries: list[Any] = []
        for raw_id, found in zip(ids, await self._client.call_many(looks, repeatable=True), strict=True):
            if isinstance(found, ServerError):
                raise found
            entries += found or [[raw_id, None]]  # deleted: as the commands of groups say it
        return entries

    async def _claim(self) -> list[Any]:
        command = "XAUTOCLAIM", self._names.log, self._group, self._consumer, self._idle_ms, "0-0", "COUNT", COUNT
        claimed: list[Any] = (await self._client.call(*command, repeatable=True))[1]
        return claimed

    async def _read(self, wait: float) -> list[Any]:
        block = ("BLOCK", math.ceil(wait * 1000)) if wait > 0 else ()

        async def read(connection: Connection) -> Any:
            command = "XREADGROUP", "GROUP", self._group, self._consumer, "COUNT", COUNT, *block
            return (await streams.ask(connection, (*command, "STREAMS", self._names.log, ">")))[0]

        found = await streams.alone(self._client, self._names.log, read)
        entries: list[Any] = [] if found is None else found[0][1]
        return entries

    async def _pending(self) -> int:
        return int((await self._client.call("XPENDING", self._names.log, self._group, repeatable=True))[0])

    async def _add(self, asked: Awaitable[list[Any]]) -> None:
        """The chunks among what the server gives."""
        self._asking = True
        others: list[bytes] = []
        wrong: CorruptValue | None = None
        for entry in await asked:
            raw_id, fields = entry
            if int(raw_id.partition(b"-")[0]) == self._log.run and fields and fields[0] == FIELD:
                try:
                    (chunk,) = self._log.checked(map(parse_commit, [entry]))
                except CorruptValue as error:  # it stays pending, and does not hold up the others
                    wrong = error
                    continue
                if chunk not in self._held:  # else it is claimed from this learner, whose batch is not full yet
                    self._held.add(chunk)
                    self._chunks.append(chunk)
                    self._until = time.monotonic() + self._pause
            else:
                others.append(raw_id)  # of the next run, which has a group of its own
        if others:
            await self._client.call("XACK", self._names.log, self._group, *others, repeatable=True)
        self._asking = False
        if wrong is not None:
            raise wrong
