from __future__ import annotations

import sys
import tracemalloc
from collections.abc import Callable, Sequence
from typing import Any

import lz4.frame
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from aionpredis import codecs
from aionpredis.codecs import Kind, Lz4, detect, open_array, open_record, register, resolve
from aionpredis.errors import CorruptValue, DecodeError, NotAnArray, UsageError, WrongKind
from aionpredis.formats import npy, safetensors

from .strategies import ML, ML_RECORD, PLAIN, RECORD, arrays, same, writable

MB = 1 << 20


def array_file(array: NDArray[Any]) -> bytes:
    return b"".join(npy.encode(array))


def record_file(record: dict[str, Any]) -> bytes:
    header, views = safetensors.encode(record)
    return b"".join([header, *views])


def frame(content: bytes, claim: int | None = None, **options: Any) -> bytes:
    """An LZ4 frame that says it holds ``claim`` bytes."""
    header = lz4.frame.LZ4FrameCompressor(**options).begin(source_size=len(content) if claim is None else claim)
    compressor = lz4.frame.LZ4FrameCompressor(**options)
    compressor.begin()
    return bytes(header + compressor.compress(content) + compressor.flush())


class Reversing:
    """A codec that reverses the bytes."""

    def __init__(self, name: str = "reversing", magic: bytes = b"REVERSED") -> None:
        self.name = name
        self.magic = magic

    def encode(self, parts: Sequence[bytes | memoryview]) -> list[bytes | memoryview]:
        return [self.magic, b"".join(parts)[::-1]]

    def decode(self, value: memoryview, max_bytes: int) -> memoryview:
        return writable(bytes(value[len(self.magic) :])[::-1])


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a test registers is forgotten after it."""
    monkeypatch.setattr(codecs, "_codecs", dict(codecs._codecs))


@given(st.lists(st.binary(max_size=300).map(lambda part: part * 40), max_size=5), st.sampled_from([0, 3, 9]))
def test_the_stock_library_restores_what_lz4_compresses(parts: list[bytes], level: int) -> None:
    given_parts: list[bytes | memoryview] = [memoryview(part) for part in parts]
    encoded = Lz4(level).encode(given_parts)
    joined = b"".join(parts)
    if encoded == given_parts:
        return
    value = b"".join(encoded)
    assert len(value) < len(joined)
    assert lz4.frame.get_frame_info(value)["content_size"] == len(joined)
    assert lz4.frame.decompress(value) == joined
    assert Lz4().decode(memoryview(value), len(joined)) == joined


@pytest.mark.parametrize(
    "options", [{}, {"block_size": 7, "block_linked": False}, {"content_checksum": True, "block_checksum": True}]
)
@pytest.mark.parametrize("size", [1, 65_536, 3 * MB, 3 * MB + 1])
def test_lz4_reads_any_frame_that_says_its_size(size: int, options: dict[str, Any]) -> None:
    content = np.random.default_rng(0).integers(0, 4, size, np.uint8).tobytes()
    decoded = Lz4().decode(memoryview(lz4.frame.compress(content, **options)), size)
    assert decoded == content
    assert not decoded.readonly
    assert np.frombuffer(decoded, np.uint8).ctypes.data % 64 == 0


@pytest.mark.parametrize("size", [0, 10, 100_000, 3 * MB])
def test_what_compression_does_not_shrink_stays_as_it_is(size: int) -> None:
    parts: list[bytes | memoryview] = [b"head", memoryview(np.random.default_rng(0).bytes(size))]
    encoded = Lz4().encode(parts)
    assert len(encoded) == 2
    assert all(one is other for one, other in zip(encoded, parts, strict=True))


def test_lz4_does_not_join_what_it_compresses() -> None:
    part = memoryview(bytes(32 * MB))
    tracemalloc.start()
    try:
        Lz4().encode([b"head", part])
        assert tracemalloc.get_traced_memory()[1] < 8 * MB
    finally:
        tracemalloc.stop()


def test_lz4_levels_trade_time_for_size() -> None:
    content = np.random.default_rng(0).integers(0, 4, MB, np.uint8).data
    sizes = [sum(map(len, Lz4(level).encode([content]))) for level in (0, 9)]
    assert sizes[1] < sizes[0] < MB


@pytest.mark.parametrize("level", [-1, 17, 1.5, "9", True, None])
def test_a_level_that_lz4_lacks_is_a_usage_error(level: Any) -> None:
    with pytest.raises(UsageError, match=r"level of lz4 is an int from 0 to 16"):
        Lz4(level)


SIZE = 100_000
SKIPPABLE = b"\x50\x2a\x4d\x18\x04\0\0\0abcd"
BOMBS: dict[str, Callable[[], bytes]] = {
    "1 TB claimed": lambda: frame(bytes(SIZE), 2**40),
    "all of 64 bits claimed": lambda: frame(bytes(SIZE), 2**64 - 1),
    "255 times its size claimed": lambda: frame(bytes(SIZE), SIZE * 200),
    "more than allowed": lambda: frame(bytes(50 * MB)),
    "one byte fewer claimed": lambda: frame(bytes(SIZE), SIZE - 1),
    "one byte more claimed": lambda: frame(bytes(SIZE), SIZE + 1),
    "far fewer claimed": lambda: frame(bytes(47 * MB), 10),
    "no size": lambda: lz4.frame.compress(bytes(SIZE), store_size=False),
    "trailing byte": lambda: frame(bytes(SIZE)) + b"\0",
    "trailing frame": lambda: frame(bytes(SIZE)) * 2,
    "trailing skippable frame": lambda: frame(bytes(SIZE)) + SKIPPABLE,
    "leading skippable frame": lambda: SKIPPABLE + frame(bytes(SIZE)),
    "no end": lambda: frame(bytes(SIZE))[:-4],
    "only a magic": lambda: Lz4.magic,
    "only a header": lambda: frame(bytes(SIZE))[:15],
    "damaged header": lambda: frame(bytes(SIZE))[:8] + b"\xff" + frame(bytes(SIZE))[9:],
    "damaged checksum": lambda: lz4.frame.compress(bytes(SIZE), content_checksum=True)[:-1] + b"\0",
}


@pytest.mark.parametrize("make", BOMBS.values(), ids=list(BOMBS))
def test_an_lz4_frame_that_lies_is_corrupt_and_allocates_at_most_what_is_plausible(make: Callable[[], bytes]) -> None:
    value = memoryview(make())
    tracemalloc.start()
    try:
        with pytest.raises(CorruptValue):
            Lz4().decode(value, 4 * MB)
        assert tracemalloc.get_traced_memory()[1] < 6 * MB
    finally:
        tracemalloc.stop()


def test_a_small_lz4_frame_gets_no_more_memory_than_its_bytes_could_fill() -> None:
    value = memoryview(frame(b"0123456789", 3 * MB))
    tracemalloc.start()
    try:
        with pytest.raises(CorruptValue, match=rf"says it holds {3 * MB}.*at most 255 times"):
            Lz4().decode(value, 4 * MB)
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()


def test_an_lz4_frame_cut_anywhere_is_corrupt() -> None:
    value = frame(np.random.default_rng(0).integers(0, 4, 1000, np.uint8).tobytes())
    for length in range(len(value)):
        with pytest.raises(CorruptValue):
            Lz4().decode(memoryview(value[:length]), MB)


@given(arrays(PLAIN + ML), st.lists(st.tuples(st.integers(0, 300), st.integers(0, 255)), min_size=1, max_size=3))
def test_changed_bytes_of_a_compressed_value_give_an_array_or_a_decode_error(
    array: NDArray[Any], changes: list[tuple[int, int]]
) -> None:
    value = writable(frame(array_file(array)))
    for place, byte in changes:
        value[place % len(value)] = byte
    try:
        assert open_array(value, max_bytes=MB).nbytes <= MB
    except DecodeError:
        pass


@given(arrays(PLAIN + ML), st.booleans())
def test_an_array_is_opened_compressed_or_not(array: NDArray[Any], compressed: bool) -> None:
    value = array_file(array)
    assert same(open_array(writable(frame(value) if compressed else value), max_bytes=MB), array)


@given(st.dictionaries(st.sampled_from("abc"), arrays(RECORD + ML_RECORD)), st.booleans())
def test_a_record_is_opened_compressed_or_not(record: dict[str, NDArray[Any]], compressed: bool) -> None:
    value = record_file(record)
    opened = open_record(writable(frame(value) if compressed else value), max_bytes=MB)
    assert list(opened) == list(record)
    assert all(same(opened[name], record[name]) for name in record)


@pytest.mark.parametrize("wrap", [bytes, frame], ids=["raw", "lz4"])
def test_the_wrong_kind_is_an_error_that_names_the_key_and_the_right_call(wrap: Callable[[bytes], bytes]) -> None:
    array, record = wrap(array_file(np.zeros(3))), wrap(record_file({"a": np.zeros(3)}))
    with pytest.raises(WrongKind, match=r"get_record\(\) \[key 'k'\]") as caught:
        open_array(writable(record), max_bytes=MB, key="k")
    assert caught.value.key == "k"
    with pytest.raises(WrongKind, match=r"get\(\) \[key b'k'\]"):
        open_record(writable(array), max_bytes=MB, key=b"k")


@pytest.mark.parametrize(
    "value", [b"", b"x", b"hello world", b"\x80\x04\x95", bytes(100), b"{}", b'{"a": 1}', b"\xff" * 50]
)
def test_what_is_no_array_is_shown_by_its_first_bytes_and_length(value: bytes) -> None:
    for open_value in (open_array, open_record):
        with pytest.raises(NotAnArray) as caught:
            open_value(writable(value), max_bytes=MB, key="k")
        assert f"{len(value)} bytes" in str(caught.value)
        assert repr(value[:16]) in str(caught.value)
        assert len(str(caught.value)) < 200
        assert caught.value.key == "k"


def test_corrupt_values_name_their_key() -> None:
    with pytest.raises(CorruptValue, match=r"\[key 'k'\]"):
        open_array(writable(array_file(np.zeros(3))[:-1]), max_bytes=MB, key="k")
    with pytest.raises(CorruptValue, match=r"\[key 'k'\]"):
        open_record(writable(frame(record_file({"a": np.zeros(3)})[:-1])), max_bytes=MB, key="k")


def test_a_value_compressed_twice_is_corrupt() -> None:
    with pytest.raises(CorruptValue, match=r"compressed twice: lz4 around lz4"):
        open_array(writable(frame(frame(array_file(np.zeros(3))))), max_bytes=MB)


def test_each_kind_is_detected_by_its_first_bytes() -> None:
    array, record = array_file(np.zeros(3)), record_file({"a": np.zeros(3)})
    assert detect(writable(array)) is Kind.ARRAY
    assert detect(writable(record)) is Kind.RECORD
    assert detect(writable(frame(array))) == Lz4()


@given(st.binary(max_size=64))
def test_any_bytes_are_detected_or_refused(value: bytes) -> None:
    try:
        found = detect(writable(value))
    except NotAnArray:
        return
    assert value.startswith((npy.MAGIC, Lz4.magic)) or found is Kind.RECORD


def test_codecs_are_resolved_by_name_or_as_they_are() -> None:
    assert resolve(None) is None
    assert resolve("raw") is None
    assert resolve("lz4") == Lz4()
    best = Lz4(level=16)
    assert resolve(best) is best


def test_an_unknown_codec_is_a_usage_error_that_lists_the_known_ones() -> None:
    with pytest.raises(UsageError, match=r"unknown codec 'zstd': there are raw, lz4"):
        resolve("zstd")
    with pytest.raises(UsageError, match=r"unlike int"):
        resolve(3)  # type: ignore[arg-type]


def test_a_codec_that_could_not_be_read_back_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match=r"'reversing' is not registered"):
        resolve(Reversing())


def test_without_lz4_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    value = writable(frame(array_file(np.zeros(30))))
    monkeypatch.setitem(sys.modules, "lz4", None)
    with pytest.raises(UsageError, match=r"pip install aionpredis\[lz4\]"):
        resolve("lz4")
    with pytest.raises(DecodeError, match=r"compressed.*pip install aionpredis\[lz4\].*\[key 'k'\]"):
        open_array(value, max_bytes=MB, key="k")


@pytest.mark.usefixtures("registry")
def test_a_registered_codec_is_resolved_and_read() -> None:
    codec = Reversing()
    register(codec)
    assert resolve("reversing") is codec
    value = writable(*codec.encode(npy.encode(np.arange(5))))
    assert open_array(value, max_bytes=MB).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize(
    ("name", "magic"),
    [
        ("raw", b"REVERSED"),
        ("lz4", b"REVERSED"),
        ("short", b"REV"),
        ("long", b"R" * 17),
        ("numpy", b"\x93NUM"),
        ("numpys", b"\x93NUMPY\1\0"),
        ("lz4s", Lz4.magic + b"@"),
        ("length", (10**8).to_bytes(4, "little") + b"abcd"),
        ("zeros", bytes(4)),
    ],
)
def test_a_name_or_magic_that_could_be_taken_for_another_is_refused(name: str, magic: bytes) -> None:
    with pytest.raises(UsageError, match=repr(name)):
        register(Reversing(name, magic))
