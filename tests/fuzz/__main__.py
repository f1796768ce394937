"""``python -m tests.fuzz [TARGET …] [--seconds N]``: each target (default: all) for so long, guided by coverage.

What was learned is kept under ``.fuzz/TARGET`` for the next time. Bytes that a target fails with are written there, too,
and the exit code is 1. Needs atheris, ``pip install -e '.[test,fuzz]'``, which is not made for every platform.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
import tracemalloc
import warnings
from pathlib import Path

FOLDER = Path(".fuzz")
NAMES = ("resp", "abandon", "npy", "safetensors", "codecs", "describe", "chunk", "log", "announcements", "checkpoint")
MAX_LENGTH = 1024
"""Bytes of input. Longer ones are slower, and find nothing more: what has a limit is fed with a small one."""


def fuzz(name: str, seconds: int) -> None:
    """Does not return: libFuzzer ends the process."""
    import atheris

    with atheris.instrument_imports(include=["aionpredis", "numpy.lib"]):
        from .targets import TARGETS

    target = TARGETS[name]
    corpus = FOLDER / name
    corpus.mkdir(parents=True, exist_ok=True)
    for seed in target.seeds():
        (corpus / hashlib.sha1(seed, usedforsecurity=False).hexdigest()).write_bytes(seed)
    warnings.simplefilter("error")
    tracemalloc.start()
    options = {
        "max_total_time": seconds,
        "max_len": MAX_LENGTH,
        "timeout": 10,
        "rss_limit_mb": 2048,
        "artifact_prefix": f"{FOLDER}/{name}-",
        "print_final_stats": 1,
        "verbosity": 0,
    }
    atheris.Setup([name, *(f"-{option}={value}" for option, value in options.items()), str(corpus)], target.run)
    atheris.Fuzz()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=", ".join(NAMES))
    parser.add_argument("--seconds", type=int, default=60, help="for each target (default: 60)")
    options = parser.parse_args()
    if unknown := set(options.targets) - set(NAMES):
        parser.error(f"no such target: {', '.join(sorted(unknown))}")
    failed = 0
    memory = Path("/dev/shm")
    for name in options.targets or NAMES:
        print(f"=== {name}", flush=True)
        code = f"from tests.fuzz.__main__ import fuzz; fuzz({name!r}, {options.seconds})"
        # libFuzzer ends its process without any cleaning up.
        with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
            environment = {**os.environ, "TMPDIR": folder}
            failed |= subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode != 0
    return failed


if __name__ == "__main__":
    sys.exit(main())
