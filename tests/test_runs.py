"""Runs: who begins one, and what becomes of the old ones."""

from __future__ import annotations

import time
from typing import Any

import anyio
import numpy as np
import pytest
import redis

import aionpredis
from aionpredis import (
    Client,
    CorruptValue,
    Replay,
    ReplayError,
    ReplayGone,
    Run,
    RunConflict,
    RunEnded,
    ServerError,
    ServerFull,
    streams,
)
from aionpredis.replay import runs
from aionpredis.replay.log import Begin, Names, parse_begin
from aionpredis.wire.connection import Connection

from .replays import SCHEMA, data_keys, fill, kill_connections, log_entries, named_keys, replay_of, uids
from .servers import make_server

pytestmark = pytest.mark.anyio
NAMES = Names("r")


async def write(replay: Replay, uids: range) -> Run:
    async with replay.actor() as actor:
        run = await actor.join()
        await fill(actor, uids)
    return run


async def test_a_run_says_when_it_began_to_everybody(url: str) -> None:
    before = int(time.time())
    async with aionpredis.connect(url) as client:
        run = await replay_of(client).begin_run()
        assert run.begun is not None
        assert before <= run.begun <= time.time()
        assert await replay_of(client).latest_run() == run
        await client.execute("XADD", NAMES.log, f"{run.run + 1}-0", "begin", "t", "policy", "0", "schema", "s")
        assert ((await replay_of(client).latest_run()) or pytest.fail("no run")).begun is None  # nor need it


@pytest.mark.parametrize("at", [b"", b"x", b"-1", b"1.5", b"%d" % 2**53, b"9" * 5000])
def test_a_beginning_at_no_time_is_corrupt(at: bytes) -> None:
    entry = {b"begin": b"t", b"policy": b"0", b"schema": b"s"}
    assert parse_begin(NAMES, 7, entry | {b"at": b"1"}).begun == 1
    with pytest.raises(CorruptValue, match="entry 7-0 does not begin a run"):
        parse_begin(NAMES, 7, entry | {b"at": at})


async def test_runs_count_up_and_the_newest_is_found(url: str) -> None:
    async with aionpredis.connect(url) as client:
        replay = replay_of(client)
        assert await replay.latest_run() is None
        first = await replay.begin_run()
        second = await replay.begin_run()
        assert second.run == first.run + 1
        assert first.run < 2**53
        assert await replay.latest_run() == second
        assert second.schema == SCHEMA.digest
        with pytest.raises(ValueError, match="keep"):
            await replay.begin_run(keep=0)


@pytest.mark.one_server("MONITOR shows what one server gets")
async def test_policy_is_published_before_the_run_begins(url: str, stock: redis.Redis) -> None:
    async with aionpredis.connect(url) as client:
        replay = replay_of(client)
        with stock.monitor() as monitor:  # type: ignore[no-untyped-call]
            run = await replay.begin_run({"w": np.ones(3)})
            stock.echo("end")
            commands: list[str] = []
            while not commands or "end" not in commands[-1]:
                commands.append(monitor.next_command()["command"])
        adds = [command.split()[1] for command in commands if command.startswith("XADD")]
        assert adds == ["{r}:policy", "{r}:log"]
        latest = await replay.policy.latest()
        assert latest is not None
        assert run.policy == latest.version == 1


async def begin_or_conflict(client: Client, results: list[object]) -> None:
    try:
        results.append(await runs.begin(client, NAMES, policy=0, schema="s"))
    except RunConflict as error:
        results.append(error)


class Meeting:
    """Lets several callers go on when all have come this far."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
        self._missing = count
        self._all = anyio.Event()
        self._look = streams.last_generated
        monkeypatch.setattr(streams, "last_generated", self.look)

    async def look(self, *arguments: Any) -> Any:
        last = await self._look(*arguments)
        self._missing -= 1
        if not self._missing:
            self._all.set()
        await self._all.wait()
        return last


@pytest.mark.parametrize("first", [True, False], ids=["first run", "later run"])
async def test_of_trainers_at_the_same_moment_exactly_one_begins(
    url: str, stock: redis.Redis, first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with aionpredis.connect(url) as a, aionpredis.connect(url) as b:
        if not first:
            await runs.begin(a, NAMES, policy=0, schema="s")
        before = stock.xlen("{r}:log")
        Meeting(monkeypatch, 4)
        results: list[object] = []
        async with anyio.create_task_group() as tasks:
            for client in (a, b, a, b):
                tasks.start_soon(begin_or_conflict, client, results)
        assert sorted(type(result).__name__ for result in results) == ["Begin"] + ["RunConflict"] * 3
        assert stock.xlen("{r}:log") == before + 1
        monkeypatch.undo()
        assert await runs.latest(a, NAMES) in results


@pytest.mark.parametrize("how", ["conflict", "deleted"])
async def test_weights_of_a_run_that_another_trainer_began_do_not_stay_the_newest(
    url: str, stock: redis.Redis, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    claim = streams.claim

    async def too_late(client: Client, stream: str, left: int, *arguments: Any, **options: Any) -> bool | None:
        if stream == NAMES.log and how == "conflict":
            stock.xadd("{r}:log", {"begin": "other", "policy": "2", "schema": SCHEMA.digest}, id=f"{left}-0")
        elif stream == NAMES.log:
            stock.delete("{r}:log")
        return await claim(client, stream, left, *arguments, **options)

    async with aionpredis.connect(url) as client:
        replay = replay_of(client)
        await replay.begin_run({"w": np.full(2, 1.0)})
        assert await replay.policy.publish({"w": np.full(2, 2.0)}) == 2  # the other trainer's
        monkeypatch.setattr(streams, "claim", too_late)
        with pytest.raises(RunConflict if how == "conflict" else ReplayGone):
            await replay.begin_run({"w": np.full(2, 3.0)})
        monkeypatch.undo()
        latest = await replay_of(client).policy.latest()
        assert latest is not None
        assert (latest.version, latest.weights["w"].tolist()) == (2, [2, 2])
        assert len(stock.keys("r:policy:*")) == 2
        if how == "conflict":
            run = await replay.begin_run({"w": np.full(2, 4.0)})
            assert run.policy == 4


@pytest.mark.parametrize("number", [1, 2**52])
async def test_first_run_with_another_number_is_a_conflict(url: str, stock: redis.Redis, number: int) -> None:
    """Two trainers find no log in different microseconds: NOMKSTREAM and ids alone would let both begin."""
    async with aionpredis.connect(url) as client:
        entry = {b"begin": b"mine", b"policy": b"0", b"schema": b"s"}
        stock.xadd("{r}:log", {"begin": "other", "policy": "0", "schema": "s"}, id=f"{number}-0")
        assert not await runs._create(client, NAMES, number + 5, entry)
        assert not await runs._create(client, NAMES, number, entry)
        assert stock.xlen("{r}:log") == 1


async def test_conflict_in_the_middle_of_creating(
    url: str, stock: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask = streams.ask

    async def interrupted(connection: Any, *commands: Any) -> Any:
        if commands[0] == ("MULTI",):
            stock.xadd("{r}:log", {"begin": "other", "policy": "0", "schema": "s"}, id="7-0")
        return await ask(connection, *commands)

    monkeypatch.setattr(streams, "ask", interrupted)
    async with aionpredis.connect(url) as client:
        with pytest.raises(RunConflict):
            await runs.begin(client, NAMES, policy=0, schema="s")
    entries: Any = stock.xrange("{r}:log")
    assert [entry_id for entry_id, _ in entries] == [b"7-0"]


@pytest.mark.parametrize("first", [True, False], ids=["first run", "later run"])
async def test_begin_whose_reply_is_lost_has_succeeded(
    url: str, stock: redis.Redis, first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with aionpredis.connect(url) as client:
        if not first:
            await runs.begin(client, NAMES, policy=0, schema="s")
        before = stock.xlen("{r}:log")
        broken: list[Any] = []
        wait = Connection.wait

        async def wait_and_break(connection: Any, reply: Any, **options: Any) -> None:
            await wait(connection, reply, **options)
            if stock.xlen("{r}:log") > before and not broken:  # it ran; its reply does not arrive
                broken.append(reply)
                connection.close()
                raise aionpredis.ConnectionLost("cut")

        monkeypatch.setattr(Connection, "wait", wait_and_break)
        run = await runs.begin(client, NAMES, policy=0, schema="s")
        assert broken
        assert await runs.latest(client, NAMES) == run
        assert stock.xlen("{r}:log") == before + 1


async def test_begin_whose_reply_is_lost_and_that_did_not_arrive_is_a_conflict(
    url: str, stock: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with aionpredis.connect(url) as client:
        run = await runs.begin(client, NAMES, policy=0, schema="s")
        call = client.call

        async def overtaken(*arguments: Any, **options: Any) -> Any:
            if arguments[0] == "XADD":
                stock.xadd("{r}:log", {"begin": "other", "policy": "0", "schema": "s"}, id=f"{run.run + 1}-0")
            return await call(*arguments, **options)

        monkeypatch.setattr(client, "call", overtaken)
        with pytest.raises(RunConflict) as caught:
            await runs.begin(client, NAMES, policy=0, schema="s")
        assert caught.value.run == run.run + 1


async def test_connections_may_break_at_any_time_while_runs_begin(url: str, stock: redis.Redis) -> None:
    async with aionpredis.connect(url) as client:
        replay = replay_of(client)
        begun = []
        for _ in range(10):
            begun.append((await replay.begin_run(keep=99)).run)
            kill_connections(stock)
        assert begun == list(range(begun[0], begun[0] + 10))
        assert stock.xlen("{r}:log") == 10


async def test_log_deleted_meanwhile_is_replay_gone(
    url: str, stock: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with aionpredis.connect(url) as client:
        await runs.begin(client, NAMES, policy=0, schema="s")
        look = streams.last_generated

        async def then_delete(*arguments: Any) -> Any:
            last = await look(*arguments)
            stock.delete("{r}:log")
            return last

        monkeypatch.setattr(streams, "last_generated", then_delete)
        with pytest.raises(ReplayGone):
            await runs.begin(client, NAMES, policy=0, schema="s")
        assert not stock.exists("{r}:log")


async def test_old_runs_are_deleted_data_and_entries(url: str, stock: redis.Redis) -> None:
    async with aionpredis.connect(url) as client:
        replay = replay_of(client)
        numbers = []
        for number in range(4):
            numbers.append((await replay.begin_run(keep=2)).run)
            await write(replay, range(number * 10, number * 10 + 10))
            assert {run for run, *_ in log_entries(stock)} == set(numbers[-2:])
            assert data_keys(stock) == named_keys(stock)
        assert await replay.count(numbers[0]) == 0
        assert await replay.count(numbers[2]) == 10
        assert await replay.leftover_keys(numbers[2]) == []
        assert len(await replay.leftover_keys(numbers[3])) == 3
        assert await replay.delete_runs_before(numbers[3]) == 3
        assert await replay.delete_runs_before(numbers[3]) == 0
        assert await uids(await replay.epoch(shuffle=False)) == list(range(30, 40))


async def test_deleting_goes_on_after_a_crash(url: str, stock: redis.Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the step it dies at: nothing stays that the log does not name."""
    monkeypatch.setattr(runs, "PAGE", 2)
    async with aionpredis.connect(url) as client:
        replay = replay_of(client, chunk=1)
        first = await replay.begin_run()
        await write(replay, range(7))
        second = await replay.begin_run(keep=2)
        await write(replay, range(3))
        call, left = client.call, 0

        async def dying(*arguments: Any, **options: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                raise ZeroDivisionError
            return await call(*arguments, **options)

        for attempt in range(1, 20):
            left = attempt
            monkeypatch.setattr(client, "call", dying)
            try:
                await replay.delete_runs_before(second)
                break
            except ZeroDivisionError:
                monkeypatch.setattr(client, "call", call)
                assert data_keys(stock) <= named_keys(stock)
        else:
            pytest.fail("never finished")
        monkeypatch.setattr(client, "call", call)
        assert await replay.leftover_keys(second) == []
        assert await replay.count(first) == 0
        assert len(data_keys(stock)) == 3
        assert sorted(await uids(await replay.epoch())) == [0, 1, 2]


async def test_fence_survives_an_empty_log(url: str, stock: redis.Redis) -> None:
    async with aionpredis.connect(url) as client:
        replay = replay_of(client)
        await replay.begin_run()
        async with replay.actor() as actor:
            await actor.join()
            second = await replay.begin_run()
            stock.xtrim("{r}:log", maxlen=0, approximate=False)
            with pytest.raises(RunEnded):
                await fill(actor, range(100_000))
        assert log_entries(stock) == []
        assert (await replay.begin_run()).run == second.run + 1


async def test_deleted_replay_leaves_no_key(url: str, stock: redis.Redis) -> None:
    async with aionpredis.connect(url) as client:
        replay = replay_of(client)
        for _ in range(2):
            await replay.begin_run({"w": np.ones(3)}, keep=2)
            await write(replay, range(10))
        await replay.delete()
        assert stock.keys() == []
        await replay.delete()
        assert await replay.latest_run() is None
        await replay.begin_run()


async def test_no_run_begins_while_the_replay_is_being_deleted(url: str, stock: redis.Redis) -> None:
    async with aionpredis.connect(url) as client:
        replay = replay_of(client)
        await replay.begin_run()
        await runs.close(client, NAMES)
        with pytest.raises(ReplayGone, match="delete"):
            await replay.begin_run()
        await replay.delete()
        assert stock.keys() == []


@pytest.mark.parametrize("kind", ["valkey", "redis"])
async def test_server_that_evicts_is_refused(kind: str) -> None:
    config = {"maxmemory": "100mb", "maxmemory-policy": "allkeys-lru"}
    with make_server(kind, config=config) as server, redis.Redis.from_url(server.url) as stock:
        async with aionpredis.connect(server.url) as client:
            with pytest.raises(ReplayError, match="noeviction"):
                await replay_of(client).begin_run({"w": np.ones(3)})
            assert stock.dbsize() == 0
            stock.config_set("maxmemory-policy", "noeviction")
            await replay_of(client).begin_run()


@pytest.mark.parametrize("kind", ["valkey", "redis"])
@pytest.mark.parametrize("keep", [1, 3])
async def test_full_server_loses_its_oldest_run_to_the_new_one(kind: str, keep: int) -> None:
    with make_server(kind) as server, redis.Redis.from_url(server.url) as stock:
        async with aionpredis.connect(server.url) as client:
            replay = client.replay("r", aionpredis.Schema(x=("uint8", (1 << 20,))), chunk=1)
            begun = []
            for _ in range(2):
                begun.append((await replay.begin_run(keep=keep)).run)
                async with replay.actor() as actor:
                    await actor.join()
                    for _ in range(5):
                        await actor.append(x=np.ones(1 << 20, np.uint8))
            # By more than the buffers of clients, which the server shrinks meanwhile.
            stock.config_set("maxmemory", str(stock.info("memory")["used_memory"] - (2 << 20)))
            with pytest.raises(ServerFull):
                await client.set("x", np.ones(10))
            run = await replay.begin_run({"w": np.ones(1000)}, keep=keep)
            assert run.run == begun[-1] + 1
            assert (await replay.policy.latest()) is not None
            assert [await replay.count(number) for number in begun] == ([0, 5] if keep == 3 else [0, 0])
            assert len(data_keys(stock)) == (5 if keep == 3 else 0)


@pytest.mark.parametrize("kind", ["valkey", "redis"])
async def test_full_server_without_any_run_to_delete_is_server_full(kind: str) -> None:
    with make_server(kind) as server, redis.Redis.from_url(server.url) as stock:
        async with aionpredis.connect(server.url) as client:
            replay = replay_of(client)
            first = await replay.begin_run()
            stock.config_set("maxmemory", "1mb")
            stock.config_set("maxmemory", str(stock.info("memory")["used_memory"] // 2))
            with pytest.raises(ServerFull):
                await replay.begin_run({"w": np.ones(3)})
            stock.config_set("maxmemory", "0")
            assert await replay.latest_run() == first


@pytest.mark.parametrize("name", ["", "a:b", "{a}", "a b", "a*", "x" * 129, "ä", "a\n", 5, None])
async def test_names_that_would_change_a_keys_meaning_are_refused(name: Any) -> None:
    with pytest.raises(ValueError, match="name"):
        Names(name)


async def test_entry_that_is_no_begin_is_said_to_be_so(url: str, stock: redis.Redis) -> None:
    stock.xadd("{r}:log", {"hello": "x"}, id="5-0")
    async with aionpredis.connect(url) as client:
        with pytest.raises(aionpredis.CorruptValue, match="5-0"):
            await replay_of(client).latest_run()
        stock.delete("{r}:log")
        stock.set("{r}:log", "x")
        with pytest.raises(ServerError, match="WRONGTYPE"):
            await replay_of(client).begin_run()
    assert Begin is Run


@pytest.mark.parametrize("call", ["begin_run", "delete_runs_before", "drop", "delete"])
async def test_data_that_came_back_with_another_server_are_deleted_again(
    url: str, stock: redis.Redis, call: str
) -> None:
    async with aionpredis.connect(url) as client:
        replay = replay_of(client)
        first = await replay.begin_run()
        await write(replay, range(20))
        await replay.begin_run(keep=2)
        values = {key: stock.get(key) for key in data_keys(stock)}
        assert await replay.drop(first) == len(values) == 5
        second = await write(replay, range(20))
        third = await replay.begin_run(keep=3)
        for key, value in values.items():
            stock.set(key, value or b"")
        await replay.delete_runs_before(first)
        assert await replay.leftover_keys(second) == sorted(values)  # whom nobody lost a connection to has lost nothing
        kill_connections(stock)
        arguments = {"begin_run": (), "delete_runs_before": (second,), "drop": (second,), "delete": ()}
        await getattr(replay_of(client), call)(*arguments[call])  # another object, as who makes one for each run has it
        assert await replay.leftover_keys(second) == []
        assert third.run > second.run
