"""What other programs stored is read, and converted, by the lines of docs/migrating.md as they stand there."""

from __future__ import annotations

import ast
import io
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import redis
from numpy.typing import NDArray

import aionpredis
from aionpredis import NotAnArray

pytestmark = [pytest.mark.anyio, pytest.mark.one_loop("what is stored is the point")]

PAGE = Path(__file__).parent.parent / "docs" / "migrating.md"


def written_there() -> dict[str, Any]:
    """The functions that the page defines."""
    namespace: dict[str, Any] = {"np": np, "pickle": pickle}
    for block in PAGE.read_text(encoding="utf-8").split("```python\n")[1:]:
        code = block.partition("```\n")[0]
        for node in ast.parse(code).body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                exec(compile(ast.Module([node], []), PAGE, "exec"), namespace)
    return namespace


THERE = written_there()


def by_recipe(array: NDArray[Any]) -> bytes:
    """The recipe that most programs have copied; all of it, so that nothing here is shared with what reads it."""
    h, w = array.shape
    return struct.pack(">II", h, w) + array.tobytes()


def by_save(array: NDArray[Any]) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return file.getvalue()


def frame(shape: tuple[int, ...], dtype: str) -> NDArray[Any]:
    return np.random.default_rng(7).integers(0, 255, shape).astype(dtype)


@pytest.mark.parametrize("shape", [(80, 80), (1, 3), (0, 5), (300, 400)])
async def test_the_recipe_is_read_by_one_line(url: str, stock: redis.Redis, shape: tuple[int, int]) -> None:
    array = frame(shape, "uint16")
    stock.set("frame", by_recipe(array))
    async with aionpredis.connect(url) as client:
        value = await client.get_value("frame")
        assert value is not None
        read = THERE["shape_in_front"](value)
        np.testing.assert_array_equal(read, array, strict=True)
        assert not array.size or np.shares_memory(read, value)
        assert read.flags.writeable
        await client.set("frame", read)
        np.testing.assert_array_equal(await client.get("frame"), array, strict=True)


async def test_bare_bytes_are_read_by_one_line(url: str, stock: redis.Redis) -> None:
    array = frame((80, 80), "float32")
    stock.set("frame", array.tobytes())
    async with aionpredis.connect(url) as client:
        value = await client.get_value("frame")
        assert value is not None
        read = THERE["bare"](value)
        np.testing.assert_array_equal(read, array, strict=True)
        assert np.shares_memory(read, value)
        assert read.flags.writeable
        assert read.ctypes.data % 64 == 0
        assert await client.get_value("nothing") is None


@pytest.mark.parametrize("dtype", ["uint16", ">f4", "complex128", "datetime64[s]", "bool"])
async def test_saved_by_numpy_is_read_as_it_is(url: str, stock: redis.Redis, dtype: str) -> None:
    array = frame((3, 4, 5), dtype)
    stock.set("frame", by_save(array))
    async with aionpredis.connect(url) as client:
        np.testing.assert_array_equal(await client.get("frame"), array, strict=True)


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
async def test_a_pickle_is_refused_and_opened_by_the_user_alone(url: str, stock: redis.Redis, protocol: int) -> None:
    array = frame((3, 4), "float64")
    stock.set("frame", pickle.dumps(array, protocol))
    async with aionpredis.connect(url) as client:
        with pytest.raises(NotAnArray, match=r"a pickle, it seems.*docs/migrating\.md.*frame"):
            await client.get("frame")
        value = await client.get_value("frame")
        np.testing.assert_array_equal(THERE["pickled"](value), array, strict=True)


@pytest.mark.parametrize(
    "value",
    [by_recipe(frame((80, 80), "uint16")), frame((80, 80), "float32").tobytes(), bytes(8), b"3.14"],
    ids=["recipe", "bare", "zeros", "text"],
)
async def test_what_does_not_say_what_it_is_leads_to_the_page(url: str, stock: redis.Redis, value: bytes) -> None:
    stock.set("frame", value)
    async with aionpredis.connect(url) as client:
        with pytest.raises(NotAnArray, match=r"get_value\(\).*docs/migrating\.md.*\[key 'frame'\]") as caught:
            await client.get("frame")
        assert "pickle" not in str(caught.value)


async def test_many_are_converted_and_nothing_else_is_touched(url: str, stock: redis.Redis) -> None:
    arrays = {f"frame:{number}".encode(): frame((8, 8), "uint16") + np.uint16(number) for number in range(2500)}
    for number, (key, array) in enumerate(arrays.items()):
        stock.set(key, by_recipe(array), px=500_000 if number % 5 == 0 else None)
    done, *_ = arrays
    stock.set(done, by_save(arrays[done]), px=400_000)
    stock.set("other:1", by_recipe(arrays[done]))
    async with aionpredis.connect(url) as client:
        assert await THERE["convert"](client, "frame:*", THERE["shape_in_front"]) == len(arrays) - 1
        for key, array in zip(arrays, await client.mget(arrays), strict=True):
            np.testing.assert_array_equal(array, arrays[key], strict=True)
        assert await THERE["convert"](client, "frame:*", THERE["shape_in_front"]) == 0
    for number, key in enumerate(arrays):
        left = stock.pttl(key)
        assert (0 < left <= 500_000) if number % 5 == 0 else left == -1
    assert 0 < stock.pttl(done) <= 400_000
    assert stock.get("other:1") == by_recipe(arrays[done])


async def test_what_is_converted_is_left_alone_whatever_the_codec(url: str, stock: redis.Redis) -> None:
    zeros = np.zeros((80, 80), np.uint16)  # LZ4 would make it smaller
    stock.set("frame:1", by_recipe(zeros))
    async with aionpredis.connect(url, codec="lz4") as client:
        assert await THERE["convert"](client, "frame:*", THERE["shape_in_front"]) == 1
        assert await THERE["convert"](client, "frame:*", THERE["shape_in_front"]) == 0
        np.testing.assert_array_equal(await client.get("frame:1"), zeros, strict=True)


@pytest.mark.parametrize("left", [-2, 0])
async def test_what_expires_while_it_is_converted_does_not_live_for_ever(
    url: str, stock: redis.Redis, monkeypatch: pytest.MonkeyPatch, left: int
) -> None:
    """It was there at the GET; at the PTTL it is gone (-2), or in its last millisecond (0)."""
    stock.set("frame:1", by_recipe(frame((8, 8), "uint16")), px=500_000)
    stock.set("frame:2", by_recipe(frame((8, 8), "uint16")))
    execute = aionpredis.Client.execute

    async def expiring(client: aionpredis.Client, command: str, key: bytes) -> Any:
        if key == b"frame:2":
            return await execute(client, command, key)
        stock.delete(key)
        return left if left == 0 else await execute(client, command, key)

    monkeypatch.setattr(aionpredis.Client, "execute", expiring)
    async with aionpredis.connect(url) as client:
        assert await THERE["convert"](client, "frame:*", THERE["shape_in_front"]) == 1
    assert stock.keys() == [b"frame:2"]
