"""LZ4 frames (https://github.com/lz4/lz4/blob/dev/doc/lz4_Frame_format.md) that ``lz4 -d`` restores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from ..errors import CorruptValue, DecodeError, UsageError
from ..memory import aligned_empty

__all__ = ["Lz4", "peek"]

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


def peek(value: memoryview, count: int) -> tuple[int, bytes]:
    """The size that a frame says its content has, and the first ``count`` bytes of that, or as many as are in ``value``:
    the frame's beginning, or all of it.

    The library expands whole blocks only, of up to 4 MB. This needs no more of the frame than what is asked for, and no
    library. It takes ~1 µs for each run of bytes that were found to be repeated.

    Raises :class:`CorruptValue` for what cannot be the beginning of a frame that says its size.
    """
    flags = value[4] if len(value) >= 15 else 0
    if value[:4] != Lz4.magic or flags & 0xC8 != 0x48:  # version 1, with the content's size
        raise CorruptValue("no lz4 frame that says how much it holds")
    at = 15 + 4 * (flags & 1)  # magic, flags, sizes, the number of a dictionary, checksum
    content = bytearray()
    while len(content) < count and at + 4 <= len(value):
        word = int.from_bytes(value[at : at + 4], "little")
        size = word & 0x7FFF_FFFF
        if not size:
            break
        block = value[at + 4 : at + 4 + size]
        at += 4 + size + (4 if flags & 0x10 else 0)  # a checksum of each block
        if word > size:  # stored as it is
            content += block[: count - len(content)]
        else:
            _expand(block, content, count)
    return int.from_bytes(value[6:14], "little"), bytes(content)


def _expand(block: memoryview, content: bytearray, count: int) -> None:
    """Append what a block, or its beginning, expands to, until there are ``count`` bytes
    (https://github.com/lz4/lz4/blob/dev/doc/lz4_Block_format.md).
    """
    at = 0

    def length(nibble: int) -> int:
        nonlocal at
        size = nibble
        while nibble == 15:
            at += 1
            size += block[at - 1]
            if block[at - 1] != 255:
                break
        return size

    try:
        while len(content) < count:
            token = block[at]
            at += 1
            size = length(token >> 4)
            content += block[at : at + min(size, count - len(content))]
            at += size
            if len(content) == count:
                return
            back = block[at] | block[at + 1] << 8
            at += 2
            size = min(length(token & 15) + 4, count - len(content))
            if not 0 < back <= len(content):
                raise CorruptValue(
                    f"the lz4 frame is damaged: it repeats what is {back} bytes before byte {len(content)}"
                )
            content += (content[-back:] * (size // back + 1))[:size]
    except IndexError:  # the end of what is there of the block
        pass


def _library() -> Any:
    """``lz4.frame``, imported when first needed; it is an optional dependency, without type annotations."""
    try:
        from lz4 import frame
    except ImportError:
        raise UsageError("the codec 'lz4' needs a package: pip install aionpredis[lz4]") from None
    return frame
