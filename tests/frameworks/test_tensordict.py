"""tensordict: batches as a TensorDict, transitions from one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import aionpredis
from aionpredis import EncodeError, UsageError

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
