"""Stable-Baselines3: a replay that many processes share in place of a model's own buffer, and its policy published.

::

    replay = client.replay("cartpole", schema_of(env))  # of aionpredis.blocking, and of aionpredis.frameworks.gymnasium
    replay.begin_run()
    with replay.vector_actor(1) as actor:
        actor.join()
        model = DQN("MlpPolicy", env, buffer_size=1)
        model.replay_buffer = SharedReplayBuffer(model, replay, actor)
        model.learn(100_000, callback=PublishPolicy(replay.policy, every=1_000))
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from aionpredis import blocking
from aionpredis.errors import UsageError
from aionpredis.frameworks import extra
from aionpredis.frameworks.torch import as_arrays
from aionpredis.replay import NStep

with extra("sb3"):
    from gymnasium import spaces
    from stable_baselines3.common.buffers import BaseBuffer, ReplayBuffer
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.type_aliases import ReplayBufferSamples

__all__ = ["PublishPolicy", "SharedReplayBuffer"]


class SharedReplayBuffer(ReplayBuffer):
    """The buffer of an off-policy ``model`` (DQN, SAC, TD3, DDPG) in a replay, which other processes append to or sample, too.
    Its columns are those of :func:`aionpredis.frameworks.gymnasium.schema_of`; no ``Dict`` or ``Tuple`` spaces. Models have
    images with the channels first, whatever their environment has: ``schema_of(model.get_env())``, and so for other actors.

    ``actor`` appends what the model's environments do, one lane for each; without one the model learns of others'
    transitions alone. ``steps``: of its n-step targets. How much is kept is the replay's ``capacity``.
    """

    def __init__(
        self, model: Any, replay: blocking.Replay, actor: blocking.VectorActor | None = None, *, steps: int = 1
    ) -> None:
        if any(
            isinstance(space, spaces.Dict | spaces.Tuple) for space in (model.observation_space, model.action_space)
        ):
            raise UsageError("a SharedReplayBuffer takes no Dict or Tuple space: flatten the environment")
        for name, space in (("observation", model.observation_space), ("action", model.action_space)):
            _, shape = replay.schema.get(name, (None, "no such column"))
            if shape != space.shape:
                raise UsageError(
                    f"{name}: the model has shape {space.shape}, the replay {shape}: make the replay with"
                    " schema_of(model.get_env()), and transpose the images of other actors as the model's are"
                )
        if actor is not None and actor.lanes != model.n_envs:
            raise UsageError(f"the actor has {actor.lanes} lanes and the model {model.n_envs} environments")
        # Not ReplayBuffer's own, which takes the memory of all transitions.
        BaseBuffer.__init__(self, 1, model.observation_space, model.action_space, model.device, n_envs=model.n_envs)
        self._replay = replay
        self._actor = actor
        self._n_step = NStep(steps, discount=model.gamma, columns=["observation"])
        self._samplers: dict[int, blocking.Sampler] = {}  # by the length of a batch
        # What the last transitions led to, and where it was the end of an episode.
        self._before: tuple[NDArray[Any], NDArray[np.bool_]] | None = None
        self._in_a_row = np.zeros(self.n_envs, np.int64)  # transitions of each lane since it was cut
        self._cuts = 0

    def add(self, obs: Any, next_obs: Any, action: Any, reward: Any, done: Any, infos: list[dict[str, Any]]) -> None:
        """Append a transition of each environment. Raises what ``actor.append`` raises.

        One that does not go on where the last one led to, as after a reset by ``model.learn()``, begins a trajectory.
        """
        if self._actor is None:
            return
        obs, next_obs = (each.reshape(self.n_envs, *self.observation_space.shape) for each in (obs, next_obs))
        elsewhere = self._elsewhere(obs)
        if elsewhere.any():
            self._cuts += self._actor._cut(elsewhere)
            self._in_a_row[elsewhere] = 0
        self._before = None  # until it is appended
        truncated = np.array([info.get("TimeLimit.truncated", False) for info in infos], np.bool_)
        self._actor.append(
            observation=obs,
            action=self._of_environment(action.reshape(self.n_envs, *self.action_space.shape)),
            reward=reward,
            terminated=np.logical_and(done, ~truncated),
            truncated=truncated,
        )
        self._before = next_obs.copy(), np.array(done, np.bool_)
        self._in_a_row += 1

    def _elsewhere(self, obs: NDArray[Any]) -> NDArray[np.bool_]:
        """Whether an environment, its episode not over, was not left in ``obs``."""
        if self._before is None:  # the actor's last ones are of another buffer, or an append failed
            return np.ones(self.n_envs, np.bool_)
        next_obs, done = self._before
        differs = (obs != next_obs) & (obs == obs)  # NaN is no reset
        found: NDArray[np.bool_] = differs.reshape(self.n_envs, -1).any(axis=1) & ~done
        return found

    def sample(self, batch_size: int, env: Any = None) -> ReplayBufferSamples:
        """Transitions of all actors, drawn uniformly; waits for others' if the model has no actor.

        Raises:
            UsageError: the model's own are too few yet to learn of.
            Exception: what ``sampler.sample`` and ``actor.flush`` raise.
        """
        sampler = self._samplers.get(batch_size)
        if sampler is None:
            self._samplers[batch_size] = sampler = self._sampler(batch_size)
        batch = sampler.sample()
        discount = batch["discount"].reshape(-1, 1)
        action = self._of_model(batch["action"]).reshape(-1, self.action_dim)
        data = (
            self._normalize_obs(batch["observation"].reshape(-1, *self.obs_shape), env),
            action.astype(self._maybe_cast_dtype(self.action_space.dtype), copy=False),  # float64 is not the model's
            self._normalize_obs(batch["next_observation"].reshape(-1, *self.obs_shape), env),
            (discount == 0).astype(np.float32),
            self._normalize_reward(batch["return"].reshape(-1, 1), env),
            discount,
        )
        return ReplayBufferSamples(*(self.to_torch(array, copy=False) for array in data))

    def _sampler(self, batch_size: int) -> blocking.Sampler:
        sampler = self._replay.sampler(batch=batch_size, columns=["observation", "action"], n_step=self._n_step)
        if self._actor is not None:
            # The rest of a chunk, or what follows a transition, would come of the model only, which waits.
            self._actor.flush()
            sampler.refresh()
            steps = self._n_step.steps
            enough = self.n_envs * steps  # with one more, a lane has one that as many steps follow
            if self._in_a_row.max() <= steps and len(sampler) <= enough + self._cuts * steps:
                raise UsageError(
                    f"{len(sampler)} transitions are too few to begin to learn with, in {self.n_envs} lanes and with"
                    f" steps={self._n_step.steps}: make the model with learning_starts={enough} or more"
                )
        return sampler

    # Models have the actions of a Box between -1 and 1; in the replay they are as the environment takes them.

    def _of_environment(self, action: NDArray[Any]) -> NDArray[Any]:
        space = self.action_space
        return space.low + (action + 1) / 2 * (space.high - space.low) if isinstance(space, spaces.Box) else action

    def _of_model(self, action: NDArray[Any]) -> NDArray[Any]:
        space = self.action_space
        return 2 * (action - space.low) / (space.high - space.low) - 1 if isinstance(space, spaces.Box) else action


class PublishPolicy(BaseCallback):
    """Publishes the model's weights ``every`` so many calls of ``env.step()``, and at the end. Actors in other processes:
    ``model.policy.load_state_dict(as_tensors(replay.policy.latest().weights))``.
    """

    def __init__(self, policy: blocking.Policy, *, every: int = 1_000) -> None:
        super().__init__()
        self._policy = policy
        self._every = every

    def _on_step(self) -> bool:
        if self.n_calls % self._every == 0:
            self._publish()
        return True

    def _on_training_end(self) -> None:
        self._publish()

    def _publish(self) -> None:
        weights = {name: tensor.cpu() for name, tensor in self.model.policy.state_dict().items()}
        self._policy.publish(as_arrays(weights))
