"""Buffers that already are the file which a chunk of transitions becomes, and the function that fills them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from aionpredis import codecs
from aionpredis.errors import EncodeError, SchemaMismatch
from aionpredis.formats import safetensors
from aionpredis.memory import aligned_empty
from aionpredis.replay.log import ChunkId, Names
from aionpredis.replay.schema import Schema
from aionpredis.wire import resp
from aionpredis.wire.resp import Buffer

__all__ = ["ChunkBuffer", "Rows", "make_rows", "open_chunk"]

NUMPY_REFUSES_LARGE_INTS = np.lib.NumpyVersion(np.__version__) >= "2.0.0"
"""Whether assigning an int that is out of range raises; NumPy 1 stores its lowest bits. There each int is looked at, which
takes 4 µs, 15 in a narrow column."""


class ChunkBuffer:
    """Memory of one ``.safetensors`` file with ``length`` transitions. ``columns``: views into it, ``(length, *shape)``.

    A full chunk is sent without any encoding. A shorter one gets another header of the same size.
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
        # A bool is a byte, 0 or 1.
        self._ends = [self.columns[name].view(np.uint8).data for name in schema.episode_ends]

    def value(self, rows: int) -> list[Buffer]:
        """The file with the first ``rows`` transitions: views on this memory."""
        if rows == self.length:
            return [self.memory.data]
        header = self.schema.layout(rows).header
        parts = (self.columns[name][:rows].reshape(-1).view(np.uint8).data for name in self._file_order)
        return [header, *(part for part in parts if len(part))]

    def episode_ends(self, rows: int) -> bytes:
        """A bit for each transition, lowest first: whether an episode ended there. Empty if it never did."""
        for column in self._ends:
            if b"\1" in column[:rows].tobytes():  # ten times as fast as any() of an array
                columns = [self.columns[name][:rows] for name in self.schema.episode_ends]
                return np.packbits(np.logical_or.reduce(columns), bitorder="little").tobytes()
        return b""


def open_chunk(
    value: NDArray[np.uint8], schema: Schema, names: Names, run: int, chunk: ChunkId
) -> dict[str, NDArray[Any]]:
    """The columns of a chunk as it is stored: views on ``value``, ``(rows, *shape)``, unless that was compressed.

    Raises:
        SchemaMismatch: it has other columns, or another number of rows.
        NotAnArray, WrongKind, CorruptValue: the stored value is something else; or it is compressed, and says that it holds
            more than so many rows take.
    """
    key = names.data(run, chunk)
    most = safetensors.MAX_JSON + chunk.rows * schema.row_nbytes
    record = codecs.open_record(value.data, max_bytes=min(most, resp.MAX_BULK), key=key)
    found = {name: (array.dtype, array.shape) for name, array in record.items()}
    if found != {name: (dtype, (chunk.rows, *shape)) for name, (dtype, shape) in schema.items()}:
        raise SchemaMismatch(
            f"chunk {key!r} has not {chunk.rows} rows of {schema!r:.400}, but"
            f" {', '.join(f'{name}: {dtype} {shape}' for name, (dtype, shape) in found.items()):.400}",
            replay=names.name,
            run=run,
        )
    return record


class Rows(Protocol):
    """What :func:`make_rows` makes."""

    append: Callable[..., Any]
    """Write one transition, a keyword argument for each column."""
    switch: Callable[[Mapping[str, NDArray[Any]], int], None]
    """Go on in these columns, which have room for so many rows."""
    count: Callable[[], int]
    """How many rows are written."""


_SOURCE = """
def make(_full, _late, _check, _kind, _failed, _done, _ndarray, {dtypes}{shapes}):
    _row = _length = 0
    {columns}{no_kinds}_none = None

    def append(*, {names}):
        nonlocal {kinds}_row
        if _row >= _length:
            return _late({keywords})
        {checks}
        try:
            {assignments}
        except (TypeError, ValueError, OverflowError) as _error:
            raise _failed(_error) from None
        _row += 1
        if _row < _length:
            return _done
        return _full()

    def switch(_columns, _room):
        nonlocal _row, _length, {columns_nonlocal}
        _row, _length = 0, _room
        {unpack}

    def count():
        return _row

    return append, switch, count
"""


class _Made:
    def __init__(self, append: Any, switch: Any, count: Any) -> None:
        self.append = append
        self.switch = switch
        self.count = count


def make_rows(schema: Schema, *, full: Callable[[], object], late: Callable[..., object], done: object) -> Rows:
    """Functions that write transitions into columns, compiled for this schema.

    Compiled, because ``append`` is what a simulator calls at every step: 1.0 µs, against 2.4 with a loop over keyword
    arguments and 5.2 with a full check of each. It compares class, dtype and shape by identity, and looks closer only
    where they differ from what was checked before: NumPy's assignment alone would store 2.7 as 2, and "7" as 7.

    ``full`` is called when the last row was written, and its result returned; ``done`` is returned otherwise. If there
    is no row to write, ``late`` gets the transition and its result is returned.
    """
    names = list(schema)
    arrays = [name for name in names if schema[name][1]]
    scalars = [name for name in names if not schema[name][1]]
    source = _SOURCE.format(
        dtypes="".join(f"_d_{name}, " for name in arrays),
        shapes="".join(f"_s_{name}, " for name in arrays),
        columns="".join(f"_c_{name} = " for name in names),
        no_kinds="".join(f"_k_{name} = " for name in scalars),
        kinds="".join(f"_k_{name}, " for name in scalars),
        columns_nonlocal=", ".join(f"_c_{name}" for name in names),
        names=", ".join(names),
        keywords=", ".join(f"{name}={name}" for name in names),
        checks="\n        ".join(
            f"if {name}.__class__ is not _ndarray or {name}.dtype is not _d_{name} or {name}.shape != _s_{name}: "
            f"{name} = _check({name!r}, {name})"
            if name in arrays
            else f"if {name}.__class__ is not _k_{name}: _k_{name} = _kind({name!r}, {name})"
            for name in names
        ),
        assignments="\n            ".join(f"_c_{name}[_row] = {name}" for name in names),
        unpack="\n        ".join(f"_c_{name} = _columns[{name!r}]" for name in names),
    )
    namespace: dict[str, Any] = {}
    # A column's name is an identifier, no keyword, and without the leading underscore that all names in there have.
    exec(source, namespace)
    dtypes, shapes = [schema[name][0] for name in arrays], [schema[name][1] for name in arrays]

    def check(name: str, value: object) -> NDArray[Any]:
        return check_column(name, value, *schema[name])

    def kind(name: str, value: object) -> type | None:
        return check_scalar(name, value, schema[name][0])

    made = namespace["make"](full, late, check, kind, _failed, done, np.ndarray, *dtypes, *shapes)
    return cast("Rows", _Made(*made))


def _failed(error: Exception) -> EncodeError:
    return EncodeError(f"a value does not fit its column: {error}")


def check_scalar(name: str, value: object, dtype: np.dtype[Any]) -> type | None:
    """The value's class if every value of this class may be assigned to the column, else ``None``.

    Raises:
        EncodeError: as :func:`check_column`.
    """
    array = check_column(name, value, dtype, ())
    kind = type(value)
    if kind is int and dtype.kind in "iu" and not NUMPY_REFUSES_LARGE_INTS:
        return None
    if kind in (bool, int, float, complex):
        return kind
    return kind if isinstance(value, np.generic) and _converts(array.dtype, dtype) else None


def check_column(name: str, value: object, dtype: np.dtype[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    """The value as an array that may be assigned to a row of the column.

    Raises:
        EncodeError: it has another shape, is of a larger kind (a float for an int), or an integer does not fit.
    """
    if isinstance(value, np.ma.MaskedArray):
        raise EncodeError(f"column {name!r}: the mask of a masked array cannot be stored; fill it first")
    try:
        array = np.asarray(value)
    except (TypeError, ValueError) as error:
        raise EncodeError(f"column {name!r}: {error}") from None
    if array.shape != shape:
        raise EncodeError(f"column {name!r} takes shape {shape}, not {array.shape}")
    if _converts(array.dtype, dtype):
        return array
    if array.dtype.kind in "iu" and dtype.kind in "iu":
        converted = array.astype(dtype)
        if (converted == array).all():
            return converted
        raise EncodeError(f"column {name!r}: an {array.dtype} that {dtype} cannot hold")
    raise EncodeError(f"column {name!r} takes {dtype}, not {array.dtype}: convert it first")


def _converts(source: np.dtype[Any], target: np.dtype[Any]) -> bool:
    """Whether each value of ``source`` can be converted without surprise. Digits of a fraction may be lost."""
    if source.kind in "iu" and target.kind in "iu":
        return np.can_cast(source, target, "safe")
    if target.isbuiltin == 2:  # bfloat16, float8: NumPy knows no kinds for them
        return source.kind in "biuf" or source == target
    return np.can_cast(source, target, "same_kind")
