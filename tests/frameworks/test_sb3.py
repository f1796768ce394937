"""Stable-Baselines3: a model stores and samples in a replay, and its policy reaches others."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aionpredis import Schema, UsageError, blocking

torch: Any = pytest.importorskip("torch", reason="torch is not installed")
gymnasium: Any = pytest.importorskip("gymnasium", reason="Gymnasium is not installed")
sb3: Any = pytest.importorskip("stable_baselines3", reason="Stable-Baselines3 is not installed")

from aionpredis.frameworks.gymnasium import schema_of  # noqa: E402
from aionpredis.frameworks.sb3 import PublishPolicy, SharedReplayBuffer  # noqa: E402
from aionpredis.frameworks.torch import as_tensors  # noqa: E402

pytestmark = pytest.mark.one_server("what is received is the same")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """torch's threads wait for each other by spinning, which takes ten times as long where others want the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_model_learns_from_the_replay_that_it_fills(url: str, tmp_path: Path) -> None:
    env = gymnasium.make("CartPole-v1", max_episode_steps=12)  # some episodes are truncated
    with blocking.connect(url) as client:
        replay = client.replay("cartpole", schema_of(env), chunk=4)
        replay.begin_run()
        with replay.vector_actor(1) as actor:
            actor.join()
            model = sb3.DQN("MlpPolicy", env, buffer_size=1, learning_starts=100, seed=0)
            model.replay_buffer = SharedReplayBuffer(model, replay, actor)
            before = {name: tensor.clone() for name, tensor in model.policy.state_dict().items()}
            model.learn(400, callback=PublishPolicy(replay.policy, every=150))
        (batch,) = replay.epoch(batch=400, shuffle=False)
        newest = replay.policy.latest()
    assert len(batch["reward"]) == 400
    ends = batch["terminated"] | batch["truncated"]
    assert batch["terminated"].any()
    assert batch["truncated"].any()
    assert not (batch["terminated"] & batch["truncated"]).any()
    assert np.diff(np.flatnonzero(ends)).max() <= 12
    assert (np.abs(batch["observation"][1:][ends[:-1]]) <= 0.05).all()  # where episodes begin
    # CartPole's position moves with the velocity: observation, action and successor belong together.
    moved = batch["observation"][:-1, 0] + 0.02 * batch["observation"][:-1, 1]
    assert np.allclose(moved[~ends[:-1]], batch["observation"][1:, 0][~ends[:-1]], atol=1e-5)
    assert newest is not None
    assert newest.version == 3  # after 150 and 300 steps, and at the end
    other = sb3.DQN("MlpPolicy", env, buffer_size=1)
    other.policy.load_state_dict(as_tensors(newest.weights))
    for name, tensor in model.policy.state_dict().items():
        assert torch.equal(tensor, other.policy.state_dict()[name])
    assert any(not torch.equal(tensor, before[name]) for name, tensor in model.policy.state_dict().items())
    model.save(tmp_path / "model")


def test_model_samples_what_others_have_appended(url: str) -> None:
    env = gymnasium.make("Pendulum-v1")  # actions from -2 to 2, which models have from -1 to 1
    with blocking.connect(url) as client:
        replay = client.replay("pendulum", schema_of(env), chunk=4)
        replay.begin_run()
        model = sb3.SAC("MlpPolicy", env, buffer_size=1)
        buffer = SharedReplayBuffer(model, replay, steps=2)
        with replay.actor() as actor:
            actor.join()
            for number in range(40):
                actor.append(
                    observation=np.full(3, number, np.float32),
                    action=np.array([number / 10 - 2], np.float32),
                    reward=1.0,
                    terminated=number % 20 == 19,
                    truncated=False,
                )
        samples = buffer.sample(64)
        assert buffer.sample(8).rewards.shape == (8, 1)
    number = samples.observations[:, :1]
    assert torch.allclose(samples.actions, (number / 10 - 2) / 2)
    over = number % 20 >= 18
    assert torch.equal(samples.dones, over.float())
    assert torch.allclose(samples.rewards, torch.where(number % 20 == 19, 1.0, 1.99))
    assert torch.allclose(samples.discounts, torch.where(over, 0.0, 0.99**2))
    assert torch.equal(samples.next_observations[:, :1][~over], number[~over] + 2)


@contextmanager
def pendulum(url: str) -> Iterator[tuple[blocking.Replay, blocking.VectorActor, SharedReplayBuffer]]:
    """A replay, its only actor, and the buffer of a model that appends by it."""
    env = gymnasium.make("Pendulum-v1")
    with blocking.connect(url) as client:
        replay = client.replay("pendulum", schema_of(env), chunk=4)
        replay.begin_run()
        with replay.vector_actor(1) as actor:
            actor.join()
            yield replay, actor, SharedReplayBuffer(sb3.SAC("MlpPolicy", env, buffer_size=1), replay, actor)


def test_actions_are_stored_as_the_environment_takes_them(url: str) -> None:
    with pendulum(url) as (replay, actor, buffer):
        for action in (-1.0, 0.0, 0.5):
            observation = np.zeros((1, 3), np.float32)
            buffer.add(observation, observation, np.full((1, 1), action), np.ones(1), np.zeros(1, bool), [{}])
        actor.flush()
        (batch,) = replay.epoch(shuffle=False)
    assert batch["action"][:, 0].tolist() == [-2, 0, 1]


@pytest.mark.parametrize(("lanes", "steps"), [(1, 1), (2, 3)])
def test_model_learns_as_soon_as_there_is_something_to_draw(url: str, lanes: int, steps: int) -> None:
    """It is the one that appends, so while it waits nothing comes: not the rest of a chunk, nor what follows."""
    env = sb3.common.env_util.make_vec_env("Pendulum-v1", lanes)
    with blocking.connect(url) as client:
        replay = client.replay("pendulum", schema_of(env))
        replay.begin_run()
        with replay.vector_actor(lanes) as actor:
            actor.join()

            def learn(learning_starts: int) -> None:
                model = sb3.SAC("MlpPolicy", env, buffer_size=1, learning_starts=learning_starts, train_freq=1)
                model.replay_buffer = SharedReplayBuffer(model, replay, actor, steps=steps)
                model.learn(learning_starts + 2 * lanes)

            with pytest.raises(UsageError, match=f"learning_starts={lanes * steps} or more"):
                learn(lanes * steps - 1)
            replay.begin_run()
            actor.join()
            learn(lanes * steps)
            assert 0 < actor.stats.acknowledged < actor.stats.appended


def test_what_a_second_learn_begins_with_is_no_successor_of_the_first(url: str) -> None:
    """It resets the environments in mid-episode. SB3's own buffer has the successors of all steps."""
    env = sb3.common.env_util.make_vec_env("Pendulum-v1", 2, seed=0)
    with blocking.connect(url) as client:
        replay = client.replay("pendulum", schema_of(env), chunk=8)
        replay.begin_run()
        with replay.vector_actor(2) as actor:
            actor.join()
            model = sb3.SAC("MlpPolicy", env, learning_starts=1_000, seed=0)
            own = model.replay_buffer
            add, shared = own.add, SharedReplayBuffer(model, replay, actor)

            def add_to_both(*transition: Any) -> None:
                shared.add(*transition)
                add(*transition)

            own.add = add_to_both
            for _ in range(2):
                model.learn(20)
                model.learn(10, reset_num_timesteps=False)  # goes on where the environments are
            shared = SharedReplayBuffer(model, replay, actor)  # knows nothing of the last steps
            model.learn(20)
            assert actor.stats.appended == 80
            samples = shared.sample(4_000)
    kept = zip(own.observations[:40].reshape(-1, 3), own.next_observations[:40].reshape(-1, 3), strict=True)
    successors = {obs.tobytes(): following.tobytes() for obs, following in kept}
    drawn = {
        obs.tobytes(): following.tobytes()
        for obs, following in zip(samples.observations.numpy(), samples.next_observations.numpy(), strict=True)
    }
    assert drawn.items() <= successors.items()
    assert len(drawn) == 80 - 2 * 3  # all but the last of each lane before a reset, and at the end
    assert not samples.dones.any()


def test_model_learns_after_runs_too_short_to_learn_of(url: str) -> None:
    """Nothing follows what they have appended."""
    env = gymnasium.make("Pendulum-v1")
    with blocking.connect(url) as client:
        replay = client.replay("pendulum", schema_of(env))
        replay.begin_run()
        with replay.vector_actor(1) as actor:
            actor.join()
            model = sb3.SAC("MlpPolicy", env, buffer_size=1, learning_starts=2, train_freq=1)
            model.replay_buffer = SharedReplayBuffer(model, replay, actor, steps=2)
            for _ in range(3):
                model.learn(2)
            with pytest.raises(UsageError, match=r"6 transitions are too few .* learning_starts=2 or more"):
                model.replay_buffer.sample(8)
            model.learn(3)
            assert actor.stats.appended == 9


def test_an_observation_of_nan_is_no_reset(url: str) -> None:
    with pendulum(url) as (_, actor, buffer):
        observation = np.full((1, 3), np.nan, np.float32)
        for _ in range(8):
            buffer.add(observation, observation, np.zeros((1, 1)), np.ones(1), np.zeros(1, bool), [{}])
        actor.flush()
        assert actor.stats.chunks == 2


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_actions_are_of_the_models_dtype_whatever_the_environments_is(url: str, dtype: str) -> None:
    env = gymnasium.make("Pendulum-v1")
    space = env.action_space
    env.action_space = gymnasium.spaces.Box(space.low.astype(dtype), space.high.astype(dtype), dtype=np.dtype(dtype))
    with blocking.connect(url) as client:
        replay = client.replay("pendulum", schema_of(env), chunk=4)
        replay.begin_run()
        with replay.vector_actor(1) as actor:
            actor.join()
            model = sb3.TD3("MlpPolicy", env, buffer_size=1, learning_starts=20, batch_size=8)
            model.replay_buffer = buffer = SharedReplayBuffer(model, replay, actor)
            model.learn(40)
            assert replay.schema["action"][0] == dtype
            actions = buffer.sample(8).actions
    assert actions.dtype == torch.float32
    assert actions.abs().max() <= 1


class Picture(gymnasium.Env):
    """The same image all the time, with the channels last."""

    observation_space = gymnasium.spaces.Box(0, 255, (40, 36, 3), np.uint8)
    action_space = gymnasium.spaces.Discrete(2)

    def image(self) -> Any:
        return (np.arange(40 * 36 * 3) % 251).astype(np.uint8).reshape(40, 36, 3)

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        return self.image(), {}

    def step(self, action: Any) -> Any:
        return self.image(), 1.0, False, False, {}


def test_images_are_the_models_or_refused(url: str) -> None:
    """Models see them with the channels first: of the same size, but scrambled if they were not transposed."""
    env = Picture()
    model = sb3.DQN("CnnPolicy", env, buffer_size=1, learning_starts=100)
    with blocking.connect(url) as client:
        with pytest.raises(
            UsageError, match=r"observation: the model has shape \(3, 40, 36\), the replay \(40, 36, 3\)"
        ):
            SharedReplayBuffer(model, client.replay("last", schema_of(env)))
        replay = client.replay("first", schema_of(model.get_env()), chunk=4)
        replay.begin_run()
        with replay.vector_actor(1) as actor:
            actor.join()
            model.replay_buffer = SharedReplayBuffer(model, replay, actor)
            model.learn(20)
            samples = model.replay_buffer.sample(8)
    image = torch.as_tensor(env.image().transpose(2, 0, 1))
    assert (samples.observations == image).all()
    assert (samples.next_observations == image).all()


def test_what_does_not_fit_the_model_is_refused(url: str) -> None:
    env = gymnasium.make("CartPole-v1")
    model = sb3.DQN("MlpPolicy", env, buffer_size=1)
    with blocking.connect(url) as client:
        replay = client.replay("cartpole", schema_of(env))
        with replay.vector_actor(2) as actor, pytest.raises(UsageError, match="2 lanes and the model 1"):
            SharedReplayBuffer(model, replay, actor)
        with pytest.raises(UsageError, match=r"observation: .* \(4,\), the replay no such column"):
            SharedReplayBuffer(model, client.replay("other", Schema(state="float32")))
        model.observation_space = gymnasium.spaces.Dict(a=env.observation_space)
        with pytest.raises(UsageError, match="Dict"):
            SharedReplayBuffer(model, replay)
