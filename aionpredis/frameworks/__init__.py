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
        raise ModuleNotFoundError(
            f'{error.name} is missing: pip install "aionpredis[{name}]"', name=error.name
        ) from None
