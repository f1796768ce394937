"""One value between the server and a file."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

import anyio
import anyio.to_thread
import numpy as np
from numpy.typing import NDArray

from aionpredis import codecs
from aionpredis.cli.common import shown
from aionpredis.cli.survey import Entry, key_of, look
from aionpredis.codecs import Kind
from aionpredis.errors import AionpredisError, DecodeError, NotAnArray, UsageError, WrongKind
from aionpredis.names import check_name
from aionpredis.replay.log import Names
from aionpredis.requests import MAX_VALUE
from aionpredis.wire.resp import Buffer

if TYPE_CHECKING:
    from io import BufferedIOBase

    from aionpredis.client import Client

__all__ = ["Arrays", "is_stream", "load", "looked", "opened", "permitted", "source", "write"]

Arrays = dict[str, NDArray[Any]]
"""Columns of a record; an array is the only one, and its name is empty."""


async def looked(client: Client, name: str) -> Entry:
    """What is stored there.

    Raises:
        AionpredisError: nothing.
    """
    for entry in await look(client, [key_of(name)]):
        return entry
    try:
        is_replay = await client.exists(Names(check_name(name)).log)
    except UsageError:
        is_replay = False
    raise AionpredisError(
        f"no such key: {shown(name)}" + (f"; it is a replay: see `aionpredis ls {name}`" if is_replay else "")
    )


def permitted(entry: Entry) -> Entry:
    """The entry.

    Raises:
        AionpredisError: this user may not look at what is stored there.
    """
    if entry.kind == "forbidden":
        raise AionpredisError(f"{shown(entry.key)}: {entry.problem}")
    return entry


async def load(client: Client, entry: Entry) -> tuple[Kind, Arrays]:
    """What the key holds; the arrays share memory that is nobody else's.

    Raises:
        NotAnArray: neither an array nor a record.
        AionpredisError: this user may not look at it, or it is gone.
    """
    if permitted(entry).stored is None:
        raise NotAnArray(f"a {entry.kind} is stored, neither an array nor a record", key=entry.key)
    value = await client.get_value(entry.key)
    if value is None:
        raise AionpredisError(f"no such key any more: {shown(entry.key)}")
    return await anyio.to_thread.run_sync(opened, value.data, entry.key)


def opened(value: memoryview, key: bytes | None = None) -> tuple[Kind, Arrays]:
    """What a value or a file holds: views on it, unless it is compressed."""
    try:
        return Kind.ARRAY, {"": codecs.open_array(value, max_bytes=MAX_VALUE, key=key)}
    except WrongKind:
        return Kind.RECORD, codecs.open_record(value, max_bytes=MAX_VALUE, key=key)


def source(path: Path) -> tuple[Kind, Arrays]:
    """What a file holds, by its content, whatever its name; ``-``: stdin. A file is mapped, not read: its pages come when
    they are sent. Stdin and pipes are read. Blocks until they end, so no event loop may wait for it.

    Raises:
        DecodeError: it holds neither an array nor a record; pickled objects, too.
    """
    try:
        if path == Path("-"):
            return opened(_read(sys.stdin.buffer))
        if not path.is_file():
            with path.open("rb") as file:
                return opened(_read(file))
        if path.stat().st_size == 0:
            raise NotAnArray("it is empty")
        return opened(np.memmap(path, np.uint8, "r").data)
    except DecodeError as error:
        raise DecodeError(f"{path}: {error}") from None


def _read(file: BinaryIO) -> memoryview:
    """All of it. Piece by piece: read() to the end waits in C, and misses a Ctrl-C that comes while it copies."""
    data = bytearray()
    while len(data) <= MAX_VALUE and (part := cast("BufferedIOBase", file).read1(1 << 20)):
        data += part
    if len(data) > MAX_VALUE:
        raise NotAnArray(f"it has more than {MAX_VALUE >> 20} MiB, which no value has")
    return memoryview(data)


def is_stream(path: Path) -> bool:
    """Whether a pipe or a device is there. No thread may write to it: however long nobody reads it, Ctrl-C has to end that."""
    return path.exists() and not path.is_file() and not path.is_dir()


def write(path: Path, parts: Sequence[Buffer]) -> None:
    """Write a file that has its name when it is complete, there where a link leads to, and the mode of the one that it
    replaces; or into a pipe or a device.
    """
    if path.is_dir():
        raise UsageError(f"{path} is a folder: name a file")
    if is_stream(path):
        with path.open("wb") as stream:
            stream.writelines(parts)
        return
    path = Path(os.path.realpath(path))
    partial = path.with_name(f".{path.name[:50]}.{os.urandom(4).hex()}.partial")  # a character has up to 4 of 255 bytes
    try:
        with partial.open("xb") as file:
            if path.exists():  # before anything is in it that the old file's mode kept from others
                shutil.copymode(path, partial)
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
