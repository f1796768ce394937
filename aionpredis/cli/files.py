"""``aionpredis get`` and ``put``: one array, or one record, and a file."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from aionpredis.cli.common import AsJson, Url, fail, given, in_one_line, print_json, shown, with_client

if TYPE_CHECKING:
    from aionpredis.client import Client
    from aionpredis.wire.resp import Buffer

__all__ = ["get", "put"]

Key = Annotated[str, typer.Argument(help="Of an array or a record.")]


def get(
    key: Key,
    file: Annotated[Path, typer.Argument(help=".npy of an array, .safetensors of a record; - is stdout.")],
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """Store an array, or a record, as a file. The file is there when it is complete.

    A pipe or a device is written to, and a link stays one.
    """
    if file == Path("-") and (as_json or sys.stdout.isatty()):
        fail("a file on stdout, which is a terminal" if not as_json else "a file and JSON on the same stdout", 2)

    import anyio.to_thread

    from aionpredis.cli import values
    from aionpredis.codecs import Kind
    from aionpredis.errors import UsageError
    from aionpredis.requests import encode_array, encode_record

    is_stream = file == Path("-") or values.is_stream(file)

    async def work(client: Client) -> tuple[dict[str, Any], Sequence[Buffer]]:
        entry = await values.looked(client, key)
        kind, arrays = await values.load(client, entry)
        if file.suffix in (".npy", ".safetensors") and file.suffix != kind.value:
            what = "an array" if kind is Kind.ARRAY else "a record"
            raise UsageError(f"{what} is stored: name the file …{kind.value}, not {file.name}")
        parts = encode_array(arrays[""], None) if kind is Kind.ARRAY else encode_record(arrays, None)
        if not is_stream:
            await anyio.to_thread.run_sync(values.write, file, parts)
        return entry.as_dict() | {"file": str(file), "file_bytes": sum(map(len, parts))}, parts

    facts, parts = with_client(url, work)
    if is_stream:
        with in_one_line():  # in no thread: however long nobody reads it, Ctrl-C ends it
            if file != Path("-"):
                values.write(file, parts)
            else:
                sys.stdout.buffer.writelines(parts)
                sys.stdout.buffer.flush()
    if as_json:
        print_json(facts)
    elif not is_stream:  # which may be stdout
        print(f"{shown(bytes(file))}: {facts['file_bytes']:,} bytes")


def put(
    key: Key,
    file: Annotated[Path, typer.Argument(help="A .npy or .safetensors file; - is stdin.")],
    url: Url = None,
    codec: Annotated[str | None, typer.Option(help="How it is stored: raw, lz4; default: raw.")] = None,
    ttl: Annotated[float | None, typer.Option(help="Seconds to live; default: for ever.")] = None,
    as_json: AsJson = False,
) -> None:
    """Store a file as an array or a record, which it is by its content. Nothing that is pickled is read."""
    from aionpredis.cli import values
    from aionpredis.cli.survey import key_of
    from aionpredis.codecs import Kind

    given(url)
    with in_one_line():  # before there is a loop: however long nobody writes to stdin, Ctrl-C ends it
        kind, arrays = values.source(file)

    async def work(client: Client) -> dict[str, Any]:
        if kind is Kind.ARRAY:
            await client.set(key_of(key), arrays[""], ttl=ttl, codec=codec)
        else:
            await client.set_record(key_of(key), arrays, ttl=ttl, codec=codec)
        return (await values.looked(client, key)).as_dict()

    facts = with_client(url, work)
    if as_json:
        print_json(facts)
    else:
        stored = facts["stored_bytes"]
        what = f"{facts['kind']}, {stored:,} bytes stored" if stored is not None else f"stored; {facts['problem']}"
        print(f"{shown(key_of(key))}: {shown(what)}")
