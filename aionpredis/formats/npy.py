"""One array ⇄ one ``.npy`` file, the format of :mod:`numpy.lib.format`: a padded header, then the array's memory.

No IO, and no copy: what is written is borrowed from the array, what is read is a view on the received bytes.
Headers repeat, so both directions are cached: making or parsing one costs about 20 µs, a hit 0.1 µs.

The types of ``ml_dtypes`` (bfloat16, float8_*, int4, …) are unknown to NumPy's header, which would call a bfloat16
``<V2``. They are written as a structure of one field named after the type, ``[('bfloat16', '<u2')]``. Reading maps it
back where ``ml_dtypes`` can be imported; elsewhere (and to stock ``np.load``) the array is that structure.

Never a pickle: object arrays are refused in both directions.
"""

from __future__ import annotations

import ast
import importlib
import io
import math
import re
import reprlib
from functools import lru_cache
from operator import index
from typing import Any, NamedTuple

import numpy as np
from numpy.lib import format as npy_format
from numpy.typing import NDArray

from ..errors import CorruptValue, EncodeError
from ..memory import ALIGNMENT, aligned_empty

__all__ = ["MAGIC", "Header", "as_array", "decode", "encode", "header_bytes", "over", "parse_header"]

MAGIC = b"\x93NUMPY"

MAX_LITERAL = 10_000
"""Characters of a header's literal: above it ``np.load`` refuses to read, because ``ast.literal_eval`` may crash."""

MAX_NDIM = 64 if np.lib.NumpyVersion(np.__version__) >= "2.0.0" else 32
MAX_SIZE = 2**63 - 1
"""Bytes and items that NumPy can address (``npy_intp``)."""

# 256 headers of at most 4 x 10,000 bytes: a hostile server can make a cache hold 10 MB, not more.
_CACHED = 256

_ML_DTYPE = re.compile(r"bfloat16|b?complex32|float[468]_\w{1,16}|u?int[124]")


class Header(NamedTuple):
    """What a ``.npy`` header says.

    ``fortran``: the payload is in Fortran order. ``size``: bytes of the header, which is where the payload begins; a
    multiple of 64 in files of NumPy ≥ 1.14, of 16 in older ones. ``nbytes``: bytes of the payload.
    """

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    fortran: bool
    size: int
    nbytes: int


def encode(array: object) -> tuple[bytes, memoryview]:
    """Header and payload; joined they are a ``.npy`` file.

    ``array``: an ndarray of any shape and strides, a NumPy scalar, or an object with ``__array__``. The payload is a
    one-dimensional ``'B'`` view that borrows the memory of a C- or Fortran-contiguous array: it changes when the array
    does. Any other layout is gathered into C order once.

    Raises :class:`EncodeError` for other types, masked arrays and dtypes that a ``.npy`` file cannot hold.
    """
    items: NDArray[Any] = array if type(array) is np.ndarray else as_array(array)
    header = header_bytes(items.dtype, items.shape)
    try:
        return header, items.data.cast("B")
    except (TypeError, ValueError):  # not C-contiguous, or of a dtype or shape that memoryview cannot cast
        if not items.flags.c_contiguous and items.flags.f_contiguous:
            return header_bytes(items.dtype, items.shape, True), as_bytes(items.T)
        return header, as_bytes(items)


def as_array(value: object) -> NDArray[Any]:
    """``value`` as a plain ndarray that shares its memory, or :class:`EncodeError` if it is none.

    Lists, numbers, strings and the like are refused, because the dtype that NumPy would guess is rarely meant.
    """
    if isinstance(value, np.ma.MaskedArray):
        raise EncodeError("a masked array would lose its mask: store array.filled(...), or its .data and .mask apart")
    if isinstance(value, np.ndarray | np.generic):
        return np.asarray(value)
    kind = type(value)
    if not hasattr(kind, "__array__"):
        raise EncodeError(f"{kind.__module__}.{kind.__qualname__} is not an array: pass np.asarray(value, dtype=...)")
    try:
        return np.asarray(value)
    except Exception as error:  # whatever the foreign type raises, such as torch's TypeError for memory on a GPU
        raise EncodeError(
            f"{kind.__module__}.{kind.__qualname__} could not be turned into an array: {error}"
        ) from error


def as_bytes(array: NDArray[Any]) -> memoryview:
    """The items in C order as a one-dimensional ``'B'`` view: borrowed if ``array`` is C-contiguous, else gathered."""
    if not array.nbytes:
        return memoryview(b"")
    # reshape(-1) copies exactly if it must; .view(uint8) also does the dtypes that have no buffer format.
    return array.reshape(-1).view(np.uint8).data if array.flags.c_contiguous else as_bytes(array.copy(order="C"))


@lru_cache(maxsize=_CACHED)
def header_bytes(dtype: np.dtype[Any], shape: tuple[int, ...], fortran: bool = False) -> bytes:
    """The header that NumPy itself would write, padded to a multiple of 64 bytes.

    A dtype's ``metadata`` and alignment flag are not kept: the format has no place for them.

    Raises :class:`EncodeError` for dtypes that the format cannot hold.
    """
    descr = _descr(dtype)
    fields = {"descr": descr, "fortran_order": bool(fortran), "shape": tuple(int(index(n)) for n in shape)}
    file = io.BytesIO()
    try:
        try:
            npy_format.write_array_header_1_0(file, fields)
        except UnicodeEncodeError:  # a field name outside Latin-1, for which NumPy would need version 3
            npy_format.write_array_header_1_0(file, fields | {"descr": _Escaped(descr)})
    except ValueError as error:  # more than 65,535 characters
        raise EncodeError(f"the .npy header of dtype {reprlib.repr(dtype)} is too long: {error}") from error
    header = file.getvalue()
    if len(header) - 10 > MAX_LITERAL:
        raise EncodeError(
            f"the .npy header of dtype {reprlib.repr(dtype)} takes {len(header) - 10} characters, and np.load reads"
            f" no more than {MAX_LITERAL}: store fewer fields, or a record of arrays"
        )
    return header


class _Escaped(list[Any]):
    """A list whose ``repr`` is ASCII, so that any field name fits a header of version 1."""

    def __repr__(self) -> str:
        return ascii(list(self))


def _descr(dtype: np.dtype[Any]) -> Any:
    """What stands for ``dtype`` in a header (``numpy.lib.format.dtype_to_descr``, without pickles and warnings)."""
    if dtype.hasobject:
        cure = "convert to a fixed width, array.astype('U') or 'S'" if dtype.kind == "T" else "convert to a plain dtype"
        raise EncodeError(f"dtype {dtype} holds references, and nothing is ever pickled: {cure}")
    if dtype.isbuiltin == 2 and _ML_DTYPE.fullmatch(dtype.name):
        return [(dtype.name, np.dtype(f"{dtype.str[0]}u{dtype.itemsize}").str)]
    try:
        descr: Any = dtype.str if dtype.names is None else dtype.descr
        kept = npy_format.descr_to_dtype(descr) == dtype
    except (TypeError, ValueError) as error:  # such as fields that overlap
        raise EncodeError(f"a .npy file cannot hold dtype {dtype}: {error}") from error
    if not kept:  # a user-defined type, alone or inside a structure, of which only the size would remain
        raise EncodeError(f"a .npy file cannot hold dtype {dtype}: store array.view(...) of a plain dtype of its size")
    return descr


def ml_dtype(name: str, carrier: np.dtype[Any]) -> np.dtype[Any]:
    """``ml_dtypes.<name>`` in the carrier's byte order; without that package, or type, a structure of one field."""
    if _ML_DTYPE.fullmatch(name):
        try:
            dtype: np.dtype[Any] = np.dtype(getattr(importlib.import_module("ml_dtypes"), name))
        except (ImportError, AttributeError):
            pass
        else:
            if dtype.itemsize == carrier.itemsize:
                return dtype if carrier.isnative else dtype.newbyteorder("S")
    return np.dtype([(name, carrier)])


def parse_header(value: memoryview) -> Header:
    """Read the header at the start of ``value`` (one-dimensional, ``'B'``, at least the whole header).

    Nothing is allocated for what the header claims, and nothing but ``nbytes`` is compared with ``value``'s length.

    Raises :class:`CorruptValue` for whatever is not a header of version 1, 2 or 3 of an array without objects.
    """
    try:
        # The version's first byte decides how wide the length is; _parse then checks all eight.
        size = 10 + value[8] + (value[9] << 8) if value[6] == 1 else 12 + int.from_bytes(value[8:12], "little")
    except IndexError:
        raise CorruptValue(f"the .npy header is cut off: {len(value)} bytes") from None
    if size > len(value):
        raise CorruptValue(f"the .npy header is cut off: it says {size} bytes, the value has {len(value)}")
    if size > 12 + 4 * MAX_LITERAL:  # UTF-8 takes at most four bytes for a character
        raise CorruptValue(f"the .npy header says {size} bytes; {MAX_LITERAL} characters are the most that is read")
    return _parse(value[:size].tobytes())


@lru_cache(maxsize=_CACHED)
def _parse(raw: bytes) -> Header:
    version = raw[6:8]
    if raw[:6] != MAGIC or version not in (b"\1\0", b"\2\0", b"\3\0"):
        raise CorruptValue(f"not a .npy header of version 1, 2 or 3: {raw[:8]!r}")
    try:
        text = raw[10 if version == b"\1\0" else 12 :].decode("utf-8" if version == b"\3\0" else "latin-1")
        if len(text) > MAX_LITERAL:
            raise ValueError(f"{len(text)} characters are more than {MAX_LITERAL}")
        fields = ast.literal_eval(text)
        if not isinstance(fields, dict) or fields.keys() != {"descr", "fortran_order", "shape"}:
            raise ValueError("not a dict of descr, fortran_order and shape")
        dtype = npy_format.descr_to_dtype(fields["descr"])
        shape, fortran = fields["shape"], fields["fortran_order"]
    except Exception as error:  # hostile text gets almost any exception out of these; RecursionError, MemoryError, too
        raise CorruptValue(f"the .npy header makes no sense: {reprlib.repr(str(error))}") from error
    if dtype.hasobject:
        raise CorruptValue("the .npy file holds pickled objects, which are never read")
    if dtype.subdtype is not None or not isinstance(fortran, bool):
        raise CorruptValue(f"the .npy header's descr or fortran_order is none: {reprlib.repr(fields)}")
    if dtype.names is not None and len(dtype.names) == 1:
        name = dtype.names[0]
        carrier = dtype[name]
        if carrier.kind == "u" and carrier.itemsize == dtype.itemsize and _ML_DTYPE.fullmatch(name):
            dtype = ml_dtype(name, carrier)
    return Header(dtype, shape, fortran, len(raw), payload_size(dtype, shape))


def payload_size(dtype: np.dtype[Any], shape: object) -> int:
    """Bytes of an array of this dtype and shape, or :class:`CorruptValue` if ``shape`` is none that NumPy can make."""
    if (
        not isinstance(shape, tuple)
        or len(shape) > MAX_NDIM
        or not all(type(n) is int and n >= 0 for n in shape)
        # NumPy's own limit leaves out axes of length 0.
        or math.prod(n for n in shape if n) * max(dtype.itemsize, 1) > MAX_SIZE
    ):
        raise CorruptValue(f"no array of dtype {reprlib.repr(dtype)} has the shape {reprlib.repr(shape)}")
    return math.prod(shape) * dtype.itemsize


def decode(value: memoryview) -> NDArray[Any]:
    """The array in a whole ``.npy`` file: a view on ``value`` (one-dimensional, ``'B'``), writable if ``value`` is.

    Aligned to 64 bytes if ``value`` is. A payload that does not begin at a multiple of 64 is copied to new memory.

    Raises :class:`CorruptValue` unless header and length agree exactly.
    """
    dtype, shape, fortran, size, nbytes = parse_header(value)
    if len(value) != size + nbytes:
        raise CorruptValue(
            f"the .npy header promises shape {shape} of {reprlib.repr(dtype)}, {size + nbytes} bytes in all,"
            f" and the value has {len(value)}"
        )
    if size % ALIGNMENT:  # a foreign writer: NumPy pads to 64 since 1.14
        payload = aligned_empty(nbytes).data
        payload[:] = value[size:]
        value, size = payload, 0
    return np.ndarray(shape, dtype, value, size, None, "F" if fortran else "C")


def over(header: Header, payload: NDArray[np.uint8]) -> NDArray[Any]:
    """The array that ``header`` describes, over memory that holds its payload and nothing else."""
    return np.ndarray(header.shape, header.dtype, payload, 0, None, "F" if header.fortran else "C")
