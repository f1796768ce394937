"""Values under a key: arrays, records, whatever is compressed, and chunks of transitions."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import lz4.frame
import numpy as np
import safetensors as stock

from aionpredis import Schema
from aionpredis.codecs import Kind, Lz4, open_array, open_record
from aionpredis.codecs.describe import describe
from aionpredis.errors import DecodeError, EncodeError, SchemaMismatch
from aionpredis.formats import npy, safetensors
from aionpredis.replay.chunk import ChunkBuffer, open_chunk
from aionpredis.replay.log import ChunkId, Names

from ..strategies import same, writable
from .guard import at_most

LITERAL = 1_000
"""Bytes that a byte of a ``.npy`` header's literal may cost: Python's own parser makes a tree of it."""

TABLES = 8_000_000
"""Bytes by which Python's table of interned names may grow at once, which happens to whoever brings the next name."""

JSON = 64
"""Bytes that a byte of JSON may cost: ``{},`` costs 27."""

MOST = 1 << 20


def _whole(data: bytes, make: Callable[[bytes], bytes], size: Callable[[memoryview], int]) -> bytes:
    """The file to decode. After an odd byte comes a header's text only: its length, and data as promised, are added."""
    if not data or data[0] % 2 == 0:
        return data[1:]
    header = make(data[1:])
    try:
        return header + bytes(min(size(memoryview(header)), MOST))
    except DecodeError:
        return header


def _npy_header(text: bytes) -> bytes:
    return npy.MAGIC + b"\3\0" + len(text).to_bytes(4, "little") + text


def _safetensors_header(text: bytes) -> bytes:
    return len(text).to_bytes(8, "little") + text


def fuzz_npy(data: bytes) -> None:
    """An array that NumPy reads from the same bytes, and that comes back from what we write; or a DecodeError."""
    data = _whole(data, _npy_header, lambda header: npy.parse_header(header).nbytes)
    value = writable(data)
    npy._parse.cache_clear()
    with at_most(TABLES + LITERAL * len(data)):
        try:
            array = npy.decode(value)
        except DecodeError:
            return
    assert npy.parse_header(value).size + array.nbytes == len(data)
    assert array.flags.writeable
    if array.dtype.isbuiltin != 2:
        assert same(np.load(io.BytesIO(data), allow_pickle=False, max_header_size=npy.MAX_LITERAL), array)
    try:
        header, payload = npy.encode(array)
    except EncodeError:  # such as more fields than a header of ours may have
        return
    assert same(npy.decode(writable(header, payload)), array)


def fuzz_safetensors(data: bytes) -> None:
    """A record whose bytes are those that the stock library finds; or a DecodeError."""
    data = _whole(data, _safetensors_header, lambda header: safetensors.parse(header).nbytes)
    value = writable(data)
    safetensors._parsed.clear()
    with at_most(50_000 + JSON * len(data)):
        try:
            record = safetensors.decode(value)
        except DecodeError:
            return
    assert sum(array.nbytes for array in record.values()) <= len(data)
    assert all(array.flags.writeable and array.flags.aligned for array in record.values())
    found: dict[str, Any] = dict(stock.deserialize(data))  # type: ignore[no-untyped-call]
    assert found.keys() == record.keys()
    for name, array in record.items():
        assert (tuple(found[name]["shape"]), bytes(found[name]["data"])) == (array.shape, array.tobytes())
    header, views = safetensors.encode(record)
    again = safetensors.decode(writable(header, *views))
    assert list(again) == list(record)
    assert all(same(again[name], record[name]) for name in record)


def fuzz_codecs(data: bytes) -> None:
    """Whatever stands under a key, opened as an array and as a record. An odd first byte: the rest is compressed before."""
    packed, data = data[:1], data[1:]
    if packed and packed[0] % 2:
        data = lz4.frame.compress(data, store_size=packed[0] % 4 == 1)
    value = writable(data)
    if packed and packed[0] % 2 == 0:  # opening may change nothing
        value = memoryview(bytes(value))
    unpacked = min(MOST, 255 * len(data))  # what it may hold, if it is compressed
    for opener in (open_array, open_record):
        npy._parse.cache_clear()
        safetensors._parsed.clear()
        with at_most(1_200_000 + 2 * unpacked + LITERAL * min(unpacked, 12 + 4 * npy.MAX_LITERAL)):
            try:
                opener(value, max_bytes=MOST, key="k")
            except DecodeError as error:
                assert error.key == "k"


def fuzz_describe(data: bytes) -> None:
    """What opening the value gives, told by its first bytes; or a DecodeError. An odd first byte: it is compressed before."""
    packed, data = data[:1], data[1:]
    if packed and packed[0] % 2:
        data = lz4.frame.compress(data, store_size=packed[0] % 4 == 1, block_checksum=packed[0] % 8 > 3)
    npy._parse.cache_clear()
    safetensors._parsed.clear()
    head = 0
    while True:
        unpacked = min(MOST, 255 * head)
        with at_most(1_200_000 + 3 * unpacked + LITERAL * min(unpacked, 12 + 4 * npy.MAX_LITERAL)):
            try:
                about = describe(memoryview(data)[:head], len(data))
            except DecodeError:
                return
        if not isinstance(about, int):
            break
        assert head < about <= len(data)
        head = about
    opener = open_array if about.kind is Kind.ARRAY else open_record
    try:
        opened: Any = opener(memoryview(data), max_bytes=MOST)
    except DecodeError:
        assert about.codec is not None  # behind the first bytes
        return
    arrays = {"": opened} if about.kind is Kind.ARRAY else opened
    assert about.columns == {name: (array.dtype, array.shape) for name, array in arrays.items()}


SCHEMAS = (
    Schema(state=("uint8", (3,)), uid="int64", terminated="bool"),
    Schema(nothing=("float32", (0,)), x="float16"),
)


def fuzz_chunk(data: bytes) -> None:
    """Columns as the schema has them, or an error. First the schema and the rows that the log claims."""
    if len(data) < 3:
        return
    schema, rows = SCHEMAS[data[0] % 2], int.from_bytes(data[1:3], "little") or 1
    value = writable(data[3:])
    safetensors._parsed.clear()
    allowed = safetensors.MAX_JSON + rows * schema.row_nbytes
    with at_most(1_200_000 + min(allowed, 255 * len(data)) + JSON * min(len(data) * 255, allowed)):
        try:
            record = open_chunk(
                np.frombuffer(value, np.uint8), schema, Names("r"), 7, ChunkId(b"incarnat", 3, rows, b"")
            )
        except (DecodeError, SchemaMismatch) as error:
            assert "r:7:" in str(error)  # the key
            return
    assert {name: (array.dtype, array.shape) for name, array in record.items()} == {
        name: (dtype, (rows, *shape)) for name, (dtype, shape) in schema.items()
    }


def _arrays() -> list[bytes]:
    dtypes = ["<u2", ">f8", "?", "S3", "U2", "M8[ns]", "V0", [("a", "<i4", (2,)), ("b", [("c", "u1")])], "c8"]
    arrays = [np.zeros((2, 3), dtype) for dtype in dtypes]
    arrays += [
        np.zeros(()),
        np.zeros((0, 5)),
        np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        np.arange(40, dtype="u1"),
    ]
    files = [b"".join(npy.encode(array)) for array in arrays]
    files.append(b"".join(npy.encode(np.zeros(2, [("bfloat16", "<u2")]))))
    text = repr({"descr": [("größe", "<u2")], "fortran_order": False, "shape": (1,)}).encode()
    return files + [
        npy.MAGIC + version + len(text).to_bytes(4, "little") + text + b"ab" for version in (b"\2\0", b"\3\0")
    ]


def _records() -> list[bytes]:
    records: list[dict[str, Any]] = [
        {},
        {"a": np.arange(3, dtype="u1")},
        {
            "flag": np.ones(2, "?"),
            "state": np.zeros((2, 3), "f8"),
            "half": np.ones(2, "f2"),
            "none": np.zeros((0, 4), "c8"),
        },
        {name: np.zeros((), name) for name in ("i1", "u2", "i2", "u4", "i4", "f4", "u8", "i8")},
        {"ä\n\U0001f642": np.zeros(1, "i8"), "": np.zeros(1, "?")},
    ]
    files = [b"".join([header, *views]) for header, views in map(safetensors.encode, records)]
    narrow = b'{"w":{"dtype":"BF16","shape":[2],"data_offsets":[0,4]},"v":{"dtype":"F8_E4M3","shape":[1],"data_offsets":[4,5]}}'
    foreign = (
        b'{"__metadata__":{"format":"pt","columns":"[\\"b\\",\\"a\\"]"},'
        b'"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"b":{"dtype":"F64","shape":[],"data_offsets":[1,9]}}'
    )
    files += [len(text).to_bytes(8, "little") + text + bytes(size) for text, size in ((narrow, 5), (foreign, 9))]
    return files


def npy_seeds() -> list[bytes]:
    objects = npy.header_bytes(np.dtype("<i8"), (2,)).replace(b"'<i8'", b"'|O' ") + bytes(16)
    files = [*_arrays(), objects]
    return [b"\0" + file for file in files] + [b"\1" + file[10:].rstrip(b"\0") for file in files[:9]]


def safetensors_seeds() -> list[bytes]:
    lies = [
        b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"b":{"dtype":"U8","shape":[1],"data_offsets":[2,3]}}',
        b'{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},"b":{"dtype":"U8","shape":[2],"data_offsets":[1,3]}}',
        b'{"a":{"dtype":"U8","shape":[9],"data_offsets":[0,3]}}',
        b'{"a":{"dtype":"U8","shape":[3],"data_offsets":[0,3]},"a":{"dtype":"U8","shape":[3],"data_offsets":[0,3]}}',
        b'{"a":' + b"[" * 995,
    ]
    files = [*_records(), *(_safetensors_header(text) + b"abc" for text in lies)]
    return [b"\0" + file for file in files] + [b"\1" + file[8:].rstrip(b"\0") for file in files[:5]]


def _frames(file: bytes) -> list[bytes]:
    compressor = lz4.frame.LZ4FrameCompressor(block_linked=False, block_checksum=True, content_checksum=True)
    checked = compressor.begin(source_size=len(file)) + compressor.compress(file) + compressor.flush()
    whole = lz4.frame.compress(file)
    lies = [
        lz4.frame.LZ4FrameCompressor().begin(source_size=size) + whole[15:] for size in (2**40, 2**20, len(file) - 1)
    ]
    skippable = b"\x50\x2a\x4d\x18\2\0\0\0ab"
    return [whole, checked, skippable + whole, whole + skippable, whole + b"\0", *lies]


def codecs_seeds() -> list[bytes]:
    array, record = _arrays()[0], _records()[2]
    frames = [
        *_frames(array),
        *_frames(record),
        *_frames(_frames(bytes(300))[0]),
        b"".join(Lz4().encode([bytes(9000)])),
    ]
    return [b"\0" + value for value in [array, record, *frames]] + [b"\1" + array, b"\1" + record, b"\3" + array]


def chunk_seeds() -> list[bytes]:
    found: list[bytes] = []
    for number, schema in enumerate(SCHEMAS):
        for rows in (1, 4):
            file = b"".join(ChunkBuffer(schema, 4).value(rows))
            values = (
                file,
                lz4.frame.compress(file),
                b"".join(npy.encode(np.zeros(3))),
                lz4.frame.compress(bytes(5 << 20)),
            )
            found += [bytes([number]) + rows.to_bytes(2, "little") + value for value in values]
            found.append(bytes([1 - number]) + rows.to_bytes(2, "little") + file)
            found.append(bytes([number]) + (rows + 1).to_bytes(2, "little") + file)
    return found
