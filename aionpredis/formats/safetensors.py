"""One record (a mapping of names to arrays) ⇄ one ``.safetensors`` file.

The format (https://github.com/huggingface/safetensors#format): a little-endian u64 n, n bytes of JSON that give each
tensor's dtype, shape and offsets, then the tensors in C order and little-endian, without holes. Here the JSON is padded
with spaces so that the data begins at a multiple of 64, and the columns lie by descending itemsize, so that each is
aligned. Where that differs from the caller's order, the caller's is kept in ``__metadata__`` under ``columns``.

No IO; views are borrowed from the arrays, or are views on the received bytes. Headers are cached in both directions.
"""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple, NoReturn

import numpy as np
from numpy.typing import DTypeLike, NDArray

from ..errors import CorruptValue, EncodeError, UsageError
from ..memory import ALIGNMENT
from .npy import as_array, as_bytes, ml_dtype, payload_size

__all__ = ["Column", "Layout", "decode", "encode", "layout", "looks_like", "parse"]

MAX_HEADER = 100_000_000
"""Bytes of JSON that the stock library reads."""

MAX_JSON = 4 << 20
"""Bytes of JSON that are written and read here: ~40,000 columns. Nonsense of that length takes 0.4 s and 110 MB to parse,
while the event loop stands still; 100 MB of it took 9 s and 2.6 GB."""

METADATA = "__metadata__"
ORDER = "columns"
"""The key in ``__metadata__`` whose value is the caller's column order, as a JSON list."""

_CODES = {
    np.dtype(name): code
    for name, code in {
        "?": "BOOL",
        "u1": "U8",
        "i1": "I8",
        "<u2": "U16",
        "<i2": "I16",
        "<f2": "F16",
        "<u4": "U32",
        "<i4": "I32",
        "<f4": "F32",
        "<u8": "U64",
        "<i8": "I64",
        "<f8": "F64",
        "<c8": "C64",
    }.items()
}
_ML_CODES = {
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "float8_e8m0fnu": "F8_E8M0",
    "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2fnuz": "F8_E5M2FNUZ",
}
_DTYPES = {code: dtype for dtype, code in _CODES.items()}
_ML_NAMES = {code: name for name, code in _ML_CODES.items()}

_KNOWN = (*(dtype.name for dtype in _CODES), *_ML_CODES)

# Each cache holds at most 128 headers of 64 kB, 8 MB: larger ones are parsed in less time than their data travels.
_CACHED = 128
_CACHED_BYTES = 65_536


class Column(NamedTuple):
    """One array of a record: its little-endian dtype, its shape, and its place, in bytes from the start of the data."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Layout:
    """Where everything is in a file. ``header``: all bytes before the data. ``columns``: in the caller's order.

    ``order``: the columns' names as they lie in the file. ``nbytes``: bytes of data.
    """

    header: bytes
    columns: Mapping[str, Column]
    order: tuple[str, ...]
    nbytes: int

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return len(self.header) + self.nbytes


_Spec = tuple[tuple[Any, np.dtype[Any], tuple[int, ...]], ...]  # the names are checked when a layout is made
_made: dict[tuple[_Spec, int | None], Layout] = {}
_parsed: dict[bytes, Layout] = {}


def _keep(cache: dict[Any, Layout], key: object, layout: Layout) -> Layout:
    if len(layout.header) <= _CACHED_BYTES:
        if len(cache) >= _CACHED:
            cache.clear()
        cache[key] = layout
    return layout


def layout(
    spec: Mapping[str, tuple[DTypeLike, tuple[int, ...]]],
    *,
    header_size: int | None = None,
) -> Layout:
    """The file that holds columns of these dtypes and shapes.

    ``header_size`` pads the header to exactly that many bytes, a multiple of 64, so that a chunk with fewer rows begins
    its data where the full one does; :class:`UsageError` if the header does not fit. :class:`EncodeError` names the
    column whose name or dtype the format does not have.
    """
    return _layout(
        tuple((name, np.dtype(dtype), tuple(map(int, shape))) for name, (dtype, shape) in spec.items()), header_size
    )


def _layout(spec: _Spec, header_size: int | None = None) -> Layout:
    known = _made.get((spec, header_size))
    return _keep(_made, (spec, header_size), _make(spec, header_size)) if known is None else known


def _make(spec: _Spec, header_size: int | None) -> Layout:
    for name, dtype, shape in spec:
        if not isinstance(name, str) or name == METADATA:
            raise EncodeError(f"a column's name is a str other than {METADATA!r}, not {reprlib.repr(name)}")
        if _code(dtype) is None:
            if dtype.names is not None and len(dtype.names) == 1 and dtype.names[0] in _ML_CODES:
                raise EncodeError(
                    f"column {name!r} is of {dtype.names[0]} as it is without the package ml_dtypes: install that, or"
                    f" .view(ml_dtypes.{dtype.names[0]}) if it was installed since"
                )
            raise EncodeError(
                f"column {name!r}: a record cannot hold dtype {dtype}, only {', '.join(_KNOWN)}: convert it with"
                " .astype(...), or store the array under a key of its own"
            )
        if min(shape, default=0) < 0:
            raise UsageError(f"column {name!r} has the shape {shape}")
    columns: dict[str, Column] = {}
    tensors: dict[str, object] = {}
    stop = 0
    # sorted() is stable: columns of one itemsize stay in the caller's order.
    for name, dtype, shape in sorted(spec, key=lambda column: -column[1].itemsize):
        start, stop = stop, stop + dtype.itemsize * math.prod(shape)
        columns[name] = Column(dtype if dtype.isnative else dtype.newbyteorder("<"), shape, start, stop)
        tensors[name] = {"dtype": _code(dtype), "shape": shape, "data_offsets": (start, stop)}
    order = tuple(columns)
    names = [name for name, _, _ in spec]
    if names != list(order):
        tensors = {METADATA: {ORDER: json.dumps(names)}} | tensors
    try:
        text = json.dumps(tensors, separators=(",", ":"), ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise EncodeError(f"a column's name is not valid Unicode: {error}") from error
    size = -(-(8 + len(text)) // ALIGNMENT) * ALIGNMENT
    if header_size is not None:
        if header_size < size or header_size % ALIGNMENT:
            raise UsageError(f"header_size={header_size} is no multiple of {ALIGNMENT} that holds {size} bytes")
        size = header_size
    if size - 8 > MAX_JSON:
        raise EncodeError(
            f"the header of this record of {len(columns):,} columns takes {size:,} bytes, and {MAX_JSON:,} is the most that"
            " is read: store it as several records"
        )
    header = (size - 8).to_bytes(8, "little") + text.ljust(size - 8)
    return Layout(header, MappingProxyType({name: columns[name] for name in names}), order, stop)


def _code(dtype: np.dtype[Any]) -> str | None:
    """The format's name for ``dtype`` in either byte order, if it has one."""
    if dtype.isbuiltin == 2:
        return _ML_CODES.get(dtype.name)
    return _CODES.get(dtype if dtype.isnative else dtype.newbyteorder("<"))


def encode(record: Mapping[str, object]) -> tuple[bytes, list[memoryview]]:
    """Header and columns in file order; joined they are a ``.safetensors`` file.

    The views are one-dimensional, ``'B'``, never empty, and borrow the memory of arrays that are C-contiguous and
    little-endian: they change when the array does. Others are converted once.

    Raises :class:`EncodeError`, with the column's name, for what a record cannot hold.
    """
    if not isinstance(record, Mapping):
        raise EncodeError(f"a record is a mapping of names to arrays, not {type(record).__qualname__}")
    arrays: dict[str, NDArray[Any]] = {}
    for name, value in record.items():
        try:
            arrays[name] = value if type(value) is np.ndarray else as_array(value)
        except EncodeError as error:
            raise EncodeError(f"column {name!r}: {error}") from error
    made = _layout(tuple([(name, array.dtype, array.shape) for name, array in arrays.items()]))
    views = []
    for name in made.order:
        array = arrays[name]
        if array.nbytes:
            dtype = made.columns[name].dtype
            views.append(as_bytes(array if array.dtype == dtype else array.astype(dtype, order="C")))
    return made.header, views


def looks_like(value: memoryview, length: int | None = None) -> bool:
    """Whether ``value`` begins like a ``.safetensors`` file: a header's length that fits, then ``{``.

    ``length``: bytes of the whole file, if ``value`` is only the first ones of it.
    """
    size = (len(value) if length is None else length) - 8
    return len(value) > 8 and value[8] == 0x7B and int.from_bytes(value[:8], "little") <= min(size, MAX_HEADER)


def parse(value: memoryview) -> Layout:
    """Read the header at the start of ``value`` (one-dimensional, ``'B'``, at least the whole header).

    The columns are in the order of ``__metadata__`` if it has one, else as in the file. Nothing is allocated for what
    the header claims, and the data's length is not compared with ``value``'s.

    Raises :class:`CorruptValue` for a header that breaks the format's rules, or has a dtype that is unknown here.
    """
    if not looks_like(value):
        raise CorruptValue(f"no safetensors header of at most {len(value)} bytes: {value[:16].tobytes()!r}")
    size = int.from_bytes(value[:8], "little")
    if size > MAX_JSON:
        raise CorruptValue(f"the safetensors header says {size:,} bytes; {MAX_JSON:,} are the most that is read")
    raw = value[: 8 + size].tobytes()
    known = _parsed.get(raw)
    return _keep(_parsed, raw, _parse(raw)) if known is None else known


def _parse(raw: bytes) -> Layout:
    try:
        # Decoded here, because json.loads(bytes) would also take UTF-16.
        tree = json.loads(
            raw[8:].decode(), object_pairs_hook=_unique, parse_constant=_refuse, parse_float=_refuse, parse_int=_natural
        )
    except (ValueError, RecursionError) as error:
        raise CorruptValue(f"the safetensors header makes no sense: {reprlib.repr(str(error))}") from error
    metadata = tree.pop(METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise CorruptValue(f"the safetensors header's {METADATA} is not a mapping of strings to strings")
    columns = {name: _column(name, fields) for name, fields in tree.items()}
    order = tuple(sorted(columns, key=lambda name: columns[name][2:]))
    end = 0
    for name in order:
        _, _, start, stop = columns[name]
        if start != end:
            raise CorruptValue(f"column {reprlib.repr(name)} begins at byte {reprlib.repr(start)}, not at {end}")
        end = stop
    names = _callers_order(metadata, order)
    return Layout(raw, MappingProxyType({name: columns[name] for name in names}), order, end)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(tree := dict(pairs)) != len(pairs):
        raise ValueError("a name occurs twice")
    return tree


def _refuse(text: str) -> NoReturn:
    raise ValueError(f"{reprlib.repr(text)} is no natural number")


def _natural(text: str) -> int:
    if text[0] == "-":  # -0, too, as the stock library has it
        _refuse(text)
    return int(text)


def _column(name: str, fields: object) -> Column:
    where = f"column {reprlib.repr(name)}"
    if not isinstance(fields, dict) or fields.keys() != {"dtype", "shape", "data_offsets"}:
        raise CorruptValue(f"{where} is not described by dtype, shape and data_offsets")
    code, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(code, str) or (code not in _DTYPES and code not in _ML_NAMES):
        raise CorruptValue(f"{where} has the dtype {reprlib.repr(code)}, which is unknown here")
    dtype = _DTYPES[code] if code in _DTYPES else ml_dtype(_ML_NAMES[code], np.dtype("<u2" if code == "BF16" else "u1"))
    if not isinstance(shape, list) or not isinstance(offsets, list) or [type(n) for n in offsets] != [int, int]:
        raise CorruptValue(f"{where} has a shape or offsets that are no lists of integers")
    nbytes = payload_size(dtype, tuple(shape))
    start, stop = offsets
    if start < 0 or stop - start != nbytes:
        raise CorruptValue(f"{where} needs {nbytes} bytes and has those at {reprlib.repr(offsets)}")
    return Column(dtype, tuple(shape), start, stop)


def _callers_order(metadata: dict[str, str], order: tuple[str, ...]) -> tuple[str, ...]:
    """The order in ``metadata`` if it names exactly these columns; a foreign file may use the key for anything."""
    try:
        names = json.loads(metadata.get(ORDER, "null"))
    except (ValueError, RecursionError):
        return order
    if isinstance(names, list) and all(isinstance(name, str) for name in names) and sorted(names) == sorted(order):
        return tuple(names)
    return order


def decode(value: memoryview) -> dict[str, NDArray[Any]]:
    """The record in a whole ``.safetensors`` file, in the caller's order.

    The arrays are views on ``value`` (one-dimensional, ``'B'``), writable if ``value`` is. A column that is not aligned
    for its dtype, which a foreign writer may leave, is copied to memory of its own. Without ``ml_dtypes``, a BF16
    column is a structure of one field, ``[('bfloat16', '<u2')]``, and F8 alike.

    Raises :class:`CorruptValue` unless header and length agree exactly.
    """
    found = parse(value)
    if len(value) != found.size:
        raise CorruptValue(f"the safetensors header promises {found.size} bytes in all, and the value has {len(value)}")
    data = len(found.header)
    record: dict[str, NDArray[Any]] = {}
    for name, (dtype, shape, start, _) in found.columns.items():
        array: NDArray[Any] = np.ndarray(shape, dtype, value, data + start)
        record[name] = array if array.flags.aligned else array.copy()
    return record
