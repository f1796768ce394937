"""What was deleted lately: a failover can bring it back, since servers replicate later than they answer.

No entry of the log names such data any more, and they have no time to live. Who deleted them knows of them.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from typing import TYPE_CHECKING, NamedTuple
from weakref import WeakKeyDictionary

from aionpredis.replay.entries import KEPT_SECONDS

if TYPE_CHECKING:
    from aionpredis.client import Client
    from aionpredis.retry import Faults

__all__ = ["PAGE", "unlink", "unlink_again"]

logger = logging.getLogger(__name__)

PAGE = 1000
"""Keys in one UNLINK: a few ms of the server. Their entries go right after, so a reader hardly sees one without the other."""

KEPT_PAGES = 64
"""Of up to ``PAGE`` keys, 100 bytes each: 6 MB; for ``KEPT_SECONDS``."""


class _Page(NamedTuple):
    deleted: float
    keys: list[bytes]


class _Memory:
    """Of one client, of all its replays. ``changes``: up to this ``Faults.changes`` what was deleted is known to be gone."""

    def __init__(self, changes: int) -> None:
        self.pages: deque[_Page] = deque(maxlen=KEPT_PAGES)
        self.changes = changes


_memories: WeakKeyDictionary[Faults, _Memory] = WeakKeyDictionary()


async def unlink(client: Client, keys: list[bytes]) -> int:
    """Delete data of runs that have ended, whose keys come to life again by a failover only; how many existed."""
    if not keys:
        return 0
    memory = _memories.setdefault(client.faults, _Memory(client.faults.changes))
    deleted = await client.count_keys("UNLINK", keys, repeatable=True)
    memory.pages.append(_Page(time.monotonic(), keys))
    return deleted


async def unlink_again(client: Client) -> None:
    """Delete again what was deleted lately, if a server may have become another one since. Cancelled, it is still to do."""
    memory, changes = _memories.get(client.faults), client.faults.changes
    if memory is None or memory.changes == changes:
        return
    while memory.pages and time.monotonic() - memory.pages[0].deleted > KEPT_SECONDS:
        memory.pages.popleft()
    count = 0
    for page in tuple(memory.pages):
        count += await client.count_keys("UNLINK", page.keys, repeatable=True)
    memory.changes = changes
    if count:
        logger.warning("%d keys that a failover had brought back were deleted again", count)
