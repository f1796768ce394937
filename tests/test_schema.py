"""Schemas: what they accept, and when two are the same."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from aionpredis import EncodeError, Schema, UsageError


def test_columns_are_dtype_or_dtype_and_shape() -> None:
    schema = Schema(state=("uint8", (80, 80)), action=np.int64, reward="float32", done=bool)
    assert dict(schema) == {
        "state": (np.dtype("uint8"), (80, 80)),
        "action": (np.dtype("int64"), ()),
        "reward": (np.dtype("float32"), ()),
        "done": (np.dtype("bool"), ()),
    }
    assert schema.row_nbytes == 6400 + 8 + 4 + 1
    assert Schema(state=("u1", (64 << 20,))).max_chunk == 1


@pytest.mark.parametrize(
    "columns",
    [
        {},
        {"_x": "f4"},
        {"class": "f4"},
        {"a b": "f4"},
        {"x": ("f4", (-1,))},
        {"x": ("f4", (1.5,))},
        {"x": ("f4", (True,))},
        {"x": ("f4", (1_000_000, 1_000_000))},
        {"x": ("f4", (2**32, 2**32))},
        {"x": ("u1", (64 << 20,)), "y": "bool"},
        {"x": "no such dtype"},
        {"x": None},
    ],
)
def test_nonsense_is_a_usage_error(columns: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        Schema(**columns)


@pytest.mark.parametrize("dtype", ["O", "U3", "M8[s]", "complex128", "longdouble", [("a", "i4")]])
def test_dtype_that_no_file_holds_is_an_encode_error_that_names_the_column(dtype: Any) -> None:
    with pytest.raises(EncodeError, match="reward"):
        Schema(state="f4", reward=dtype)


def test_byte_order_is_the_machines_and_dtypes_are_numpys_own_objects() -> None:
    schema = Schema(a=">u2", b="<u2", c="=f8", d=ml_dtypes.bfloat16)
    assert all(dtype.isnative for dtype, _ in schema.values())
    assert schema["a"][0] is np.dtype("uint16")  # append() compares by identity


def test_digest_tells_schemas_apart_as_equality_does() -> None:
    same = [Schema(a="f4", b=("u1", (2,))), Schema(b=("u1", (2,)), a=">f4")]
    other = [Schema(a="f4", b=("u1", (3,))), Schema(a="f8", b=("u1", (2,))), Schema(a="f4", c=("u1", (2,)))]
    assert same[0] == same[1]
    assert same[0].digest == same[1].digest
    assert len({schema.digest for schema in same + other}) == 4
    assert all(same[0] != schema for schema in other)


def test_equal_schemas_have_equal_files_whatever_the_order_of_their_columns() -> None:
    columns = {"flag": "bool", "state": ("u1", (80, 80)), "action": "i8", "done": "bool", "reward": "f4", "value": "f4"}
    layouts = [Schema(**dict(order)).layout(7) for order in (columns.items(), reversed(columns.items()))]  # type: ignore[arg-type]
    assert layouts[0].header == layouts[1].header
    # By alignment; then what is small together, which readers fetch at once.
    assert layouts[0].order == ("action", "reward", "value", "done", "flag", "state")


def test_episode_ends_are_scalar_bool_columns_of_gymnasiums_names() -> None:
    assert Schema(terminated="bool", truncated="bool").episode_ends == ("terminated", "truncated")
    assert Schema(terminated="int8", truncated=("bool", (2,)), x="f4").episode_ends == ()


def test_any_other_identifier_may_be_a_column() -> None:
    assert list(Schema(self="f4", columns="f4", match="f4")) == ["self", "columns", "match"]
