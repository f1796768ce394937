"""Numbers about an array, in blocks: beside it, memory for one block is needed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["Statistics", "is_real", "plain", "statistics"]

BLOCK = 1 << 20
"""Elements of one block: 8 MB as float64, and a few times that for what is computed from them."""


class Statistics(NamedTuple):
    """``size``: elements. ``min`` to ``std`` are of the finite values, None if there is none, or the dtype has no such thing.
    Of complex numbers, ``min`` and ``max`` are those of the magnitude. ``std``: of all of them, not of a sample.
    """

    size: int
    nan: int = 0
    inf: int = 0
    min: float | int | str | None = None
    max: float | int | str | None = None
    mean: float | str | None = None
    std: float | None = None


def statistics(array: NDArray[Any]) -> Statistics:
    """Of an array of any dtype; of those that are no numbers, only how many there are."""
    if array.dtype.kind in "mM":
        return _times(array)
    if array.dtype.kind == "c" or is_real(array.dtype):
        return _numbers(array)
    return Statistics(array.size)


def is_real(dtype: np.dtype[Any]) -> bool:
    """Whether its elements are real numbers, or truth values."""
    return dtype.kind in "biuf" or plain(np.empty(0, dtype)) is not None


def plain(array: NDArray[Any]) -> NDArray[Any] | None:
    """The types of ``ml_dtypes`` as float32; also bfloat16 as it is read without that package. None: it is none of them."""
    if array.dtype.names == ("bfloat16",):
        return (array["bfloat16"].astype(np.uint32) << 16).view(np.float32)
    if array.dtype.isbuiltin == 2:
        return array.astype(np.float32)
    return None


def _blocks(array: NDArray[Any]) -> Iterator[NDArray[Any]]:
    flat = array.ravel("K")  # a view: what was stored is contiguous, in one order or the other
    for start in range(0, flat.size, BLOCK):
        yield flat[start : start + BLOCK]


def _times(array: NDArray[Any]) -> Statistics:
    nan, lows, highs = 0, [], []
    for block in _blocks(array):
        there = block[~np.isnat(block)]
        nan += block.size - there.size
        if there.size:
            lows.append(there.min())
            highs.append(there.max())
    if not lows or np.datetime_data(array.dtype)[0] == "generic":  # which are times of no calendar
        return Statistics(array.size, nan)
    return Statistics(array.size, nan, 0, str(min(lows)), str(max(highs)))


def _numbers(array: NDArray[Any]) -> Statistics:
    nan = inf = count = 0
    low: Any = None
    high: Any = None
    mean: Any = 0.0
    squares = 0.0  # of the distances from the mean
    with np.errstate(all="ignore"):
        for block in _blocks(array):
            converted = plain(block)
            values = block if converted is None else converted
            if values.dtype.kind in "fc":
                finite = np.isfinite(values)
                if not finite.all():
                    nans = int(np.isnan(values).sum())
                    nan += nans
                    inf += int(values.size - finite.sum()) - nans
                    values = values[finite]
                if not values.size:
                    continue
            sizes = np.abs(values) if values.dtype.kind == "c" else values
            low = sizes.min() if low is None else min(low, sizes.min())
            high = sizes.max() if high is None else max(high, sizes.max())
            wide = values.astype(np.complex128 if values.dtype.kind == "c" else np.float64)
            # Two blocks' means and squares become one's (Chan, Golub, LeVeque 1979).
            block_mean = wide.mean()
            away = wide - block_mean
            total = count + wide.size
            apart = block_mean - mean
            squares += float((away * away.conj()).real.sum()) + abs(apart) ** 2 * count * wide.size / total
            mean += apart * wide.size / total
            count = total
    if not count:
        return Statistics(array.size, nan, inf)
    return Statistics(
        array.size, nan, inf, _number(low), _number(high), _number(mean), _finite(math.sqrt(squares / count))
    )


def _number(value: Any) -> Any:
    """As JSON has it."""
    if isinstance(value, np.bool_ | np.integer):
        return int(value)
    if isinstance(value, complex | np.complexfloating):
        return f"{complex(value):.6g}"
    return _finite(float(value))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
