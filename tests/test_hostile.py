"""Values, log entries and announcements that somebody else wrote: read as they are, or a clear error that names the key;
the connection stays usable, other callers get what is theirs, and work and memory are linear in what came.

What a single decoder does with its bytes is tested with it (``test_resp``, ``test_npy``, …) and by ``tests/fuzz``.
"""

from __future__ import annotations

import json
import os
import pickle
import struct
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import lz4.frame
import numpy as np
import pytest
import redis

import aionpredis
from aionpredis import Client, CorruptValue, NotAnArray, Schema, SchemaMismatch, ServerError, WrongKind
from aionpredis.codecs import open_array, open_record
from aionpredis.errors import AionpredisError, DecodeError
from aionpredis.formats import npy, safetensors
from aionpredis.replay.chunk import ChunkBuffer
from aionpredis.requests import ok_reply
from aionpredis.wire import resp
from aionpredis.wire.resp import Parser, Reply

from .fuzz.guard import at_most
from .fuzz.replies import CONTROL, Asked, receive
from .fuzz.replies import seeds as streams_of_replies
from .replays import SCHEMA, fill, replay_of, uids
from .strategies import equal, same, writable
from .test_resp import bulk, feed

pytestmark = pytest.mark.anyio

# --- replies, cut ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", range(len(streams_of_replies())))
def test_replies_cut_in_two_at_any_byte_give_the_same(number: int) -> None:
    seed = streams_of_replies()[number]
    kinds, data = seed[:4], seed[CONTROL:]
    whole = [Asked(kind) for kind in kinds]
    taken = receive(whole, [data])
    for at in range(1, len(data)):
        for staging in (4096, 64):
            asked = [Asked(kind) for kind in kinds]
            assert receive(asked, [data[:at], data[at:]], staging) == taken
            assert [one.result() for one in asked] == [one.result() for one in whole], at


@pytest.mark.parametrize("cut", [1, resp.MAX_LINE, resp.MAX_LINE + 1, resp.MAX_LINE + 2, 10**9])
@pytest.mark.parametrize(("length", "fits"), [(resp.MAX_LINE - 1, True), (resp.MAX_LINE, False)])
def test_longest_line_is_the_same_however_it_is_cut(length: int, fits: bool, cut: int) -> None:
    data = b"+" + b"a" * length + b"\r\n"
    parser, reply = Parser(), Reply()
    parser.expect(reply)
    try:
        feed(parser, data[:cut])
        feed(parser, data[cut:])
    except aionpredis.ProtocolError:
        assert not fits
    else:
        assert fits
        assert len(reply.values[0]) == length


# --- work and memory are linear --------------------------------------------------------------------------------------


def work(function: Callable[[], object]) -> int:
    """Steps: calls of Python and C functions, and every 64 bytes that the parser moves in or to its staging buffer."""
    steps = 0

    def count(frame: Any, event: str, argument: object) -> None:
        nonlocal steps
        if event in ("call", "c_call"):
            steps += 1

    compact, replace = Parser._compact, Parser._replace_staging
    patched: Any = Parser

    def moving(parser: Parser) -> None:
        nonlocal steps
        steps += (parser._end - parser._start) // 64
        compact(parser)

    def replacing(parser: Parser, *parts: Any) -> None:
        nonlocal steps
        steps += sum(map(len, parts)) // 64
        replace(parser, *parts)

    patched._compact, patched._replace_staging = moving, replacing
    before = sys.getprofile()
    sys.setprofile(count)
    try:
        function()
    finally:
        sys.setprofile(before)
        patched._compact, patched._replace_staging = compact, replace
    return steps


def parse(data: bytes, expected: Callable[[], Reply], count: int, step: int = 1 << 30) -> None:
    parser = Parser()
    for _ in range(count):
        parser.expect(expected())
    for at in range(0, len(data), step):
        feed(parser, data[at : at + step])
    assert not parser.pending


STREAMS: dict[str, Callable[[int], Callable[[], object]]] = {
    "many replies": lambda n: lambda: parse(b"+OK\r\n:1\r\n$3\r\nabc\r\n" * n, Reply, 3 * n),
    "one long array": lambda n: lambda: parse(b"*%d\r\n" % n + b":1\r\n" * n, Reply, 1),
    "a long array byte by byte": lambda n: lambda: parse(b"*%d\r\n" % (n // 8) + b":1\r\n" * (n // 8), Reply, 1, 1),
    "a string by 7 bytes": lambda n: lambda: parse(bulk(bytes(7 * n)), Reply, 1, 7),
    "a short string byte by byte": lambda n: lambda: parse(bulk(bytes(n)), Reply, 1, 1),
    "nested arrays": lambda n: lambda: parse((b"*1\r\n" * 31 + b"*0\r\n") * (n // 8), Reply, n // 8),
    "predicted replies": lambda n: lambda: parse(b"+OK\r\n" * n, ok_reply, n),
    "predicted replies that are errors": lambda n: lambda: parse(b"-OOM command not allowed\r\n" * n, ok_reply, n),
    "the same by 1000 bytes": lambda n: lambda: parse(b"-OOM command not allowed\r\n" * n, ok_reply, n, 1000),
}


def array_header(n: int) -> memoryview:
    return writable(*npy.encode(np.zeros(1, [(f"f{i:04}", "u1") for i in range(n)])))


def record_header(n: int) -> memoryview:
    header, views = safetensors.encode({f"column{i:05}": np.zeros(1, "u1") for i in range(n)})
    return writable(header, *views)


def nonsense(text: bytes, n: int) -> memoryview:
    body = b'{"a":' + text * n
    return writable(len(body).to_bytes(8, "little") + body)


def decode(opener: Callable[..., object], value: memoryview) -> None:
    npy._parse.cache_clear()
    safetensors._parsed.clear()
    try:
        opener(value, max_bytes=1 << 26)
    except DecodeError:
        pass


DECODERS: dict[str, Callable[[int], Callable[[], object]]] = {
    "fields of an array": lambda n: lambda: decode(open_array, array_header(n // 8)),
    "columns of a record": lambda n: lambda: decode(open_record, record_header(n)),
    "lists in JSON": lambda n: lambda: decode(open_record, nonsense(b"[[],", n)),
    "objects in JSON": lambda n: lambda: decode(open_record, nonsense(b'{"a":{},"b":', n // 8)),
    "bytes of an LZ4 frame": lambda n: lambda: decode(open_array, writable(lz4.frame.compress(bytes(n << 14)))),
}


@pytest.mark.parametrize("make", [*STREAMS.values(), *DECODERS.values()], ids=[*STREAMS, *DECODERS])
def test_four_times_the_input_is_four_times_the_work(make: Callable[[int], Callable[[], object]]) -> None:
    small, large = work(make(500)), work(make(2000))
    assert large < 4.4 * small + 10_000


def test_announced_lengths_of_arrays_allocate_nothing() -> None:
    parser, reply = Parser(), Reply()
    parser.expect(reply)
    feed(parser, b"+")
    parser = Parser()
    parser.expect(reply)
    with at_most(20_000):
        feed(parser, b"*9999999999999999999\r\n" * resp.MAX_DEPTH)
    assert not reply.done


def test_header_that_would_keep_the_loop_busy_is_refused_unread() -> None:
    value = memoryview(bytearray((50_000_000).to_bytes(8, "little") + b'{"a":[' + b"[]," * 20_000_000))
    with at_most(10_000), pytest.raises(CorruptValue, match="50,000,000 bytes"):
        safetensors.decode(value)
    with pytest.raises(aionpredis.EncodeError, match="several records"):
        safetensors.encode({f"{i:0100}": np.zeros(1) for i in range(30_000)})


def test_chunk_that_claims_more_than_its_rows_take_is_not_decompressed() -> None:
    from aionpredis.replay.chunk import open_chunk
    from aionpredis.replay.log import ChunkId, Names

    bomb = np.frombuffer(lz4.frame.compress(bytes(100 << 20)), np.uint8)
    with at_most(1_000_000), pytest.raises(CorruptValue, match=r"104857600.*r:7:"):
        open_chunk(bomb, SCHEMA, Names("r"), 7, ChunkId(b"incarnat", 0, 4, b""))


# --- values that are none --------------------------------------------------------------------------------------------

ARRAY = np.arange(12, dtype=np.int16).reshape(3, 4)


def array_file(array: Any) -> bytes:
    return b"".join(npy.encode(array))


def record_file(record: dict[str, Any]) -> bytes:
    header, views = safetensors.encode(record)
    return b"".join([header, *views])


def raw_record(tree: object, data: bytes = b"") -> bytes:
    text = tree if isinstance(tree, bytes) else json.dumps(tree).encode()
    return len(text).to_bytes(8, "little") + text + data


def column(shape: list[int], start: int, stop: int) -> dict[str, object]:
    return {"dtype": "U8", "shape": shape, "data_offsets": [start, stop]}


def claims(size: int, content: bytes) -> bytes:
    """An LZ4 frame that says it holds so many bytes."""
    header: bytes = lz4.frame.LZ4FrameCompressor().begin(source_size=size)
    return header + bytes(lz4.frame.compress(content)[len(header) :])


PICKLED = array_file(np.zeros(1, np.int64)).replace(b"'<i8'", b"'|O' ")
FILE = array_file(np.zeros(3000))
SKIPPABLE = b"\x50\x2a\x4d\x18\4\0\0\0abcd"

FOREIGN: dict[str, bytes] = {
    "nothing": b"",
    "text": b"just text",
    "a pickle": pickle.dumps({"weights": [1, 2, 3]}),
    "a pickle of an array": pickle.dumps(ARRAY),
    "JSON": b'{"state": [1, 2, 3]}',
    "zeros": bytes(100),
    "a leading skippable frame": SKIPPABLE + lz4.frame.compress(FILE),
    "compressed text": lz4.frame.compress(b"just text" * 99),
    "a record's header beyond the value": (10**6).to_bytes(8, "little") + b'{"a":1}',
    "a record's header of 2^64": (2**64 - 1).to_bytes(8, "little") + b'{"a":1}',
}
"""Neither arrays nor records."""

BROKEN_FRAMES: dict[str, bytes] = {
    "a frame of 1 TB": claims(2**40, FILE),
    "a frame of more than it holds": claims(len(FILE) + 1, FILE),
    "a frame of less than it holds": claims(len(FILE) - 1, FILE),
    "a frame of 10 bytes": claims(10, FILE),
    "a frame without a size": lz4.frame.compress(FILE, store_size=False),
    "a frame and a byte": lz4.frame.compress(FILE) + b"\0",
    "a frame and a skippable one": lz4.frame.compress(FILE) + SKIPPABLE,
    "two frames": lz4.frame.compress(FILE) * 2,
    "a frame in a frame": lz4.frame.compress(lz4.frame.compress(FILE)),
    "half a frame": lz4.frame.compress(FILE)[: len(FILE) // 500],
    "a bomb": lz4.frame.compress(bytes(8 << 20)),
}
"""Nobody can say what they hold."""

BROKEN_ARRAYS: dict[str, bytes] = {
    "pickled objects": PICKLED,
    "an array of 1 TB": npy.header_bytes(np.dtype("f8"), (1 << 37,)),
    "an array that is too short": FILE[:-1],
    "an array that is too long": FILE + b"\0",
    "an array of deep brackets": npy.MAGIC + b"\1\0" + (5000).to_bytes(2, "little") + b"(" * 5000,
    "a compressed array that is too short": lz4.frame.compress(FILE[:-1]),
}

BROKEN_RECORDS: dict[str, bytes] = {
    "a hole": raw_record({"a": column([1], 0, 1), "b": column([1], 2, 3)}, b"abc"),
    "a hole at the end": raw_record({"a": column([1], 0, 1)}, b"abc"),
    "an overlap": raw_record({"a": column([2], 0, 2), "b": column([2], 1, 3)}, b"abc"),
    "offsets out of range": raw_record({"a": column([3], 7, 10)}, b"abc"),
    "1 TB": raw_record({"a": column([2**40], 0, 2**40)}, b"abc"),
    "a name twice": raw_record(b'{"a":%b,"a":%b}' % ((json.dumps(column([3], 0, 3)).encode(),) * 2), b"abc"),
    "deep JSON": raw_record(b'{"a":' * 100_000),
    "a header of 5 MB": raw_record(b'{"a":' + b" " * 5_000_000),
    "a compressed hole": lz4.frame.compress(raw_record({"a": column([1], 2, 3)}, b"abc")),
}

OTHER_TYPES: dict[str, Callable[[redis.Redis, str], object]] = {
    "a list": lambda stock, key: stock.rpush(key, "x"),
    "a hash": lambda stock, key: stock.hset(key, "field", "x"),
    "a set": lambda stock, key: stock.sadd(key, "x"),
    "a sorted set": lambda stock, key: stock.zadd(key, {"x": 1}),
    "a stream": lambda stock, key: stock.xadd(key, {"field": "x"}),
}

ARRAYS = FOREIGN.keys() | BROKEN_FRAMES.keys() | BROKEN_ARRAYS.keys()
VALUES = FOREIGN | BROKEN_FRAMES | BROKEN_ARRAYS | BROKEN_RECORDS


def expected(name: str, *, record: bool) -> type[AionpredisError]:
    if name in FOREIGN:
        return NotAnArray
    if name in BROKEN_FRAMES:
        return NotAnArray if name == "a bomb" else CorruptValue
    return CorruptValue if (name in BROKEN_RECORDS) == record else WrongKind


@asynccontextmanager
async def undisturbed(client: Client) -> AsyncIterator[None]:
    """Others read through the same connection meanwhile; it is the same one afterwards."""
    connection = await client.connection()

    async def read() -> None:
        for _ in range(3):
            assert equal(await client.get("good"), ARRAY)
            assert all(equal(found, ARRAY) for found in await client.mget(["good"] * 3))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(read)
        yield
        tasks.start_soon(read)
    assert client.live_connection() is connection


async def test_value_of_another_kind_is_an_error_with_its_key_for_every_call(url: str, stock: redis.Redis) -> None:
    for name, value in VALUES.items():
        stock.set(name, value)
    async with aionpredis.connect(url) as client:
        await client.set("good", ARRAY)
        for name in VALUES:
            out = np.zeros((2, *ARRAY.shape), ARRAY.dtype)
            calls: dict[str, Callable[[], Any]] = {
                "get": partial(client.get, name),
                "get(out=)": partial(client.get, name, out=out[0]),
                "mget": partial(client.mget, ["good", name]),
                "mget(out=)": partial(client.mget, ["good", name], out=out),
                "get_record": partial(client.get_record, name),
            }
            async with undisturbed(client):
                for call, attempt in calls.items():
                    with pytest.raises(DecodeError) as raised:
                        await attempt()
                    kind = expected(name, record=call == "get_record")
                    assert (type(raised.value), raised.value.key) == (kind, name), (name, call)
                    assert f"[key {name!r}]" in str(raised.value)
                    assert len(str(raised.value)) < 500


async def test_key_of_another_type_is_an_error_with_its_key_for_every_call(url: str, stock: redis.Redis) -> None:
    async with aionpredis.connect(url) as client:
        await client.set("good", ARRAY)
        for name, make in OTHER_TYPES.items():
            make(stock, name)
            for attempt in (
                partial(client.get, name),
                partial(client.get, name, out=ARRAY.copy()),
                partial(client.get_record, name),
            ):
                async with undisturbed(client):
                    with pytest.raises(ServerError, match="WRONGTYPE") as raised:
                        await attempt()
                assert (raised.value.code, raised.value.command, raised.value.key) == ("WRONGTYPE", "GET", name)
            async with undisturbed(client):
                assert await client.mget([name]) == [None]
                assert (await client.mget([name], out=ARRAY[np.newaxis].copy())).tolist() == [False]
            await client.set(name, ARRAY)  # SET takes any key
            assert equal(await client.get(name), ARRAY)


# --- values that are rare --------------------------------------------------------------------------------------------


def of_bits(dtype: str, *bits: int) -> Any:
    width = np.dtype(dtype).itemsize
    return np.frombuffer(b"".join(one.to_bytes(width, "little") for one in bits), dtype).copy()


RARE: dict[str, Any] = {
    "NaNs": of_bits("<f4", 0x7FC00000, 0x7F800001, 0xFFC12345, 0x7FFFFFFF, 0x80000000, 0x7F800000, 0xFF800000, 1),
    "double NaNs": of_bits("<f8", 0x7FF8 << 48, (0x7FF0 << 48) + 1, 0xFFFFFFFFFFFFFFFF, 0x8000 << 48, 0x7FF0 << 48),
    "half NaNs": of_bits("<f2", 0x7E00, 0x7C01, 0xFFFF, 0x8000, 0x7C00, 1),
    "complex NaNs": of_bits("<f4", 0x7F800001, 0xFFC00001, 0x80000000, 0x7FC12345).view(np.complex64),
    "nothing": np.zeros(0, np.float32),
    "no rows": np.zeros((0, 5), np.int64),
    "no columns": np.zeros((5, 0), np.uint8),
    "no rows and no columns": np.zeros((0, 3, 0), np.bool_),
    "a scalar": np.array(np.nan),
}


@pytest.mark.parametrize("codec", [None, "lz4"])
async def test_rare_values_come_back_to_the_bit(url: str, codec: str | None) -> None:
    async with aionpredis.connect(url, codec=codec) as client:
        await client.mset(RARE)
        await client.set_record("record", RARE)
        found = await client.mget(list(RARE))
        record = await client.get_record("record")
        assert record is not None
        assert list(record) == list(RARE)
        for (name, array), other in zip(RARE.items(), found, strict=True):
            out = np.full_like(array, 1)
            assert await client.get(name, out=out) is out
            rows = np.full((2, *array.shape), 1, array.dtype)
            assert (await client.mget([name, name], out=rows)).all()
            one = await client.get(name)
            assert one is not None
            for got in (one, other, out, *rows[..., np.newaxis].reshape(2, *array.shape), record[name]):
                assert same(np.asarray(got), array), name
        await client.policy("p").publish(RARE)
        latest = await client.policy("p").latest()
        assert latest is not None
        assert all(same(latest.weights[name], array) for name, array in RARE.items())


async def test_rare_transitions_come_back_to_the_bit(url: str, tmp_path: Path) -> None:
    bits = RARE["NaNs"]
    schema = Schema(x="float32", nothing=("float32", (0, 2)), pair=("float16", (2,)))
    async with aionpredis.connect(url) as client:
        replay = client.replay("r", schema, chunk=3)
        await replay.begin_run()
        async with replay.actor() as actor:
            await actor.join()
            for index, x in enumerate(bits):
                pair = RARE["half NaNs"][[index % 6, (index + 1) % 6]]
                await actor.append(x=x, nothing=np.zeros((0, 2), np.float32), pair=pair)
        await replay.save(tmp_path / "saved")
        for _ in range(2):
            batches = [batch async for batch in await replay.epoch(batch=8, shuffle=False)]
            (batch,) = batches
            assert same(batch["x"], bits)
            assert batch["nothing"].shape == (8, 0, 2)
            sampler = await replay.sampler(batch=64, seed=1)
            sample = await sampler.sample()
            assert same(sample["x"], bits[sample.ids])
            assert same(sample["pair"], batch["pair"][sample.ids])
            await replay.restore(tmp_path / "saved")


# --- chunks that are none --------------------------------------------------------------------------------------------


def chunk_file(schema: Schema, rows: int) -> bytes:
    buffer = ChunkBuffer(schema, rows)
    for array in buffer.columns.values():
        array[:] = 0
    return b"".join(bytes(part) for part in buffer.value(rows))


WRONG_CHUNKS: dict[str, tuple[bytes, type[AionpredisError]]] = {
    "text": (FOREIGN["text"], NotAnArray),
    "nothing": (b"", NotAnArray),
    "a pickle": (FOREIGN["a pickle"], NotAnArray),
    "an array": (FILE, WrongKind),
    "a hole": (BROKEN_RECORDS["a hole"], CorruptValue),
    "deep JSON": (BROKEN_RECORDS["deep JSON"], CorruptValue),
    "half a chunk": (chunk_file(SCHEMA, 4)[:-1], CorruptValue),
    "another schema's chunk": (chunk_file(Schema(x="float32"), 4), SchemaMismatch),
    "a chunk with a column more": (chunk_file(Schema(**dict(SCHEMA), more="int8"), 4), SchemaMismatch),
    "another run's chunk, shorter": (chunk_file(SCHEMA, 3), SchemaMismatch),
    "another run's chunk, longer": (chunk_file(SCHEMA, 5), SchemaMismatch),
    "a bomb": (BROKEN_FRAMES["a bomb"], CorruptValue),
    "a frame of 1 TB": (BROKEN_FRAMES["a frame of 1 TB"], CorruptValue),
    "a frame without a size": (lz4.frame.compress(chunk_file(SCHEMA, 4), store_size=False), CorruptValue),
}


@asynccontextmanager
async def run_of(client: Client, stock: redis.Redis, count: int = 16) -> AsyncIterator[tuple[Any, str]]:
    """A replay with chunks of four transitions, and the key of the second one."""
    replay = replay_of(client)
    await client.set("good", ARRAY)
    await replay.begin_run({"w": ARRAY})
    async with replay.actor() as actor:
        await actor.join()
        await fill(actor, range(count))
    chunks = sorted(key.decode() for key in stock.scan_iter("r:*") if b":policy:" not in key)
    yield replay, next(key for key in chunks if key.endswith(":1"))


def about(error: AionpredisError, key: str) -> bool:
    """Whether the error says which key it is about."""
    return key in str(error)


async def test_chunk_of_another_kind_is_an_error_with_its_key_and_reading_goes_on_when_it_is_mended(
    url: str, stock: redis.Redis
) -> None:
    async with aionpredis.connect(url) as client, run_of(client, stock) as (replay, key):
        right: Any = stock.get(key)
        for name, (value, kind) in WRONG_CHUNKS.items():
            stock.set(key, value)
            for source in (replay.epoch(batch=16, shuffle=False), replay.follow(batch=16)):
                reader = await source
                async with undisturbed(client):
                    for _ in range(2):
                        with pytest.raises(AionpredisError) as raised:
                            await anext(reader)
                        assert type(raised.value) is kind, name
                        assert about(raised.value, key)
                stock.set(key, right)
                assert (await anext(reader))["uid"].tolist() == list(range(16))
                stock.set(key, value)
            stock.set(key, right)


async def test_key_of_another_type_instead_of_a_chunk_is_an_error_until_it_is_mended(
    url: str, stock: redis.Redis
) -> None:
    async with aionpredis.connect(url) as client, run_of(client, stock) as (replay, key):
        right: Any = stock.get(key)
        for make in OTHER_TYPES.values():
            stock.delete(key)
            make(stock, key)
            reader = await replay.epoch(batch=16, shuffle=False)
            sampler = await replay.sampler(batch=64)
            async with undisturbed(client):
                for attempt in (reader.__anext__, reader.__anext__, sampler.sample):
                    with pytest.raises(ServerError, match="WRONGTYPE") as raised:
                        await attempt()
                    assert about(raised.value, key)
            stock.set(key, right)
            with suppress(ServerError):  # it was asked for when the last error was raised
                await anext(reader)
            assert (await anext(reader))["uid"].tolist() == list(range(16))
            assert set((await sampler.sample())["uid"].tolist()) <= set(range(16))


async def test_sampler_names_the_chunk_that_is_none_and_goes_on_when_it_is_mended(url: str, stock: redis.Redis) -> None:
    async with aionpredis.connect(url) as client, run_of(client, stock) as (replay, key):
        right: Any = stock.get(key)
        for name, (value, kind) in WRONG_CHUNKS.items():
            stock.set(key, value)
            sampler = await replay.sampler(batch=64, seed=0)
            async with undisturbed(client):
                for _ in range(2):
                    with pytest.raises(AionpredisError) as raised:
                        await sampler.sample()
                    assert type(raised.value) is kind, name
                    assert about(raised.value, key)
            stock.set(key, right)
            sample = await sampler.sample()
            assert (sample["state"] == (sample["uid"] % 256)[:, None]).all()


async def test_saving_names_the_chunk_that_is_none_and_leaves_nothing(
    url: str, stock: redis.Redis, tmp_path: Path
) -> None:
    async with aionpredis.connect(url) as client, run_of(client, stock) as (replay, key):
        right: Any = stock.get(key)
        for value, kind in WRONG_CHUNKS.values():
            stock.set(key, value)
            with pytest.raises(kind) as raised:
                await replay.save(tmp_path / "saved")
            assert about(raised.value, key)
            assert not os.listdir(tmp_path)  # noqa: PTH208  (pathlib is no friend of async functions)
        stock.delete(key)
        stock.rpush(key, "x")
        with pytest.raises(ServerError, match="WRONGTYPE") as caught:
            await replay.save(tmp_path / "saved")
        assert about(caught.value, key)
        stock.delete(key)
        stock.set(key, right)
        assert await replay.save(tmp_path / "saved") == 16


async def test_another_runs_chunk_of_the_same_columns_is_read_as_it_is(url: str, stock: redis.Redis) -> None:
    async with aionpredis.connect(url) as client, run_of(client, stock) as (replay, key):
        stock.set(key, lz4.frame.compress(chunk_file(SCHEMA, 4)))  # compressed by somebody, why not
        assert sorted(await uids(await replay.epoch())) == [0] * 5 + [*range(1, 4), *range(8, 16)]


# --- entries of the log that are none --------------------------------------------------------------------------------

WRONG_ENTRIES: dict[str, dict[str, bytes]] = {
    "a foreign field": {"hello": b"x"},
    "no commit": {"c": b"short"},
    "no rows": {"c": struct.pack("<8sII", b"incarnat", 0, 0)},
    "4 billion rows": {"c": struct.pack("<8sII", b"incarnat", 0, 2**32 - 1)},
    "more rows than a chunk can have": {"c": struct.pack("<8sII", b"incarnat", 0, SCHEMA.max_chunk + 1)},
}


async def test_entry_of_the_log_that_is_no_commit_is_an_error_with_its_key(
    url: str, stock: redis.Redis, tmp_path: Path
) -> None:
    async with aionpredis.connect(url) as client, run_of(client, stock) as (replay, _):
        run = (await replay.latest_run()).run
        for name, fields in WRONG_ENTRIES.items():
            following = await replay.follow(batch=16)
            assert len((await anext(following))["uid"]) == 16
            entry: Any = stock.xadd("{r}:log", fields, id=f"{run}-*")  # type: ignore[arg-type]
            sampler = await replay.sampler()
            calls = [
                (await replay.epoch()).__anext__,
                following.__anext__,
                sampler.sample,
                replay.count,
                partial(replay.save, tmp_path / "saved"),
            ]
            async with undisturbed(client):
                for attempt in calls * 2:
                    with pytest.raises(CorruptValue) as raised:
                        with at_most(20_000_000):
                            await attempt()
                    assert raised.value.key == "{r}:log", name
            stock.xdel("{r}:log", entry)
            assert sorted(await uids(await replay.epoch())) == list(range(16))
        stock.xadd("{r}:log", WRONG_ENTRIES["no commit"], id=f"{run}-*")  # type: ignore[arg-type]
        await replay.begin_run()  # deletes the run with all that is in it
        assert not [key for key in stock.scan_iter("r:*") if b":policy:" not in key]


async def test_entry_that_is_no_commit_does_not_hold_up_a_group(url: str, stock: redis.Redis) -> None:
    async with aionpredis.connect(url) as client:
        replay = replay_of(client)
        run = (await replay.begin_run()).run
        async with replay.actor() as actor:
            await actor.join()
            for number, fields in enumerate(WRONG_ENTRIES.values()):
                stock.xadd("{r}:log", fields, id=f"{run}-*")  # type: ignore[arg-type]
                await fill(actor, range(4 * number, 4 * number + 4))
                await actor.flush()
        reader = await replay.consume(group="g", batch=20)
        with pytest.raises(CorruptValue) as raised:
            await anext(reader)
        assert raised.value.key == "{r}:log"
        assert (await anext(reader))["uid"].tolist() == list(range(20))


async def test_log_of_another_type_is_an_error_with_its_key(url: str, stock: redis.Redis) -> None:
    async with aionpredis.connect(url) as client, run_of(client, stock) as (replay, _):
        reader, follower = await replay.epoch(), await replay.follow(batch=16)
        await anext(follower)
        stock.rename("{r}:log", "{r}:hidden")
        stock.set("{r}:log", "text")
        async with undisturbed(client):
            for attempt in (
                reader.__anext__,
                follower.__anext__,
                replay.count,
                replay.latest_run,
                replay.epoch,
                replay.sampler,
                replay.begin_run,
            ):
                with pytest.raises(ServerError, match="WRONGTYPE") as raised:
                    await attempt()
                assert raised.value.key == "{r}:log", attempt
        stock.rename("{r}:hidden", "{r}:log")
        assert sorted(await uids(reader)) == list(range(16))


async def test_begin_of_a_run_that_is_none_is_an_error_with_its_key(url: str, stock: redis.Redis) -> None:
    stock.xadd("{r}:log", {"begin": b"x", "policy": b"many", "schema": b"\xff"}, id="5-0")
    async with aionpredis.connect(url) as client:
        with pytest.raises(CorruptValue, match="5-0") as raised:
            await replay_of(client).latest_run()
        assert raised.value.key == "{r}:log"
        async with replay_of(client).actor() as actor:
            with pytest.raises(CorruptValue, match="5-0"):
                await actor.join()


@pytest.mark.parametrize("field", [b"", b"x", b"1:2:3", b"1", b":", b"1:x", b"9" * 10_000 + b":1", b"-1:5"])
async def test_progress_that_is_none_is_an_error_with_its_key(url: str, stock: redis.Redis, field: bytes) -> None:
    async with aionpredis.connect(url) as client:
        replay = client.replay("r", SCHEMA, chunk=2, max_lag=4)
        await replay.begin_run()
        stock.hset("{r}:read", "0", field)
        async with replay.actor() as actor:
            await actor.join()
            with pytest.raises(CorruptValue) as raised:
                await fill(actor, range(100))
            assert raised.value.key == "{r}:read"
            stock.delete("{r}:read")


async def test_progress_of_another_type_is_an_error_with_its_key(url: str, stock: redis.Redis) -> None:
    async with aionpredis.connect(url) as client:
        replay = client.replay("r", SCHEMA, chunk=2, max_lag=4)
        await replay.begin_run()
        stock.set("{r}:read", "text")
        async with replay.actor() as actor:
            await actor.join()
            with pytest.raises(ServerError, match="WRONGTYPE") as raised:
                await fill(actor, range(100))
            assert (raised.value.command, raised.value.key) == ("HVALS", "{r}:read")
            reader = await replay.follow(batch=2)
            with pytest.raises(ServerError, match="WRONGTYPE") as raised:
                async for _ in reader:
                    pass
            assert (raised.value.command, raised.value.key) == ("HSET", "{r}:read")
            stock.delete("{r}:read")


# --- policies that are none ------------------------------------------------------------------------------------------

WRONG_ANNOUNCEMENTS: dict[str, dict[str, bytes]] = {
    "no token": {"hello": b"x"},
    "a token that is no text": {"token": b"\xff"},
    "no number of parts": {"token": b"t", "parts": b"many"},
    "no parts": {"token": b"t", "parts": b"0"},
    "a trillion parts": {"token": b"t", "parts": b"1000000000000"},
    "no JSON": {"token": b"t", "parts": b"2", "shapes": b"{"},
    "deep JSON": {"token": b"t", "parts": b"2", "shapes": b"[" * 100_000},
    "a list of shapes": {"token": b"t", "parts": b"2", "shapes": b"[]"},
    "a shape that is a number": {"token": b"t", "parts": b"2", "shapes": b'{"w":3}'},
    "a negative shape": {"token": b"t", "parts": b"2", "shapes": b'{"w":[-3]}'},
    "a shape beyond 64 bits": {"token": b"t", "parts": b"2", "shapes": b'{"w":[4294967296,4294967296]}'},
}


async def test_announcement_that_is_none_is_an_error_with_its_key_until_the_next_version(
    url: str, stock: redis.Redis
) -> None:
    async with aionpredis.connect(url) as client:
        await client.set("good", ARRAY)
        policy = client.policy("p", keep=2)
        for name, fields in WRONG_ANNOUNCEMENTS.items():
            version = await policy.publish({"w": ARRAY})
            watch = policy.watch(after=version)
            stock.xadd("{p}:policy", fields, id=f"{version + 1}-0")  # type: ignore[arg-type]
            async with undisturbed(client):
                for attempt in (policy.latest, partial(policy.get, version + 1), watch.__anext__):
                    with pytest.raises(CorruptValue) as raised:
                        with at_most(20_000_000):
                            await attempt()
                    assert raised.value.key == "{p}:policy", name
                    assert len(str(raised.value)) < 500
            assert await policy.publish({"w": ARRAY + 1}) == version + 2
            latest = await anext(watch)
            assert latest.version == version + 2
            assert equal(latest.weights["w"], ARRAY + 1)
        await policy.delete()
        assert stock.keys("p:*") == []


async def test_shape_that_the_parts_cannot_fill_allocates_nothing(url: str, stock: redis.Redis) -> None:
    fields = {"token": b"t", "parts": b"2", "shapes": b'{"w":[100000000000]}'}
    stock.xadd("{p}:policy", fields, id="1-0")  # type: ignore[arg-type]
    for part in range(2):
        stock.set(f"p:policy:1:t:{part}", record_file({"w": ARRAY}))
    async with aionpredis.connect(url) as client:
        with at_most(20_000_000), pytest.raises(CorruptValue, match="'w'") as raised:
            await client.policy("p").latest()
        assert raised.value.key == "p:policy:1:t:0"
        stock.delete("p:policy:1:t:0")
        stock.rpush("p:policy:1:t:0", "x")
        with pytest.raises(ServerError, match="WRONGTYPE") as refused:
            await client.policy("p").latest()
        assert refused.value.key == "p:policy:1:t:0"


async def test_weights_of_another_kind_are_an_error_with_their_key(url: str, stock: redis.Redis) -> None:
    async with aionpredis.connect(url) as client:
        await client.set("good", ARRAY)
        policy = client.policy("p")
        await policy.publish({"w": ARRAY})
        (key,) = (name.decode() for name in stock.scan_iter("p:policy:*"))
        for name, value in VALUES.items():
            stock.set(key, value)
            async with undisturbed(client):
                with pytest.raises(DecodeError) as raised:
                    await policy.latest()
            assert (type(raised.value), raised.value.key) == (expected(name, record=True), key), name
        for make in OTHER_TYPES.values():
            stock.delete(key)
            make(stock, key)
            with pytest.raises(ServerError, match="WRONGTYPE") as refused:
                await policy.latest()
            assert refused.value.key == key
        stock.set("{q}:policy", "text")
        for attempt in (client.policy("q").latest, partial(client.policy("q").publish, {"w": ARRAY})):
            with pytest.raises(ServerError, match="WRONGTYPE") as refused:
                await attempt()
            assert refused.value.key == "{q}:policy"
