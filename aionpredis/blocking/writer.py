"""Batching writes with backpressure, without async."""

from __future__ import annotations

import aionpredis
from aionpredis.blocking.facade import Entered, waits

__all__ = ["Writer"]


class Writer(Entered[aionpredis.Writer]):
    """:class:`aionpredis.Writer` without async. Made by :meth:`Client.writer`; use it with ``with``."""

    put = waits(aionpredis.Writer.put)
    put_record = waits(aionpredis.Writer.put_record)
    flush = waits(aionpredis.Writer.flush)

    @property
    def inflight(self) -> int:
        """Bytes that are held at the moment: put, and neither stored nor failed."""
        return self._target.inflight
