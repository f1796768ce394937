"""The parser of replies: what a caller gets must not depend on how the bytes are cut, or on who went away."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from aionpredis.errors import CorruptValue, ProtocolError, ServerError
from aionpredis.replay.log import ChunkId, CommitsReply, pack, parse_commit
from aionpredis.requests import ValueReply, ok_reply, value_reply
from aionpredis.wire import resp
from aionpredis.wire.resp import Parser, Reply
from tests.predictions import rows_reply

from .guard import at_most

HEADER, ROW = b"<header>", 5
MAX_BULK = 2000
"""Bytes: more than the longest input has, which no shortcut may take for a string then."""
CONTROL = 8
"""Bytes before the replies: four kinds of requests, then four lengths of pieces."""

COMMIT = pack(ChunkId(b"incarnat", 3, 4, b"\x05"))


class _Noted(ValueReply):
    """Remembers the memory that it named."""

    __slots__ = ("named",)

    def bulk(self, size: int) -> tuple[Sequence[memoryview], Any]:
        places, value = super().bulk(size)
        value[:] = 0xEE
        self.named = [*getattr(self, "named", []), value]
        return places, value


class Asked:
    """A request, and the memory that its reply is received into."""

    def __init__(self, kind: int) -> None:
        self.rows = np.full((2, ROW), 0xEE, np.uint8)
        first, second = (row.data for row in self.rows)
        kinds: list[Callable[[], Reply]] = [
            Reply,
            lambda: Reply(2),
            _Noted,
            lambda: _Noted(length=2),
            lambda: ok_reply(2),
            lambda: value_reply(HEADER, first),
            lambda: rows_reply(HEADER, [first, second]),
            CommitsReply,
        ]
        self.kind = kind % len(kinds)
        self.reply = kinds[self.kind]()

    def written(self) -> bytes:
        """All that was received, or was there before."""
        return b"".join([self.rows.tobytes(), *(value.tobytes() for value in getattr(self.reply, "named", []))])

    def result(self) -> Any:
        """What the caller would get; ``None`` while it waits."""
        if not self.reply.done:
            return None
        if self.reply.matched:
            rows = [HEADER + row.tobytes() for row in self.rows]
            return {4: [b"OK", b"OK"], 5: rows[:1], 6: [rows]}[self.kind]
        values = self.reply.values
        return [_commits(values[0])] if self.kind == 7 else _plain(values)


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, ServerError):
        return "error", str(value)
    return value.tobytes() if isinstance(value, np.ndarray) else value


def _commits(value: Any) -> Any:
    """Entries as the log's reader takes them."""
    if not isinstance(value, list):
        return _plain(value)
    commits: list[Any] = []
    for item in value:
        try:
            commits.append(item if isinstance(item, ChunkId) else parse_commit(item))
        except (CorruptValue, ValueError, TypeError, AttributeError):  # no list of entries: a server does not say that
            commits.append(None)
    return commits


@contextmanager
def _sizes(staging: int) -> Iterator[None]:
    """Short lines and, if wanted, a small staging buffer, so that short input comes to all their ends."""
    before = resp.STAGING, resp.MAX_LINE, resp.MAX_GATHER, resp.TURN
    resp.STAGING, resp.MAX_LINE, resp.MAX_GATHER, resp.TURN = staging, 200, 16, staging
    try:
        yield
    finally:
        resp.STAGING, resp.MAX_LINE, resp.MAX_GATHER, resp.TURN = before


def _feed(parser: Parser, piece: bytes) -> None:
    while piece:
        count = 0
        for buffer in parser.get_buffers():
            part = piece[count : count + len(buffer)]
            buffer[: len(part)] = part
            count += len(part)
        assert count, "no room for bytes that have come"
        parser.advance(count)
        piece = piece[count:]


def pieces(data: bytes, lengths: bytes) -> Iterator[bytes]:
    at = turn = 0
    while at < len(data):
        size = lengths[turn % len(lengths)] % 64 + 1
        yield data[at : at + size]
        at, turn = at + size, turn + 1


def receive(asked: list[Asked], data: Iterable[bytes], staging: int = 4096) -> bool:
    """Whether all of it was taken, piece by piece, with a staging buffer of this size."""
    with _sizes(staging):
        parser = Parser(MAX_BULK)
        for one in asked:
            parser.expect(one.reply)
        try:
            for piece in data:
                _feed(parser, piece)
        except ProtocolError:
            return False
    return True


def fuzz_resp(data: bytes) -> None:
    """The same outcome in one piece and a large buffer as in many pieces and a small one."""
    kinds, lengths, replies = data[:4], data[4:CONTROL], data[CONTROL:]
    if not lengths:
        return
    outcomes = []
    for cut, staging in (([replies], 4096), (pieces(replies, lengths), 64)):
        asked = [Asked(kind) for kind in kinds]
        with at_most(100_000 + 400 * len(replies)):
            whole = receive(asked, cut, staging)
        outcomes.append((whole, [one.result() for one in asked]))
    assert outcomes[0] == outcomes[1]


class _Any(Reply):
    """Takes whatever comes, in place of a request of another kind."""


def fuzz_abandon(data: bytes) -> None:
    """A caller goes away: nothing is written into his memory any more, and the others get what they would have got."""
    kinds, lengths, replies = data[:4], data[4:CONTROL], data[CONTROL:]
    if len(lengths) < 2:
        return
    leaver, when = lengths[0] % 4, lengths[1] % 16
    asked = [Asked(kind) for kind in kinds]
    others = [Asked(kind) for kind in kinds]
    others[leaver].reply = _Any(others[leaver].reply.count)
    seen = b""
    whole = True
    with _sizes(64):
        parser = Parser(MAX_BULK)
        for one in asked:
            parser.expect(one.reply)
        try:
            for number, piece in enumerate([*pieces(replies, lengths), b""]):
                if number == when and not asked[leaver].reply.done:
                    parser.abandon(asked[leaver].reply)
                    seen = asked[leaver].written()
                _feed(parser, piece)
        except ProtocolError as error:
            whole = False
            if "cancelled" in str(error):
                return
    if not asked[leaver].reply.abandoned:
        return
    assert asked[leaver].written() == seen, "written after its caller had gone"
    assert receive(others, [replies]) == whole
    del asked[leaver], others[leaver]
    assert [one.result() for one in asked] == [one.result() for one in others]


def seeds() -> list[bytes]:
    def bulk(content: bytes) -> bytes:
        return b"$%d\r\n%b\r\n" % (len(content), content)

    row = bulk(HEADER + b"12345")
    entry = b"*2\r\n" + bulk(b"7-12") + b"*2\r\n" + bulk(b"c") + bulk(COMMIT)
    other = b"*2\r\n" + bulk(b"7-13") + b"*4\r\n" + bulk(b"c") + bulk(COMMIT) + bulk(b"a") + bulk(b"b")
    short = b"*2\r\n" + bulk(b"7-14") + b"*2\r\n" + bulk(b"c") + bulk(b"abc")
    control = b"\x04\x02\x1f\x3b"
    plain = b"+OK\r\n:-7\r\n*3\r\n$-1\r\n*-1\r\n*0\r\n-ERR no\r\n"
    return [
        bytes([0, 1, 0, 0]) + control + plain,
        bytes([4, 4, 2, 0]) + control + b"+OK\r\n" * 3 + b"-OOM full\r\n" + bulk(b"x" * 90) + bulk(b"y" * 200),
        bytes([5, 6, 5, 6]) + control + row + b"*2\r\n" + row + row + b"$-1\r\n" + b"*2\r\n$-1\r\n" + row,
        bytes([6, 6, 3, 2])
        + control
        + b"*2\r\n"
        + row
        + bulk(b"other")
        + b"-WRONGTYPE no\r\n*2\r\n$-1\r\n"
        + row
        + row,
        bytes([7, 7, 0, 1]) + control + b"*3\r\n" + entry + other + entry + b"*0\r\n" + b"*1\r\n" * 5 + plain,
        bytes([7, 7, 7, 7]) + control + b"*3\r\n" + entry + short + entry + b"*2\r\n" + entry + short + b"-ERR no\r\n",
        bytes([2, 3, 2, 2]) + control + bulk(b"x" * 90) + b"*2\r\n" + bulk(b"y" * 90) + bulk(b"") + b"$99999999999\r\n",
        bytes([0, 0, 0, 0]) + control + b"*1\r\n" * 33 + b"+" + b"a" * 210 + b"\r\n",
    ]
