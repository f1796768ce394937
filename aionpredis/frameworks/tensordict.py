"""tensordict: batches as a ``TensorDict``, and transitions from one.

::

    schema = schema_of(env.rand_step())  # of one transition
    await actor.append(**as_columns(transition))  # vector_actor: of a TensorDict with batch_size=[lanes]
    async for batch in await replay.epoch():
        train(as_tensordict(batch))

The columns ``terminated`` and ``truncated`` are ``("next", "terminated")`` and ``("next", "truncated")``, where there are such
entries: those say whether the episode ended with this transition. The ones at the root belong to the step before.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from numpy.typing import NDArray

from aionpredis.errors import UsageError
from aionpredis.frameworks import extra
from aionpredis.frameworks.torch import as_arrays, as_tensors
from aionpredis.replay.schema import EPISODE_ENDS, Schema

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

    The ends of episodes, ``("next", "terminated")`` and ``("next", "truncated")``, are the columns ``terminated`` and
    ``truncated``, with one value for each transition, in place of the entries at the root that have these names.

    Raises:
        UsageError: two of them have the same name.
        EncodeError: one is not in the CPU's memory.
    """
    entries = dict(tensors.items(include_nested=True, leaves_only=True))
    for end in EPISODE_ENDS:
        tensor = entries.pop(("next", end), None)
        if tensor is not None:
            one_each = tensor.numel() == tensors.batch_size.numel()  # of shape (*batch_size, 1), usually
            entries[end] = tensor.reshape(tensors.batch_size) if one_each else tensor
    columns: dict[str, Any] = {}
    for key, tensor in entries.items():
        name = key if isinstance(key, str) else "_".join(key)
        if name in columns:
            raise UsageError(f"two entries are called {name!r}: rename one, nested names are joined by '_'")
        columns[name] = tensor
    return as_arrays(columns)


def schema_of(tensors: TensorDictBase) -> Schema:
    """The schema of a replay for transitions like this: the ``batch_size`` is left out of the shapes.

    Raises:
        UsageError: a name that no column can have; or ``terminated`` or ``truncated`` is not one bool for each transition.
        EncodeError: a dtype that no column can have.
    """
    leading = len(tensors.batch_size)
    schema = Schema(**{name: (array.dtype, array.shape[leading:]) for name, array in as_columns(tensors).items()})
    for name in EPISODE_ENDS:
        if name in schema and name not in schema.episode_ends:
            dtype, shape = schema[name]
            raise UsageError(
                f"column {name!r} is {dtype} of shape {shape}, and would not mark the ends of episodes: make it one bool"
                f" for each transition, as ('next', {name!r}) or without further axes, or rename it"
            )
    return schema
