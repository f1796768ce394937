"""Read a replay as a dataset: shuffled epochs of what is there, and a run that is followed while it grows."""

import time

import anyio
import anyio.to_thread
import numpy as np

import aionpredis
from aionpredis import Loader, Replay, Schema

SCHEMA = Schema(state=("uint8", (80, 80)), action="int64", reward="float32")


async def play(replay: Replay, transitions: int) -> None:
    """Something to read: an actor appends random transitions and leaves."""
    rng = np.random.default_rng(0)
    async with replay.actor() as actor:
        await actor.join()
        for _ in range(transitions):
            state = rng.integers(0, 255, (80, 80), np.uint8)
            await actor.append(state=state, action=rng.integers(4), reward=rng.random())


def train(batch: dict[str, np.ndarray]) -> float:
    """Your training step. In a worker thread, so that the next batches are received meanwhile."""
    return float((batch["state"].mean(axis=(1, 2)) * batch["reward"]).mean())


async def main() -> None:
    async with aionpredis.connect() as client:
        replay = client.replay("example-dataloader", SCHEMA)
        run = await replay.begin_run()
        await play(replay, 4_000)

        # Epochs: everything that is committed now, each transition once, in another order each time.
        for epoch in range(2):
            started, rows = time.perf_counter(), 0
            async with Loader(await replay.epoch(run, batch=256, seed=epoch), prefetch=2) as batches:
                async for batch in batches:
                    await anyio.to_thread.run_sync(train, batch)
                    rows += len(batch["state"])
            print(f"epoch {epoch}: {rows} transitions, {rows / (time.perf_counter() - started):,.0f}/s with training")

        # Follow: from the run's first transition to its last, while actors are still adding to it.
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(play, replay, 1_000)
            rows = 0
            async for batch in await replay.follow(run, batch=250):
                rows += len(batch["state"])
                if rows == 5_000:
                    await replay.begin_run()  # ends the run, and with it the loop
        print(f"followed {rows} transitions to the end of the run")
        await replay.delete()


if __name__ == "__main__":
    aionpredis.run(main)
