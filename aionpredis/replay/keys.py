"""Which replay a key belongs to, by its name alone: for commands that look at all keys of a server."""

from __future__ import annotations

import re
from typing import NamedTuple

from aionpredis.names import NAME

__all__ = ["Owned", "owner"]

_NAME = NAME.encode()
_CHUNK = re.compile(rb"(%b):(\d{1,20}):[0-9a-f]{16}:\d{1,10}" % _NAME)
_WEIGHTS = re.compile(rb"(%b):policy:(\d{1,20}):[0-9a-f]{16}(?::\d{1,5})?" % _NAME)
_SMALL = re.compile(rb"\{(%b)\}:(actors|log|read|policy)" % _NAME)


class Owned(NamedTuple):
    """A key of a replay, or of a policy that stands alone. ``part``: ``chunk``, ``weights``, ``log``, ``actors`` (their names),
    ``read`` (how far the learners are) or ``policy`` (the stream that announces its versions). ``number``: of a chunk's run, of
    the weights' version; else 0.
    """

    name: str
    part: str
    number: int = 0


def owner(key: bytes) -> Owned | None:
    """Whose key that is; ``None``: no replay's and no policy's."""
    if found := _CHUNK.fullmatch(key):
        return Owned(found[1].decode(), "chunk", int(found[2]))
    if found := _WEIGHTS.fullmatch(key):
        return Owned(found[1].decode(), "weights", int(found[2]))
    if found := _SMALL.fullmatch(key):
        return Owned(found[1].decode(), found[2].decode())
    return None
