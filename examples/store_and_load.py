"""Store an array and a record, load them again."""

import numpy as np

import aionpredis


async def main() -> None:
    async with aionpredis.connect() as client:  # REDIS_URL, or an embedded server
        frame = np.random.default_rng(0).integers(0, 255, (80, 80), np.uint8)

        await client.set("frame", frame, ttl=60)
        loaded = await client.get("frame")
        assert loaded is not None
        assert (loaded == frame).all()

        # Any strides; compressed if it pays; received into memory that exists already.
        await client.set("every-second-row", frame[::2], codec="lz4")
        out = np.empty((40, 80), np.uint8)
        await client.get("every-second-row", out=out)

        # Many at once: a batch of arrays straight into one contiguous array.
        await client.mset({f"frame:{i}": frame + np.uint8(i) for i in range(32)})
        batch = np.empty((32, 80, 80), np.uint8)
        found = await client.mget([f"frame:{i}" for i in range(32)], out=batch)
        print(f"{found.sum()} of 32 frames, mean {batch.mean():.1f}")

        # A record is a dict of arrays, stored as one .safetensors file.
        await client.set_record("transition", {"state": frame, "action": np.int64(2), "reward": np.float32(1)})
        transition = await client.get_record("transition")
        assert transition is not None
        print({name: (str(array.dtype), array.shape) for name, array in transition.items()})

        await client.delete("frame", "every-second-row", "transition", *(f"frame:{i}" for i in range(32)))


if __name__ == "__main__":
    aionpredis.run(main)
