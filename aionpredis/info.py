"""What a server says of itself (command ``INFO``)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aionpredis.client import Client

__all__ = ["ask", "number", "parse"]


async def ask(client: Client, *sections: str, key: bytes = b"") -> dict[str, str]:
    """What the server that has the key says: all of it, or these sections.

    Raises:
        ServerError: the user may not ask.
    """
    return parse(await client.call("INFO", *sections, repeatable=True, key=key))


def parse(reply: Any) -> dict[str, str]:
    """The lines ``name:value`` of INFO, and of ``CLUSTER INFO``."""
    text = bytes(reply).decode("utf-8", "replace")
    return dict(line.split(":", 1) for line in text.splitlines() if ":" in line)


def number(facts: Mapping[str, str], name: str) -> int:
    """0 if it is not there."""
    return int(float(facts.get(name) or 0))
