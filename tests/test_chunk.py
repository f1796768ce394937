"""Chunks: what append() writes, and refuses."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from aionpredis import EncodeError, Schema
from aionpredis.replay.chunk import ChunkBuffer, Rows, make_rows


class Made:
    """One buffer and the functions that fill it."""

    def __init__(self, schema: Schema, length: int = 4) -> None:
        self.buffer = ChunkBuffer(schema, length)
        self.done: Any = object()
        self.full: Any = object()
        self.refused: list[dict[str, object]] = []
        self.rows: Rows = make_rows(schema, full=lambda: self.full, late=self.late, done=self.done)
        self.rows.switch(self.buffer.columns, length)

    def late(self, **values: object) -> Any:
        self.refused.append(values)

    def file(self) -> dict[str, np.ndarray[Any, Any]]:
        value = b"".join(self.buffer.value(self.rows.count()))
        loaded: dict[str, np.ndarray[Any, Any]] = safetensors.numpy.load(value)
        return loaded


def test_full_and_partial_chunks_are_standard_files() -> None:
    schema = Schema(flag="bool", state=("uint8", (2, 3)), action="int64", none=("float32", (0, 2)), small="float16")
    for count in range(1, 5):
        made = Made(schema)
        rows = [
            {
                "flag": i % 2 == 0,
                "state": np.full((2, 3), i, np.uint8),
                "action": -i,
                "none": np.empty((0, 2), np.float32),
                "small": i / 2,
            }
            for i in range(count)
        ]
        for row in rows:
            made.rows.append(**row)
        loaded = made.file()
        assert set(loaded) == set(schema)
        for name, (dtype, shape) in schema.items():
            assert loaded[name].dtype == dtype
            assert loaded[name].shape == (count, *shape)
            for i, row in enumerate(rows):
                assert (loaded[name][i] == row[name]).all()


def test_columns_may_have_any_name() -> None:
    names = ["row", "length", "full", "late", "done", "check", "kind", "failed", "ndarray", "columns", "room", "error",
             "c_row", "d_row", "self", "make", "append", "switch", "count", "dict", "TypeError"]  # fmt: skip
    schema = Schema(**dict.fromkeys(names, "int64"), state=("u1", (2,)), s_state="int64", d_state="int64")
    made = Made(schema, 2)
    row: dict[str, Any] = {name: number for number, name in enumerate(schema) if name != "state"}
    assert made.rows.append(**row, state=np.ones(2, np.uint8)) is made.done
    assert made.rows.append(**row, state=np.ones(2, np.uint8)) is made.full
    loaded = made.file()
    assert all((loaded[name] == value).all() for name, value in row.items())


def test_values_are_copied() -> None:
    made = Made(Schema(state=("uint8", (3,))))
    state = np.zeros(3, np.uint8)
    for i in range(4):
        state[:] = i
        made.rows.append(state=state)
    assert (made.file()["state"] == [[0] * 3, [1] * 3, [2] * 3, [3] * 3]).all()


@pytest.mark.parametrize(
    ("column", "value", "expected"),
    [
        ("int64", 3, 3),
        ("int64", np.int32(-3), -3),
        ("int64", True, 1),
        ("uint8", 255, 255),
        ("uint8", np.int64(255), 255),
        ("float32", 1, 1.0),
        ("float32", 0.5, 0.5),
        ("float32", np.float64(0.5), 0.5),
        ("float32", np.array(0.5), 0.5),
        ("bool", True, True),
        ("bool", np.True_, True),
        ("bfloat16", 0.5, 0.5),
        ("bfloat16", ml_dtypes.bfloat16(0.5), 0.5),
        (("uint8", (2,)), [1, 2], [1, 2]),
        (("uint8", (2,)), np.array([1, 2], np.int64), [1, 2]),
        (("uint8", (2,)), np.arange(4, dtype=np.uint8)[::2], [0, 2]),
        (("uint16", (2,)), np.array([1, 2], ">u2"), [1, 2]),
        (("float32", (2,)), np.array([1, 2], np.float64), [1, 2]),
        (("float32", (1,)), [True], [1]),
        (("float32", (0,)), [], []),
        (("uint8", (2, 2)), np.asfortranarray(np.array([[1, 2], [3, 4]], np.uint8)), [[1, 2], [3, 4]]),
    ],
)
def test_what_fits_is_stored(column: Any, value: Any, expected: Any) -> None:
    if isinstance(column, str) and column == "bfloat16":
        column = ml_dtypes.bfloat16
    made = Made(Schema(x=column))
    for _ in range(4):
        made.rows.append(x=value)
    assert (made.buffer.columns["x"] == np.asarray(expected)).all()


WRONG = [
    ("int64", 2.7),
    ("int64", np.float32(2)),
    ("int64", "7"),
    ("int64", None),
    ("int64", [3]),
    ("int64", np.array([3])),
    ("int64", 2**63),
    ("uint8", 256),
    ("uint8", -1),
    ("uint8", np.int64(256)),
    ("uint64", np.int64(-1)),
    ("int32", np.array(2**31)),
    ("float32", None),
    ("float32", "1.5"),
    ("float32", 1j),
    ("float32", np.ones(1, np.float32)),
    ("bool", 1),
    ("bool", 0.5),
    ("bool", "yes"),
    (("uint8", (2,)), 1),
    (("uint8", (2,)), np.uint8(1)),
    (("uint8", (2,)), np.ones(1, np.uint8)),
    (("uint8", (2,)), np.ones((1, 2), np.uint8)),
    (("uint8", (2,)), np.ones((2, 1), np.uint8)),
    (("uint8", (2,)), np.ones(2)),
    (("uint8", (2,)), np.array([1, 256])),
    (("int32", (2,)), np.array([1, 2**31])),
    (("uint8", (2,)), [[1], [1, 2]]),
    (("uint8", (2,)), np.ma.array([1, 2], mask=[True, False], dtype=np.uint8)),
    (("float32", (2,)), np.array([1j, 2])),
    (("float32", (0,)), [1.0]),
]


@pytest.mark.parametrize(("column", "value"), WRONG)
@pytest.mark.parametrize("row", [0, 1])
def test_what_does_not_fit_is_an_encode_error_in_every_row_and_adds_nothing(column: Any, value: Any, row: int) -> None:
    schema = Schema(uid="int64", x=column)
    made = Made(schema, 3)
    dtype, shape = schema["x"]
    good = np.ones(shape, dtype) if shape else dtype.type(1)
    for uid in range(row):
        made.rows.append(uid=uid, x=good)
    with pytest.raises(EncodeError):
        made.rows.append(uid=99, x=value)
    assert made.rows.count() == row
    for uid in range(row, 3):
        made.rows.append(uid=uid, x=good)
    assert made.file()["uid"].tolist() == [0, 1, 2]


def test_a_class_that_was_fine_once_does_not_open_the_door_for_another() -> None:
    made = Made(Schema(action="int64"), 8)
    for value in (1, np.int64(2), True, 3):
        made.rows.append(action=value)
        with pytest.raises(EncodeError):
            made.rows.append(action=2.5)
    assert made.file()["action"].tolist() == [1, 2, 1, 3]


@pytest.mark.parametrize(
    ("dtype", "value"), [("uint8", 256), ("uint8", -1), ("int32", 2**31), ("int64", -(2**63) - 1), ("uint64", 2**64)]
)
def test_an_int_that_was_fine_once_does_not_open_the_door_for_one_that_is_out_of_range(dtype: str, value: int) -> None:
    """NumPy 1 would store its lowest bits."""
    made = Made(Schema(action=dtype))
    for count in (1, 2):
        made.rows.append(action=count)
        with pytest.raises(EncodeError):
            made.rows.append(action=value)
        assert made.rows.count() == count
    assert made.file()["action"].tolist() == [1, 2]


@pytest.mark.parametrize("columns", [{"a": 1}, {"a": 1, "b": 2, "c": 3}, {"a": 1, "B": 2}])
def test_missing_and_unknown_columns_are_type_errors(columns: dict[str, int]) -> None:
    made = Made(Schema(a="int64", b="int64"))
    with pytest.raises(TypeError, match="append"):
        made.rows.append(**columns)
    assert made.rows.count() == 0


def test_without_room_the_transition_goes_to_late() -> None:
    made = Made(Schema(a="int64", b="int64"))
    made.rows.switch(made.buffer.columns, 0)
    made.rows.append(a=1, b=2)
    assert made.refused == [{"a": 1, "b": 2}]


def test_episode_ends_are_bits_lowest_first() -> None:
    made = Made(Schema(terminated="bool", truncated="bool"), 10)
    for i in range(10):
        made.rows.append(terminated=i == 1, truncated=i == 9)
    assert made.buffer.episode_ends(10) == bytes([0b10, 0b10])
    assert made.buffer.episode_ends(1) == b""
