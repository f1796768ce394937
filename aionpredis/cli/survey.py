"""What is on the servers: single keys by their headers, and the many keys of a replay as one. No value is loaded."""

from __future__ import annotations

import fnmatch
import heapq
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from aionpredis import streams
from aionpredis.codecs import MAX_MAGIC, Kind, detect
from aionpredis.codecs.describe import HEAD, Column, Description, describe
from aionpredis.errors import DecodeError, NotAnArray, ServerError
from aionpredis.policy import stream_of
from aionpredis.replay.keys import Owned, owner
from aionpredis.replay.log import Names

if TYPE_CHECKING:
    from aionpredis.client import Client

__all__ = ["Entry", "Group", "Pattern", "Survey", "columns_json", "key_of", "look", "name_of"]

LOOKED_AT = 256
"""Keys whose headers are asked for at once."""

MAX_HEAD = 64 << 10
"""Bytes of one value that are asked for to find out what it is: a record of ~700 columns. So one page of hostile values takes
16 MB here, and a moment to parse."""


class Entry(NamedTuple):
    """One key. ``kind``: array, record, compressed (by a codec that is not this package's), corrupt, forbidden (to this user),
    or, of foreign ones, what the server says (string, list, stream, …). ``stored``: bytes, None of foreign ones but strings.
    ``ttl``: seconds. ``problem``: why it is corrupt, or forbidden.
    """

    key: bytes
    kind: str
    about: Description | None
    stored: int | None
    ttl: float | None
    problem: str | None = None

    def as_dict(self) -> dict[str, Any]:
        facts: dict[str, Any] = {"key": name_of(self.key), "kind": self.kind}
        if self.about is not None:
            if self.about.kind is Kind.ARRAY:
                column = self.about.columns[""]
                order = "F" if self.about.fortran else "C"
                facts |= _column_json(column) | {"order": order, "bytes": column.nbytes}
            elif self.about.kind is Kind.RECORD:
                columns = self.about.columns
                facts |= {"columns": columns_json(self.about), "bytes": sum(each.nbytes for each in columns.values())}
            facts["codec"] = self.about.codec
        if self.problem is not None:
            facts["problem"] = self.problem
        return facts | {"stored_bytes": self.stored, "ttl": self.ttl}


@dataclass
class Group:
    """The keys of one replay, or of a policy that stands alone. ``stored``: bytes of chunks and weights."""

    name: str
    keys: int = 0
    chunks: int = 0
    stored: int = 0
    runs: set[int] = field(default_factory=set)
    has_log: bool = False
    newest_run: int | None = None
    policy_version: int | None = None
    policy_stored: int = 0
    chunk: bytes | None = None
    """One of its chunks."""
    about: Description | None = None
    """What that is."""

    @property
    def kind(self) -> str:
        return "replay" if self.has_log or self.chunks else "policy"

    def add(self, owned: Owned, key: bytes, stored: int) -> None:
        self.keys += 1
        self.stored += stored
        if owned.part == "chunk":
            self.chunks += 1
            self.runs.add(owned.number)
            self.chunk = key
        elif owned.part == "weights":
            self.policy_stored += stored
        elif owned.part == "log":
            self.has_log = True

    def as_dict(self) -> dict[str, Any]:
        facts: dict[str, Any] = {"name": self.name, "kind": self.kind}
        if self.kind == "replay":
            facts |= {
                "runs": sorted(self.runs),
                "newest_run": self.newest_run,
                "chunks": self.chunks,
                "columns": None if self.about is None else columns_json(self.about, rows=False),
                "codec": None if self.about is None else self.about.codec,
            }
        return facts | {
            "policy_version": self.policy_version,
            "policy_bytes": self.policy_stored,
            "keys": self.keys,
            "stored_bytes": self.stored,
        }


class Pattern:
    """``*``, ``?``, ``[abc]``, ``[!abc]`` as a shell has them, for keys and for names of replays; no text: everything."""

    def __init__(self, *texts: str) -> None:
        self._match = re.compile("|".join(fnmatch.translate(text) for text in texts) or "(?s:.*)").fullmatch

    def __contains__(self, name: bytes) -> bool:
        return self._match(name_of(name)) is not None


class Survey:
    """All keys that match. In memory are the names of at most ``limit`` single keys, the first by name, and a line for each
    replay. ``grouped``: keys of replays and policies are groups, else single keys like all others. ``sorts``: ask for the first
    bytes of all single keys, for ``foreign`` and ``unread``.
    """

    def __init__(self, pattern: Pattern, *, limit: int = 0, grouped: bool = True, sorts: bool = False) -> None:
        self.groups: dict[str, Group] = {}
        self.keys = 0
        """Single keys."""
        self.stored = 0
        """Bytes of the single keys, as far as they are strings."""
        self.foreign = 0
        """Single keys that begin like neither arrays nor records."""
        self.unread = 0
        """Single keys of which this user may not know that."""
        self._pattern = pattern
        self._limit = limit
        self._grouped = grouped
        self._sorts = sorts
        self._first: list[_Reversed] = []  # a heap whose top is the last of them

    @property
    def total_stored(self) -> int:
        """Bytes of everything that matches, as far as they are strings."""
        return self.stored + sum(group.stored for group in self.groups.values())

    async def run(self, client: Client, report: Callable[[int, int | None], None]) -> None:
        total = sum([int(await client.call("DBSIZE", repeatable=True, key=shard)) for shard in client.topology.each()])
        seen = 0
        async for page in client.scan_pages():
            seen += len(page)
            await self._add(client, list(self.matching(page)))
            report(seen, max(total, seen))
        for group in self.groups.values():
            await _complete(client, group)

    def matching(self, page: Sequence[bytes]) -> Iterator[tuple[bytes, Owned | None]]:
        """The keys that match, or whose replay's name does."""
        for key in page:
            owned = owner(key) if self._grouped else None
            if (key if owned is None else owned.name.encode()) in self._pattern:
                yield key, owned

    async def _add(self, client: Client, found: list[tuple[bytes, Owned | None]]) -> None:
        commands: list[tuple[Any, ...]] = [("STRLEN", key) for key, _ in found]
        if self._sorts:
            commands += [("GETRANGE", key, 0, MAX_MAGIC - 1) for key, owned in found if owned is None]
        replies = await client.call_many(commands, repeatable=True)
        heads = iter(replies[len(found) :])
        for (key, owned), size in zip(found, replies[: len(found)], strict=True):
            if isinstance(size, ServerError) and not _is_foreign(size):
                raise size
            stored = 0 if isinstance(size, ServerError) else int(size)
            if owned is not None:
                self.groups.setdefault(owned.name, Group(owned.name)).add(owned, key, stored)
                continue
            self.keys += 1
            self.stored += stored
            if self._sorts:
                self._sort(next(heads), stored)
            if len(self._first) < self._limit:
                heapq.heappush(self._first, _Reversed(key))
            elif self._limit and key < self._first[0].key:
                heapq.heapreplace(self._first, _Reversed(key))

    def _sort(self, head: Any, stored: int) -> None:
        if isinstance(head, ServerError):
            if not _is_foreign(head):
                raise head
            self.unread += head.code == "NOPERM"
            self.foreign += head.code == "WRONGTYPE"
            return
        try:
            detect(memoryview(head), stored)
        except NotAnArray:
            self.foreign += 1

    async def entries(self, client: Client, report: Callable[[int, int | None], None]) -> list[Entry]:
        """The first ``limit`` single keys, by name, with what they are. One that is gone meanwhile is left out."""
        names = sorted({each.key for each in self._first})
        entries: list[Entry] = []
        for start in range(0, len(names), LOOKED_AT):
            entries += await look(client, names[start : start + LOOKED_AT])
            report(start + LOOKED_AT, len(names))
        return entries


class _Reversed(NamedTuple):
    """A key in a heap whose smallest element is the last key by name."""

    key: bytes

    def __lt__(self, other: tuple[Any, ...]) -> bool:
        return bool(self.key > other[0])


async def _complete(client: Client, group: Group) -> None:
    """What its streams say, and its columns."""
    log = Names(group.name).log
    for stream in (log, stream_of(group.name)):
        try:
            last = await streams.last_generated(client, stream)
        except ServerError as error:
            if not _is_foreign(error):
                raise
            continue
        if last is not None and stream == log:
            group.has_log = True
            group.newest_run = last[0] if last[0] != streams.RIGHT_MAX else None  # it is being deleted
        elif last is not None:
            group.policy_version = last[0]
    if group.chunk is not None:
        for entry in await look(client, [group.chunk]):
            group.about = entry.about


async def look(client: Client, keys: Sequence[bytes]) -> list[Entry]:
    """What is stored under these keys, by the values' first bytes; those that do not exist are left out."""
    entries: list[Entry] = []
    heads = [HEAD] * len(keys)
    commands = [command for key in keys for command in _commands(key, HEAD)]
    replies = await client.call_many(commands, repeatable=True)
    for number, key in enumerate(keys):
        again = True
        stored, head, ttl = replies[3 * number : 3 * number + 3]
        while True:
            refusals = [each for each in (stored, head, ttl) if isinstance(each, ServerError) and each.code == "NOPERM"]
            if refusals:
                entries.append(Entry(key, "forbidden", None, None, None, str(refusals[0])))
                break
            if _is_foreign(stored) or _is_foreign(head):
                kind = (await client.call("TYPE", key, repeatable=True)).decode()
                if kind != "none":
                    entries.append(
                        Entry(key, kind, None, None, None if isinstance(ttl, ServerError) else _seconds(ttl))
                    )
                break
            for reply in (stored, head, ttl):
                if isinstance(reply, ServerError):
                    raise reply
            if ttl == -2:
                break
            entry = _entry(key, int(stored), head, _seconds(ttl))
            if isinstance(entry, int):
                heads[number] = entry
            elif entry.kind == "corrupt" and again:
                again = False  # it may have been overwritten between the commands
            else:
                entries.append(entry)
                break
            stored, head, ttl = await client.call_many(_commands(key, heads[number]), repeatable=True)
    return entries


def _commands(key: bytes, count: int) -> list[tuple[Any, ...]]:
    return [("STRLEN", key), ("GETRANGE", key, 0, count - 1), ("PTTL", key)]


def _entry(key: bytes, stored: int, head: bytes, ttl: float | None) -> Entry | int:
    """The key's entry, or how many of its value's first bytes are needed."""
    try:
        about = describe(memoryview(head), stored)
    except NotAnArray:
        return Entry(key, "string", None, stored, ttl)
    except DecodeError as error:
        return Entry(key, "corrupt", None, stored, ttl, str(error))
    if isinstance(about, int):
        if about > MAX_HEAD:
            return Entry(key, "corrupt", None, stored, ttl, f"its header has more than {MAX_HEAD:,} bytes: not read")
        return about
    kind = {Kind.ARRAY: "array", Kind.RECORD: "record", None: "compressed"}[about.kind]
    return Entry(key, kind, about, stored, ttl)


def _is_foreign(reply: object) -> bool:
    """No string, or none of what this user may read."""
    return isinstance(reply, ServerError) and reply.code in ("WRONGTYPE", "NOPERM")


def _seconds(ttl: int) -> float | None:
    return None if ttl < 0 else ttl / 1000


def key_of(name: str) -> bytes:
    """The key that was meant on the command line, byte by byte."""
    return os.fsencode(name)


def name_of(key: bytes) -> str:
    """A key as JSON has it; what is no UTF-8 becomes lone surrogates, as Python has them (PEP 383)."""
    return key.decode("utf-8", "surrogateescape")


def _column_json(column: Column, *, rows: bool = True) -> dict[str, Any]:
    return {"dtype": str(column.dtype), "shape": list(column.shape if rows else column.shape[1:])}


def columns_json(about: Description, *, rows: bool = True) -> dict[str, Any]:
    """The columns of a record; without ``rows``, those of one transition in a chunk."""
    return {name: _column_json(column, rows=rows) for name, column in about.columns.items()}
