"""A policy and its trainer in plain NumPy: one hidden layer, clipped policy gradient (PPO), Adam.

Nothing here knows where weights and experience come from: a simulator makes a `Policy` from a dict of arrays and
calls `Policy.act`, a trainer feeds dicts of columns to `Trainer.step` and hands out ``trainer.policy.weights``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from aionpredis.errors import UsageError

__all__ = ["Policy", "Step", "Trainer", "loss_and_gradients", "returns_to_go"]

Weights = dict[str, NDArray[Any]]


def returns_to_go(rewards: NDArray[Any], gamma: float, *, tail: float = 0.0) -> NDArray[np.float32]:
    """What each step of one episode earned from there on: float (n,) → float32 (n,).

    ``gamma`` discounts per step. ``tail``: the value of the state after the last step, if the episode was cut off
    rather than over.
    """
    returns = np.empty(len(rewards), np.float32)
    total = tail
    for i, reward in zip(range(len(rewards) - 1, -1, -1), reversed(rewards.tolist()), strict=True):
        total = reward + gamma * total
        returns[i] = total
    return returns


class Policy:
    """State → probability of each action, and the state's value.

    ``weights``, all float32 (any one float dtype works), where ``inputs`` is the number of a state's elements:

    =================  ====================  =====================================
    hidden_weight      (inputs, hidden)
    hidden_bias        (hidden,)
    policy_weight      (hidden, actions)
    policy_bias        (actions,)
    value_weight       (hidden, 1)
    value_bias         (1,)
    value_range        (2,)                  mean and deviation of the returns seen
    =================  ====================  =====================================

    A state may have any numeric dtype and any shape of ``inputs`` elements; it is flattened and converted here.
    """

    def __init__(self, weights: Mapping[str, NDArray[Any]]) -> None:
        self.weights: Weights = dict(weights)
        missing = NAMES - self.weights.keys()
        if missing:
            raise UsageError(f"these are not a policy's weights: {', '.join(sorted(missing))} missing")
        self._hidden_weight = self.weights["hidden_weight"]
        self._hidden_bias = self.weights["hidden_bias"]
        self._policy_weight = self.weights["policy_weight"]
        self._policy_bias = self.weights["policy_bias"]
        self.inputs, self.hidden = self._hidden_weight.shape
        self.actions = len(self._policy_bias)
        self.dtype = self._hidden_weight.dtype

    @classmethod
    def init(cls, state_shape: tuple[int, ...], actions: int, hidden: int, rng: np.random.Generator) -> Policy:
        """A policy that knows nothing: nearly uniform, value 0."""
        inputs = math.prod(state_shape)

        def normal(rows: int, columns: int, scale: float) -> NDArray[np.float32]:
            drawn = rng.standard_normal((rows, columns), np.float32)
            drawn *= np.float32(scale / math.sqrt(rows))
            return drawn

        return cls(
            {
                "hidden_weight": normal(inputs, hidden, 1.0),
                "hidden_bias": np.zeros(hidden, np.float32),
                "policy_weight": normal(hidden, actions, 0.01),
                "policy_bias": np.zeros(actions, np.float32),
                "value_weight": np.zeros((hidden, 1), np.float32),
                "value_bias": np.zeros(1, np.float32),
                "value_range": np.array([0, 1], np.float32),
            }
        )

    def act(self, state: NDArray[Any], rng: np.random.Generator) -> tuple[int, float]:
        """Draws an action for one state; returns it with the logarithm of its probability."""
        state = state.reshape(-1)
        if state.dtype.kind == "f":
            hidden = state @ self._hidden_weight
        else:  # a difference frame is nearly all 0: its 30 rows of 6400 are all that need be read
            occupied = (state != 0).nonzero()[0]  # 2 µs, by itself `nonzero` takes 12
            hidden = state[occupied].astype(self.dtype) @ self._hidden_weight[occupied]
        hidden += self._hidden_bias
        np.tanh(hidden, hidden)
        logits = (hidden @ self._policy_weight + self._policy_bias).tolist()
        top = max(logits)  # for a handful of actions, Python's floats are faster than NumPy's calls
        odds = [math.exp(logit - top) for logit in logits]
        total = sum(odds)
        left = rng.random() * total
        action = 0
        for action, odd in enumerate(odds):  # noqa: B007
            left -= odd
            if left < 0:
                break
        return action, logits[action] - top - math.log(total)

    def probabilities(self, states: NDArray[Any]) -> NDArray[Any]:
        """(n, *state_shape) states → (n, actions), each row adding up to 1."""
        logits = _features(self.weights, _rows(states, self.dtype)) @ self._policy_weight + self._policy_bias
        probabilities: NDArray[Any] = np.exp(_log_softmax(logits))
        return probabilities

    def values(self, states: NDArray[Any]) -> NDArray[Any]:
        """(n, *state_shape) states → (n,) expected returns, in the unit of the rewards."""
        mean, deviation = self.weights["value_range"]
        features = _features(self.weights, _rows(states, self.dtype))
        values: NDArray[Any] = mean + deviation * _values(self.weights, features)
        return values


LEARNED = ("hidden_weight", "hidden_bias", "policy_weight", "policy_bias", "value_weight", "value_bias")
NAMES = {*LEARNED, "value_range"}


def loss_and_gradients(
    weights: Mapping[str, NDArray[Any]],
    batch: Mapping[str, NDArray[Any]],
    *,
    clip: float,
    entropy: float,
    value: float,
    features: NDArray[Any] | None = None,
    out: Weights | None = None,
) -> tuple[float, Weights, dict[str, float]]:
    """The loss of one minibatch, its gradient by weight, and what is worth plotting.

    ``batch``: ``state`` (n, …), ``action`` (n,), ``logp`` (n,) under the policy that acted, ``advantage`` (n,) and
    ``target`` (n,), the last two in units of deviations. The loss, to be made small, is the mean of

        -min(r·advantage, clip(r, 1-clip, 1+clip)·advantage)  -  entropy·H  +  value·(v - target)²/2

    with r = exp(log-probability now - logp), H the policy's entropy and v the value before `value_range` scales it.
    ``features``: the hidden layer's output for these states, where the caller has it; ``out``: where gradients go.
    """
    dtype = weights["hidden_weight"].dtype
    rows = _rows(batch["state"], dtype)
    n = len(rows)
    if features is None:
        features = _features(weights, rows)
    log_probabilities = _log_softmax(features @ weights["policy_weight"] + weights["policy_bias"])
    probabilities = np.exp(log_probabilities)
    values = _values(weights, features)

    each = np.arange(n)
    action, advantage = batch["action"], batch["advantage"].astype(dtype)
    log_ratio = log_probabilities[each, action] - batch["logp"].astype(dtype)
    ratio = np.exp(np.minimum(log_ratio, 20))
    unclipped = ratio * advantage
    clipped = np.clip(ratio, 1 - clip, 1 + clip) * advantage
    entropies = -(probabilities * log_probabilities).sum(1)
    error = values - batch["target"].astype(dtype)
    loss = -np.minimum(unclipped, clipped).mean() - entropy * entropies.mean() + value * (error @ error) / (2 * n)

    counts = unclipped <= clipped  # where the clipped term is the smaller, it is constant
    d_logits = probabilities * (counts * unclipped)[:, None]
    d_logits[each, action] -= counts * unclipped
    d_logits += entropy * probabilities * (log_probabilities + entropies[:, None])
    d_logits /= n
    d_values = (value / n) * error[:, None]
    d_hidden = d_logits @ weights["policy_weight"].T
    d_hidden += d_values @ weights["value_weight"].T
    d_hidden *= 1 - features * features

    gradients = {name: np.empty_like(weights[name]) for name in LEARNED} if out is None else out
    np.matmul(rows.T, d_hidden, gradients["hidden_weight"])
    np.sum(d_hidden, 0, out=gradients["hidden_bias"])
    np.matmul(features.T, d_logits, gradients["policy_weight"])
    np.sum(d_logits, 0, out=gradients["policy_bias"])
    np.matmul(features.T, d_values, gradients["value_weight"])
    np.sum(d_values, 0, out=gradients["value_bias"])
    facts = {
        "entropy": float(entropies.mean()),
        "divergence": float((ratio - 1 - log_ratio).mean()),
        "clipped": float((np.abs(ratio - 1) > clip).mean()),
        "value_error": float(error @ error) / n,
    }
    return float(loss), gradients, facts


class Step(NamedTuple):
    """What one `Trainer.step` saw, before it changed the weights."""

    loss: float
    entropy: float
    """Mean entropy of the policy, in nats: ln(actions) is undecided, 0 is certain."""
    divergence: float
    """Estimate of how far the policy has moved from the one that acted, in nats (Kullback-Leibler)."""
    clipped: float
    """Share of the transitions whose probability ratio has left 1 ± clip."""
    value_error: float
    """Mean squared error of the value, in units of the returns' variance: 1 is worthless, 0 perfect."""


class Trainer:
    """Improves a policy by minibatches of experience.

    The weights given are copied into one contiguous vector, so that Adam is a few passes over one array;
    ``policy.weights`` are views of it, which each `step` changes in place: have them sent before the next step.
    The default learning rate suits a handful of inputs; for 80x80 frames take 1e-3.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        learning_rate: float = 5e-3,
        clip: float = 0.2,
        entropy: float = 0.01,
        value: float = 0.5,
        max_norm: float = 0.5,
    ) -> None:
        self.learning_rate = learning_rate
        self.clip = clip
        self.entropy = entropy
        self.value = value
        self.max_norm = max_norm
        self.steps = 0
        size = sum(policy.weights[name].size for name in LEARNED)
        self._vector, self._gradient, self._mean, self._square, self._scratch = np.zeros((5, size), policy.dtype)
        weights = _views(self._vector, policy.weights)
        for name in LEARNED:
            weights[name][...] = policy.weights[name]
        self.policy = Policy({**weights, "value_range": policy.weights["value_range"].copy()})
        self._gradients = _views(self._gradient, policy.weights)

    def step(self, batch: Mapping[str, NDArray[Any]]) -> Step:
        """One Adam step. ``batch``: columns of n transitions, in any order.

        ``state`` (n, *state_shape) numeric; ``action`` (n,) integers; ``logp`` (n,) floats, the logarithm of the
        action's probability when it was drawn; ``return_`` (n,) floats from `returns_to_go`.
        """
        policy = self.policy
        weights = policy.weights
        returns = batch["return_"].astype(policy.dtype)
        if not math.isfinite(float(returns.sum())):
            raise FloatingPointError("a return is not finite")
        rows = _rows(batch["state"], policy.dtype)  # converted once, multiplied once: that is the cost of a step
        features = _features(weights, rows)
        self._see(returns)
        mean, deviation = weights["value_range"]
        target = (returns - mean) / deviation
        advantage = target - _values(weights, features)
        advantage -= advantage.mean()
        advantage /= advantage.std() + 1e-8
        loss, _, facts = loss_and_gradients(
            weights,
            {
                "state": rows,
                "action": batch["action"],
                "logp": batch["logp"],
                "advantage": advantage,
                "target": target,
            },
            clip=self.clip,
            entropy=self.entropy,
            value=self.value,
            features=features,
            out=self._gradients,
        )
        self._adam()
        return Step(loss, **facts)

    def _see(self, returns: NDArray[Any]) -> None:
        """Lets mean and deviation follow the returns, over the last hundred batches or so."""
        known = self.policy.weights["value_range"]
        rate = max(0.01, 1 / (self.steps + 1))
        mean = known[0] + rate * (returns.mean() - known[0])
        square = known[1] ** 2 if self.steps else 0
        variance = (1 - rate) * square + rate * ((returns - mean) ** 2).mean()
        known[:] = mean, math.sqrt(variance) + 1e-4

    def _adam(self) -> None:
        gradient, mean, square, scratch = self._gradient, self._mean, self._square, self._scratch
        norm = math.sqrt(float(gradient @ gradient))
        if not math.isfinite(norm):
            raise FloatingPointError("the gradient is not finite: are all states and logp finite?")
        self.steps += 1
        if norm > self.max_norm:
            gradient *= self.max_norm / norm
        b1, b2 = 0.9, 0.999
        mean *= b1
        np.multiply(gradient, 1 - b1, scratch)
        mean += scratch
        square *= b2
        gradient *= gradient
        gradient *= 1 - b2
        square += gradient
        np.sqrt(square, scratch)
        scratch *= 1 / math.sqrt(1 - b2**self.steps)
        scratch += 1e-5
        np.divide(mean, scratch, scratch)
        scratch *= self.learning_rate / (1 - b1**self.steps)
        self._vector -= scratch


def _rows(states: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    """(n, *state_shape) of any numeric dtype → (n, inputs) of ``dtype``."""
    return states.reshape(len(states), -1).astype(dtype, copy=False)


def _features(weights: Mapping[str, NDArray[Any]], rows: NDArray[Any]) -> NDArray[Any]:
    features: NDArray[Any] = rows @ weights["hidden_weight"]
    features += weights["hidden_bias"]
    np.tanh(features, features)
    return features


def _values(weights: Mapping[str, NDArray[Any]], features: NDArray[Any]) -> NDArray[Any]:
    values: NDArray[Any] = features @ weights["value_weight"][:, 0] + weights["value_bias"]
    return values


def _log_softmax(logits: NDArray[Any]) -> NDArray[Any]:
    shifted = logits - logits.max(1, keepdims=True)
    normalized: NDArray[Any] = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    return normalized


def _views(vector: NDArray[Any], like: Mapping[str, NDArray[Any]]) -> Weights:
    """The learned weights as consecutive pieces of one vector."""
    views: Weights = {}
    start = 0
    for name in LEARNED:
        shape, size = like[name].shape, like[name].size
        views[name] = vector[start : start + size].reshape(shape)
        start += size
    return views
