"""JAX: batches as arrays over the memory that they were received into, and pytrees of weights.

::

    async for batch in await replay.epoch():
        state = update(state, as_jax(batch))
    await replay.policy.publish(flatten(state.params))
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aionpredis.errors import UsageError
from aionpredis.frameworks import extra

with extra("jax"):
    import jax

__all__ = ["as_jax", "flatten", "unflatten"]

Pytree = Any


def as_jax(batch: Mapping[str, NDArray[Any]], device: Any = None) -> dict[str, jax.Array]:
    """JAX arrays of the same names, on JAX's default device or another (or a sharding).

    On the CPU they share the batch's memory: JAX holds it as long as an array or a computation needs it, and it is not used
    again before. Do not write to the batch any more. JAX makes 64-bit dtypes 32-bit ones, which is a copy, unless
    ``jax_enable_x64`` is set.
    """
    # Not from_dlpack(), which does the same for fewer dtypes: no bfloat16.
    arrays: dict[str, jax.Array] = jax.device_put(dict(batch), device)
    return arrays


def flatten(tree: Pytree) -> dict[str, NDArray[Any]]:
    """The leaves of a pytree by the names on their path, joined by ``/``: what ``policy.publish`` takes.

    Raises:
        UsageError: two leaves have the same name.
    """
    arrays: dict[str, NDArray[Any]] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = _name(path)
        if name in arrays:
            raise UsageError(f"two leaves of the tree are called {name!r}: rename one, names are joined by '/'")
        arrays[name] = np.asarray(leaf)
    return arrays


def unflatten(weights: Mapping[str, NDArray[Any]], like: Pytree) -> Pytree:
    """A pytree of the structure of ``like``, with these weights for leaves, as JAX arrays::

        params = unflatten(version.weights, like=params)

    Raises:
        UsageError: the names, or a shape or dtype, are not those of ``like``.
    """
    expected, structure = jax.tree_util.tree_flatten_with_path(like)
    leaves = []
    for path, leaf in expected:
        name = _name(path)
        if name not in weights:
            raise UsageError(f"the weights have no {name!r}; there are {', '.join(weights):.400}")
        array, wanted = weights[name], leaf if hasattr(leaf, "dtype") else np.asarray(leaf)
        if (array.shape, array.dtype) != (wanted.shape, wanted.dtype):
            raise UsageError(f"{name!r} is {array.dtype} {array.shape}, not {wanted.dtype} {wanted.shape}")
        leaves.append(array)
    if more := set(weights) - {_name(path) for path, _ in expected}:
        raise UsageError(f"the tree has no {min(more)!r}")
    return jax.tree_util.tree_unflatten(structure, jax.device_put(leaves))


def _name(path: tuple[Any, ...]) -> str:
    return str(jax.tree_util.keystr(path, simple=True, separator="/"))
