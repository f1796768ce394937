"""Memory that is not needed any more is given back at once: nothing of it waits for the garbage collector.

That comes when many *objects* were made, however large they are. A simulator whose server restarted again and again held the
256 KiB of each broken connection for minutes.
"""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import anyio
import anyio.lowlevel
import numpy as np
import pytest
import redis

import aionpredis
from aionpredis import AionpredisError, Client, ConnectError
from aionpredis.replay.chunk import ChunkBuffer
from aionpredis.wire.advice import chain
from aionpredis.wire.connection import Connection

from .proxy import Proxy
from .replays import fill, replay_of
from .servers import make_server

pytestmark = pytest.mark.anyio


@pytest.fixture(autouse=True)
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def alive(kind: type) -> int:
    return sum(type(each) is kind for each in gc.get_objects())


async def load(client: Client, calls: int) -> None:
    """Some of all that a client does at once."""
    out = np.empty((8, 100))
    for _ in range(calls):
        await client.set("key", out[0])
        await client.get("key", out=out[0])
        await client.mget(["key"] * 8, out=out)
        await client.mget(["key"] * 8)
        await client.mset({"key": out[0]})


@pytest.mark.parametrize("refusing", [False, True])
async def test_broken_connections_are_freed(proxy: Proxy, refusing: bool) -> None:
    before = alive(Connection)
    ended = False

    async def work() -> None:
        while not ended:
            await load(client, 1)

    async with aionpredis.connect(proxy.url) as client:
        async with anyio.create_task_group() as tasks:
            for _ in range(3):
                tasks.start_soon(work)
            for count in range(5):
                await anyio.sleep(0.02)
                proxy.refusing = refusing
                proxy.cut()
                await anyio.sleep(0.02)
                proxy.refusing = False
                while client.stats().reconnects <= count:
                    await anyio.sleep(0.01)
            ended = True
        await load(client, 1)
        assert alive(Connection) - before == 1


async def test_a_connection_that_blocked_is_freed(proxy: Proxy) -> None:
    """One that waits for a policy is not the one that all share."""
    before = alive(Connection)
    async with aionpredis.connect(proxy.url) as client, anyio.create_task_group() as tasks:

        async def watch() -> None:
            async for version in client.policy("p").watch():
                if version.version == 5:
                    return

        tasks.start_soon(watch)
        for _ in range(5):
            await anyio.sleep(0.05)
            proxy.cut()
            await client.policy("p").publish({"w": np.zeros(3)})
        with anyio.fail_after(20):
            while alive(Connection) - before > 2:
                await anyio.sleep(0.05)


async def test_a_silent_connection_is_freed(proxy: Proxy) -> None:
    before = alive(Connection)
    async with aionpredis.connect(proxy.url, timeout=0.2) as client:
        await load(client, 1)
        proxy.stalled = True

        async def heal() -> None:
            while "Stalled" not in client.stats().errors:
                await anyio.sleep(0.01)
            proxy.stalled = False

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(heal)
            tasks.start_soon(load, client, 1)
            tasks.start_soon(load, client, 1)
        assert client.stats().errors["Stalled"]
        assert alive(Connection) - before == 1


@pytest.mark.one_server("a socket that is not there")
@pytest.mark.parametrize("password", [None, "secret"])
async def test_a_failed_attempt_to_connect_leads_to_no_frame_of_its_thread(url: str, password: str | None) -> None:
    """There stand redis-py's connection, and the password: what reports errors shows the frames, too."""
    before = alive(redis.UnixDomainSocketConnection)
    path = url if password else url + "-nobody"
    with pytest.raises(ConnectError) as caught:
        async with aionpredis.connect(path, password=password):
            pass
    led = list(chain(caught.value))[1:]
    assert led or password
    assert [each.__traceback__ for each in led] == [None] * len(led)
    assert alive(redis.UnixDomainSocketConnection) == before


async def put(client: Client, array: Any) -> None:
    async with client.writer(copy=False) as writer:
        await writer.put("key", array)


CALLS: dict[str, Callable[[Client, Any], Awaitable[Any]]] = {
    "set": lambda client, array: client.set("key", array),
    "get": lambda client, array: client.get("key", out=array),
    "mset": lambda client, array: client.mset({"key": array}),
    "mget": lambda client, array: client.mget(["key"] * len(array), out=array),
    "set_record": lambda client, array: client.set_record("key", {"a": array}),
    "writer": put,
}


async def failed(call: Callable[[Client, Any], Awaitable[Any]], client: Client) -> weakref.ref[Any]:
    """The array of a call that failed."""
    array = np.zeros((3, 5000))
    await client.set("key", array[0])
    try:
        await call(client, array)
    except AionpredisError:
        return weakref.ref(array)
    raise AssertionError("it did not fail")


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("fault", ["lost", "unreachable", "refused"])
async def test_a_failed_call_keeps_no_array(proxy: Proxy, stock: redis.Redis, call: str, fault: str) -> None:
    def refuse() -> None:
        stock.acl_setuser("default", enabled=True, nopass=True, commands=["-get", "-mget", "-set"])

    async def broken(client: Client, array: Any) -> None:
        if fault == "refused":
            refuse()
        elif fault == "lost":
            proxy.cut_up = 10
        else:
            proxy.refusing = True
            proxy.cut()
            await anyio.sleep(0.05)
        await CALLS[call](client, array)

    try:
        async with aionpredis.connect(proxy.url, retry_timeout=0) as client:
            array = await failed(broken, client)
            await anyio.lowlevel.checkpoint()
            assert array() is None
    finally:
        stock.acl_setuser("default", enabled=True, nopass=True, commands=["+@all"])


@pytest.mark.parametrize("call", ["set", "mset"])
async def test_what_a_server_could_not_do_yet_keeps_no_array(call: str) -> None:
    """A replica refuses to write."""
    config = {"replicaof": "127.0.0.1 1"}
    with make_server("valkey", config=config) as server:
        async with aionpredis.connect(server.url, retry_timeout=0) as client:
            array: weakref.ref[Any] | None = None

            async def attempt() -> None:
                nonlocal array
                value = np.zeros((3, 5000))
                array = weakref.ref(value)
                with pytest.raises(AionpredisError, match="READONLY"):
                    await CALLS[call](client, value)

            await attempt()
            await anyio.lowlevel.checkpoint()
            assert array is not None
            assert array() is None


@pytest.mark.parametrize("error", [False, True])
async def test_an_actor_that_was_left_keeps_no_buffers(url: str, error: bool) -> None:
    """2.5 MiB, for each actor."""
    before = alive(ChunkBuffer)
    async with aionpredis.connect(url) as client:
        await replay_of(client).begin_run({"w": np.zeros(3)})
        with contextlib.suppress(ZeroDivisionError):
            async with replay_of(client).actor() as actor:
                await actor.join()
                await fill(actor, range(10))
                if error:
                    raise ZeroDivisionError
        assert actor.stats.appended == actor.stats.acknowledged == 10
        assert alive(ChunkBuffer) == before
        with pytest.raises(aionpredis.UsageError):
            await fill(actor, range(1))
        with pytest.raises(aionpredis.UsageError):
            await actor.join()


async def test_an_actor_that_failed_keeps_no_buffers(proxy: Proxy) -> None:
    before = alive(ChunkBuffer), alive(Connection)

    async def attempt() -> None:
        async with aionpredis.connect(proxy.url, retry_timeout=0.1) as client:
            await replay_of(client).begin_run({"w": np.zeros(3)})
            async with replay_of(client).actor() as actor:
                await actor.join()
                proxy.refusing = True
                proxy.cut()
                await fill(actor, range(10))

    with pytest.raises(AionpredisError):
        await attempt()
    assert (alive(ChunkBuffer), alive(Connection)) == before
