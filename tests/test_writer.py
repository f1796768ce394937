"""The batching writer: in order, within its bound, nothing lost, and every failure told once."""

from __future__ import annotations

import socket
import subprocess
import sys
import textwrap
import time
from typing import Any

import anyio
import anyio.lowlevel
import numpy as np
import pytest
import redis

import aionpredis
from aionpredis import Client, Server
from aionpredis.errors import ConnectionLost, EncodeError, ServerFull, UsageError, WriteFailed

from .proxy import Proxy
from .servers import make_server
from .strategies import equal

pytestmark = pytest.mark.anyio

STATE = np.arange(6400, dtype=np.uint16).reshape(80, 80)


async def value(client: Client, key: str) -> Any:
    array = await client.get(key)
    return None if array is None else array.flat[0]


@pytest.mark.parametrize("copy", [True, False])
@pytest.mark.parametrize("bound", [1, 100, 20_000, 40_000, 300_000, 64 << 20])
async def test_everything_is_stored_in_order_whatever_the_bound(url: str, bound: int, copy: bool) -> None:
    async with aionpredis.connect(url) as client:
        async with client.writer(max_inflight=bound, copy=copy) as writer:
            for i in range(60):
                await writer.put(f"k{i % 7}", STATE + np.uint16(i))
                await writer.put(f"small{i}", np.uint8(i))
        assert writer.inflight == 0
        assert [await value(client, f"k{i % 7}") for i in range(53, 60)] == list(range(53, 60))
        assert await client.exists(*(f"small{i}" for i in range(60))) == 60


async def test_a_writers_codec_is_its_own(url: str, stock: redis.Redis) -> None:
    large = np.zeros(1 << 20, np.uint8)
    async with aionpredis.connect(url, codec="lz4") as client:
        async with client.writer(codec="raw") as writer:
            await writer.put("array", STATE)
            await writer.put("large", large)
            await writer.put_record("record", {"x": large})
        for key in ("array", "large", "record"):
            value: Any = stock.get(key)
            assert not value.startswith(b"\x04\x22\x4d\x18")


async def test_put_takes_a_snapshot(url: str) -> None:
    observation = np.zeros((80, 80), np.uint16)
    async with aionpredis.connect(url) as client:
        async with client.writer() as writer:
            for i in range(100):
                observation[:] = i
                await writer.put(f"k{i}", observation)
        assert [await value(client, f"k{i}") for i in range(100)] == list(range(100))


async def test_without_copy_the_callers_memory_is_sent(proxy: Proxy) -> None:
    array = np.zeros(10, np.uint16)
    async with aionpredis.connect(proxy.url) as client:
        async with client.writer(copy=False) as writer:
            await writer.put("a", np.pad(array, (0, 5000)))
            big = np.zeros(5000, np.uint16)
            await writer.put("b", big)
            big[0] = 7  # too early on purpose: shows that there is no copy
            await writer.flush()
        assert await value(client, "b") == 7


async def test_borrowed_items_travel_in_batches(proxy: Proxy) -> None:
    async with aionpredis.connect(proxy.url) as client:
        proxy.pause = 0.001
        async with client.writer(copy=False) as writer:
            lane = writer._only
            assert lane is not None
            for i in range(100):
                await writer.put(f"k{i}", STATE)
            assert len(lane.inflight) + len(lane.queued) < 10


async def test_lone_item_leaves_without_flush(url: str, stock: redis.Redis) -> None:
    async with aionpredis.connect(url) as client, client.writer() as writer:
        for copy_of in range(3):
            await writer.put(f"k{copy_of}", STATE)
            with anyio.fail_after(20):
                while not stock.exists(f"k{copy_of}") or writer.inflight:
                    await anyio.sleep(0.002)


async def test_flush_returns_though_others_keep_putting(url: str) -> None:
    async with aionpredis.connect(url) as client, client.writer(max_inflight=100_000) as writer:
        async with anyio.create_task_group() as tasks:

            async def put() -> None:
                while True:
                    await writer.put("other", STATE)

            tasks.start_soon(put)
            with anyio.fail_after(30):
                for i in range(5):
                    await writer.put(f"mine{i}", STATE)
                    await writer.flush()
                    assert await client.exists(f"mine{i}")
            tasks.cancel_scope.cancel()


async def test_bound_in_bytes_is_kept_and_slows_the_producer_down(proxy: Proxy) -> None:
    bound = 1 << 20
    held = []
    async with aionpredis.connect(proxy.url) as client:
        proxy.pause = 0.005  # 13 MB/s
        start = time.monotonic()
        async with client.writer(max_inflight=bound) as writer:
            for i in range(400):
                await writer.put(f"k{i % 9}", STATE)
                held.append(writer.inflight)
            produced = time.monotonic() - start
        assert max(held) <= bound
        assert max(held) > bound // 2
        assert proxy.passed_up > 400 * 12_800
        # what had to pass before the last put was accepted
        assert produced > 0.5 * (400 * 12_800 - bound) / (1 << 16) * proxy.pause


@pytest.mark.parametrize("anyio_backend", [("asyncio", {"use_uvloop": True})], ids=["uvloop"])
async def test_memory_stays_within_the_bound(proxy: Proxy, anyio_backend: Any) -> None:
    program = """
        import anyio, numpy as np, resource, sys, aionpredis
        async def main():
            async with aionpredis.connect(sys.argv[1]) as client:
                state = np.zeros((4, 80, 80), np.uint16)
                await client.set("warm", state)
                before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
                async with client.writer(max_inflight=4 << 20) as writer:
                    for i in range(6_000):
                        await writer.put(f"k{i % 16}", state)
                        assert writer.inflight <= 4 << 20
                print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
        anyio.run(main)
    """
    proxy.pause = 0.0001
    command = [sys.executable, "-c", textwrap.dedent(program), proxy.url]
    done = await anyio.run_process(command, stderr=subprocess.STDOUT)
    assert int(done.stdout) * 1024 < (4 << 20) + (64 << 20)
    assert proxy.passed_up > 300e6


@pytest.mark.one_server("ACL SETUSER is for each server")
async def test_failures_come_with_their_keys_each_once(server: Server, stock: redis.Redis, url: str) -> None:
    stock.execute_command("ACL", "SETUSER", "half", "on", ">secret", "~ok:*", "+@all")  # type: ignore[no-untyped-call]
    try:
        async with aionpredis.connect(url, username="half", password="secret") as client:
            failures = []
            with pytest.raises(WriteFailed, match="NOPERM") as raised:
                async with client.writer() as writer:
                    for i in range(50):
                        accepted = False
                        while not accepted:
                            try:
                                await writer.put(f"{'no' if i % 10 == 3 else 'ok'}:{i}", STATE)
                                accepted = True
                            except WriteFailed as error:
                                failures += error.failures
                    try:
                        await writer.flush()
                    except WriteFailed as error:
                        failures += error.failures
                    assert [key for key, _ in failures] == [f"no:{i}" for i in (3, 13, 23, 33, 43)]
                    await writer.flush()  # told already
                    await writer.put("no:last", np.arange(3))
            assert [key for key, _ in raised.value.failures] == ["no:last"]
            assert "no:last" in str(raised.value)
            assert "secret" not in str(raised.value)
            assert await client.exists(*(f"ok:{i}" for i in range(50) if i % 10 != 3)) == 45
    finally:
        stock.execute_command("ACL", "DELUSER", "half")  # type: ignore[no-untyped-call]


@pytest.mark.one_server("ACL SETUSER is for each server")
async def test_put_that_reports_a_failure_has_not_accepted_its_item(server: Server, stock: redis.Redis) -> None:
    stock.execute_command("ACL", "SETUSER", "half", "on", ">secret", "~ok:*", "+@all")  # type: ignore[no-untyped-call]
    try:
        async with aionpredis.connect(server.url, username="half", password="secret") as client:
            async with client.writer() as writer:
                await writer.put("no", STATE)
                with anyio.fail_after(20):
                    while writer.inflight:
                        await anyio.sleep(0.002)
                with pytest.raises(WriteFailed):
                    await writer.put("ok:refused", STATE)
                await writer.put("ok:next", STATE)
            assert await client.exists("ok:refused") == 0
            assert await client.exists("ok:next") == 1
    finally:
        stock.execute_command("ACL", "DELUSER", "half")  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("kind", ["valkey", "redis"])
async def test_full_server_fails_what_it_did_not_take(kind: str) -> None:
    with make_server(kind, config={"maxmemory": "8mb"}) as server:
        async with aionpredis.connect(server.url, retry_timeout=0) as client:
            with pytest.raises(WriteFailed) as raised:
                async with client.writer() as writer:
                    for i in range(1000):
                        await writer.put(f"k{i}", STATE)
            failed = {key for key, error in raised.value.failures if isinstance(error, ServerFull)}
            assert failed
            assert len(failed) == len(raised.value.failures)
            assert await client.exists(*failed) == 0


@pytest.mark.parametrize("copy", [True, False])
async def test_connection_cut_in_the_middle_loses_nothing(proxy: Proxy, copy: bool) -> None:
    async with aionpredis.connect(proxy.url) as client:
        for cut in (1, 30_000, 400_000):
            await client.delete(*(f"k{i}" for i in range(150)))
            proxy.cut_up = 1  # at the next byte
            async with client.writer(copy=copy, max_inflight=600_000) as writer:
                for i in range(150):
                    if i == 20:
                        proxy.cut_up = cut + 1000
                    await writer.put(f"k{i}", STATE + np.uint16(i))
                    await writer.put(f"again{i % 3}", np.uint16(i))
            assert [await value(client, f"k{i}") for i in range(150)] == list(range(150))
            assert [await value(client, f"again{i % 3}") for i in range(147, 150)] == [147, 148, 149]
        assert proxy.cuts >= 3


async def test_the_last_put_of_a_key_wins_though_the_connection_breaks_between_two_of_them(proxy: Proxy) -> None:
    async with aionpredis.connect(proxy.url) as client:
        connection = client.live_connection()
        assert connection is not None
        async with client.writer() as writer:
            proxy.stalled = True
            await writer.put("k", np.array(1))
            with anyio.fail_after(20):
                while writer._only is None or not writer._only.inflight:
                    await anyio.sleep(0.001)
            await writer.put("k", np.array(2))
            connection.abort(ConnectionLost("for no reason"))
            # Before the task that waits for the first one's reply hears of it, the second one is queued:
            await writer.put("other", np.zeros(500_000, np.uint8))
            proxy.stalled = False
        assert await value(client, "k") == 2


async def test_server_gone_for_good_names_all_keys_that_were_not_stored(proxy: Proxy) -> None:
    async with aionpredis.connect(proxy.url, retry_timeout=0.2) as client:
        with anyio.fail_after(20), pytest.raises(WriteFailed) as raised:
            async with client.writer() as writer:
                for i in range(20):
                    await writer.put(f"kept{i}", STATE)
                await writer.flush()
                proxy.refusing = True
                proxy.cut()
                for i in range(30):
                    await writer.put(f"lost{i}", STATE)
        assert sorted(key for key, _ in raised.value.failures) == sorted(f"lost{i}" for i in range(30))
        proxy.refusing = False
        assert await client.exists(*(f"kept{i}" for i in range(20))) == 20


async def test_closed_client_fails_the_items_instead_of_crashing(proxy: Proxy) -> None:
    client = aionpredis.connect(proxy.url)
    await client.__aenter__()
    with anyio.fail_after(20), pytest.raises(WriteFailed, match="not open") as raised:
        async with client.writer() as writer:
            proxy.stalled = True
            await writer.put("a", STATE)
            await anyio.sleep(0.01)
            await client.__aexit__(None, None, None)
    assert [key for key, _ in raised.value.failures] == ["a"]
    proxy.stalled = False


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt, SystemExit])
async def test_exception_in_the_block_stays_what_it_is(url: str, kind: type[BaseException]) -> None:
    error = kind("mine")
    async with aionpredis.connect(url) as client:
        with pytest.raises(kind) as raised:
            async with client.writer() as writer:
                await writer.put("a", STATE)
                raise error
        assert raised.value is error
        if kind is RuntimeError:
            assert await value(client, "a") == 0


async def test_failures_are_noted_on_the_blocks_own_exception(proxy: Proxy) -> None:
    async with aionpredis.connect(proxy.url, retry_timeout=0.2) as client:
        with pytest.raises(RuntimeError, match="mine") as raised:
            async with client.writer() as writer:
                proxy.refusing = True
                proxy.cut()
                await writer.put("a", STATE)
                raise RuntimeError("mine")
        assert "'a'" in raised.value.__notes__[0]


@pytest.mark.parametrize("copy", [True, False])
@pytest.mark.parametrize("when", ["putting", "flushing"])
async def test_cancelled_block_returns_at_once_and_sends_nothing_more(proxy: Proxy, copy: bool, when: str) -> None:
    array = np.ones(100_000, np.uint8)
    async with aionpredis.connect(proxy.url) as client:
        await client.set("before", STATE)
        proxy.stalled = True
        with anyio.fail_after(20):  # retry_timeout is 30
            with anyio.move_on_after(0.1) as scope:
                async with client.writer(copy=copy, max_inflight=12 << 20 if when == "putting" else 64 << 20) as writer:
                    for i in range(200):
                        await writer.put(f"k{i}", array)
            assert scope.cancelled_caught
        array[:] = 99
        proxy.stalled = False
        assert await value(client, "before") == 0
        for i in range(200):
            assert await value(client, f"k{i}") in (None, 1)
        with pytest.raises(UsageError):
            await writer.put("after", STATE)


@pytest.mark.parametrize("copy", [True, False])
async def test_cancelled_block_whose_batch_is_half_sent_leaves_the_others_requests_whole(
    proxy: Proxy, copy: bool
) -> None:
    array = np.ones(100_000, np.uint8)
    async with aionpredis.connect(proxy.url, timeout=30) as client:
        connection = client.live_connection()
        assert connection is not None
        connection._sock.raw.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 100_000)
        proxy.stalled = True

        async def write() -> None:
            async with client.writer(copy=copy) as writer:
                for i in range(20):
                    await writer.put(f"k{i}", array)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(write)
            with anyio.fail_after(20):
                while not connection._outbox:
                    await anyio.sleep(0.001)
            await anyio.sleep(0.02)
            tasks.cancel_scope.cancel()
        array[:] = 99
        assert connection._outbox, "nothing is half sent"
        proxy.stalled = False
        with anyio.fail_after(30):
            assert await client.execute("ECHO", "mine") == b"mine"
            assert {await value(client, f"k{i}") for i in range(20)} <= {None, 1}
        assert proxy.connections == 1


async def test_cancelled_put_of_a_large_array_lets_go_of_its_memory(proxy: Proxy) -> None:
    big = np.ones(12 << 20, np.uint8)
    async with aionpredis.connect(proxy.url) as client, client.writer(max_inflight=16 << 20) as writer:
        await writer.put("first", STATE)
        proxy.stalled = True
        with anyio.move_on_after(0.05) as scope:
            await writer.put("big", big)
        assert scope.cancelled_caught
        big[:] = 99
        proxy.stalled = False
        with anyio.fail_after(30):
            await writer.put("second", STATE)
            await writer.flush()
        assert writer.inflight == 0
        stored = await client.get("big")
        assert stored is None or (stored == 1).all()
        assert await client.exists("first", "second") == 2


async def test_many_tasks_put_at_once_in_order_of_each(url: str) -> None:
    async with aionpredis.connect(url) as client:
        async with client.writer(max_inflight=200_000) as writer:

            async def put(index: int) -> None:
                for turn in range(30):
                    size = 150_000 if (index + turn) % 9 == 0 else 3000  # larger and smaller than half of the bound
                    await writer.put(f"k{index}", np.full(size, turn, np.uint8))
                    assert writer.inflight <= 200_000

            with anyio.fail_after(50):
                async with anyio.create_task_group() as tasks:
                    for index in range(12):
                        tasks.start_soon(put, index)
        assert [await value(client, f"k{index}") for index in range(12)] == [29] * 12
        assert await client.execute("PING") == b"PONG"


async def test_task_that_still_puts_when_the_writer_closes_is_told(proxy: Proxy) -> None:
    errors = []
    async with aionpredis.connect(proxy.url) as client, anyio.create_task_group() as tasks:
        writer = client.writer(max_inflight=50_000)

        async def put() -> None:
            try:
                for i in range(100):
                    await writer.put(f"k{i}", STATE)
            except UsageError as error:
                errors.append(error)

        with anyio.fail_after(20):
            with anyio.CancelScope() as scope:
                async with writer:
                    proxy.stalled = True
                    tasks.start_soon(put)
                    await anyio.sleep(0.05)
                    scope.cancel()
                    await anyio.lowlevel.checkpoint()
            while not errors:
                await anyio.sleep(0.01)
        proxy.stalled = False


async def test_items_are_compressed_with_the_codec(url: str, stock: redis.Redis) -> None:
    large = np.zeros(1 << 20, np.uint8)
    async with aionpredis.connect(url) as client:
        async with client.writer(codec="lz4", ttl=600) as writer:
            await writer.put("small", STATE * 0)
            await writer.put("large", large, ttl=300)
            await writer.put_record("record", {"x": STATE * 0})
        assert all(bytes(stock.get(key)).startswith(b"\x04\x22\x4d\x18") for key in ("small", "large", "record"))  # type: ignore[arg-type]
        assert 550_000 < stock.pttl("small") <= 600_000
        assert 250_000 < stock.pttl("large") <= 300_000
        assert equal(await client.get("large"), large)
        record = await client.get_record("record")
        assert record is not None
        assert (record["x"] == 0).all()


async def test_bad_items_are_refused_and_the_writer_goes_on(url: str) -> None:
    async with aionpredis.connect(url) as client:
        async with client.writer() as writer:
            for bad in ([1], np.array([None]), np.ma.masked_array([1], [True])):
                with pytest.raises(EncodeError, match="'bad'"):
                    await writer.put("bad", bad)
            with pytest.raises(UsageError, match="key"):
                await writer.put(7, STATE)  # type: ignore[arg-type]
            with pytest.raises(UsageError, match="ttl"):
                await writer.put("k", STATE, ttl=-1)
            with pytest.raises(UsageError, match="one `async with`"):
                await writer.__aenter__()
            await writer.put("good", STATE)
        assert await client.exists("good") == 1
        with pytest.raises(UsageError, match="async with"):
            await client.writer().put("k", STATE)
        for bound in (0, -1, 1.5, True):
            with pytest.raises(UsageError, match="max_inflight"):
                client.writer(max_inflight=bound)  # type: ignore[arg-type]
