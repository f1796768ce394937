"""Policies: versions are immutable, and announced when they are there."""

from __future__ import annotations

import time
from typing import Any

import anyio
import ml_dtypes
import numpy as np
import pytest
import redis

import aionpredis
from aionpredis import EncodeError, Policy, UsageError, streams

from .replays import kill_connections

pytestmark = pytest.mark.anyio


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
        with pytest.raises(UsageError):
            Policy(client, "p", keep=0)


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
        with anyio.fail_after(5):
            assert await p.latest() is None
        await p.publish(weights(2))
        stock.xadd("{p}:policy", {"token": "dead"}, id="3-0")
        with anyio.fail_after(5):
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


async def test_watchers_wake_at_once(url: str) -> None:
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
        assert max(at for _, at in woken) - published < 1.5


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
        assert len(stock.client_list()) <= 4  # blocked connections were closed


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
            with anyio.fail_after(5):
                version, found = await anext(watch)
        assert version == 1
        assert (found["w"] == 9).all()
