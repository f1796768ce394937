"""The arrays of the original question: 80x80 uint16, and what the contenders do with them."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
from numpy.typing import NDArray

SHAPE = (80, 80)
DTYPE = np.uint16
NBYTES = 12_800
COUNT = 20_000
BATCH = 256
PIPELINE = 64

Frame = NDArray[np.uint16]


def frames() -> list[Frame]:
    """A few different arrays, in memory of their own; array *i* of a run is number ``i % len(frames())``."""
    rng = np.random.default_rng(7)
    return [rng.integers(0, 1 << 16, SHAPE, DTYPE) for _ in range(4)]


def key(index: int) -> bytes:
    return b"frame:%d" % index


def pack(frame: Frame) -> bytes:
    """The usual recipe: the shape in front, then the bytes."""
    return struct.pack(">II", *frame.shape) + frame.tobytes()


def unpack(value: bytes) -> Frame:
    height, width = struct.unpack(">II", value[:8])
    return np.frombuffer(value, DTYPE, offset=8).reshape(height, width)


def expect(got: Any, index: int, known: list[Frame]) -> None:
    """Raise if array ``index`` is not what was written."""
    if not np.array_equal(got, known[index % len(known)]):
        raise AssertionError(f"array {index} came back different")
