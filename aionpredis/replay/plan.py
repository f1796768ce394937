"""How the rows of a chunk are asked for: which bytes of the file, and where they go."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from aionpredis.replay.schema import Schema

__all__ = ["Plan", "make_plan"]

SMALL_ROW, SMALL = 256, 32 * 1024
"""Bytes of a column, for one transition and in one chunk, up to which all of it is fetched and kept: another command costs as
much as ~10 kB, and what is kept costs nothing the next time."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How chunks of ``rows`` transitions are asked for. Places are bytes from the start of the file.

    ``head``: the file's header, which must be as expected. ``blocks``: first and last byte of what is fetched whole, the
    first one with the header. ``large``: name, first byte, and bytes a row. ``small``: name, bytes a row, and where the
    column lies in the blocks together, without the header. ``order``: for each column of the file its name if it is large,
    else the bytes of all small ones up to the next. ``all_wanted``: no large column is left out. ``row_bytes``: of the large
    columns in a row; ``small_bytes``: of the small ones and the header.
    """

    rows: int
    head: bytes
    blocks: list[tuple[int, int]]
    large: list[tuple[str, int, int]]
    small: list[tuple[str, int, int]]
    order: list[Any]
    scratch_bytes: int
    all_wanted: bool
    row_bytes: int
    small_bytes: int


def make_plan(schema: Schema, rows: int, wanted: Sequence[str]) -> Plan:
    layout = schema.layout(rows)
    start = len(layout.header)
    blocks = [(0, start)]
    large: list[tuple[str, int, int]] = []
    small: list[tuple[str, int, int]] = []
    order: list[Any] = []
    scratch = 0
    for name in layout.order:
        column = layout.columns[name]
        size = column.stop - column.start
        if size > SMALL or size > rows * SMALL_ROW:
            if name in wanted:
                large.append((name, start + column.start, size // rows))
            order.append(name)
            continue
        if blocks[-1][1] == start + column.start:
            blocks[-1] = (blocks[-1][0], start + column.stop)
        else:
            blocks.append((start + column.start, start + column.stop))
        small.append((name, size // rows, scratch))
        if order and isinstance(order[-1], int):
            order[-1] += size
        elif size:
            order.append(size)
        scratch += size
    complete = len(large) == sum(isinstance(part, str) for part in order)
    row_bytes = sum(size for _, _, size in large)
    return Plan(rows, layout.header, blocks, large, small, order, scratch, complete, row_bytes, scratch + start)
