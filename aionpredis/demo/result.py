"""What a demo has measured and counted."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from aionpredis.demo.settings import Settings

__all__ = ["Result", "RunResult"]


@dataclass
class RunResult:
    """``mean_return``: of the episodes that ended in this run, ``None`` if none did. ``append_per_s``: transitions
    committed per second of collecting; ``read_per_s``: read, per second of reading; ``seconds``: the whole run.
    """

    run: int
    transitions: int
    mean_return: float | None
    append_per_s: float
    read_per_s: float
    seconds: float


@dataclass
class Result:
    """Both ends count for themselves. ``acknowledged`` and ``stale``: reported by the actors. ``read``: rows that the
    trainer was handed, ``duplicates``: those whose ``uid`` it had met before; ``lost``: acknowledged by an actor and
    never handed to the trainer. ``leftover_keys``: the demo's, found on the server one lease after their deletion.
    """

    settings: Settings
    runs: list[RunResult] = field(default_factory=list)
    acknowledged: int = 0
    read: int = 0
    stale: int = 0
    lost: int = 0
    duplicates: int = 0
    leftover_keys: int = 0
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        totals = {name: value for name, value in asdict(self).items() if name not in ("settings", "runs")}
        return {**totals, "runs": [asdict(run) for run in self.runs], "settings": self.settings.as_dict()}

    def problems(self) -> list[str]:
        """Why the demo has failed: nothing, if all is well."""
        found = [
            f"{name.replace('_', ' ')}: {value:,} instead of 0"
            for name, value in (
                ("lost", self.lost),
                ("duplicates", self.duplicates),
                ("leftover_keys", self.leftover_keys),
            )
            if value
        ]
        if self.acknowledged != self.read and not self.lost and not self.duplicates:
            found.append(f"{self.acknowledged:,} acknowledged, but {self.read:,} read")
        goal = self.settings.goal
        mean = self.runs[-1].mean_return if self.runs else None
        if goal is not None and (mean is None or mean < goal):
            found.append(
                f"{self.settings.env} was not learned: mean return {mean or 0:.1f} in the last run, not {goal:g}"
            )
        return found
