"""The event loop that programs run on unless they choose another."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar

import anyio

__all__ = ["run"]

T = TypeVar("T")


def run(main: Callable[..., Awaitable[T]], *arguments: object) -> T:
    """``anyio.run(main, *arguments)`` on uvloop, or on plain asyncio where uvloop is not installed (Windows)."""
    try:
        import uvloop  # noqa: F401
    except ImportError:
        return anyio.run(main, *arguments)
    return anyio.run(main, *arguments, backend_options={"use_uvloop": True})
