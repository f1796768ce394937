"""The users of docs/security.md: their rights are enough for their work, and none of them is one too many."""

from __future__ import annotations

import os
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import anyio
import numpy as np
import pytest
import redis

import aionpredis
from aionpredis import Client, NStep, Replay, Schema, streams
from aionpredis.errors import AionpredisError, AuthenticationError, ReplayError, ServerError, WriteFailed
from aionpredis.replay import runs
from aionpredis.replay.chunk import ChunkBuffer
from aionpredis.replay.commit import Committer
from aionpredis.replay.log import ChunkId, Names
from aionpredis.replay.observer import Observer

from .strategies import equal

pytestmark = [pytest.mark.anyio, pytest.mark.one_server("ACL SETUSER is for each server")]

GUIDE = Path(__file__).parent.parent / "docs" / "security.md"
PASSWORD = "canary in a coal mine"
NAME = "pong"
SCHEMA = Schema(state=("uint8", (64, 64)), reward="float32", terminated="bool")
"""``state`` is large enough for a column of its own, which a sampler does not receive with the others."""
WEIGHTS = {"w": np.ones(3, np.float32)}
CHUNK = 2

T = TypeVar("T")


def rules_of(text: str) -> dict[str, list[str]]:
    """Of each user, the rules of its lines."""
    rules: dict[str, list[str]] = {}
    for user, rule in re.findall(r"^ACL SETUSER (\w+) (.+)$", text, re.MULTILINE):
        rules.setdefault(user, []).append(rule)
    return rules


RULES = rules_of(GUIDE.read_text(encoding="utf-8"))

Variant = tuple[str, list[str]]


def reduced(rules: list[str]) -> Iterator[Variant]:
    """The same without one command or pattern, or with a pattern for one direction only; and what was taken away."""
    for line, rule in enumerate(rules):
        for found in re.finditer(r"[+~%][^\s()]+", rule):
            token = found.group()
            others = [""] if token[0] != "~" else ["", f"%R{token}", f"%W{token}"]
            for other in others:
                changed = rule[: found.start()] + other + rule[found.end() :]
                yield f"{rule}: {token} → {other or 'nothing'}", [*rules[:line], changed, *rules[line + 1 :]]


def set_user(stock: redis.Redis, user: str, rules: list[str]) -> None:
    for rule in rules:
        words = rule.replace(">PASSWORD", ">\0").split()
        stock.execute_command("ACL", "SETUSER", user, *(word.replace("\0", PASSWORD) for word in words))  # type: ignore[no-untyped-call]


@pytest.fixture
def users(stock: redis.Redis) -> Iterator[redis.Redis]:
    """All users of the guide."""
    for user, rules in RULES.items():
        set_user(stock, user, rules)
    yield stock
    stock.acl_deluser("both", *RULES)


# --- the work of each role -------------------------------------------------------------------------------------------


class Stage(NamedTuple):
    """``admin``: a client that may everything; ``url``: to connect as somebody else."""

    admin: Client
    url: str

    def replay(self, client: Client, **options: Any) -> Replay:
        return client.replay(NAME, SCHEMA, chunk=CHUNK, **options)

    def connect(self, user: str, **options: Any) -> Client:
        return aionpredis.connect(self.url, username=user, password=PASSWORD, **options)

    async def begin(self, transitions: int = 0, *, keep: int = 9, chunk: int = CHUNK) -> int:
        """A new run with so many transitions."""
        replay = self.admin.replay(NAME, SCHEMA, chunk=chunk)
        run = await replay.begin_run(WEIGHTS, keep=keep)
        if transitions:
            async with replay.actor() as actor:
                await actor.join()
                await append(actor, transitions)
        return run.run

    async def blocked(self, count: int = 1) -> None:
        """Return when so many clients wait for something."""
        while b"blocked_clients:%d\r" % count not in await self.admin.execute("INFO", "clients"):
            await anyio.sleep(0.001)


@asynccontextmanager
async def stage(url: str) -> AsyncIterator[Stage]:
    async with aionpredis.connect(url) as admin:
        await admin.execute("FLUSHALL")
        yield Stage(admin, url)


async def append(actor: aionpredis.Actor, count: int) -> None:
    for step in range(count):
        await actor.append(state=np.full((64, 64), step, np.uint8), reward=step, terminated=step % 5 == 4)


async def act(stage: Stage, client: Client) -> None:
    replay = stage.replay(client, capacity=8 * CHUNK, max_lag=32 * CHUNK)
    first = await stage.begin()
    async with replay.actor() as actor:
        run = await actor.join()
        policy = await replay.policy.get(run.policy)
        assert policy is not None
        await append(actor, 10 * CHUNK)  # more than the capacity
        await actor.flush()
        assert actor.stats.acknowledged == 10 * CHUNK
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(begin_when_blocked, stage)
            assert (await actor.join()).run > run.run
        await append(actor, CHUNK)

    # What a broken connection leads to: a chunk that is there already, of a present and of an older run.
    names, ours, other = Names(NAME), os.urandom(8), os.urandom(8)
    newest = (await stage.replay(stage.admin).latest_run()) or pytest.fail("no run")
    await stage.admin.execute("SET", names.data(first, ChunkId(other, 0, CHUNK, b"")), "x", "PX", 60_000)
    for run_number, incarnation in ((newest.run, ours), (newest.run, ours), (first, ours), (first, other)):
        await commit(client, names, run_number, incarnation)

    # Learners that have read nothing.
    await stage.admin.execute("HSET", names.read, "0", f"{newest.run}:0")
    async with anyio.create_task_group() as tasks:
        async with stage.replay(client, max_lag=CHUNK).actor() as actor:
            await actor.join()
            tasks.start_soon(catch_up, stage, newest.run)
            await append(actor, CHUNK)
            await actor.flush()
            await append(actor, 2 * CHUNK)  # waits


async def catch_up(stage: Stage, run: int) -> None:
    await anyio.sleep(0.005)
    await stage.admin.execute("HSET", Names(NAME).read, "0", f"{run}:99")


async def begin_when_blocked(stage: Stage) -> None:
    await stage.blocked()
    await stage.begin()


async def commit(client: Client, names: Names, run: int, incarnation: bytes) -> None:
    """Commit a chunk as an actor does."""
    settled: list[bool] = []
    committer = Committer(client, names, lease=60.0, settled=lambda _, rows, committed: settled.append(committed))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(committer.work)
        committer.commit(ChunkBuffer(SCHEMA, CHUNK), run, ChunkId(incarnation, 0, CHUNK, b""))
        while not settled:
            await committer.progress()
        tasks.cancel_scope.cancel()
    if committer.failure is not None:
        raise committer.failure


async def learn(stage: Stage, client: Client) -> None:
    first = await stage.begin(3 * CHUNK)
    single = await stage.begin(3, chunk=1)
    run = await stage.begin(6 * CHUNK)
    replay = stage.replay(client, max_lag=100 * CHUNK)
    assert await replay.count() == 6 * CHUNK
    assert sum([len(batch["reward"]) async for batch in await replay.epoch(batch=4)]) == 6 * CHUNK
    for number, n_step in ((run, None), (single, None), (run, NStep(2, discount=0.9))):
        sampler = await replay.sampler(number, batch=4, columns=["state", "reward"], n_step=n_step)
        await sampler.sample()
    await (await replay.draw_chunks(batch=4)).__anext__()

    async def acknowledge(number: int) -> None:
        batches = await replay.consume(number, group="learners", batch=4, reclaim=0.04)
        async for _ in batches:
            await batches.acknowledge()

    await acknowledge(first)
    await acknowledge(single)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(begin_when_blocked, stage)
        async for _ in await replay.follow(run, batch=4):
            pass


async def train(stage: Stage, client: Client) -> None:
    replay = stage.replay(client)
    run = await replay.begin_run(WEIGHTS)
    # Another one had begun the first run just before.
    entry = {b"begin": b"", b"policy": b"0", b"schema": b""}
    assert not await runs._create(client, Names(NAME), run.run + 5, entry)
    for _ in range(2):
        await client.policy(NAME, keep=1).publish(WEIGHTS)
    async with stage.replay(stage.admin).actor() as actor:
        await actor.join()
        await append(actor, 3 * CHUNK)
    second = await replay.begin_run(keep=2)
    await replay.drop(run)
    async with stage.replay(stage.admin).actor() as actor:
        await actor.join()
        await append(actor, 3 * CHUNK)
    await replay.begin_run(WEIGHTS)
    assert await replay.delete_runs_before(second) == 0
    await replay.delete()
    assert await stage.admin.execute("DBSIZE") == 0


async def watch(stage: Stage, client: Client) -> None:
    await stage.begin()
    policy = client.policy(NAME)
    newest = await policy.latest()
    assert newest is not None
    assert await policy.get(newest.version) is not None

    async def publish() -> None:
        await stage.blocked()
        await stage.admin.policy(NAME).publish(WEIGHTS)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(publish)
        async for version, _ in policy.watch(newest.version):
            assert version == newest.version + 1
            break


async def read(stage: Stage, client: Client) -> None:
    frames = {f"frames:{i}": np.full(10, i) for i in range(20)}
    await stage.admin.mset(frames)
    await stage.admin.set_record("frames:r", frames)
    for key, frame in frames.items():
        assert equal(await client.get(key), frame)
    assert (await client.mget(frames, out=np.empty((20, 10), np.int64))).all()
    assert len(await client.mget(frames)) == 20
    assert await client.get_record("frames:r") is not None
    assert await client.exists(*frames) == 20


async def write(stage: Stage, client: Client) -> None:
    await client.set("frames:a", np.ones(3), ttl=60)
    await client.set_record("frames:r", {"a": np.ones(3)})
    await client.mset({f"frames:{i}": np.ones(3) for i in range(20)})
    assert await client.delete("frames:a", "frames:b") == 1


class Insisting(Observer):
    """Leaves nothing out."""

    async def _may(self, asked: Awaitable[T], otherwise: T) -> T:
        return await asked


async def look(stage: Stage, client: Client) -> None:
    await stage.begin(3 * CHUNK)
    await stage.begin(2 * CHUNK)
    view = await Insisting(client, NAME).look()
    assert view.run is not None
    assert (view.run.transitions, len(view.older), view.denied) == (2 * CHUNK, 1, [])


WORK: dict[str, Callable[[Stage, Client], Awaitable[None]]] = {
    "actor": act,
    "learner": learn,
    "looker": look,
    "reader": read,
    "trainer": train,
    "watcher": watch,
    "writer": write,
}


def errors_in(error: BaseException) -> list[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        return [each for inner in error.exceptions for each in errors_in(inner)]
    if isinstance(error, WriteFailed):
        return [failure for _, failure in error.failures]
    return [error]


# --- what is promised ------------------------------------------------------------------------------------------------


def test_guide_has_every_role() -> None:
    assert sorted(RULES) == sorted(WORK)
    text = GUIDE.read_text(encoding="utf-8")
    assert all(rules[0].startswith("reset on >PASSWORD") for rules in RULES.values())
    assert len(re.findall(r"^ACL", text, re.MULTILINE)) == sum(map(len, RULES.values()))


@pytest.mark.parametrize("role", WORK)
async def test_rights_are_enough(url: str, users: redis.Redis, role: str) -> None:
    async with stage(url) as here, here.connect(role) as client:
        with anyio.fail_after(20):
            await WORK[role](here, client)


@pytest.mark.parametrize("anyio_backend", [("asyncio", {"use_uvloop": True})], ids=["uvloop"])
@pytest.mark.parametrize("role", WORK)
async def test_each_right_is_needed_and_the_error_names_it(url: str, users: redis.Redis, role: str) -> None:
    needless = []
    async with stage(url) as here:
        for missing, rules in reduced(RULES[role]):
            set_user(users, role, rules)
            await here.admin.execute("FLUSHALL")
            try:
                async with here.connect(role) as client:
                    with anyio.fail_after(20):
                        await WORK[role](here, client)
            except* AionpredisError as group:
                for error in errors_in(group):
                    assert isinstance(error, ServerError), missing
                    assert "NOPERM" in str(error), missing
                    assert error.command, missing
                    assert f"needs +{error.command.lower().replace(' ', '|')}" in str(error), missing
                    assert error.key or error.command in {"TIME", "MULTI", "EXEC", "UNWATCH", "MGET", "INFO"}, str(
                        error
                    )
            else:
                needless.append(missing)
    assert needless == []


async def denied(attempt: Awaitable[Any]) -> None:
    with pytest.raises(ServerError, match="NOPERM"):
        await attempt


async def test_roles_cannot_do_the_work_of_others(url: str, users: redis.Redis) -> None:
    async with stage(url) as here:
        await here.begin(4 * CHUNK)
        run = await here.begin(4 * CHUNK)
        log, policy_stream = f"{{{NAME}}}:log", f"{{{NAME}}}:policy"
        chunk = next(users.scan_iter(f"{NAME}:{run}:*"))
        weights = next(users.scan_iter(f"{NAME}:policy:*"))
        async with here.connect("actor") as actor:
            for command in (
                ("UNLINK", log),
                ("DEL", chunk),
                ("XTRIM", log, "MAXLEN", 0),
                ("EXPIRE", log, 1),
                ("SET", log, "x"),
                ("SET", weights, "x"),
                ("UNLINK", weights),
                ("XADD", policy_stream, "*", "a", "b"),
                ("GET", chunk),  # a leaked password reads nobody's data
                ("SET", chunk, "x", "NX", "GET"),
                ("KEYS", "*"),
                ("SCAN", 0),
                ("FLUSHALL",),
                ("CONFIG", "GET", "*"),
                ("ACL", "WHOAMI"),
                ("SET", "elsewhere", "x"),
            ):
                await denied(actor.execute(*command))
            replay = here.replay(actor)
            await denied(replay.begin_run(WEIGHTS))
            await denied(replay.delete_runs_before(run))
            assert await here.replay(here.admin).count(run) == 4 * CHUNK
        for user in ("learner", "watcher", "reader"):
            async with here.connect(user) as client:
                replay = here.replay(client)
                for attempt in (
                    replay.begin_run(),
                    replay.delete(),
                    replay.delete_runs_before(run + 1),
                    client.policy(NAME).publish(WEIGHTS),
                    client.execute("SET", chunk, "x"),
                    client.execute("UNLINK", chunk),
                    client.execute("XADD", log, f"{run}-*", "a", "b"),
                ):
                    await denied(attempt)
        async with here.connect("trainer") as trainer:
            await denied(trainer.execute("GET", chunk))
            await denied(trainer.execute("SET", chunk, "x"))
        assert await here.replay(here.admin).count(run) == 4 * CHUNK


async def test_who_may_add_to_the_log_may_fence(url: str, users: redis.Redis) -> None:
    """As the guide says: rights do not limit ids."""
    async with stage(url) as here, here.connect("actor") as client:
        run = await here.begin()
        fields = {b"begin": b"t", b"policy": b"0", b"schema": SCHEMA.digest.encode()}
        assert await streams.claim(client, f"{{{NAME}}}:log", run + 1, fields)
        assert ((await here.replay(here.admin).latest_run()) or pytest.fail("no run")).run == run + 1


async def test_checkpoints_need_two_roles_each(url: str, users: redis.Redis, tmp_path: Path) -> None:
    async with stage(url) as here:
        run = await here.begin(4 * CHUNK)

        def become(first: str, second: str) -> None:
            set_user(users, "both", RULES[first] + [rule for rule in RULES[second] if "reset" not in rule])

        become("learner", "watcher")
        async with here.connect("both") as client:
            await here.replay(client).save(tmp_path / "saved", run)
        become("trainer", "actor")
        async with here.connect("both") as client:
            await here.replay(client).restore(tmp_path / "saved")
        assert await here.replay(here.admin).count() == 4 * CHUNK


async def test_what_is_only_advice_is_left_out(url: str, users: redis.Redis) -> None:
    """PING, CLIENT SETNAME and SETINFO, INFO: an ordinary user of the guide may none of them."""
    async with stage(url) as here:
        async with here.connect("trainer", client_name="trainer-7") as client:
            for command in (("PING",), ("CLIENT", "GETNAME"), ("INFO", "memory")):
                await denied(client.execute(*command))
            await here.replay(client).begin_run()
        users.config_set("maxmemory", "1gb")
        users.config_set("maxmemory-policy", "allkeys-lru")
        try:
            async with here.connect("trainer") as client:
                await here.replay(client).begin_run()
            set_user(users, "trainer", ["+info"])
            async with here.connect("trainer") as client:
                with pytest.raises(ReplayError, match="noeviction"):
                    await here.replay(client).begin_run()
        finally:
            users.config_set("maxmemory", "0")
            users.config_set("maxmemory-policy", "noeviction")
        set_user(users, "trainer", ["+scan"])
        async with here.connect("trainer") as client:
            assert await here.replay(client).leftover_keys(1) == []
        set_user(users, "trainer", ["+client|setname", "+client|getname"])
        async with here.connect("trainer", client_name="trainer-7") as client:
            assert await client.execute("CLIENT", "GETNAME") == b"trainer-7"


async def test_user_that_is_changed_or_deleted_is_told(url: str, users: redis.Redis) -> None:
    async with stage(url) as here, here.connect("reader") as client:
        await here.admin.set("frames:a", np.ones(3))
        assert await client.get("frames:a") is not None
        set_user(users, "reader", ["clearselectors"])
        await denied(client.get("frames:a"))
        users.acl_deluser("reader")
        with pytest.raises(AuthenticationError, match=r"refused to let us in: .*username="):
            await client.get("frames:a")


async def test_database_that_a_user_may_not_select(url: str, users: redis.Redis) -> None:
    with pytest.raises(AuthenticationError, match="select"):
        async with aionpredis.connect(f"{url}?db=1", username="reader", password=PASSWORD):
            pass
