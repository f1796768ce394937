"""What the tests of the replay share: a small schema, transitions that can be told apart, and a look at the server."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import redis

from aionpredis import Actor, Batches, Client, Replay, Schema

SCHEMA = Schema(state=("uint8", (3,)), uid="int64", terminated="bool")
LEASE = 0.5
"""Seconds. Short, so that a test can wait for its end: only for tests that do. A machine that stands still for so long takes
the data of a chunk, which is committed anew then, behind later ones and twice in the log."""


def replay_of(client: Client, *, chunk: int = 4, lease: float = 60.0, name: str = "r", replicas: int = 0) -> Replay:
    return client.replay(name, SCHEMA, chunk=chunk, lease=lease, replicas=replicas)


async def fill(actor: Actor, uids: range) -> None:
    for uid in uids:
        await actor.append(state=np.full(3, uid % 256, np.uint8), uid=uid, terminated=uid % 10 == 9)


async def uids(batches: Batches) -> list[int]:
    """Reads to the end; checks that the columns belong together."""
    found: list[int] = []
    async for batch in batches:
        assert (batch["state"] == (batch["uid"] % 256)[:, None]).all()
        assert (batch["terminated"] == (batch["uid"] % 10 == 9)).all()
        found += batch["uid"].tolist()
    return found


def log_entries(stock: redis.Redis, name: str = "r") -> list[tuple[int, bytes, int, int]]:
    """Commits: run, incarnation, seq, rows."""
    entries: Any = stock.xrange(f"{{{name}}}:log")
    commits = []
    for entry_id, fields in entries:
        if b"c" in fields:
            incarnation, seq, rows = struct.unpack_from("<8sII", fields[b"c"])
            commits.append((int(entry_id.split(b"-")[0]), incarnation, seq, rows))
    return commits


def data_keys(stock: redis.Redis, name: str = "r") -> set[bytes]:
    return {key for key in stock.scan_iter(f"{name}:*", count=1000) if b":policy:" not in key}


def named_keys(stock: redis.Redis, name: str = "r") -> set[bytes]:
    return {
        b"%b:%d:%b:%d" % (name.encode(), run, inc.hex().encode(), seq) for run, inc, seq, _ in log_entries(stock, name)
    }


def kept_keys(stock: redis.Redis, name: str = "r") -> set[bytes]:
    """Data keys without a time to live."""
    keys = list(data_keys(stock, name))
    with stock.pipeline(transaction=False) as pipeline:
        for key in keys:
            pipeline.pttl(key)
        return {key for key, left in zip(keys, pipeline.execute(), strict=True) if left == -1}


def unnamed_without_ttl(stock: redis.Redis, name: str = "r") -> set[bytes]:
    """Data keys that would stay for ever with nobody knowing of them. There is none at any moment."""
    suspects = kept_keys(stock, name)
    return suspects - named_keys(stock, name)  # the log is looked at afterwards: it only grows


def kill_connections(stock: redis.Redis) -> None:
    stock.client_kill_filter(_type="normal", skipme=True)


def pause(stock: redis.Redis, milliseconds: int) -> None:
    """Let nothing be written for so long."""
    stock.client_pause(milliseconds, all=False)


__all__ = [
    "LEASE",
    "SCHEMA",
    "data_keys",
    "fill",
    "kept_keys",
    "kill_connections",
    "log_entries",
    "named_keys",
    "pause",
    "replay_of",
    "uids",
    "unnamed_without_ttl",
]
