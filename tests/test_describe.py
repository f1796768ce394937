"""What a value is, told by its first bytes, is what opening it gives; and hostile bytes are an error, at no cost."""

from __future__ import annotations

import time
from typing import Any

import lz4.frame
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from numpy.typing import NDArray

from aionpredis import codecs
from aionpredis.codecs import Kind, open_array, open_record
from aionpredis.codecs.describe import HEAD, Column, Description, describe
from aionpredis.codecs.lz4 import Lz4, peek
from aionpredis.errors import CorruptValue, DecodeError, NotAnArray

from .strategies import ML, ML_RECORD, PLAIN, RECORD, arrays
from .test_codecs import Reversing, array_file, record_file, registry

__all__ = ["registry"]


def described(value: bytes) -> tuple[Description, int]:
    """What it is, and how many of its bytes that took."""
    read = 0
    while True:
        about = describe(memoryview(value)[:read], len(value))
        if not isinstance(about, int):
            return about, read
        assert read < about <= len(value)
        read = about


def compressed(content: bytes, **options: Any) -> bytes:
    return bytes(lz4.frame.compress(content, store_size=True, **options))


@given(arrays(PLAIN + ML), st.booleans())
def test_an_array_is_what_opening_it_gives(array: NDArray[Any], with_codec: bool) -> None:
    file = array_file(array)
    about, _ = described(compressed(file) if with_codec else file)
    opened = open_array(memoryview(file), max_bytes=1 << 20)
    assert about == Description(
        Kind.ARRAY,
        "lz4" if with_codec else None,
        len(file),
        {"": Column(opened.dtype, opened.shape)},
        opened.flags.f_contiguous and not opened.flags.c_contiguous,
    )
    assert about.columns[""].nbytes == opened.nbytes


@given(st.dictionaries(st.text(max_size=80), arrays(RECORD + ML_RECORD), max_size=20), st.booleans())
def test_a_record_is_what_opening_it_gives(record: dict[str, NDArray[Any]], with_codec: bool) -> None:
    record.pop("__metadata__", None)
    file = record_file(record)
    about, _ = described(compressed(file) if with_codec else file)
    opened = open_record(memoryview(file), max_bytes=1 << 20)
    assert about.kind is Kind.RECORD
    assert about.size == len(file)
    assert about.columns == {name: (array.dtype, array.shape) for name, array in opened.items()}
    assert list(about.columns) == list(opened)


@pytest.mark.parametrize("content", [np.random.default_rng(0).bytes(8 << 20), bytes(8 << 20)], ids=["random", "zeros"])
@pytest.mark.parametrize("codec", [None, "lz4"])
def test_a_large_value_takes_its_first_bytes_only(content: bytes, codec: str | None) -> None:
    file = array_file(np.frombuffer(content, np.float32))
    about, read = described(file if codec is None else compressed(file, block_size=lz4.frame.BLOCKSIZE_MAX4MB))
    assert read <= HEAD
    assert about.columns[""] == (np.dtype(np.float32), (2 << 20,))


def test_a_header_longer_than_the_first_look_is_read_whole() -> None:
    record = {f"column {number}": np.zeros((2, 3), np.float32) for number in range(2000)}
    file = record_file(record)
    for value in (file, compressed(file)):
        about, read = described(value)
        assert len(about.columns) == 2000
        assert HEAD < read < 2 * len(file)


def test_the_codec_of_somebody_else_is_named(registry: None) -> None:
    codecs.register(Reversing())
    assert described(b"REVERSED" + bytes(1000))[0] == Description(None, "reversing", None, {})


@given(
    st.lists(
        st.sampled_from([b"\0" * 300, b"abc", b"abcd" * 9, bytes(range(256))]) | st.binary(max_size=40), max_size=9
    ),
    st.integers(0, 3000),
    st.integers(0, 3000),
    st.sampled_from([{}, {"block_checksum": True}, {"block_linked": False}, {"content_checksum": True}]),
)
def test_peek_sees_what_the_library_expands(parts: list[bytes], count: int, cut: int, options: dict[str, bool]) -> None:
    content = b"".join(parts) + b"end"
    value = compressed(content, **options)
    assert peek(memoryview(value), count) == (len(content), content[:count])
    if cut >= 15:
        size, seen = peek(memoryview(value)[:cut], count)
        assert size == len(content)
        assert content.startswith(seen)


def test_peek_goes_on_in_the_next_block() -> None:
    content = np.random.default_rng(0).integers(0, 3, 200_000, np.uint8).tobytes()  # blocks of 64 kB, linked
    for linked in (True, False):
        assert peek(memoryview(compressed(content, block_linked=linked)), 190_000)[1] == content[:190_000]


@pytest.mark.parametrize("back", [0, 5, 65535])
def test_peek_repeats_only_what_is_there(back: int) -> None:
    block = b"\x44abcd" + back.to_bytes(2, "little") + b"\0"
    value = Lz4.magic + b"\x48\x40" + (100).to_bytes(8, "little") + b"\0" + len(block).to_bytes(4, "little") + block
    with pytest.raises(CorruptValue, match=f"what is {back} bytes before byte 4"):
        peek(memoryview(value), 100)


FILES = [
    array_file(np.arange(12, dtype=np.int16).reshape(3, 4)),
    record_file({"a": np.zeros(3), "b": np.ones((2, 2), np.uint8)}),
    compressed(array_file(np.zeros((80, 80), np.uint16))),
    compressed(record_file({"state": np.zeros((80, 80))}), block_checksum=True),
]


@given(
    st.sampled_from(FILES), st.lists(st.tuples(st.integers(0, 200), st.integers(0, 255)), max_size=4), st.integers(0)
)
@example(FILES[2], [(4, 0xFF), (15, 0xFF)], 10**9)
def test_damaged_bytes_are_a_decode_error_or_a_description(
    file: bytes, changes: list[tuple[int, int]], length: int
) -> None:
    damaged = bytearray(file)
    for at, byte in changes:
        damaged[at % len(damaged)] = byte
    for size in (len(damaged), length % (2 * len(damaged))):
        try:
            described(bytes(damaged[:size]))
        except DecodeError:
            pass


@given(
    st.sampled_from([b"\x93NUMPY", b"\x93NUMPY\1\0", b"\x04\x22\x4d\x18", b"\x10\0\0\0\0\0\0\0{"]),
    st.binary(max_size=600),
)
def test_hostile_bytes_are_a_decode_error_or_a_description(magic: bytes, rest: bytes) -> None:
    try:
        described(magic + rest)
    except DecodeError:
        pass


@pytest.mark.parametrize(
    ("value", "error"),
    [
        (b"", NotAnArray),
        (b"hello", NotAnArray),
        (array_file(np.zeros(9))[:-1], CorruptValue),
        (array_file(np.zeros(9)) + b"x", CorruptValue),
        (record_file({"a": np.zeros(9)})[:-1], CorruptValue),
        (compressed(b"text " * 100), NotAnArray),
        (compressed(FILES[2]), CorruptValue),
        (bytes(lz4.frame.compress(FILES[0], store_size=False)), CorruptValue),
        (FILES[2][:40], CorruptValue),
    ],
)
def test_what_is_none_is_an_error(value: bytes, error: type[DecodeError]) -> None:
    with pytest.raises(error):
        described(value)


def test_a_lie_costs_nothing() -> None:
    """A frame whose lengths go on for ever, in as many bytes as are looked at."""
    lie = Lz4.magic + b"\x48\x40" + (1 << 20).to_bytes(8, "little") + b"\0" + b"\xff\xff\xff\x7f\xff" + b"\xff" * 65_000
    started = time.process_time()
    with pytest.raises(CorruptValue):
        described(lie)
    assert time.process_time() - started < 1
