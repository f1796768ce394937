"""The commit log of a replay: one stream whose entries name the chunks that exist.

Ids are ``run-n``: entry ``run-0`` begins the run, the entries behind it commit chunks. A commit's entry has one field,
packed: 1 M entries take 23 MB on the server instead of 36, and a new reader has them in 1 s instead of 2.
"""

from __future__ import annotations

import copy
import re
import struct
import zlib
from bisect import bisect_right
from collections import deque
from collections.abc import Iterable, Sequence
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, NamedTuple

from aionpredis import streams
from aionpredis.errors import CorruptValue, ServerError
from aionpredis.names import check_name
from aionpredis.replay.schema import MAX_ROWS
from aionpredis.wire import resp
from aionpredis.wire.resp import Buffer, Reply

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from aionpredis.client import Client
    from aionpredis.replay.runs import Beginning

__all__ = [
    "FIELD",
    "Begin",
    "ChunkId",
    "CommitsReply",
    "LogReader",
    "Names",
    "look_again",
    "pack",
    "parse_begin",
    "parse_commit",
    "unpack",
]

MAX_MISSED = 10_000
"""Chunks that were not there when they were read, of which a reader remembers which: of those that capacity evicts, none comes
back, and there may be any number.
"""

MAX_SECONDS = 1 << 53
"""Of a run's beginning: exact in a float64."""

_ENTRY = struct.Struct("<8sII")
FIELD = b"c"
_COMMIT = re.compile(rb"\*2\r\n\$(\d{1,2})\r\n(\d{1,20}-(\d{1,20}))\r\n\*2\r\n\$1\r\nc\r\n\$(\d{1,9})\r\n")
"""An entry of :data:`FIELD` alone, in RESP, up to the packed commit."""


@lru_cache(1024)
def _data_prefix(name: str, run: int, incarnation: bytes) -> bytes:
    return f"{name}:{run}:{incarnation.hex()}:".encode()


class Names:
    """The keys of one replay. Data keys spread over a cluster's shards, the small keys share one slot."""

    def __init__(self, name: str) -> None:
        self.name = check_name(name)
        self.log = f"{{{name}}}:log"
        self.read = f"{{{name}}}:read"
        self.actors = f"{{{name}}}:actors"

    def data(self, run: int, chunk: ChunkId) -> bytes:
        return b"%b%d" % (_data_prefix(self.name, run, chunk.incarnation), chunk.seq)

    def data_of(self, run: int, origins: Iterable[tuple[bytes, int]]) -> list[bytes]:
        """:meth:`data` for the chunks of these incarnations and sequence numbers."""
        name = self.name
        return [b"%b%d" % (_data_prefix(name, run, incarnation), seq) for incarnation, seq in origins]

    def data_pattern(self, run: int | str) -> str:
        """For ``SCAN … MATCH``. A name's characters have no meaning in a pattern, but for the brackets it cannot have."""
        return f"{self.name}:{run}:*"


class ChunkId(NamedTuple):
    """A committed chunk.

    ``incarnation``: 8 random bytes of the actor's start; ``seq``: 0, 1, … within run and incarnation; ``rows``: how
    many transitions; ``ends``: a bit for each, lowest first, set where an episode ended (empty: nowhere); ``entry``:
    the right half of its id in the log, 0 before it is there.
    """

    incarnation: bytes
    seq: int
    rows: int
    ends: bytes
    entry: int = 0


class Begin(NamedTuple):
    """The entry that begins a run. ``policy``: the version published with it, 0 for none. ``begun``: when, in seconds since
    1970 by the clock of the trainer's host; ``None`` if the entry does not say so.
    """

    run: int
    token: bytes
    policy: int
    schema: str
    begun: int | None = None


def pack(chunk: ChunkId) -> bytes:
    return _ENTRY.pack(chunk.incarnation, chunk.seq, chunk.rows) + chunk.ends


def unpack(packed: bytes, entry: int = 0) -> ChunkId:
    """The commit that :func:`pack` made; :class:`CorruptValue` if ``packed`` is too short. Nothing else is checked."""
    try:
        incarnation, seq, rows = _ENTRY.unpack_from(packed)
    except struct.error:
        raise CorruptValue(f"entry {entry} of the run is no commit: {packed!r}") from None
    return ChunkId(incarnation, seq, rows, packed[_ENTRY.size :], entry)


def parse_begin(names: Names, run: int, fields: dict[bytes, bytes]) -> Begin:
    """What the entry ``run-0`` says; :class:`CorruptValue` if it does not begin a run."""
    try:
        begun = int(fields[b"at"]) if b"at" in fields else None
        if begun is not None and not 0 <= begun < MAX_SECONDS:
            raise ValueError(f"at {begun}")
        return Begin(run, fields[b"begin"], int(fields[b"policy"]), fields[b"schema"].decode(), begun)
    except (KeyError, ValueError):
        raise CorruptValue(f"entry {run}-0 does not begin a run: {streams.shown(fields)}", key=names.log) from None


def share(chunk: ChunkId, learners: int) -> int:
    """Which of so many learners reads the chunk: the same answer on every host, and even over chunks."""
    return zlib.crc32(b"%b%d" % (chunk.incarnation, chunk.seq)) % learners


class CommitsReply(Reply):
    """Entries of one run: most become a :class:`ChunkId` at once, in 2 µs instead of 8."""

    __slots__ = ()

    def element(self, staging: bytearray, start: int, end: int) -> tuple[ChunkId, int] | None:
        match = _COMMIT.match(staging, start, end)
        if match is None:
            return None
        id_size, raw_id, right, size = match.groups()
        at = match.end()
        stop = at + int(size)
        if int(id_size) != len(raw_id):
            return None  # no RESP
        if stop + 2 > end or stop - at < _ENTRY.size or not staging.startswith(b"\r\n", stop):
            return None
        incarnation, seq, rows = _ENTRY.unpack_from(staging, at)
        return ChunkId(incarnation, seq, rows, bytes(staging[at + _ENTRY.size : stop]), int(right)), stop + 2


def _commits(command: Sequence[Buffer]) -> tuple[Sequence[Buffer], CommitsReply]:
    return command, CommitsReply()


def parse_commit(entry: list[Any]) -> ChunkId:
    """The commit in an entry as a stream's commands return it, id and fields; :class:`CorruptValue` if it is none."""
    raw_id, fields = entry
    packed = fields[1] if len(fields) == 2 and fields[0] == FIELD else b""
    return unpack(packed, int(raw_id.partition(b"-")[2]))


class Seen:
    """Which chunks of one incarnation were read, as ranges of numbers.

    A commit whose reply was lost is repeated, so an entry may come twice. A plain highest number would not do: after an
    out-of-memory error in mid-pipeline chunk 2 can be committed before chunk 1. And a number that never comes (its actor
    gave it up, or it was evicted) must not make all those behind it be kept one by one.
    """

    __slots__ = ("_count", "_starts", "_stops")

    def __init__(self) -> None:
        self._starts = [0]
        self._stops = [0]
        self._count = 0

    def add(self, seq: int) -> bool:
        """Whether ``seq`` is new."""
        starts, stops = self._starts, self._stops
        at = bisect_right(starts, seq) - 1
        if seq < stops[at]:
            return False
        self._count += 1
        extends = seq == stops[at]
        precedes = at + 1 < len(starts) and starts[at + 1] == seq + 1
        if extends and precedes:
            stops[at] = stops.pop(at + 1)
            del starts[at + 1]
        elif extends:
            stops[at] = seq + 1
        elif precedes:
            starts[at + 1] = seq
        else:
            starts.insert(at + 1, seq)
            stops.insert(at + 1, seq + 1)
        return True

    @property
    def ranges(self) -> int:
        """How many ranges are kept: one more than there are holes."""
        return len(self._starts)

    @property
    def gaps(self) -> int:
        """Numbers below the highest that did not come (yet)."""
        return self._stops[-1] - self._count


class LogReader:
    """Reads the commits of one run, each chunk once; of ``n`` learners, the i-th (``shard=(i, n)``) its own chunks only.

    A failover can take the last entries away, and give their ids to others. So whenever the server may have become another
    one, the run is read again from its beginning; what is known already is passed over.

    ``after``: an entry, and how many of its transitions were read: what is before is left out, but looked at, since it may
    come again. ``max_rows``: transitions that a chunk may say it has; memory for them is allocated before it is seen.
    ``ended``: a newer run has begun, the log is gone, or another run has taken this one's number. ``beginning``: of a run
    that this process began, and therefore keeps.
    """

    def __init__(
        self,
        client: Client,
        names: Names,
        run: int,
        shard: tuple[int, int] = (0, 1),
        *,
        after: tuple[int, int] = (0, 0),
        max_rows: int = MAX_ROWS,
        beginning: Beginning | None = None,
    ) -> None:
        self.run = run
        self.shard = shard
        self.ended = False
        self.duplicates = 0
        self._client = client
        self._names = names
        self._max_rows = max_rows
        self._after = after
        self.begun: dict[tuple[bytes, int], int] = {}
        """A chunk whose first rows were read before, by incarnation and number: how many."""
        self._beginning = beginning
        self._changes = client.faults.changes
        self._cursor = (run, 0)
        self._fresh = True  # read from the beginning, inclusively
        self._token: bytes | None = None
        self._replaced = False  # another run has the number
        self._known_to = 0  # up to this entry the log was read before
        self._seen: dict[bytes, Seen] = {}
        self._missed: dict[tuple[bytes, int], int] = {}

    def copy(self) -> LogReader:
        """Another one that goes on from here; this one stays as it is."""
        other = copy.copy(self)
        other.begun, other._missed, other._seen = self.begun.copy(), self._missed.copy(), copy.deepcopy(self._seen)
        return other

    async def read(self, *, wait: bool) -> list[ChunkId]:
        """Chunks committed since the last call; with ``wait``, at least one, unless the run ended or seconds passed.

        Raises:
            CorruptValue: an entry is no commit. It is raised each time, until the entry is deleted.
        """
        present, _ = await self._page()
        if not present and wait and not self.ended:
            entries = await streams.read_blocking(self._client, self._names.log, self._cursor)
            if self._client.faults.changes != self._changes:
                return self._take((await self._page())[0])
            if not entries:
                last = await streams.last_generated(self._client, self._names.log)
                self.ended = last is None or last[0] > self.run
                if last is not None and last < self._cursor:
                    self._read_again()
            elif entries[-1][0][0] != self.run:
                self.ended = True
            found = (unpack(fields.get(FIELD, b""), right) for (left, right), fields in entries if left == self.run)
            present = self.checked(found)
        return self._take(present)

    async def read_all(self, chunks: list[ChunkId] | deque[ChunkId]) -> None:
        """Append all chunks committed since the last call, up to now. Cancelled, it can be called again."""
        while True:
            present, more = await self._page()
            chunks.extend(self._take(present))
            if not more:
                return

    async def _page(self) -> tuple[list[ChunkId], bool]:
        """The next commits of the run, and whether there are more; none if there are no more yet."""
        faults = self._client.faults
        while True:
            if self._beginning is not None and self._beginning.doubtful and not await self._beginning.confirm():
                self._replaced = True
            if self._replaced:
                self.ended = True
                return [], False
            first = f"{self.run}-0" if self._fresh else f"({self.run}-{self._cursor[1]}"
            last = f"{self.run}-{streams.RIGHT_MAX}"
            command = resp.encode("XRANGE", self._names.log, first, last, "COUNT", streams.PAGE)
            reply = await self._client.request(partial(_commits, command), self._names.log.encode())
            if faults.changes == self._changes:
                break
            self._changes = faults.changes
            self._read_again()
        (items,) = reply.values
        if isinstance(items, ServerError):
            raise items.about("XRANGE", self._names.log)
        more = len(items) == streams.PAGE
        if self._fresh and items and type(items[0]) is not ChunkId and items[0][1][:1] == [b"begin"]:
            token = items.pop(0)[1][1]
            if self._token not in (None, token):
                self._replaced = self.ended = True
                return [], False
            self._token = token
        return self.checked(item if type(item) is ChunkId else parse_commit(item) for item in items), more

    def checked(self, chunks: Iterable[ChunkId]) -> list[ChunkId]:
        """All of these commits, or none: an error leaves everything as it was.

        Raises:
            CorruptValue: one is no commit, or no chunk has so many transitions.
        """
        try:
            commits = list(chunks)
            for chunk in commits:
                if not 0 < chunk.rows <= self._max_rows:
                    raise CorruptValue(
                        f"entry {self.run}-{chunk.entry} says that a chunk has {chunk.rows:,} transitions: of this schema"
                        f" it has 1 to {self._max_rows:,}"
                    )
        except CorruptValue as error:
            error.key = self._names.log
            raise
        return commits

    def _read_again(self) -> None:
        self._known_to = max(self._known_to, self._cursor[1])
        if self._cursor[1] >= self._after[0]:
            self._after = (0, 0)  # all of those are known; these numbers may belong to other chunks now
        self._cursor = (self.run, 0)
        self._fresh = True

    def _take(self, present: list[ChunkId]) -> list[ChunkId]:
        """The chunks that are new."""
        chunks: list[ChunkId] = []
        for chunk in present:
            self._cursor = self.run, chunk.entry
            self._fresh = False
            is_new = self._seen.setdefault(chunk.incarnation, Seen()).add(chunk.seq)
            if not is_new and self._missed.get(chunk[:2], chunk.entry) != chunk.entry:
                # Its actor found that the data had gone before the commit was complete, and sent it again.
                del self._missed[chunk[:2]]
                is_new = True
            if not is_new:
                self.duplicates += chunk.entry > self._known_to
            elif (chunk.entry, chunk.rows) <= self._after:
                pass
            elif share(chunk, self.shard[1]) == self.shard[0]:
                chunks.append(chunk)
                if chunk.entry == self._after[0]:
                    self.begun[chunk[:2]] = self._after[1]
        return chunks

    def miss(self, chunk: ChunkId, gone: bool) -> None:
        """Its data are not on the server; ``gone``: nor is its entry. It counts as not read if it is committed again."""
        # A failover may have taken the entry, and the same number may be given again.
        self._missed[chunk[:2]] = 0 if gone else chunk.entry
        if len(self._missed) > MAX_MISSED:
            del self._missed[next(iter(self._missed))]

    @property
    def entry(self) -> int:
        """The number of the last entry that was read."""
        return self._cursor[1]

    @property
    def gaps(self) -> int:
        """Chunks that were numbered and are not in the log (yet), and numbers that were left out."""
        return sum(seen.gaps for seen in self._seen.values())


async def look_again(client: Client, names: Names, run: int, chunk: ChunkId) -> tuple[NDArray[np.uint8] | None, bool]:
    """A chunk that GET did not find: its value, if it is there now, and whether it was evicted. Neither: it is missing.

    Evicted is one whose log entry is gone, too. That is looked at twice: who deletes a chunk deletes its data first.
    """
    entry = f"{run}-{chunk.entry}"
    origin = pack(chunk)[: _ENTRY.size]  # an index does not remember the ends of episodes

    async def is_gone() -> bool:  # with a failover, another chunk may have taken its number
        present = await streams.page(client, names.log, entry, entry)
        return not any(fields.get(FIELD, b"")[: _ENTRY.size] == origin for _, fields in present)

    if await is_gone():
        return None, True
    value = await client.get_value(names.data(run, chunk))
    return value, value is None and await is_gone()
