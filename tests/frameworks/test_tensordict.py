"""tensordict: batches as a TensorDict, transitions from one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import aionpredis
from aionpredis import EncodeError, NStep, UsageError

torch: Any = pytest.importorskip("torch", reason="torch is not installed")
tensordict: Any = pytest.importorskip("tensordict", reason="tensordict is not installed")

from aionpredis.frameworks.tensordict import as_columns, as_tensordict, schema_of  # noqa: E402

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.one_server("what is received is the same"),
    pytest.mark.one_loop("nor does the loop matter"),
]


def transition(*lanes: int) -> Any:
    return tensordict.TensorDict(
        {
            "observation": torch.rand(*lanes, 4),
            "action": torch.randint(5, lanes),
            "next": {"reward": torch.rand(*lanes, 1), "done": torch.zeros(*lanes, 1, dtype=torch.bool)},
        },
        batch_size=lanes,
    )


def test_batch_becomes_a_tensordict_over_its_memory() -> None:
    batch: dict[str, NDArray[Any]] = {"state": np.zeros((5, 2), np.float32), "action": np.arange(5)}
    tensors = as_tensordict(batch)
    assert isinstance(tensors, tensordict.TensorDict)
    assert tensors.batch_size == (5,)
    assert tensors["state"].data_ptr() == batch["state"].ctypes.data
    assert tensors[2:]["action"].tolist() == [2, 3, 4]


async def test_transitions_go_there_and_back(url: str) -> None:
    sent = [transition() for _ in range(20)]
    schema = schema_of(sent[0])
    assert schema["next_reward"] == (np.dtype(np.float32), (1,))
    assert list(schema) == ["observation", "action", "next_reward", "next_done"]
    async with aionpredis.connect(url) as client:
        replay = client.replay("r", schema)
        await replay.begin_run()
        async with replay.actor() as actor:
            await actor.join()
            for each in sent:
                await actor.append(**as_columns(each))
        received = as_tensordict(await anext(await replay.epoch(batch=20, shuffle=False)))
    expected = torch.stack(sent).flatten_keys("_")
    assert (received == expected).all()


async def test_transitions_of_lanes_go_there_and_back(url: str) -> None:
    sent = [transition(3) for _ in range(16)]
    schema = schema_of(sent[0])
    assert schema["observation"] == (np.dtype(np.float32), (4,))
    async with aionpredis.connect(url) as client:
        replay = client.replay("r", schema, chunk=16)
        await replay.begin_run()
        async with replay.vector_actor(3) as actor:
            await actor.join()
            for each in sent:
                await actor.append(**as_columns(each))
        received = as_tensordict(await anext(await replay.epoch(batch=48, shuffle=False)))
    found = {tuple(each["observation"].flatten().tolist()) for each in received.reshape(3, 16)}
    lanes = torch.stack(sent, 1)
    assert found == {tuple(lane["observation"].flatten().tolist()) for lane in lanes}


def rand_step(*lanes: int, terminated: bool = False, before: bool = False) -> Any:
    """As TorchRL's environments have it. At the root is what the step before has led to."""
    ends = {"terminated": terminated, "truncated": False, "done": terminated}
    return tensordict.TensorDict(
        {
            "observation": torch.rand(*lanes, 4),
            **{name: torch.full((*lanes, 1), before) for name in ends},
            "next": {
                "observation": torch.rand(*lanes, 4),
                "reward": torch.ones(*lanes, 1),
                **{name: torch.full((*lanes, 1), value) for name, value in ends.items()},
            },
        },
        batch_size=lanes,
    )


@pytest.mark.parametrize("lanes", [(), (3,)])
async def test_replay_knows_where_the_episodes_of_a_tensordict_end(url: str, lanes: tuple[int, ...]) -> None:
    schema = schema_of(rand_step(*lanes))
    assert schema.episode_ends == ("terminated", "truncated")
    assert {"next_terminated", "next_truncated"}.isdisjoint(schema)
    ends = [number % 5 == 4 for number in range(20)]
    async with aionpredis.connect(url) as client:
        replay: Any = client.replay("r", schema, chunk=20)
        await replay.begin_run()
        async with replay.vector_actor(*lanes) if lanes else replay.actor() as actor:
            await actor.join()
            for number, end in enumerate(ends):
                before = number > 0 and ends[number - 1]
                await actor.append(**as_columns(rand_step(*lanes, terminated=end, before=before)))
        count = 20 * (lanes[0] if lanes else 1)
        batch = await anext(await replay.epoch(batch=count, shuffle=False))
        sampler = await replay.sampler(batch=200, length=3)
        slices = await sampler.sample()
        n_step = NStep(5, columns=["observation"], reward="next_reward")
        columns = ["observation", "next_reward"]  # n-step has its own next_observation
        targets = await (await replay.sampler(batch=200, n_step=n_step, columns=columns)).sample()
    assert batch["terminated"].reshape(-1, 20).tolist() == [ends] * (count // 20)
    assert not batch["truncated"].any()
    assert not slices["terminated"][:, :-1].any()  # none goes on behind an end
    assert slices["terminated"][:, -1].any()
    assert not targets["discount"].any()  # each is less than 5 steps from the end of its episode
    tensors = as_tensordict(batch)
    assert tensors["terminated"].shape == (count,)
    assert as_columns(tensors).keys() == schema.keys()  # what was received can be appended as it is


def test_columns_have_the_ends_of_episodes_that_come_next() -> None:
    columns = as_columns(rand_step(3, terminated=True, before=False))
    assert columns["terminated"].tolist() == [True] * 3
    sent = rand_step(3)
    assert as_columns(sent)["terminated"].ctypes.data == sent["next", "terminated"].data_ptr()
    alone = tensordict.TensorDict({"terminated": torch.tensor(True)})  # no ("next", …): it is of this step
    assert as_columns(alone)["terminated"].item() is True


def test_ends_that_no_episode_would_have_are_refused() -> None:
    for wrong in (torch.zeros(2, dtype=torch.bool), torch.zeros(1)):
        with pytest.raises(UsageError, match=r"'terminated' is .* one bool for each transition"):
            schema_of(tensordict.TensorDict({"next": {"terminated": wrong}}))
    with pytest.raises(UsageError, match="'truncated' is bool of shape"):
        schema_of(tensordict.TensorDict({"truncated": torch.zeros(1, dtype=torch.bool)}))


def test_columns_share_the_memory_of_the_tensordict() -> None:
    sent = transition(3)
    columns = as_columns(sent)
    assert columns["next_reward"].ctypes.data == sent["next", "reward"].data_ptr()


def test_what_cannot_be_a_column_is_named() -> None:
    twice = tensordict.TensorDict({"a_b": torch.zeros(1), "a": {"b": torch.zeros(1)}})
    with pytest.raises(UsageError, match="two entries are called 'a_b'"):
        as_columns(twice)
    with pytest.raises(EncodeError, match="'a' is on meta"):
        as_columns(tensordict.TensorDict({"a": torch.zeros(1, device="meta")}))
    with pytest.raises(UsageError, match="'a b'"):
        schema_of(tensordict.TensorDict({"a b": torch.zeros(1)}))
