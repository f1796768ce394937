"""Runs: how a trainer begins one, and how old ones are deleted.

The run is the left half of the ids in the log, so the server itself refuses a commit to an older run ("equal or
smaller than the target stream top item"): one ``XADD`` fences every actor on every host.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from aionpredis import info, streams
from aionpredis.errors import CorruptValue, ReplayError, ReplayGone, RunConflict, ServerError
from aionpredis.policy import Policy
from aionpredis.replay.deleted import PAGE, unlink, unlink_again
from aionpredis.replay.log import FIELD, Begin, Names, parse_begin, unpack

if TYPE_CHECKING:
    from aionpredis.client import Client
    from aionpredis.retry import Retry
    from aionpredis.wire.connection import Connection

__all__ = [
    "CLOSED",
    "Beginning",
    "begin",
    "check_eviction",
    "close",
    "delete",
    "delete_below",
    "delete_oldest",
    "drop",
    "evict",
    "latest",
    "leftover_keys",
]

CLOSED = streams.RIGHT_MAX
"""The largest left half of an id: behind it the server refuses commits to any run."""


async def latest(client: Client, names: Names) -> Begin | None:
    """The newest run; ``None`` if none was ever begun."""
    last = await streams.last_generated(client, names.log)
    if last is None:
        return None
    entries = await streams.page(client, names.log, f"{last[0]}-0", f"{last[0]}-0")
    if not entries or FIELD in entries[0][1]:  # a failover has lost the beginning, and a commit has taken its place
        return None
    return parse_begin(names, last[0], entries[0][1])


class Beginning:
    """The entry that begins a run, for those who write: the trainer that began it, and its actors.

    A failover may lose it with the last entries of the log. Then the server would let anybody begin a run of that number,
    and take what the actors of the lost one still send for the new one's.
    """

    def __init__(self, client: Client, names: Names, begin: Begin) -> None:
        self.begin = begin
        self._client = client
        self._names = names
        self._changes = client.faults.changes

    @property
    def doubtful(self) -> bool:
        """Whether the server may have become another one since it was looked at."""
        return self._client.faults.changes != self._changes

    async def confirm(self, retry: Retry | None = None) -> bool:
        """Add the entry again if it was lost; ``False``: another run has taken its number meanwhile.

        ``retry``: see :meth:`aionpredis.Client.request`.
        """
        while self.doubtful:
            run, log = self.begin.run, self._names.log
            changes, over = self._client.faults.changes, self._client.live_connection(log.encode())
            if await streams.claim(self._client, log, run, _entry(self.begin), retry=retry) is False:
                present = await streams.page(self._client, log, f"{run}-0", f"{run}-0", retry=retry)
                # Nothing, or a commit: the run has ended, or has gone on without its beginning.
                if present and FIELD not in present[0][1]:
                    return False
            self._changes = changes
            if over is not None and over is self._client.live_connection(log.encode()):
                break  # the doubt that is left is about other servers
        return True


async def begin(client: Client, names: Names, *, policy: int, schema: str, above: int = 0) -> Begin:
    """Begin the next run: an ``XADD`` of the explicit id ``run-0``, so of two trainers one wins.

    ``above``: its number is larger than this, too, which a failover may have made the log forget.

    Raises:
        RunConflict: another trainer began that run.
        ReplayGone: the replay was deleted meanwhile.
        ServerFull: no memory is left for the entry.
    """
    token = os.urandom(8).hex().encode()
    entry = _entry(Begin(0, token, policy, schema, int(time.time())))
    last = await streams.last_generated(client, names.log)
    if last is None:
        # Microseconds by the server's clock: larger than any run of a deleted replay of this name, so that its actors
        # are stale, too, unless it has begun a run per microsecond. Exact in a float64.
        seconds, micros = await client.call("TIME", repeatable=True, key=names.log.encode())
        run = max(int(seconds) * 1_000_000 + int(micros), above + 1)
        begun: bool | None = await _create(client, names, run, entry)
    elif last[0] == CLOSED:
        raise ReplayGone(f"{names.name!r} is being deleted; if that was interrupted: delete() again", replay=names.name)
    else:
        run = max(last[0], above) + 1
        begun = await streams.claim(client, names.log, run, entry)
        if begun is None:
            raise ReplayGone(f"the log of {names.name!r} was deleted meanwhile", replay=names.name, run=run)
    if not begun:
        raise RunConflict(f"another trainer began run {run} of {names.name!r}", replay=names.name, run=run)
    return parse_begin(names, run, entry)


def _entry(begin: Begin) -> dict[bytes, bytes]:
    entry = {b"begin": begin.token, b"policy": b"%d" % begin.policy, b"schema": begin.schema.encode()}
    return entry if begin.begun is None else entry | {b"at": b"%d" % begin.begun}


async def _create(client: Client, names: Names, run: int, entry: dict[bytes, bytes]) -> bool:
    """Begin the first run if there still is no log: another trainer's first run has another number."""
    fields = [part for pair in entry.items() for part in pair]

    async def add_first(connection: Connection) -> None:
        _, present = await streams.ask(connection, ("WATCH", names.log), ("EXISTS", names.log))
        if present:
            await streams.ask(connection, ("UNWATCH",))
        else:
            await streams.ask(connection, ("MULTI",), ("XADD", names.log, f"{run}-0", *fields), ("EXEC",))

    await streams.alone(client, names.log, add_first)
    return await streams.page(client, names.log, f"{run}-0", f"{run}-0") == [((run, 0), entry)]


async def check_eviction(client: Client, names: Names) -> None:
    """Refuse a server that evicts keys by itself: it would drop the log, and with it the fence.

    Raises:
        ReplayError: ``maxmemory-policy`` is not ``noeviction``.
    """
    for key in client.topology.each():
        try:
            facts = await info.ask(client, "memory", key=key)
        except ServerError:
            return  # a user without the right to ask
        policy = facts.get("maxmemory_policy", "noeviction")
        if facts.get("maxmemory", "0") != "0" and policy != "noeviction":
            raise ReplayError(
                f"the server evicts keys by itself (maxmemory-policy {policy}), so it may drop what was "
                "acknowledged: set maxmemory-policy noeviction",
                replay=names.name,
            )


async def close(client: Client, names: Names) -> None:
    """Make the server refuse every further commit and every further run, if there is a log."""
    try:
        # Not -0, where a run's beginning stands; and an id that is free, or the error would not say "equal or smaller".
        await client.call("XADD", names.log, "NOMKSTREAM", f"{CLOSED}-1", "closed", "", repeatable=True)
    except ServerError as error:
        if not streams.is_stale(error):  # it was closed before
            raise


async def delete_below(client: Client, names: Names, run: int, *, progress: Callable[[int], None] | None = None) -> int:
    """Delete the data and the log entries of all runs before ``run``; how many chunks were deleted.

    The data first, page by page, then the entries that name it: after a crash, whoever calls next finishes. What a failover
    has brought back of what this client deleted before goes, too. ``progress``: is told of each page how many chunks it were.
    """
    deleted = 0
    while entries := await streams.page(client, names.log, "-", f"({run}-0", PAGE):
        count = await unlink(client, _data(names, entries))
        deleted += count
        if progress is not None:
            progress(count)
        left, right = entries[-1][0]
        await client.call("XTRIM", names.log, "MINID", f"{left}-{right + 1}", repeatable=True)
    await unlink_again(client)
    return deleted


async def delete(client: Client, names: Names, *, progress: Callable[[int], None] | None = None) -> None:
    """What :meth:`aionpredis.Replay.delete` does; ``progress``: is told how many keys more were deleted."""
    progress = progress or (lambda count: None)
    await close(client, names)
    await delete_below(client, names, CLOSED, progress=progress)
    progress(await Policy(client, names.name).delete())
    progress(await client.count_keys("UNLINK", [names.log, names.read, names.actors], repeatable=True))


async def drop(client: Client, names: Names, run: int) -> int:
    """Delete one run: its data, then the entries that name it, then the one that begins it; how many chunks."""
    deleted = await evict(client, names, run, streams.RIGHT_MAX, ended=True)
    beginning = await streams.page(client, names.log, f"{run}-0", f"{run}-0")
    deleted += await unlink(client, _data(names, beginning))  # a commit, if a failover has lost the beginning
    await client.call("XDEL", names.log, f"{run}-0", repeatable=True)
    await unlink_again(client)
    return deleted


async def delete_oldest(client: Client, names: Names) -> int:
    """Delete the data of the oldest run that has any, even of the present one; how many chunks were deleted."""
    last = await streams.last_generated(client, names.log)
    while last is not None and (first := await streams.page(client, names.log, "-", "+", 1)):
        ((run, _), _) = first[0]
        if run == last[0]:
            break
        deleted = await delete_below(client, names, run + 1)
        if deleted:
            return deleted
    if last is None or not last[1]:
        return 0
    return await evict(client, names, *last)  # the entry that begins the run stays, and what its actors add meanwhile


async def evict(client: Client, names: Names, run: int, entry: int, *, ended: bool = False) -> int:
    """Delete the data of the run's chunks that were committed up to this entry, then the entries; how many chunks.

    All of them, not only one for each that was added, so that nothing stays when somebody died while evicting. By
    ``XDEL``: to trim would take the entry that begins the run, too. ``ended``: the run has; before, an actor that met a fault
    may add a chunk again that was evicted meanwhile, so what is deleted is not remembered.
    """
    deleted = 0
    while entries := await streams.page(client, names.log, f"{run}-1", f"{run}-{entry}", PAGE):
        keys = _data(names, entries)
        deleted += await (unlink(client, keys) if ended else client.count_keys("UNLINK", keys, repeatable=True))
        await client.call("XDEL", names.log, *(f"{left}-{right}" for (left, right), _ in entries), repeatable=True)
    return deleted


def _data(names: Names, entries: list[streams.Entry]) -> list[bytes]:
    """The keys of the data that these entries name."""
    keys = []
    for (left, _), fields in entries:
        try:
            keys.append(names.data(left, unpack(fields[FIELD])))
        except (KeyError, CorruptValue):  # it begins a run, or is somebody else's: it names no data
            pass
    return keys


async def leftover_keys(client: Client, names: Names, *, below: int) -> list[bytes]:
    """Data keys of runs before ``below`` that exist on the servers. Looks at all keys there: for checks, not for use."""
    found: set[bytes] = set()
    async for key in client.scan(names.data_pattern("*")):
        run = key.split(b":")[1]
        if run.isdigit() and int(run) < below:
            found.add(key)
    return sorted(found)
