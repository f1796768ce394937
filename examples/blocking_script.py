"""Without async: two simulators in processes of their own, and a trainer, in plain Python."""

import multiprocessing
import os

import numpy as np

from aionpredis import RunEnded, Schema, blocking

SCHEMA = Schema(state=("uint8", (80, 80)), action="int64", reward="float32", terminated="bool")
TRANSITIONS = 2_000


def simulate(url: str, seed: int) -> None:
    """A process opens its own client; it cannot take over another one's."""
    rng = np.random.default_rng(seed)
    screen = np.zeros((80, 80), np.uint8)
    with blocking.connect(url) as client, client.replay("example-blocking", SCHEMA).actor(f"simulator-{seed}") as actor:
        actor.join()  # the newest run
        try:
            for step in range(TRANSITIONS):
                screen[step % 80] = rng.integers(256)  # your environment goes here
                # Copied; full chunks travel while the simulator goes on. Waits only if the server can't keep up.
                actor.append(state=screen, action=step % 2, reward=1.0, terminated=step % 80 == 79)
        except RunEnded:
            pass  # the trainer has begun the next one: join() again


def main() -> None:
    with blocking.connect() as client:  # REDIS_URL, or an embedded server
        client.set("frame", np.eye(3), ttl=60)
        print(client.get("frame"))

        replay = client.replay("example-blocking", SCHEMA)
        run = replay.begin_run()
        url = os.environ.get("REDIS_URL") or client.url
        processes = multiprocessing.get_context("spawn")  # "fork" works as well
        simulators = [processes.Process(target=simulate, args=(url, seed)) for seed in range(2)]
        for simulator in simulators:
            simulator.start()
        transitions = 0
        with blocking.Loader(replay.follow(run, batch=250), prefetch=2) as batches:  # received while this thread trains
            for batch in batches:
                transitions += len(batch["state"])  # batch["state"]: (250, 80, 80)
                if transitions == 2 * TRANSITIONS:
                    break
        for simulator in simulators:
            simulator.join()
        print(f"run {run.run}: {transitions} transitions of {len(simulators)} simulators")
        replay.delete()
        client.delete("frame")


if __name__ == "__main__":
    main()
