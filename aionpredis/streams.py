"""Streams as logs: what the replay and the policy have in common. Ids are ``(left, right)`` pairs of ints."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

import anyio

from aionpredis.commands import refused
from aionpredis.errors import (
    AionpredisError,
    ConnectError,
    ConnectionLost,
    Redirected,
    ServerError,
    ServerUnavailable,
)
from aionpredis.retry import Retry
from aionpredis.wire import resp
from aionpredis.wire.resp import Reply

if TYPE_CHECKING:
    from aionpredis.client import Client
    from aionpredis.wire.connection import Connection

__all__ = [
    "PAGE",
    "RIGHT_MAX",
    "Entry",
    "alone",
    "ask",
    "claim",
    "is_stale",
    "last_generated",
    "newest",
    "page",
    "read_blocking",
    "shown",
]

T = TypeVar("T")

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


def shown(fields: Mapping[bytes, bytes]) -> str:
    """The fields for an error's message, which stays short."""
    return ", ".join(f"{name[:40]!r}: {value[:80]!r}" for name, value in islice(fields.items(), 4)) or "no field"


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


async def newest(client: Client, stream: str, count: int) -> list[Entry]:
    """The last ``count`` entries that are there, the newest first."""
    return list(_parse(await client.call("XREVRANGE", stream, "+", "-", "COUNT", count, repeatable=True)))


async def page(
    client: Client, stream: str, first: str, last: str, count: int = PAGE, *, retry: Retry | None = None
) -> list[Entry]:
    """Entries from ``first`` to ``last``, as XRANGE names ids: ``(`` excludes, ``-`` and ``+`` are the ends."""
    return list(_parse(await client.call("XRANGE", stream, first, last, "COUNT", count, repeatable=True, retry=retry)))


async def read_blocking(client: Client, stream: str, after: tuple[int, int], count: int = PAGE) -> list[Entry]:
    """Entries behind ``after``; waits for the first one up to ``client.block_seconds``, then returns nothing. So it does
    after a broken connection: the server that is reached now may not have what ``after`` names.

    By ``XREAD BLOCK`` on a connection of its own. A stream that does not exist yet is waited for.
    """
    milliseconds = int(client.block_seconds * 1000)
    changes = client.faults.changes

    async def read(connection: Connection) -> Any:
        if client.faults.changes != changes:
            return None
        command = ("XREAD", "COUNT", count, "BLOCK", milliseconds, "STREAMS", stream, f"{after[0]}-{after[1]}")
        return (await ask(connection, command))[0]

    found = await alone(client, stream, read)
    return [] if found is None else list(_parse(found[0][1]))


async def alone(client: Client, stream: str, work: Callable[[Connection], Awaitable[T]]) -> T:
    """``work`` on a connection of its own to who has the stream; repeated, so it must be repeatable, if that breaks: it may
    have lain idle. Of several commands the first alone is taken by a server to which the stream's slot is still moving.
    """
    retry: Retry | None = None
    redirected: Redirected | None = None
    try:
        while True:
            try:
                shard = None if redirected is None else await client.topology.learn(redirected)
                async with client.blocking(stream.encode(), shard) as connection:
                    if redirected is not None and redirected.asks:
                        connection.submit(resp.encode("ASKING"), Reply(), send=False)  # nobody comes between
                    result = await work(connection)
            except Redirected as error:
                retry = retry or Retry(client.faults)
                pause = 0.0 if redirected is None else retry.after(error)
                redirected = error
            except (ConnectionLost, ConnectError, ServerUnavailable) as error:
                retry = retry or Retry(client.faults)
                pause = retry.after(error)
                redirected = None
            else:
                if retry is not None:
                    retry.succeeded()
                return result
            await anyio.sleep(pause)
    finally:
        if retry is not None:
            retry.reset()


async def ask(connection: Connection, *commands: Sequence[Any]) -> list[Any]:
    """The replies to these commands; raises the first that is an error."""
    reply = Reply(len(commands))
    buffers = [buffer for command in commands for buffer in resp.encode(*command)]
    await connection.wait(connection.submit(buffers, reply))
    for value, command in zip(reply.values, commands, strict=True):
        if isinstance(value, ServerError):
            raise refused(value, command)
    return reply.values


async def claim(
    client: Client,
    stream: str,
    left: int,
    fields: dict[bytes, bytes],
    *,
    make: bool = False,
    retry: Retry | None = None,
) -> bool | None:
    """Add the entry ``left-0``: of several callers, whose ``fields`` differ, one succeeds. Whether this one did.

    ``None``: there is no such stream; with ``make`` it is made. A broken connection changes nothing: it is tried again,
    and who finds his own entry there has succeeded before. ``retry``: see :meth:`aionpredis.Client.request`.
    """
    option = () if make else ("NOMKSTREAM",)
    pairs = [part for pair in fields.items() for part in pair]
    try:
        added = await client.call("XADD", stream, *option, f"{left}-0", *pairs, repeatable=True, retry=retry)
    except ServerError as error:
        if not is_stale(error):
            raise
        return (await page(client, stream, f"{left}-0", f"{left}-0", retry=retry)) == [((left, 0), fields)]
    return None if added is None else True


def is_stale(error: AionpredisError) -> bool:
    """Whether XADD was refused because the stream has gone past the id."""
    return isinstance(error, ServerError) and "equal or smaller" in str(error)
