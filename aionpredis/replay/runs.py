"""Runs: how a trainer begins one, and how old ones are deleted.

The run is the left half of the ids in the log, so the server itself refuses a commit to an older run ("equal or
smaller than the target stream top item"): one ``XADD`` fences every actor on every host.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from aionpredis import streams
from aionpredis.errors import ConnectionLost, ReplayError, ReplayGone, RunConflict, ServerError, ServerFull
from aionpredis.replay.log import FIELD, Begin, Names, parse_begin, unpack
from aionpredis.wire import resp
from aionpredis.wire.resp import Reply

if TYPE_CHECKING:
    from aionpredis.client import Client

__all__ = ["begin", "delete_below", "latest", "leftover_keys"]

UNLINK_KEYS = 1000
"""Keys in one UNLINK: a few ms of the server."""


async def latest(client: Client, names: Names) -> Begin | None:
    """The newest run; ``None`` if none was ever begun."""
    last = await streams.last_generated(client, names.log)
    if last is None:
        return None
    entries = await streams.page(client, names.log, f"{last[0]}-0", f"{last[0]}-0")
    return parse_begin(last[0], entries[0][1]) if entries else None


async def begin(client: Client, names: Names, *, policy: int, schema: str) -> Begin:
    """Begin the next run: an ``XADD`` of the explicit id ``run-0``, so of two trainers one wins.

    Raises:
        RunConflict: another trainer began that run.
        ServerFull: even after deleting the runs before the present one.
    """
    await check_eviction(client, names)
    token = os.urandom(8).hex().encode()
    last = await streams.last_generated(client, names.log)
    if last is None:
        # Larger than any run of a deleted replay of this name, so that its actors are stale, too. Exact in a float64.
        run = int(time.time()) * 1_000_000 + 1
    else:
        run = last[0] + 1
    entry = {b"begin": token, b"policy": str(policy).encode(), b"schema": schema.encode()}
    fields = [part for pair in entry.items() for part in pair]
    try:
        if last is None:
            await _create(client, names, run, fields)
        else:
            await _add(client, names, run, fields)
    except ConnectionLost:  # did it arrive?
        found = await streams.page(client, names.log, f"{run}-0", f"{run}-0")
        if not found:
            raise
        if found[0][1].get(b"begin") != token:
            raise _conflict(names, run) from None
    except ServerError as error:
        if streams.is_stale(error):
            raise _conflict(names, run) from None
        raise
    return parse_begin(run, entry)


async def _add(client: Client, names: Names, run: int, fields: list[bytes]) -> None:
    command = ("XADD", names.log, "NOMKSTREAM", f"{run}-0", *fields)
    try:
        added = await client.call(*command)
    except ServerFull:
        # XADD is refused when the memory is full, UNLINK is not.
        await delete_below(client, names, run - 1)
        added = await client.call(*command)
    if added is None:
        raise ReplayGone(f"the log of {names.name!r} was deleted meanwhile", replay=names.name, run=run)


async def _create(client: Client, names: Names, run: int, fields: list[bytes]) -> None:
    """Begin the first run, if there still is no log: two trainers may come in different seconds, with different ids."""
    async with client.blocking() as connection:
        for command in (("WATCH", names.log), ("EXISTS", names.log)):
            reply = Reply()
            await connection.wait(connection.submit(resp.encode(*command), reply))
            present = reply.result()
        if present:
            await connection.wait(connection.submit(resp.encode("UNWATCH"), Reply()))
            raise _conflict(names, run)
        reply = Reply(3)
        buffers = [
            *resp.encode("MULTI"),
            *resp.encode("XADD", names.log, f"{run}-0", *fields),
            *resp.encode("EXEC"),
        ]
        await connection.wait(connection.submit(buffers, reply))
        for value in reply.values:
            if isinstance(value, ServerError):
                raise value
        if reply.values[2] is None:
            raise _conflict(names, run)


def _conflict(names: Names, run: int) -> RunConflict:
    return RunConflict(f"another trainer began run {run} of {names.name!r}", replay=names.name, run=run)


async def check_eviction(client: Client, names: Names) -> None:
    """Refuse a server that evicts keys by itself: it would drop the log, and with it the fence.

    Raises:
        ReplayError: ``maxmemory-policy`` is not ``noeviction``.
    """
    try:
        info = await client.call("INFO", "memory", repeatable=True)
    except ServerError:
        return  # a user without the right to ask
    facts: Mapping[bytes, bytes] = dict(line.split(b":", 1) for line in info.splitlines() if b":" in line)
    policy = facts.get(b"maxmemory_policy", b"noeviction")
    if facts.get(b"maxmemory", b"0") != b"0" and policy != b"noeviction":
        raise ReplayError(
            f"the server evicts keys by itself (maxmemory-policy {policy.decode()}), so it may drop what was "
            "acknowledged: set maxmemory-policy noeviction",
            replay=names.name,
        )


async def delete_below(client: Client, names: Names, run: int) -> int:
    """Delete the data and the log entries of all runs before ``run``; how many chunks were deleted.

    The data first, page by page, then the entries that name it: after a crash, whoever calls next finishes.
    """
    deleted = 0
    while True:
        entries = await streams.page(client, names.log, "-", f"({run}-0")
        if not entries:
            return deleted
        keys = [names.data(left, unpack(fields[FIELD])) for (left, _), fields in entries if FIELD in fields]
        for start in range(0, len(keys), UNLINK_KEYS):
            deleted += int(await client.call("UNLINK", *keys[start : start + UNLINK_KEYS], repeatable=True))
        left, right = entries[-1][0]
        await client.call("XTRIM", names.log, "MINID", f"{left}-{right + 1}", repeatable=True)


async def leftover_keys(client: Client, names: Names, *, below: int) -> list[bytes]:
    """Data keys of runs before ``below`` that exist on the server. Looks at all keys there: for checks, not for use."""
    found: list[bytes] = []
    cursor: bytes | int = 0
    while True:
        cursor, keys = await client.call(
            "SCAN", cursor, "MATCH", names.data_pattern("*"), "COUNT", 10_000, repeatable=True
        )
        for key in keys:
            run = key.split(b":")[1]
            if run.isdigit() and int(run) < below:
                found.append(key)
        if cursor == b"0":
            return found
