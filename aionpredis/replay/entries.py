"""The last entries of an actor in the log: what a failover has taken from there is added again.

A log's new primary may lack what the old one added last. The data lie on other servers, too, and are still there: named by no
entry they would stay for ever, and be read by nobody. Who added the entries knows of them.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from aionpredis import streams
from aionpredis.errors import ServerError
from aionpredis.replay.log import FIELD, Names, unpack

if TYPE_CHECKING:
    from aionpredis.client import Client
    from aionpredis.retry import Retry

__all__ = ["ABSENT", "LastEntries"]

logger = logging.getLogger(__name__)

ABSENT = -2
"""What ``PTTL`` says of a key that does not exist."""

KEPT = 4096
"""Entries that are remembered at most, of 170 bytes: at 1,000 transitions a second in chunks of 16, those of a minute."""

KEPT_SECONDS = 60.0
"""For so long: when a replica has heard nothing for this time (``repl-timeout``), servers themselves say that it does not
follow. Of a thousand actors, each of which adds one a second, these are 11 MB; as many that are full would be 700."""

TOGETHER = 64
"""Entries that are looked at in one request. If all of these are there, so is what is older: a failover takes the last ones.
Of those that travelled while the servers changed it may be others, but an actor has at most 32 of them (``MAX_BUFFERS``)."""

NEVER = -1


class LastEntries:
    """Of one actor, in its present run. ``lease_ms``: the time to live of data whose entry cannot be added any more."""

    def __init__(self, client: Client, names: Names, lease_ms: bytes) -> None:
        self._client = client
        self._names = names
        self._log = names.log.encode()
        self._lease_ms = lease_ms
        self._run = 0
        # Packed commits, in the order of the log, with the number and when it was known to be there.
        self._entries: deque[tuple[bytes, int, float]] = deque(maxlen=KEPT)
        self._changes = client.faults.changes
        self._late = False

    @property
    def doubtful(self) -> bool:
        """Whether the server may have become another one since they were known to be there."""
        return self._client.faults.changes != self._changes or self._late

    def add(self, run: int, packed: bytes, entry: int) -> None:
        """An entry that the server has added: 0.4 µs."""
        now = time.monotonic()
        if run != self._run:
            self._run = run
            self._entries.clear()
        while self._entries and now - self._entries[0][2] > KEPT_SECONDS:
            self._entries.popleft()
        self._entries.append((packed, entry, now))

    def sent(self, changes: int) -> None:
        """What was added lately was sent when ``Faults.changes`` was this: if it is another now, a server that is none any more
        may have added it.
        """
        if changes != self._client.faults.changes:
            self._late = True

    async def restore(self, *, ended: bool = False, retry: Retry | None = None) -> None:
        """If there is doubt: add those again that are not in the log. Readers drop what they have read already.

        One look is enough, if it went over one connection to the log's server: faults of others go on, and raise doubt again,
        as long as one of them is down.

        But for those without data, which were evicted, or lost as well. Data whose entry the server does not take any more,
        because the run has ended or the log was deleted, get a lease as before they were committed. ``ended``: it has for sure,
        whatever the server would take. ``retry``: see :meth:`aionpredis.Client.request`.

        Raises:
            ServerError: it has no room, for instance. To be called again, as after a cancellation.
        """
        while self.doubtful:
            changes, over = self._client.faults.changes, self._client.live_connection(self._log)
            self._changes, self._late = NEVER, False
            known: dict[bytes, int] = {}
            for packed, entry, _ in self._entries:
                known.pop(packed, None)  # if it is there twice, the last one counts
                known[packed] = entry
            self._entries.clear()
            added = 0
            try:
                lost = await self._lost(known, retry)
                for first in range(0, len(lost), TOGETHER):
                    added += await self._add_again(known, lost[first : first + TOGETHER], ended, retry)
            finally:
                now = time.monotonic()
                self._entries = deque([*((*item, now) for item in known.items()), *self._entries], KEPT)
            self._changes = changes
            if added:
                logger.warning("%s: %d entries that the log had lost were added again", self._names.name, added)
            if over is not None and over is self._client.live_connection(self._log):
                break

    async def _lost(self, known: Mapping[bytes, int], retry: Retry | None) -> list[bytes]:
        """Packed commits that are not in the log, in order."""
        entries = list(known.items())
        lost: list[bytes] = []
        for stop in range(len(entries), 0, -TOGETHER):
            some = entries[max(0, stop - TOGETHER) : stop]
            ids = (f"{self._run}-{entry}" for _, entry in some)
            present = await self._ask([("XRANGE", self._names.log, each, each) for each in ids], retry)
            # Another chunk may have taken the number.
            gone = [packed for (packed, _), found in zip(some, present, strict=True) if _commit(found) != packed]
            if not gone:
                break
            lost[:0] = gone
        return lost

    async def _add_again(self, known: dict[bytes, int], lost: Sequence[bytes], ended: bool, retry: Retry | None) -> int:
        """Those of them that have data; how many. The others are forgotten."""
        keys = {packed: self._names.data(self._run, unpack(packed)) for packed in lost}
        left = dict(zip(lost, await self._ask([("PTTL", key) for key in keys.values()], retry), strict=True))
        present = [packed for packed in lost if left[packed] != ABSENT]
        replies: dict[bytes, Any] = dict.fromkeys(lost)
        if not ended:
            command = "XADD", self._names.log, "NOMKSTREAM", f"{self._run}-*", FIELD
            commands = [(*command, packed) for packed in present]
            added = await self._client.call_many(commands, repeatable=True, retry=retry)
            replies.update(zip(present, added, strict=True))
        named = {packed: int(reply.partition(b"-")[2]) for packed, reply in replies.items() if isinstance(reply, bytes)}
        refused = [packed for packed in lost if replies[packed] is None or streams.is_stale(replies[packed])]
        # Not before they are named. A failover of theirs may have taken the PERSIST from the data.
        persist = [("PERSIST", keys[packed]) for packed in named if left[packed] >= 0]
        lend = [("PEXPIRE", keys[packed], self._lease_ms) for packed in refused if left[packed] != ABSENT]
        await self._ask([*persist, *lend], retry)
        for packed in (*named, *refused):
            del known[packed]
        known.update(named)  # they are the last ones now
        self._client.counters.repeated += len(named)
        _raise_first(value for packed, value in replies.items() if packed in known)
        return len(named)

    async def _ask(self, commands: Sequence[Sequence[Any]], retry: Retry | None) -> list[Any]:
        """Their replies; raises the first that is an error."""
        replies = await self._client.call_many(commands, repeatable=True, retry=retry)
        _raise_first(replies)
        return replies


def _commit(found: list[Any]) -> bytes | None:
    """The packed commit in what XRANGE has found."""
    return found[0][1][1] if found and found[0][1][:1] == [FIELD] else None


def _raise_first(replies: Iterable[Any]) -> None:
    for reply in replies:
        if isinstance(reply, ServerError):
            raise reply
