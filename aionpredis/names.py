"""What callers may give: names that become parts of keys, and numbers."""

from __future__ import annotations

import re
from typing import TypeGuard

from aionpredis.errors import UsageError

__all__ = ["NAME", "check_name", "is_count"]

NAME = r"[A-Za-z0-9_.-]{1,128}"
"""As a regular expression."""


def check_name(name: object) -> str:
    """The name, if it can stand in a key: no colon (it separates), no brace (it would choose the cluster's slot).

    Raises:
        UsageError: it is something else.
    """
    if not isinstance(name, str) or not re.fullmatch(NAME, name):
        raise UsageError(f"a name has 1 to 128 of A-Z a-z 0-9 _ . -, not {name!r:.150}")
    return name


def is_count(value: object, least: int = 1) -> TypeGuard[int]:
    """Whether it is an int, and no bool, of this size at least."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
