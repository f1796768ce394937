"""The event loop that programs run on unless they choose another."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import anyio

__all__ = ["backend_options", "run"]

T = TypeVar("T")


def run(main: Callable[..., Awaitable[T]], *arguments: object) -> T:
    """``anyio.run(main, *arguments)`` on uvloop, or on plain asyncio where uvloop is not installed (Windows).

    uvloop aborts a process in which one of the descriptors 0 to 2 was closed, and a socket got it: a daemon opens
    ``/dev/null`` there instead.
    """
    return anyio.run(main, *arguments, backend_options=backend_options())


def backend_options() -> dict[str, Any]:
    """anyio's, for its asyncio backend."""
    try:
        import uvloop  # noqa: F401
    except ImportError:
        return {}
    return {"use_uvloop": True}
