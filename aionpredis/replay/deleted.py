"""What was deleted lately: a failover can bring it back, since servers replicate later than they answer.

No entry of the log names such data any more, and they have no time to live. Who deleted them knows of them.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from typing import TYPE_CHECKING

from aionpredis.replay.entries import KEPT_SECONDS

if TYPE_CHECKING:
    from aionpredis.client import Client

__all__ = ["Deleted"]

logger = logging.getLogger(__name__)

KEPT_PAGES = 64
"""Of up to ``UNLINK_KEYS`` keys, 100 bytes each: 6 MB; for ``KEPT_SECONDS``."""


class Deleted:
    """Data of ended runs, deleted here. Their keys never come to life again but by a failover."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._pages: deque[tuple[float, list[bytes]]] = deque(maxlen=KEPT_PAGES)
        self._changes = client.faults.changes

    async def unlink(self, keys: list[bytes]) -> int:
        """Delete them; how many existed."""
        deleted = await self._client.count_keys("UNLINK", keys, repeatable=True)
        self._pages.append((time.monotonic(), keys))
        return deleted

    async def again(self) -> None:
        """Delete again what was deleted lately, if a server may have become another one since. Cancelled, it is still to do."""
        changes = self._client.faults.changes
        if changes == self._changes:
            return
        while self._pages and time.monotonic() - self._pages[0][0] > KEPT_SECONDS:
            self._pages.popleft()
        count = 0
        for _, keys in tuple(self._pages):
            count += await self._client.count_keys("UNLINK", keys, repeatable=True)
        self._changes = changes
        if count:
            logger.warning("%d keys that a failover had brought back were deleted again", count)
