"""Gymnasium environments behind four attributes and two methods, so that a simulator needs no special cases.

Two kinds are understood: any environment with a flat ``Box`` observation and ``Discrete`` actions (its observation,
as float32, is the state), and ``ALE/Pong-v5``, whose screen becomes an 80x80 difference frame (see `PongEnvironment`).
Gymnasium is imported only when an environment is made.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from aionpredis.errors import UsageError

__all__ = ["Environment", "FlatEnvironment", "PongEnvironment", "make", "pong_objects"]

PONG = "ALE/Pong-v5"
PONG_ACTIONS = (2, 3)  # ALE's RIGHT and LEFT, which move the paddle up and down
PONG_BACKGROUND = (144, 109)  # red channel: the field, and the field while the attract mode cycles its colours


class Environment(Protocol):
    """One game in progress. Not to be shared between threads."""

    state_shape: tuple[int, ...]
    state_dtype: np.dtype[Any]
    actions: int
    """An action is a number in ``range(actions)``."""
    rewards_end_returns: bool
    """Whether a reward other than 0 closes what led to it: a return does not reach past it (a point in Pong)."""

    def reset(self, seed: int | None = None) -> NDArray[Any]:
        """Begins an episode and returns its first state. A seed makes this and all later episodes repeatable."""

    def step(self, action: int) -> tuple[NDArray[Any], float, bool, bool]:
        """Returns ``(state, reward, terminated, truncated)``. The state is a new array, the reward is unscaled."""

    def close(self) -> None: ...


def make(env_id: str) -> Environment:
    """Makes the environment that Gymnasium knows as ``env_id``; `UsageError` says why it can't."""
    try:
        import gymnasium
    except ModuleNotFoundError as error:
        if error.name != "gymnasium":
            raise
        raise UsageError('the demo needs Gymnasium: pip install "aionpredis[demo]"') from error
    ale = env_id.startswith("ALE/")
    if ale:
        if env_id != PONG:
            raise UsageError(f"{env_id}: of the Atari games, the demo can preprocess {PONG} alone")
        _register_ale(gymnasium)
    try:
        env = gymnasium.make(env_id, disable_env_checker=True)  # the checker costs about 4 µs a step
    except (gymnasium.error.Error, ImportError) as error:  # an environment's own requirements are ImportErrors
        raise UsageError(f"cannot make the environment {env_id!r}: {error}") from error
    if ale:
        return PongEnvironment(env)
    observations, actions = env.observation_space, env.action_space
    problem = None
    if not isinstance(actions, gymnasium.spaces.Discrete):
        problem = f"its actions are {actions}, not Discrete"
    elif not isinstance(observations, gymnasium.spaces.Box) or len(observations.shape) != 1:
        problem = f"its observations are {observations}, not a flat Box"
    if problem is not None:
        env.close()
        raise UsageError(f"{env_id}: the demo cannot learn this environment: {problem}")
    return FlatEnvironment(env)


def _register_ale(gymnasium: Any) -> None:
    try:
        import ale_py
    except ModuleNotFoundError as error:
        if error.name != "ale_py":
            raise
        raise UsageError(f'{PONG} needs the Arcade Learning Environment: pip install "aionpredis[demo]"') from error
    ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)  # else each process prints a banner
    gymnasium.register_envs(ale_py)


class FlatEnvironment:
    """An environment whose observation is a vector. State: float32, as observed."""

    rewards_end_returns = False

    def __init__(self, env: Any) -> None:
        self._env = env
        self._first_action = int(env.action_space.start)
        self.actions = int(env.action_space.n)
        self.state_shape: tuple[int, ...] = env.observation_space.shape
        self.state_dtype: np.dtype[Any] = np.dtype(np.float32)

    def reset(self, seed: int | None = None) -> NDArray[Any]:
        return np.array(self._env.reset(seed=seed)[0], np.float32)

    def step(self, action: int) -> tuple[NDArray[Any], float, bool, bool]:
        state, reward, terminated, truncated, _ = self._env.step(self._first_action + action)
        return np.array(state, np.float32), float(reward), bool(terminated), bool(truncated)

    def close(self) -> None:
        self._env.close()


class PongEnvironment:
    """Pong as what moved since the previous frame.

    State: int8 (80, 80); 1 where an object appeared, -1 where one left, else 0. The first state of an episode is 0
    throughout. Actions: 0 is up, 1 is down. ALE's defaults hold otherwise: an action lasts 4 frames, and with
    probability 0.25 the previous one is kept instead.
    """

    rewards_end_returns = True

    def __init__(self, env: Any) -> None:
        self._env = env
        self.actions = len(PONG_ACTIONS)
        self.state_shape: tuple[int, ...] = (80, 80)
        self.state_dtype: np.dtype[Any] = np.dtype(np.int8)
        self._objects = np.zeros((80, 80), np.int8)

    def reset(self, seed: int | None = None) -> NDArray[Any]:
        self._objects = pong_objects(self._env.reset(seed=seed)[0])
        return np.zeros((80, 80), np.int8)

    def step(self, action: int) -> tuple[NDArray[Any], float, bool, bool]:
        screen, reward, terminated, truncated, _ = self._env.step(PONG_ACTIONS[action])
        before, self._objects = self._objects, pong_objects(screen)
        return self._objects - before, float(reward), bool(terminated), bool(truncated)

    def close(self) -> None:
        self._env.close()


def pong_objects(screen: NDArray[np.uint8]) -> NDArray[np.int8]:
    """Where the ball and the paddles are: uint8 (210, 160, 3) → int8 (80, 80) of 0 and 1.

    The score and the walls are cut off, every second row and column is kept, the background is erased.
    """
    red = np.ascontiguousarray(screen[35:195:2, ::2, 0])
    objects: NDArray[np.bool_] = (red != PONG_BACKGROUND[0]) & (red != PONG_BACKGROUND[1])
    return objects.view(np.int8)
