"""Streams as logs: what the replay and the policy have in common. Ids are ``(left, right)`` pairs of ints."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from aionpredis.errors import AionpredisError, ServerError
from aionpredis.wire import resp
from aionpredis.wire.resp import Reply

if TYPE_CHECKING:
    from aionpredis.client import Client

__all__ = ["PAGE", "RIGHT_MAX", "Entry", "is_stale", "last_entry", "last_generated", "page", "read_blocking"]

Entry = tuple[tuple[int, int], dict[bytes, bytes]]

PAGE = 10_000
"""Entries for one reply: ~1 MB."""

RIGHT_MAX = (1 << 64) - 1
"""The largest right half of an id."""


def _parse(entries: list[Any]) -> Iterator[Entry]:
    for raw_id, fields in entries:
        left, _, right = raw_id.partition(b"-")
        # fields is None for an entry that a consumer group remembers and the stream does not
        yield (int(left), int(right)), dict(zip(fields[::2], fields[1::2], strict=True)) if fields else {}


async def last_generated(client: Client, stream: str) -> tuple[int, int] | None:
    """The id that the next one must exceed; ``None`` if there is no such stream."""
    try:
        info = await client.call("XINFO", "STREAM", stream, repeatable=True)
    except ServerError as error:
        if "no such key" in str(error):
            return None
        raise
    left, _, right = dict(zip(info[::2], info[1::2], strict=True))[b"last-generated-id"].partition(b"-")
    return int(left), int(right)


async def last_entry(client: Client, stream: str) -> Entry | None:
    """The newest entry that is there."""
    entries = await client.call("XREVRANGE", stream, "+", "-", "COUNT", 1, repeatable=True)
    return next(_parse(entries), None)


async def page(client: Client, stream: str, first: str, last: str, count: int = PAGE) -> list[Entry]:
    """Entries from ``first`` to ``last``, as XRANGE names ids: ``(`` excludes, ``-`` and ``+`` are the ends."""
    return list(_parse(await client.call("XRANGE", stream, first, last, "COUNT", count, repeatable=True)))


async def read_blocking(client: Client, stream: str, after: tuple[int, int], count: int = PAGE) -> list[Entry]:
    """Entries behind ``after``; waits for the first one up to ``client.block_seconds``, then returns nothing.

    By ``XREAD BLOCK`` on a connection of its own. A stream that does not exist yet is waited for.
    """
    async with client.blocking() as connection:
        milliseconds = int(client.block_seconds * 1000)
        command = resp.encode(
            "XREAD", "COUNT", count, "BLOCK", milliseconds, "STREAMS", stream, f"{after[0]}-{after[1]}"
        )
        reply = Reply()
        await connection.wait(connection.submit(command, reply))
        found = reply.result()
    return [] if found is None else list(_parse(found[0][1]))


def is_stale(error: AionpredisError) -> bool:
    """Whether XADD was refused because the stream has gone past the id."""
    return isinstance(error, ServerError) and "equal or smaller" in str(error)
