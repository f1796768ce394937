"""tensordict: batches as a ``TensorDict``, and transitions from one.

::

    schema = schema_of(env.rand_step())  # of one transition
    await actor.append(**as_columns(transition))  # vector_actor: of a TensorDict with batch_size=[lanes]
    async for batch in await replay.epoch():
        train(as_tensordict(batch))
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from numpy.typing import NDArray

from aionpredis.errors import UsageError
from aionpredis.frameworks import extra
from aionpredis.frameworks.torch import as_arrays, as_tensors
from aionpredis.replay.schema import Schema

with extra("tensordict"):
    from tensordict import TensorDict, TensorDictBase

__all__ = ["as_columns", "as_tensordict", "schema_of"]


def as_tensordict(batch: Mapping[str, NDArray[Any]]) -> TensorDict:
    """A ``TensorDict`` of ``batch_size=[n]`` over the memory of a batch of n transitions, by column; see
    :func:`aionpredis.frameworks.torch.as_tensors`.
    """
    tensors = as_tensors(batch)
    return TensorDict(tensors, batch_size=[len(next(iter(tensors.values())))])


def as_columns(tensors: TensorDictBase) -> dict[str, NDArray[Any]]:
    """The arrays in it, over the same memory, by column: ``next_reward`` of ``("next", "reward")``.

    Raises:
        UsageError: two of them have the same name.
        EncodeError: one is not in the CPU's memory.
    """
    columns: dict[str, Any] = {}
    for key, tensor in tensors.items(include_nested=True, leaves_only=True):
        name = key if isinstance(key, str) else "_".join(key)
        if name in columns:
            raise UsageError(f"two entries are called {name!r}: rename one, nested names are joined by '_'")
        columns[name] = tensor
    return as_arrays(columns)


def schema_of(tensors: TensorDictBase) -> Schema:
    """The schema of a replay for transitions like this: the ``batch_size`` is left out of the shapes.

    Raises:
        UsageError: a name that no column can have.
        EncodeError: a dtype that no column can have.
    """
    leading = len(tensors.batch_size)
    return Schema(**{name: (array.dtype, array.shape[leading:]) for name, array in as_columns(tensors).items()})
