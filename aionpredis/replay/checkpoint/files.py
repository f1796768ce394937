"""The files of a saved replay: records, ``replay.json``, and the folder around them. All of it blocks."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aionpredis.errors import CorruptValue, DecodeError, UsageError
from aionpredis.formats import safetensors
from aionpredis.formats.safetensors import Layout
from aionpredis.memory import ALIGNMENT, aligned_empty
from aionpredis.names import check_name
from aionpredis.wire.resp import Buffer

__all__ = [
    "FORMAT",
    "LOG",
    "VERSION",
    "Arrays",
    "Extra",
    "beside",
    "discard",
    "extra_path",
    "finish",
    "load_extra",
    "make_beside",
    "opened",
    "read_header",
    "read_record",
    "saved_facts",
    "write_record",
]

Arrays = dict[str, NDArray[Any]]
Extra = Mapping[str, Mapping[str, object]]
"""Arrays by file and name."""

FORMAT, VERSION = "aionpredis.replay", 1
"""What ``replay.json`` says that the folder is."""

LOG: dict[str, tuple[str, tuple[int, ...]]] = {
    "log.incarnation": ("uint8", (8,)),
    "log.seq": ("int64", ()),
    "log.rows": ("int64", ()),
    "log.episode_end": ("bool", ()),
}
"""What a bundle holds beside the columns: of each chunk, the last one of each transition."""

_BUNDLE = re.compile(r"transitions-\d{5,9}\.safetensors")


def write_record(path: Path, record: Mapping[str, object], metadata: Mapping[str, str] | None = None) -> int:
    """Write a ``.safetensors`` file to the disk; its size."""
    header, views = safetensors.encode(record)
    if metadata:
        tree = json.loads(header[8:])
        tree = {safetensors.METADATA: tree.pop(safetensors.METADATA, {}) | metadata} | tree
        text = json.dumps(tree, separators=(",", ":"), ensure_ascii=False).encode()
        text = text.ljust(-(-(8 + len(text)) // ALIGNMENT) * ALIGNMENT - 8)
        header = len(text).to_bytes(8, "little") + text
    return _write(path, [header, *views])


def _write(path: Path, parts: Sequence[Buffer]) -> int:
    with path.open("xb") as file:
        for part in parts:
            file.write(part)
        file.flush()
        os.fsync(file.fileno())
    return sum(map(len, parts))


def read_record(path: Path) -> Arrays:
    """The record in a whole ``.safetensors`` file. Its arrays share one block of memory that is nobody else's.

    Raises:
        UsageError: there is no such file.
        CorruptValue: it is none, or was cut off.
    """
    with opened(path) as file:
        size = os.fstat(file.fileno()).st_size
        memory = aligned_empty(size)
        if file.readinto(memory.data) != size:
            raise CorruptValue(f"{path}: it became shorter meanwhile")
    try:
        return safetensors.decode(memory.data)
    except DecodeError as error:
        raise CorruptValue(f"{path}: {error}") from None


def read_header(path: Path, file: io.BufferedReader) -> Layout:
    """Where everything is in this file, whose size agrees with that."""
    size = os.fstat(file.fileno()).st_size
    head = file.read(8)
    head += file.read(min(size, safetensors.MAX_HEADER, int.from_bytes(head, "little")))
    try:
        layout = safetensors.parse(memoryview(head))
    except DecodeError as error:
        raise CorruptValue(f"{path}: {error}") from None
    if layout.size != size:
        raise CorruptValue(f"{path}: its header promises {layout.size:,} bytes, it has {size:,}")
    return layout


def opened(path: Path) -> io.BufferedReader:
    try:
        return path.open("rb")
    except (FileNotFoundError, NotADirectoryError):
        raise UsageError(f"{path} is missing") from None
    except IsADirectoryError:
        raise UsageError(f"{path} is a folder, not a file") from None


def _sync_folder(folder: Path) -> None:
    if hasattr(os, "O_DIRECTORY"):  # elsewhere a folder cannot be opened
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def beside(folder: Path) -> Path:
    """A name for what will become ``folder``."""
    return folder.parent / f"{folder.name}.partial-{os.urandom(4).hex()}"


def make_beside(folder: Path, partial_folder: Path) -> None:
    """Make the folder for what will become ``folder``."""
    if folder.exists() or folder.is_symlink():
        raise UsageError(f"{folder} exists already")
    if not folder.parent.is_dir():
        raise UsageError(f"{folder.parent}: there is no such folder")
    partial_folder.mkdir()


def finish(partial_folder: Path, folder: Path, facts: Mapping[str, Any]) -> None:
    """Describe what was written, and give it its name."""
    text = json.dumps(facts, indent=2) + "\n"
    _write(partial_folder / "replay.json", [text.encode()])
    _sync_folder(partial_folder)
    try:
        if folder.exists():  # an empty one would be replaced
            raise FileExistsError
        partial_folder.rename(folder)
    except OSError as error:
        if folder.exists():
            raise UsageError(f"{folder} exists already: somebody made it meanwhile") from error
        raise
    _sync_folder(folder.parent)


def discard(partial_folder: Path, folder: Path | None) -> None:
    """Delete what was written; ``folder``: the name that it has got already. Nobody sees half of it there."""
    if folder is not None:
        with suppress(OSError):
            folder.rename(partial_folder)
    shutil.rmtree(partial_folder, ignore_errors=True)


def extra_path(folder: Path, name: str) -> Path:
    check_name(name)
    if name == "policy" or _BUNDLE.fullmatch(f"{name}.safetensors"):
        raise UsageError(f"the file {name}.safetensors of a saved replay is something else already")
    return folder / f"{name}.safetensors"


def load_extra(folder: str | os.PathLike[str], name: str) -> Arrays:
    """The arrays that were saved with a replay as ``extra={name: …}``, in memory of their own. Reads a file: blocks.

    Raises:
        UsageError: there is no such file.
        CorruptValue: it was damaged.
    """
    return read_record(extra_path(Path(folder), name))


def saved_facts(folder: Path) -> dict[str, Any]:
    """What ``replay.json`` says of a saved replay. Reads a file: blocks.

    Raises:
        UsageError: there is no such folder, it is something else, or of a newer version.
        CorruptValue: the file was damaged.
    """
    path = folder / "replay.json"
    if not folder.is_dir():
        raise UsageError(f"{folder}: there is no such folder")
    with opened(path) as file:
        text = file.read()
    try:
        facts: dict[str, Any] = json.loads(text)
        if facts["format"] != FORMAT or not isinstance(facts["version"], int):
            raise UsageError(f"{path} does not describe a saved replay")
        if facts["version"] > VERSION:
            raise UsageError(f"{path} is of version {facts['version']}; this aionpredis reads up to {VERSION}")
        check_name(facts["name"])
        for column in facts["columns"].values():
            column["shape"] = tuple(column["shape"])
            np.empty((0, *column["shape"]))
            if not isinstance(column["dtype"], str):
                raise TypeError("a dtype is a name")
        if not isinstance(facts["transitions"], int) or not isinstance(facts["policy"], int | None):
            raise TypeError("a count is none")
        for bundle in facts["bundles"]:
            if not _BUNDLE.fullmatch(bundle["file"]):
                raise ValueError(f"{bundle['file']!r} is no bundle's name")
    except UsageError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CorruptValue(f"{path} makes no sense: {type(error).__name__}: {error}") from None
    return facts
