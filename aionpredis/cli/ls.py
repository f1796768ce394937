"""``aionpredis ls``: arrays, records and replays with what they are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from aionpredis.cli.common import AsJson, Url, need, print_json, print_table, progress, shown, with_client

if TYPE_CHECKING:
    from aionpredis.cli.survey import Entry, Survey
    from aionpredis.client import Client
    from aionpredis.codecs.describe import Column

__all__ = ["ls"]

COLUMNS = 4
"""Columns of a record that a line of the table names."""


def ls(
    pattern: Annotated[str | None, typer.Argument(help="Of keys and names of replays: * ? [abc] [!abc].")] = None,
    url: Url = None,
    limit: Annotated[int, typer.Option(min=1, help="Single keys that are listed, the first by name.")] = 1000,
    every: Annotated[bool, typer.Option("--all", help="The keys of replays and policies one by one, too.")] = False,
    as_json: AsJson = False,
) -> None:
    """List what is stored: arrays, records, replays. Headers are read, no value is loaded.

    A replay is one line, however many chunks it has.
    """
    need("rich")
    from aionpredis.cli.survey import Pattern, Survey

    survey = Survey(Pattern(*[] if pattern is None else [pattern]), limit=limit, grouped=not every)

    async def work(client: Client) -> list[Entry]:
        with progress("scanning") as report:
            await survey.run(client, report)
            return await survey.entries(client, report)

    entries = with_client(url, work)
    groups = sorted(survey.groups.values(), key=lambda group: group.name)
    if as_json:
        print_json(
            {
                "replays": [group.as_dict() for group in groups if group.kind == "replay"],
                "policies": [group.as_dict() for group in groups if group.kind == "policy"],
                "keys": [entry.as_dict() for entry in entries],
                "total_keys": survey.keys,
                "total_bytes": survey.stored,
            }
        )
    else:
        _print(survey, entries)


def _print(survey: Survey, entries: list[Entry]) -> None:
    from rich.filesize import decimal

    replays, policies, keys = [], [], []
    for group in sorted(survey.groups.values(), key=lambda group: group.name):
        version = "" if group.policy_version is None else f"{group.policy_version}"
        size = decimal(group.stored)
        if group.kind == "replay":
            columns = "" if group.about is None else _columns(group.about.columns, rows=False)
            replays.append((group.name, f"{len(group.runs):,}", f"{group.chunks:,}", size, version, columns))
        else:
            policies.append((group.name, version, size))
    for entry in entries:
        size = "" if entry.stored is None else decimal(entry.stored)
        keys.append(
            (shown(entry.key), entry.kind, _contents(entry), size, "" if entry.ttl is None else _ttl(entry.ttl))
        )
    print_table(("replay", ">runs", ">chunks", ">size", ">policy", "columns"), replays)
    print_table(("policy", ">version", ">size"), policies)
    print_table(("key", "kind", "contents", ">size", ">ttl"), keys)
    if survey.keys > len(entries):
        print(f"… and {survey.keys - len(entries):,} more, {decimal(survey.stored)} in all: --limit, or a pattern")
    elif not survey.groups and not entries:
        print("no keys")


def _contents(entry: Entry) -> str:
    from aionpredis.codecs import Kind

    about = entry.about
    if about is None:
        return shown(entry.problem or "")[:120]
    text = _column("", about.columns[""]) if about.kind is Kind.ARRAY else _columns(about.columns)
    if about.fortran:
        text += " Fortran"
    return f"{text} {about.codec}".strip() if about.codec else text


def _columns(columns: Any, *, rows: bool = True) -> str:
    named = [_column(name, column, rows=rows) for name, column in list(columns.items())[:COLUMNS]]
    more = [f"… {len(columns)} in all"] if len(columns) > COLUMNS else []
    return ", ".join([*named, *more])


def _column(name: str, column: Column, *, rows: bool = True) -> str:
    shape = column.shape if rows else column.shape[1:]
    words = shown(name)[:40], shown(str(column.dtype))[:60], str(shape) if shape or not name else ""
    return " ".join(word for word in words if word)


def _ttl(seconds: float) -> str:
    from datetime import timedelta

    return f"{seconds:.1f} s" if seconds < 60 else str(timedelta(seconds=round(seconds)))
