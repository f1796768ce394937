"""Batches, transitions and weights as torch, JAX, tensordict, Gymnasium and Stable-Baselines3 have them.

One module for each, and an extra of the same name (``pip install "aionpredis[torch]"``); nothing else imports them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["extra"]


@contextmanager
def extra(name: str) -> Iterator[None]:
    """A block that imports what the extra ``name`` installs; an error says so if it is not there."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        raise ModuleNotFoundError(f'{package} is missing: pip install "aionpredis[{name}]"', name=package) from None
