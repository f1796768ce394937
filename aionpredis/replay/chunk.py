"""Buffers that already are the file which a chunk of transitions becomes, and the function that fills them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from aionpredis.errors import EncodeError
from aionpredis.memory import aligned_empty
from aionpredis.replay.schema import Schema
from aionpredis.wire.resp import Buffer

__all__ = ["ChunkBuffer", "Rows", "make_rows"]


class ChunkBuffer:
    """Memory of one ``.safetensors`` file with ``length`` transitions. ``columns``: views into it, ``(length, *shape)``.

    A full chunk is sent without any encoding. A shorter one gets a new header of the same size.
    """

    def __init__(self, schema: Schema, length: int) -> None:
        layout = schema.layout(length)
        self.schema = schema
        self.length = length
        self.memory = aligned_empty(layout.size)
        start = len(layout.header)
        self.memory[:start] = np.frombuffer(layout.header, np.uint8)
        self._file_order = layout.order
        self.columns: dict[str, NDArray[Any]] = {}
        for name, column in layout.columns.items():
            part = self.memory[start + column.start : start + column.stop]
            self.columns[name] = part.view(column.dtype).reshape(column.shape)
        self._header_size = start

    def value(self, rows: int) -> list[Buffer]:
        """The file with the first ``rows`` transitions: views on this memory."""
        if rows == self.length:
            return [self.memory.data]
        header = self.schema.layout(rows, header_size=self._header_size).header
        parts = (self.columns[name][:rows].reshape(-1).view(np.uint8).data for name in self._file_order)
        return [header, *(part for part in parts if len(part))]

    def episode_ends(self, rows: int) -> bytes:
        """A bit for each transition, lowest first: whether an episode ended there. Empty if it never did."""
        ends = np.zeros(rows, np.bool_)
        for name in self.schema.episode_ends:
            ends |= self.columns[name][:rows]
        return np.packbits(ends, bitorder="little").tobytes() if ends.any() else b""


class Rows(Protocol):
    """What :func:`make_rows` makes."""

    append: Callable[..., Awaitable[None]]
    """Write one transition, a keyword argument for each column."""
    switch: Callable[[Mapping[str, NDArray[Any]], int], None]
    """Go on in these columns, which have room for so many rows."""
    count: Callable[[], int]
    """How many rows are written."""


_SOURCE = """
def make(full, full_error, check, done, ndarray, {dtypes}{shapes}):
    row = length = 0
    {columns} = None

    def append(*, {names}):
        nonlocal row
        if row >= length:
            full_error()
        {checks}
        if not row:
            {first_checks}
        {assignments}
        row += 1
        if row < length:
            return done
        return full()

    def switch(columns, room):
        nonlocal row, length, {columns_nonlocal}
        row, length = 0, room
        {unpack}

    def count():
        return row

    return append, switch, count
"""


class _Made:
    def __init__(self, append: Any, switch: Any, count: Any) -> None:
        self.append = append
        self.switch = switch
        self.count = count


def make_rows(
    schema: Schema, *, full: Callable[[], Awaitable[None]], full_error: Callable[[], None], done: Awaitable[None]
) -> Rows:
    """Functions that write transitions into columns, compiled for this schema.

    Compiled, because ``append`` is what a simulator calls at every step: 1.0 µs, against 2.4 with a loop over keyword
    arguments and 5.2 with a full check of each. It checks shape and dtype of arrays by identity at every call, and
    everything else in the first row of a chunk; NumPy's assignment catches the rest.

    ``full`` is called when the last row was written, and its result returned; ``done`` is returned otherwise;
    ``full_error`` raises, when there is no row to write.
    """
    names = list(schema)
    arrays = [name for name in names if schema[name][1]]
    source = _SOURCE.format(
        dtypes="".join(f"d_{name}, " for name in arrays),
        shapes="".join(f"s_{name}, " for name in arrays),
        columns=" = ".join(f"c_{name}" for name in names),
        columns_nonlocal=", ".join(f"c_{name}" for name in names),
        names=", ".join(names),
        checks="\n        ".join(
            f"if {name}.__class__ is not ndarray or {name}.dtype is not d_{name} or {name}.shape != s_{name}: "
            f"{name} = check({name!r}, {name})"
            for name in arrays
        ),
        first_checks="\n            ".join(
            ["pass", *(f"check({name!r}, {name})" for name in names if name not in arrays)]
        ),
        assignments="\n        ".join(f"c_{name}[row] = {name}" for name in names),
        unpack="\n        ".join(f"c_{name} = columns[{name!r}]" for name in names),
    )
    namespace: dict[str, Any] = {}
    # The names are identifiers, no keywords and without a leading underscore: Schema has seen to that.
    exec(source, namespace)
    arguments = [argument for name in arrays for argument in (schema[name][0],)]
    arguments += [schema[name][1] for name in arrays]  # type: ignore[misc]

    def check(name: str, value: object) -> NDArray[Any]:
        return check_column(name, value, *schema[name])

    return cast("Rows", _Made(*namespace["make"](full, full_error, check, done, np.ndarray, *arguments)))


_RANK = {"b": 0, "u": 1, "i": 1, "f": 2, "c": 3}


def check_column(name: str, value: object, dtype: np.dtype[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    """The value as an array that may be assigned to a row of the column.

    Raises:
        EncodeError: it has another shape, or its dtype cannot be converted without losing its kind (float to int).
    """
    array = np.asarray(value)
    if array.shape != shape:
        raise EncodeError(f"column {name!r} takes shape {shape}, not {array.shape}")
    if array.dtype != dtype:
        ranks = _RANK.get(array.dtype.kind), _RANK.get(dtype.kind)
        fits = np.can_cast(array.dtype, dtype, "same_kind")
        if not fits and not shape and None not in ranks:
            fits = ranks[0] <= ranks[1]  # type: ignore[operator]  # a Python int is int64, whatever its value
        if not fits:
            raise EncodeError(f"column {name!r} takes {dtype}, not {array.dtype}: convert it first")
    return array
