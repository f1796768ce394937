"""Chunks of one transition each, many with one ``MGET``: a request for each would take twice the time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from aionpredis.replay.plan import Plan
from aionpredis.requests import row_views

if TYPE_CHECKING:
    from aionpredis.client import Client

__all__ = ["Singles", "place"]


class Singles:
    """Receives files that are laid out alike: large columns in place, small ones into :attr:`small`."""

    def __init__(self, client: Client, plan: Plan) -> None:
        self._client = client
        self._plan = plan
        self._sizes = tuple(
            part if isinstance(part, int) else next(size for name, _, size in plan.large if name == part)
            for part in plan.order
        )
        self.small = np.empty((0, plan.scratch_bytes), np.uint8)
        """Shape ``(transitions, bytes)``: the small columns of the last :meth:`fetch`."""
        # For each series of small columns: its place for each transition.
        self._small_views: list[list[memoryview]] = []

    async def fetch(self, keys: Sequence[bytes], columns: dict[str, NDArray[Any]]) -> list[int]:
        """Receive the file of ``keys[i]`` into row *i* of each large column; which are missing, or other files."""
        self._reserve(len(keys))
        small = iter(self._small_views)
        # One after the other as they come: for each file its parts in order.
        count = len(self._sizes)
        places: list[memoryview] = [memoryview(b"")] * (count * len(keys))
        for index, part in enumerate(self._plan.order):
            places[index::count] = next(small)[: len(keys)] if isinstance(part, int) else row_views(columns[part])
        head = self._plan.head
        lost: list[int] = []

        async def other(numbers: Sequence[int], values: list[Any]) -> None:
            for number, value in zip(numbers, values, strict=True):
                if not place(value, head, places[number * count : (number + 1) * count]):
                    lost.append(number)

        await self._client.receive_parts(keys, head, self._sizes, places, other, immutable=True)
        return lost

    def _reserve(self, rows: int) -> None:
        if rows <= len(self.small):
            return
        self.small = np.empty((rows, self._plan.scratch_bytes), np.uint8)
        self._small_views = []
        at = 0
        for part in self._plan.order:
            if isinstance(part, int):
                self._small_views.append([row[at : at + part].data for row in self.small])
                at += part


def place(value: NDArray[np.uint8] | None, head: bytes, places: list[memoryview]) -> bool:
    """Copy a file that came with others than expected; whether it is one of those that were asked for."""
    if value is None or len(value) != len(head) + sum(map(len, places)) or value[: len(head)].tobytes() != head:
        return False
    at = len(head)
    for place in places:
        place[:] = value[at : at + len(place)].data
        at += len(place)
    return True
