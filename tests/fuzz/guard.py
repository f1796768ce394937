"""How much a decoder may allocate."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def at_most(nbytes: int) -> Iterator[None]:
    """Fails if the block holds more than so many bytes at any moment, NumPy's included, also those never touched."""
    started = not tracemalloc.is_tracing()
    if started:
        tracemalloc.start()
    tracemalloc.reset_peak()
    before, _ = tracemalloc.get_traced_memory()
    try:
        yield
        _, peak = tracemalloc.get_traced_memory()
        assert peak - before <= nbytes, f"allocated {peak - before:,} bytes, {nbytes:,} are plausible"
    finally:
        if started:
            tracemalloc.stop()
