"""Whatever is cancelled, at whichever await: nobody gets what is another's, nothing is written later, nothing leaks or hangs.

The calls and the checks are in ``cancelling.py``.
"""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path

import pytest
import redis

import aionpredis

from .cancelling import WAYS, Figures, go, stepped
from .servers import until

# A call suspends more often on a slow machine, and is cancelled at each of these steps.
pytestmark = [pytest.mark.anyio, pytest.mark.timeout(240)]


# What differs between the servers has little to do with cancellation.
@pytest.mark.parametrize(
    ("server", "way"), [("redis", "at random"), *(("valkey", way) for way in WAYS)], indirect=["server"]
)
async def test_nothing_is_mixed_up_lost_or_leaked_when_calls_are_cancelled(
    way: str, url: str, stock: redis.Redis, tmp_path: Path
) -> None:
    figures = Figures()
    await go(way, url, stock, tmp_path, figures, 1)
    assert figures.cancelled > figures.calls / 3
    assert figures.checked > figures.calls
    assert len(figures.at) > 40


async def test_embedded_server_goes_with_a_client_whose_opening_or_closing_is_cancelled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def open_and_close() -> None:
        async with aionpredis.connect() as client:
            assert await client.execute("PING") == b"PONG"

    monkeypatch.delenv("REDIS_URL", raising=False)
    with tempfile.TemporaryDirectory() as folder:
        monkeypatch.setattr(tempfile, "tempdir", folder)  # there the server makes its own
        for step in itertools.count():
            if not await stepped(open_and_close, Figures(), step):
                break
            until(lambda: not any(Path(folder).iterdir()), "the server and its folder are gone")
        assert step > 3
