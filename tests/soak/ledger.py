"""What was acknowledged and what was read: files that outlive the process that writes them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

HEADER = 4  # int64: how many numbers follow these four, and the three of an entry


class Entry(NamedTuple):
    """Acknowledged: run, first, stop. Read: a position (run, entry, row) and the numbers that came up to there."""

    run: int
    first: int
    second: int
    numbers: NDArray[np.int64]


class Ledger:
    """Entries are appended whole: one that a SIGKILL tore is cut off when the file is opened again."""

    def __init__(self, path: Path) -> None:
        whole = sum(8 * (HEADER + len(entry.numbers)) for entry in read(path))
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.ftruncate(self._file, whole)

    def write(self, run: int, first: int, second: int, numbers: NDArray[np.int64] | None = None) -> None:
        body = np.zeros(0, np.int64) if numbers is None else numbers.astype(np.int64)
        record = np.concatenate([np.array([len(body), run, first, second], np.int64), body]).tobytes()
        assert os.write(self._file, record) == len(record)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._file)


def read(path: Path) -> Iterator[Entry]:
    """All whole entries."""
    if not path.exists():
        return
    values = np.fromfile(path, np.int64)
    at = 0
    while at + HEADER <= len(values):
        count, run, first, second = values[at : at + HEADER].tolist()
        if at + HEADER + count > len(values):
            return
        yield Entry(run, first, second, values[at + HEADER : at + HEADER + count])
        at += HEADER + count


class Verdict(NamedTuple):
    """Of one run, in transitions. ``lost``: of those whose acknowledgement was to outlive a primary; ``forfeited``: of those
    that were acknowledged by a primary alone. ``unknown``: read, though nobody was told that they were committed.
    """

    acknowledged: int
    read: int
    lost: int
    forfeited: int
    duplicates: int
    unknown: int


def judge(folder: Path, run: int) -> Verdict:
    """Hold what was acknowledged in this run against what all learners read."""
    kept, held = (
        _joined(
            np.arange(entry.first, entry.second)
            for path in folder.glob("acknowledged-*")
            for entry in read(path)
            if entry.run == run and path.name.startswith("acknowledged-memory-") is in_memory
        )
        for in_memory in (False, True)
    )
    numbers = _joined(entry.numbers for path in folder.glob("read-*") for entry in read(path) if entry.run == run)
    unique = np.unique(numbers)
    return Verdict(
        len(kept) + len(held),
        len(numbers),
        int((~np.isin(kept, unique)).sum()),
        int((~np.isin(held, unique)).sum()),
        len(numbers) - len(unique),
        int((~np.isin(unique, np.concatenate([kept, held]))).sum()),
    )


def _joined(parts: Iterable[NDArray[np.int64]]) -> NDArray[np.int64]:
    return np.concatenate([np.zeros(0, np.int64), *parts])
