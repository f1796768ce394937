"""Pictures of a case's figures: bars of rates, or lines where a case has many sizes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.harness import Case

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot"]

COLORS = {"ours": "tab:blue", "recipe": "tab:red", "c": "tab:gray", "socket": "lightgray", "raw": "tab:gray"}
OTHERS = ["tab:orange", "tab:green", "tab:purple", "tab:brown"]

Contenders = dict[str, dict[str, dict[str, float]]]
"""By contender and metric: ``median``, ``min`` and ``max`` of the rounds, as ``--json`` writes them."""


def plot(case: Case, contenders: Contenders, path: Path) -> None:
    """The same figures give the same file. Its suffix says which kind: ``.svg``, ``.png``, …"""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams |= {"svg.hashsalt": "aionpredis", "svg.fonttype": "none", "font.family": "sans-serif"}
    import matplotlib.pyplot as plt

    metrics = [metric for metric in case.metrics if not metric.endswith("p99")]
    if "rate" in metrics:
        names = sorted(contenders, key=lambda name: contenders[name]["rate"]["median"])
        figure, axes = plt.subplots(figsize=(8, 0.32 * len(names) + 1), layout="constrained")
        _bars(axes, case, names, [contenders[name]["rate"] for name in names])
    else:
        panels = list(dict.fromkeys(metric.split(" ", 1)[0] for metric in metrics))  # set, get
        figure, all_axes = plt.subplots(
            1, len(panels), figsize=(8, 3.4), sharey=True, layout="constrained", squeeze=False
        )
        for panel, axes in zip(panels, all_axes[0], strict=True):
            _lines(axes, panel, [metric for metric in metrics if metric.startswith(f"{panel} ")], contenders)
        all_axes[0][0].legend(frameon=False)
    figure.suptitle(case.title)
    figure.savefig(path, dpi=120, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)


def _bars(axes: Axes, case: Case, names: Sequence[str], rates: Sequence[dict[str, float]]) -> None:
    kinds = {contender.name: contender.kind for contender in case.contenders}
    medians = [rate["median"] for rate in rates]
    spread = [[rate["median"] - rate["min"] for rate in rates], [rate["max"] - rate["median"] for rate in rates]]
    colors = [COLORS.get(kinds.get(name, ""), OTHERS[0]) for name in names]
    bars = axes.barh(names, medians, xerr=spread, color=colors, error_kw={"ecolor": "black", "elinewidth": 0.8})
    axes.bar_label(bars, [f"{median:,.0f}" for median in medians], padding=4)
    axes.margins(x=0.12, y=0.01)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlabel("a second: median, and from the slowest to the fastest round")
    axes.spines[["top", "right"]].set_visible(False)


def _lines(axes: Axes, panel: str, metrics: Sequence[str], contenders: Contenders) -> None:
    labels = [metric.removeprefix(f"{panel} ").removesuffix(" p50") for metric in metrics]
    others = iter(OTHERS)
    for name, figures in contenders.items():
        color = COLORS["ours"] if name == "aionpredis" else next(others)
        axes.plot(labels, [_median(figures, metric) for metric in metrics], "o-", label=name, color=color)
    axes.set_title(panel)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.grid(axis="y", color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(axis="x", labelrotation=45 if len(labels) > 4 else 0)


def _median(figures: dict[str, dict[str, float]], metric: str) -> Any:
    return figures.get(metric, {}).get("median", float("nan"))
