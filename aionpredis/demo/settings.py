"""What can be chosen about a demo, and what is chosen where nobody did."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from aionpredis.demo.environments import PONG, Environment
from aionpredis.errors import UsageError
from aionpredis.replay import Schema

__all__ = ["LEASE", "SURPLUS", "Settings", "schema_of"]

LEASE = 5.0
"""Seconds that data which was never committed may stay on the server. Short, because the demo waits for it at its end."""

SURPLUS = 2
"""So many times the wanted transitions a run may grow to, while the trainer learns. Then its actors wait for the next
run: on a busy machine they would otherwise produce more in each run than the trainer can read in the next."""

ENVIRONMENTS = 8
"""In total, where there are fewer cores than that."""


@dataclass(frozen=True)
class Settings:
    """One demo. ``transitions``: that a run collects at least before the trainer reads it."""

    env: str
    runs: int
    transitions: int
    simulators: int
    environments: int
    """In each simulator."""
    seed: int
    hidden: int
    learning_rate: float
    gamma: float
    passes: int
    """Over the transitions of a run."""
    batch: int
    chunk: int
    goal: float | None
    """The mean return that the last run must reach, if nobody made learning harder by an option."""

    @classmethod
    def of(
        cls,
        env: str,
        *,
        runs: int | None = None,
        transitions: int | None = None,
        simulators: int | None = None,
        environments: int | None = None,
        seed: int = 0,
    ) -> Settings:
        """What was chosen, and what suits the environment otherwise.

        Raises:
            UsageError: a number is not positive.
        """
        given = {"runs": runs, "transitions": transitions, "simulators": simulators, "environments": environments}
        for name, number in given.items():
            if number is not None and number < 1:
                raise UsageError(f"--{name} is at least 1, not {number}")
        if seed < 0:
            raise UsageError(f"--seed is at least 0, not {seed}")
        simulators = simulators or _cores()
        chosen: dict[str, Any] = dict(_PONG if env == PONG else _FLAT)
        chosen |= {"simulators": simulators, "environments": max(1, ENVIRONMENTS // simulators)}
        chosen |= {name: number for name, number in given.items() if number is not None}
        goal = 150.0 if env == "CartPole-v1" and (runs, transitions, environments) == (None, None, None) else None
        return cls(env=env, seed=seed, goal=goal, **chosen)

    @property
    def quota(self) -> int:
        """Transitions of one environment in one run."""
        return -(-SURPLUS * self.transitions // (self.simulators * self.environments))

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


# CartPole: 30 of 30 seeds reach 300 and more with these. A chunk is what one commit costs little for, and yet a small
# part of a run: 1.6 kB of CartPole, 102 kB of Pong.
_FLAT: Mapping[str, Any] = {
    "runs": 10,
    "transitions": 6000,
    "hidden": 64,
    "learning_rate": 5e-3,
    "gamma": 0.99,
    "passes": 10,
    "batch": 256,
    "chunk": 32,
}
# Pong: a game takes 900 steps or more, so that every environment plays about one in a run.
_PONG: Mapping[str, Any] = {
    "runs": 20,
    "transitions": 8000,
    "hidden": 200,
    "learning_rate": 1e-3,
    "gamma": 0.99,
    "passes": 4,
    "batch": 512,
    "chunk": 16,
}


def _cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def schema_of(environment: Environment) -> Schema:
    """The columns of one transition.

    ``return_``: what was earned from there on, discounted. ``score``: the whole episode's return, at its last
    transition. ``uid``: the number of the simulator (16 bits), of its environment (16) and of the transition (32), so
    that whoever reads can tell without this library's help whether something came twice or not at all.
    """
    return Schema(
        state=(environment.state_dtype, environment.state_shape),
        action="int64",
        logp="float32",
        reward="float32",
        terminated="bool",
        truncated="bool",
        return_="float32",
        score="float32",
        uid="uint64",
    )
