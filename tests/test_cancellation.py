"""Whatever is cancelled, at whichever await: nobody gets what is another's, nothing is written later, nothing leaks or hangs.

The calls and the checks are in ``cancelling.py``.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import redis

from .cancelling import WAYS, Figures, go

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("way", WAYS)
async def test_nothing_is_mixed_up_lost_or_leaked_when_calls_are_cancelled(
    way: str, url: str, stock: redis.Redis, tmp_path: Path
) -> None:
    figures = Figures()
    await go(way, url, stock, tmp_path, figures, 1)
    assert figures.cancelled > figures.calls / 3
    assert figures.checked > figures.calls
    assert len(figures.at) > 40
