"""Arrays and records by key: what is stored is a standard file, what is read is the caller's, what is wrong is said."""

from __future__ import annotations

import io
import math
import threading
import time
import warnings
from fractions import Fraction
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import lz4.frame
import ml_dtypes
import numpy as np
import pytest
import redis
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import aionpredis
from aionpredis import Client, Server, requests
from aionpredis.commands import has_not_run
from aionpredis.errors import (
    AionpredisError,
    AuthenticationError,
    ConnectError,
    ConnectionLost,
    CorruptValue,
    DecodeError,
    EncodeError,
    NotAnArray,
    OutcomeUnknown,
    OutMismatch,
    ServerError,
    ServerUnavailable,
    UsageError,
    WrongKind,
)
from aionpredis.formats import npy
from aionpredis.formats import safetensors as record_format
from aionpredis.pipeline import Pipeline
from aionpredis.requests import MAX_SLICE_KEYS, ValueReply
from aionpredis.wire.resp import Reply, encode

from . import strategies
from .proxy import Proxy
from .replays import kill_connections
from .servers import make_server
from .strategies import equal

pytestmark = pytest.mark.anyio

STATE = np.arange(6400, dtype=np.uint16).reshape(80, 80)


def npy_file(array: Any) -> bytes:
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that field names need a newer version of the format
        np.save(file, array, allow_pickle=False)
    return file.getvalue()


def owned(array: np.ndarray[Any, Any]) -> bool:
    return array.flags.writeable and array.ctypes.data % 64 == 0


# --- storing and loading ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "array",
    [
        STATE,
        STATE[::2, ::-3],
        np.asfortranarray(STATE),
        STATE.T[1:],
        np.float32(3.5),
        np.array(7),
        np.empty((0, 3)),
        np.empty((2, 0), "U3"),
        np.array(["a", "größe"]),
        np.arange(9, dtype=">i4"),
        np.arange(6).astype(ml_dtypes.bfloat16),
        np.array([(1, 2.5)], [("a", "i4"), ("b", "f8")]),
        np.broadcast_to(np.arange(3), (4, 3)),
        np.array([True, False]),
        np.array(["2024-01-01"], "M8[D]"),
    ],
    ids=lambda array: f"{array.dtype.name}{array.shape}",
)
async def test_array_comes_back_as_it_was(url: str, array: Any) -> None:
    async with aionpredis.connect(url) as client:
        await client.set("k", array)
        for got in (await client.get("k"), (await client.mget(["k"]))[0]):
            assert got is not None
            assert strategies.same(got, np.asarray(array))
            assert owned(got) or not got.size
        out = np.empty(array.shape, array.dtype)
        assert await client.get("k", out=out) is out
        assert strategies.same(out, np.asarray(array))


async def test_keys_are_text_or_bytes_of_any_kind(url: str, stock: redis.Redis) -> None:
    async with aionpredis.connect(url) as client:
        for key in ("", "a b\r\nc", "größe", b"\x00\xff", "x" * 5000):
            await client.set(key, STATE)
            assert stock.exists(key)
            assert equal(await client.get(key), STATE)


async def test_missing_key_is_none_and_deleted_keys_are_counted(url: str) -> None:
    async with aionpredis.connect(url) as client:
        assert await client.get("none") is None
        assert await client.get_record("none") is None
        assert await client.get("none", out=np.ones(3)) is None
        assert await client.mget([]) == []
        assert (await client.mget([], out=np.empty((0, 3)))).shape == (0,)
        await client.mset({"a": STATE, "b": STATE})
        assert await client.exists("a", "b", "none", "a") == 3
        assert await client.delete("a", "none") == 1
        assert await client.delete() == 0
        assert await client.exists("a", "b") == 1


async def test_arrays_without_items_are_loaded_among_others_again_and_again(url: str) -> None:
    """What was loaded last is what the next values are predicted to be."""
    many: dict[str, NDArray[Any]] = {f"e{i}": np.empty((0, 4)) for i in range(300)}
    arrays = many | {"a": np.ones(3), "b": np.ones(3), "empty": np.empty((0, 4), np.float32)}
    async with aionpredis.connect(url) as client:
        await client.mset(arrays)
        for _ in range(2):
            for keys in (["a", "b", "empty"], ["a", "b"], ["empty", "a"], [*many], ["a", "none", "b"]):
                expected = [arrays.get(key) for key in keys]
                for found, array in zip(await client.mget(keys), expected, strict=True):
                    assert found is array is None or (found is not None and array is not None and equal(found, array))


async def test_ttl_is_what_the_server_counts_down(url: str, stock: redis.Redis) -> None:
    async with aionpredis.connect(url) as client:
        before = time.time()
        await client.set("small", np.arange(3), ttl=100)
        await client.set("large", STATE, ttl=np.float32(50.5))  # type: ignore[arg-type]
        await client.set_record("record", {"x": STATE, "y": STATE}, ttl=77.25)
        await client.mset({"m": STATE}, ttl=90)
        await client.set("longest", STATE, ttl=1e12)
        await client.set("short type", STATE, ttl=np.int16(3600))  # type: ignore[arg-type]
        passed = time.time() - before
        for key, ttl in (("small", 100), ("large", 50.5), ("record", 77.25), ("m", 90), ("short type", 3600)):
            expires: Any = stock.pexpiretime(key)  # a server's clock lags by some ms
            assert -0.1 <= expires / 1000 - before - ttl <= passed + 0.1, key
        await client.set("small", np.arange(3))
        assert stock.pttl("small") == -1


async def test_rows_land_in_out_and_missing_ones_are_zero(url: str) -> None:
    async with aionpredis.connect(url) as client:
        count = 3 * MAX_SLICE_KEYS + 5
        for row in (STATE, np.uint8(5), np.zeros((2, 3), ">f4") + 1):
            array = np.asarray(row)
            keys = [f"k{i}" for i in range(count)]
            there = np.arange(count) % 11 != 4
            await client.delete(*keys)
            await client.mset({key: array for key, yes in zip(keys, there, strict=True) if yes})
            out = np.full((count, *array.shape), 9, array.dtype)
            found = await client.mget(keys, out=out)
            assert (found == there).all()
            assert (out[there] == array).all()
            assert (out[~there] == 0).all()
            loaded = await client.mget(keys)
            assert [got is not None for got in loaded] == there.tolist()
            assert all((got == array).all() for got in loaded if got is not None)


async def test_out_may_have_gaps_between_its_rows_but_not_in_them(url: str) -> None:
    async with aionpredis.connect(url) as client:
        await client.mset({"a": STATE, "b": STATE + np.uint16(1)})
        whole = np.zeros((4, 80, 80), np.uint16)
        assert (await client.mget(["a", "b"], out=whole[::2])).all()
        assert (whole[0] == STATE).all()
        assert (whole[2] == STATE + 1).all()
        assert not whole[1::2].any()
        await client.mset({"x": np.float64(1.5), "y": np.float64(2.5)})
        scalars = np.zeros(4)
        await client.mget(["x", "y"], out=scalars[::-2])
        assert scalars.tolist() == [0, 2.5, 0, 1.5]
        empty = np.empty((2, 0, 3))
        await client.mset({"e": empty[0], "f": empty[1]})
        assert (await client.mget(["e", "f"], out=empty)).all()
        assert await client.get("e", out=empty[0]) is not None
        for bad in (whole[:2, ::2, ::2], np.asfortranarray(whole[:2])):
            with pytest.raises(UsageError, match="contiguous"):
                await client.mget(["a", "b"], out=bad)
        with pytest.raises(UsageError, match="contiguous"):
            await client.get("x", out=np.zeros((4, 4))[::2, ::2])


async def test_out_of_another_class_is_filled_or_refused_and_disturbs_nobody(url: str) -> None:
    square = np.arange(4.0).reshape(2, 2)
    async with aionpredis.connect(url) as client:
        await client.set("square", square)
        connection = await client.connection(b"square")
        matrix = square.view(np.matrix) * 0
        assert await client.get("square", out=matrix) is matrix
        assert (np.asarray(matrix) == square).all()
        await client.set("row", square[1])
        await client.set("other", square[0])
        assert (await client.mget(["row", "other"], out=matrix)).all()
        assert (np.asarray(matrix) == square[::-1]).all()
        for masked in (np.ma.zeros((2, 2)), np.ma.masked_array(square, [[True, False], [False, False]])):
            with pytest.raises(UsageError, match="masked"):
                await client.get("square", out=masked)
            with pytest.raises(UsageError, match="masked"):
                await client.mget(["row", "other"], out=masked)
        assert connection.lost is None


async def test_out_takes_what_was_not_stored_as_predicted(url: str, stock: redis.Redis) -> None:
    async with aionpredis.connect(url) as client:
        rows = np.stack([STATE % np.uint16(i + 2) for i in range(40)])
        for i, row in enumerate(rows):
            if i % 3 == 0:
                await client.set(f"k{i}", np.asfortranarray(row))
            elif i % 3 == 1:
                await client.set(f"k{i}", row, codec="lz4")
            else:
                await client.set(f"k{i}", row)
        assert stock.get("k1")[:4] == b"\x04\x22\x4d\x18"  # type: ignore[index]
        out = np.zeros_like(rows)
        assert (await client.mget([f"k{i}" for i in range(40)], out=out)).all()
        assert (out == rows).all()
        assert equal(await client.get("k1", out=out[0]), rows[1])


@pytest.mark.parametrize("codec", [None, "lz4"])
async def test_large_values_travel_whole(url: str, codec: str | None) -> None:
    array = np.random.default_rng(1).integers(0, 9, 20 << 20, np.uint8)
    async with aionpredis.connect(url, codec=codec) as client:
        await client.set("big", array)
        assert equal(await client.get("big"), array)
        assert equal(await client.get("big", out=np.empty_like(array)), array)
        record = {"weights": array.reshape(-1, 1024), "bias": np.ones(2, np.float32)}
        await client.set_record("record", record)
        got = await client.get_record("record")
        assert got is not None
        assert list(got) == ["weights", "bias"]
        assert (got["weights"] == record["weights"]).all()
        assert all(column.flags.writeable for column in got.values())


async def test_loop_stays_responsive_while_much_data_travels(url: str) -> None:
    array = np.ones(100 << 20, np.uint8)
    longest = 0.0  # of the time that this thread has worked: a busy machine may let it wait in between
    turns = 0
    async with aionpredis.connect(url) as client:

        async def watch() -> None:
            nonlocal longest, turns
            while True:
                before = time.thread_time()
                await anyio.sleep(0.001)
                longest = max(longest, time.thread_time() - before)
                turns += 1

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(watch)
            await anyio.sleep(0.01)
            await client.set("big", array)
            await client.get("big", out=array)
            tasks.cancel_scope.cancel()
        await client.delete("big")
    assert longest < 0.2
    assert turns > 5


WIDE = np.arange(1 << 17, dtype=np.uint32).reshape(256, 512)


@pytest.mark.one_server("it is about this process")
@pytest.mark.parametrize(
    ("value", "in_thread"),
    [
        (WIDE[:, ::2], True),
        (np.broadcast_to(WIDE[0], (256, 512)), True),
        (WIDE, False),
        (WIDE.T, False),
        (WIDE.astype(">u4"), False),
        (WIDE[:, :8], False),
        ({"a": WIDE[:, ::2]}, True),
        ({"a": WIDE.T}, True),
        ({"a": WIDE.astype(">u4")}, True),
        ({"a": WIDE, "b": WIDE[:, :8]}, False),
    ],
    ids=[
        *("array_strided", "array_broadcast", "array", "array_fortran", "array_big_endian", "array_small"),
        *("record_strided", "record_fortran", "record_big_endian", "record"),
    ],
)
async def test_large_values_are_gathered_in_a_thread_and_small_or_contiguous_ones_are_not(
    url: str, monkeypatch: pytest.MonkeyPatch, value: Any, in_thread: bool
) -> None:
    threads: list[bool] = []
    loop = threading.get_ident()
    for module in (npy, record_format):

        def encode(value: Any, encode: Any = module.encode) -> Any:
            threads.append(threading.get_ident() != loop)
            return encode(value)

        monkeypatch.setattr(module, "encode", encode)
    record = isinstance(value, dict)
    async with aionpredis.connect(url) as client, client.writer() as writer:
        if record:
            await client.set_record("set", value)
            await writer.put_record("put", value)
        else:
            await client.set("set", value)
            await writer.put("put", value)
        await writer.flush()
        assert threads == [in_thread] * 2
        for key in ("set", "put"):
            if record:
                got = await client.get_record(key)
                assert got is not None
                assert all((got[name] == column).all() for name, column in value.items())
            else:
                assert equal(await client.get(key), value)


# --- other libraries -------------------------------------------------------------------------------------------------

EVERY_TIME = settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


@EVERY_TIME
@given(
    arrays=st.lists(strategies.arrays(strategies.PLAIN), min_size=4, max_size=4), codec=st.sampled_from([None, "lz4"])
)
def test_numpy_reads_what_is_stored_and_the_reverse(
    server: Server, stock: redis.Redis, anyio_backend: Any, arrays: list[Any], codec: str | None
) -> None:
    async def main() -> None:
        async with aionpredis.connect(server.url, codec=codec) as client:
            await client.mset({str(i): array for i, array in enumerate(arrays[:2])})
            for i, array in enumerate(arrays[:2]):
                await client.set(f"set{i}", array)
                for key in (str(i), f"set{i}"):
                    file: Any = stock.get(key)
                    if file.startswith(b"\x04\x22\x4d\x18"):
                        assert codec == "lz4"
                        file = lz4.frame.decompress(file)
                    assert strategies.same(np.load(io.BytesIO(file)), array)
            for array in arrays[2:]:
                file = npy_file(array)
                stock.set("theirs", file if codec is None else lz4.frame.compress(file))
                got = await client.get("theirs")
                assert got is not None
                assert strategies.same(got, np.load(io.BytesIO(file)))
                out = np.zeros(array.shape, got.dtype)
                assert await client.get("theirs", out=out) is out
                assert strategies.same(out, got)

    anyio.run(main, backend=anyio_backend[0], backend_options=anyio_backend[1])


@EVERY_TIME
@given(columns=st.lists(strategies.arrays(strategies.RECORD), min_size=1, max_size=5))
def test_safetensors_reads_what_is_stored_and_the_reverse(
    server: Server, stock: redis.Redis, anyio_backend: Any, columns: list[Any]
) -> None:
    async def main() -> None:
        record = {f"column {i}": array for i, array in enumerate(columns)}
        async with aionpredis.connect(server.url) as client:
            await client.set_record("ours", record)
            loaded = safetensors.numpy.load(bytes(stock.get("ours")))  # type: ignore[arg-type]
            assert loaded.keys() == record.keys()
            assert all(strategies.same(loaded[name], array) for name, array in record.items())
            theirs = {name: np.ascontiguousarray(array) for name, array in record.items()}
            stock.set("theirs", safetensors.numpy.save(theirs))
            got = await client.get_record("theirs")
            assert got is not None
            assert got.keys() == theirs.keys()
            assert all(strategies.same(got[name], array) for name, array in theirs.items())

    anyio.run(main, backend=anyio_backend[0], backend_options=anyio_backend[1])


# --- execute ---------------------------------------------------------------------------------------------------------


async def test_execute_returns_what_the_server_says(url: str) -> None:
    async with aionpredis.connect(url) as client:
        assert await client.execute("INCRBY", "n", 64) == 64
        assert await client.execute(b"get", b"n") == b"64"
        assert await client.execute("GET", "none") is None
        assert await client.execute("RPUSH", "l", "a", b"b", 1.5, STATE.data) == 4
        assert await client.execute("LRANGE", "l", 0, -1) == [b"a", b"b", b"1.5", STATE.tobytes()]
        assert await client.execute("EVAL", "return {1,{2,{}},false}", 0) == [1, [2, []], None]
        with pytest.raises(ServerError, match=r"^WRONGTYPE.*\[GET, key 'l'\]$") as raised:
            await client.execute("GET", "l")
        assert raised.value.code == "WRONGTYPE"
        assert await client.execute("XREAD", "COUNT", 1, "STREAMS", "block", "0") is None
        values = await client.call_many([("INCR", "n"), ("INCR", "l"), ("GET", "n")])
        assert values[0] == 65
        assert isinstance(values[1], ServerError)
        assert values[2] == b"65"


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        ("SELECT 1", "name the database in the URL"),
        ("auth x", "in the URL"),
        ("HELLO 3", "RESP2"),
        ("MULTI", "transaction"),
        ("WATCH k", "transactions"),
        ("SUBSCRIBE c", "taken for those of other tasks"),
        ("MONITOR", "taken for"),
        ("CLIENT REPLY OFF", "taken for"),
        ("client tracking on", "taken for"),
        ("REPLCONF ACK 0", "not always answered"),
        ("BLPOP k 0", "would block"),
        ("XREAD BLOCK 0 STREAMS s $", "would block"),
        ("XREAD COUNT 1 block 0 STREAMS s $", "would block"),
        ("XREADGROUP GROUP streams c BLOCK 0 STREAMS s >", "would block"),
        ("XREADGROUP BLOCK 0 GROUP g c STREAMS s >", "would block"),
        ("XREADGROUP COUNT 1 BLOCK 0 GROUP g c STREAMS s >", "would block"),
        ("xreadgroup noack block 0 group g c streams s >", "would block"),
        ("WAIT 1 0", "would block"),
        ("QUIT", "async with"),
        ("", "not a command's name"),
    ],
)
async def test_command_that_would_harm_other_tasks_is_refused_with_the_reason(
    url: str, command: str, reason: str
) -> None:
    words = command.split() or [""]
    async with aionpredis.connect(url) as client:
        for arguments in (
            words,
            [word.encode() for word in words],
            [words[0], *(bytearray(w.encode()) for w in words[1:])],
        ):
            with pytest.raises(UsageError, match=reason):
                await client.execute(*arguments)
        assert await client.execute("PING") == b"PONG"


async def test_scan_finds_the_keys_of_all_servers(url: str, stock: redis.Redis) -> None:
    expected = {f"frame:{number}".encode() for number in range(2500)}
    for key in (*expected, b"other:1"):
        stock.set(key, b"")
    async with aionpredis.connect(url) as client:
        assert {key async for key in client.scan("frame:*")} == expected
        assert {key async for key in client.scan(b"frame:1?")} == {b"frame:%d" % number for number in range(10, 20)}
        assert {key async for key in client.scan()} == {*expected, b"other:1"}
        with pytest.raises(UsageError):
            await anext(client.scan(7))  # type: ignore[arg-type]


async def test_scan_begins_again_after_a_fault(url: str, stock: redis.Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that has taken the place of another makes nothing of that one's cursor: it would skip keys."""
    monkeypatch.setattr("aionpredis.client.SCAN_KEYS", 10)
    expected = {f"{{s}}:{number}".encode() for number in range(200)}
    for key in expected:
        stock.set(key, b"")
    async with aionpredis.connect(url) as client:
        pages = [page async for page in client.scan_pages("{s}:*")]
        assert sum(map(len, pages)) < 220  # hardly any twice
        before: list[bytes] = []
        after: list[bytes] = []
        async for key in client.scan("{s}:*"):
            (after if len(before) > 100 else before).append(key)
            if len(before) == 101 and not after:
                kill_connections(stock)
        assert set(after) == expected


async def test_execute_wants_arguments_one_by_one(url: str) -> None:
    async with aionpredis.connect(url) as client:
        for arguments in ((), ("GET k",), (1,), (None,)):
            with pytest.raises(UsageError, match="one by one"):
                await client.execute(*arguments)
        for bad in (None, True, STATE, [1]):
            with pytest.raises(UsageError, match="argument"):
                await client.execute("SET", "k", bad)  # type: ignore[arg-type]
        await client.execute("XGROUP", "CREATE", "s", "g", "0", "MKSTREAM")
        assert await client.execute("XREADGROUP", "GROUP", "g", "block", "STREAMS", "s", ">") is None
        assert await client.execute("XREADGROUP", "COUNT", 1, "GROUP", "g", "block", "STREAMS", "s", ">") is None


def test_script_that_the_server_did_not_run_is_tried_again() -> None:
    for text in (
        "LOADING Valkey is loading the dataset in memory",
        "BUSY Redis is busy running a script. You can only call SCRIPT KILL or SHUTDOWN NOSAVE.",
        "READONLY You can't write against a read only replica. script: 5fd2, on @user_script:1.",
        "CLUSTERDOWN Hash slot not served",
    ):
        assert has_not_run(("evalsha", "5fd2", 0), ServerUnavailable(text))
    assert has_not_run(("INCR", "k"), ServerUnavailable("BUSY as a module says"))


async def test_script_whose_own_result_is_an_error_is_not_run_again(url: str) -> None:
    returns = "redis.call('INCR', KEYS[1]) return redis.error_reply(ARGV[1])"
    nested = "redis.call('INCR', KEYS[1]) return {1, redis.error_reply(ARGV[1])}"
    async with aionpredis.connect(url) as client:
        for text in ("BUSY the lock is held", "TRYAGAIN later", "READONLY as it is"):
            with pytest.raises(ServerError, match=text):
                await client.execute("EVAL", returns, 1, "runs", text)
        one, error = await client.execute("EVAL", nested, 1, "runs", "BUSY nested")
        assert (one, error.code) == (1, "BUSY")
        with pytest.raises(ServerError, match="LOCKED"):
            await client.execute("EVAL", returns, 1, "runs", "LOCKED")
        assert await client.execute("GET", "runs") == b"5"


# --- what is wrong is said -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "options", "about"),
    [
        ("http://host", {}, "redis://host:6379"),
        ("host:6379", {}, "redis://"),
        ("redis://u:secret@host:port/0", {}, "redis://"),
        ("redis://:secret@h/zero?db=secret", {}, "redis://"),
        ("unix:///x", {"tiemout": 3}, "tiemout"),
        ("unix:///x", {"password": "secret", "tiemout": 3}, "tiemout"),
        ("unix:///x", {"timeout": 0}, "timeout"),
        ("unix:///x", {"timeout": float("inf")}, "timeout"),
        ("unix:///x", {"connect_timeout": "5"}, "connect_timeout"),
        ("unix:///x", {"max_value_bytes": 0}, "max_value_bytes"),
        ("unix:///x", {"codec": "zip"}, "zip"),
        (5, {}, "by int"),
    ],
)
def test_wrong_url_or_option_shows_before_anything_is_connected(url: Any, options: dict[str, Any], about: str) -> None:
    with pytest.raises(UsageError, match=about) as raised:
        aionpredis.connect(url, **options)
    assert "secret" not in str(raised.value)
    assert "secret" not in repr(raised.value)


async def test_server_that_is_not_there_is_named(tmp_path: Path) -> None:
    start = time.monotonic()
    with pytest.raises(ConnectError, match=r"nobody\.sock"):
        async with aionpredis.connect(f"unix://user:secret@{tmp_path}/nobody.sock"):
            pass
    with pytest.raises(ConnectError, match=r"127\.0\.0\.1:1") as raised:
        async with aionpredis.connect("redis://user:secret@127.0.0.1:1/0"):
            pass
    assert "secret" not in str(raised.value)
    assert time.monotonic() - start < 15  # not the retry_timeout of 30 s


@pytest.mark.parametrize("kind", ["valkey", "redis"])
async def test_password_and_user_are_checked_and_never_shown(kind: str) -> None:
    with make_server(kind, config={"requirepass": "secret"}) as server:
        path = server.url.removeprefix("unix://").partition("@")[2] or server.url.removeprefix("unix://")
        for url in (f"unix://{path}", f"unix://:wrongsecret@{path}", f"unix://nobody:wrongsecret@{path}"):
            client = aionpredis.connect(url)
            with pytest.raises(AuthenticationError) as raised:
                await client.__aenter__()
            assert "secret" not in str(raised.value) + repr(raised.value) + repr(client)
        async with aionpredis.connect(f"unix://:secret@{path}") as client:
            await client.set("k", STATE)
            assert "secret" not in repr(client) + client.url
            await client.execute("ACL", "SETUSER", "reader", "on", ">their secret", "~k", "+get")
        async with aionpredis.connect(f"unix://{path}", username="reader", password="their secret") as client:
            assert equal(await client.get("k"), STATE)
            for attempt in (client.get("other"), client.set("k", STATE), client.mget(["k"])):
                with pytest.raises(ServerError, match="NOPERM") as refused:
                    await attempt
                assert refused.value.code == "NOPERM"
            with pytest.raises(ServerError, match="'other'"):
                await client.get("other")
            for command, rule in {
                ("ACL", "WHOAMI"): r"\+acl\|whoami",
                ("CONFIG", "GET", "maxmemory"): r"\+config\|get",
            }.items():
                with pytest.raises(
                    ServerError, match=rf"the user's ACL needs {rule} "
                ):  # and not those of SETUSER and SET
                    await client.execute(*command)


async def test_url_may_ask_for_another_protocol_in_vain(url: str) -> None:
    for client in (aionpredis.connect(f"{url}?protocol=3"), aionpredis.connect(url, protocol=3)):
        async with client:
            await client.execute("HSET", "h", "a", "1")
            assert await client.execute("HGETALL", "h") == [b"a", b"1"]


@pytest.mark.parametrize("codec", [None, "lz4"])
@pytest.mark.parametrize(
    ("value", "about"),
    [
        ([1, 2], "list"),
        ("text", "str"),
        (None, "NoneType"),
        (3.5, "float"),
        (np.array([None, 1]), "object"),
        (np.array([(None,)], [("a", "O")]), "references"),
        (np.ma.masked_array([1, 2], [True, False]), "masked"),
        (np.broadcast_to(np.uint8(1), (1 << 46,)), "store it in parts"),
        (np.broadcast_to(np.float64(1), (8193, 8192)), "store it in parts"),
    ],
    ids=lambda value: type(value).__name__,
)
async def test_value_that_cannot_be_stored_is_refused_before_anything_is_sent(
    url: str, value: Any, about: str, codec: str | None
) -> None:
    async with aionpredis.connect(url, codec=codec) as client:
        for attempt in (client.set("bad key", value), client.mset({"bad key": value})):
            with pytest.raises(EncodeError, match=about) as raised:
                await attempt
            assert raised.value.key == "bad key"
            assert "'bad key'" in str(raised.value)
        with pytest.raises(EncodeError) as raised:
            await client.set_record("bad key", {"column": value})
        assert raised.value.key == "bad key"
        assert await client.exists("bad key") == 0
        await client.set("k", STATE)


@pytest.mark.parametrize("ttl", [0, -1, float("nan"), float("inf"), 1e300, True, "5", 1j])
async def test_time_to_live_that_makes_no_sense_is_refused(url: str, ttl: Any) -> None:
    async with aionpredis.connect(url) as client:
        with pytest.raises(UsageError, match="ttl"):
            await client.set("k", STATE, ttl=ttl)
        assert await client.exists("k") == 0


@pytest.mark.parametrize("key", [7, None, STATE, bytearray(b"k"), ("a",), "\udc80"], ids=lambda key: type(key).__name__)
async def test_key_of_the_wrong_type_is_refused(url: str, key: Any) -> None:
    async with aionpredis.connect(url) as client:
        for attempt in (client.get(key), client.set(key, STATE), client.mget([key]), client.delete(key)):
            with pytest.raises(UsageError, match="key"):
                await attempt


@pytest.mark.parametrize(
    ("stored", "kind", "about"),
    [
        (b"", NotAnArray, "0 bytes"),
        (b"just text", NotAnArray, "just text"),
        (npy_file(STATE)[:-1], CorruptValue, "12927"),
        (npy_file(STATE) + b"x", CorruptValue, "12929"),
        (npy_file(STATE)[:100], CorruptValue, "cut off"),
        (npy.header_bytes(np.dtype("f8"), (1 << 37,)), CorruptValue, "1099511627904"),
        (b"\x04\x22\x4d\x18" + b"x" * 40, CorruptValue, "lz4"),
        (lz4.frame.compress(npy_file(STATE))[:-9], CorruptValue, "lz4"),
        (lz4.frame.compress(lz4.frame.compress(npy_file(STATE))), CorruptValue, "twice"),
        (safetensors.numpy.save({"a": STATE}), WrongKind, "get_record"),
    ],
    ids=lambda value: repr(value)[:14] if isinstance(value, bytes) else None,
)
async def test_stored_value_that_is_no_array_is_an_error_with_its_key(
    url: str, stock: redis.Redis, stored: bytes, kind: type[DecodeError], about: str
) -> None:
    stock.set("bad", stored)
    async with aionpredis.connect(url) as client:
        await client.set("good", STATE)
        out = np.zeros((3, 80, 80), np.uint16)
        for attempt in (
            client.get("bad"),
            client.mget(["good", "bad", "good"]),
            client.mget(["good", "bad", "good"], out=out),
            client.get("bad", out=out[0]),
        ):
            with pytest.raises(kind, match=about) as raised:
                await attempt
            assert raised.value.key == "bad"
            assert equal(await client.get("good"), STATE)
        with pytest.raises(WrongKind, match="get"):
            await client.get_record("good")


async def test_pickles_are_never_opened(url: str, stock: redis.Redis) -> None:
    file = io.BytesIO()
    np.save(file, np.array([{"a": 1}], object), allow_pickle=True)
    stock.set("pickle", file.getvalue())
    async with aionpredis.connect(url) as client:
        with pytest.raises(CorruptValue, match="pickled"):
            await client.get("pickle")


async def test_key_of_another_type_is_named(url: str, stock: redis.Redis) -> None:
    stock.rpush("a list", "x")
    async with aionpredis.connect(url) as client:
        for attempt in (client.get("a list"), client.get("a list", out=STATE.copy()), client.get_record("a list")):
            with pytest.raises(ServerError, match=r"WRONGTYPE.*GET, key 'a list'") as raised:
                await attempt
            assert (raised.value.key, raised.value.command) == ("a list", "GET")
        assert await client.mget(["a list"]) == [None]
        assert not (await client.mget(["a list"], out=STATE[np.newaxis].copy())).any()


async def test_out_of_the_wrong_kind_is_refused(url: str) -> None:
    async with aionpredis.connect(url) as client:
        await client.mset({"k": STATE, "other": STATE[:40]})
        for out in (np.empty((80, 80), np.int16), np.empty((80, 81), np.uint16), np.empty(6400, np.uint16)):
            with pytest.raises(OutMismatch, match=r"uint16.*'k'"):
                await client.get("k", out=out)
        with pytest.raises(OutMismatch, match=r"40, 80.*'other'"):
            await client.mget(["k", "other"], out=np.empty((2, 80, 80), np.uint16))
        readonly = STATE.copy()
        readonly.flags.writeable = False
        for bad, about in (
            (readonly, "read-only"),
            ([1], "list"),
            (np.empty((80, 80), object), "object"),
            (STATE.data, "memoryview"),
        ):
            with pytest.raises(UsageError, match=about):
                await client.get("k", out=bad)  # type: ignore[arg-type]
        for rows in (np.empty((3, 80, 80), np.uint16), np.empty(()), "x"):
            with pytest.raises(UsageError, match="one row for each key"):
                await client.mget(["k", "other"], out=rows)  # type: ignore[arg-type]
        for one in ("key", b"key"):
            with pytest.raises(UsageError, match="a list of keys, not one key"):
                await client.mget(one)  # type: ignore[arg-type]
        assert equal(await client.get("k"), STATE)


@pytest.mark.parametrize("codec", [None, "lz4"])
async def test_longest_value_that_can_be_stored_can_be_read(
    url: str, monkeypatch: pytest.MonkeyPatch, codec: str | None
) -> None:
    most = 1 << 20
    monkeypatch.setattr(requests, "MAX_VALUE", most)
    monkeypatch.setattr(requests, "SURELY_FITS", most - 1000)
    async with aionpredis.connect(url, codec=codec, max_value_bytes=most) as client:
        longest = np.zeros(most - 128, np.uint8)  # a header has 128 bytes
        await client.set("array", longest)
        await client.set_record("record", {"x": longest})
        assert equal(await client.get("array"), longest)
        assert (await client.get_record("record") or {})["x"].nbytes == longest.nbytes
        longer = np.zeros(most - 127, np.uint8)
        for attempt in (client.set("array", longer), client.set_record("record", {"x": longer})):
            with pytest.raises(EncodeError, match="store it in parts"):
                await attempt


async def test_value_longer_than_allowed_ends_the_connection_not_the_program(url: str) -> None:
    async with aionpredis.connect(url) as writer:
        await writer.set("k", STATE)
        await writer.set("small", np.arange(3))
        await writer.set("bomb", np.zeros(1 << 20), codec="lz4")
    async with aionpredis.connect(url, max_value_bytes=10_000) as client:
        with pytest.raises(ConnectionLost, match="max_value_bytes"):
            await client.get("k")
        with pytest.raises(ConnectionLost, match="max_value_bytes"):
            await client.get("bomb")
        assert equal(await client.get("small"), np.arange(3))
        connection = await client.connection(b"k")
        for out in (STATE.copy(), np.zeros_like(STATE, np.float64)):
            with pytest.raises(UsageError, match="more than max_value_bytes=10,000"):
                await client.get("k", out=out)
            with pytest.raises(UsageError, match="more than max_value_bytes=10,000"):
                await client.mget(["k"], out=out[np.newaxis])
        assert connection.lost is None


@pytest.mark.one_loop("what a socket takes is the same on all")
@pytest.mark.parametrize("number", [np.float16(30), np.float32(30), np.int8(30), Fraction(30), 1e11, 1e300, 10**400])
async def test_time_limit_may_be_any_positive_number(url: str, number: Any) -> None:
    async with aionpredis.connect(url, timeout=number, connect_timeout=number) as client:
        await client.set("k", STATE)
        with warnings.catch_warnings(action="error"):
            await client.set("k", STATE, ttl=min(number, 1000))
        assert equal(await client.get("k"), STATE)


@pytest.mark.parametrize("bad", [0, -1, math.nan, math.inf, True, "3", None, np.float64(0)])
def test_time_limit_that_is_none_is_refused(bad: Any) -> None:
    for name in ("timeout", "connect_timeout"):
        with pytest.raises(UsageError, match=f"^{name} is a positive number of seconds"):
            aionpredis.connect(**{name: bad})


# --- a life with interruptions ---------------------------------------------------------------------------------------


async def test_client_is_used_inside_of_its_block_only(url: str) -> None:
    client = aionpredis.connect(url)
    assert "closed" in repr(client)
    for _ in range(2):
        for attempt in (client.get("k"), client.set("k", STATE), client.mget(["k"]), client.execute("PING")):
            with pytest.raises(UsageError, match="async with"):
                await attempt
        async with client:
            assert "open" in repr(client)
            with pytest.raises(UsageError, match="open already"):
                await client.__aenter__()
            await client.set("k", STATE)  # a client may be opened again


async def test_call_that_waits_when_the_client_closes_is_told(proxy: Proxy) -> None:
    errors: list[AionpredisError] = []
    client = aionpredis.connect(proxy.url)

    async def get() -> None:
        try:
            await client.get("k")
        except (ConnectionLost, UsageError) as error:
            errors.append(error)

    with anyio.fail_after(20):
        async with anyio.create_task_group() as tasks:
            async with client:
                proxy.stalled = True
                for _ in range(3):
                    tasks.start_soon(get)
                await anyio.sleep(0.02)
    proxy.stalled = False
    assert len(errors) == 3


async def test_dropped_connection_is_made_again(url: str, stock: redis.Redis) -> None:
    out = np.empty_like(STATE)
    async with aionpredis.connect(url) as client:
        await client.set("k", STATE)
        for call in (
            lambda: client.get("k"),
            lambda: client.get("k", out=out),
            lambda: client.mget(["k"]),
            lambda: client.mget(["k"], out=out[np.newaxis]),
            lambda: client.set("k", STATE),
            lambda: client.exists("k"),
            lambda: client.mset({"k": STATE}),
        ):
            stock.client_kill_filter(_type="normal", skipme=True)
            await call()
        assert (out == STATE).all()


@pytest.mark.parametrize("kind", ["valkey", "redis"])
async def test_restarted_server_is_found_again(kind: str, tmp_path: Path) -> None:
    with make_server(kind) as server, Proxy(server.url, tmp_path) as proxy:
        async with aionpredis.connect(proxy.url, retry_timeout=0.3) as client:
            await client.set("k", STATE)
            server.stop()
            with anyio.fail_after(20), pytest.raises((ConnectionLost, ConnectError)):
                await client.get("k")
            server.start()
            proxy.target = server.url.removeprefix("unix://")
            assert await client.get("k") is None
            await client.set("k", STATE)
            proxy.refusing = True
            proxy.cut()
            async with anyio.create_task_group() as tasks:

                async def recover() -> None:
                    await anyio.sleep(0.03)
                    proxy.refusing = False

                tasks.start_soon(recover)
                for _ in range(3):  # the backoff is random, and one call may give up before
                    try:
                        assert equal(await client.get("k"), STATE)
                        break
                    except ConnectError:
                        continue
                else:
                    pytest.fail("not found again")


async def test_tasks_share_one_attempt_to_connect(proxy: Proxy) -> None:
    async with aionpredis.connect(proxy.url, connect_timeout=0.5, retry_timeout=0.3) as client:
        proxy.stalled = True
        proxy.cut()
        errors = []

        async def get() -> None:
            try:
                await client.get("k")
            except (ConnectError, ConnectionLost) as error:
                errors.append(error)

        with anyio.fail_after(20):  # alone, one after the other, they would wait 0.5 s each time
            async with anyio.create_task_group() as tasks:
                for _ in range(50):
                    tasks.start_soon(get)
        assert len(errors) == 50
        proxy.stalled = False
        with anyio.fail_after(20):
            while errors:  # half a second may be too short again
                errors.clear()
                await get()


async def test_client_finds_the_server_by_the_environment(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REDIS_URL", url)
    async with aionpredis.connect() as client:
        await client.set("k", STATE)
        assert client.url == url


@pytest.mark.parametrize("variable", [None, ""])
async def test_client_without_url_brings_a_server(monkeypatch: pytest.MonkeyPatch, variable: str | None) -> None:
    monkeypatch.delenv("REDIS_URL", raising=False)
    if variable is not None:
        monkeypatch.setenv("REDIS_URL", variable)
    client = aionpredis.connect()
    for _ in range(2):
        async with client:
            await client.set("k", STATE)
            assert equal(await client.get("k"), STATE)


async def test_cancelled_pipeline_step_can_be_taken_again(proxy: Proxy) -> None:
    async with aionpredis.connect(proxy.url) as client:
        await client.mset({str(i): np.array(i) for i in range(9)})
        pipeline: Pipeline[int] = Pipeline(client)
        proxy.stalled = True
        for i in range(9):
            pipeline.put(lambda i=i: (encode("GET", str(i)), ValueReply()), b"", 200, i)  # type: ignore[misc]
        for _ in range(2):
            with anyio.move_on_after(0.02) as scope:
                await pipeline.next()
            assert scope.cancelled_caught
        proxy.stalled = False
        seen = []
        while len(pipeline):
            reply, tag = await pipeline.next()
            assert reply.values[0].tobytes() == npy_file(np.array(tag))
            seen.append(tag)
        assert seen == list(range(9))


@pytest.mark.one_server("the bound is that of a connection")
async def test_pipeline_asks_for_a_bounded_number_of_bytes(url: str) -> None:
    async with aionpredis.connect(url) as client:
        connection = client.live_connection()
        assert connection is not None
        size = connection.reply_window // 5 + 1
        pipeline: Pipeline[None] = Pipeline(client)
        for _ in range(2):
            while not pipeline.full:
                pipeline.put(lambda: (encode("GET", "k"), ValueReply()), b"", size, None)
            assert len(pipeline) == 5
            await pipeline.next()
            assert not pipeline.full
        pipeline.abandon()
        pipeline.put(lambda: (encode("GET", "k"), ValueReply()), b"", 100 * size, None)
        assert pipeline.full
        await pipeline.next()


@pytest.mark.one_server("the bound is that of a connection")
async def test_pipeline_asks_for_a_bounded_number_of_replies(url: str) -> None:
    async with aionpredis.connect(url) as client:
        pipeline: Pipeline[None] = Pipeline(client)
        while not pipeline.full:
            pipeline.put(lambda: (encode("PING"), Reply()), b"", 1, None)
        assert len(pipeline) <= 100
        keys = [f"missing{i}" for i in range(30_000)]
        with anyio.fail_after(40):
            assert await client.mget(keys) == [None] * len(keys)


async def test_unknown_outcome_is_said(proxy: Proxy) -> None:
    async with aionpredis.connect(proxy.url) as client:
        proxy.stalled = True
        client_error: list[AionpredisError] = []

        async def delete() -> None:
            try:
                await client.delete("k")
            except OutcomeUnknown as error:
                client_error.append(error)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(delete)
            await anyio.sleep(0.03)
            proxy.cut()
            proxy.stalled = False
        assert client_error
        assert isinstance(client_error[0], ConnectionError)


async def test_cancelled_opening_leaves_nothing_open(proxy: Proxy) -> None:
    proxy.stalled = True
    client = aionpredis.connect(proxy.url)
    with anyio.move_on_after(0.05) as scope:
        await client.__aenter__()
    assert scope.cancelled_caught
    proxy.stalled = False
    async with client:
        assert isinstance(client, Client)
        assert await client.execute("PING") == b"PONG"
