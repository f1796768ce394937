"""One value between the server and a file."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import anyio.to_thread
import numpy as np
from numpy.typing import NDArray

from aionpredis import codecs
from aionpredis.cli.survey import Entry, key_of, look, shown
from aionpredis.codecs import Kind
from aionpredis.errors import DecodeError, NotAnArray, UsageError, WrongKind
from aionpredis.names import check_name
from aionpredis.replay.log import Names
from aionpredis.requests import MAX_VALUE
from aionpredis.wire.resp import Buffer

if TYPE_CHECKING:
    from aionpredis.client import Client

__all__ = ["Arrays", "load", "looked", "opened", "source", "write"]

Arrays = dict[str, NDArray[Any]]
"""Columns of a record; an array is the only one, and its name is empty."""


async def looked(client: Client, name: str) -> Entry:
    """What is stored there.

    Raises:
        UsageError: nothing.
    """
    for entry in await look(client, [key_of(name)]):
        return entry
    try:
        is_replay = await client.exists(Names(check_name(name)).log)
    except UsageError:
        is_replay = False
    raise UsageError(
        f"no such key: {shown(name)}" + (f"; it is a replay: see `aionpredis ls {name}`" if is_replay else "")
    )


async def load(client: Client, entry: Entry) -> tuple[Kind, Arrays]:
    """What the key holds; the arrays share memory that is nobody else's.

    Raises:
        NotAnArray: neither an array nor a record.
    """
    if entry.stored is None:
        raise NotAnArray(f"a {entry.kind} is stored, neither an array nor a record", key=entry.key)
    value = await client.get_value(entry.key)
    if value is None:
        raise UsageError(f"no such key any more: {shown(entry.key)}")
    return await anyio.to_thread.run_sync(opened, value.data, entry.key)


def opened(value: memoryview, key: bytes | None = None) -> tuple[Kind, Arrays]:
    """What a value or a file holds: views on it, unless it is compressed."""
    try:
        return Kind.ARRAY, {"": codecs.open_array(value, max_bytes=MAX_VALUE, key=key)}
    except WrongKind:
        return Kind.RECORD, codecs.open_record(value, max_bytes=MAX_VALUE, key=key)


def source(path: Path) -> tuple[Kind, Arrays]:
    """What a file holds, by its content, whatever its name; ``-``: stdin. A file is mapped, not read: its pages come when
    they are sent.

    Raises:
        UsageError: it holds neither an array nor a record; pickled objects, too.
    """
    try:
        if path == Path("-"):
            return opened(np.frombuffer(sys.stdin.buffer.read(), np.uint8).data)
        if path.stat().st_size == 0:
            raise NotAnArray("it is empty")
        return opened(np.memmap(path, np.uint8, "r").data)
    except DecodeError as error:
        raise UsageError(f"{path}: {error}") from None


def write(path: Path, parts: Sequence[Buffer]) -> None:
    """Write a file that has its name when it is complete; ``-``: to stdout."""
    if path == Path("-"):
        for part in parts:
            sys.stdout.buffer.write(part)
        sys.stdout.buffer.flush()
        return
    if path.is_dir():
        raise UsageError(f"{path} is a folder: name a file")
    partial = path.with_name(f".{path.name[:200]}.{os.urandom(4).hex()}.partial")
    try:
        with partial.open("xb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
