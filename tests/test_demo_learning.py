"""The demo's learning parts, without a server: environments, returns, policy, trainer."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from aionpredis.demo.environments import PONG, make, pong_objects
from aionpredis.demo.policy_gradient import LEARNED, Policy, Trainer, loss_and_gradients, returns_to_go
from aionpredis.demo.rollout import Player
from aionpredis.errors import UsageError

pytest.importorskip("gymnasium")


# environments


def test_a_flat_environment_gives_float32_states() -> None:
    env = make("CartPole-v1")
    assert (env.state_shape, env.state_dtype, env.actions) == ((4,), np.dtype(np.float32), 2)
    first = env.reset(seed=3)
    state, reward, terminated, truncated = env.step(1)
    assert first.dtype == state.dtype == np.float32
    assert first.shape == state.shape == (4,)
    assert (reward, terminated, truncated) == (1.0, False, False)
    np.testing.assert_array_equal(env.reset(seed=3), first)
    env.close()


def test_pong_states_are_difference_frames() -> None:
    pytest.importorskip("ale_py")
    env = make(PONG)
    assert (env.state_shape, env.state_dtype, env.actions) == ((80, 80), np.dtype(np.int8), 2)
    state = env.reset(seed=0)
    assert state.shape == (80, 80)
    assert state.dtype == np.int8
    assert not state.any()
    rng = np.random.default_rng(0)
    seen: set[int] = set()
    kept = []
    for _ in range(200):
        state, reward, _, _ = env.step(int(rng.integers(env.actions)))
        assert state.shape == (80, 80)
        assert state.dtype == np.int8
        assert np.count_nonzero(state) < 200  # the background is gone
        assert reward in (-1, 0, 1)
        seen.update(np.unique(state).tolist())
        kept.append((state, state.copy()))
    assert seen == {-1, 0, 1}
    assert all(np.array_equal(state, copy) for state, copy in kept)  # no buffer is reused
    env.close()


@pytest.mark.parametrize("action", [0, 1])
def test_pong_actions_move_the_paddle_up_and_down(action: int) -> None:
    pytest.importorskip("ale_py")
    env = make(PONG)
    env.reset(seed=0)
    frame = np.zeros((80, 80), int)
    rows = []
    for i in range(40):
        frame += env.step(action if i >= 20 else 1 - action)[0]
        paddle = np.flatnonzero(frame[:, 70])  # differences since the first frame: 1 where the paddle came to
        rows.append(float(paddle[frame[paddle, 70] > 0].mean()) if (frame[paddle, 70] > 0).any() else np.nan)
    env.close()
    moved = rows[-1] - rows[19]
    assert moved < -20 if action == 0 else moved > 20


def test_pong_objects_keeps_what_is_not_background() -> None:
    screen = np.zeros((210, 160, 3), np.uint8)
    screen[..., 0] = 144
    screen[:35, :, 0] = 236  # the score
    screen[195:, :, 0] = 236
    screen[35 + 20 : 35 + 24, 40:42, 0] = 236  # a ball
    expected = np.zeros((80, 80), np.int8)
    expected[10:12, 20] = 1
    np.testing.assert_array_equal(pong_objects(screen), expected)
    screen[screen == 144] = 109
    np.testing.assert_array_equal(pong_objects(screen), expected)


@pytest.mark.parametrize(
    ("env_id", "reason"),
    [
        ("Pendulum-v1", "not Discrete"),
        ("Taxi-v4", "not a flat Box"),
        ("Blackjack-v1", "not a flat Box"),
        ("NoSuchThing-v0", "cannot make"),
        ("not an id", "cannot make"),
        ("ALE/Breakout-v5", "ALE/Pong-v5 alone"),
    ],
)
def test_an_unsupported_environment_is_a_usage_error(env_id: str, reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        make(env_id)


@pytest.mark.parametrize(("module", "env_id"), [("gymnasium", "CartPole-v1"), ("ale_py", PONG)])
def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, module: str, env_id: str) -> None:
    class Absent:
        def find_spec(self, name: str, path: object = None, target: object = None) -> None:
            if name == module:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setattr(sys, "meta_path", [Absent(), *sys.meta_path])
    with pytest.raises(UsageError, match=r'pip install "aionpredis\[demo\]"'):
        make(env_id)


# returns


@pytest.mark.parametrize("n", [0, 1, 2, 57])
def test_returns_to_go_against_the_definition(n: int) -> None:
    rng = np.random.default_rng(n)
    rewards = rng.integers(-1, 2, n).astype(np.float32) * (rng.random(n) < 0.3)
    gamma, tail = 0.9, 2.5
    expected = [
        sum(gamma ** (j - i) * float(rewards[j]) for j in range(i, n)) + gamma ** (n - i) * tail for i in range(n)
    ]
    returns = returns_to_go(rewards, gamma, tail=tail)
    assert returns.dtype == np.float32
    np.testing.assert_allclose(returns, expected, rtol=1e-5, atol=1e-6)


# policy


def random_policy(inputs: int = 6, actions: int = 3, hidden: int = 5, seed: int = 0) -> Policy:
    rng = np.random.default_rng(seed)
    policy = Policy.init((inputs,), actions, hidden, rng)
    policy.weights["policy_weight"][...] = rng.standard_normal((hidden, actions))
    policy.weights["policy_bias"][...] = rng.standard_normal(actions)
    return policy


@pytest.mark.parametrize("dtype", [np.float32, np.int8])
def test_act_draws_from_the_probabilities(dtype: type) -> None:
    policy = random_policy()
    state: NDArray[Any] = np.array([1, 0, -1, 0, 0, 1], dtype).reshape(2, 3)
    expected = policy.probabilities(state[None])[0]
    np.testing.assert_allclose(expected.sum(), 1, rtol=1e-6)
    rng = np.random.default_rng(1)
    drawn = [policy.act(state, rng) for _ in range(20_000)]
    counts = np.bincount([action for action, _ in drawn], minlength=3)
    np.testing.assert_allclose(counts / len(drawn), expected, atol=0.015)
    for action, logp in set(drawn):
        assert logp == pytest.approx(np.log(expected[action]), abs=1e-5)


def test_a_new_policy_is_undecided() -> None:
    policy = Policy.init((80, 80), 2, 200, np.random.default_rng(0))
    states = np.random.default_rng(1).integers(-1, 2, (10, 80, 80)).astype(np.int8)
    np.testing.assert_allclose(policy.probabilities(states), 0.5, atol=0.03)
    np.testing.assert_array_equal(policy.values(states), 0)
    assert {array.dtype for array in policy.weights.values()} == {np.dtype(np.float32)}


def test_a_policy_names_what_it_misses() -> None:
    weights = random_policy().weights
    del weights["policy_bias"]
    with pytest.raises(UsageError, match="policy_bias"):
        Policy(weights)


# trainer


def test_gradients_against_finite_differences() -> None:
    rng = np.random.default_rng(4)
    weights = {
        name: array.astype(np.float64) + 0.3 * rng.standard_normal(array.shape)
        for name, array in random_policy().weights.items()
    }
    n = 40
    batch = {
        "state": rng.standard_normal((n, 2, 3)),
        "action": rng.integers(0, 3, n),
        "logp": np.log(rng.uniform(0.1, 0.9, n)),  # far enough from now that many ratios are clipped
        "advantage": rng.standard_normal(n),
        "target": rng.standard_normal(n),
    }

    def loss() -> float:
        return loss_and_gradients(weights, batch, clip=0.2, entropy=0.03, value=0.7)[0]

    _, gradients, facts = loss_and_gradients(weights, batch, clip=0.2, entropy=0.03, value=0.7)
    assert 0.1 < facts["clipped"] < 1
    step = 1e-6
    for name in LEARNED:
        for index in np.ndindex(weights[name].shape):
            before = weights[name][index]
            weights[name][index] = before + step
            above = loss()
            weights[name][index] = before - step
            below = loss()
            weights[name][index] = before
            assert gradients[name][index] == pytest.approx((above - below) / (2 * step), abs=1e-7, rel=1e-5), name


def batch_of(n: int, policy: Policy, shape: tuple[int, ...], seed: int = 0) -> dict[str, NDArray[Any]]:
    rng = np.random.default_rng(seed)
    states = rng.integers(-1, 2, (n, *shape)).astype(np.int8)
    actions = rng.integers(0, policy.actions, n)
    logp = np.log(policy.probabilities(states)[np.arange(n), actions])
    return {"state": states, "action": actions, "logp": logp, "return_": (actions == 0).astype(np.float32)}


def test_a_step_prefers_what_paid_and_leaves_its_inputs_alone() -> None:
    policy = Policy.init((80, 80), 2, 20, np.random.default_rng(0))
    given = {name: array.copy() for name, array in policy.weights.items()}
    batch = batch_of(128, policy, (80, 80))
    columns = {name: column.copy() for name, column in batch.items()}
    trainer = Trainer(policy, learning_rate=1e-3)
    first = trainer.step(batch)
    assert first.entropy == pytest.approx(np.log(2), abs=0.01)
    assert first.divergence == pytest.approx(0, abs=1e-6)
    assert first.clipped == 0
    for _ in range(30):
        last = trainer.step(batch)
    assert trainer.policy.probabilities(batch["state"])[:, 0].mean() > 0.55
    assert last.value_error < first.value_error
    for name in given:
        np.testing.assert_array_equal(policy.weights[name], given[name])
    for name in columns:
        np.testing.assert_array_equal(batch[name], columns[name])
    assert {array.dtype for array in trainer.policy.weights.values()} == {np.dtype(np.float32)}


@pytest.mark.parametrize("n", [1, 16])
def test_equal_returns_are_no_trouble(n: int) -> None:
    policy = random_policy()
    trainer = Trainer(policy)
    batch = batch_of(n, policy, (6,)) | {"return_": np.full(n, 7, np.float32)}
    for _ in range(5):
        trainer.step(batch)
    assert all(np.isfinite(array).all() for array in trainer.policy.weights.values())
    np.testing.assert_allclose(trainer.policy.values(batch["state"]), 7, atol=0.1)


def test_a_return_that_is_not_finite_is_refused_before_it_does_harm() -> None:
    policy = random_policy()
    trainer = Trainer(policy)
    batch = batch_of(16, policy, (6,))
    trainer.step(batch)
    before = {name: array.copy() for name, array in trainer.policy.weights.items()}
    batch["return_"][3] = np.nan
    with pytest.raises(FloatingPointError):
        trainer.step(batch)
    for name, array in trainer.policy.weights.items():
        np.testing.assert_array_equal(array, before[name])


# all together


def test_a_player_hands_out_whole_episodes() -> None:
    env = make("CartPole-v1")
    policy = Policy.init(env.state_shape, env.actions, 8, np.random.default_rng(0))
    player = Player(env, gamma=0.9, seed=1)
    steps = 0
    for _ in range(500):
        steps += 1
        columns = player.step(policy)
        if columns is None:
            continue
        n = len(columns["action"])
        assert n == steps
        assert columns["state"].shape == (n, 4)
        assert columns["terminated"].tolist() == [False] * (n - 1) + [True]
        np.testing.assert_allclose(columns["return_"], returns_to_go(np.ones(n), 0.9))
        expected = np.log(policy.probabilities(columns["state"])[np.arange(n), columns["action"]])
        np.testing.assert_allclose(columns["logp"], expected, atol=1e-5)
        steps = 0


class Script:
    """An environment that plays (reward, terminated, truncated) from a list; states count the steps."""

    state_shape: tuple[int, ...] = (1,)
    state_dtype: np.dtype[Any] = np.dtype(np.float32)
    actions = 2

    def __init__(self, script: list[tuple[float, bool, bool]], *, rewards_end_returns: bool) -> None:
        self.script = script
        self.rewards_end_returns = rewards_end_returns
        self.at = 0

    def reset(self, seed: int | None = None) -> NDArray[Any]:
        return np.zeros(1, np.float32)

    def step(self, action: int) -> tuple[NDArray[Any], float, bool, bool]:
        reward, terminated, truncated = self.script[self.at]
        self.at += 1
        return np.full(1, self.at, np.float32), reward, terminated, truncated

    def close(self) -> None: ...


def test_an_episode_cut_off_by_time_continues_in_the_value() -> None:
    env = Script([(1, False, False), (1, False, True), (1, True, False)], rewards_end_returns=False)
    policy = random_policy(inputs=1, actions=2)
    policy.weights["value_bias"][...] = 3
    value = float(policy.values(np.full((1, 1), 2, np.float32))[0])
    player = Player(env, gamma=0.5, seed=0)
    assert player.step(policy) is None
    columns = player.step(policy)
    assert columns is not None
    np.testing.assert_allclose(columns["return_"], [1.5 + 0.25 * value, 1 + 0.5 * value], rtol=1e-6)
    np.testing.assert_array_equal(columns["state"], [[0], [1]])
    columns = player.step(policy)
    assert columns is not None
    np.testing.assert_array_equal(columns["return_"], [1])
    np.testing.assert_array_equal(columns["state"], [[0]])  # of the new episode


def test_a_point_closes_its_returns() -> None:
    env = Script([(0, False, False), (-1, False, False), (0, False, False), (1, True, False)], rewards_end_returns=True)
    policy = random_policy(inputs=1, actions=2)
    policy.weights["value_bias"][...] = 3
    player = Player(env, gamma=0.5, seed=0)
    played = [columns for _ in range(4) if (columns := player.step(policy)) is not None]
    assert [columns["return_"].tolist() for columns in played] == [[-0.5, -1], [0.5, 1]]
    assert [columns["terminated"].tolist() for columns in played] == [[False, False], [False, True]]


def test_cartpole_is_learned() -> None:
    gamma = 0.99
    players = [Player(make("CartPole-v1"), gamma=gamma, seed=i) for i in range(8)]
    rng = np.random.default_rng(0)
    trainer = Trainer(Policy.init((4,), 2, 64, rng))
    means = []
    for _ in range(8):
        chunks: list[dict[str, NDArray[Any]]] = []
        while sum(len(chunk["action"]) for chunk in chunks) < 6000:
            played = [player.step(trainer.policy) for player in players]
            chunks += [chunk for chunk in played if chunk is not None]
        run = {name: np.concatenate([chunk[name] for chunk in chunks]) for name in chunks[0]}
        means.append(float(run["reward"].sum() / (run["terminated"] | run["truncated"]).sum()))
        for _ in range(10):
            order = rng.permutation(len(run["action"]))
            for start in range(0, len(order) - 255, 256):
                trainer.step({name: column[order[start : start + 256]] for name, column in run.items()})
    assert means[0] < 40
    assert means[-1] >= 150, means  # 30 other seeds: 323 to 500
