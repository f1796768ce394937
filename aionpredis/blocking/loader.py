"""Batches ahead of time: the loop receives them while the caller's thread trains."""

from __future__ import annotations

from typing import Any, Generic, TypeVar

import aionpredis
from aionpredis.blocking.facade import Entered, Steps
from aionpredis.errors import UsageError

__all__ = ["Loader"]

T = TypeVar("T")


class Loader(Steps[aionpredis.Loader[T], T], Entered[aionpredis.Loader[T]], Generic[T]):
    """:class:`aionpredis.Loader` without async::

        with blocking.Loader(replay.epoch(), prefetch=2) as batches:
            for batch in batches:
                train(batch)

    Keeps up to ``prefetch`` batches ready, of what a replay or a policy iterates over.
    """

    def __init__(self, batches: Steps[Any, T], *, prefetch: int = 2) -> None:
        if not isinstance(batches, Steps):
            raise UsageError(f"a Loader is for what blocking.Replay iterates over, not for a {type(batches).__name__}")
        super().__init__(batches._loop, aionpredis.Loader(batches._target, prefetch=prefetch), batches)
