"""Looks at a replay from outside: what its log, its learners and its servers say. It never touches the data.

The first look at a run reads its log, ~80 bytes a chunk and 0.3 µs of the server: 0.3 s for a million chunks, and some seconds
here. Each later one reads what came since then; with its dozen of small commands it takes the server 0.13 ms.
"""

from __future__ import annotations

import time
from array import array
from bisect import bisect_left, bisect_right
from collections import Counter, deque
from collections.abc import Awaitable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from aionpredis import info, streams
from aionpredis.errors import ServerError
from aionpredis.policy import stream_of
from aionpredis.replay import lag, runs
from aionpredis.replay.log import FIELD, Begin, ChunkId, LogReader, Names, parse_begin

if TYPE_CHECKING:
    from aionpredis.client import Client

__all__ = ["ActorView", "Observer", "ReaderView", "RunView", "ServerView", "View"]

T = TypeVar("T")

RATE_SECONDS = 5.0
"""Rates are means over the last so many seconds, or over one interval if that is longer: an actor's transitions come in
chunks, a slow one's a second apart."""

MAX_RUNS = 8
"""Older runs that are shown; a trainer may keep any number."""

MAX_SIZES = 64
"""Lengths of chunks that are asked for in one look. Chunks of as many transitions are equally long, and few are not full."""


@dataclass
class RunView:
    """A run. ``transitions``, ``chunks``, ``nbytes``: there now; ``committed``: transitions, those that were evicted since they
    were seen as well. ``begun``: seconds since 1970, by the clock of the trainer's host; ``None``: not known. ``nbytes``:
    ``None`` without the right to ask.
    """

    run: int
    begun: float | None
    policy: int
    chunks: int
    transitions: int
    committed: int
    nbytes: int | None


@dataclass
class ActorView:
    """A start of an actor. Counts are of what the log named since the observer first read it. ``rate``: transitions a second,
    ``None`` before a second look. ``seen``: seconds since its last chunk was found in the log; ``None``: in none of the looks
    but the first. ``name``: as its program calls it, empty if it has not said so.
    """

    incarnation: str
    name: str
    chunks: int
    transitions: int
    episodes: int
    rate: float | None
    seen: float | None


@dataclass
class ReaderView:
    """A learner that says how far it is, or a consumer group. What lies behind its last entry is its lag; ``pending``: chunks
    that the group's readers took and did not acknowledge yet.
    """

    name: str
    chunks_behind: int
    transitions_behind: int
    consumers: int | None = None
    pending: int | None = None


@dataclass
class ServerView:
    """A primary, by its own INFO. Bytes; ``maxmemory`` 0: no limit. Per second: ``commands``, ``bytes_in``, ``bytes_out``."""

    url: str
    used_memory: int
    maxmemory: int
    evicted: int
    clients: int
    replicas: int
    commands: int
    bytes_in: int
    bytes_out: int


@dataclass
class View:
    """One look. ``at``: seconds since 1970. ``run``: ``None`` if there is none. ``rate``: transitions a second of all actors,
    ``None`` before a second look. ``policy``: its newest version, 0 for none. ``denied``: what the user may not look at.
    """

    replay: str
    at: float
    run: RunView | None = None
    rate: float | None = None
    older: list[RunView] = field(default_factory=list)
    actors: list[ActorView] = field(default_factory=list)
    readers: list[ReaderView] = field(default_factory=list)
    policy: int = 0
    servers: list[ServerView] = field(default_factory=list)
    denied: list[str] = field(default_factory=list)


@dataclass
class _Actor:
    chunks: int = 0
    transitions: int = 0
    episodes: int = 0
    seen: float | None = None


class _Tally:
    """A run, as its log tells it. 12 bytes a chunk."""

    def __init__(self, client: Client, names: Names, begin: Begin) -> None:
        self.begin = begin
        self.actors: dict[bytes, _Actor] = {}
        self.committed = 0
        self.transitions = 0
        self._client = client
        self._names = names
        self._changes = client.faults.changes
        self._log = LogReader(client, names, begin.run)
        self._entries = array("Q")  # of the chunks that are there, ascending
        self._rows = array("I")
        self._counts: Counter[int] = Counter()  # of these, how many have so many rows
        self._newest: dict[int, ChunkId] = {}  # of those with so many rows
        self._sizes: dict[int, int] = {}  # the length of such a value
        self._looks = 0

    @property
    def doubtful(self) -> bool:
        """Whether the server may have become another one, so that what was read is not true any more."""
        return self._client.faults.changes != self._changes

    @property
    def chunks(self) -> int:
        return len(self._entries)

    @property
    def nbytes(self) -> int | None:
        """Of all values that are there; ``None``: not known."""
        wanted = +self._counts
        if wanted.keys() - self._sizes.keys():
            return None
        return sum(self._sizes[rows] * count for rows, count in wanted.items())

    async def look(self) -> None:
        """Read what is new in the log, and leave out what is gone from it."""
        now = time.monotonic()
        while True:
            entry = self._log.entry
            for chunk in await self._log.read(wait=False):
                self._add(chunk, now if self._looks else None)
            if self._log.entry == entry:
                break
        self._looks += 1
        run = self.begin.run
        first = await streams.page(self._client, self._names.log, f"{run}-1", f"{run}-{streams.RIGHT_MAX}", 1)
        gone = bisect_left(self._entries, first[0][0][1]) if first else len(self._entries)
        for rows in self._rows[:gone]:
            self._counts[rows] -= 1
            self.transitions -= rows
        del self._entries[:gone], self._rows[:gone]

    def _add(self, chunk: ChunkId, now: float | None) -> None:
        if self._entries and chunk.entry <= self._entries[-1]:
            return  # of a chunk that was committed again: its first entry is there, too
        actor = self.actors.get(chunk.incarnation)
        if actor is None:
            actor = self.actors[chunk.incarnation] = _Actor()
        actor.chunks += 1
        actor.transitions += chunk.rows
        if chunk.ends:
            actor.episodes += int.from_bytes(chunk.ends, "little").bit_count()
        actor.seen = now
        self.committed += chunk.rows
        self.transitions += chunk.rows
        self._entries.append(chunk.entry)
        self._rows.append(chunk.rows)
        self._counts[chunk.rows] += 1
        self._newest[chunk.rows] = chunk

    async def ask_sizes(self) -> None:
        """Have the lengths of values that are not known yet.

        Raises:
            ServerError: the user may not ask.
        """
        wanted = [rows for rows in (+self._counts) if rows not in self._sizes][:MAX_SIZES]
        keys = [self._names.data(self.begin.run, self._newest[rows]) for rows in wanted]
        sizes = await self._client.call_many([("STRLEN", key) for key in keys], repeatable=True)
        for rows, size in zip(wanted, sizes, strict=True):
            if isinstance(size, ServerError):
                raise size
            if size:  # else it was evicted meanwhile; the next one tells
                self._sizes[rows] = size

    def behind(self, entry: int) -> tuple[int, int]:
        """Chunks and transitions that are there behind this entry."""
        at = bisect_right(self._entries, entry)
        return len(self._entries) - at, sum(self._rows[at:])

    def view(self) -> RunView:
        begin = self.begin
        return RunView(begin.run, begin.begun, begin.policy, self.chunks, self.transitions, self.committed, self.nbytes)


class Observer:
    """Looks at the replay ``name`` as often as :meth:`look` is called. It needs no schema.

    What the user may not look at is left out. The rights for all of it: docs/security.md, "Looking on".
    """

    def __init__(self, client: Client, name: str) -> None:
        self._client = client
        self._names = Names(name)
        self._tally: _Tally | None = None
        self._older: dict[tuple[int, bytes], _Tally] = {}
        self._history: deque[tuple[float, int, dict[bytes, int]]] = deque()
        self._denied: list[str] = []

    async def look(self) -> View:
        """What there is now.

        Raises:
            ServerError: the user may not read the log.
            ConnectionLost, ConnectError, ServerUnavailable: the server is not there. Look again.
            CorruptValue: somebody else wrote to the log.
        """
        self._denied = []
        view = View(self._names.name, time.time(), denied=self._denied)
        begin = await runs.latest(self._client, self._names)
        if begin is not None:
            tally = self._tally_of(begin)
            await tally.look()
            await self._may(tally.ask_sizes(), None)
            view.run = tally.view()
            view.older = [each.view() for each in await self._older_than(begin.run)]
            await self._rates(view, tally)
            view.readers = await self._readers(tally)
        else:
            self._tally = None
            self._older.clear()
        newest = await self._may(streams.newest(self._client, stream_of(self._names.name), 1), [])
        view.policy = newest[0][0][0] if newest else 0
        view.servers = await self._may(self._servers(), [])
        return view

    async def _may(self, asked: Awaitable[T], otherwise: T) -> T:
        """What is answered, or ``otherwise`` if the user may not ask."""
        try:
            return await asked
        except ServerError as error:
            if error.code != "NOPERM":
                raise
            self._denied.append(str(error))
            return otherwise

    def _tally_of(self, begin: Begin) -> _Tally:
        tally = self._tally
        if tally is None or tally.begin != begin or tally.doubtful:
            if tally is not None and not tally.doubtful:
                self._older[tally.begin.run, tally.begin.token] = tally
            self._tally = tally = _Tally(self._client, self._names, begin)
            self._history.clear()
        return tally

    async def _older_than(self, run: int) -> list[_Tally]:
        """The runs before this one that are there, the newest first. What they hold does not grow, so it is read once."""
        found: dict[tuple[int, bytes], _Tally] = {}
        log = self._names.log
        first = await streams.page(self._client, log, "-", "+", 1)
        # Backwards; but not beyond the first, whose search would take the server 37 ms in a log of a million entries.
        while first and first[0][0][0] < run and len(found) < MAX_RUNS:
            command = "XREVRANGE", log, f"({run}-0", "-", "COUNT", 1
            entries = await self._may(self._client.call(*command, repeatable=True), [])
            if not entries:
                break
            run = int(entries[0][0].partition(b"-")[0])
            begun = await streams.page(self._client, log, f"{run}-0", f"{run}-0")
            if not begun or FIELD in begun[0][1]:  # its deletion is under way; or see runs.latest()
                continue
            begin = parse_begin(self._names, run, begun[0][1])
            tally = self._older.get((run, begin.token))
            if tally is None or tally.doubtful:
                tally = _Tally(self._client, self._names, begin)
            await tally.look()
            await self._may(tally.ask_sizes(), None)
            found[run, begin.token] = tally
        self._older = found
        return list(found.values())

    async def _rates(self, view: View, tally: _Tally) -> None:
        """The actors, and how fast they are."""
        now = time.monotonic()
        history = self._history
        while len(history) > 1 and now - history[1][0] > RATE_SECONDS:
            history.popleft()
        since, committed, before = history[0] if history else (now, 0, {})
        history.append((now, tally.committed, {name: actor.transitions for name, actor in tally.actors.items()}))
        seconds = now - since
        called: list[bytes | None] = [None] * len(tally.actors)
        if called:  # only these: all that ever joined a run of this replay are there
            command = "HMGET", self._names.actors, *(incarnation.hex() for incarnation in tally.actors)
            called = await self._may(self._client.call(*command, repeatable=True), called)
        for (incarnation, actor), name in zip(tally.actors.items(), called, strict=True):
            rate = (actor.transitions - before.get(incarnation, 0)) / seconds if seconds else None
            seen = None if actor.seen is None else now - actor.seen
            shown = (name or b"").decode("utf-8", "replace")
            view.actors.append(
                ActorView(incarnation.hex(), shown, actor.chunks, actor.transitions, actor.episodes, rate, seen)
            )
        view.rate = (tally.committed - committed) / seconds if seconds else None

    async def _readers(self, tally: _Tally) -> list[ReaderView]:
        found = []
        fields = await self._may(self._client.call("HGETALL", self._names.read, repeatable=True), [])
        pairs = dict(zip(fields[::2], fields[1::2], strict=True))
        for name, entry in sorted(lag.entries_of(pairs, tally.begin.run).items()):
            found.append(ReaderView(name.decode("utf-8", "replace"), *tally.behind(entry)))
        groups = await self._may(self._client.call("XINFO", "GROUPS", self._names.log, repeatable=True), [])
        for group in groups:
            facts = dict(zip(group[::2], group[1::2], strict=True))
            left, _, right = facts[b"last-delivered-id"].partition(b"-")
            if int(left) == tally.begin.run:
                name = facts[b"name"].decode("utf-8", "replace").removesuffix(f":{left.decode()}")
                behind = tally.behind(int(right))
                found.append(ReaderView(f"consume:{name}", *behind, facts[b"consumers"], facts[b"pending"]))
        return found

    async def _servers(self) -> list[ServerView]:
        found = []
        topology = self._client.topology
        for key in topology.each():
            facts = await info.ask(self._client, key=key)
            found.append(
                ServerView(
                    topology.shard(key).dialer.url,
                    info.number(facts, "used_memory"),
                    info.number(facts, "maxmemory"),
                    info.number(facts, "evicted_keys"),
                    info.number(facts, "connected_clients"),
                    info.number(facts, "connected_slaves"),
                    info.number(facts, "instantaneous_ops_per_sec"),
                    round(info.number(facts, "instantaneous_input_kbps") * 1024),
                    round(info.number(facts, "instantaneous_output_kbps") * 1024),
                )
            )
        return found
