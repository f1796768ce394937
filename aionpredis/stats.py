"""What a client counts."""

from __future__ import annotations

from collections import Counter

__all__ = ["Counters"]


class Counters:
    """Counted where it happens: once for a system call, a request or a batch, never for an array."""

    __slots__ = ("errors", "reconnects", "retries")

    def __init__(self) -> None:
        self.retries = 0
        self.reconnects = 0
        self.errors: Counter[str] = Counter()
