"""Versions of a policy's weights, from one trainer to any number of actors."""

from __future__ import annotations

import copy
import json
import math
import os
from collections.abc import Awaitable, Callable, Hashable, Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

import anyio
import anyio.to_thread
import numpy as np
from numpy.typing import NDArray

from aionpredis import streams
from aionpredis.codecs.lz4 import MAX_RATIO
from aionpredis.errors import CorruptValue, EncodeError, ServerError, UsageError
from aionpredis.formats import npy, safetensors
from aionpredis.memory import aligned_empty
from aionpredis.names import check_name, is_count
from aionpredis.requests import IN_THREAD, copied_bytes, encode_record, nbytes, set_command, ttl_options

if TYPE_CHECKING:
    from aionpredis.client import Client
    from aionpredis.wire.connection import Connection

__all__ = ["Announced", "Policy", "PolicyVersion", "PolicyWatch", "parse_announcement", "stream_of"]

T = TypeVar("T")

Weights = dict[str, NDArray[Any]]

LEASE = 60.0
"""Seconds that weights live before they are announced: a publisher that dies in between leaves nothing behind. Of several
records each has so much time: the first of three lives 180 s, the last 60."""

PART = 400 << 20
"""Bytes of weights in one record. With the longest header, 4 MB, the server takes it: 512 MiB."""

MAX_PARTS = 10_000
"""Records of one version: 4 TB."""

REMEMBERED = 64
"""Versions that a publisher knows of that were its own: with one a second, those of a minute."""

MAX_SHAPES = 1 << 20
"""Bytes of JSON that say which arrays were cut: of ~20,000 of them, 400 MB each."""


class PolicyVersion(NamedTuple):
    """``version``: 1, 2, …; ``weights``: arrays by name, in the publisher's order; writable, memory of their own."""

    version: int
    weights: dict[str, NDArray[Any]]


class Announced(NamedTuple):
    """What the stream says of a version. ``keys``: its records; ``shapes``: of the arrays that were cut."""

    version: int
    token: bytes
    keys: list[str]
    shapes: dict[str, tuple[int, ...]]


def parse_announcement(name: str, version: int, fields: Mapping[bytes, bytes]) -> Announced:
    """The entry ``version-0`` in the stream of the policy ``name``.

    Raises:
        CorruptValue: it announces no version.
    """
    try:
        token = fields[b"token"]
        parts = int(fields.get(b"parts", b"1"))
        text = fields.get(b"shapes", b"{}")
        if not 1 <= parts <= MAX_PARTS or len(text) > MAX_SHAPES:
            raise ValueError(f"{parts} parts")
        shapes = {array: tuple(shape) for array, shape in json.loads(text.decode()).items()}
        for shape in shapes.values():
            npy.payload_size(np.dtype(np.uint8), shape)  # raises if it is none
        key = f"{name}:policy:{version}:{token.decode()}"
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise CorruptValue(
            f"entry {version}-0 announces no version: {type(error).__name__}: {error!s:.80}; {streams.shown(fields)}"
        ) from None
    return Announced(version, token, [key] if parts == 1 else [f"{key}:{part}" for part in range(parts)], shapes)


def stream_of(name: str) -> str:
    """The key that announces a policy's versions."""
    return f"{{{name}}}:policy"


class Policy:
    """Published versions of a policy's weights. Made by :meth:`aionpredis.Client.policy`.

    Each version is one immutable record, a ``.safetensors`` file, under ``<name>:policy:<version>:<token>``; a small stream
    only announces it. So a thousand waiting actors cost the server a thousand small messages, and each fetches the weights
    when it wants them.

    Weights of more than 400 MiB are several such records, ``<name>:policy:<version>:<token>:<part>``, parts from 0. Arrays
    stay whole where they fit. The pieces of one that is cut have its name in consecutive parts: rows, or a flat array where
    one row is too long. The announcement says how many ``parts`` there are, and the ``shapes`` (JSON) of the arrays that
    were cut.

    Tasks of one client that wait, or fetch the same version, at the same moment do so together: one blocking read, one
    download, and a copy for each of them. Where many actors of a process need large weights, let one of them watch and
    hand its arrays to the others.

    ``name``: letters, digits, ``_``, ``.``, ``-``; a replay's policy has the replay's name. ``keep``: how many versions
    stay readable; publishing deletes older ones.
    """

    def __init__(self, client: Client, name: str, *, keep: int = 4) -> None:
        self.name = check_name(name)
        if not is_count(keep):
            raise UsageError(f"keep is a positive number of versions, not {keep!r}")
        self._client = client
        self._keep = keep
        self._stream = stream_of(name)
        self._published: list[streams.Entry] = []  # here, the last ones, also what was deleted since
        self._changes = client.faults.changes

    def __repr__(self) -> str:
        return f"<aionpredis.Policy {self.name}>"

    def _announced(self, entry: streams.Entry) -> Announced:
        """The version that this entry announces."""
        (version, _), fields = entry
        try:
            return parse_announcement(self.name, version, fields)
        except CorruptValue as error:
            error.key = self._stream
            raise

    def _keys(self, entries: Iterable[streams.Entry]) -> list[str]:
        """The records of all versions that these entries announce; those that announce none have none."""
        keys: list[str] = []
        for entry in entries:
            try:
                keys += self._announced(entry).keys
            except CorruptValue:  # somebody else's
                pass
        return keys

    async def publish(self, weights: Mapping[str, object]) -> int:
        """Make ``weights`` the newest version; its number. Publishers on other hosts may do so at the same time.

        ``weights``: what :meth:`Client.set_record` takes, of any size. Do not write to them before this returns.

        Raises:
            EncodeError: a weight's dtype cannot stand in a record; nothing was sent.
            ServerFull: the server's memory is full.
        """
        client = self._client
        try:
            if copied_bytes(weights) < IN_THREAD:
                parts, shapes = _split(weights)
            else:
                parts, shapes = await anyio.to_thread.run_sync(_split, weights)
        except EncodeError as error:
            error.key = self.name
            raise
        fields = {b"token": os.urandom(8).hex().encode()}
        if len(parts) > 1:
            fields |= {b"parts": b"%d" % len(parts), b"shapes": json.dumps(shapes).encode()}
        lease = LEASE
        while True:
            last = await streams.last_generated(client, self._stream)
            version = 1 if last is None else last[0] + 1
            keys = parse_announcement(self.name, version, fields).keys
            for index, (key, part) in enumerate(zip(keys, parts, strict=True)):
                value = await client.encode_value(encode_record, part, None, self.name)
                name = key.encode()
                await client.send(name, set_command(name, value, ttl_options(lease * (len(keys) - index))))
            if await streams.claim(client, self._stream, version, fields, make=True):
                self._published.append(((version, 0), fields))
                if await self._persist(keys):
                    break
                lease *= 2  # it ran out: they become the next version
            # What is left of them; or another publisher took this number.
            await client.count_keys("UNLINK", keys, repeatable=True)
        await self._forget(version - self._keep)
        await self._delete_lost()
        return version

    async def _withdraw(self, version: int) -> None:
        """Delete the weights of a version that was published here: readers pass over it, and find the one before it."""
        mine = [entry for entry in self._published if entry[0] == (version, 0)]
        await self._client.count_keys("UNLINK", self._keys(mine), repeatable=True)

    async def _persist(self, keys: list[str]) -> bool:
        """Let these live for ever; whether all of them do."""
        # a repeated PERSIST says 0, too
        commands = [(command, key) for command in ("PERSIST", "EXISTS") for key in keys]
        replies = await self._client.call_many(commands, repeatable=True)
        for reply in replies:
            if isinstance(reply, ServerError):
                raise reply
        return all(replies[len(keys) :])

    async def _forget(self, version: int) -> None:
        """Delete this version and the older ones: the weights first, so that a crash leaves nothing unnamed."""
        if version < 1:
            return
        old = await streams.page(self._client, self._stream, "-", f"{version}-0")
        if old:
            if keys := self._keys(old):
                await self._client.count_keys("UNLINK", keys, repeatable=True)
            await self._client.call("XTRIM", self._stream, "MINID", f"{version + 1}-0", repeatable=True)

    async def latest(self) -> PolicyVersion | None:
        """The newest version; ``None`` if none was published. Errors as for :meth:`Client.get_record`."""
        return (await self._newest(0, b""))[1]

    async def _newest(self, after: int, token: bytes) -> tuple[int, PolicyVersion | None, bytes]:
        """The newest version's number; the newest that can be read, with its token, unless that one is ``after``."""
        newest: streams.Entry | None = None
        while True:
            entries = await streams.newest(self._client, self._stream, self._keep)
            if not entries or entries[0] == newest:
                return newest[0][0] if newest else after, None, b""
            # One that is not there was deleted meanwhile, or its publisher died when it had just announced it.
            newest = entries[0]
            for entry in entries:
                announced = self._announced(entry)
                if announced.version == after and token in (b"", announced.token):
                    return newest[0][0], None, b""
                found = await self._load(announced)
                if found is not None:
                    return newest[0][0], found, announced.token

    async def get(self, version: int) -> PolicyVersion | None:
        """That version; ``None`` if there is none, or it was deleted as old. Errors as for :meth:`Client.get_record`."""
        entry = f"{_number(version)}-0"
        entries = await streams.page(self._client, self._stream, entry, entry)
        return await self._load(self._announced(entries[0])) if entries else None

    async def _load(self, announced: Announced) -> PolicyVersion | None:
        """The version that was announced so; ``None`` unless all of it is there."""
        weights = await _together(self._client, announced.keys[0], partial(self._fetch, announced), _copy)
        return None if weights is None else PolicyVersion(announced.version, weights)

    async def _fetch(self, announced: Announced) -> Weights | None:
        """The weights in these records: views on what was received, except that arrays that were cut are put together.

        Raises:
            CorruptValue: the pieces of an array are not the shape that was announced.
        """
        shapes = announced.shapes
        room = await self._room(announced) if shapes else 0
        weights: Weights = {}
        missing: Weights = {}  # flat, of the arrays that were cut
        for key in announced.keys:
            value = await self._client.get_value(key, immutable=True)
            if value is None:
                return None
            record = await self._client.open_record(value, key)
            for name, array in record.items():
                if name not in shapes:
                    weights[name] = array
                    continue
                if name not in weights:
                    room -= array.itemsize * math.prod(shapes[name])
                    if room < 0:
                        raise CorruptValue(f"column {name!r} has less than the shape {shapes[name]} needs", key=key)
                    weights[name] = _empty(array.dtype, shapes[name])
                    missing[name] = weights[name].reshape(-1)
                place, missing[name] = np.split(missing[name], [array.size])
                if place.size != array.size or place.dtype != array.dtype:
                    raise CorruptValue(f"column {name!r} does not fit the shape {shapes[name]}", key=key)
                await _assign([place], [array.reshape(-1)])
        for name in shapes:
            if name not in weights or missing[name].size:
                raise CorruptValue(
                    f"column {name!r} has not all items of the shape {shapes[name]}", key=announced.keys[0]
                )
        return weights

    async def _delete_lost(self) -> None:
        """Delete what was published here, and is not announced (any more), if a failover may have taken the announcement or
        brought the weights back: nobody else knows of them, and newer weights have taken their place.
        """
        changes = self._client.faults.changes
        if changes != self._changes:
            published = tuple(self._published)  # before looking: another task may announce one meanwhile
            present = await streams.page(self._client, self._stream, "-", "+")
            lost = [entry for entry in published if entry not in present]
            await self._client.count_keys("UNLINK", self._keys(lost), repeatable=True)
            self._changes = changes
        del self._published[: -max(self._keep, REMEMBERED)]

    async def _room(self, announced: Announced) -> int:
        """Bytes that the arrays in these records can have at most."""
        lengths = await self._client.call_many([("STRLEN", key) for key in announced.keys], repeatable=True)
        for key, length in zip(announced.keys, lengths, strict=True):
            if isinstance(length, ServerError):
                raise length.about("STRLEN", key)
        return int(sum(lengths)) * MAX_RATIO  # they may be compressed

    async def delete(self) -> int:
        """Delete all versions; how many keys these were. Who publishes afterwards begins with version 1 again.

        The weights first, and the stream when it is empty: after a crash, or if somebody publishes meanwhile, none is unnamed.
        """
        client, stream = self._client, self._stream
        published = tuple(self._published)
        deleted = await client.count_keys("UNLINK", self._keys(published), repeatable=True)
        removed: int | None = None
        while removed is None:
            while entries := await streams.page(client, stream, "-", "+"):
                deleted += await client.count_keys("UNLINK", self._keys(entries), repeatable=True)
                left, right = entries[-1][0]
                await client.call("XTRIM", stream, "MINID", f"{left}-{right + 1}", repeatable=True)
            removed = await streams.alone(client, stream, self._remove_empty)
        self._published = [entry for entry in self._published if entry not in published]
        return deleted + removed

    async def _remove_empty(self, connection: Connection) -> int | None:
        """Remove the stream; ``None``: somebody has published meanwhile. Otherwise how many keys that were."""
        stream = self._stream
        _, left = await streams.ask(connection, ("WATCH", stream), ("XRANGE", stream, "-", "+", "COUNT", 1))
        if left:
            await streams.ask(connection, ("UNWATCH",))
            return None
        _, _, removed = await streams.ask(connection, ("MULTI",), ("UNLINK", stream), ("EXEC",))
        return None if removed is None else int(removed[0])

    def watch(self, after: int = 0) -> PolicyWatch:
        """``async for version, weights in policy.watch():`` each time the newest version to date, as it appears.

        ``after``: begin behind that version; 0 yields the present one first. Versions published in quick succession are
        skipped over. Waits for ever if nothing is published.
        """
        return PolicyWatch(self, _number(after))


class PolicyWatch:
    """Iterator of :meth:`aionpredis.Policy.watch`; nothing has to be closed."""

    def __init__(self, policy: Policy, after: int) -> None:
        self._policy = policy
        self._after = after
        self._token = b""

    def __aiter__(self) -> PolicyWatch:
        return self

    async def __anext__(self) -> PolicyVersion:
        policy = self._policy
        while True:
            # Any other version is news: a smaller number means that the stream was deleted and begun again.
            newest, found, token = await policy._newest(self._after, self._token)
            if found is not None:
                self._after, self._token = found.version, token
                return found
            read = partial(streams.read_blocking, policy._client, policy._stream, (newest, 0), 1)
            await _together(policy._client, (policy._stream, newest), read)


def _number(version: int) -> int:
    """0 stands for none."""
    if not (is_count(version, 0) and version <= streams.RIGHT_MAX):
        raise UsageError(f"a version is a number, 1 the first, not {version!r}")
    return version


def _split(weights: Mapping[str, object]) -> tuple[list[Weights], dict[str, tuple[int, ...]]]:
    """Records of at most ``PART`` bytes of data, in order; and the shapes of the arrays that are cut for that.

    They borrow the memory of the weights, except where an array that is not contiguous is cut within a row.

    Raises:
        EncodeError: names the column that cannot stand in a record.
    """
    if not isinstance(weights, Mapping):
        raise EncodeError(f"weights are a mapping of names to arrays, not {type(weights).__qualname__}")
    arrays: Weights = {}
    for name, value in weights.items():
        try:
            arrays[name] = npy.as_array(value)
        except EncodeError as error:
            raise EncodeError(f"column {name!r}: {error}") from error
    safetensors.layout({name: (array.dtype, array.shape) for name, array in arrays.items()})  # raises, now or never
    parts: list[Weights] = [{}]
    shapes: dict[str, tuple[int, ...]] = {}
    room = PART
    for name, array in arrays.items():
        pieces = [array]
        if array.nbytes > PART:
            shapes[name] = array.shape
            pieces = _cut(array)
        for piece in pieces:
            if piece.nbytes > room:
                parts.append({})
                room = PART
            parts[-1][name] = piece
            room -= piece.nbytes
    return parts, shapes


def _cut(array: NDArray[Any]) -> list[NDArray[Any]]:
    """Pieces of at most ``PART`` bytes, and no two that would fit into one: rows, or items where one row is longer."""
    rows = array if array.ndim and array.nbytes // len(array) <= PART else array.reshape(-1)
    step = max(1, PART * len(rows) // rows.nbytes)
    return [rows[start : start + step] for start in range(0, len(rows), step)]


def _empty(dtype: np.dtype[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    """An uninitialised array in memory of its own, aligned to 64 bytes."""
    return np.ndarray(shape, dtype, aligned_empty(npy.payload_size(dtype, shape)).data)


async def _copy(weights: Weights | None) -> Weights | None:
    if weights is None:
        return None
    copies = {name: _empty(array.dtype, array.shape) for name, array in weights.items()}
    await _assign(list(copies.values()), list(weights.values()))
    return copies


async def _assign(targets: list[NDArray[Any]], sources: list[NDArray[Any]]) -> None:
    """Copy each source into its target; in a worker thread if that is much: other tasks go on."""

    def assign() -> None:
        for target, source in zip(targets, sources, strict=True):
            np.copyto(target, source)

    if sum(map(nbytes, sources)) < IN_THREAD:
        assign()
    else:
        await anyio.to_thread.run_sync(assign)


class _Flight:
    """What several tasks wait for, and one of them does. ``landed``: it has a result, which may be an error."""

    def __init__(self) -> None:
        self.over = anyio.Event()
        self.callers = 0
        self.landed = False
        self.result: Any = None


_flights: WeakKeyDictionary[Client, dict[Hashable, _Flight]] = WeakKeyDictionary()


async def _together(
    client: Client, what: Hashable, work: Callable[[], Awaitable[T]], share: Callable[[T], Awaitable[T]] | None = None
) -> T:
    """The result of ``work()``, done once for all tasks of ``client`` that want ``what`` at the same moment.

    One does it, the others wait. If it is cancelled, another one begins; if it fails, all of them do. With ``share``, which
    copies, no two callers get the same result; the last one, or a lone one, gets it uncopied.
    """
    flights = _flights.setdefault(client, {})
    while True:
        flight = flights.get(what)
        leads = flight is None
        if flight is None:
            flight = flights[what] = _Flight()
        flight.callers += 1
        try:
            if leads:
                try:
                    flight.result = await work()
                    flight.landed = True
                except Exception as error:
                    flight.result, flight.landed = error, True
                    raise
                finally:
                    del flights[what]
                    flight.over.set()
            else:
                await flight.over.wait()
                if not flight.landed:
                    continue
                if isinstance(flight.result, Exception):
                    raise copy.copy(flight.result)  # one instance raised in two tasks would mix their tracebacks
            result: T = flight.result
            return result if share is None or flight.callers == 1 else await share(result)
        finally:
            flight.callers -= 1
