"""``aionpredis save`` and ``restore``: a run of a replay, and a folder of files."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from aionpredis.cli.common import AsJson, Url, need, print_json, progress, with_client

if TYPE_CHECKING:
    from aionpredis.client import Client

__all__ = ["restore", "save"]


def save(
    name: Annotated[str, typer.Argument(help="Of the replay.")],
    folder: Annotated[Path, typer.Argument(help="To be made; it must not exist.")],
    url: Url = None,
    run: Annotated[int | None, typer.Option(help="Its number; default: the newest.")] = None,
    as_json: AsJson = False,
) -> None:
    """Save a run of a replay, and the newest policy, as a folder of .safetensors files."""
    from aionpredis.replay import checkpoint

    async def work(client: Client, report: Callable[[int, int], None]) -> dict[str, Any]:
        return await checkpoint.save_any(client, name, folder, run, report)

    _transfer(f"saving {name}", work, url, as_json, lambda done: f"nothing was left in {folder.parent}")


def restore(
    folder: Annotated[Path, typer.Argument(help="What was saved.")],
    name: Annotated[str | None, typer.Argument(help="Of the replay; default: as it was.")] = None,
    url: Url = None,
    keep: Annotated[int, typer.Option(help="Runs that stay, with the new one.")] = 1,
    as_json: AsJson = False,
) -> None:
    """Begin a new run of a replay with what was saved."""
    from aionpredis.replay import checkpoint

    async def work(client: Client, report: Callable[[int, int], None]) -> dict[str, Any]:
        return await checkpoint.restore_any(client, folder, name, keep, report)

    _transfer(
        f"restoring {folder.name}",
        work,
        url,
        as_json,
        lambda done: f"the run that was begun has at least {done} transitions: restore again, which begins another one",
    )


def _transfer(
    what: str,
    work: Callable[[Client, Callable[[int, int], None]], Awaitable[dict[str, Any]]],
    url: str | None,
    as_json: bool,
    interrupted: Callable[[str], str],
) -> None:
    """Do this with progress, and print what was done; ``interrupted``: says what there is after ``done`` transitions."""
    need("rich")
    last = 0, 0
    started = time.monotonic()

    async def shown(client: Client) -> dict[str, Any]:
        def note(done: int, total: int) -> None:
            nonlocal last
            last = done, total
            report(done, total)

        with progress(what) as report:
            return await work(client, note)

    facts = with_client(url, shown, interrupted=lambda: interrupted(f"{last[0]:,} of {last[1]:,}"))
    facts["seconds"] = round(time.monotonic() - started, 3)
    if as_json:
        print_json(facts)
    else:
        print(f"run {facts['run']} of {facts['name']}: {facts['transitions']:,} transitions, {facts['seconds']} s")
