"""LZ4 frames (https://github.com/lz4/lz4/blob/dev/doc/lz4_Frame_format.md) that ``lz4 -d`` restores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from ..errors import CorruptValue, DecodeError, UsageError
from ..memory import aligned_empty

__all__ = ["Lz4"]

PIECE = 1 << 20
"""Bytes handed to the library at once. Decompressing 16 MB in pieces of 1 MB is twice as fast as in one."""

MAX_RATIO = 255
"""No LZ4 block expands more: a byte of input stands for at most 255 of output."""


@dataclass(frozen=True, slots=True)
class Lz4:
    """One LZ4 frame around a whole file, its size stored. ``level``: 0 (fast) to 16 (small, and 10 times slower)."""

    name: ClassVar[str] = "lz4"
    magic: ClassVar[bytes] = b"\x04\x22\x4d\x18"

    level: int = 0

    def __post_init__(self) -> None:
        if type(self.level) is not int or not 0 <= self.level <= 16:
            raise UsageError(f"the level of lz4 is an int from 0 to 16, not {self.level!r}")

    @staticmethod
    def check() -> None:
        """:class:`UsageError` unless the ``lz4`` package is installed."""
        _library()

    def encode(self, parts: Sequence[bytes | memoryview]) -> list[bytes | memoryview]:
        """The frame in parts; or ``parts`` (one-dimensional, ``'B'``) themselves if it would not be smaller."""
        total = sum(map(len, parts))
        compressor = _library().LZ4FrameCompressor(compression_level=self.level)
        frame: list[bytes | memoryview] = [compressor.begin(source_size=total)]
        size = len(frame[0])
        for part in parts:
            view = memoryview(part)
            for start in range(0, len(view), PIECE):
                frame.append(compressor.compress(view[start : start + PIECE]))
                size += len(frame[-1])
                if size >= total:
                    return list(parts)
        frame.append(compressor.flush())
        return [part for part in frame if part] if size + len(frame[-1]) < total else list(parts)

    def decode(self, value: memoryview, max_bytes: int) -> memoryview:
        """New writable memory, aligned to 64 bytes, with what the frame holds.

        Raises :class:`CorruptValue` unless ``value`` is exactly one frame of a stored and plausible size that holds
        what it says; :class:`DecodeError` if ``lz4`` is not installed.
        """
        try:
            library = _library()
        except UsageError as error:
            raise DecodeError(f"the value is compressed, and {error}") from error
        try:
            size = library.get_frame_info(value[:32])["content_size"]  # a frame's header has at most 19 bytes
            # 0 also stands for a frame without a size. No file that is stored here is empty.
            if not 0 < size <= min(MAX_RATIO * len(value), max_bytes):
                raise CorruptValue(
                    f"an lz4 frame of {len(value)} bytes says it holds {size}: it must say so, and at most"
                    f" {MAX_RATIO} times its size and {max_bytes}"
                )
            return _inflate(library, value, size)
        except RuntimeError as error:  # what the library raises for a bad header, block or checksum
            raise CorruptValue(f"the lz4 frame is damaged: {error}") from error


def _inflate(library: Any, value: memoryview, size: int) -> memoryview:
    target = aligned_empty(size).data
    context = library.create_decompression_context()
    done = read = 0
    ended = False
    while not ended:
        # One byte more than fits, so that a frame that holds more than it says is noticed.
        room = min(PIECE, size + 1 - done)
        piece, used, ended = library.decompress_chunk(
            context, value[read : read + PIECE], max_length=room, return_bytearray=True
        )
        if not (used or piece) or len(piece) > size - done:
            break
        target[done : done + len(piece)] = piece
        done += len(piece)
        read += used
    if not ended or done != size or read != len(value):
        raise CorruptValue(f"the lz4 frame of {len(value)} bytes is not exactly {size} bytes, compressed, and its end")
    return target


def _library() -> Any:
    """``lz4.frame``, imported when first needed; it is an optional dependency, without type annotations."""
    try:
        from lz4 import frame
    except ImportError:
        raise UsageError("the codec 'lz4' needs a package: pip install aionpredis[lz4]") from None
    return frame
