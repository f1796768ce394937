"""``aionpredis show``: one value, with statistics and a picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from aionpredis.cli.common import (
    AsJson,
    Url,
    console,
    fail,
    in_one_line,
    need,
    print_json,
    print_table,
    shown,
    with_client,
)

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from aionpredis.cli.statistics import Statistics
    from aionpredis.cli.survey import Entry
    from aionpredis.cli.values import Arrays
    from aionpredis.client import Client

__all__ = ["show"]

PICTURE_LINES = 24


def show(
    key: Annotated[str, typer.Argument(help="Of an array or a record.")],
    url: Url = None,
    index: Annotated[
        int | None, typer.Option(help="Only this row, of a record: of each column; -1 is the last.")
    ] = None,
    column: Annotated[str | None, typer.Option(help="Of a record: only this one.")] = None,
    png: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the picture there.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show a value: what it is, its statistics, and a picture if it looks like an image, or like several."""
    need("rich", *(["PIL"] if png else []))
    if png == Path("-"):
        fail("--png takes the name of a file: stdout has the text", 2)
    import anyio.to_thread

    from aionpredis.cli import values
    from aionpredis.errors import UsageError

    stream = png if png is not None and values.is_stream(png) else None
    file = png if stream is None else None
    wants_picture = not as_json or png is not None

    async def work(client: Client) -> tuple[Entry, list[_Shown], NDArray[np.uint8] | None]:
        entry = values.permitted(await values.looked(client, key))
        if entry.about is None or entry.about.kind is None:
            if index is not None or column is not None:
                option = f"--index {index}" if column is None else f"--column {column}"
                raise UsageError(f"{option}: neither an array nor a record is stored there, but: {entry.kind}")
            return entry, [], None
        _, arrays = await values.load(client, entry)
        return entry, *await anyio.to_thread.run_sync(_look_at, arrays, column, index, wants_picture, file)

    entry, parts, image = with_client(url, work)
    if png is not None and image is None:
        fail(f"{key} does not look like an image")
    if stream is not None and image is not None:
        from aionpredis.cli.picture import png as png_of

        with in_one_line():
            values.write(stream, [png_of(image)])
    if as_json:
        facts = entry.as_dict() | {"statistics": {name: found._asdict() for name, _, found in parts}}
        if len(parts) == 1 and "columns" not in facts:
            facts["statistics"] = parts[0][2]._asdict()
        if index is not None:
            facts["index"] = index
        if png is not None:
            facts["png"] = str(png)
        print_json(facts)
        return
    _print(entry, parts, index)
    out = console()
    if image is not None and png is not None:
        print(f"{shown(bytes(png))}: {image.shape[1]} x {image.shape[0]} pixels")
    elif image is not None and out.color_system is not None and not out.no_color and not out.options.ascii_only:
        from aionpredis.cli.picture import half_blocks

        out.print(half_blocks(image, out.width, PICTURE_LINES), no_wrap=True, end="")


_Shown = tuple[str, str, "Statistics"]
"""A column's name, its dtype and shape, and its statistics."""


def _look_at(
    arrays: Arrays, column: str | None, index: int | None, wants_picture: bool, png: Path | None
) -> tuple[list[_Shown], NDArray[np.uint8] | None]:
    """Statistics of each column, and a picture of the first that has one. Blocks."""
    from aionpredis.cli import picture, values
    from aionpredis.cli.statistics import statistics
    from aionpredis.errors import UsageError

    if column is not None:
        if column not in arrays or "" in arrays:
            has = "an array has no columns" if "" in arrays else f"there are {', '.join(arrays)}"
            raise UsageError(f"--column {column}: {has}")
        arrays = {column: arrays[column]}
    parts: list[_Shown] = []
    image: NDArray[np.uint8] | None = None
    for name, whole in arrays.items():
        array = whole
        if index is not None:
            if not whole.ndim or not -len(whole) <= index < len(whole):
                rows = f"{len(whole)} rows" if whole.ndim else "no rows"
                raise UsageError(f"--index {index}: {f'column {name!r}' if name else 'the array'} has {rows}")
            array = whole[index, ...]
        parts.append((name, f"{array.dtype} {array.shape}", statistics(array)))
        if image is None and wants_picture:
            image = picture.pixels(array)
    if png is not None and image is not None:
        values.write(png, [picture.png(image)])
    return parts, image


def _print(entry: Entry, parts: list[_Shown], index: int | None) -> None:
    about = entry.about
    print(f"{shown(entry.key)}: {entry.kind}" + ("" if entry.problem is None else f", {shown(entry.problem)}"))
    if about is not None:
        order = ", Fortran order" if about.fortran else ""
        raw = "" if about.size is None else f", {about.size:,} bytes raw"
        print(
            f"stored: {entry.stored:,} bytes, {about.codec}{raw}"
            if about.codec
            else f"stored: {entry.stored:,} bytes{order}"
        )
    elif entry.stored is not None:
        print(f"stored: {entry.stored:,} bytes")
    print(f"ttl: {'none' if entry.ttl is None else f'{entry.ttl:,.1f} s'}")
    if index is not None:
        print(f"row: {index}")
    print()
    rows = []
    for name, what, found in parts:
        cells = [_cell(each) for each in (found.min, found.max, found.mean, found.std)]
        rows.append((shown(name), shown(what)[:80], *cells, f"{found.nan:,}", f"{found.inf:,}"))
    named = any(name for name, _, _ in parts)
    columns = ("column", "values", ">min", ">max", ">mean", ">std", ">nan", ">inf")
    print_table(columns if named else columns[1:], rows if named else [row[1:] for row in rows])


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.6g}" if isinstance(value, float) else str(value)
