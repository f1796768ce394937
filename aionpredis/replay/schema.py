"""The columns of a transition."""

from __future__ import annotations

import hashlib
import json
import keyword
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from aionpredis.errors import UsageError
from aionpredis.formats import safetensors
from aionpredis.names import is_count

__all__ = ["Schema"]

MAX_ROWS = 2**32 - 1
"""Transitions in one chunk; its number in the log has 32 bits."""

MAX_CHUNK_BYTES = 64 << 20
"""Bytes of one chunk. It is received in one piece, and four of them circulate in every actor."""

EPISODE_ENDS = ("terminated", "truncated")
"""Columns (scalar ``bool``) that say that an episode ended with this transition, as Gymnasium names them."""


class Schema(Mapping[str, "tuple[np.dtype[Any], tuple[int, ...]]"]):
    """Names, dtypes and shapes of what one transition consists of::

        Schema(state=("uint8", (80, 80)), action="int64", reward="float32", terminated="bool", truncated="bool")

    Each column is a dtype (a scalar), or ``(dtype, shape)``. A mapping from name to ``(dtype, shape)``.

    Raises:
        UsageError: a name is not an identifier, a shape not a tuple of non-negative ints, or a transition larger than a chunk.
        EncodeError: a dtype that a ``.safetensors`` file cannot hold.
    """

    def __init__(self, /, **columns: DTypeLike | tuple[DTypeLike, tuple[int, ...]]) -> None:
        if not columns:
            raise UsageError("a schema has at least one column")
        self._columns: dict[str, tuple[np.dtype[Any], tuple[int, ...]]] = {}
        for name, column in columns.items():
            if keyword.iskeyword(name) or not name.isidentifier() or name.startswith("_"):
                raise UsageError(f"column {name!r}: a name is an identifier, without a leading underscore")
            dtype: Any = column
            shape: Any = ()
            if isinstance(column, tuple) and len(column) == 2 and isinstance(column[1], tuple | list):
                dtype, shape = column
            if not all(is_count(size, 0) for size in shape):
                raise UsageError(f"column {name!r}: a shape is a tuple of sizes, not {shape!r}")
            if dtype is None:
                raise UsageError(f"column {name!r} has no dtype")  # NumPy would take float64
            try:
                native = np.dtype(dtype)
            except TypeError as error:
                raise UsageError(f"column {name!r}: {error}") from None
            if not native.isnative:
                # By its name: the result of newbyteorder() is a new object, and append() compares dtypes by identity.
                native = np.dtype(native.newbyteorder("=").str)
            self._columns[name] = native, tuple(shape)
        # As safetensors has them, by descending itemsize; then what is small together, for readers fetch it together.
        self._stored = sorted(
            self._columns.items(), key=lambda item: (-item[1][0].itemsize, math.prod(item[1][1]), item[0])
        )
        self._header_size = len(safetensors.layout(self._spec(MAX_ROWS)).header)  # unsupported dtypes show here
        self.row_nbytes = sum(dtype.itemsize * math.prod(shape) for dtype, shape in self._columns.values())
        self.max_chunk = MAX_CHUNK_BYTES // max(self.row_nbytes, 1)  # transitions
        if not self.max_chunk:
            raise UsageError(
                f"a transition of {self.row_nbytes:,} bytes is more than a chunk holds, {MAX_CHUNK_BYTES:,}: store what is"
                " large under keys of its own"
            )
        self.episode_ends = tuple(name for name in EPISODE_ENDS if self._columns.get(name) == (np.dtype(np.bool_), ()))

    def _spec(self, rows: int) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
        return {name: (dtype, (rows, *shape)) for name, (dtype, shape) in self._stored}

    def layout(self, rows: int) -> safetensors.Layout:
        """The file that holds ``rows`` transitions, column by column. Its data begins at the same byte for any ``rows``.

        Equal schemas have the same, whatever the order of their columns: a reader predicts each byte that is no data.
        """
        return safetensors.layout(self._spec(rows), header_size=self._header_size)

    @property
    def digest(self) -> str:
        """Equal for equal schemas: 16 hexadecimal digits."""
        columns = sorted((name, dtype.name, shape) for name, (dtype, shape) in self._columns.items())
        return hashlib.sha256(json.dumps(columns).encode()).hexdigest()[:16]

    def __getitem__(self, name: str) -> tuple[np.dtype[Any], tuple[int, ...]]:
        return self._columns[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._columns)

    def __len__(self) -> int:
        return len(self._columns)

    def __repr__(self) -> str:
        columns = (f"{name}=({dtype.name!r}, {shape})" for name, (dtype, shape) in self._columns.items())
        return f"Schema({', '.join(columns)})"
