"""The targets of ``tests/fuzz``, for a moment and without atheris; and what they have found."""

from __future__ import annotations

from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from .fuzz.__main__ import NAMES
from .fuzz.targets import TARGETS


@cache
def seeds(name: str) -> list[bytes]:
    return TARGETS[name].seeds()


@pytest.mark.parametrize("name", TARGETS)
def test_valid_input_and_plain_lies_pass(name: str) -> None:
    for seed in seeds(name):
        TARGETS[name].run(seed)


PLACE = st.integers(0, 1 << 16)
BYTES = st.one_of(
    st.binary(min_size=1, max_size=8),
    st.sampled_from(
        [b"\r\n", b"$", b"*", b"9" * 15, b"[", b"{", b"(", b"-", b'"', b"\0" * 8, b"\xff" * 8, b"\n", b" "]
    ),
)
CHANGES = st.lists(st.tuples(st.sampled_from(["replace", "insert", "delete", "repeat"]), PLACE, BYTES), max_size=4)


def changed(data: bytes, changes: list[tuple[str, int, bytes]]) -> bytes:
    for kind, place, new in changes:
        at = place % (len(data) + 1)
        match kind:
            case "replace":
                data = data[:at] + new + data[at + len(new) :]
            case "insert":
                data = data[:at] + new + data[at:]
            case "delete":
                data = data[:at] + data[at + len(new) :]
            case "repeat":
                data = data[:at] + data[max(0, at - 8 * len(new)) : at] * 3 + data[at:]
    return data


@pytest.mark.parametrize("name", TARGETS)
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_changed_input_passes(name: str, data: st.DataObject) -> None:
    TARGETS[name].run(changed(data.draw(st.sampled_from(seeds(name))), data.draw(CHANGES)))


def test_every_target_can_be_named() -> None:
    assert list(NAMES) == list(TARGETS)


FOUND: list[tuple[str, bytes]] = [
    # A line beyond the limit was read if it came in one piece, and refused if it came in two.
    ("resp", b"\0\0\0\0\x04\x02\x1f;+" + b"a" * 230 + b"\r\n"),
    ("resp", b"\0\0\0\0\x04\x02\x1f;+" + b"a" * 199 + b"\r\n"),
    # The stock library refuses an offset of -0.
    (
        "safetensors",
        (
            b'\x01{"\xcb\xa4\\n\xf0\x9f\x99\x82":{"dtype":"I64","shape":[1],"data_offsets":[-0,8]},'
            b'"":{"dtype":"BOOL","shape":[1],"data_offsets":[8,9]}}      '
        ),
    ),
    # The shortcut for commits took an id that was shorter than announced, if all of the entry had come.
    (
        "abandon",
        (
            b"\x07\x07\x07\x07\x04\x02\x1f;"
            b"*3\r\n*2\r\n$4\r\n7-12\r\n*2\r\n$1\r\nc\r\n$17\r\nincarnat\x03\0\0\0\x04\0\0\0\x05\r\n"
            b"*2\r\n$4\r\n7-14\r\n*2\r\n$1\r\nc\r\n$3\r\nabc\r\n"
            b"*2\r\n$4\r\n7-12\r\n*2\r\n$1\r\nc\r\n$17\r\nincarnat\x03\0\0\0\x04\0\0\0\x05\r\n"
            b"*2\r\n*2\r\n$6\r\n7-12\r\n*2\r\n$1\r\nc\r\n$17\r\nincarnat\x03\0\0\0\x04\0\0\0\x05\r\n"
            b"*2\r\n$4\r\n7-14\r\n*2\r\n$1\r\nc\r\n$3\r\nabc\r\n-ERR no\r\n"
        ),
    ),
]


@pytest.mark.parametrize(("name", "data"), FOUND, ids=lambda value: value if isinstance(value, str) else None)
def test_what_was_found_stays_mended(name: str, data: bytes) -> None:
    TARGETS[name].run(data)
