"""Statistics and pictures of arrays, as ``aionpredis show`` has them."""

from __future__ import annotations

import math
import tracemalloc
from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

pytest.importorskip("typer", reason='needs pip install "aionpredis[cli]"')
pytest.importorskip("rich", reason='needs pip install "aionpredis[cli]"')

from aionpredis.cli import statistics as module
from aionpredis.cli.picture import half_blocks, pixels, shrink
from aionpredis.cli.statistics import Statistics, statistics

from .strategies import FLEXIBLE, ML, NATIVE, STRUCTURED, arrays

# statistics


@pytest.fixture(scope="module", autouse=True)
def _small_blocks() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BLOCK", 7)
        yield


@given(st.lists(st.floats(-1e9, 1e9) | st.sampled_from([math.nan, math.inf, -math.inf]), max_size=40))
def test_floats(items: list[float]) -> None:
    array = np.array(items, np.float64)
    found = statistics(array)
    finite = array[np.isfinite(array)]
    assert found.size == len(items)
    assert found.nan == np.isnan(array).sum()
    assert found.inf == np.isinf(array).sum()
    if not finite.size:
        assert found[3:] == (None, None, None, None)
        return
    assert (found.min, found.max) == (finite.min(), finite.max())
    assert found.mean == pytest.approx(finite.mean(), rel=1e-9, abs=1e-6)
    assert found.std == pytest.approx(finite.std(), rel=1e-6, abs=1e-6)


@given(arrays(NATIVE))
def test_other_numbers(array: NDArray[Any]) -> None:
    array = np.ascontiguousarray(array)
    found = statistics(array)
    finite = array[np.isfinite(array)]
    assert found.size == array.size == finite.size + found.nan + found.inf
    if not finite.size:
        assert found.min is None
        return
    with np.errstate(all="ignore"):
        if array.dtype.kind in "biu":
            assert (found.min, found.max) == (int(finite.min()), int(finite.max()))
            assert isinstance(found.max, int)
            assert found.mean == pytest.approx(float(finite.astype(np.float64).mean()))
        elif array.dtype.kind == "c":
            assert found.max is None or found.max == pytest.approx(float(np.abs(finite).max()))


def test_complex_numbers_by_magnitude() -> None:
    array = np.array([3 + 4j, 0, complex(math.nan, 0)] * 9)
    found = statistics(array)
    assert found[:6] == (27, 9, 0, 0.0, 5.0, "1.5+2j")
    assert found.std == pytest.approx(2.5)


@pytest.mark.parametrize("dtype", ML, ids=str)
def test_ml_dtypes(dtype: np.dtype[Any]) -> None:
    found = statistics(np.array([1, 2, 1, 4] * 5, np.float32).astype(dtype))
    assert found[:5] == (20, 0, 0, 1.0, 4.0)
    assert found.mean == pytest.approx(2)


def test_bfloat16_without_ml_dtypes() -> None:
    array = np.array([1.5, math.inf, -2], ml_dtypes.bfloat16).view(np.dtype([("bfloat16", "<u2")]))
    assert statistics(array) == Statistics(3, 0, 1, -2.0, 1.5, -0.25, 1.75)


def test_times() -> None:
    array = np.array(["2020-01-02", "NaT", "2019-03-04"] * 5, "M8[D]")
    assert statistics(array) == Statistics(15, 5, 0, "2019-03-04", "2020-01-02")
    assert statistics(array[1:2]) == Statistics(1, 1)


@given(arrays(FLEXIBLE + STRUCTURED))
def test_what_is_no_number_is_counted(array: NDArray[Any]) -> None:
    assert statistics(array).size == array.size
    assert statistics(array).mean is None


def test_fortran_order_takes_no_copy() -> None:
    array = np.asfortranarray(np.ones((1000, 1000)))
    assert statistics(array).mean == 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BLOCK", 1 << 10)
        tracemalloc.start()
        statistics(array)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 200_000


# pictures


@pytest.mark.parametrize(
    ("shape", "image"),
    [
        ((80, 90), (80, 90)),
        ((80, 90, 1), (80, 90)),
        ((80, 90, 3), (80, 90)),
        ((80, 90, 4), (80, 90)),
        ((1, 80, 90), (80, 90)),
        ((3, 80, 90), (80, 90)),
        ((4, 80, 90), (80, 4 * 92 - 2)),  # frames that are stacked
        ((20, 80, 90), (80, 8 * 92 - 2)),
        ((2, 80, 90, 3), (80, 2 * 92 - 2)),
        ((2, 3, 80, 90), (80, 2 * 92 - 2)),
        ((6000, 6000), (3000, 3000)),  # every second
    ],
)
def test_what_looks_like_an_image(shape: tuple[int, ...], image: tuple[int, int]) -> None:
    found = pixels(np.zeros(shape, np.float32))
    assert found is not None
    assert found.shape == (*image, 3)
    assert found.dtype == np.uint8


@pytest.mark.parametrize("shape", [(), (9,), (3, 3), (7, 90), (0, 80, 90), (2, 5, 80, 90), (1, 1, 1, 80, 80)])
def test_what_does_not_look_like_an_image(shape: tuple[int, ...]) -> None:
    assert pixels(np.zeros(shape)) is None


@given(arrays(NATIVE + ML + FLEXIBLE + STRUCTURED))
def test_pixels_of_any_dtype(array: NDArray[Any]) -> None:
    flat = np.resize(array.reshape(-1), (8, 9)) if array.size else np.zeros((8, 9), array.dtype)
    found = pixels(flat)
    assert found is None or found.shape == (8, 9, 3)


def test_gray_goes_from_black_to_white() -> None:
    array = np.full((8, 9), -3.0)
    array[0, :4] = 7, 2, math.nan, math.inf
    found = pixels(array)
    assert found is not None
    assert found[0, :5].tolist() == [[255] * 3, [128] * 3, [0] * 3, [0] * 3, [0] * 3]


def test_colours_stay_what_they_are() -> None:
    bytes_ = np.random.default_rng(0).integers(10, 90, (8, 9, 3), np.uint8)
    assert np.array_equal(pixels(bytes_), bytes_)  # type: ignore[arg-type]
    assert np.array_equal(pixels(bytes_.astype(np.float32) / 255), bytes_)  # type: ignore[arg-type]
    assert np.array_equal(pixels(np.dstack([bytes_, bytes_[:, :, :1]])), bytes_)  # type: ignore[arg-type]


@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 30), st.integers(1, 30))
def test_a_shrunk_image_fits_and_keeps_its_mean(height: int, width: int, columns: int, lines: int) -> None:
    image = np.random.default_rng(height).integers(0, 256, (height, width, 3), np.uint8)
    small = shrink(image, columns, lines)
    assert small.shape[0] <= lines
    assert small.shape[1] <= columns
    if height <= lines and width <= columns:
        assert np.array_equal(small, image)
    assert image.min() <= small.min() <= small.max() <= image.max()


def test_two_pixels_in_a_character() -> None:
    image = np.zeros((5, 3, 3), np.uint8)
    image[1] = 255
    text = half_blocks(image, 80, 24)
    assert text.plain == "▀▀▀\n" * 3
    style: Any = text.spans[0].style
    assert style.color.triplet == (0, 0, 0)
    assert style.bgcolor.triplet == (255, 255, 255)
