from __future__ import annotations

import json
import sys
import tracemalloc
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy as stock
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors import deserialize

from aionpredis import Schema
from aionpredis.errors import CorruptValue, DecodeError, EncodeError, UsageError
from aionpredis.formats import safetensors

from .strategies import ML_RECORD, RECORD, arrays, same, writable

NAMES = st.text(max_size=8).filter(
    lambda name: name != "__metadata__" and name.encode(errors="ignore").decode() == name
)
SWAPPED = [dtype.newbyteorder(">") for dtype in RECORD]


def records(dtypes: list[np.dtype[Any]]) -> st.SearchStrategy[dict[str, NDArray[Any]]]:
    return st.dictionaries(NAMES, arrays(dtypes), max_size=5)


def file_of(record: dict[str, Any]) -> bytes:
    header, views = safetensors.encode(record)
    return b"".join([header, *views])


def raw_file(tree: object, data: bytes = b"", pad: int = 1) -> memoryview:
    text = tree if isinstance(tree, bytes) else json.dumps(tree).encode()
    text = text.ljust(-(-(8 + len(text)) // pad) * pad - 8)
    return writable(len(text).to_bytes(8, "little"), text, data)


def column(dtype: object = "U8", shape: object = (3,), offsets: object = (0, 3), **more: object) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}


def same_record(left: dict[str, NDArray[Any]], right: dict[str, NDArray[Any]]) -> bool:
    return left.keys() == right.keys() and all(same(left[name], right[name]) for name in left)


def native(record: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    return {name: array.astype(array.dtype.newbyteorder("=")) for name, array in record.items()}


@given(records(RECORD + SWAPPED))
def test_the_stock_library_reads_what_we_write(record: dict[str, NDArray[Any]]) -> None:
    assert same_record(stock.load(file_of(record)), native(record))


@given(records(ML_RECORD + RECORD))
def test_the_stock_library_finds_ml_dtypes_under_the_formats_own_names(record: dict[str, NDArray[Any]]) -> None:
    names = {"bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2"}
    found = dict(deserialize(file_of(record)))  # type: ignore[no-untyped-call]
    assert found.keys() == record.keys()
    for name, array in record.items():
        assert bytes(found[name]["data"]) == array.tobytes()
        assert found[name]["dtype"] == names.get(array.dtype.name, found[name]["dtype"])


@given(records(RECORD))
def test_we_read_what_the_stock_library_writes(record: dict[str, NDArray[Any]]) -> None:
    # The stock writer ignores strides, so it is handed C order.
    value = stock.save({name: array.copy(order="C") for name, array in record.items()}, {"columns": "[not ours"})
    assert same_record(safetensors.decode(writable(value)), record)


@given(records(RECORD + SWAPPED + ML_RECORD))
def test_we_read_what_we_write_in_the_callers_order(record: dict[str, NDArray[Any]]) -> None:
    decoded = safetensors.decode(writable(file_of(record)))
    assert same_record(decoded, native(record))
    assert list(decoded) == list(record)


@given(records(RECORD + ML_RECORD))
def test_read_columns_are_aligned_writable_views_of_the_value(record: dict[str, NDArray[Any]]) -> None:
    value = writable(file_of(record))
    for array in safetensors.decode(value).values():
        assert array.flags.writeable
        assert array.flags.aligned
        assert array.flags.c_contiguous
        assert not array.nbytes or np.shares_memory(array, np.frombuffer(value, np.uint8))


@given(records(RECORD + ML_RECORD))
def test_contiguous_columns_are_borrowed_as_flat_bytes_in_file_order(record: dict[str, NDArray[Any]]) -> None:
    header, views = safetensors.encode(record)
    order = [name for name in safetensors.parse(memoryview(header)).order if record[name].nbytes]
    assert [len(view) for view in views] == [record[name].nbytes for name in order]
    for name, view in zip(order, views, strict=True):
        assert (view.format, view.ndim) == ("B", 1)
        assert np.shares_memory(np.frombuffer(view, np.uint8), record[name]) == record[name].flags.c_contiguous


@given(records(RECORD + SWAPPED + ML_RECORD))
def test_parsing_a_header_gives_the_layout_it_was_made_from(record: dict[str, NDArray[Any]]) -> None:
    made = safetensors.layout({name: (array.dtype, array.shape) for name, array in record.items()})
    safetensors._parsed.clear()
    found = safetensors.parse(memoryview(made.header))
    assert (found.header, found.order, found.nbytes, found.size) == (made.header, made.order, made.nbytes, made.size)
    assert list(found.columns.items()) == list(made.columns.items())
    assert len(made.header) % 64 == 0


def test_columns_lie_by_descending_itemsize_and_otherwise_in_the_callers_order() -> None:
    spec = {"done": ("?", (4,)), "b": ("f4", (4,)), "a": ("i4", (4,)), "state": (">f8", (4, 2)), "none": ("u2", (0,))}
    made = safetensors.layout(spec)
    assert made.order == ("state", "b", "a", "none", "done")
    assert tuple(made.columns) == tuple(spec)
    assert made.columns["a"] == (np.dtype("<i4"), (4,), 80, 96)
    assert made.columns["state"].dtype == np.dtype("<f8")
    assert made.nbytes == 100


def test_a_header_can_be_padded_to_the_length_of_a_larger_chunks() -> None:
    full = safetensors.layout({"a": ("f4", (1000, 80)), "b": ("u1", (1000,))})
    part = safetensors.layout({"a": ("f4", (1, 80)), "b": ("u1", (1,))}, header_size=len(full.header) + 64)
    assert len(part.header) == len(full.header) + 64
    value = part.header + np.arange(80, dtype="f4").tobytes() + b"\7"
    assert stock.load(value)["b"].tolist() == [7]
    assert safetensors.decode(writable(value))["a"].shape == (1, 80)


@pytest.mark.parametrize("header_size", [0, 64, 200, -64])
def test_a_header_size_that_does_not_fit_is_a_usage_error(header_size: int) -> None:
    with pytest.raises(UsageError, match=rf"header_size={header_size} "):
        safetensors.layout({"a": ("f4", (1000, 80)), "b": ("u1", (1000,))}, header_size=header_size)


def test_a_negative_shape_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match=r"column 'a' has the shape \(-1,\)"):
        safetensors.layout({"a": ("f4", (-1,))})


@pytest.mark.parametrize(
    "dtype", ["O", "c16", "g", "M8[s]", "U3", "S3", "V2", "i4,f4", ml_dtypes.int4, ml_dtypes.float8_e3m4], ids=str
)
def test_a_dtype_that_records_lack_is_refused_by_column_and_dtype(dtype: Any) -> None:
    text = str(np.dtype(dtype)).replace("[", r"\[").replace("(", r"\(").replace(")", r"\)")
    with pytest.raises(EncodeError, match=rf"column 'x': .*dtype {text}.*astype"):
        safetensors.encode({"a": np.zeros(2), "x": np.zeros(2, dtype)})


@pytest.mark.parametrize("value", [[1], 3, None, np.ma.masked_array([1]), "text"])
def test_a_column_that_is_no_array_is_refused_by_name(value: object) -> None:
    with pytest.raises(EncodeError, match=r"column 'x': "):
        safetensors.encode({"x": value})


@pytest.mark.parametrize("name", [1, b"x", None, "__metadata__", "\ud800"])
def test_a_name_that_the_format_cannot_hold_is_refused(name: Any) -> None:
    with pytest.raises(EncodeError, match=r"column's name"):
        safetensors.encode({name: np.zeros(1)})


@pytest.mark.parametrize("record", [np.zeros(3), [("a", np.zeros(3))], None])
def test_a_record_that_is_no_mapping_is_refused(record: Any) -> None:
    with pytest.raises(EncodeError, match=r"a record is a mapping"):
        safetensors.encode(record)


def test_without_ml_dtypes_a_bfloat16_column_is_a_structure_that_is_not_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    value = writable(file_of({"x": np.ones(3, ml_dtypes.bfloat16), "y": np.ones(3, ml_dtypes.float8_e5m2)}))
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    safetensors._parsed.clear()
    try:
        record = safetensors.decode(value)
        assert record["x"].dtype == [("bfloat16", "<u2")]
        assert record["y"].dtype == [("float8_e5m2", "u1")]
        for name, says in (("x", r"'x' is of bfloat16 .* install"), ("y", r"'y' is of float8_e5m2 .* install")):
            with pytest.raises(EncodeError, match=says):
                safetensors.encode({name: record[name]})
            with pytest.raises(EncodeError, match=says):
                Schema(**{name: record[name].dtype})
    finally:
        safetensors._parsed.clear()


def test_an_unaligned_column_of_a_foreign_writer_is_copied() -> None:
    tree = {"a": column("U8", [1], [0, 1]), "b": column("F64", [2], [1, 17])}
    array = safetensors.decode(raw_file(tree, b"\7" + np.array([1.5, 2.5]).tobytes()))["b"]
    assert array.tolist() == [1.5, 2.5]
    assert array.flags.aligned
    assert array.flags.writeable


def test_columns_in_any_order_of_the_json_are_read_in_the_order_of_the_data() -> None:
    tree = {"b": column("U8", [1], [1, 2]), "n": column("U8", [0], [1, 1]), "a": column("U8", [1], [0, 1])}
    record = safetensors.decode(raw_file(tree, b"\1\2"))
    assert {name: array.tolist() for name, array in record.items()} == {"a": [1], "n": [], "b": [2]}
    assert list(record) == ["a", "n", "b"]


@pytest.mark.parametrize(
    "columns", ["", "null", '["a"]', '["a","a"]', '["a","b","c"]', '["a",1]', '{"a":1,"b":2}', "[" * 100_000]
)
def test_foreign_metadata_under_our_key_is_ignored(columns: str) -> None:
    tree = {"__metadata__": {"columns": columns}, "b": column(), "a": column(offsets=[3, 6])}
    assert list(safetensors.decode(raw_file(tree, bytes(6)))) == ["b", "a"]


def test_a_value_cut_or_extended_anywhere_is_corrupt() -> None:
    value = file_of({"a": np.arange(5), "b": np.zeros((2, 2), "u1"), "c": np.ones(3, ml_dtypes.bfloat16)})
    for length in range(len(value)):
        with pytest.raises(CorruptValue):
            safetensors.decode(writable(value[:length]))
    with pytest.raises(CorruptValue, match=rf"{len(value)} bytes in all, and the value has {len(value) + 1}"):
        safetensors.decode(writable(value + b"\0"))


@given(
    records(RECORD + ML_RECORD), st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), min_size=1, max_size=4)
)
def test_changed_bytes_give_a_record_or_a_decode_error(
    record: dict[str, NDArray[Any]], changes: list[tuple[int, int]]
) -> None:
    value = writable(file_of(record))
    for place, byte in changes:
        value[place % len(value)] = byte
    try:
        assert sum(array.nbytes for array in safetensors.decode(value).values()) <= len(value)
    except DecodeError:
        pass


HUGE = 10**12
HOSTILE: dict[str, object] = {
    "not JSON": b"{'a': 1}",
    "cut JSON": b'{"a": ',
    "UTF-16": '{"a": 1}'.encode("utf-16-le"),
    "not UTF-8": b'{"\xff": 1}',
    "deep": b'{"a":' * 60_000,
    "deep list": b'{"a":' + b"[" * 60_000,
    "more after it": b"{} {}",
    "name twice": b'{"__metadata__":{},"__metadata__":{},"a":{"dtype":"U8","shape":[3],"data_offsets":[0,3]}}',
    "field twice": b'{"a":{"dtype":"U8","dtype":"U8","shape":[3],"data_offsets":[0,3]}}',
    "NaN": b'{"a":{"dtype":"U8","shape":[NaN],"data_offsets":[0,3]}}',
    "float": b'{"a":{"dtype":"U8","shape":[3.0],"data_offsets":[0,3]}}',
    "long number": b'{"a":{"dtype":"U8","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,3]}}',
    "column is a list": {"a": [1]},
    "column lacks a field": {"a": {"dtype": "U8", "shape": [3]}},
    "column has another field": {"a": column(more=1)},
    "unknown dtype": {"a": column("F4")},
    "dtype is a number": {"a": column(4)},
    "dtype is a list": {"a": column(["U8"])},
    "bool in shape": {"a": column(shape=[True, 3])},
    "string in shape": {"a": column(shape=["3"])},
    "shape is a number": {"a": column(shape=3)},
    "negative axis": {"a": column(shape=[-3])},
    "negative axes": {"a": column(shape=[-3, -1])},
    "too many axes": {"a": column(shape=[1] * 65 + [3])},
    "product beyond 64 bits": {"a": column(shape=[2**32, 2**32])},
    "product beyond 64 bits, empty": {"a": column(shape=[2**32, 2**32, 0], offsets=[0, 0])},
    "offsets are bools": {"a": column(shape=[1], offsets=[False, True])},
    "three offsets": {"a": column(offsets=[0, 3, 3])},
    "no offsets": {"a": column(offsets=[])},
    "offsets is a string": {"a": column(offsets="03")},
    "negative offset": {"a": column(offsets=[-1, 2])},
    "reversed offsets": {"a": column(offsets=[3, 0])},
    "too few bytes": {"a": column(offsets=[0, 2])},
    "hole before": {"a": column(offsets=[1, 4])},
    "hole between": {"a": column(shape=[1], offsets=[0, 1]), "b": column(shape=[1], offsets=[2, 3])},
    "overlap": {"a": column(shape=[2], offsets=[0, 2]), "b": column(shape=[2], offsets=[1, 3])},
    "same place": {"a": column(), "b": column()},
    "empty column outside": {"a": column(), "b": column(shape=[0], offsets=[7, 7])},
    "data left over": {"a": column(shape=[2], offsets=[0, 2])},
    "metadata is a list": {"__metadata__": [], "a": column()},
    "metadata of numbers": {"__metadata__": {"n": 1}, "a": column()},
    "1 TB": {"a": column(shape=[HUGE], offsets=[0, HUGE])},
    "1 TB away": {"a": column(offsets=[HUGE, HUGE + 3])},
    "long name": {"a" * 10_000: column("F4")},
}


@pytest.mark.parametrize("data", [b"", b"123"], ids=["without data", "with data"])
@pytest.mark.parametrize("tree", HOSTILE.values(), ids=list(HOSTILE))
def test_a_hostile_header_is_corrupt_and_allocates_nothing(tree: object, data: bytes) -> None:
    value = raw_file(tree, data)
    tracemalloc.start()
    try:
        with pytest.raises(CorruptValue) as caught:
            safetensors.decode(value)
        assert tracemalloc.get_traced_memory()[1] < 20_000_000  # the JSON parser's own, for 300,000 characters
    finally:
        tracemalloc.stop()
    assert len(str(caught.value)) < 400


def test_an_unknown_dtype_is_named() -> None:
    with pytest.raises(CorruptValue, match=r"column 'a' has the dtype 'F4', which is unknown"):
        safetensors.decode(raw_file({"a": column("F4")}, b"123"))


@pytest.mark.parametrize("length", [3, 10**8 + 1, 2**63, 2**64 - 1])
def test_a_header_length_beyond_the_value_or_the_formats_limit_is_refused(length: int) -> None:
    value = writable(length.to_bytes(8, "little"), b"{}")
    assert not safetensors.looks_like(value)
    with pytest.raises(CorruptValue, match=r"no safetensors header"):
        safetensors.parse(value)


@given(st.binary(max_size=40))
def test_anything_may_be_sniffed_and_parsed(value: bytes) -> None:
    if safetensors.looks_like(memoryview(value)):
        assert value[8:9] == b"{"
    with pytest.raises(DecodeError):
        safetensors.decode(writable(value))


def test_the_header_caches_are_bounded_in_count_and_size() -> None:
    wide = {"x" * 70_000: np.zeros(1)}
    safetensors.decode(writable(file_of(wide)))
    for n in range(300):
        safetensors.decode(writable(file_of({"a": np.zeros(n, "u1")})))
        assert 0 < len(safetensors._made) <= 128
        assert 0 < len(safetensors._parsed) <= 128
    assert all(len(made.header) <= 65_536 for made in (*safetensors._made.values(), *safetensors._parsed.values()))


def test_a_header_is_made_and_parsed_once() -> None:
    header, _ = safetensors.encode({"a": np.zeros(3)})
    again, _ = safetensors.encode({"a": np.ones(3)})
    assert again is header
    assert safetensors.parse(memoryview(header)) is safetensors.parse(memoryview(bytearray(header)))
