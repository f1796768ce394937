"""Gymnasium: environments that hand over each transition, single or vectorized.

A script appends as it steps::

    env = Transitions(gymnasium.make("CartPole-v1"), actor.append)  # an actor of aionpredis.blocking

Async code awaits::

    env = Transitions(gymnasium.make("CartPole-v1"))
    ...
    observation, reward, terminated, truncated, info = env.step(action)
    await actor.append(**env.transition)
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine
from functools import reduce
from operator import getitem
from typing import Any, NamedTuple

import numpy as np

from aionpredis.errors import UsageError
from aionpredis.frameworks import extra
from aionpredis.replay.schema import Schema

with extra("gymnasium"):
    import gymnasium
    from gymnasium import spaces
    from gymnasium.vector import AutoresetMode
    from gymnasium.wrappers import Autoreset

__all__ = ["Transitions", "VectorTransitions", "schema_of"]


Env = Any
Append = Callable[..., object]


class Part(NamedTuple):
    """A column that a space makes: what leads to its value, and the space that it is of."""

    name: str
    path: tuple[Any, ...]
    space: Any

    def of(self, value: Any) -> Any:
        """A copy of that part of a value: environments write their next observation over this one."""
        return np.array(reduce(getitem, self.path, value))[()]  # a scalar of its own class, which append() is fast with


def schema_of(env: Env) -> Schema:
    """The columns of an environment's transitions (of a vectorized one: of one lane): ``observation``, the one that the
    action was chosen for, ``action``, ``reward`` (float32), ``terminated`` and ``truncated``.

    A ``Dict`` or ``Tuple`` space has a column for each of its parts, such as ``observation_position``, ``action_0``.

    Raises:
        UsageError: a space has no fixed shape, or a part's name can be no column's.
        EncodeError: a space's dtype can be no column's.
    """
    columns: dict[str, Any] = {}
    for part in [*_observations(env), *_actions(env)]:
        if part.name in columns:
            raise UsageError(f"two parts of the spaces are called {part.name!r}: rename one, names are joined by '_'")
        columns[part.name] = part.space.dtype, part.space.shape
    return Schema(**columns, reward=np.float32, terminated=np.bool_, truncated=np.bool_)


def _observations(env: Env) -> list[Part]:
    return _parts("observation", getattr(env, "single_observation_space", env.observation_space))


def _actions(env: Env) -> list[Part]:
    return _parts("action", getattr(env, "single_action_space", env.action_space))


def _parts(name: str, space: Any, path: tuple[Any, ...] = ()) -> list[Part]:
    if isinstance(space, spaces.Dict | spaces.Tuple):
        items = space.items() if isinstance(space, spaces.Dict) else enumerate(space)
        return [part for key, inner in items for part in _parts(f"{name}_{key}", inner, (*path, key))]
    if isinstance(space, spaces.Box | spaces.Discrete | spaces.MultiDiscrete | spaces.MultiBinary):
        return [Part(name, path, space)]
    raise UsageError(
        f"{name!r} is of a {type(space).__name__} space: columns are made of Box, Discrete, MultiDiscrete, MultiBinary, and"
        " Dict and Tuple of these; use one of Gymnasium's wrappers that transform the others"
    )


class _Recorder:
    """Puts transitions together: what an action was chosen for, and what came of it."""

    def __init__(self, env: Env, append: Append | None) -> None:
        self.schema = schema_of(env)
        self._append = append
        self._of_observation = _observations(env)
        self._of_action = _actions(env)
        self._observation: dict[str, Any] = {}

    def see(self, observation: Any) -> None:
        self._observation = {part.name: part.of(observation) for part in self._of_observation}

    def step(self, action: Any, outcome: tuple[Any, ...]) -> dict[str, Any]:
        """The transition of a step that has come out so."""
        observation, reward, terminated, truncated, _ = outcome
        transition = {
            **self._observation,
            **{part.name: part.of(action) for part in self._of_action},
            "reward": reward,
            "terminated": terminated,
            "truncated": truncated,
        }
        self.see(observation)
        return transition

    def append(self, *where: Any, **transition: Any) -> None:
        if self._append is None:
            return
        result = self._append(*where, **transition)
        if isinstance(result, Awaitable):
            if isinstance(result, Coroutine):
                result.close()
            raise UsageError(
                "append= is for an actor of aionpredis.blocking; in async code make the environment without it,"
                " and `await actor.append(**env.transition)` after each step"
            )


def _autoreset(env: Env) -> Any:
    """The wrapper, of this environment's, whose step after an episode's last one is a reset."""
    while isinstance(env, gymnasium.Wrapper):
        if isinstance(env, Autoreset):
            return env
        env = env.env
    return None


class Transitions(gymnasium.Wrapper):
    """Hands each transition to ``append``, if there is one, and keeps the last: ``transition``, by column.

    ``schema``: of a replay for them, as :func:`schema_of` says. Steps raise what ``append`` raises, when the step is done:
    after :class:`~aionpredis.RunEnded`, ``actor.join()`` and ``env.reset()``.

    With Gymnasium's ``Autoreset`` inside, the step after an episode's last one is no transition: nothing is handed over, and
    ``transition`` is empty.

    The replay knows episodes by ``terminated`` and ``truncated``: one that a script gives up in the middle seems to go on
    with the next one.
    """

    def __init__(self, env: Env, append: Append | None = None) -> None:
        super().__init__(env)
        self._recorder = _Recorder(env, append)
        self._autoreset = _autoreset(env)
        self.schema = self._recorder.schema
        self.transition: dict[str, Any] = {}

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        observation, info = self.env.reset(seed=seed, options=options)
        self._recorder.see(observation)
        return observation, info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        resets = self._autoreset is not None and self._autoreset.autoreset
        outcome: tuple[Any, Any, bool, bool, dict[str, Any]] = self.env.step(action)
        if resets:
            self._recorder.see(outcome[0])
            self.transition = {}
        else:
            self.transition = self._recorder.step(action, outcome)
            self._recorder.append(**self.transition)
        return outcome


class VectorTransitions(gymnasium.vector.VectorWrapper):
    """:class:`Transitions` of a vectorized environment: each column has a leading axis, ``(lanes, *shape)``::

        envs = VectorTransitions(gymnasium.make_vec("CartPole-v1", num_envs=8))
        ...
        envs.step(actions)
        await vector_actor.append(envs.live, **envs.transition)

    ``live``: bool, shape ``(lanes,)``: in which lanes the last step was one. Where an environment resets a lane with the
    step after an episode's last one, that step is no transition. All of Gymnasium's autoreset modes are understood.

    ``append``: of a blocking ``vector_actor``.
    """

    def __init__(self, env: Env, append: Append | None = None) -> None:
        super().__init__(env)
        mode = env.metadata.get("autoreset_mode")
        if not isinstance(mode, AutoresetMode):
            raise UsageError(
                'env.metadata["autoreset_mode"] does not say when lanes are reset: set it to an AutoresetMode'
            )
        self._resets_next_step = mode is AutoresetMode.NEXT_STEP
        self._recorder = _Recorder(env, append)
        self.schema = self._recorder.schema
        self.transition: dict[str, Any] = {}
        self.live = np.ones(env.num_envs, np.bool_)
        self._over = np.zeros(env.num_envs, np.bool_)  # with the last step

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        lanes = (options or {}).get("reset_mask", slice(None))  # the environment takes it out
        observation, info = self.env.reset(seed=seed, options=options)
        self._over[lanes] = False
        self._recorder.see(observation)
        return observation, info

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        outcome: tuple[Any, Any, Any, Any, dict[str, Any]] = self.env.step(actions)
        _, _, terminated, truncated, _ = outcome
        self.transition = self._recorder.step(actions, outcome)
        if self._resets_next_step:
            self.live, self._over = ~self._over, np.logical_or(terminated, truncated)
        self._recorder.append(self.live, **self.transition)
        return outcome
