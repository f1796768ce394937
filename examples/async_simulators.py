"""Four simulators append transitions to one replay; a trainer begins two runs and reads them."""

import anyio
import numpy as np

import aionpredis
from aionpredis import Replay, RunEnded, Schema

SCHEMA = Schema(state=("uint8", (80, 80)), action="int64", reward="float32", terminated="bool")


class Ball:
    """A ball falls over a screen of 80x80. Your environment goes here."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.screen, self.row = np.zeros((80, 80), np.uint8), 0

    def step(self, action: int) -> tuple[np.ndarray, float, bool]:
        self.row = (self.row + 1) % 80
        self.screen[:] = 0
        self.screen[self.row, self.rng.integers(80)] = 255
        return self.screen, float(action), self.row == 79


async def simulator(replay: Replay, seed: int) -> None:
    env = Ball(seed)
    async with replay.actor(f"simulator-{seed}") as actor:
        while True:
            await actor.join()  # the newest run; after RunEnded it waits for the next one
            try:
                while True:
                    action = int(env.rng.integers(2))  # your policy goes here
                    state, reward, terminated = env.step(action)
                    # Copied, so the environment may reuse its memory. Waits only if the server can't keep up.
                    await actor.append(state=state, action=action, reward=reward, terminated=terminated)
            except RunEnded:
                print(f"{actor.name}: {actor.stats.acknowledged} transitions are on the server")


async def main() -> None:
    async with aionpredis.connect() as client:  # REDIS_URL, or an embedded server
        replay = client.replay("example-simulators", SCHEMA)
        async with anyio.create_task_group() as simulators:
            for seed in range(4):
                simulators.start_soon(simulator, replay, seed)
            for _ in range(2):
                run = await replay.begin_run()  # ends the previous run on all hosts, and deletes its data
                transitions = 0
                async for batch in await replay.follow(run, batch=256):  # as it comes
                    transitions += len(batch["state"])  # batch["state"]: (256, 80, 80)
                    if transitions > 5_000:
                        break
                print(f"run {run.run}: read {transitions} transitions")
            simulators.cancel_scope.cancel()
        await replay.delete()


if __name__ == "__main__":
    aionpredis.run(main)
