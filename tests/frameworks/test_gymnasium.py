"""Gymnasium: each step that is a transition is handed over, as it was, and nothing else is."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest

import aionpredis
from aionpredis import Replay, UsageError, blocking

gymnasium: Any = pytest.importorskip("gymnasium", reason="Gymnasium is not installed")

from gymnasium import spaces  # noqa: E402
from gymnasium.vector import AutoresetMode, SyncVectorEnv  # noqa: E402
from gymnasium.wrappers import Autoreset, TimeLimit  # noqa: E402

from aionpredis.frameworks.gymnasium import Transitions, VectorTransitions, schema_of  # noqa: E402

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.one_server("what is received is the same"),
    pytest.mark.one_loop("nor does the loop matter"),
]

Row = tuple[int, int, int, int, float, bool, bool]


class Counting(gymnasium.Env):
    """Observes its lane, the episode and the step, always in the same array. Episodes end after ``2 + lane`` steps, every
    second one by truncation. The reward is the action plus a tenth of the step.
    """

    observation_space = spaces.Box(0, 255, (3,), np.uint8)
    action_space = spaces.Discrete(100)

    def __init__(self, lane: int = 0) -> None:
        self.now = np.array([lane, 0, 0], np.uint8)

    def reset(self, *, seed: Any = None, options: Any = None) -> Any:
        self.now[1:] = self.now[1] + 1, 0
        return self.now, {}

    def step(self, action: int) -> Any:
        self.now[2] += 1
        lane, episode, step = self.now.tolist()
        over = step == 2 + lane
        return self.now, action + step / 10, over and episode % 2 == 1, over and episode % 2 == 0, {}


def expected(lane: int, count: int) -> list[Row]:
    """Lane, episode, step, action, reward, terminated, truncated: what a lane's first transitions are."""
    rows: list[Row] = []
    for number in range(count):
        episode, step = number // (2 + lane) + 1, number % (2 + lane)
        over = step == 1 + lane
        rows.append(
            (lane, episode, step, number, number + (step + 1) / 10, over and episode % 2 == 1, over > episode % 2)
        )
    return rows


def rows(batch: dict[str, Any]) -> list[Row]:
    columns = [*batch["observation"].T, batch["action"], batch["reward"].astype(float).round(4)]
    columns += [batch["terminated"], batch["truncated"]]
    return list(zip(*[column.tolist() for column in columns], strict=True))


async def stored(replay: Replay) -> list[Row]:
    found: list[Row] = []
    async for batch in await replay.epoch():
        found += rows(batch)
    return found


async def test_transitions_of_an_environment_that_reuses_its_memory(url: str) -> None:
    env = Transitions(Counting())
    async with aionpredis.connect(url) as client:
        replay = client.replay("r", env.schema)
        await replay.begin_run()
        async with replay.actor() as actor:
            await actor.join()
            env.reset(seed=1)
            for number in range(50):
                _, _, terminated, truncated, _ = env.step(number)
                await actor.append(**env.transition)
                if terminated or truncated:
                    env.reset()
        assert sorted(await stored(replay)) == expected(0, 50)


LANES = 4


async def play(envs: Any, actor: aionpredis.VectorActor, count: int) -> None:
    """Until each lane has so many transitions. The action is the number of the lane's transition."""
    numbers = np.zeros(LANES, np.int64)
    envs.reset()
    while (numbers < count).any():
        _, _, terminated, truncated, _ = envs.step(numbers)
        await actor.append(envs.live, **envs.transition)
        numbers += envs.live
        over = terminated | truncated
        if envs.metadata["autoreset_mode"] is AutoresetMode.DISABLED and over.any():
            envs.reset(options={"reset_mask": over})


@pytest.mark.parametrize("mode", list(AutoresetMode))
async def test_transitions_of_lanes_in_every_autoreset_mode(url: str, mode: Any) -> None:
    make = [lambda lane=lane: Counting(lane) for lane in range(LANES)]
    envs = VectorTransitions(SyncVectorEnv(make, autoreset_mode=mode, copy=False))
    assert envs.schema["observation"] == (np.dtype(np.uint8), (3,))
    async with aionpredis.connect(url) as client:
        replay = client.replay("r", envs.schema)
        await replay.begin_run()
        async with replay.vector_actor(LANES) as actor:
            await actor.join()
            await play(envs, actor, 40)
        found = await stored(replay)
    for lane in range(LANES):
        mine = sorted(row for row in found if row[0] == lane)
        assert len(mine) >= 40
        assert mine == expected(lane, len(mine))


async def test_reset_of_all_lanes_in_the_midst_of_an_episode_makes_all_of_them_live() -> None:
    make = [lambda lane=lane: Counting(lane) for lane in range(2)]
    envs = VectorTransitions(SyncVectorEnv(make))
    envs.reset()
    live: list[list[bool]] = []
    for _ in range(2):
        envs.step(np.zeros(2, np.int64))
        live.append(envs.live.tolist())
    envs.reset()
    envs.step(np.zeros(2, np.int64))
    assert [*live, envs.live.tolist()] == [[True, True]] * 3
    for _ in range(2):
        envs.step(np.zeros(2, np.int64))
    assert envs.live.tolist() == [False, True]


def test_append_is_called_with_each_transition() -> None:
    seen: list[dict[str, Any]] = []

    def append(**transition: Any) -> None:
        seen.append(transition)

    env = Transitions(Counting(), append)
    env.reset()
    for number in range(2):
        env.step(number)
    columns = {name: np.array([each[name] for each in seen]) for name in seen[0]}
    assert rows(columns) == expected(0, 2)


@pytest.mark.parametrize("wrap", [Autoreset, lambda env: TimeLimit(Autoreset(env), 1000)])
def test_step_that_resets_by_autoreset_is_no_transition(wrap: Any) -> None:
    seen: list[dict[str, Any]] = []

    def append(**transition: Any) -> None:
        seen.append(transition)

    env = Transitions(wrap(Counting()), append)
    env.reset()
    live: list[bool] = []
    while len(seen) < 7:
        env.step(len(seen))
        live.append(bool(env.transition))
    columns = {name: np.array([each[name] for each in seen]) for name in seen[0]}
    assert rows(columns) == expected(0, 7)
    assert live == [True, True, False] * 3 + [True]


def test_own_reset_before_autoresets_makes_the_next_step_a_transition() -> None:
    env = Transitions(Autoreset(Counting()))
    env.reset()
    for number in range(2):
        env.step(number)
    env.reset()
    env.step(2)
    assert rows({name: np.array([value]) for name, value in env.transition.items()}) == expected(0, 3)[2:]


def test_script_appends_as_it_steps(url: str) -> None:
    make = [lambda lane=lane: Counting(lane) for lane in range(2)]
    with blocking.connect(url) as client:
        replay = client.replay("r", schema_of(Counting()), chunk=4)
        replay.begin_run()
        with replay.actor() as actor, replay.vector_actor(2) as vector_actor:
            actor.join()
            vector_actor.join()
            env = Transitions(Counting(5), actor.append)
            envs = VectorTransitions(SyncVectorEnv(make), vector_actor.append)
            env.reset()
            envs.reset()
            numbers = np.zeros(2, np.int64)
            for number in range(30):
                if any(env.step(number)[2:4]):
                    env.reset()
                envs.step(numbers)
                numbers += envs.live
        found = sorted(row for batch in replay.epoch() for row in rows(batch))
    assert found == expected(0, int(numbers[0])) + expected(1, int(numbers[1])) + expected(5, 30)


class Shaped(gymnasium.Env):
    """Any spaces."""

    def __init__(self, observation: Any, action: Any = None) -> None:
        self.observation_space, self.action_space = observation, action or spaces.Discrete(2)

    def reset(self, *, seed: Any = None, options: Any = None) -> Any:
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> Any:
        return self.observation_space.sample(), 1, np.bool_(False), False, {}


NESTED = spaces.Dict(
    image=spaces.Box(0, 255, (4, 4), np.uint8),
    joints=spaces.Tuple([spaces.Discrete(3, start=-1), spaces.Dict(open=spaces.MultiBinary((2, 2)))]),
    choice=spaces.MultiDiscrete([3, 4]),
)
COLUMNS = {
    "image": ("uint8", (4, 4)),
    "joints_0": ("int64", ()),
    "joints_1_open": ("int8", (2, 2)),
    "choice": ("int64", (2,)),
}


def leaves(value: Any) -> Iterable[tuple[str, Any]]:
    yield from {
        "image": value["image"],
        "joints_0": value["joints"][0],
        "joints_1_open": value["joints"][1]["open"],
        "choice": value["choice"],
    }.items()


async def test_nested_spaces_have_a_column_for_each_part(url: str) -> None:
    env = Transitions(Shaped(NESTED, NESTED))
    for prefix in ("observation", "action"):
        for name, (dtype, shape) in COLUMNS.items():
            assert env.schema[f"{prefix}_{name}"] == (np.dtype(dtype), shape)
    assert len(env.schema) == 2 * len(COLUMNS) + 3
    async with aionpredis.connect(url) as client:
        replay = client.replay("r", env.schema)
        await replay.begin_run()
        played = []
        async with replay.actor() as actor:
            await actor.join()
            observation, _ = env.reset()
            for _ in range(20):
                action = env.action_space.sample()
                played.append((observation, action))
                observation, *_ = env.step(action)
                await actor.append(**env.transition)
        batch = await anext(await replay.epoch(batch=20, shuffle=False))
    for number, (observation, action) in enumerate(played):
        for name, value in leaves(observation):
            assert (batch[f"observation_{name}"][number] == value).all(), name
        for name, value in leaves(action):
            assert (batch[f"action_{name}"][number] == value).all(), name
    assert (batch["reward"] == 1).all()


async def test_nested_spaces_of_lanes(url: str) -> None:
    envs = VectorTransitions(SyncVectorEnv([lambda: Shaped(NESTED, NESTED)] * 2))
    async with aionpredis.connect(url) as client:
        replay = client.replay("r", envs.schema)
        await replay.begin_run()
        async with replay.vector_actor(2) as actor:
            await actor.join()
            observation, _ = envs.reset()
            action = envs.action_space.sample()
            envs.step(action)
            await actor.append(envs.live, **envs.transition)
        batch = await anext(await replay.epoch(batch=2))
    for name in COLUMNS:
        for prefix, value in (("observation", observation), ("action", action)):
            found = {each.tobytes() for each in batch[f"{prefix}_{name}"]}
            assert found == {each.tobytes() for each in dict(leaves(value))[name]}


@pytest.mark.parametrize(
    ("space", "message"),
    [
        (spaces.Text(5), "'observation' is of a Text space"),
        (spaces.Dict(a=spaces.Sequence(spaces.Discrete(2))), "'observation_a' is of a Sequence space"),
        (spaces.Dict({"a b": spaces.Discrete(2)}), "'observation_a b'"),
        (
            spaces.Dict({"a_b": spaces.Discrete(2), "a": spaces.Dict(b=spaces.Discrete(2))}),
            "two parts of the spaces are called 'observation_a_b'",
        ),
    ],
)
def test_spaces_that_make_no_columns_are_refused(space: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        schema_of(Shaped(space))


def test_environment_that_does_not_say_when_it_resets_is_refused() -> None:
    envs = SyncVectorEnv([Counting])
    envs.metadata = {}
    with pytest.raises(UsageError, match="autoreset_mode"):
        VectorTransitions(envs)


async def test_actor_of_async_code_has_to_be_awaited(url: str) -> None:
    async with aionpredis.connect(url) as client:
        replay = client.replay("r", schema_of(Counting()))
        await replay.begin_run()
        async with replay.actor() as actor, replay.vector_actor(1) as vector_actor:
            await actor.join()
            await vector_actor.join()
            env = Transitions(Counting(), actor.append)
            env.reset()
            with pytest.raises(UsageError, match=r"`await actor\.append\(\*\*env\.transition\)`"):
                env.step(1)
            envs = VectorTransitions(SyncVectorEnv([Counting]), vector_actor.append)
            envs.reset()
            with pytest.raises(UsageError, match="append= is for an actor"):
                envs.step(np.ones(1, np.int64))
