"""Publish a policy's weights; actors pick up each new version."""

import anyio
import numpy as np

import aionpredis
from aionpredis import Policy


async def actor(policy: Policy, name: str) -> None:
    # Yields the newest version, then each newer one as it is published. One that is busy meanwhile skips some.
    async for version, weights in policy.watch():
        print(f"{name}: version {version}, bias {weights['bias']}")
        if version == 3:
            return


async def main() -> None:
    async with aionpredis.connect() as client:
        policy = client.policy("example-policy", keep=2)  # so many versions stay readable
        weights = {"kernel": np.zeros((80 * 80, 200), np.float32), "bias": np.zeros(3, np.float32)}

        async with anyio.create_task_group() as actors:
            for index in range(2):
                actors.start_soon(actor, policy, f"actor {index}")
            for _ in range(3):
                weights["bias"] += 1  # training goes here
                version = await policy.publish(weights)  # one immutable .safetensors value
                print(f"trainer: published version {version}")
                await anyio.sleep(0.1)

        # Without waiting: the newest version, or a certain one.
        newest = await policy.latest()
        assert newest is not None
        print(f"latest: version {newest.version}, {sum(array.nbytes for array in newest.weights.values()):,} bytes")
        print("version 1:", await policy.get(1))  # deleted: two newer ones were kept
        await policy.delete()


if __name__ == "__main__":
    aionpredis.run(main)
