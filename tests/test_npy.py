from __future__ import annotations

import io
import subprocess
import sys
import tracemalloc
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from aionpredis.errors import CorruptValue, DecodeError, EncodeError
from aionpredis.formats import npy

from .strategies import ML, PLAIN, arrays, same, writable

NUMPY_2 = np.lib.NumpyVersion(np.__version__) >= "2.0.0"


def load(value: bytes) -> NDArray[Any]:
    return np.load(io.BytesIO(value), allow_pickle=False)  # type: ignore[no-any-return]


def save(array: NDArray[Any]) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return file.getvalue()


def file_of(text: str, payload: bytes = b"", version: bytes = b"\1\0", pad: int = 64) -> memoryview:
    """A file with this header text."""
    raw = text.encode("latin-1" if version < b"\3" else "utf-8")
    width = 2 if version == b"\1\0" else 4
    size = -(-(8 + width + len(raw) + 1) // pad) * pad
    raw = raw.ljust(size - 8 - width - 1) + b"\n"
    return writable(npy.MAGIC + version + len(raw).to_bytes(width, "little") + raw + payload)


def header_text(descr: object = "<u2", fortran: object = False, shape: object = (3,)) -> str:
    return repr({"descr": descr, "fortran_order": fortran, "shape": shape})


@given(arrays(PLAIN))
def test_stock_numpy_reads_what_we_write(array: NDArray[Any]) -> None:
    header, payload = npy.encode(array)
    assert same(load(header + bytes(payload)), array)


@given(arrays(PLAIN))
def test_we_read_what_stock_numpy_writes(array: NDArray[Any]) -> None:
    if not array.dtype.names or all(name.isascii() for name in array.dtype.names):  # else np.save warns
        assert same(npy.decode(writable(save(array))), array)


@given(arrays(PLAIN + ML))
def test_we_read_what_we_write(array: NDArray[Any]) -> None:
    assert same(npy.decode(writable(*npy.encode(array))), array)


@given(arrays(PLAIN))
def test_the_header_is_numpys_own_byte_for_byte(array: NDArray[Any]) -> None:
    if not array.dtype.names or all(name.isascii() for name in array.dtype.names):
        header, _ = npy.encode(array)
        assert header == save(array)[: len(header)]


@given(arrays(PLAIN + ML))
def test_the_payload_is_one_flat_byte_view_after_a_multiple_of_64(array: NDArray[Any]) -> None:
    header, payload = npy.encode(array)
    assert (payload.format, payload.ndim, len(payload)) == ("B", 1, array.nbytes)
    assert len(header) % 64 == 0


@given(arrays(PLAIN + ML))
def test_a_contiguous_array_is_borrowed_and_any_other_is_gathered(array: NDArray[Any]) -> None:
    _, payload = npy.encode(array)
    shared = np.shares_memory(np.frombuffer(payload, np.uint8), array) if array.nbytes else True
    assert shared == bool(array.flags.c_contiguous or array.flags.f_contiguous or not array.nbytes)


@given(arrays(PLAIN + ML))
def test_fortran_order_is_kept(array: NDArray[Any]) -> None:
    decoded = npy.decode(writable(*npy.encode(array)))
    assert decoded.flags.c_contiguous == (array.flags.c_contiguous or not array.flags.f_contiguous or array.ndim < 2)


@given(arrays(PLAIN + ML))
def test_a_read_array_is_an_aligned_writable_view_of_the_value(array: NDArray[Any]) -> None:
    value = writable(*npy.encode(array))
    decoded = npy.decode(value)
    assert decoded.flags.writeable
    assert decoded.ctypes.data % 64 == 0
    if array.nbytes:
        assert np.shares_memory(decoded, np.frombuffer(value, np.uint8))


@pytest.mark.parametrize("dtype", ML, ids=str)
def test_stock_numpy_sees_ml_dtypes_as_one_field_of_that_name(dtype: np.dtype[Any]) -> None:
    array = np.arange(5).astype(dtype)
    loaded = load(b"".join(npy.encode(array)))
    assert loaded.dtype.names == (dtype.name,)
    assert (loaded[dtype.name] == array.view(f"u{dtype.itemsize}")).all()


def test_a_byteswapped_bfloat16_keeps_its_byte_order() -> None:
    array = np.frombuffer(b"\x3f\x80\x40\x00", np.dtype(ml_dtypes.bfloat16).newbyteorder(">"))
    assert same(npy.decode(writable(*npy.encode(array))), array)


def test_without_ml_dtypes_a_bfloat16_is_a_structure(monkeypatch: pytest.MonkeyPatch) -> None:
    value = writable(*npy.encode(np.ones(3, ml_dtypes.bfloat16)))
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    npy._parse.cache_clear()
    try:
        assert npy.decode(value).dtype == [("bfloat16", "<u2")]
    finally:
        npy._parse.cache_clear()


def test_ml_dtypes_is_not_imported_unless_needed() -> None:
    code = """if True:
        import sys, numpy as np
        from aionpredis.formats import npy, safetensors
        header, payload = npy.encode(np.zeros(3, [("int32", "u4")]))
        npy.decode(memoryview(header + bytes(payload)))
        header, payload = safetensors.encode({"a": np.zeros(3)})
        safetensors.decode(memoryview(header + bytes(payload[0])))
        sys.exit("ml_dtypes" in sys.modules)
    """
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    "value", [np.float32(1.5), np.str_("ab"), np.bool_(True), np.datetime64("2024-01-01"), np.zeros((), "i4,f8")[()]]
)
def test_a_numpy_scalar_is_an_array_without_axes(value: Any) -> None:
    decoded = npy.decode(writable(*npy.encode(value)))
    assert decoded.shape == ()
    assert same(decoded, np.asarray(value))


class Foreign:
    """An array of another library, as torch's tensors are."""

    def __init__(self, array: NDArray[Any] | None) -> None:
        self.array = array

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        if self.array is None:
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        return self.array


def test_foreign_arrays_and_subclasses_are_borrowed() -> None:
    array = np.arange(12).reshape(3, 4)
    for value in (Foreign(array), array.view(np.matrix), array.view(np.memmap)):
        _, payload = npy.encode(value)
        assert np.shares_memory(np.frombuffer(payload, np.uint8), array)


def test_a_foreign_array_that_fails_says_why() -> None:
    with pytest.raises(EncodeError, match=r"Foreign could not be turned into an array: can't convert cuda:0"):
        npy.encode(Foreign(None))


@pytest.mark.parametrize("value", [[1, 2], b"abc", "abc", None, {"a": 1}, 3, 2.5, (1,), np.ndarray, memoryview(b"x")])
def test_what_is_no_array_is_refused_by_type_with_the_cure(value: object) -> None:
    with pytest.raises(EncodeError, match=rf"{type(value).__name__} is not an array: pass np\.asarray"):
        npy.encode(value)


@pytest.mark.parametrize("value", [np.ma.masked_array([1, 2], [True, False]), np.ma.masked, np.ma.masked_array([1])])
def test_a_masked_array_is_refused_with_the_cure(value: object) -> None:
    with pytest.raises(EncodeError, match=r"filled"):
        npy.encode(value)


@pytest.mark.parametrize("dtype", ["O", [("a", "i4"), ("b", "O")], [("a", [("b", "O", (2,))])]], ids=str)
def test_objects_are_refused_by_dtype(dtype: Any) -> None:
    with pytest.raises(EncodeError, match=r"dtype .*(object|O).* ever pickled: convert"):
        npy.encode(np.zeros(2, dtype))


@pytest.mark.skipif(not NUMPY_2, reason="StringDType came with NumPy 2")
def test_string_dtype_is_refused_with_the_cure() -> None:
    with pytest.raises(EncodeError, match=r"StringDType.*astype\('U'\)"):
        npy.encode(np.array(["a", "bc"], np.dtypes.StringDType()))


@pytest.mark.parametrize(
    "dtype",
    [
        np.dtype([("x", ml_dtypes.bfloat16)]),
        np.dtype({"names": ["a", "b"], "formats": ["u4", "u2"], "offsets": [0, 2]}),
    ],
    ids=["bfloat16 in a structure", "overlapping fields"],
)
def test_what_numpys_header_would_lose_is_refused_by_dtype(dtype: np.dtype[Any]) -> None:
    with pytest.raises(EncodeError, match=r"cannot hold dtype .*(bfloat16|offsets)"):
        npy.encode(np.zeros(2, dtype))


@pytest.mark.parametrize("fields", [700, 9000])
def test_a_header_that_numpy_would_not_read_is_not_written(fields: int) -> None:
    with pytest.raises(EncodeError, match=r"header of dtype .* (too long|takes)"):
        npy.encode(np.zeros(1, [(f"f{n}", "u1") for n in range(fields)]))


def test_a_dtypes_metadata_is_dropped_quietly() -> None:
    array = np.zeros(2, np.dtype("u2", metadata={"unit": "m"}))
    npy.header_bytes.cache_clear()
    assert same(npy.decode(writable(*npy.encode(array))), array)


def test_items_of_no_bytes_can_be_written_and_read() -> None:
    array: NDArray[Any] = np.ndarray((3,), "S0", b"")
    decoded = npy.decode(writable(*npy.encode(array)))
    assert (decoded.dtype, decoded.shape) == (array.dtype, (3,))


@pytest.mark.parametrize("version", [b"\1\0", b"\2\0", b"\3\0"])
def test_every_version_of_the_format_is_read(version: bytes) -> None:
    value = file_of(header_text([("größe", "<u2")]), b"\1\0\2\0\3\0", version)
    assert npy.parse_header(value) == (np.dtype([("größe", "<u2")]), (3,), False, len(value) - 6, 6)
    assert npy.decode(value)["größe"].tolist() == [1, 2, 3]


def test_an_unaligned_payload_of_an_old_writer_is_copied_to_aligned_memory() -> None:
    for pad in (1, 16):
        value = file_of(header_text(), b"\1\0\2\0\3\0", pad=pad)
        assert (len(value) - 6) % 64
        decoded = npy.decode(value)
        assert decoded.tolist() == [1, 2, 3]
        assert decoded.ctypes.data % 64 == 0
        assert decoded.flags.writeable


def test_pickles_are_never_read() -> None:
    file = io.BytesIO()
    np.save(file, np.array([None, {}], object), allow_pickle=True)
    with pytest.raises(CorruptValue, match=r"pickled objects"):
        npy.decode(writable(file.getvalue()))


@pytest.mark.parametrize("array", [np.arange(12.0).reshape(3, 4), np.zeros(2, "i4,f8"), np.ones(3, ml_dtypes.bfloat16)])
def test_a_value_cut_or_extended_anywhere_is_corrupt(array: NDArray[Any]) -> None:
    value = bytes(writable(*npy.encode(array)))
    for length in range(len(value)):
        with pytest.raises(CorruptValue):
            npy.decode(writable(value[:length]))
    with pytest.raises(CorruptValue, match=rf"{len(value)} bytes in all, and the value has {len(value) + 1}"):
        npy.decode(writable(value + b"\0"))


@given(arrays(PLAIN + ML), st.lists(st.tuples(st.integers(0, 200), st.integers(0, 255)), min_size=1, max_size=4))
def test_changed_bytes_give_an_array_or_a_decode_error(array: NDArray[Any], changes: list[tuple[int, int]]) -> None:
    value = writable(*npy.encode(array))
    for place, byte in changes:
        value[place % len(value)] = byte
    try:
        assert npy.decode(value).nbytes <= len(value)
    except DecodeError:
        pass


HOSTILE = {
    "no dict": "[1, 2]",
    "other keys": repr({"descr": "<u2", "fortran_order": False, "shape": (3,), "more": 1}),
    "missing key": repr({"descr": "<u2", "shape": (3,)}),
    "no literal": "__import__('os').getpid()",
    "not Python": "{'descr': ",
    "unhashable key": "{[]: 1}",
    "deep brackets": "(" * 5000,
    "deep signs": "-" * 9000 + "1",
    "deep lists": "[" * 90 + "]" * 90,
    "long number": header_text(shape=(1,)).replace("1", "9" * 5000),
    "too many characters": header_text() + " " * 20_000,
    "NUL": header_text() + "\0",
    "negative axis": header_text(shape=(-1,)),
    "negative axes": header_text(shape=(-1, -3)),
    "bool axis": header_text(shape=(True, 3)),
    "float axis": header_text(shape=(3.0,)),
    "axis as list": header_text(shape=[3]),
    "shape is a number": header_text(shape=3),
    "axis beyond 64 bits": header_text(shape=(2**64,)),
    "product beyond 64 bits": header_text(shape=(2**32, 2**32)),
    "product beyond 64 bits, empty": header_text(shape=(0, 2**32, 2**32)),
    "product of nothing beyond 64 bits": header_text(descr="|S0", shape=(2**32, 2**32)),
    "too many axes": header_text(shape=(1,) * 65),
    "order is a number": header_text(fortran=1),
    "descr is None": header_text(descr=None),
    "descr is a number": header_text(descr=7),
    "descr is a dict": header_text(descr={"names": ["a"]}),
    "descr of nonsense": header_text(descr="<z9"),
    "descr of objects": header_text(descr="|O"),
    "descr of hidden objects": header_text(descr=[("a", [("b", "|O")])]),
    "descr of strings by reference": header_text(descr="T"),
    "descr with a shape": header_text(descr=("<u2", (3,))),
    "descr of short fields": header_text(descr=[("a",)]),
    "descr of repeated fields": header_text(descr=[("a", "u1"), ("a", "u1")]),
    "descr of deprecated aliases": header_text(descr="a5"),
    "1 TB": header_text(shape=(2**39,)),
    "1 TB by a field's shape": header_text(descr=[("a", "<u2", (2**39,))]),
    "2 GB per item": header_text(descr="|V2147483647"),
}
if NUMPY_2:  # NumPy 1 takes this for an item of 0 bytes: wrong, but harmless
    HOSTILE["1 TB per item"] = header_text(descr="|V1099511627776")


@pytest.mark.parametrize("payload", [b"", b"123456"], ids=["without payload", "with payload"])
@pytest.mark.parametrize("text", HOSTILE.values(), ids=list(HOSTILE))
def test_a_hostile_header_is_corrupt_and_allocates_nothing(text: str, payload: bytes) -> None:
    value = file_of(text, payload)
    npy._parse.cache_clear()
    tracemalloc.start()
    try:
        with pytest.raises(CorruptValue) as caught:
            npy.decode(value)
        assert tracemalloc.get_traced_memory()[1] < 20_000_000  # the parser's own, for 10,000 characters
    finally:
        tracemalloc.stop()
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("version", [b"\0\0", b"\1\1", b"\4\0", b"\xff\xff"])
def test_an_unknown_version_is_corrupt(version: bytes) -> None:
    with pytest.raises(CorruptValue, match=r"version 1, 2 or 3|characters"):
        npy.decode(file_of(header_text(), b"123456", version))


def test_a_header_that_claims_gigabytes_of_text_is_not_copied() -> None:
    value = memoryview(bytearray(npy.MAGIC + b"\2\0" + (50_000_000).to_bytes(4, "little") + bytes(50_000_000)))
    tracemalloc.start()
    try:
        with pytest.raises(CorruptValue, match=r"50000012 bytes"):
            npy.decode(value)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


def test_the_header_caches_are_bounded_and_hit() -> None:
    for n in range(1000):
        npy.decode(writable(*npy.encode(np.zeros(n, "u1"))))
    for info in (npy.header_bytes.cache_info(), npy._parse.cache_info()):
        assert info.maxsize is not None
        assert info.currsize == info.maxsize <= 256
    hits = npy._parse.cache_info().hits
    npy.decode(writable(*npy.encode(np.zeros(999, "u1"))))
    assert npy._parse.cache_info().hits == hits + 1
