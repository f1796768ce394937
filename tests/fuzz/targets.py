"""All targets by name, with their seeds."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from . import entries, folders, replies, values


class Target(NamedTuple):
    """``run`` fails if something is wrong with these bytes; ``seeds`` makes valid input and plain lies."""

    run: Callable[[bytes], None]
    seeds: Callable[[], list[bytes]]


TARGETS = {
    "resp": Target(replies.fuzz_resp, replies.seeds),
    "abandon": Target(replies.fuzz_abandon, replies.seeds),
    "npy": Target(values.fuzz_npy, values.npy_seeds),
    "safetensors": Target(values.fuzz_safetensors, values.safetensors_seeds),
    "codecs": Target(values.fuzz_codecs, values.codecs_seeds),
    "describe": Target(values.fuzz_describe, values.codecs_seeds),
    "chunk": Target(values.fuzz_chunk, values.chunk_seeds),
    "log": Target(entries.fuzz_log, entries.log_seeds),
    "announcements": Target(entries.fuzz_announcements, entries.announcements_seeds),
    "checkpoint": Target(folders.fuzz_checkpoint, folders.seeds),
}
