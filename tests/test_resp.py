"""The protocol without IO: whatever comes, cut wherever, gives what a naive parser reads, in the place it belongs."""

from __future__ import annotations

import tracemalloc
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aionpredis.errors import ProtocolError, ServerError, ServerFull, UsageError
from aionpredis.requests import (
    ValueReply,
    encode_array,
    ok_reply,
    row_views,
    set_command,
    ttl_options,
    value_reply,
)
from aionpredis.wire import resp
from aionpredis.wire.resp import Blob, Parser, Pattern, Reply, Template, encode, encode_set
from tests.predictions import rows_reply

# --- a naive reference -----------------------------------------------------------------------------------------------


def read(data: bytes, at: int = 0) -> tuple[Any, int]:
    """One value, read by recursion from the whole stream; where the next one begins."""
    stop = data.index(b"\r\n", at)
    kind, line, at = data[at : at + 1], data[at + 1 : stop], stop + 2
    if kind == b"+":
        return line, at
    if kind == b"-":
        return ("error", line.decode()), at
    if kind == b":":
        return int(line), at
    if kind == b"$":
        size = int(line)
        return (None, at) if size < 0 else (data[at : at + size], at + size + 2)
    assert kind == b"*"
    if int(line) < 0:
        return None, at
    items = []
    for _ in range(int(line)):
        item, at = read(data, at)
        items.append(item)
    return items, at


def read_all(data: bytes) -> list[Any]:
    values, at = [], 0
    while at < len(data):
        value, at = read(data, at)
        values.append(value)
    return values


def plain(value: Any) -> Any:
    """A parser's value as the reference writes it."""
    if isinstance(value, list):
        return [plain(item) for item in value]
    if isinstance(value, ServerError):
        return ("error", str(value))
    if isinstance(value, np.ndarray):
        return value.tobytes()
    return value


def bulk(content: bytes) -> bytes:
    return b"$%d\r\n%b\r\n" % (len(content), content)


def feed(parser: Parser, data: bytes) -> list[Reply]:
    """Hand over bytes as one or more system calls would."""
    done: list[Reply] = []
    while data:
        count = 0
        buffers = parser.get_buffers()
        assert len(buffers) <= resp.MAX_VECTORS + 1
        for buffer in buffers:
            part = data[count : count + len(buffer)]
            buffer[: len(part)] = part
            count += len(part)
        assert count, "no room for bytes that have come"
        done += parser.advance(count)
        data = data[count:]
    return done


def pieces(data: bytes, cuts: Sequence[int]) -> Iterator[bytes]:
    edges = [0, *sorted({cut % (len(data) + 1) for cut in cuts}), len(data)]
    for start, stop in pairwise(edges):
        if start < stop:
            yield data[start:stop]


def receive(data: bytes, *replies: Reply, max_bulk: int = resp.MAX_BULK) -> Parser:
    parser = Parser(max_bulk)
    for reply in replies:
        parser.expect(reply)
    feed(parser, data)
    return parser


class Placed(ValueReply):
    """Strings received in place, whatever else comes."""

    def accepts(self, value: Any) -> bool:
        return True


# --- any stream, any cut ---------------------------------------------------------------------------------------------

LINES = st.text("abc ÄÖ-+$*:0", max_size=12).map(lambda text: text.encode())
SCALARS = st.one_of(
    LINES.map(lambda line: b"+" + line + b"\r\n"),
    LINES.map(lambda line: b"-ERR " + line + b"\r\n"),
    st.integers(-(2**63), 2**63 - 1).map(lambda number: b":%d\r\n" % number),
    st.binary(max_size=40).map(bulk),
    st.sampled_from([b"\r\n", b"$-1\r\n", b"+OK\r\n" * 3, b"*2\r\n"]).map(bulk),
    st.sampled_from([b"$-1\r\n", b"*-1\r\n", b"*0\r\n", b"$0\r\n\r\n"]),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4).map(lambda items: b"*%d\r\n%b" % (len(items), b"".join(items))),
    max_leaves=8,
)
CUTS = st.lists(st.integers(0, 1 << 16), max_size=12)


@given(st.lists(VALUES, min_size=1, max_size=6), CUTS, st.sampled_from([Reply, Placed]))
def test_any_stream_cut_anywhere_gives_the_same_values(
    wires: list[bytes], cuts: list[int], kind: Callable[[], Reply]
) -> None:
    data = b"".join(wires)
    parser = Parser()
    replies = [kind() for _ in wires]
    for reply in replies:
        parser.expect(reply)
    done = [reply for piece in pieces(data, cuts) for reply in feed(parser, piece)]
    assert done == replies
    assert [plain(reply.values[0]) for reply in replies] == read_all(data)
    assert not parser.pending


def test_values_arrive_byte_by_byte() -> None:
    data = b"*3\r\n:-7\r\n*2\r\n$-1\r\n-OOM no\r\n$5\r\na\r\nbc\r\n+OK\r\n*-1\r\n$0\r\n\r\n"
    replies = [Reply(), Reply(3)]
    parser = Parser()
    for reply in replies:
        parser.expect(reply)
    for index in range(len(data)):
        feed(parser, data[index : index + 1])
    assert [plain(value) for reply in replies for value in reply.values] == read_all(data)
    assert isinstance(replies[0].values[0][1][1], ServerFull)


@pytest.mark.parametrize("size", [resp.STAGING // 2 - 2, resp.STAGING // 2, resp.STAGING, 3 << 20])
@pytest.mark.parametrize("kind", [Reply, Placed])
def test_long_strings_of_every_size_are_whole(kind: Callable[[], Reply], size: int) -> None:
    content = np.random.default_rng(size).bytes(size)
    data = b"+first\r\n" + bulk(content) + b"*2\r\n" + bulk(content) + b":1\r\n+last\r\n"
    replies = [kind() for _ in range(4)]
    parser = Parser()
    for reply in replies:
        parser.expect(reply)
    for piece in pieces(data, range(0, len(data), 100_003)):
        feed(parser, piece)
    assert [plain(reply.values[0]) for reply in replies] == [b"first", content, [content, 1], b"last"]


def test_payload_lands_in_the_memory_that_the_reply_names() -> None:
    first, second = bytearray(1000), bytearray(500)

    class Named(Reply):
        def bulk(self, size: int) -> tuple[Sequence[memoryview], Any]:
            assert size == 1500
            return (memoryview(first), memoryview(second)), "stored"

    content = np.random.default_rng(1).bytes(1500)
    for cut in (1, 7, 8, 500, 1007, 1008, 1400, 1508, 1509):
        first[:], second[:] = bytes(1000), bytes(500)
        reply, parser = Named(), Parser()
        parser.expect(reply)
        for piece in pieces(bulk(content), [cut]):
            feed(parser, piece)
        assert reply.values == ["stored"]
        assert first + second == content


# --- predictions -----------------------------------------------------------------------------------------------------

HEADER = b"a header, predicted."


@dataclass
class Asked:
    """One request of a scenario: what comes, what was predicted, and when its caller goes away (by piece)."""

    wire: bytes
    reply: Reply
    rows: np.ndarray[Any, Any] | None = None
    leaves: int | None = None
    seen: bytes = field(default=b"")


@st.composite
def asked(draw: st.DrawFn) -> Asked:
    leaves = draw(st.none() | st.integers(0, 6))
    kind = draw(st.sampled_from(["plain", "value", "ok", "rows", "rows", "rows", "one"]))
    if kind in ("plain", "value"):
        return Asked(draw(VALUES), Reply() if kind == "plain" else Placed(), leaves=leaves)
    if kind == "ok":
        count = draw(st.integers(1, 4))
        answers = draw(st.lists(st.sampled_from([b"+OK\r\n"] * 5 + [b"-OOM full\r\n", b"$-1\r\n"]), min_size=count))
        return Asked(b"".join(answers[:count]), Reply(count, ok_reply(count).template), leaves=leaves)
    count, size = draw(st.integers(1, 4)), draw(st.sampled_from([0, 1, 5, 64, 300]))
    rows = np.full((count, size), 0xEE, np.uint8)
    rng = np.random.default_rng(draw(st.integers(0, 9)))
    contents = [HEADER + rng.bytes(size) for _ in range(count)]
    for index in draw(st.lists(st.integers(0, count - 1), max_size=2)):
        other = draw(st.sampled_from(["size", "header", "empty", "tricky"]))
        contents[index] = {
            "size": contents[index] + b"more",
            "header": b"A" + contents[index][1:],
            "empty": b"",
            "tricky": b"\r\n$-1\r\n*1\r\n" * 9,
        }[other]
    missing = draw(st.sets(st.integers(0, count - 1), max_size=1))
    items = [b"$-1\r\n" if i in missing else bulk(content) for i, content in enumerate(contents)]
    views = row_views(rows)
    if kind == "one":
        answer = draw(st.sampled_from([items[0], items[0], b"-WRONGTYPE it is a list\r\n", b"$-1\r\n"]))
        return Asked(answer, Placed(1, value_reply(HEADER, views[0]).template), rows[:1], leaves)
    whole = b"*%d\r\n%b" % (count, b"".join(items))
    shorter = b"*%d\r\n%b" % (count - 1, b"".join(items[1:]))
    answer = draw(st.sampled_from([whole, whole, whole, whole, b"-NOPERM no\r\n", shorter, b"*-1\r\n", b":1\r\n"]))
    return Asked(answer, Placed(1, rows_reply(HEADER, views).template), rows, leaves)


@settings(max_examples=600)
@given(st.lists(asked(), min_size=1, max_size=7), CUTS)
def test_predictions_change_speed_but_never_results(requests: list[Asked], cuts: list[int]) -> None:
    parser = Parser()
    for request in requests:
        parser.expect(request.reply)
    for number, piece in enumerate(pieces(b"".join(request.wire for request in requests), cuts)):
        for request in requests:
            if request.leaves == number and not request.reply.done:
                parser.abandon(request.reply)
                request.seen = b"" if request.rows is None else request.rows.tobytes()
        feed(parser, piece)
    assert not parser.pending
    for request in requests:
        reply, expected = request.reply, read_all(request.wire)
        assert reply.done
        assert reply.error is None
        if reply.abandoned:
            if request.rows is not None:
                assert request.rows.tobytes() == request.seen, "written after its caller had gone"
        elif reply.matched:
            got = [b"OK"] * reply.count
            if request.rows is not None:
                values = [HEADER + row.tobytes() for row in request.rows]
                got = values if request.wire.startswith(b"$") else [values]  # type: ignore[list-item]
            assert got == expected
        else:
            assert [plain(value) for value in reply.values] == expected


def rows_wire(rows: Any) -> bytes:
    return b"*%d\r\n%b" % (len(rows), b"".join(bulk(HEADER + row.tobytes()) for row in rows))


def test_one_receive_scatters_over_several_predicted_replies() -> None:
    content = np.random.default_rng(2).integers(0, 256, (3, 4, 5000), np.uint8)
    out = np.zeros_like(content)
    replies = [rows_reply(HEADER, row_views(part)) for part in out]
    parser = Parser()
    for reply in replies:
        parser.expect(reply)
    data = b"".join(rows_wire(part) for part in content)
    places = parser.get_buffers()
    start = 0
    for place in places:
        part = data[start : start + len(place)]
        place[: len(part)] = part
        start += len(part)
    assert start == len(data)
    assert (out == content).all(), "the bytes were not received in place"
    assert parser.advance(start) == replies
    assert all(reply.matched for reply in replies)


@pytest.mark.parametrize("at", [0, 1, 100, 5 << 20, (8 << 20) - 1])
def test_abandoned_destination_is_never_written_again(at: int) -> None:
    rows = np.zeros((1, 8 << 20), np.uint8)
    reply, behind = rows_reply(HEADER, row_views(rows)), Reply()
    parser = Parser()
    parser.expect(reply)
    parser.expect(behind)
    data = rows_wire(np.full((1, 8 << 20), 7, np.uint8)) + b"+next\r\n"
    feed(parser, data[:at])
    parser.abandon(reply)
    before = rows.copy()
    parser.abandon(reply)  # harmless
    feed(parser, data[at:])
    assert (rows == before).all()
    assert behind.values == [b"next"]
    assert reply.done
    assert reply.abandoned


@pytest.mark.parametrize("at", [0, 3, 10, 2000, 3 << 20])
def test_abandoned_unpredicted_string_is_dropped(at: int) -> None:
    memory = bytearray(3 << 20)

    class Named(Reply):
        def bulk(self, size: int) -> tuple[Sequence[memoryview], Any]:
            return (memoryview(memory),), None

    reply, behind = Named(), Reply()
    parser = Parser()
    parser.expect(reply)
    parser.expect(behind)
    data = bulk(bytes([9]) * len(memory)) + b":5\r\n"
    feed(parser, data[:at])
    parser.abandon(reply)
    before = bytes(memory)
    feed(parser, data[at:])
    assert memory == before
    assert behind.values == [5]


def test_what_has_come_of_an_abandoned_list_is_let_go() -> None:
    came: list[weakref.ref[Any]] = []

    class Watched(Reply):
        def bulk(self, size: int) -> tuple[Sequence[memoryview], Any]:
            memory = np.empty(size, np.uint8)
            came.append(weakref.ref(memory))
            return (memory.data,), memory

    reply, behind = Watched(), Reply()
    parser = Parser()
    parser.expect(reply)
    parser.expect(behind)
    item = bulk(bytes(5000))
    feed(parser, b"*4\r\n*2\r\n" + 3 * item + item[:100])
    assert [memory() is None for memory in came] == [False] * 4
    parser.abandon(reply)
    assert [memory() is None for memory in came] == [True] * 4
    feed(parser, item[100:] + item + b":5\r\n")
    assert reply.done
    assert behind.values == [5]


def test_half_received_abandoned_reply_that_is_not_as_predicted_ends_the_connection() -> None:
    rows = np.zeros((2, 5 << 20), np.uint8)
    parser = Parser()
    reply = rows_reply(HEADER, row_views(rows))
    parser.expect(reply)
    first = rows_wire(np.ones((1, 5 << 20), np.uint8)).replace(b"*1", b"*2", 1)
    feed(parser, first[:-1])
    parser.abandon(reply)
    with pytest.raises(ProtocolError, match="cancelled"):
        feed(parser, first[-1:] + b"$-1\r\n")


def test_pattern_without_payloads_between_literals_is_verified_to_the_last_byte() -> None:
    for wrong in range(len(b"+OK\r\n" * 3) - 1):
        if wrong % 5 in (1, 2):  # inside of a status line: other text is another status
            data = bytearray(b"+OK\r\n" * 3)
            data[wrong] = ord("X")
            parser = receive(bytes(data), reply := Reply(3, ok_reply(3).template))
            assert not reply.matched
            assert [plain(value) for value in reply.values] == read_all(bytes(data))
            assert not parser.pending


# --- what was not asked for ---


@pytest.mark.parametrize(
    ("make", "right", "wrong"),
    [
        (ok_reply, [b"+OK\r\n", b"-OOM no\r\n"], [b"+QUEUED\r\n", b":1\r\n", b"$-1\r\n", b"*0\r\n"]),
        (ValueReply, [b"$-1\r\n", b"$1\r\nx\r\n", b"-ERR\r\n"], [b"+OK\r\n", b":1\r\n", b"*0\r\n", b"*1\r\n$-1\r\n"]),
        (
            lambda: ValueReply(length=2),
            [b"*2\r\n$-1\r\n$1\r\nx\r\n", b"-ERR\r\n"],
            [b"*1\r\n$-1\r\n", b"*3\r\n" + b"$-1\r\n" * 3, b"*2\r\n:1\r\n:1\r\n", b"$-1\r\n", b"*-1\r\n", b"+OK\r\n"],
        ),
        (lambda: value_reply(HEADER, memoryview(bytearray(5))), [b"$-1\r\n"], [b"+OK\r\n", b":1\r\n", b"*0\r\n"]),
        (
            lambda: rows_reply(HEADER, [memoryview(bytearray(5))] * 2),
            [b"*2\r\n$-1\r\n$-1\r\n"],
            [b"*1\r\n$-1\r\n", b"+OK\r\n", b"$-1\r\n"],
        ),
    ],
    ids=["SET", "GET", "MGET", "GET out=", "MGET out="],
)  # fmt: skip
def test_reply_to_another_request_ends_the_connection(
    make: Callable[[], Reply], right: list[bytes], wrong: list[bytes]
) -> None:
    for data in right:
        receive(data, reply := make())
        assert reply.done
    for data in wrong:
        with pytest.raises(ProtocolError, match="another kind"):
            receive(data, make())
        reply, parser = make(), Parser()
        parser.expect(reply)
        parser.abandon(reply)
        feed(parser, data)  # nobody wants to know
        assert reply.done


# --- what is not RESP ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [
        b"hello\r\n",
        b"\r\n",
        b"%1\r\n+a\r\n+b\r\n",  # RESP3
        b"$\r\n",
        b"$x\r\n",
        b"$-2\r\n",
        b"$1e3\r\n",
        b"$+5\r\n",
        b"$ 5\r\n",
        b"*-2\r\n",
        b"*1_0\r\n",
        b"*\xb2\r\n",
        b":--1\r\n",
        b":\r\n",
        b":" + b"9" * 21 + b"\r\n",
        b"$3\r\nabcd\r\n",
        b"$200000\r\n" + b"a" * 200_001 + b"\r\n",
        b"$101\r\n",
        b"*1\r\n" * 33,
        b"+" + b"a" * (resp.MAX_LINE + 1),
        b"a" * (resp.MAX_LINE + 2),
    ],
    ids=lambda data: repr(data[:12]),
)
@pytest.mark.parametrize("predicted", [False, True], ids=["generic", "predicted"])
def test_what_is_not_resp_is_a_protocol_error(data: bytes, predicted: bool) -> None:
    limit = 100 if data.startswith(b"$101") else resp.MAX_BULK
    with pytest.raises(ProtocolError):
        receive(data, ok_reply(9) if predicted else Reply(), max_bulk=limit)


@given(st.binary(min_size=1, max_size=80), CUTS)
def test_noise_is_values_or_a_protocol_error(noise: bytes, cuts: list[int]) -> None:
    parser = Parser(1 << 20)
    for _ in range(4):
        parser.expect(Reply())
    parser.expect(ok_reply(2))
    try:
        for piece in pieces(noise, cuts):
            feed(parser, piece)
    except ProtocolError:
        pass


def test_bytes_that_nobody_asked_for_are_a_protocol_error() -> None:
    parser = receive(b"+OK\r\n", ok_reply())
    with pytest.raises(ProtocolError, match="nobody asked"):
        feed(parser, b"+OK\r\n")


def test_nesting_up_to_the_limit_is_read() -> None:
    receive(b"*1\r\n" * 32 + b":1\r\n", reply := Reply())
    value = reply.values
    for _ in range(32):
        (value,) = value
    assert value == [1]


def test_redirection_to_where_nothing_can_be_is_an_error_like_others() -> None:
    for text in ("MOVED 16384 h:1", "ASK 99999 h:1", "MOVED 1 h:65536", "MOVED 1 h", "MOVED \u0663 h:1"):
        reply = Reply()
        receive(f"-{text}\r\n".encode(), reply)
        assert type(reply.values[0]) is ServerError
        assert not reply.redirected
    reply = Reply()
    receive(b"-MOVED 16383 h:65535\r\n", reply)
    assert reply.redirected


def test_error_as_the_only_value_is_raised() -> None:
    receive(b"-WRONGTYPE no\r\n", reply := Reply())
    with pytest.raises(ServerError, match="WRONGTYPE no"):
        reply.result()


def test_parser_gives_memory_back_after_large_replies() -> None:
    parser = Parser()
    big = b"*3\r\n" + bulk(bytes(9 << 20)) + b"+" + b"a" * 60_000 + b"\r\n:1\r\n"
    tracemalloc.start()
    try:
        parser.expect(ok_reply(200))  # mispredicted: goes through the staging buffer
        feed(parser, b"-ERR long\r\n" * 200)
        for _ in range(3):
            parser.expect(Reply())
            feed(parser, big)
        rows = np.zeros((2, 6 << 20), np.uint8)
        parser.expect(rows_reply(HEADER, row_views(rows)))
        feed(parser, rows_wire(np.ones_like(rows)).replace(HEADER, HEADER[::-1], 1))
        del rows
        parser.expect(ok_reply())
        feed(parser, b"+OK\r\n")
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held < 4 * resp.STAGING


def test_empty_payloads_of_a_half_dropped_reply_need_no_bytes() -> None:
    memory = bytearray(5 << 20)
    pattern = Pattern([b"$%d\r\n" % len(memory), len(memory), 0, b"\r\n"])
    parser = Parser()
    reply, behind = Reply(1, Template(pattern, (memoryview(memory), memoryview(bytearray())))), Reply()
    parser.expect(reply)
    parser.expect(behind)
    data = bulk(bytes(memory)) + b":1\r\n"
    feed(parser, data[:-100])
    parser.abandon(reply)
    feed(parser, data[-100:])
    assert behind.values == [1]


# --- sending ---------------------------------------------------------------------------------------------------------


def joined(buffers: Sequence[Any]) -> bytes:
    assert all(len(buffer) for buffer in buffers), "an empty buffer is never sent"
    return b"".join(buffers)


ARGUMENTS = st.one_of(
    st.binary(max_size=20),
    st.text(max_size=20),
    st.integers(),
    st.floats(allow_nan=False),
    st.integers(1000, 1050).map(bytes),
    st.lists(st.sampled_from([0, 3, 1023, 1024, 5000]), max_size=4).map(
        lambda sizes: Blob([np.full(size, 3, np.uint8).data for size in sizes])
    ),
)


@given(st.lists(ARGUMENTS, min_size=1, max_size=6))
def test_encoded_commands_are_arrays_of_strings(arguments: list[Any]) -> None:
    expected = []
    for argument in arguments:
        if isinstance(argument, Blob):
            expected.append(b"".join(argument.parts))
        else:
            expected.append(argument if isinstance(argument, bytes) else str(argument).encode())
    assert read_all(joined(encode(*arguments))) == [expected]


@given(
    st.binary(max_size=30),
    st.sampled_from([0, 1, 511, 512, 700]),
    st.none() | st.floats(0.001, 1e9),
    st.booleans(),
)
def test_set_is_encoded_as_any_command_is(key: bytes, items: int, ttl: float | None, in_parts: bool) -> None:
    value = encode_array(np.arange(items, dtype=np.uint16), None)
    whole = b"".join(value)
    command = joined(set_command(key, [memoryview(whole)] if in_parts else value, ttl_options(ttl)))
    extra = [] if ttl is None else [b"PX", b"%d" % max(1, round(ttl * 1000))]
    assert read_all(command) == [[b"SET", key, whole, *extra]]
    if ttl is None:
        assert joined(encode_set(key, bytes(value[0]), value[1])) == joined(encode("SET", key, whole))


def test_views_of_several_axes_are_sent_whole() -> None:
    array = np.arange(24, dtype=np.int32).reshape(2, 3, 4)
    assert read_all(joined(encode("SET", "k", array.data))) == [[b"SET", b"k", array.tobytes()]]
    numbers: list[Any] = [np.int64(7), np.float32(0.5)]
    assert read_all(joined(encode("X", bytearray(b"ab"), *numbers))) == [[b"X", b"ab", b"7", b"0.5"]]


@pytest.mark.parametrize(
    "argument",
    [None, True, [1], np.zeros(3), np.arange(9, dtype=np.uint8)[::2].data, {"a": 1}, "\udc80", object()],
    ids=lambda argument: type(argument).__name__,
)
def test_argument_without_bytes_is_refused(argument: Any) -> None:
    with pytest.raises(UsageError, match="argument"):
        encode("SET", "k", argument)


def test_large_arguments_are_not_copied() -> None:
    array = np.arange(5000, dtype=np.uint16)
    value = encode_array(array, None)
    assert any(np.shares_memory(np.frombuffer(part, np.uint8), array) for part in encode("SET", "k", Blob(value)))
    assert any(np.shares_memory(np.frombuffer(part, np.uint8), array) for part in set_command(b"k", value))
