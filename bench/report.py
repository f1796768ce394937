"""Tables on the terminal, and JSON."""

from __future__ import annotations

import statistics
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.harness import Ratio, Result

__all__ = ["as_dict", "print_machine", "print_result"]

LABELS = {"rate": "units/s", "bytes": "GB/s", "cpu": "CPU µs/unit"}
SCALES = {"rate": 1.0, "bytes": 1e-9, "cpu": 1e6}


def meets(value: float, ratio: Ratio) -> bool:
    comparison, bound = ratio.target.split()
    return value >= float(bound) if comparison == ">=" else value <= float(bound)


def ratio_value(result: Result, ratio: Ratio) -> float | None:
    """A ratio of two contenders, or (``under`` is empty) a figure of one."""
    if ratio.under:
        return result.ratio(ratio)
    return result.median(ratio.over, ratio.metric) if ratio.over in result.samples else None


def _number(value: float) -> str:
    if value != value:
        return "-"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def print_machine(console: Console, machine: dict[str, Any]) -> None:
    server = machine["server"]
    console.print(f"{machine['cpu']}, {machine['cores']} cores, {machine['system']}")
    console.print(f"Python {machine['python']}, {machine['loop']}; server: {server}")
    console.print(", ".join(f"{name} {version}" for name, version in machine["packages"].items()))


def _by_contender(result: Result) -> Table:
    table = Table(title_justify="left")
    table.add_column("contender")
    for metric in result.case.metrics:
        table.add_column(LABELS.get(metric, metric), justify="right")
    table.add_column("peak RSS MB", justify="right")
    table.add_column("server faults/unit", justify="right")
    for name, samples in result.samples.items():
        row = [name]
        for metric in result.case.metrics:
            values = sorted(sample.value(metric) * SCALES.get(metric, 1.0) for sample in samples)
            row.append(f"{_number(statistics.median(values))} ({_number(values[0])} - {_number(values[-1])})")
        row.append(_number(max(sample.rss for sample in samples) / 1e6))
        row.append(_number(statistics.median(sample.faults / sample.units for sample in samples)))
        table.add_row(*row)
    return table


def _by_metric(result: Result) -> Table:
    """For cases with many figures."""
    table = Table(title_justify="left")
    table.add_column("")
    for name in result.samples:
        table.add_column(name, justify="right")
    for metric in result.case.metrics:
        table.add_row(metric, *(_number(result.median(name, metric)) for name in result.samples))
    return table


def print_result(console: Console, result: Result) -> None:
    case = result.case
    wide = len(case.metrics) > 4
    table = _by_metric(result) if wide else _by_contender(result)
    table.title = f"{case.name}: {case.title} ({'medians' if wide else 'median, min - max'})"
    console.print(table)
    for name, why in result.skipped.items():
        console.print(f"[dim]{name}: {why}[/]")
    for ratio in case.ratios:
        value = ratio_value(result, ratio)
        if value is None:
            console.print(f"  {ratio.key}: not measured")
            continue
        over, under = result.best(ratio.over, ratio), ratio.under and result.best(ratio.under, ratio)
        against = f"  ({over} / {under})" if under else f"  ({over})"
        mark = "[green]met[/]" if meets(value, ratio) else "[red]missed[/]"
        console.print(f"  {ratio.key} = {value:.3g}  target {ratio.target}: {mark}{against}")


def as_dict(result: Result) -> dict[str, Any]:
    case = result.case
    metrics = {*case.metrics, *(ratio.metric for ratio in case.ratios)}
    return {
        "title": case.title,
        "contenders": {
            name: {
                metric: {
                    "median": statistics.median(values := [sample.value(metric) for sample in samples]),
                    "min": min(values),
                    "max": max(values),
                    "rounds": values,
                }
                for metric in sorted(metrics)
                if all(metric in ("rate", "bytes", "cpu") or metric in sample.metrics for sample in samples)
            }
            | {"peak_rss": max(sample.rss for sample in samples), "server_faults": [s.faults for s in samples]}
            for name, samples in result.samples.items()
        },
        "skipped": result.skipped,
    }
