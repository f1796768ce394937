"""What a client counts is what has happened, and counting costs nothing that one could see."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import anyio
import numpy as np
import pytest
import redis

import aionpredis
from aionpredis import RunEnded, Server, ServerError, Stats, WriteFailed, Writer

from .proxy import Proxy
from .replays import SCHEMA, data_keys, fill, kill_connections, pause, replay_of, uids

pytestmark = pytest.mark.anyio

STATE = np.arange(80 * 80, dtype=np.uint16).reshape(80, 80)


def new() -> Stats:
    return aionpredis.connect("redis://localhost").stats()


def test_fresh_client_has_done_nothing_and_its_stats_do_not_change() -> None:
    stats = new()
    assert {
        value or 0 for field in dataclasses.fields(stats) if not isinstance(value := getattr(stats, field.name), int)
    }
    with pytest.raises(dataclasses.FrozenInstanceError):
        stats.lost = 1  # type: ignore[misc]
    with pytest.raises(TypeError):
        stats.errors["OOM"] = 1  # type: ignore[index]


@pytest.mark.one_server("a proxy is in front of it")
async def test_bytes_and_requests_are_those_that_travelled(url: str, tmp_path: Path) -> None:
    with Proxy(url, tmp_path) as proxy:
        async with aionpredis.connect(proxy.url) as client:
            before, passed = client.stats(), proxy.passed_up
            await client.set("k", STATE)
            await client.get("k")
            async with client.writer() as writer:
                for i in range(100):
                    await writer.put(f"k{i}", STATE)
            out = np.empty((100, *STATE.shape), STATE.dtype)
            await client.mget([f"k{i}" for i in range(100)], out=out)
            stats = client.stats()
            assert stats.bytes_sent == proxy.passed_up - passed
            assert stats.bytes_received > 101 * STATE.nbytes
            assert 3 < stats.requests - before.requests < 30
            assert (stats.inflight_bytes, stats.retries, stats.reconnects, dict(stats.errors)) == (0, 0, 0, {})


async def test_bytes_in_flight_are_counted_until_they_are_stored_or_dropped(url: str, stock: redis.Redis) -> None:
    async with aionpredis.connect(url) as client:
        pause(stock, 20_000)
        with anyio.move_on_after(0.1):
            async with client.writer(copy=False) as writer:
                for i in range(100):
                    await writer.put(f"k{i}", STATE)
                assert client.stats().inflight_bytes == writer.inflight > 100 * STATE.nbytes
                await writer.flush()
        assert client.stats().inflight_bytes == 0
        stock.client_unpause()
        replay = replay_of(client, lease=20)
        await replay.begin_run()
        with anyio.move_on_after(0.2):
            async with replay.actor() as actor:
                await actor.join()
                pause(stock, 20_000)
                await fill(actor, range(8))
                assert client.stats().inflight_bytes > 0
                await actor.flush()
        assert client.stats().inflight_bytes == 0
        stock.client_unpause()
        async with replay.actor() as actor:
            await actor.join()
            await fill(actor, range(4000))
        batches = await replay.epoch(batch=16)
        await anext(batches)
        assert client.stats().inflight_bytes > 0
        del batches
        gc.collect()
        assert client.stats().inflight_bytes == 0


async def test_waits_are_backpressure(url: str, stock: redis.Redis) -> None:
    async with aionpredis.connect(url) as client:
        async with client.writer(max_inflight=60_000) as writer:
            await writer.put("k", STATE)
            await writer.flush()
            assert client.stats().waits == 0
            pause(stock, 20_000)

            async def put() -> None:
                for i in range(20):
                    await writer.put(f"k{i}", STATE)

            async with anyio.create_task_group() as tasks:
                tasks.start_soon(put)
                with anyio.fail_after(15):
                    while client.stats().waits == 0:
                        await anyio.sleep(0.01)
                stock.client_unpause()


@pytest.mark.one_server("as many connections break as are counted")
async def test_faults_are_counted_by_kind(url: str, stock: redis.Redis) -> None:
    async with aionpredis.connect(url) as client:
        for _ in range(3):
            kill_connections(stock)
            await client.get("k")
        stats = client.stats()
        assert stats.reconnects == 3
        assert stats.retries >= 3
        assert stats.errors["ConnectionLost"] == stats.retries
        stock.lpush("list", "x")
        with pytest.raises(ServerError):
            await client.get("list")
        assert client.stats().errors["WRONGTYPE"] == 1


@pytest.mark.one_server("ACL SETUSER is for each server")
async def test_each_refusal_is_counted_once_whoever_met_it(url: str, stock: redis.Redis) -> None:
    """The server counts what it refuses, too: by calls, batches, readers, samplers, writers, actors, and who was cancelled."""

    def refused() -> dict[str, int]:
        faults: Any = stock.info("errorstats")
        counts = {name.removeprefix("errorstat_"): fact["count"] for name, fact in faults.items()}
        return {code: count for code, count in counts.items() if code != "ERR"}

    stock.acl_setuser("limited", enabled=True, nopass=True, keys=["*"], channels=["*"], commands=["+@all", "-xdel"])
    stock.config_resetstat()
    try:
        async with aionpredis.connect(url.replace("unix://", "unix://limited:x@"), retry_timeout=0.1) as client:
            replay = client.replay("r", SCHEMA, chunk=4, capacity=32)
            await replay.begin_run()
            async with replay.actor() as actor:
                await actor.join()
                with pytest.raises(ServerError, match="NOPERM"):  # it evicts
                    await fill(actor, range(100_000))
            for key in data_keys(stock):
                stock.delete(key)
                stock.lpush(key, "x")
            readers = [await replay.epoch(), await replay.draw_chunks(), await replay.consume(group="g")]
            for attempt in (client.get(key), *map(anext, readers)):
                with contextlib.suppress(ServerError):
                    await attempt
            sampler = await replay.sampler()
            with pytest.raises(ServerError, match="WRONGTYPE"):
                await sampler.sample()
            assert isinstance((await client.call_many([("GET", key), ("XDEL", "x", "1-1")]))[1], ServerError)
            stock.config_set("maxmemory", "1")
            with pytest.raises(ServerError):
                await client.set("k", STATE)
            with pytest.raises(WriteFailed):
                await client.mset({f"k{i}": STATE for i in range(3)})
            with pytest.raises(WriteFailed):
                async with client.writer() as writer:
                    for i in range(3):
                        await writer.put(f"k{i}", STATE)
            with anyio.move_on_after(0.2):
                async with replay.actor() as actor:
                    await actor.join()
                    await fill(actor, range(100_000))
            await client.exists("k")  # behind all that was cancelled
            assert refused().keys() == {"NOPERM", "OOM", "WRONGTYPE"}
            assert client.stats().errors == refused()
    finally:
        stock.config_set("maxmemory", "0")
        stock.acl_deluser("limited")


@pytest.mark.one_server("a proxy is in front of it")
async def test_repeated_items_and_chunks_are_counted(url: str, stock: redis.Redis, tmp_path: Path) -> None:
    with Proxy(url, tmp_path) as proxy:

        async def travels(passed: int) -> None:
            """Until more than so many bytes are on their way to the server, which does not take them."""
            with anyio.fail_after(15):
                while proxy.passed_up <= passed:
                    await anyio.sleep(0.005)

        async with aionpredis.connect(proxy.url) as client:
            replay = replay_of(client, lease=20)
            await replay.begin_run()
            async with replay.actor() as actor:
                await actor.join()
                pause(stock, 20_000)
                passed = proxy.passed_up
                await fill(actor, range(4))
                await travels(passed)
                proxy.cut()
                stock.client_unpause()
                await actor.flush()
            assert client.stats().repeated == 1
            async with client.writer() as writer:
                pause(stock, 20_000)
                passed = proxy.passed_up
                for i in range(3):
                    await writer.put(f"k{i}", STATE)
                await travels(passed + STATE.nbytes)
                proxy.cut()
                stock.client_unpause()
            assert client.stats().repeated >= 2


async def test_transitions_and_chunks_are_counted_over_all_actors_and_readers(url: str, stock: redis.Redis) -> None:
    async with aionpredis.connect(url) as client:
        replay = replay_of(client, lease=20)
        run = await replay.begin_run()
        async with replay.actor() as first, replay.actor() as second:
            await first.join()
            await second.join()
            await fill(first, range(8))
            await fill(second, range(8, 12))
            await first.flush()
            await second.flush()
            assert (client.stats().acknowledged, client.stats().stale) == (12, 0)
            keys: Any = sorted(stock.keys(f"r:{run.run}:*"))
            stock.delete(keys[0])
            with pytest.warns(RuntimeWarning, match="not on the server"):
                assert len(await uids(await replay.epoch())) == 8
            assert (client.stats().lost, client.stats().evicted) == (1, 0)
            reading = await replay.epoch(run)
            await replay.begin_run(keep=2)
            await fill(first, range(2))
            with pytest.raises(RunEnded):
                await first.flush()
            assert (client.stats().acknowledged, client.stats().stale) == (12, 2)
            assert await replay.drop(run) == 2
            assert await uids(reading) == []
            assert client.stats().lost == 1


async def test_writers_may_be_opened_and_closed_while_another_thread_asks(url: str) -> None:
    """Metrics are exported by a thread of their own, which may be interrupted at each writer."""

    class Asked(Writer):
        @property
        def inflight(self) -> int:
            with ThreadPoolExecutor(1) as other:
                other.submit(client.counters.writers.add, client.writer()).result()
            return super().inflight

    async with aionpredis.connect(url) as client:
        async with Asked(client, max_inflight=1, copy=True, ttl=None, codec=None):
            assert client.stats().inflight_bytes == 0
            assert len(client.counters.writers) == 2


def metrics_of(reader: Any) -> dict[str, list[tuple[float, dict[str, Any]]]]:
    data = reader.get_metrics_data()
    return {
        metric.name: [(point.value, dict(point.attributes)) for point in metric.data.data_points]
        for resource in data.resource_metrics
        for scope in resource.scope_metrics
        for metric in scope.metrics
    }


@pytest.mark.one_server("the metrics name one address")
async def test_open_telemetry_reads_the_counters(server: Server, url: str, stock: redis.Redis) -> None:
    sdk = pytest.importorskip("opentelemetry.sdk.metrics")
    export = pytest.importorskip("opentelemetry.sdk.metrics.export")
    from aionpredis.telemetry import COUNTERS, observe

    reader = export.InMemoryMetricReader()
    provider = sdk.MeterProvider([reader])
    async with aionpredis.connect(url) as client:
        observe(client, provider)
        await client.set("k", STATE)
        kill_connections(stock)
        await client.get("k")
        stats = client.stats()
        metrics = metrics_of(reader)
        place = {"db.system.name": "redis", "server.address": url.removeprefix("unix://")}
        for field, (name, _, _) in COUNTERS.items():
            assert metrics[name] == [(getattr(stats, field), place)]
        assert metrics["aionpredis.client.io"] == [
            (stats.bytes_sent, place | {"network.io.direction": "transmit"}),
            (stats.bytes_received, place | {"network.io.direction": "receive"}),
        ]
        assert metrics["aionpredis.client.inflight"] == [(0, place)]
        (errors,) = metrics["aionpredis.client.errors"]
        assert errors == (stats.errors["ConnectionLost"], place | {"error.type": "ConnectionLost"})
    provider.shutdown()


def test_open_telemetry_is_told_where_the_server_is_and_no_secret() -> None:
    pytest.importorskip("opentelemetry.sdk.metrics")
    from aionpredis.telemetry import _place

    for url in (
        "redis://user:hunter2@example.org:7000/1",
        "redis+cluster://user:hunter2@example.org:7000,b:7001",
        "redis+sentinel://example.org:7000,b/service",
    ):
        client = aionpredis.connect(url)
        assert _place(client.url) == {"db.system.name": "redis", "server.address": "example.org", "server.port": 7000}
