"""What a soak has found, as a table."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from .chaos import Chaos
from .ledger import Verdict, read
from .storm import Storm
from .work import STALLS

__all__ = ["report"]

MOST_GROWTH = 1.2
LEAST_SAMPLES = 60
"""Of memory and files. In a shorter soak, much of what is held is still growing to what it needs."""
MOST_UNEVENNESS = 0.1
STALLS_SHOWN = 3
LEFT_SHOWN = 20


def report(
    console: Console,
    folder: Path,
    chaos: Chaos | Storm,
    verdicts: Sequence[Verdict],
    left: Sequence[bytes],
    samples: dict[str, list[tuple[int, int]]],
) -> bool:
    """Print it; whether all is as it must be. ``left``: data keys that nobody deleted; ``samples``: of memory and files."""
    counts, wrong, missing = (
        [entry for path in folder.glob(f"{what}-*") for entry in read(path)] for what in ("counts", "wrong", "missing")
    )
    # Data that were to live for ever when a primary was lost with the entry that names them: nobody knows of them any more.
    forfeited = {path.name.rpartition("-")[2].encode() for path in folder.glob("incarnation-memory-*")}
    unnamed = [key for key in left if key.split(b":")[2:3] and key.split(b":")[2] in forfeited]
    table = Table(show_header=False)
    good = bool(verdicts)

    def row(name: str, value: str, bound: str = "", *, holds: bool = True) -> None:
        nonlocal good
        good &= holds
        table.add_row(name, value, "" if holds else bound)

    row("runs", f"{len(verdicts):,}")
    row("faults", f"{sum(chaos.done.values()):,}")
    row("acknowledged transitions", f"{sum(verdict.acknowledged for verdict in verdicts):,}")
    row("read", f"{sum(verdict.read for verdict in verdicts):,}")
    row("of them not known to be acknowledged", f"{sum(verdict.unknown for verdict in verdicts):,}")
    row("cancelled calls", f"{sum(count.run for count in counts):,}")
    row("values checked", f"{sum(count.first for count in counts):,}")
    for name, number in {
        "lost": sum(verdict.lost for verdict in verdicts),
        "duplicates": sum(verdict.duplicates for verdict in verdicts),
        "cross-delivered": len(wrong),
        "leftover keys": len(left) - len(unnamed),
    }.items():
        row(name, f"{number:,}", "must be 0", holds=not number)
    for name, values in samples.items():
        third = max(1, len(values) // 3)
        middle, end = values[third : 2 * third] or values, values[-third:]
        memory = [statistics.median(value for value, _ in part) for part in (middle, end)]
        files = [max(value for _, value in part) for part in (middle, end)]
        for what, factor in (("memory", memory[1] / memory[0]), ("open files", files[1] / files[0])):
            flat = factor < MOST_GROWTH or len(values) < LEAST_SAMPLES
            row(f"{what} of the constant {name}", f"x{factor:.2f}", "must be flat", holds=flat)
    if isinstance(chaos, Storm):
        row("acknowledged by a primary alone, lost with it", f"{sum(verdict.forfeited for verdict in verdicts):,}")
        row("of these, keys that no entry names", f"{len(unnamed):,}")
        row("chunks that a reader did not find", f"{sum(entry.first for entry in missing):,}")
        row("chunks that were numbered and did not come", f"{sum(entry.second for entry in missing):,}")
        uneven = chaos.unevenness
        row("a shard's share, from the mean", f"{uneven:.1%}", "must be even", holds=uneven < MOST_UNEVENNESS)
    stalls = [entry for path in folder.glob("stalls-*") for entry in read(path)]
    for kind, what in enumerate(STALLS):
        longest = sorted(((entry.second, entry.first) for entry in stalls if entry.run == kind), reverse=True)
        for took, began in longest[:STALLS_SHOWN]:
            during = chaos.during(began / 1e3, (began + took) / 1e3) if isinstance(chaos, Storm) else ""
            table.add_row(f"longest {what}", f"{took / 1e3:.1f} s", during)
    console.print(table)
    for key in left[:LEFT_SHOWN]:
        console.print(f"left: {key!r}", markup=False)
    console.print(", ".join(f"{name} {count}" for name, count in sorted(chaos.done.items())))
    return good
