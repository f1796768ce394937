"""``aionpredis delete``: keys, and whole replays."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Annotated

import typer

from aionpredis.cli.common import AsJson, Url, fail, need, print_json, progress, with_client

if TYPE_CHECKING:
    from aionpredis.cli.survey import Group, Survey
    from aionpredis.client import Client
    from aionpredis.replay.keys import Owned

__all__ = ["delete"]


def delete(
    patterns: Annotated[list[str], typer.Argument(help="Of keys and names of replays, as ls takes them.")],
    url: Url = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: AsJson = False,
) -> None:
    """Delete keys, and replays with their policies: all that `ls` lists for these patterns.

    It counts, asks, and then deletes what matches by then: single keys that came meanwhile, too, but no new replay or
    policy. A replay's actors are refused from the first step on. After Ctrl-C the same command goes on where it was.
    """
    need("rich")
    from aionpredis.cli.survey import Pattern, Survey

    survey = Survey(Pattern(*patterns), sorts=True)
    deleted = {"keys": 0, "replays": 0, "policies": 0}

    async def look(client: Client) -> None:
        with progress("scanning") as report:
            await survey.run(client, report)

    async def work(client: Client) -> None:
        await _delete(client, survey, deleted)

    with_client(url, look)
    found = _found(survey)
    if found and not yes:
        if not sys.stdin.isatty():
            fail(f"this would delete {found}: --yes", 2)
        try:
            agreed = typer.confirm(f"Delete {found}?", err=True)
        except typer.Abort as abort:
            print(file=sys.stderr)  # the question's line has no end
            fail("nothing was deleted", 130 if isinstance(abort.__context__, KeyboardInterrupt) else 1)
        if not agreed:
            fail("nothing was deleted")
    started = time.monotonic()
    if found:
        with_client(url, work, interrupted=lambda: f"deleted were {_keys(deleted['keys'])}")
    seconds = round(time.monotonic() - started, 3)
    if as_json:
        print_json(deleted | {"bytes": survey.total_stored, "seconds": seconds})
    elif not found:
        print("no keys")
    else:
        print(f"deleted {found}: {_keys(deleted['keys'])} in {seconds} s")


def _found(survey: Survey) -> str:
    """What would be deleted, in words; empty: nothing."""
    from rich.filesize import decimal

    parts = [
        f"the {group.kind} {group.name}" + (f" ({group.chunks:,} chunks)" if group.kind == "replay" else "")
        for group in sorted(survey.groups.values(), key=lambda group: group.name)
    ]
    if len(parts) > 5:
        parts[4:] = [f"{len(parts) - 4:,} more replays and policies"]
    if survey.keys:
        foreign = [f"{survey.foreign:,} of them neither arrays nor records"] if survey.foreign else []
        foreign += [f"{survey.unread:,} that this user may not read"] if survey.unread else []
        parts.append(f"{_keys(survey.keys)}" + (f" ({', '.join(foreign)})" if foreign else ""))
    return f"{' and '.join(parts)}, {decimal(survey.total_stored)}" if parts else ""


def _keys(count: int) -> str:
    return f"{count:,} key{'s' if count != 1 else ''}"


async def _delete(client: Client, survey: Survey, deleted: dict[str, int]) -> None:
    """Replays first, each fenced before its data goes; then whatever matches, page by page."""
    from aionpredis.replay import runs
    from aionpredis.replay.log import Names

    total = survey.keys + sum(group.keys for group in survey.groups.values())

    with progress("deleting") as report:
        report(0, total)

        def count(keys: int) -> None:
            deleted["keys"] += keys
            report(min(deleted["keys"], total), total)

        for group in survey.groups.values():
            if group.kind == "replay":
                await runs.delete(client, Names(group.name), progress=count)
                deleted["replays"] += 1
        async for page in client.scan_pages():
            matching = list(survey.matching(page))
            for name in {owned.name for _, owned in matching if owned is not None}:
                await _check_policy(client, survey.groups.get(name))
            keys = [key for key, owned in matching if owned is None or _is_left(survey, owned)]
            count(await client.count_keys("UNLINK", keys, repeatable=True))
        deleted["policies"] = sum(group.kind == "policy" for group in survey.groups.values())


async def _check_policy(client: Client, group: Group | None) -> None:
    """Stop before a policy that stood alone and is a replay's by now: nobody has fenced that."""
    from aionpredis.errors import AionpredisError
    from aionpredis.replay.log import Names

    if group is not None and group.kind == "policy" and await client.exists(Names(group.name).log):
        raise AionpredisError(
            f"{group.name} is a replay by now, no policy that stands alone: look at it and delete it again"
        )


def _is_left(survey: Survey, owned: Owned) -> bool:
    """Whether the key is of a policy that stands alone, or a chunk that no log named. A replay of that name, which somebody
    has begun meanwhile, is none of our business: its log is not touched, and its runs have other numbers.
    """
    group = survey.groups.get(owned.name)
    if group is None:
        return False
    return owned.number in group.runs if group.kind == "replay" else owned.part not in ("log", "chunk")
