"""The requests of the data plane: their bytes, and what is expected back. No IO."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from numbers import Real
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aionpredis.codecs import Codec
from aionpredis.errors import EncodeError, ServerError, UsageError
from aionpredis.formats import npy, safetensors
from aionpredis.memory import aligned_empty
from aionpredis.wire.resp import Blob, Buffer, Pattern, Reply, Template, encode, encode_bytes, encode_set

__all__ = [
    "MAX_VALUE",
    "SLICE",
    "Key",
    "ValueReply",
    "copied_bytes",
    "encode_array",
    "encode_record",
    "get_command",
    "key_bytes",
    "nbytes",
    "ok_reply",
    "parts_reply",
    "row_views",
    "set_array",
    "set_command",
    "slice_keys",
    "ttl_options",
    "value_reply",
    "values_command",
]

Key = str | bytes

MAX_VALUE = 512 << 20
"""Bytes: ``proto-max-bulk-len``. The server drops a connection that sends more in one string."""

SURELY_FITS = MAX_VALUE - (64 << 10)
"""Bytes of a payload that fits together with any header."""

MAX_TTL = 1e12
"""Seconds, 30,000 years. The server keeps milliseconds in 64 bits."""

SLICE = 200_000
"""Bytes of values that one request asks for: 16 arrays of 12.8 kB, or one chunk of 205 kB. One large MGET reaches 0.78 of the
C client, slices 0.97; two such chunks in one request take 5.1 µs a transition, one 4.8. That is as much as fits into the
send buffer of a server's Unix socket (Linux' ``net.core.wmem_default``, 208 KiB), so it is written in one go."""

GETS_SLICE = 2 * SLICE
"""The same where a request is GETs, one for each value: half the requests take 5% less of the client's CPU, and as long. (One
MGET of so much takes 15% longer.)"""

MAX_SLICE_KEYS = 256
"""Keys in one request, however small the values are."""

IN_THREAD = 256 * 1024
"""Bytes from which on a codec works, or an array is gathered, in a worker thread: LZ4 needs ~0.2 ms for them, as long as
a transposed copy, a hop to a thread ~0.1 ms."""


def key_bytes(key: object) -> bytes:
    """The key as the server knows it; ``str`` is UTF-8.

    Raises:
        UsageError: it is neither ``str`` nor ``bytes``, or holds half a surrogate pair.
    """
    if isinstance(key, bytes):
        return key
    if isinstance(key, str):
        try:
            return key.encode()
        except UnicodeEncodeError as error:
            raise UsageError(f"a key that is no valid UTF-8: {key!r:.80}") from error
    raise UsageError(f"a key is str or bytes, not {type(key).__name__}: {key!r:.80}")


def ttl_options(ttl: float | None) -> bytes:
    """The encoded ``PX`` option of SET for a time to live in seconds; empty for ``None``.

    Raises:
        UsageError: it is not a positive number that a server can add to the time of day.
    """
    if ttl is None:
        return b""
    number: float = ttl.item() if isinstance(ttl, np.generic) else ttl  # np.int16(60) * 1000 would be -5536
    if isinstance(number, bool) or not isinstance(number, Real) or not 0 < number <= MAX_TTL:
        raise UsageError(f"ttl is a positive number of seconds, or None for ever; not {ttl!r}")
    milliseconds = b"%d" % max(1, round(float(number) * 1000))
    return b"$2\r\nPX\r\n$%d\r\n%b\r\n" % (len(milliseconds), milliseconds)


def encode_array(array: object, codec: Codec | None, key: Key | None = None) -> list[Buffer]:
    """The value for an array: a header and the array's own memory, or a codec's output.

    Raises:
        EncodeError: it cannot be stored, or is longer than 512 MiB; with a codec, too: no reader lets it become longer.
    """
    if type(array) is not np.ndarray or array.nbytes > SURELY_FITS:
        _check_size(nbytes(array), key)
    try:
        head, payload = npy.encode(array)
    except EncodeError as error:
        error.key = key
        raise
    if codec is None and len(payload) <= SURELY_FITS:
        return [head, payload]
    return _finish([head, payload], codec, key)


def encode_record(record: object, codec: Codec | None, key: Key | None = None) -> list[Buffer]:
    """The value for a record (``dict`` of arrays), like :func:`encode_array`."""
    _check_size(nbytes(record), key)
    try:
        head, payloads = safetensors.encode(record)  # type: ignore[arg-type]  # it checks
    except EncodeError as error:
        error.key = key
        raise
    return _finish([head, *payloads], codec, key)


def _finish(parts: list[bytes | memoryview], codec: Codec | None, key: Key | None) -> list[Buffer]:
    _check_size(sum(map(len, parts)), key)
    if codec is None:
        return list(parts)
    encoded = codec.encode(parts)
    _check_size(sum(map(len, encoded)), key)
    return list(encoded)


def nbytes(value: object) -> int:
    """Bytes of an array or record, as far as known without looking at its elements."""
    if type(value) is np.ndarray:
        return value.nbytes
    if isinstance(value, Mapping):
        return sum(map(nbytes, value.values()))
    size = getattr(value, "nbytes", 0)
    return size if isinstance(size, int) else 0


def copied_bytes(value: object) -> int:
    """Of those, the ones that are copied where a value is encoded without a codec, as far as known."""
    if isinstance(value, Mapping):
        return sum(
            nbytes(array)
            for array in value.values()
            if not (isinstance(array, np.ndarray) and array.flags.c_contiguous and array.dtype.isnative)
        )
    return 0 if isinstance(value, np.ndarray) and value.flags.forc else nbytes(value)


def _check_size(size: int, key: Key | None) -> None:
    """Before the elements of a view (a broadcast one may claim any size) are gathered, and again before sending."""
    if size > MAX_VALUE:
        raise EncodeError(
            f"{size:,} bytes: a server takes {MAX_VALUE:,} in one value (proto-max-bulk-len); store it in parts",
            key=key,
        )


def get_command(key: bytes) -> bytes:
    """``GET key``."""
    return b"*2\r\n$3\r\nGET\r\n$%d\r\n%b\r\n" % (len(key), key)


def set_command(key: bytes, value: Sequence[Buffer], options: bytes = b"") -> list[Buffer]:
    """``SET key value [PX …]``. Borrows the value's memory."""
    if len(value) == 2 and isinstance(value[0], bytes):
        return encode_set(key, value[0], value[1], options, 2 if options else 0)
    buffers = encode("SET", key, Blob(value))
    if options:
        # the count of arguments stands first: 3 → 5
        buffers[0] = b"*5" + bytes(buffers[0])[2:]
        buffers.append(options)
    return buffers


def set_array(key: Key, array: NDArray[Any], options: bytes = b"") -> list[Buffer]:
    """:func:`set_command` of :func:`encode_array` without a codec, in half of its time, for an array that surely fits."""
    try:
        head, payload = npy.encode(array)
    except EncodeError as error:
        error.key = key
        raise
    return encode_set(key_bytes(key), head, payload, options, 2 if options else 0)


@lru_cache(64)
def _all_ok(count: int) -> Pattern:
    return Pattern([b"+OK\r\n" * count])


def slice_keys(size: int, *, joined: bool) -> int:
    """How many values of ``size`` bytes one request asks for: see :func:`values_command`."""
    return max(1, min(MAX_SLICE_KEYS, (SLICE if joined else GETS_SLICE) // size))


class _OkReply(Reply):
    """``b"OK"``, or errors: nothing else acknowledges a ``SET``."""

    __slots__ = ()

    def accepts(self, value: Any) -> bool:
        return value == b"OK" or isinstance(value, ServerError)


def ok_reply(count: int = 1) -> Reply:
    """Expects ``+OK`` from each of ``count`` commands."""
    return _OkReply(count, Template(_all_ok(count), ()))


class ValueReply(Reply):
    """Values of unknown size, each received into fresh aligned memory: ``uint8`` arrays, or ``None``.

    ``length``: each of the ``count`` replies is a list of so many values (``MGET``) instead of one (``GET``).
    """

    __slots__ = ("_length",)

    def __init__(self, count: int = 1, template: Template | None = None, *, length: int | None = None) -> None:
        super().__init__(count, template)
        self._length = length

    def accepts(self, value: Any) -> bool:
        if isinstance(value, ServerError):
            return True
        if self._length is None:
            return value is None or isinstance(value, np.ndarray)
        return (
            isinstance(value, list)
            and len(value) == self._length
            and all(item is None or isinstance(item, np.ndarray) for item in value)
        )

    def bulk(self, size: int) -> tuple[Sequence[memoryview], Any]:
        memory = aligned_empty(size)
        return (memory.data,), memory


@lru_cache(64)
def _value(header: bytes, size: int) -> Pattern:
    return Pattern([b"$%d\r\n%b" % (len(header) + size, header), size, b"\r\n"])


@lru_cache(64)
def _values(header: bytes, sizes: tuple[int, ...], count: int, begin: bytes) -> Pattern:
    head = b"$%d\r\n%b" % (len(header) + sum(sizes), header)
    items: list[bytes | int] = [begin + head, *sizes]
    for _ in range(count - 1):
        items += (b"\r\n" + head, *sizes)
    return Pattern([*items, b"\r\n"])


def value_reply(header: bytes, memory: memoryview) -> ValueReply:
    """What GET answers when the value is ``header`` and as many bytes as ``memory`` has; they go straight there."""
    return ValueReply(1, Template(_value(header, len(memory)), (memory,)))


def values_command(keys: Sequence[bytes], *, joined: bool) -> list[Buffer]:
    """The values of these keys: by one MGET if ``joined``, by a GET for each where one command must not name several."""
    return encode_bytes([b"MGET", *keys]) if joined else [b"".join(map(get_command, keys))]


def parts_reply(header: bytes, sizes: tuple[int, ...], places: Sequence[memoryview], *, joined: bool) -> ValueReply:
    """What :func:`values_command` is answered when every value is ``header`` and as many bytes as ``sizes`` say; these go
    straight to ``places``, as many for each value. None of them is 0.
    """
    count = len(places) // len(sizes)
    template = Template(_values(header, sizes, count, b"*%d\r\n" % count if joined else b""), places)
    return ValueReply(1, template, length=count) if joined else ValueReply(count, template)


def row_views(batch: NDArray[Any]) -> list[memoryview]:
    """The memory of ``batch[0]``, ``batch[1]``, …

    Raises:
        UsageError: it is read-only, or its rows are not C-contiguous.
    """
    if not batch.flags.writeable:
        raise UsageError("out= is read-only")
    if batch.flags.c_contiguous and batch.size:
        whole = batch.reshape(-1).view(np.uint8).data
        size = batch.nbytes // len(batch)
        return [whole[start : start + size] for start in range(0, batch.nbytes, size)]
    if not batch.size:
        return [memoryview(bytearray())] * len(batch)
    rows = [batch[index, ...] for index in range(len(batch))]  # with the dots an axis-less row is a view, too
    if not rows[0].flags.c_contiguous:
        raise UsageError("out= must be C-contiguous, or have C-contiguous rows: the bytes are received in place")
    return [npy.as_bytes(row) for row in rows]
