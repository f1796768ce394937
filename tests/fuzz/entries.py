"""Entries of streams, and fields of hashes: what actors, trainers and learners tell each other."""

from __future__ import annotations

import json
import struct
from types import SimpleNamespace
from typing import Any

import numpy as np

from aionpredis.errors import CorruptValue
from aionpredis.policy import MAX_PARTS, parse_announcement
from aionpredis.replay.index import Index
from aionpredis.replay.lag import slowest
from aionpredis.replay.log import FIELD, ChunkId, LogReader, Names, pack, parse_begin, parse_commit

from .guard import at_most

MAX_ROWS = 5000


def fuzz_log(data: bytes) -> None:
    """Commits, each with its length before it, as the log's reader takes them: all of them or an error; then the index."""
    commits: list[list[object]] = []
    at = 0
    while at < len(data) and len(commits) < 100:
        size = data[at]
        commits.append([b"7-%d" % (len(commits) + 1), [FIELD, data[at + 1 : at + 1 + size]]])
        at += 1 + size
    client: Any = SimpleNamespace(faults=SimpleNamespace(changes=0))  # it is asked nothing here
    log = LogReader(client, Names("r"), 7, max_rows=MAX_ROWS)
    with at_most(100_000 + 20 * len(data)):
        try:
            chunks = log.checked(map(parse_commit, commits))
        except CorruptValue as error:
            assert error.key == "{r}:log"
            return
    assert [[FIELD, pack(chunk)] for chunk in chunks] == [fields for _, fields in commits]
    new = log._take(chunks)
    assert len(new) + log.duplicates == len(chunks)
    index = Index()
    with at_most(100_000 + 20 * len(data) + 40 * sum(chunk.rows for chunk in new)):
        ids = index.add(new)
    assert len(ids) == index.present_count == sum(chunk.rows for chunk in new)
    chunk, row = index.locate(ids)
    assert (row < np.array([one.rows for one in new])[chunk]).all() if len(ids) else True
    assert index.follow(ids, 3).shape == (len(ids), 3)


def fuzz_announcements(data: bytes) -> None:
    """Fields of an entry, separated by zeros: what begins a run, announces a policy, or says what a learner has read."""
    parts = data.split(b"\0")
    fields = dict(zip(parts[::2], parts[1::2], strict=False))
    with at_most(4_000_000 + 64 * len(data)):
        try:
            begin = parse_begin(Names("r"), 7, fields)
            assert (begin.run, begin.token) == (7, fields[b"begin"])
        except CorruptValue as error:
            assert error.key == "{r}:log"
            assert len(str(error)) < 1500
        try:
            announced = parse_announcement("p", 3, fields)
            assert 1 <= len(announced.keys) <= MAX_PARTS
            assert len(set(announced.keys)) == len(announced.keys)
            assert all(key.startswith("p:policy:3:") for key in announced.keys)
            assert all(type(n) is int and n >= 0 for shape in announced.shapes.values() for n in shape)
        except CorruptValue as error:
            assert len(str(error)) < 1500
        try:
            assert slowest(parts, 7) >= 0
        except CorruptValue as error:
            assert len(str(error)) < 300


def log_seeds() -> list[bytes]:
    chunks = [ChunkId(b"incarnat", seq, 9, b"" if seq % 2 else b"\x05\x01") for seq in (0, 1, 2, 1)]
    chunks += [ChunkId(b"another.", 2**32 - 1, 1, bytes(30))]
    valid = [bytes([len(pack(chunk))]) + pack(chunk) for chunk in chunks]
    lies = [b"\x10" + struct.pack("<8sII", b"incarnat", 0, rows) for rows in (0, MAX_ROWS + 1, 2**32 - 1)]
    return [b"".join(valid), *valid, *lies, b"\x03abc"]


def announcements_seeds() -> list[bytes]:
    shapes = json.dumps({"layer['0']": [3, 4], "": [], "x": [0]}).encode()
    fields = [
        [b"begin", b"0123456789abcdef", b"policy", b"12", b"schema", b"0123456789abcdef"],
        [b"token", b"0123456789abcdef"],
        [b"token", b"0123456789abcdef", b"parts", b"3", b"shapes", shapes],
        [b"token", b"0123456789abcdef", b"parts", b"999999999999"],
        [b"token", b"0123456789abcdef", b"parts", b"2", b"shapes", b'{"x": [-1, "9"]}'],
        [b"7:12", b"7:15", b"6:99"],
    ]
    return [b"\0".join(parts) for parts in fields]
