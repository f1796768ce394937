"""An image-like array as pixels, on the terminal or as a PNG file."""

from __future__ import annotations

import io
import math
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from aionpredis.cli.statistics import is_real, plain

if TYPE_CHECKING:
    from rich.text import Text

__all__ = ["half_blocks", "pixels", "png"]

LEAST = 8
"""Rows and columns of an image."""

MOST = 1 << 24
"""Numbers of all images of a strip: 128 MB as float64. Of more, every second row and column is shown, or fewer."""

FRAMES = 8
"""Images of a strip, from the first on."""

GAP = 2
"""Pixels between these."""


def pixels(array: NDArray[Any]) -> NDArray[np.uint8] | None:
    """The image that an array looks like, shape ``(height, width, 3)``; None if it does not look like one.

    Shapes: ``(H, W)``, ``(H, W, 1|3|4)``, ``(1|3, H, W)``, and with one more axis in front, ``(N, …)``: the first ones side
    by side. Gray goes from the least finite value, black, to the greatest, white; so do colours that are neither uint8 nor
    within 0 and 1. What is not finite is black; transparency is ignored.
    """
    if not is_real(array.dtype) or not array.size:
        return None
    frames = _frames(array)
    if frames is None or min(frames.shape[1:3]) < LEAST:
        return None
    frames = frames[:FRAMES, :, :, :3]
    step = math.ceil(math.sqrt(frames.size / MOST))
    frames = _bytes(frames[:, ::step, ::step])
    if frames.shape[3] == 1:
        frames = np.repeat(frames, 3, axis=3)
    padded = np.pad(frames, ((0, 0), (0, 0), (0, GAP), (0, 0)))
    image: NDArray[np.uint8] = np.concatenate(list(padded), axis=1)[:, :-GAP]
    return image


def _frames(array: NDArray[Any]) -> NDArray[Any] | None:
    """Images as ``(N, H, W, 1|3|4)``, a view; None if the shape is none of them."""
    shape = array.shape
    if array.ndim == 2:
        return array[np.newaxis, :, :, np.newaxis]
    if array.ndim not in (3, 4):
        return None
    if shape[-1] in (1, 3, 4):
        return array if array.ndim == 4 else array[np.newaxis]
    if shape[-3] in (1, 3):
        return np.moveaxis(array if array.ndim == 4 else array[np.newaxis], 1, 3)
    return array[..., np.newaxis] if array.ndim == 3 else None


def _bytes(frames: NDArray[Any]) -> NDArray[np.uint8]:
    if frames.dtype == np.uint8 and frames.shape[3] > 1:
        return frames
    converted = plain(frames)
    with np.errstate(all="ignore"):  # a longdouble may be too large
        values = (frames if converted is None else converted).astype(np.float64)
    finite = np.isfinite(values)
    low, high = float(values.min(where=finite, initial=np.inf)), float(values.max(where=finite, initial=-np.inf))
    if frames.shape[3] > 1 and low >= 0 and high <= 1:
        low, high = 0.0, 1.0
    if not low < high:
        low, high = 0.0, max(high, 1.0)  # one value: black if it is 0
    with np.errstate(all="ignore"):
        scaled = (values - low) * (255 / (high - low))
    return np.where(finite, scaled.clip(0, 255), 0).round().astype(np.uint8)


def shrink(image: NDArray[np.uint8], width: int, height: int) -> NDArray[np.uint8]:
    """The image, no larger than that, by the means of the pixels that become one; its proportions stay."""
    factor = max(image.shape[1] / width, image.shape[0] / height, 1.0)
    small: NDArray[Any] = image.astype(np.float32)
    for axis in (0, 1):
        count = max(1, round(image.shape[axis] / factor))
        edges = np.linspace(0, image.shape[axis], count + 1).astype(int)
        sizes = np.diff(edges).reshape((-1, 1, 1) if axis == 0 else (1, -1, 1))
        small = np.add.reduceat(small, edges[:-1], axis=axis) / sizes
    return small.round().astype(np.uint8)


def half_blocks(image: NDArray[np.uint8], width: int, height: int) -> Text:
    """The image on ``width`` columns and ``height`` lines at most: two pixels in each character."""
    from rich.color import Color
    from rich.style import Style
    from rich.text import Text

    small = shrink(image, width, 2 * height)
    if len(small) % 2:
        small = np.concatenate([small, np.zeros_like(small[:1])])
    text = Text()
    for above, below in zip(small[::2].tolist(), small[1::2].tolist(), strict=True):
        for upper, lower in zip(above, below, strict=True):
            text.append("▀", Style(color=Color.from_rgb(*upper), bgcolor=Color.from_rgb(*lower)))
        text.append("\n")
    return text


def png(image: NDArray[np.uint8]) -> bytes:
    """The image as a PNG file; needs Pillow."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()
