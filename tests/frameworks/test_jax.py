"""JAX: arrays over the memory of batches, and pytrees of weights there and back."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import aionpredis
from aionpredis import UsageError
from aionpredis.memory import REFERENCES_ARE_COUNTED, aligned_empty

from ..replays import fill, replay_of

jax: Any = pytest.importorskip("jax", reason="JAX is not installed")

from aionpredis.frameworks.jax import as_jax, flatten, unflatten  # noqa: E402

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.one_server("what is received is the same"),
    pytest.mark.one_loop("nor does the loop matter"),
]


def place(array: NDArray[Any]) -> int:
    return int(array.__array_interface__["data"][0])


@pytest.mark.parametrize("name", ["bool", "uint8", "int32", "float16", "float32", "complex64", "bfloat16"])
def test_arrays_share_the_memory_of_the_batch(name: str) -> None:
    dtype = jax.numpy.dtype(name)
    batch = {"x": aligned_empty(64 * dtype.itemsize).view(dtype).reshape(16, 4)}
    batch["x"][:] = np.ones((), dtype)
    array = as_jax(batch)["x"]
    assert (array.shape, array.dtype) == ((16, 4), dtype)
    assert array.unsafe_buffer_pointer() == place(batch["x"])
    assert (array == 1).all()


def test_arrays_of_64_bits_are_copied_unless_jax_has_them() -> None:
    batch = {"x": np.arange(3)}
    assert as_jax(batch)["x"].dtype == np.int32
    with jax.enable_x64(True):
        assert as_jax(batch)["x"].dtype == np.int64
    assert as_jax(batch)["x"].tolist() == [0, 1, 2]


@pytest.mark.skipif(not REFERENCES_ARE_COUNTED, reason="nothing is recycled where references are not counted")
async def test_memory_is_not_used_again_while_jax_needs_it(url: str) -> None:
    """An array holds it, and so does a computation that has begun."""
    sums = jax.jit(lambda state: state.astype("int32").sum())
    async with aionpredis.connect(url) as client:
        replay = replay_of(client, chunk=64)
        await replay.begin_run()
        async with replay.actor() as actor:
            await actor.join()
            await fill(actor, range(1000))
        sampler = await replay.sampler(batch=500)
        kept = as_jax(await sampler.sample())["state"]
        expected = np.array(kept)
        places, results = set(), []
        for _ in range(40):
            batch = await sampler.sample()
            array = as_jax(batch)["state"]
            places.add(array.unsafe_buffer_pointer())
            assert array.unsafe_buffer_pointer() == place(batch["state"])
            results.append((sums(array), int(batch["state"].sum())))
            del batch, array
            if len(results) % 8 == 0:
                results.pop(0)[0].block_until_ready()
        assert kept.unsafe_buffer_pointer() not in places
        assert (kept == expected).all()
        for result, expects in results:
            assert result == expects
        assert len(places) < 40


def parameters(seed: int) -> Any:
    """A tree as networks have it."""
    keys = jax.random.split(jax.random.key(seed), 3)
    return {
        "dense": [{"kernel": jax.random.normal(key, (4, 4)), "bias": jax.numpy.zeros(4)} for key in keys],
        "scale": (jax.numpy.ones((), "bfloat16"), jax.numpy.arange(3)),
    }


async def test_pytree_is_published_and_loaded(url: str) -> None:
    sent, like = parameters(0), parameters(1)
    async with aionpredis.connect(url) as client:
        policy = client.policy("p")
        await policy.publish(flatten(sent))
        version = await policy.latest()
    assert version is not None
    assert "dense/2/kernel" in version.weights
    loaded = unflatten(version.weights, like)
    assert jax.tree_util.tree_structure(loaded) == jax.tree_util.tree_structure(sent)
    for leaf, expected in zip(jax.tree_util.tree_leaves(loaded), jax.tree_util.tree_leaves(sent), strict=True):
        assert isinstance(leaf, jax.Array)
        assert leaf.dtype == expected.dtype
        assert (leaf == expected).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: weights.pop("b/0"), "the weights have no 'b/0'; there are a"),
        (lambda weights: weights.update(c=np.zeros(1)), "the tree has no 'c'"),
        (lambda weights: weights.update(a=np.zeros(3, np.float32)), r"'a' is float32 \(3,\), not float32 \(2,\)"),
        (lambda weights: weights.update(a=np.zeros(2, np.int32)), r"'a' is int32 \(2,\), not float32 \(2,\)"),
    ],
)
def test_weights_of_another_tree_are_refused(change: Any, message: str) -> None:
    like = {"a": jax.numpy.zeros(2), "b": [jax.numpy.ones(1)]}
    weights = flatten(like)
    change(weights)
    with pytest.raises(UsageError, match=message):
        unflatten(weights, like)


def test_leaves_of_the_same_name_are_refused() -> None:
    with pytest.raises(UsageError, match="two leaves of the tree are called 'a/b'"):
        flatten({"a": {"b": np.zeros(1)}, "a/b": np.zeros(1)})
