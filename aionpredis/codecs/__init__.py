"""What a stored value is, told by its first bytes, and compression around it.

A value is a ``.npy`` file, a ``.safetensors`` file, or the output of a codec around one of them (once, never nested).
"""

from __future__ import annotations

import enum
import re
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from numpy.typing import NDArray

from ..errors import CorruptValue, DecodeError, NotAnArray, UsageError, WrongKind
from ..formats import npy, safetensors
from .lz4 import Lz4

__all__ = ["Codec", "Kind", "Lz4", "compressed", "detect", "open_array", "open_record", "register", "resolve"]

Buffer = bytes | memoryview

MAX_MAGIC = 16
"""Bytes of a value that are compared with the codecs' magics."""

PICKLE = re.compile(rb"\x80[\x02-\x05]")
"""What a pickle of protocol 2 or newer begins with."""


@runtime_checkable
class Codec(Protocol):
    """A compression. Pure functions: large values are compressed in worker threads."""

    @property
    def name(self) -> str:
        """What a caller asks for."""

    @property
    def magic(self) -> bytes:
        """The first bytes, at least four, of whatever :meth:`encode` makes."""

    def encode(self, parts: Sequence[Buffer]) -> list[Buffer]:
        """The compressed file, in parts; or ``parts`` themselves if compression does not pay."""

    def decode(self, value: memoryview, max_bytes: int) -> memoryview:
        """New writable memory, aligned to 64 bytes, with what was compressed; at most ``max_bytes``.

        Raises :class:`CorruptValue` before it allocates what ``value`` merely claims.
        """


class Kind(enum.Enum):
    """A file that needs no decompression."""

    ARRAY = ".npy"
    RECORD = ".safetensors"


_codecs: dict[str, Codec] = {"lz4": Lz4()}


def register(codec: Codec) -> None:
    """Let ``codec=`` find it by its name, and reading by its magic.

    Raises :class:`UsageError` for a name or magic that could be taken for another.
    """
    name, magic = codec.name, codec.magic
    if name == "raw" or name in _codecs:
        raise UsageError(f"a codec named {name!r} is known already")
    if not 4 <= len(magic) <= MAX_MAGIC:
        raise UsageError(f"the magic of codec {name!r} must have 4 to {MAX_MAGIC} bytes: {magic!r}")
    # A .safetensors file begins with the length of its header: at most 100,000,000, as a little-endian u64.
    if int.from_bytes(magic[:4], "little") <= safetensors.MAX_HEADER:
        raise UsageError(f"the magic of codec {name!r} could be the length of a .safetensors header: {magic!r}")
    for other in (npy.MAGIC, *(known.magic for known in _codecs.values())):
        if magic.startswith(other) or other.startswith(magic):
            raise UsageError(f"the magic of codec {name!r} cannot be told from {other!r}: {magic!r}")
    _codecs[name] = codec


def resolve(codec: str | Codec | None) -> Codec | None:
    """The codec of that name, or ``codec`` itself (such as ``Lz4(level=9)``); None for ``None`` and ``"raw"``.

    Raises :class:`UsageError` for what is unknown here or not installed.
    """
    if codec is None or codec == "raw":
        return None
    if isinstance(codec, str):
        if codec not in _codecs:
            raise UsageError(f"unknown codec {codec!r}: there are {', '.join(['raw', *_codecs])}")
        codec = _codecs[codec]
    elif not isinstance(codec, Codec):
        raise UsageError(f"a codec is a name or has name, magic, encode and decode, unlike {type(codec).__qualname__}")
    elif codec.magic not in [known.magic for known in _codecs.values()]:
        raise UsageError(f"codec {codec.name!r} is not registered, so its values could not be read: register() it")
    if isinstance(codec, Lz4):
        codec.check()
    return codec


def detect(value: memoryview, length: int | None = None) -> Kind | Codec:
    """What ``value`` (one-dimensional, ``'B'``) begins like; :class:`NotAnArray` if like nothing known.

    ``length``: bytes of the whole value, if these are only the first ones, :data:`MAX_MAGIC` of them or more.
    """
    head = value[:MAX_MAGIC].tobytes()
    if head.startswith(npy.MAGIC):
        return Kind.ARRAY
    for codec in _codecs.values():
        if head.startswith(codec.magic):
            return codec
    if safetensors.looks_like(value, length):
        return Kind.RECORD
    size = len(value) if length is None else length
    kinds = ", ".join(_codecs)
    pickle = ", a pickle, it seems" if PICKLE.match(head) else ""
    raise NotAnArray(
        f"{size} bytes that are no .npy, .safetensors or {kinds} file: {head!r}{pickle}; "
        "get_value() gives them, docs/migrating.md helps"
    )


def compressed(value: memoryview) -> bool:
    """Whether opening ``value`` is a codec's work."""
    return any(value[: len(codec.magic)] == codec.magic for codec in _codecs.values())


def _unwrap(value: memoryview, max_bytes: int) -> tuple[Kind, memoryview]:
    found = detect(value)
    if isinstance(found, Kind):
        return found, value
    inner = found.decode(value, max_bytes)
    kind = detect(inner)
    if not isinstance(kind, Kind):
        raise CorruptValue(f"compressed twice: {found.name} around {kind.name}")
    return kind, inner


def open_array(value: memoryview, *, max_bytes: int, key: str | bytes | None = None) -> NDArray[Any]:
    """The array in a stored value: a view on ``value``, or on new memory of at most ``max_bytes`` if it is compressed.

    Raises :class:`DecodeError` with ``key``: :class:`NotAnArray`, :class:`WrongKind` or :class:`CorruptValue`.
    """
    try:
        kind, value = _unwrap(value, max_bytes)
        if kind is not Kind.ARRAY:
            raise WrongKind("a record is stored, not one array: read it with get_record()")
        return npy.decode(value)
    except DecodeError as error:
        error.key = key
        raise


def open_record(value: memoryview, *, max_bytes: int, key: str | bytes | None = None) -> dict[str, NDArray[Any]]:
    """The record in a stored value; memory and errors as with :func:`open_array`."""
    try:
        kind, value = _unwrap(value, max_bytes)
        if kind is not Kind.RECORD:
            raise WrongKind("one array is stored, not a record: read it with get()")
        return safetensors.decode(value)
    except DecodeError as error:
        error.key = key
        raise
