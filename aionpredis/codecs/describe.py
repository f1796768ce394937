"""What a stored value is, by its first bytes and its length: nothing of its data is needed, however large it is."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from ..errors import CorruptValue
from ..formats import npy, safetensors
from . import MAX_MAGIC, Kind, detect
from .lz4 import MAX_RATIO, Lz4, peek

__all__ = ["HEAD", "Column", "Description", "describe"]

HEAD = 512
"""First bytes that suffice for nearly all: an array's header has 128, that of a record of five columns about 450."""


class Column(NamedTuple):
    """One array."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Description(NamedTuple):
    """What a value says that it is.

    ``kind``: None: that is known only when it is decompressed, by a codec that is not this package's. ``codec``: its name,
    None for raw. ``size``: bytes of the file without the codec, None if not known. ``columns``: by name, in the caller's
    order; an array is the only column, and its name is empty. ``fortran``: an array that lies in Fortran order.
    """

    kind: Kind | None
    codec: str | None
    size: int | None
    columns: Mapping[str, Column]
    fortran: bool = False


def describe(head: memoryview, length: int) -> Description | int:
    """What the value of ``length`` bytes is that begins with ``head`` (one-dimensional, ``'B'``).

    Or how many of its first bytes are needed to say so: more than ``head`` has, at most ``length``.

    Raises :class:`NotAnArray` and :class:`CorruptValue`, as far as the first bytes show it. What does not show is whether
    compressed data are damaged.
    """
    if len(head) < min(length, HEAD):
        return min(length, HEAD)
    found = detect(head, length)
    if isinstance(found, Kind):
        return _file(found, head, length, None)
    if not isinstance(found, Lz4):
        return Description(None, found.name, None, {})
    wanted = MAX_MAGIC
    while True:
        size, content = peek(head, wanted)
        if not 0 < size <= MAX_RATIO * length:
            raise CorruptValue(f"an lz4 frame of {length} bytes says that it holds {size}")
        if len(content) < min(wanted, size):
            if len(head) == length:
                raise CorruptValue(f"an lz4 frame says that it holds {size} bytes, and has not even {wanted}")
            # Twice as much each time, so that all of it together is not much more than what is needed.
            return min(2 * len(head), length)
        inner = memoryview(content)
        kind = detect(inner, size)
        if not isinstance(kind, Kind):
            raise CorruptValue(f"compressed twice: {found.name} around {kind.name}")
        about = _file(kind, inner, size, found.name)
        if not isinstance(about, int):
            return about
        wanted = about


def _file(kind: Kind, head: memoryview, size: int, codec: str | None) -> Description | int:
    """What the file of ``size`` bytes is that begins with ``head``, or how many of them are needed."""
    fortran = False
    if kind is Kind.ARRAY:
        wide = 2 if bytes(head[6:7]) == b"\1" else 4  # bytes of the header's length, behind magic and version
        header = min(8 + wide + int.from_bytes(head[8 : 8 + wide], "little"), 12 + 4 * npy.MAX_LITERAL)
    else:
        header = min(8 + int.from_bytes(head[:8], "little"), 8 + safetensors.MAX_JSON)
    if len(head) < min(header, size):
        return min(header, size)
    if kind is Kind.ARRAY:
        array = npy.parse_header(head)
        columns = {"": Column(array.dtype, array.shape)}
        promised, fortran = array.size + array.nbytes, array.fortran
    else:
        record = safetensors.parse(head)
        columns = {name: Column(column.dtype, column.shape) for name, column in record.columns.items()}
        promised = record.size
    if promised != size:
        raise CorruptValue(f"the {kind.value} header promises {promised} bytes in all, and there are {size}")
    return Description(kind, codec, size, columns, fortran)
