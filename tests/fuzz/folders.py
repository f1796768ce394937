"""The folder of a saved replay, one of its files replaced."""

from __future__ import annotations

import atexit
import json
import shutil
import tempfile
from functools import cache
from pathlib import Path

import numpy as np

from aionpredis import Schema
from aionpredis.errors import CorruptValue, SchemaMismatch, UsageError
from aionpredis.formats import safetensors
from aionpredis.replay.checkpoint import Saved
from aionpredis.replay.checkpoint.files import FORMAT, VERSION, write_record

from .guard import at_most

SCHEMA = Schema(state=("uint8", (3,)), uid="int64", terminated="bool")
FILES = ("replay.json", "transitions-00000.safetensors", "policy.safetensors")


@cache
def _folder() -> Path:
    """A saved replay."""
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    rows = 5
    record: dict[str, object] = {name: np.zeros((rows, *shape), dtype) for name, (dtype, shape) in SCHEMA.items()}
    record |= {
        "log.incarnation": np.zeros((2, 8), np.uint8),
        "log.seq": np.arange(2),
        "log.rows": np.array([2, 3]),
        "log.episode_end": np.arange(rows) == 1,
    }
    write_record(folder / FILES[1], record)
    write_record(folder / FILES[2], {"w": np.zeros(3)}, {"version": "4"})
    facts = {
        "format": FORMAT,
        "version": VERSION,
        "name": "r",
        "run": 7,
        "columns": {name: {"dtype": dtype.name, "shape": shape} for name, (dtype, shape) in SCHEMA.items()},
        "transitions": rows,
        "chunks": 2,
        "policy": 4,
        "bundles": [{"file": FILES[1], "transitions": rows}],
    }
    (folder / FILES[0]).write_text(json.dumps(facts))
    return folder


def fuzz_checkpoint(data: bytes) -> None:
    """A saved replay with a file of these bytes (the first one chooses which): looked through, or an error."""
    if not data:
        return
    path = _folder() / FILES[data[0] % 3]
    original = path.read_bytes()
    path.write_bytes(data[1:])
    safetensors._parsed.clear()
    try:
        with at_most(100_000 + 64 * len(data)):
            saved = Saved(_folder(), "r", SCHEMA)
            assert saved.transitions == sum(chunk.rows for file in saved._files for chunk in file.chunks)
    except (UsageError, CorruptValue, SchemaMismatch) as error:
        assert len(str(error)) < 2000
    finally:
        path.write_bytes(original)


def seeds() -> list[bytes]:
    whole = [bytes([number]) + (_folder() / name).read_bytes() for number, name in enumerate(FILES)]
    facts = json.loads(whole[0][1:])
    lies: list[dict[str, object]] = [
        {"columns": []},
        {"columns": {"state": {"dtype": "O", "shape": [-1]}}},
        {"bundles": [{"file": "../transitions-00000.safetensors"}]},
        {"transitions": 6},
        {"policy": "4"},
    ]
    rows = np.array([2, 3]).tobytes()
    return [
        *whole,
        *(b"\0" + json.dumps(facts | lie).encode() for lie in lies),
        *(whole[1].replace(rows, np.array(wrong).tobytes()) for wrong in ([2, 4], [5, 0], [-1, 6], [2**40, 3])),
    ]
