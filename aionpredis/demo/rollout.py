"""Playing: an environment and a policy become rows of experience."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from aionpredis.demo.environments import Environment
from aionpredis.demo.policy_gradient import Policy, returns_to_go

__all__ = ["Player"]


class Player:
    """Plays one environment step by step, episode after episode, and knows each step's return once it is certain.

    A new policy may come at any step: what was begun goes on with it, and each row holds the probability under which
    its action was drawn. ``seed`` makes environment and actions repeatable.
    """

    def __init__(self, environment: Environment, *, gamma: float, seed: int) -> None:
        self.environment = environment
        self.gamma = gamma
        seeds = np.random.SeedSequence(seed).generate_state(2)
        self._rng = np.random.default_rng(seeds[0])
        self._state = environment.reset(int(seeds[1]))
        self._rows: list[tuple[NDArray[Any], int, float, float, bool, bool]] = []

    def step(self, policy: Policy) -> dict[str, NDArray[Any]] | None:
        """One step; the rows whose returns it settled, if any: those of a whole episode, or of a point in Pong.

        Columns, in the order played: ``state`` (n, *state_shape), the environment's dtype; ``action`` int64;
        ``logp``, ``reward`` and ``return_`` float32; ``terminated`` and ``truncated`` bool.
        """
        state = self._state
        action, logp = policy.act(state, self._rng)
        self._state, reward, terminated, truncated = self.environment.step(action)
        self._rows.append((state, action, logp, reward, terminated, truncated))
        over = terminated or truncated
        cut = self.environment.rewards_end_returns and reward != 0
        if not (over or cut):
            return None
        columns = self._columns(0.0 if terminated or cut else float(policy.values(self._state[None])[0]))
        if over:
            self._state = self.environment.reset()
        return columns

    def _columns(self, tail: float) -> dict[str, NDArray[Any]]:
        state, action, logp, reward, terminated, truncated = zip(*self._rows, strict=True)
        self._rows.clear()
        rewards = np.array(reward, np.float32)
        return {
            "state": np.stack(state),
            "action": np.array(action, np.int64),
            "logp": np.array(logp, np.float32),
            "reward": rewards,
            "terminated": np.array(terminated),
            "truncated": np.array(truncated),
            "return_": returns_to_go(rewards, self.gamma, tail=tail),
        }
