"""Many requests on one connection: whoever is cancelled, whatever breaks, nobody gets what is another's."""

from __future__ import annotations

import asyncio
import itertools
import select
import socket
import time
import weakref
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anyio
import anyio.lowlevel
import numpy as np
import pytest

import aionpredis
from aionpredis.errors import ConnectionLost, OutcomeUnknown, ProtocolError, Stalled
from aionpredis.requests import ValueReply, row_views
from aionpredis.wire.connection import DEEP, MAX_SNAPSHOT, Connection
from aionpredis.wire.ready import AnyioReadiness
from aionpredis.wire.resp import MAX_BULK, Blob, Buffer, Reply, encode
from aionpredis.wire.socket import PlainSocket, wrap
from tests.predictions import rows_reply

from .proxy import Ending, Faults, Proxy, scripted
from .strategies import equal

pytestmark = [pytest.mark.anyio, pytest.mark.one_server("one connection is looked at")]

STATE = (80, 80)


def connection_on(sock: socket.socket, timeout: float = 10.0) -> Connection:
    return Connection(wrap(sock), timeout=timeout, max_bulk=MAX_BULK)


@asynccontextmanager
async def peer(*steps: bytes | int, timeout: float = 10.0) -> AsyncIterator[Connection]:
    """A connection to a scripted peer."""
    with scripted(*steps) as sock:
        connection = connection_on(sock, timeout)
        try:
            yield connection
        finally:
            connection.close()


async def ask(connection: Connection, *arguments: Any) -> Any:
    reply = Reply()
    await connection.wait(connection.submit(encode(*arguments), reply))
    return reply.result()


# --- cancellation ----------------------------------------------------------------------------------------------------


async def test_cancelled_calls_never_disturb_others_nor_write_later(url: str) -> None:
    rng = np.random.default_rng(7)
    arrays = {f"k{i}": rng.integers(0, 1 << 16, STATE, np.uint16) for i in range(24)}
    big = rng.integers(0, 256, 5 << 20, np.uint8)
    left: list[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]] = []
    async with aionpredis.connect(url) as client:
        await client.mset(arrays)
        await client.set("big", big)
        keys, expected = list(arrays), np.stack(list(arrays.values()))
        stop = False

        async def honest(index: int) -> int:
            rounds = 0
            while not stop:
                key = keys[(index * 7 + rounds) % len(keys)]
                got = await client.get(key)
                assert got is not None
                assert (got == arrays[key]).all(), "another caller's reply"
                out = np.empty_like(expected)
                assert (await client.mget(keys, out=out)).all()
                assert (out == expected).all()
                rounds += 1
            return rounds

        async def moody(kind: int, wait: float, yields: int) -> None:
            out = np.zeros_like(expected) if kind == 0 else np.zeros_like(big)
            with anyio.CancelScope() as scope:
                async with anyio.create_task_group() as tasks:

                    async def call() -> None:
                        if kind == 0:
                            await client.mget(keys, out=out)
                        elif kind == 1:
                            await client.get("big", out=out)
                        elif kind == 2:
                            await client.set("big", big)
                        else:
                            await client.set_record("r", arrays)

                    tasks.start_soon(call)
                    for _ in range(yields):
                        await anyio.lowlevel.checkpoint()
                    if wait:
                        await anyio.sleep(wait)
                    scope.cancel()
            left.append((out, out.copy()))

        async with anyio.create_task_group() as tasks:
            for index in range(2):
                tasks.start_soon(honest, index)
            for step in range(24):
                await moody(step % 4, float(rng.choice([0, 0, 0.0005, 0.002])), int(rng.integers(0, 9)))
            stop = True
        with anyio.fail_after(20):
            assert await client.execute("PING") == b"PONG"
            assert equal(await client.get("big"), big)
    assert all((out == before).all() for out, before in left), "written after the call had been cancelled"


async def received(theirs: socket.socket, size: int) -> bytearray:
    """So many bytes of what comes to a non-blocking socket."""
    got = bytearray()
    with anyio.fail_after(20):
        while len(got) < size:
            await anyio.lowlevel.checkpoint()
            try:
                got += theirs.recv(1 << 16)
            except BlockingIOError:
                await anyio.sleep(0.001)
    return got


async def test_cancelled_half_sent_small_request_is_completed_from_a_copy() -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        theirs.setblocking(False)
        connection = connection_on(ours)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        memory = bytearray(b"m" * 500_000)
        command = encode("SET", "k", memory)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(connection.wait, connection.submit(command, Reply()))
            await anyio.wait_all_tasks_blocked()
            tasks.cancel_scope.cancel()
        memory[:] = b"X" * len(memory)  # the caller uses its memory again
        result: list[Any] = []

        async def other() -> None:
            result.append(await ask(connection, "PING"))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(other)
            whole = b"".join(
                [b"*3\r\n$3\r\nSET\r\n$1\r\nk\r\n$500000\r\n", b"m" * 500_000, b"\r\n*1\r\n$4\r\nPING\r\n"]
            )
            got = await received(theirs, len(whole))
            theirs.send(b"+OK\r\n+PONG\r\n")
        assert got == whole
        assert result == [b"PONG"]
        connection.close()


async def test_half_sent_request_that_is_abandoned_twice_is_completed_nevertheless() -> None:
    """As of a writer: its block abandons what is in flight, then the task that waits for it is cancelled, and does so, too."""
    ours, theirs = socket.socketpair()
    with theirs:
        theirs.setblocking(False)
        connection = connection_on(ours)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        command = encode("SET", "k", b"m" * 500_000)
        reply = connection.submit(command, Reply())
        following = connection.submit(encode("PING"), Reply())
        assert reply.sent
        for _ in range(3):
            connection.abandon(reply)
        whole = b"".join([*command, *encode("PING")])
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(connection.wait, following)
            got = await received(theirs, len(whole))
            theirs.send(b"+OK\r\n+PONG\r\n")
        assert got == whole
        assert following.result() == b"PONG"
        connection.close()


async def test_cancelled_half_sent_large_request_gives_the_connection_up(proxy: Proxy) -> None:
    big = np.ones(64 << 20, np.uint8)
    async with aionpredis.connect(proxy.url) as client:
        await client.set("a", np.arange(3))
        proxy.stalled = True
        results: list[Any] = []

        async def fill(scope: anyio.CancelScope) -> None:
            with scope:
                await client.set("big", big)

        async def get() -> None:
            results.append(await client.get("a"))

        async def count() -> None:
            try:
                await client.execute("INCR", "steps")
            except ConnectionLost as error:
                results.append(error)

        scope = anyio.CancelScope()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(count)
            await anyio.sleep(0.02)
            tasks.start_soon(fill, scope)
            await anyio.sleep(0.05)
            tasks.start_soon(get)
            await anyio.sleep(0.01)
            scope.cancel()
            await anyio.sleep(0.01)
            proxy.stalled = False
        assert any(isinstance(result, OutcomeUnknown) for result in results)
        assert [result.tolist() for result in results if isinstance(result, np.ndarray)] == [[0, 1, 2]]
        assert proxy.connections == 2
        assert await client.get("big") is None


async def test_cancelled_unsent_request_leaves_no_trace() -> None:
    async with peer(len(b"*1\r\n$4\r\nPING\r\n"), b"+PONG\r\n") as connection:
        reply = connection.submit(encode("SET", "k", bytes(100_000)), Reply(), send=False)
        connection.abandon(reply)
        assert reply.done
        with anyio.fail_after(20):
            assert await ask(connection, "PING") == b"PONG"


async def test_cancelled_driver_hands_over(url: str) -> None:
    async with aionpredis.connect(url) as client, client.blocking() as connection:
        # BLPOP keeps the replies behind it waiting, so the tasks that wait for them depend on whoever drives
        blocked = connection.submit(encode("BLPOP", "list", "0"), Reply())
        scopes = [anyio.CancelScope() for _ in range(6)]
        results: list[Any] = []

        async def wait(reply: Reply, scope: anyio.CancelScope) -> None:
            with scope:
                await connection.wait(reply)
                results.append(reply.result())

        replies = [blocked, *(connection.submit(encode("ECHO", str(i)), Reply()) for i in range(5))]
        with anyio.fail_after(20):
            async with anyio.create_task_group() as tasks:
                for reply, scope in zip(replies, scopes, strict=True):
                    tasks.start_soon(wait, reply, scope)
                    await anyio.lowlevel.checkpoint()
                await anyio.sleep(0.02)
                for scope in scopes[:4]:
                    scope.cancel()
                    await anyio.lowlevel.checkpoint()
                await client.execute("RPUSH", "list", "x")
        assert sorted(results) == [b"3", b"4"]
        assert await ask(connection, "PING") == b"PONG"


async def test_task_cancelled_while_it_is_being_woken_passes_the_turn_on() -> None:
    async with peer(3 * len(b"*1\r\n$1\r\nA\r\n"), b"+a\r\n", b"+b\r\n+c\r\n") as connection:
        replies = [connection.submit(encode("A"), Reply()) for _ in range(3)]
        results: list[Any] = []
        second = anyio.CancelScope()

        async def wait(index: int) -> None:
            with second if index == 1 else anyio.CancelScope():
                await connection.wait(replies[index])
                results.append(replies[index].result())
                second.cancel()

        with anyio.fail_after(20):
            async with anyio.create_task_group() as tasks:
                for index in range(3):
                    tasks.start_soon(wait, index)
                    await anyio.lowlevel.checkpoint()
        assert {b"a", b"c"} <= set(results)


async def test_connection_that_a_cancelled_call_still_blocks_is_not_handed_to_another(url: str) -> None:
    async with aionpredis.connect(url) as client:
        with anyio.move_on_after(0.02) as scope:
            async with client.blocking() as connection:
                await ask(connection, "BLPOP", "nothing", "40")
        assert scope.cancelled_caught
        with anyio.fail_after(20):
            async with client.blocking() as connection:
                assert await ask(connection, "PING") == b"PONG"


async def test_withdrawn_request_wakes_the_task_that_drives_for_it() -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        connection = connection_on(ours)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        first = connection.submit(encode("SET", "a", bytes(400_000)), Reply())
        second = connection.submit(encode("SET", "b", b"b"), Reply())
        with anyio.fail_after(20):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(connection.wait, second)
                await anyio.wait_all_tasks_blocked()
                assert first.sent
                assert not second.sent
                connection.abandon(second)
        connection.close()


async def test_task_that_waits_for_a_reply_which_another_abandons_is_handed_the_connection() -> None:
    """As the task of a writer, while a put is cancelled: it goes on when the server has answered."""
    async with pair() as (connection, other):
        first, second = [connection.submit(encode("PING"), Reply()) for _ in range(2)]
        with anyio.fail_after(5):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(connection.wait, first)  # it drives
                await anyio.wait_all_tasks_blocked()
                tasks.start_soon(connection.wait, second)
                await anyio.wait_all_tasks_blocked()
                connection.abandon(second)
                other.sendall(b"+first\r\n")
                while not first.done:
                    await anyio.lowlevel.checkpoint()
                other.sendall(b"+second\r\n")
        assert second.done


# --- silence and ends ------------------------------------------------------------------------------------------------


async def test_silence_is_noticed_after_timeout_and_not_before() -> None:
    async with peer(timeout=0.2) as connection:
        start = time.monotonic()
        with anyio.fail_after(20), pytest.raises(Stalled, match=r"0\.2 s"):
            await ask(connection, "PING")
        assert time.monotonic() - start > 0.19
        with pytest.raises(ConnectionLost):
            connection.submit(encode("PING"), Reply())


async def test_silence_is_noticed_though_everybody_who_waits_is_cancelled_earlier(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each of them after a second, by a clock that goes on by one whenever it is looked at."""
    clock = itertools.count()
    looked_at = SimpleNamespace(monotonic=lambda: float(next(clock)), perf_counter=time.perf_counter)
    monkeypatch.setattr("aionpredis.wire.connection.time", looked_at)
    async with peer(timeout=20) as connection:
        asked: list[int] = []

        async def ask() -> None:
            asked.append(rounds)

        connection.patience, connection.on_silence = 10, ask
        rounds = 0
        with anyio.fail_after(20), pytest.raises(Stalled, match="20 s"):
            while True:
                rounds += 1
                with anyio.move_on_after(0.001):
                    await connection.wait(connection.submit(encode("PING"), Reply()))
        assert 10 < asked[0] < 20 < rounds
        assert len(asked) == 1


async def test_silence_is_noticed_though_requests_that_were_not_sent_yet_are_cancelled_meanwhile() -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        connection = connection_on(ours, timeout=0.3)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        first = connection.submit(encode("SET", "k", bytes(500_000)), Reply())
        lost: list[Exception] = []

        async def wait() -> None:
            try:
                await connection.wait(first)
            except Stalled as error:
                lost.append(error)

        with anyio.fail_after(5):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(wait)
                await anyio.wait_all_tasks_blocked()
                while not lost:
                    with suppress(ConnectionLost), anyio.move_on_after(0.1):
                        reply = connection.submit(encode("PING"), Reply())
                        assert not reply.sent
                        await connection.wait(reply)
        connection.close()


async def test_slow_progress_is_no_silence(proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    array = np.arange(20_000, dtype=np.uint16)
    async with aionpredis.connect(proxy.url, timeout=20) as client:
        await client.set("a", array)
        connection = client.live_connection()
        assert connection is not None
        wait = connection._ready.wait
        patience: list[float] = []

        async def look(*, write: bool, timeout: float) -> bool:
            patience.append(timeout)
            return await wait(write=write, timeout=timeout)

        monkeypatch.setattr(connection._ready, "wait", look)
        proxy.chunk, proxy.pause = 3000, 0.02
        assert equal(await client.get("a"), array)
        assert len(patience) > 3
        assert set(patience) == {20}  # whatever comes, all of it begins anew
        assert proxy.connections == 1


async def test_busy_event_loop_is_not_taken_for_silence(url: str) -> None:
    async with aionpredis.connect(url) as client, client.blocking() as connection:
        connection._timeout = 0.2  # of what follows only: a server may take longer to let us in
        reply = connection.submit(encode("BLPOP", "nothing", "0.03"), Reply())
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(connection.wait, reply)
            while not (connection._parked or reply.done):
                await anyio.lowlevel.checkpoint()
            if not reply.done:  # a training step that holds the loop
                select.select([connection._sock.raw], [], [], 20)
                time.sleep(0.3)  # noqa: ASYNC251
        assert reply.values == [None]


async def test_timer_that_the_loop_comes_to_before_the_socket_is_not_taken_for_silence(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with aionpredis.connect(url) as client, client.blocking() as connection:
        wait = connection._ready.wait

        async def late(*, write: bool, timeout: float) -> bool:
            assert await wait(write=write, timeout=timeout)
            return False  # no loop that we know of does so

        monkeypatch.setattr(connection._ready, "wait", late)
        assert await ask(connection, "BLPOP", "nothing", "0.03") is None


async def test_stalled_server_fails_every_waiter(proxy: Proxy) -> None:
    async with aionpredis.connect(proxy.url, timeout=0.2, retry_timeout=0.2) as client:
        await client.set("a", np.zeros(3))
        proxy.stalled = True
        errors = []

        async def get() -> None:
            try:
                await client.get("a")
            except Stalled as error:
                errors.append(error)

        with anyio.fail_after(20):
            async with anyio.create_task_group() as tasks:
                for _ in range(20):
                    tasks.start_soon(get)
        assert len({id(error) for error in errors}) == 20, "each task has an error of its own"
        proxy.stalled = False
        with anyio.fail_after(20):
            while errors:  # it may be slower than that now
                errors.clear()
                await get()


async def test_end_of_stream_fails_every_waiter_and_later_requests() -> None:
    async with peer() as connection:
        replies = [connection.submit(encode("PING"), Reply()) for _ in range(3)]
        errors = []

        async def wait(reply: Reply) -> None:
            try:
                await connection.wait(reply)
            except ConnectionLost as error:
                errors.append(error)

        with anyio.fail_after(20):
            async with anyio.create_task_group() as tasks:
                for reply in replies:
                    tasks.start_soon(wait, reply)
                await anyio.wait_all_tasks_blocked()
                connection.close()
        assert len(errors) == 3


async def test_what_has_half_arrived_on_a_broken_connection_is_let_go() -> None:
    came: list[weakref.ref[Any]] = []

    class Watched(Reply):
        def bulk(self, size: int) -> tuple[Sequence[memoryview], Any]:
            memory = np.empty(size, np.uint8)
            came.append(weakref.ref(memory))
            return (memory.data,), memory

    async with pair() as (connection, other):
        reply = connection.submit(encode("MGET", "a", "b"), Watched())
        with anyio.fail_after(5):
            async with anyio.create_task_group() as tasks:

                async def wait() -> None:
                    with pytest.raises(ConnectionLost):
                        await connection.wait(reply)

                tasks.start_soon(wait)
                other.sendall(b"*2\r\n$5000\r\n%b\r\n$5000\r\nhalf" % bytes(5000))
                while len(came) < 2:
                    await anyio.lowlevel.checkpoint()
                other.close()
        assert [memory() is None for memory in came] == [True, True]


async def test_nonsense_fails_all_waiters_but_those_whose_replies_came_before_it() -> None:
    async with peer(4 * len(b"*1\r\n$1\r\nA\r\n"), b"+one\r\n+two\r\n+three\r\n%nonsense\r\n") as connection:
        replies = [connection.submit(encode("A"), Reply()) for _ in range(5)]
        outcome: dict[int, Any] = {}

        async def wait(index: int) -> None:
            try:
                await connection.wait(replies[index])
                outcome[index] = replies[index].result()
            except ConnectionLost as error:
                outcome[index] = type(error)

        with anyio.fail_after(20):
            async with anyio.create_task_group() as tasks:
                for index in (4, 0, 1, 2, 3):
                    tasks.start_soon(wait, index)
        assert outcome == {0: b"one", 1: b"two", 2: b"three", 3: ProtocolError, 4: ConnectionLost}


@pytest.mark.parametrize("direction", ["cut_up", "cut_down"])
async def test_reads_and_sets_survive_a_cut_at_any_byte(proxy: Proxy, direction: str) -> None:
    rng = np.random.default_rng(5)
    rows = rng.integers(0, 1 << 16, (20, *STATE), np.uint16)
    keys = [f"k{i}" for i in range(20)]
    async with aionpredis.connect(proxy.url) as client:
        for cut in (1, 70, 13_000, int(rng.integers(20_000, 250_000))):
            setattr(proxy, direction, None)
            await client.delete(*keys)
            proxy.cut()
            await anyio.sleep(0.01)
            setattr(proxy, direction, 200 + cut)  # the handshake has less
            for key, row in zip(keys, rows, strict=True):
                await client.set(key, row)
            out = np.empty_like(rows)
            assert (await client.mget(keys, out=out)).all()
            assert (out == rows).all()
            for got, row in zip(await client.mget(keys), rows, strict=True):
                assert (got == row).all()
        assert proxy.cuts >= 4


@pytest.mark.parametrize("server", ["valkey"], indirect=True)
@pytest.mark.parametrize("way", ["unix", "tcp"])
async def test_reads_and_sets_survive_every_kind_of_end(url: str, tmp_path: Path, way: str) -> None:
    rows = np.random.default_rng(5).integers(0, 1 << 16, (20, *STATE), np.uint16)
    keys = [f"k{i}" for i in range(20)]
    kinds: list[Ending] = ["close", "reset", "half"]
    for ending in kinds:
        # The handshake has less, of bytes and of replies.
        script = [
            Faults(cut_down=30_000),
            Faults(refusing=True),
            Faults(cut_down=20),
            Faults(cut_up=30_000),
            Faults(cut_up=20),
            Faults(cut_replies=20),
            Faults(cut_replies=25),
        ]
        if ending == "half":  # who is not read and not told of it hears nothing until its timeout
            script = [faults for faults in script if faults.cut_up is None]
        for faults in script:
            faults.ending = ending
        with Proxy(url, tmp_path if way == "unix" else None, script) as proxy:
            async with aionpredis.connect(proxy.url, timeout=20) as client:
                for _ in range(10):
                    for key, row in zip(keys, rows, strict=True):
                        await client.set(key, row)
                    out = np.empty_like(rows)
                    assert (await client.mget(keys, out=out)).all()
                    assert (out == rows).all()
            assert proxy.connections == len(script) + 1
            assert proxy.cuts == len(script) - 1


async def test_command_that_is_not_repeatable_is_not_repeated(proxy: Proxy) -> None:
    async with aionpredis.connect(proxy.url) as client:
        proxy.stalled = True

        async def cut() -> None:
            await anyio.sleep(0.05)
            proxy.cut()
            proxy.stalled = False

        error = None
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(cut)
            try:
                await client.execute("INCR", "steps")
            except OutcomeUnknown as unknown:
                error = unknown
        assert "whether it ran is not known" in str(error)
        assert int(await client.execute("INCR", "steps")) == 1


# --- one of several connections --------------------------------------------------------------------------------------


@asynccontextmanager
async def pair() -> AsyncIterator[tuple[Connection, socket.socket]]:
    """A connection, and its other end."""
    ours, theirs = socket.socketpair()
    connection = connection_on(ours)
    try:
        yield connection, theirs
    finally:
        connection.close()
        theirs.close()


async def arrives(connection: Connection, reply: Reply) -> None:
    """By itself; on trio only tasks that wait receive."""
    if isinstance(connection._ready, AnyioReadiness):
        await connection.wait(reply)
    with anyio.fail_after(20):
        while not reply.done:
            await anyio.sleep(0.001)


async def test_attended_connection_receives_though_nobody_waits() -> None:
    async with pair() as (connection, other):
        first, second, third, fourth = [connection.submit(encode("PING"), Reply()) for _ in range(4)]
        connection.attend()
        connection.attend()
        other.sendall(b"+1\r\n+2\r")
        await arrives(connection, first)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(connection.wait, second)  # now somebody does
            await anyio.sleep(0.01)
            connection.attend()
            other.sendall(b"\n")
        connection.attend()
        other.sendall(b"+3\r\n+4\r\n")
        await arrives(connection, fourth)
        assert [reply.result() for reply in (first, second, third, fourth)] == [b"1", b"2", b"3", b"4"]


async def test_attended_connection_sends_what_is_queued() -> None:
    async with pair() as (connection, other):
        replies = [connection.submit(encode("PING"), Reply()) for _ in range(DEEP + 2)]
        ping = sum(map(len, encode("PING")))
        assert len(other.recv(1 << 16)) == DEEP * ping
        connection.attend()
        other.sendall(b"+PONG\r\n" * DEEP)
        await arrives(connection, replies[DEEP - 1])
        assert len(other.recv(1 << 16)) == 2 * ping


async def test_attended_connection_writes_nothing_for_who_went_away() -> None:
    async with pair() as (connection, other):
        out = np.zeros((1, 1000), np.uint8)
        abandoned = connection.submit(encode("MGET", "a"), rows_reply(b"hdr", row_views(out)))
        last = connection.submit(encode("PING"), Reply())
        connection.attend()
        connection.abandon(abandoned)
        other.sendall(b"*1\r\n$1003\r\nhdr" + b"x" * 1000 + b"\r\n+PONG\r\n")
        await arrives(connection, last)
        assert not out.any()


async def test_attended_connection_is_forgotten_by_the_loop_when_it_closes() -> None:
    async with pair() as (connection, _):
        connection.submit(encode("PING"), Reply())
        connection.attend()
        await anyio.sleep(0.001)
        number = connection._sock.raw.fileno()
        connection.close()
        async with pair() as (successor, other):
            assert successor._sock.raw.fileno() == number
            reply = successor.submit(encode("PING"), Reply())
            with anyio.fail_after(20):
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(successor.wait, reply)
                    await anyio.sleep(0.01)
                    other.sendall(b"+PONG\r\n")
            reply = successor.submit(encode("PING"), Reply())
            successor.attend()
            connection.attend()  # closed as it is
            other.sendall(b"+PONG\r\n")
            await arrives(successor, reply)


async def test_end_of_an_attended_connection_is_known_to_who_waits_later() -> None:
    async with pair() as (connection, other):
        reply = connection.submit(encode("PING"), Reply())
        connection.attend()
        other.close()
        await anyio.sleep(0.01)
        with pytest.raises(ConnectionLost):
            await connection.wait(reply)


# --- throughput's conditions -----------------------------------------------------------------------------------------


async def test_sixty_four_tasks_get_their_own_replies(url: str) -> None:
    async with aionpredis.connect(url) as client:

        async def work(index: int) -> None:
            mine = np.full(STATE, index, np.uint16)
            for turn in range(20):
                await client.set(f"{index}-{turn}", mine + np.uint16(turn))
                got = await client.get(f"{index}-{turn}", out=np.empty_like(mine))
                assert got is not None
                assert (got == index + turn).all()
                assert await client.execute("ECHO", f"{index}:{turn}") == f"{index}:{turn}".encode()

        with anyio.fail_after(30):
            async with anyio.create_task_group() as tasks:
                for index in range(64):
                    tasks.start_soon(work, index)


async def test_deep_queue_is_sent_even_if_the_peer_answers_only_the_last() -> None:
    count = 20 * DEEP
    command = b"*1\r\n$1\r\nA\r\n"
    async with peer(count * len(command), b"+x\r\n" * count) as connection:
        with anyio.fail_after(20):
            async with anyio.create_task_group() as tasks:
                for _ in range(count):
                    tasks.start_soon(ask, connection, "A")


async def test_both_directions_move_when_both_buffers_are_full() -> None:
    # A peer that takes the next request only when its replies are taken: 64 MB each way.
    size = 8 << 20
    command = encode("SET", "k", bytes(size))
    total = sum(map(len, command))
    answer = b"$%d\r\n%b\r\n" % (size, bytes(size))
    steps = [step for _ in range(8) for step in (total - size // 2, answer, size // 2)]
    async with peer(*steps) as connection:
        replies = [connection.submit(command, Reply()) for _ in range(8)]
        with anyio.fail_after(20):
            for reply in replies:
                await connection.wait(reply)
        assert all(len(reply.values[0]) == size for reply in replies)


async def test_request_behind_a_full_buffer_reaches_a_peer_that_waits_for_it() -> None:
    # The driver waits for the first reply, for reading only, when the second request is submitted and does not fit.
    first, second = encode("A"), encode("SET", "k", bytes(8 << 20))
    sizes = [sum(map(len, command)) for command in (first, second)]
    async with peer(sizes[0] + sizes[1], b"+first\r\n+second\r\n") as connection:
        with anyio.fail_after(20):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(ask, connection, "A")
                await anyio.sleep(0.05)
                assert await ask(connection, "SET", "k", bytes(8 << 20)) == b"second"


class Fast(PlainSocket):
    """A kernel that takes everything at once, and has all of the reply at once."""

    def __init__(self, raw: socket.socket, reply: bytes) -> None:
        super().__init__(raw)
        self.moved: list[int] = []
        self._reply = memoryview(reply)

    def send(self, buffers: Sequence[Buffer]) -> int:
        self.moved.append(sum(map(len, buffers)))
        return self.moved[-1]

    def receive(self, buffers: Sequence[memoryview]) -> int:
        count = 0
        for buffer in buffers:
            part = self._reply[: len(buffer)]
            buffer[: len(part)] = part
            self._reply = self._reply[len(part) :]
            count += len(part)
        self.moved.append(count)
        return count or -1


async def test_other_tasks_have_their_turn_after_every_megabyte_in_either_direction() -> None:
    size = 16 << 20
    ours, theirs = socket.socketpair()
    with ours, theirs:
        sock = Fast(ours, b"$%d\r\n%b\r\n" % (size, bytes(size)))
        connection = Connection(sock, timeout=10, max_bulk=MAX_BULK)
        turns = 0

        async def count() -> None:
            nonlocal turns
            while True:
                turns += 1
                await anyio.lowlevel.checkpoint()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(count)
            reply = ValueReply()
            await connection.wait(connection.submit(encode("SET", "k", bytes(size), "GET"), reply))
            tasks.cancel_scope.cancel()
        assert len(reply.values[0]) == size
        assert max(sock.moved) < 2 << 20
        assert turns >= 16
        connection.close()


async def test_request_of_many_parts_is_sent_whole(url: str) -> None:
    parts = [bytes([i % 256]) * (1024 + i) for i in range(500)]
    async with aionpredis.connect(url) as client:
        await client.send(b"k", encode("SET", "k", Blob(parts)))
        assert await client.execute("GET", "k") == b"".join(parts)


async def test_what_cannot_be_sent_does_not_block_the_queue() -> None:
    async with peer() as connection:
        unsendable = np.arange(4000, dtype=np.uint8)[::2].data
        with pytest.raises(ConnectionLost, match="sending failed"):
            await connection.wait(connection.submit([unsendable], Reply()))
        assert connection.lost is not None


async def test_sockets_number_may_be_used_again_at_once(url: str) -> None:
    async with aionpredis.connect(url) as client:
        for _ in range(5):
            async with client.blocking() as connection:
                reply = connection.submit(encode("BLPOP", "nothing", "5"), Reply())
                with pytest.raises(ConnectionLost):
                    async with anyio.create_task_group() as tasks:

                        async def close(connection: Connection = connection) -> None:
                            await anyio.sleep(0.01)
                            connection.close()

                        tasks.start_soon(close)
                        try:
                            await connection.wait(reply)
                        except ConnectionLost as error:
                            lost = error
                    raise lost
            async with client.blocking() as connection:  # gets the same number
                with anyio.fail_after(20):
                    assert await ask(connection, "PING") == b"PONG"


async def test_scattered_rows_come_whole_through_a_trickle() -> None:
    rows = np.random.default_rng(3).integers(0, 256, (3, 1000), np.uint8)
    wire = b"*3\r\n" + b"".join(b"$1003\r\nhdr%b\r\n" % row.tobytes() for row in rows)
    steps = [wire[start : start + 37] for start in range(0, len(wire), 37)]
    async with peer(*steps) as connection:
        out = np.zeros_like(rows)
        reply = rows_reply(b"hdr", row_views(out))
        await connection.wait(connection.submit(encode("MGET", "a", "b", "c"), reply))
        assert reply.matched
        assert (out == rows).all()


@pytest.mark.parametrize("anyio_backend", [("asyncio", {"debug": True})], ids=["asyncio-debug"])
async def test_asyncio_debug_mode_finds_nothing(url: str, anyio_backend: Any) -> None:
    assert asyncio.get_running_loop().get_debug()
    async with aionpredis.connect(url) as client:
        async with client.writer() as writer:
            for i in range(50):
                await writer.put(f"k{i}", np.full(STATE, i, np.uint16))
        out = np.empty((50, *STATE), np.uint16)
        assert (await client.mget([f"k{i}" for i in range(50)], out=out)).all()
        assert (out[:, 0, 0] == np.arange(50)).all()
        with anyio.move_on_after(0.01):
            async with client.blocking() as connection:
                await ask(connection, "BLPOP", "nothing", "1")


def test_snapshot_limit_fits_the_requests_that_are_batched() -> None:
    assert MAX_SNAPSHOT > 256 * 1024
