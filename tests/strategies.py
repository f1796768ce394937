"""Arrays of every dtype and memory layout, and what it means that two are the same."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

NATIVE = [np.dtype(char) for char in "?bBhHiIlLqQefdgFDG"]
RECORD = [np.dtype(char) for char in "?bBhHiIlLefdF"]
"""What the stock safetensors library keeps."""
BIG_ENDIAN = [np.dtype(name) for name in (">u2", ">i4", ">f8", ">c8", ">f2", ">U3", ">M8[us]")]
FLEXIBLE = [np.dtype(name) for name in ("S1", "S7", "U1", "U5", "V3", "M8[ns]", "M8[25s]", "m8[D]", "M8")]
STRUCTURED = [
    np.dtype([("a", "<i4"), ("b", ">f8")]),
    np.dtype([("a", "i1"), ("b", "f8"), ("c", "?")], align=True),
    np.dtype([("pos", "<f4", (3,)), ("inner", [("x", "u1"), ("name", "U2", (2, 2))])]),
    np.dtype([("größe", "u1")]),
    np.dtype([("大きさ", "u2"), ("🙂", "f4")]),
    np.dtype([(("a title", "a"), "i4")]),
    np.dtype({"names": ["a", "b"], "formats": ["u1", "u2"], "offsets": [1, 4], "itemsize": 9}),
]
ML = [np.dtype(getattr(ml_dtypes, name)) for name in ("bfloat16", "float8_e4m3fn", "float8_e5m2", "int4", "uint4")]
ML_RECORD = [np.dtype(getattr(ml_dtypes, name)) for name in ("bfloat16", "float8_e4m3fn", "float8_e5m2")]
PLAIN = NATIVE + BIG_ENDIAN + FLEXIBLE + STRUCTURED
"""What ``np.save`` and ``np.load`` keep."""


@st.composite
def arrays(draw: st.DrawFn, dtypes: list[np.dtype[Any]]) -> NDArray[Any]:
    """An array of random bytes, 0 to 4 axes of length 0 to 4, seen through random slices, steps and transposes."""
    dtype = draw(st.sampled_from(dtypes))
    shape = tuple(draw(st.lists(st.integers(0, 4), max_size=4)))
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    top = 2 if dtype.kind == "b" else 256
    count = int(np.prod(shape)) * dtype.itemsize
    array: NDArray[Any] = np.ndarray(shape, dtype, bytearray(rng.integers(0, top, count, np.uint8)))
    for view in draw(st.lists(st.sampled_from(["fortran", "transpose", "slice", "broadcast", "readonly"]), max_size=3)):
        if view == "fortran":
            array = np.asfortranarray(array)
        elif view == "transpose":
            array = array.transpose(draw(st.permutations(range(array.ndim))))
        elif view == "slice":
            steps: list[Any] = [slice(None, None, draw(st.sampled_from([1, -1, 2, -2]))) for _ in array.shape]
            array = array[(..., *steps)]  # the dots keep an array without axes an array
        elif view == "broadcast" and array.ndim < 5:
            array = np.broadcast_to(array, (draw(st.integers(0, 3)), *array.shape))
        elif view == "readonly":
            array = array.view()
            array.flags.writeable = False
    return array


def same(left: NDArray[Any], right: NDArray[Any]) -> bool:
    """Same dtype, shape and bits of the items. Padding between a structure's fields is no part of them."""
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    if left.dtype.names is not None:
        return all(same(left[name], right[name]) for name in left.dtype.names)
    return left.tobytes() == right.tobytes()


def equal(got: object, expected: NDArray[Any]) -> bool:
    """Same shape and values; ``None`` equals nothing."""
    return isinstance(got, np.ndarray) and np.array_equal(got, expected)


def writable(*parts: bytes | memoryview) -> memoryview:
    """The parts joined, in new writable memory that is aligned to 64 bytes, as the client receives a value."""
    joined = np.frombuffer(b"".join(parts), np.uint8)
    block = np.empty(len(joined) + 64, np.uint8)
    start = -block.ctypes.data % 64
    block[start : start + len(joined)] = joined
    return block[start : start + len(joined)].data
