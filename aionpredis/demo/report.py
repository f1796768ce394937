"""What people and programs get to see: live progress, the final table, a plot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.bar import Bar
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from aionpredis.demo.result import Result, RunResult
from aionpredis.demo.settings import Settings

__all__ = ["Report", "write_plot"]


class Report:
    """Progress on a terminal: a table that grows, and what is being done below it. Elsewhere a line for each run.

    For ``with``; implements the trainer's ``Progress``.
    """

    def __init__(self, settings: Settings, console: Console, *, quiet: bool = False) -> None:
        self._settings = settings
        self._console = console
        self._quiet = quiet
        self._runs: list[RunResult] = []
        self._phase: tuple[int, str, int, int, float] = (0, "", 0, 0, 0.0)
        self._live: Live | None = None
        if console.is_terminal and not quiet:
            self._live = Live(get_renderable=self._render, console=console, refresh_per_second=8, transient=True)

    def __enter__(self) -> Report:
        if not self._quiet:
            each = self._settings
            self._console.print(
                f"[bold]{each.env}[/]: {each.simulators} simulators with {each.environments} environments each, "
                f"{each.runs} runs of {each.transitions:,} transitions or more",
                highlight=False,
                soft_wrap=True,
            )
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
        if kind is not None and self._runs and self._live is not None:
            self._console.print(_table(self._runs))  # what was there already does not vanish

    def phase(self, run: int, what: str, done: int = 0, total: int = 0, rate: float = 0.0) -> None:
        self._phase = run, what, done, total, rate

    def finished(self, run: RunResult) -> None:
        self._runs.append(run)
        if self._live is None and not self._quiet:
            self._console.print(
                f"run {run.run:>3}  {run.transitions:>8,} transitions  mean return {_number(run.mean_return):>6}  "
                f"written {run.append_per_s:>8,.0f}/s  read {run.read_per_s:>8,.0f}/s  {run.seconds:6.1f} s",
                highlight=False,
                soft_wrap=True,
            )

    def note(self, text: str) -> None:
        """Something to know, even if nothing else is wanted."""
        Console(stderr=True).print(text, highlight=False, markup=False, soft_wrap=True)

    def result(self, result: Result) -> None:
        """The final table and the totals."""
        if self._quiet:
            return
        totals = Table.grid(padding=(0, 2))
        totals.add_column(justify="right")
        totals.add_column()
        for value, text in (
            (result.acknowledged, "acknowledged to the actors"),
            (result.read, "read by the trainer"),
            (result.stale, "stale: refused, because their run had ended"),
            (result.lost, "lost"),
            (result.duplicates, "duplicates"),
            (result.leftover_keys, "keys left on the server"),
        ):
            totals.add_row(f"[bold]{value:,}[/]", text)
        totals.add_row(f"{result.seconds:.1f} s", "")
        self._console.print(_table(result.runs))
        self._console.print()
        self._console.print(totals)

    def _render(self) -> RenderableType:
        run, what, done, total, rate = self._phase
        line = Table.grid(padding=(0, 1))
        cells: list[RenderableType] = [Text(f"run {run} of {self._settings.runs}" if run else "", style="bold"), what]
        if total:
            bar = ProgressBar(total=total, completed=min(done, total), width=24)
            cells += [bar, f"{done:,}/{total:,}"]
        if rate:
            cells += [f"{rate:,.0f}/s"]
        for _ in cells:
            line.add_column(no_wrap=True)
        line.add_row(*cells)
        room = max(1, self._console.height - 8)  # the table's frame, its head and this line
        return Group(_table(self._runs[-room:]), line) if self._runs else line


def _table(runs: Sequence[RunResult]) -> Table:
    means = [run.mean_return for run in runs if run.mean_return is not None]
    low, high = min([0.0, *means]), max([0.0, *means])
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for name in ("run", "transitions", "written/s", "read/s", "time", "return"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for run in runs:
        mean = run.mean_return
        bar: RenderableType = ""
        if mean is not None and high > low:
            bar = Bar(high - low, 0, mean - low, width=20, color="green")
        cells = (
            f"{run.run}",
            f"{run.transitions:,}",
            f"{run.append_per_s:,.0f}",
            f"{run.read_per_s:,.0f}",
            f"{run.seconds:.1f} s",
            _number(mean),
        )
        table.add_row(*cells, bar)
    return table


def _number(mean: float | None) -> str:
    return "–" if mean is None else f"{mean:.1f}"


def write_plot(path: Path, result: Result) -> None:
    """Return per run; transitions per second, written and read."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    runs = [run.run for run in result.runs]
    figure: Any
    figure, (above, below) = pyplot.subplots(2, 1, figsize=(8, 7), sharex=True, layout="constrained")
    above.set_title(f"{result.settings.env}: {result.read:,} transitions", loc="left", fontweight="bold")
    means = [float("nan") if run.mean_return is None else run.mean_return for run in result.runs]
    above.plot(runs, means, marker="o", color="tab:green")
    above.set_ylabel("mean return")
    for name, color, rates in (
        ("written", "tab:blue", [run.append_per_s for run in result.runs]),
        ("read", "tab:orange", [run.read_per_s for run in result.runs]),
    ):
        below.plot(runs, rates, marker="o", color=color, label=name)
    below.set_ylim(bottom=0)
    below.set_ylabel("transitions/s")
    below.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    below.set_xlabel("run")
    below.xaxis.set_major_locator(MaxNLocator(integer=True))
    below.legend(frameon=False)
    for axes in (above, below):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
