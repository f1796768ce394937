"""Off-policy learning: double DQN with prioritized replay and n-step returns learns CartPole, in plain NumPy.

A process of actors explores, and appends its transitions to the replay. This process samples them by priority, learns,
and publishes weights, which all actors pick up while they play. It ends when a greedy actor's mean return reaches the goal.
"""

import argparse
import multiprocessing
import os
import sys
import time
from collections import deque
from typing import Any

os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # NumPy's threads gain nothing with so small a network, and cost the actors

import anyio
import gymnasium  # pip install "aionpredis[demo]"
import numpy as np
from numpy.typing import NDArray

import aionpredis
from aionpredis import NStep, Policy, Prioritized, Replay, Schema

Weights = dict[str, NDArray[Any]]

SCHEMA = Schema(state=("float32", (4,)), action="int64", reward="float32", terminated="bool", truncated="bool")
EXPLORERS = 8
PAUSE = 0.002  # seconds between an explorer's steps: a slower environment, so that learning gets its share of two cores
BATCH, N_STEPS, DISCOUNT, LEARNING_RATE = 128, 3, 0.99, 1e-3
PUBLISH_EVERY, NEW_TARGET_EVERY = 50, 200  # learning steps
EPISODES = 20  # over which the greedy actor's mean return is taken


# --- the network: 4 inputs, two hidden layers, a value for each of 2 actions ---


def new_weights(rng: np.random.Generator) -> Weights:
    weights: Weights = {}
    for layer, (rows, columns) in enumerate([(4, 64), (64, 64), (64, 2)]):
        weights[f"weight{layer}"] = rng.normal(0, np.sqrt(2 / rows), (rows, columns)).astype(np.float32)
        weights[f"bias{layer}"] = np.zeros(columns, np.float32)
    return weights


def layers(weights: Weights, states: NDArray[Any]) -> list[NDArray[Any]]:
    """What goes into each layer, and the action values at last."""
    first = np.maximum(states @ weights["weight0"] + weights["bias0"], 0)
    second = np.maximum(first @ weights["weight1"] + weights["bias1"], 0)
    return [states, first, second, second @ weights["weight2"] + weights["bias2"]]


def gradients(weights: Weights, inputs: list[NDArray[Any]], slope: NDArray[Any]) -> Weights:
    """``slope``: the loss's derivative by the action values."""
    found: Weights = {}
    for layer in (2, 1, 0):
        found[f"weight{layer}"] = inputs[layer].T @ slope
        found[f"bias{layer}"] = slope.sum(axis=0)
        slope = slope @ weights[f"weight{layer}"].T * (inputs[layer] > 0)
    return found


class Adam:
    def __init__(self, weights: Weights) -> None:
        self.weights, self.steps = weights, 0
        self.means = {name: np.zeros_like(array) for name, array in weights.items()}
        self.squares = {name: np.zeros_like(array) for name, array in weights.items()}

    def step(self, gradients: Weights) -> None:
        self.steps += 1
        rate = LEARNING_RATE * np.sqrt(1 - 0.999**self.steps) / (1 - 0.9**self.steps)
        for name, gradient in gradients.items():
            self.means[name] += 0.1 * (gradient - self.means[name])
            self.squares[name] += 0.001 * (gradient**2 - self.squares[name])
            self.weights[name] -= rate * self.means[name] / (np.sqrt(self.squares[name]) + 1e-8)


# --- actors --------------------------------------------------------------------------------------------------------------


async def follow(policy: Policy, newest: Weights) -> None:
    """Keep one process's weights up to date, for all its actors."""
    async for _, weights in policy.watch():
        newest.update(weights)


async def act(replay: Replay, newest: Weights, seed: int, epsilon: float, pause: float, returns: deque[float]) -> None:
    rng, env = np.random.default_rng(seed), gymnasium.make("CartPole-v1")
    async with replay.actor() as actor:
        await actor.join()
        state, score = env.reset(seed=seed)[0], 0.0
        while True:
            if not newest or rng.random() < epsilon:
                action = int(rng.integers(2))
            else:
                action = int(layers(newest, state)[-1].argmax())
            following, reward, terminated, truncated, _ = env.step(action)
            # The state in which the action was taken; where no episode ends, the next transition's is what it led to.
            # To fall costs 1 and nothing else counts, so values lie between -1 and 0 and need not grow to 100 first.
            cost = -float(terminated)
            await actor.append(state=state, action=action, reward=cost, terminated=terminated, truncated=truncated)
            state, score = following, score + float(reward)
            if terminated or truncated:
                returns.append(score)
                state, score = env.reset()[0], 0.0
            await anyio.sleep(pause)


async def explore(url: str, seed: int) -> None:
    """A process of actors. With a server that others reach, there may be more of them, on any host."""
    learner = multiprocessing.parent_process()
    assert learner is not None
    async with aionpredis.connect(url) as client, anyio.create_task_group() as tasks:
        replay, newest = client.replay("example-dqn", SCHEMA), dict[str, NDArray[Any]]()
        tasks.start_soon(follow, replay.policy, newest)
        for i in range(EXPLORERS):
            # From 0.4 down to 0.0007, as in Ape-X (Horgan et al. 2018): some explore, some see how far the policy leads.
            epsilon = 0.4 ** (1 + 7 * i / (EXPLORERS - 1))
            tasks.start_soon(act, replay, newest, seed + i, epsilon, PAUSE, deque[float](maxlen=1))
        await anyio.wait_readable(learner.sentinel)  # it is gone, however it ended
        tasks.cancel_scope.cancel()


# --- the learner -----------------------------------------------------------------------------------------------------------


async def learn(replay: Replay, weights: Weights, goal: float, returns: deque[float], seed: int) -> None:
    """Returns when the goal is reached."""
    priorities = Prioritized(alpha=0.6, beta=0.4)
    sampler = await replay.sampler(
        batch=BATCH,
        selection=priorities,
        columns=["state", "action"],  # and from n_step: "return", "discount", "next_state"
        n_step=NStep(N_STEPS, discount=DISCOUNT),
        min_size=1_000,
        seed=seed,
    )
    adam, target, each = Adam(weights), {}, np.arange(BATCH)
    started = reported = time.monotonic()
    async for batch in sampler:
        if adam.steps % NEW_TARGET_EVERY == 0:
            target = {name: array.copy() for name, array in weights.items()}

        # Double DQN: the network chooses the next action, the target network says what it is worth.
        best = layers(weights, batch["next_state"])[-1].argmax(axis=1)
        worth = layers(target, batch["next_state"])[-1][each, best]
        inputs = layers(weights, batch["state"])
        # No return is outside of -1 to 0: a target that is comes of an error, and must not lead to greater ones.
        errors = inputs[-1][each, batch["action"]] - np.clip(batch["return"] + batch["discount"] * worth, -1, 0)
        slope = np.zeros_like(inputs[-1])
        # Squared errors. The weights take back the bias of drawing by priority,
        slope[each, batch["action"]] = batch.weights * errors / BATCH
        adam.step(gradients(weights, inputs, slope))
        priorities.beta = min(1.0, 0.4 + 0.6 * adam.steps / 10_000)  # all of it only when the values have settled.
        sampler.update_priorities(batch.ids, np.abs(errors) + 0.01)  # with a priority of 0 it would not be drawn again

        if adam.steps % PUBLISH_EVERY == 0:
            await replay.policy.publish(weights)
        now, mean = time.monotonic(), float(np.mean(returns or [0.0]))
        reached = len(returns) == EPISODES and mean >= goal
        if reached or now > reported + 2:
            reported, count = now, sampler.stats.inserted
            speed = f"{adam.steps:,} learning steps, {count:,} transitions ({count / (now - started):,.0f}/s)"
            print(f"{now - started:5.1f} s: mean return {mean:5.1f}, {speed}", flush=True)
        if reached:
            return


async def main(url: str | None, goal: float, seconds: float, seed: int) -> bool:
    async with aionpredis.connect(url) as client:
        replay = client.replay("example-dqn", SCHEMA)
        weights = new_weights(np.random.default_rng(seed))
        await replay.begin_run(weights)  # publishes them, too
        explorers = multiprocessing.get_context("spawn").Process(
            target=aionpredis.run, args=(explore, url or client.url, seed), daemon=True
        )
        explorers.start()
        try:
            newest, returns = weights.copy(), deque[float](maxlen=EPISODES)
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(follow, replay.policy, newest)
                tasks.start_soon(act, replay, newest, seed + EXPLORERS, 0.0, 0.0, returns)  # greedy
                with anyio.move_on_after(seconds) as limit:
                    await learn(replay, weights, goal, returns, seed)
                tasks.cancel_scope.cancel()
        finally:
            explorers.terminate()
            explorers.join()
        await replay.delete()
    return not limit.cancelled_caught


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", nargs="?", default=os.environ.get("REDIS_URL"), help="default: an embedded server")
    parser.add_argument("--goal", type=float, default=195, help="mean return of 20 greedy episodes (%(default)s)")
    parser.add_argument("--seconds", type=float, default=120, help="in which it has to be reached (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if not aionpredis.run(main, *vars(arguments).values()):
        sys.exit(f"a mean return of {arguments.goal:g} was not reached within {arguments.seconds:g} s")
