"""Policies: versions are immutable, and announced when they are there."""

from __future__ import annotations

import gc
import json
import os
import threading
import time
from collections.abc import Iterator
from typing import Any

import anyio
import ml_dtypes
import numpy as np
import pytest
import redis
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import aionpredis
from aionpredis import CorruptValue, EncodeError, Policy, UsageError, streams
from aionpredis import policy as policy_module
from aionpredis.server import Server
from aionpredis.wire.connection import Connection

from . import strategies
from .replays import kill_connections
from .servers import make_server, until

pytestmark = pytest.mark.anyio

RECORDS = st.dictionaries(
    st.text(st.characters(codec="utf-8"), max_size=5),
    strategies.arrays([*strategies.RECORD, *strategies.ML_RECORD, np.dtype(">u2"), np.dtype(">f8")]),
    max_size=6,
)
PARTS = st.sampled_from([8, 64, 200, 1000, 1 << 20])


def weights(number: float) -> dict[str, Any]:
    return {"w": np.full((2, 3), number, np.float32), "b": np.full(2, number, ml_dtypes.bfloat16)}


async def test_versions_count_up_and_come_back(url: str) -> None:
    async with aionpredis.connect(url) as client:
        policy = client.policy("p")
        assert await policy.latest() is None
        assert await policy.get(1) is None
        for number in (1, 2, 3):
            assert await policy.publish(weights(number)) == number
        latest = await policy.latest()
        assert latest is not None
        assert latest.version == 3
        assert {name: array.dtype for name, array in latest.weights.items()} == {
            "w": "float32",
            "b": ml_dtypes.bfloat16,
        }
        assert (latest.weights["w"] == 3).all()
        assert (latest.weights["b"] == 3).all()
        second = await policy.get(2)
        assert second is not None
        assert (second.weights["w"] == 2).all()
        with pytest.raises(EncodeError):
            await policy.publish({"x": np.array(["no"])})
        assert await policy.publish(weights(4)) == 4


async def test_old_versions_are_deleted_and_the_others_never_change(url: str, stock: redis.Redis) -> None:
    async with aionpredis.connect(url) as client:
        policy = client.policy("p", keep=2)
        values: dict[Any, Any] = {}
        for number in range(1, 6):
            await policy.publish(weights(number))
            keys: list[Any] = stock.keys("p:policy:*")
            assert len(keys) == min(number, 2)
            assert {stock.pttl(key) for key in keys} == {-1}
            for key in keys:
                assert values.setdefault(key, stock.get(key)) == stock.get(key)
            assert stock.xlen("{p}:policy") == len(keys)
        assert await policy.get(3) is None
        assert (await policy.get(4)) is not None
        for wrong in (0, 1.5, True, "x"):
            with pytest.raises(UsageError, match="keep"):
                Policy(client, "p", keep=wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", [-1, 10**30, True, 1.5, "x"], ids=str)
async def test_what_is_no_version_is_a_usage_error(url: str, wrong: Any) -> None:
    async with aionpredis.connect(url) as client:
        policy = client.policy("p")
        with pytest.raises(UsageError, match="a version is"):
            await policy.get(wrong)
        with pytest.raises(UsageError, match="a version is"):
            policy.watch(after=wrong)
        assert await policy.get(0) is None  # what a run without a policy says


async def test_publishers_at_the_same_moment_get_different_versions(url: str, stock: redis.Redis) -> None:
    async with aionpredis.connect(url) as a, aionpredis.connect(url) as b:
        versions: dict[int, int] = {}

        async def publish(client: aionpredis.Client, number: int) -> None:
            versions[await client.policy("p", keep=99).publish(weights(number))] = number

        async with anyio.create_task_group() as tasks:
            for number in range(8):
                tasks.start_soon(publish, (a, b)[number % 2], number)
        assert sorted(versions) == list(range(1, 9))
        for version, number in versions.items():
            found = await a.policy("p").get(version)
            assert found is not None
            assert (found.weights["w"] == number).all()
        assert len(stock.keys("p:policy:*")) == 8


@pytest.mark.one_server("MONITOR shows what one server gets")
async def test_weights_are_announced_when_they_are_there_and_kept_when_announced(url: str, stock: redis.Redis) -> None:
    async with aionpredis.connect(url) as client:
        with stock.monitor() as monitor:  # type: ignore[no-untyped-call]
            await client.policy("p").publish(weights(1))
            stock.echo("end")
            commands: list[str] = []
            while not commands or "end" not in commands[-1]:
                commands.append(monitor.next_command()["command"])
    steps = [command for command in commands if command.split()[0] in ("SET", "XADD", "PERSIST")]
    assert [command.split()[0] for command in steps] == ["SET", "XADD", "PERSIST"]
    assert " PX 60000" in steps[0]


async def test_publisher_killed_before_the_announcement_leaves_a_key_with_a_time_to_live(
    url: str, stock: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def killed(*arguments: Any, **options: Any) -> Any:
        raise ZeroDivisionError

    async with aionpredis.connect(url) as client:
        with monkeypatch.context() as patch:
            patch.setattr(streams, "claim", killed)
            with pytest.raises(ZeroDivisionError):
                await client.policy("p").publish(weights(1))
        (key,) = stock.keys("p:*")
        assert 0 < stock.pttl(key) <= 60_000
        assert await client.policy("p").latest() is None
        assert await client.policy("p").publish(weights(1)) == 1


async def test_version_whose_weights_are_gone_is_passed_over(url: str, stock: redis.Redis) -> None:
    """Its publisher died when it had just announced it."""
    async with aionpredis.connect(url) as client:
        p = client.policy("p")
        stock.xadd("{p}:policy", {"token": "dead"}, id="1-0")
        with anyio.fail_after(20):
            assert await p.latest() is None
        await p.publish(weights(2))
        stock.xadd("{p}:policy", {"token": "dead"}, id="3-0")
        with anyio.fail_after(20):
            latest = await p.latest()
            assert latest is not None
            assert latest.version == 2
            watch = p.watch()
            assert (await anext(watch)).version == 2
            with anyio.move_on_after(0.1) as scope:
                await anext(watch)
            assert scope.cancelled_caught
            await p.publish(weights(4))
            assert (await anext(watch)).version == 4


async def test_lease_that_ran_out_before_the_announcement_makes_another_version(
    url: str, stock: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim = streams.claim
    expired: list[int] = []

    async def late(client: Any, stream: str, left: int, fields: Any, **options: Any) -> Any:
        if not expired:
            expired.append(stock.delete(*stock.keys("p:policy:*")))
        return await claim(client, stream, left, fields, **options)

    monkeypatch.setattr(streams, "claim", late)
    async with aionpredis.connect(url) as client:
        p = client.policy("p")
        assert await p.publish(weights(1)) == 2
        latest = await p.latest()
        assert latest is not None
        assert latest.version == 2


async def test_watchers_wake_at_once(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aionpredis.Client, "block_seconds", 20.0)
    async with aionpredis.connect(url) as client, aionpredis.connect(url) as publisher:
        woken: list[tuple[int, float]] = []

        async def watch() -> None:
            version, found = await anext(client.policy("p").watch())
            assert (found["w"] == 1).all()
            woken.append((version, time.monotonic()))

        async with anyio.create_task_group() as tasks:
            for _ in range(10):
                tasks.start_soon(watch)
            await anyio.sleep(0.2)
            assert not woken
            published = time.monotonic()
            await publisher.policy("p").publish(weights(1))
        assert [version for version, _ in woken] == [1] * 10
        assert max(at for _, at in woken) - published < 10  # and not when the blocking read returns


async def test_watch_skips_over_what_is_not_the_newest(url: str) -> None:
    async with aionpredis.connect(url) as client:
        p = client.policy("p")
        watch = p.watch()
        for number in (1, 2, 3):
            await p.publish(weights(number))
        assert (await anext(watch)).version == 3
        await p.publish(weights(4))
        assert (await anext(watch)).version == 4
        assert (await anext(p.watch(after=3))).version == 4
        with anyio.move_on_after(0.05) as scope:
            await anext(p.watch(after=4))
        assert scope.cancelled_caught


async def test_cancelled_watch_can_go_on(url: str, stock: redis.Redis) -> None:
    async with aionpredis.connect(url) as client:
        p = client.policy("p")
        watch = p.watch()
        for _ in range(3):
            with anyio.move_on_after(0.03) as scope:
                await anext(watch)
            assert scope.cancelled_caught
        await p.publish(weights(1))
        assert (await anext(watch)).version == 1
        # Those that blocked are closed. (One that was being made is, too, when its thread has made it.)
        with anyio.fail_after(20):
            while len(stock.client_list()) > 4:
                await anyio.sleep(0.01)


async def test_watch_survives_broken_connections(url: str, stock: redis.Redis) -> None:
    async with aionpredis.connect(url) as client:
        p = client.policy("p")
        async with anyio.create_task_group() as tasks:
            found: list[int] = []

            async def watch() -> None:
                found.append((await anext(p.watch())).version)

            tasks.start_soon(watch)
            for _ in range(2):
                await anyio.sleep(0.05)
                kill_connections(stock)
            await p.publish(weights(1))
        assert found == [1]


@pytest.mark.parametrize("before", [1, 3])
async def test_watch_goes_on_when_the_policy_was_deleted_and_begins_anew(
    url: str, stock: redis.Redis, before: int
) -> None:
    async with aionpredis.connect(url, timeout=0.6) as client:  # blocking reads return after half of it
        p = client.policy("p")
        for number in range(before):
            await p.publish(weights(number))
        watch = p.watch()
        assert (await anext(watch)).version == before
        await p.delete()
        assert stock.keys() == []
        await p.delete()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(p.publish, weights(9))
            with anyio.fail_after(20):
                version, found = await anext(watch)
        assert version == 1
        assert (found["w"] == 9).all()


# --- weights of several records --------------------------------------------------------------------------------------


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """At most 16 bytes of data in a record."""
    with monkeypatch.context() as patch:
        patch.setattr(policy_module, "PART", 16)
        yield


def large(number: float) -> dict[str, Any]:
    """Six records of 16 bytes: w in 2 rows each, then x in 4 items each."""
    return {
        "n": np.array(number, np.float64),
        "w": np.full((4, 2), number, np.float32),
        "x": np.full((1, 11), number, np.float32),
    }


def number_of(weights: dict[str, Any]) -> float:
    """What they were made of; fails if they were made of several numbers."""
    number = float(weights["n"])
    expected = large(number)
    assert list(weights) == list(expected)
    assert all(strategies.same(weights[name], expected[name]) for name in expected)
    return number


def policy_keys(stock: redis.Redis) -> list[str]:
    found: Any = stock.keys("p:policy:*")
    return sorted(key.decode() for key in found)


def unnamed(stock: redis.Redis) -> list[str]:
    """Keys that no version names."""
    entries: Any = stock.xrange("{p}:policy")
    tokens = {fields[b"token"].decode() for _, fields in entries}
    return [key for key in policy_keys(stock) if key.split(":")[3] not in tokens]


async def test_a_large_weight_that_is_not_contiguous_is_cut_in_a_thread(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop, threads = threading.get_ident(), set()

    def cut(array: Any, cut: Any = policy_module._cut) -> Any:
        threads.add(threading.get_ident() != loop)
        return cut(array)

    monkeypatch.setattr(policy_module, "_cut", cut)
    monkeypatch.setattr(policy_module, "PART", 300_000)
    async with aionpredis.connect(url) as client:
        policy = client.policy("pi")
        for array, in_thread in ((np.arange(400_000)[None, ::2], True), (np.arange(200_000)[None], False)):
            threads.clear()
            await policy.publish({"w": array})
            assert threads == {in_thread}
            latest = await policy.latest()
            assert latest is not None
            assert strategies.equal(latest.weights["w"], np.ascontiguousarray(array))


@given(weights=RECORDS, part=PARTS)
def test_split_makes_parts_that_fit_and_cuts_no_more_than_it_must(weights: dict[str, Any], part: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(policy_module, "PART", part)
        parts, shapes = policy_module._split(weights)
    sizes = [sum(array.nbytes for array in each.values()) for each in parts]
    assert max(sizes) <= part
    assert shapes == {name: array.shape for name, array in weights.items() if array.nbytes > part}
    assert list(dict.fromkeys(name for each in parts for name in each)) == list(weights)
    for size, following in zip(sizes, parts[1:], strict=False):
        assert size + next(iter(following.values())).nbytes > part
    for name, array in weights.items():
        pieces = [each[name] for each in parts if name in each]
        assert {piece.dtype for piece in pieces} == {array.dtype}
        assert b"".join(piece.tobytes() for piece in pieces) == array.tobytes()
        if array.nbytes and array.flags.c_contiguous:
            assert all(np.shares_memory(piece, array) for piece in pieces)


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(weights=RECORDS, part=PARTS, codec=st.sampled_from([None, "lz4"]))
def test_weights_of_any_size_come_back_exactly_and_belong_to_the_caller(
    server: Server, stock: redis.Redis, anyio_backend: Any, weights: dict[str, Any], part: int, codec: str | None
) -> None:
    async def main() -> None:
        async with aionpredis.connect(server.url, codec=codec) as client:
            policy = client.policy("p")
            await policy.delete()
            assert await policy.publish(weights) == 1
            for found in (await policy.latest(), await policy.get(1), await anext(policy.watch())):
                assert found is not None
                assert list(found.weights) == list(weights)
                for name, array in weights.items():
                    got = found.weights[name]
                    assert strategies.same(got, array.astype(array.dtype.newbyteorder("=")))
                    assert got.flags.writeable
                    assert got.flags.c_contiguous
                    assert got.flags.aligned
                    got[...] = np.zeros((), got.dtype)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(policy_module, "PART", part)
        anyio.run(main, backend=anyio_backend[0], backend_options=anyio_backend[1])


@pytest.mark.usefixtures("small_parts")
async def test_each_part_is_a_file_that_stock_safetensors_reads(url: str, stock: redis.Redis) -> None:
    async with aionpredis.connect(url) as client:
        assert await client.policy("p").publish(large(1)) == 1
    entries: Any = stock.xrange("{p}:policy")
    ((_, fields),) = entries
    assert fields[b"parts"] == b"6"
    shapes = json.loads(fields[b"shapes"])
    assert shapes == {"w": [4, 2], "x": [1, 11]}
    pieces: dict[str, list[Any]] = {}
    for part in range(6):
        value: Any = stock.get(f"p:policy:1:{fields[b'token'].decode()}:{part}")
        for name, array in safetensors.numpy.load(value).items():
            pieces.setdefault(name, []).append(array)
    assert [piece.shape for piece in pieces["w"]] == [(2, 2), (2, 2)]
    whole = {name: np.concatenate(arrays) if len(arrays) > 1 else arrays[0] for name, arrays in pieces.items()}
    assert number_of({name: whole[name].reshape(shapes.get(name, whole[name].shape)) for name in "nwx"}) == 1


@pytest.mark.one_server("MONITOR shows what one server gets")
@pytest.mark.usefixtures("small_parts")
async def test_all_parts_are_there_before_the_announcement_and_kept_after_it(url: str, stock: redis.Redis) -> None:
    async with aionpredis.connect(url) as client:
        with stock.monitor() as monitor:  # type: ignore[no-untyped-call]
            await client.policy("p").publish(large(1))
            stock.echo("end")
            commands: list[str] = []
            while not commands or "end" not in commands[-1]:
                commands.append(monitor.next_command()["command"])
    steps = [command.split() for command in commands if command.split()[0] in ("SET", "XADD", "PERSIST")]
    assert [step[0] for step in steps] == ["SET"] * 6 + ["XADD"] + ["PERSIST"] * 6
    assert [step[1] for step in steps[:6]] == [step[1] for step in steps[7:]]
    assert [int(step[-1]) for step in steps[:6]] == [60_000 * left for left in (6, 5, 4, 3, 2, 1)]
    assert {stock.pttl(key) for key in policy_keys(stock)} == {-1}


@pytest.mark.usefixtures("small_parts")
async def test_deleting_a_version_deletes_all_its_parts(url: str, stock: redis.Redis) -> None:
    async with aionpredis.connect(url) as client:
        policy = client.policy("p", keep=2)
        for number in range(1, 5):
            await policy.publish(large(number) if number % 2 else weights(number))
        assert len(policy_keys(stock)) == 6 + 2  # weights() are 28 bytes: w in 2 pieces, b with the second
        assert unnamed(stock) == []
        await policy.delete()
        assert stock.keys() == []


@pytest.mark.parametrize("moment", ["the first page was read", "all was read", "the stream was seen to be empty"])
async def test_weights_that_are_published_while_a_policy_is_deleted_do_not_stay(
    url: str, stock: redis.Redis, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    page, ask = streams.page, streams.ask
    async with aionpredis.connect(url) as client, aionpredis.connect(url) as other:
        policy, publisher = client.policy("p"), other.policy("p")
        await publisher.publish(weights(1))
        published: list[int] = []

        async def publish(now: str) -> None:
            if now == moment and not published:
                published.append(0)
                published[0] = await publisher.publish(weights(2))

        async def reading(*args: Any, **options: Any) -> list[streams.Entry]:
            entries = await page(*args, **options)
            await publish("the first page was read" if entries else "all was read")
            return entries

        async def asking(connection: Connection, *commands: Any) -> list[Any]:
            if commands[0][0] == "MULTI":
                await publish("the stream was seen to be empty")
            return await ask(connection, *commands)

        monkeypatch.setattr(streams, "page", reading)
        monkeypatch.setattr(streams, "ask", asking)
        assert await policy.delete() == 3
        assert published == [2]
        assert stock.keys() == []
        assert await publisher.publish(weights(3)) == 1
        assert await policy.delete() == 2
        assert stock.keys() == []


async def test_policy_that_is_not_there_is_deleted(url: str, stock: redis.Redis) -> None:
    async with aionpredis.connect(url) as client:
        assert await client.policy("p").delete() == 0
        assert stock.keys() == []


@pytest.mark.parametrize("delete", [False, True])
async def test_weights_whose_announcement_a_failover_took_are_deleted(
    url: str, stock: redis.Redis, delete: bool
) -> None:
    async with aionpredis.connect(url) as client:
        policy = client.policy("p")
        for version in range(1, 4):
            assert await policy.publish({"w": np.full(3, version)}) == version
        stock.xdel("{p}:policy", "2-0", "3-0")
        kill_connections(stock)
        assert len(unnamed(stock)) == 2
        if delete:
            await policy.delete()
            assert not [*stock.scan_iter("*")]
        else:
            await policy.publish({"w": np.full(3, 4)})
            assert unnamed(stock) == []
            first, last = await policy.get(1), await policy.latest()
            assert first is not None
            assert last is not None
            assert [int(each.weights["w"][0]) for each in (first, last)] == [1, 4]


async def test_old_weights_that_a_failover_brought_back_are_deleted(url: str, stock: redis.Redis) -> None:
    async with aionpredis.connect(url) as client:
        policy = client.policy("p", keep=2)
        for version in range(1, 6):
            await policy.publish({"w": np.full(3, version)})
        old = [f"p:policy:{version}:{fields[b'token'].decode()}" for (version, _), fields in policy._published[:3]]
        assert stock.exists(*old) == 0
        for _ in range(2):  # the one may be undone as the other was
            for key in old:
                stock.set(key, b"as before")
            kill_connections(stock)
            await policy.publish({"w": np.full(3, 6)})
            assert unnamed(stock) == []
            assert len(stock.keys("p:policy:*")) == 2


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("how", ["killed", "cancelled"])
async def test_publisher_that_dies_at_any_step_leaves_nothing_unnamed_after_its_lease(
    url: str, stock: redis.Redis, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    steps = 0
    for fatal in range(1, 9):  # 6 SETs, the announcement, PERSIST
        async with aionpredis.connect(url) as client:
            steps = 0
            scope = anyio.CancelScope()

            def dying(name: str, *, steps_to_death: int = fatal, scope: anyio.CancelScope = scope) -> Any:
                original = getattr(client, name)

                async def step(*arguments: Any, **options: Any) -> Any:
                    nonlocal steps
                    steps += arguments[0] == "XADD" or name != "call"
                    if steps == steps_to_death:
                        if how == "killed":
                            raise ZeroDivisionError
                        scope.cancel()
                    return await original(*arguments, **options)

                return step

            with monkeypatch.context() as patch:
                patch.setattr(policy_module, "LEASE", 0.05)
                for name in ("send", "call", "call_many"):
                    patch.setattr(client, name, dying(name))
                try:
                    with scope:
                        await client.policy("p").publish(large(fatal))
                except ZeroDivisionError:
                    pass
            assert steps == fatal
            assert all(stock.pttl(key) != -1 for key in unnamed(stock))
            until(lambda: not unnamed(stock), "nothing unnamed")
            version = await client.policy("p").publish(large(fatal + 0.5))
            found = await client.policy("p").latest()
            assert found is not None
            assert found.version == version
            assert number_of(found.weights) == fatal + 0.5
            await client.policy("p").delete()


@pytest.mark.usefixtures("small_parts")
async def test_one_part_whose_lease_ran_out_makes_another_version_and_leaves_nothing(
    url: str, stock: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim = streams.claim
    expired: list[Any] = []

    async def late(client: Any, stream: str, left: int, fields: Any, **options: Any) -> Any:
        if not expired:
            expired.append(stock.delete(policy_keys(stock)[2]))
        return await claim(client, stream, left, fields, **options)

    monkeypatch.setattr(streams, "claim", late)
    async with aionpredis.connect(url) as client:
        policy = client.policy("p")
        assert await policy.publish(large(1)) == 2
        assert [key.split(":")[2] for key in policy_keys(stock)] == ["2"] * 6
        assert await policy.get(1) is None
        latest = await policy.latest()
        assert latest is not None
        assert number_of(latest.weights) == 1


@pytest.mark.usefixtures("small_parts")
async def test_publishers_of_several_parts_at_the_same_moment_do_not_mix_them(url: str, stock: redis.Redis) -> None:
    async with aionpredis.connect(url) as a, aionpredis.connect(url) as b:
        versions: dict[int, int] = {}

        async def publish(client: aionpredis.Client, number: int) -> None:
            versions[await client.policy("p", keep=99).publish(large(number))] = number

        async with anyio.create_task_group() as tasks:
            for number in range(6):
                tasks.start_soon(publish, (a, b)[number % 2], number)
        assert sorted(versions) == list(range(1, 7))
        for version, number in versions.items():
            found = await a.policy("p").get(version)
            assert found is not None
            assert number_of(found.weights) == number
        assert len(policy_keys(stock)) == 6 * 6


@pytest.mark.usefixtures("small_parts")
async def test_reader_whose_version_is_deleted_between_its_parts_gets_the_next(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with aionpredis.connect(url) as client, aionpredis.connect(url) as publisher:
        get_value = client.get_value
        publish = publisher.policy("p", keep=1).publish
        await publish(large(1))
        deleted = False

        async def overtaken(key: Any, **how: Any) -> Any:
            nonlocal deleted
            if key.endswith(":2") and not deleted:
                deleted = True
                await publish(large(2))
            return await get_value(key, **how)

        monkeypatch.setattr(client, "get_value", overtaken)
        found = await client.policy("p").latest()
        assert found is not None
        assert found.version == 2
        assert number_of(found.weights) == 2
        deleted = False
        assert await client.policy("p").get(2) is None


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("items", [1, 3, 5, 40])
async def test_parts_that_do_not_fit_together_are_an_error(url: str, stock: redis.Redis, items: int) -> None:
    async with aionpredis.connect(url) as client:
        await client.policy("p").publish({"x": np.arange(10, dtype=np.float32)})
        await client.set_record(policy_keys(stock)[1], {"x": np.zeros(items, np.float32)})
        with pytest.raises(CorruptValue, match="'x'"):
            await client.policy("p").latest()


def available() -> int:
    """Bytes of memory."""
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return 0


@pytest.mark.timeout(240)
@pytest.mark.skipif(available() < 5e9, reason="needs 5 GB of memory")
def test_more_than_the_server_takes_in_one_string_travels_in_parts() -> None:
    async def main(url: str) -> None:
        array = np.arange(560 << 17).reshape(-1, 1 << 17)  # 560 MiB
        async with aionpredis.connect(url) as client:
            await client.policy("p").publish({"a": array, "b": np.ones(3)})
            found = await client.policy("p").latest()
            assert found is not None
            assert np.array_equal(found.weights["a"], array)
            assert found.weights["b"].tolist() == [1, 1, 1]

    with make_server("valkey") as server:
        anyio.run(main, server.url)


# --- many at once ----------------------------------------------------------------------------------------------------


def calls(stock: redis.Redis, command: str) -> int:
    found: Any = stock.info("commandstats")
    return int(found.get(f"cmdstat_{command}", {"calls": 0})["calls"])


async def blocked(stock: redis.Redis, count: int) -> None:
    """Wait until so many connections wait at the server."""
    with anyio.fail_after(20):
        while dict(stock.info("clients"))["blocked_clients"] != count:
            await anyio.sleep(0.01)


@pytest.mark.parametrize("size", [10, 300_000])
async def test_watchers_of_one_client_wait_and_fetch_together_and_get_memory_of_their_own(
    url: str, stock: redis.Redis, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(aionpredis.Client, "block_seconds", 20.0)  # none reads a second time
    async with aionpredis.connect(url) as client, aionpredis.connect(url) as publisher:
        found: list[Any] = []

        async def watch() -> None:
            found.append((await anext(client.policy("p").watch())).weights["w"])

        stock.config_resetstat()
        async with anyio.create_task_group() as tasks:
            for _ in range(10):
                tasks.start_soon(watch)
            await anyio.sleep(0.1)
            await blocked(stock, 1)
            await publisher.policy("p").publish({"w": np.arange(size)})
        assert calls(stock, "xread") == 1
        assert calls(stock, "get") <= 10 if size < 1000 else calls(stock, "get") < 4
        for index, array in enumerate(found):
            assert strategies.equal(array, np.arange(size))
            assert array.flags.writeable
            assert not any(np.shares_memory(array, other) for other in found[:index])
            array[:] = -1
        gc.collect()
        assert not policy_module._flights.get(client)


async def test_cancelled_watcher_disturbs_none_of_those_that_wait_with_it(url: str, stock: redis.Redis) -> None:
    async with aionpredis.connect(url) as client, aionpredis.connect(url) as publisher:
        found: list[int] = []
        scopes: list[anyio.CancelScope] = []

        async def watch() -> None:
            with anyio.CancelScope() as scope:
                scopes.append(scope)
                found.append((await anext(client.policy("p").watch())).version)

        async with anyio.create_task_group() as tasks:
            for _ in range(6):
                tasks.start_soon(watch)
            await blocked(stock, 1)
            for scope in (scopes[0], scopes[1], scopes[4]):  # the first one reads, then the second
                scope.cancel()
                await anyio.sleep(0.03)
            await blocked(stock, 1)
            await publisher.policy("p").publish(weights(1))
        assert found == [1] * 3


async def test_download_that_is_cancelled_or_fails_is_not_the_others_loss(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with aionpredis.connect(url) as client:
        await client.policy("p").publish(weights(1))
        get_value = client.get_value
        asked = 0

        async def slow(key: Any, **how: Any) -> Any:
            nonlocal asked
            asked += 1
            if asked == 1:
                await anyio.sleep(99)
            await anyio.sleep(0.05)
            if asked == 3:
                raise CorruptValue("test", key=key)
            return await get_value(key, **how)

        monkeypatch.setattr(client, "get_value", slow)
        found: list[Any] = []

        async def latest(scope: anyio.CancelScope) -> None:
            with scope:
                try:
                    found.append(await client.policy("p").latest())
                except CorruptValue as error:
                    found.append(error)

        async with anyio.create_task_group() as tasks:
            scopes = [anyio.CancelScope() for _ in range(4)]
            tasks.start_soon(latest, scopes[0])
            while not asked:
                await anyio.sleep(0.01)
            for scope in scopes[1:]:
                tasks.start_soon(latest, scope)
            await anyio.sleep(0.05)
            scopes[0].cancel()
        assert [each.version for each in found] == [1] * 3
        assert asked == 2

        found.clear()
        async with anyio.create_task_group() as tasks:
            for _ in range(3):
                tasks.start_soon(latest, anyio.CancelScope())
        assert asked == 3
        assert len({id(error) for error in found}) == 3
        assert {(type(error), error.key[:9]) for error in found} == {(CorruptValue, "p:policy:")}
