"""Arrays and records by key."""

from __future__ import annotations

import copy
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

import anyio
import anyio.to_thread
import numpy as np
from numpy.typing import NDArray

from aionpredis import codecs
from aionpredis.codecs import Codec
from aionpredis.commands import check_shared, has_not_run, key_of, refused
from aionpredis.errors import (
    AionpredisError,
    ConnectError,
    ConnectionLost,
    EncodeError,
    OutcomeUnknown,
    OutMismatch,
    ServerError,
    ServerUnavailable,
    UsageError,
)
from aionpredis.formats import npy
from aionpredis.memory import aligned_empty
from aionpredis.names import is_count
from aionpredis.pipeline import Pipeline
from aionpredis.requests import (
    IN_THREAD,
    MAX_VALUE,
    SLICE,
    Key,
    ValueReply,
    copied_bytes,
    encode_array,
    encode_record,
    key_bytes,
    nbytes,
    ok_reply,
    parts_reply,
    row_views,
    set_command,
    slice_keys,
    ttl_options,
    value_reply,
    values_command,
)
from aionpredis.retry import LOST, Faults, Retry
from aionpredis.stats import Counters, Stats
from aionpredis.wire import resp
from aionpredis.wire.cluster import Cluster
from aionpredis.wire.connection import Connection
from aionpredis.wire.dial import Dialer, seconds
from aionpredis.wire.discovery import ClusterDialer, open_source
from aionpredis.wire.resp import Buffer, Reply
from aionpredis.wire.shard import Shard
from aionpredis.wire.source import Servers
from aionpredis.wire.topology import OneServer, Topology

if TYPE_CHECKING:
    from aionpredis.policy import Policy
    from aionpredis.replay import Replay, Schema
    from aionpredis.server import Server
    from aionpredis.writer import Writer

__all__ = ["Client", "connect"]

T = TypeVar("T")

MAX_INFLIGHT = 64 << 20
"""Bytes that a writer holds unless it is told otherwise."""

SCAN_KEYS = 1000
"""Keys that a server looks at for one page: ~0.3 ms of its time, during which nobody else is answered."""


class Client:
    """Connections to a server or to a cluster, to be used with ``async with``; made by :func:`connect`.

    Any number of tasks of one event loop may use it at once: their requests share a connection to each server and overlap.
    Cancelling a call is always safe: nothing is written into ``out=`` afterwards, and no other caller is disturbed.
    """

    def __init__(
        self,
        source: Servers | None,
        *,
        codec: str | Codec | None,
        timeout: float,
        connect_timeout: float,
        retry_timeout: float,
        max_value_bytes: int,
        read_replicas: bool,
        options: Mapping[str, Any],
    ) -> None:
        if not is_count(max_value_bytes):
            raise UsageError(f"max_value_bytes is a positive number of bytes, not {max_value_bytes!r}")
        timeout, connect_timeout = seconds("timeout", timeout), seconds("connect_timeout", connect_timeout)
        self.codec = codecs.resolve(codec)
        self.counters = Counters()
        self.faults = Faults(retry_timeout=retry_timeout, timeout=timeout, counters=self.counters)
        self._settings: dict[str, Any] = {
            "timeout": timeout,
            "connect_timeout": connect_timeout,
            "max_bulk": max_value_bytes,
            "counters": self.counters,
            **options,
        }
        self._max_value_bytes = max_value_bytes
        self._read_replicas = read_replicas
        source = source if source is not None else os.environ.get("REDIS_URL") or None  # an empty one is none
        # An URL's mistakes show at once, not when it is first used.
        self._dialer = None if source is None else open_source(source, **self._settings)
        self._embedded: Server | None = None
        self._topology: Topology | None = None
        self._twin_of: Client | None = None
        self._twins: set[Client] = set()
        self._last_loaded = b"", 0  # header and payload bytes of an array that mget() loaded

    @property
    def url(self) -> str:
        """Where the server is, without user and password."""
        return "the embedded server" if self._dialer is None else self._dialer.url

    @property
    def is_embedded(self) -> bool:
        """Whether the server lives as long as this client."""
        return self._embedded is not None

    def __repr__(self) -> str:
        return f"<aionpredis.Client {self.url} {'open' if self._topology else 'closed'}>"

    async def __aenter__(self) -> Client:
        if self._topology is not None:
            raise UsageError("this client is open already")
        if self._twin_of is not None:
            self._topology = self._twin_of.topology.twin()
            self._twin_of._twins.add(self)
            return self
        try:
            if self._dialer is None:
                from aionpredis.server import Server

                self._embedded = Server()
                await anyio.to_thread.run_sync(self._embedded.start)
                self._dialer = Dialer(self._embedded.url, **self._settings)
            self.faults.place = self.url
            if isinstance(self._dialer, ClusterDialer):
                self._topology = Cluster(self._dialer, self.counters, read_replicas=self._read_replicas)
            else:
                self._topology = OneServer(Shard(self._dialer, self.counters))
            await self._topology.open()
        except BaseException:
            await self._close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._close()

    async def _close(self) -> None:
        topology, self._topology = self._topology, None
        if topology is not None:
            topology.close()
        if self._twin_of is not None:
            self._twin_of._twins.discard(self)
        for twin in tuple(self._twins):
            await twin._close()
        server, self._embedded = self._embedded, None
        if server is not None:
            self._dialer = None
            with anyio.CancelScope(shield=True):
                await anyio.to_thread.run_sync(server.stop)

    # --- arrays ------------------------------------------------------------------------------------------------------

    async def set(self, key: Key, array: object, *, ttl: float | None = None, codec: str | Codec | None = None) -> None:
        """Store an array (command ``SET``) as an ``.npy`` file.

        ``array``: a NumPy array of any shape and strides, a NumPy scalar, or an object with ``__array__`` (a CPU tensor).
        Contiguous memory is sent as it is, without a copy: do not write to it before this returns.
        ``ttl``: seconds to live, ``None`` for ever. ``codec``: instead of the client's (``"raw"``, ``"lz4"``).

        Raises:
            EncodeError: the value cannot be stored (object dtype, masked, not an array, over 512 MiB); nothing was sent.
            ServerError: the server refused it.
            ConnectionLost, ConnectError, ServerUnavailable: the server could not be reached again within ``retry_timeout``
                seconds, or could not take it. Storing the same value twice is harmless, so it was tried again and again.
        """
        name = key_bytes(key)
        options = ttl_options(ttl)
        value = await self.encode_value(encode_array, array, codec, key)
        await self.send(name, set_command(name, value, options))

    async def get(self, key: Key, *, out: NDArray[Any] | None = None) -> NDArray[Any] | None:
        """Load an array (command ``GET``); ``None`` if there is no such key.

        The array is writable, 64-byte aligned, and its memory is nobody else's. With ``out=``, an array of the same dtype
        and shape, the bytes are received straight into it and it is returned. Nobody else may use it meanwhile; without
        such a key it is filled with zeros, and after an error its contents are undefined.

        Raises:
            NotAnArray, WrongKind, CorruptValue: the stored value is something else.
            OutMismatch: its dtype or shape is not that of ``out``.
            ServerError: the server refused (``WRONGTYPE``: the key holds a list, a hash, …).
        """
        if out is not None:
            return out if await self._get_into(key, _plain(out)) else None
        value = await self.get_value(key)
        return None if value is None else await self._open(codecs.open_array, value, key)

    async def get_value(self, key: Key, *, immutable: bool = False) -> NDArray[np.uint8] | None:
        """Load the bytes under a key (command ``GET``), whatever they are; ``None`` if there is no such key.

        Shape ``(length,)``, dtype ``uint8``, in writable memory that is aligned to 64 bytes and nobody else's: a view of it
        can be the array of a value in another format. ``immutable``: they never change, so a replica may send them.

        Raises:
            ServerError: as for :meth:`get`.
        """
        name = key_bytes(key)
        command = resp.encode("GET", name)
        reply = await self.request(lambda: (command, ValueReply()), name, immutable=immutable)
        value: NDArray[np.uint8] | None = self._raise(reply.values[0], "GET", key)
        if value is None and immutable:
            return await self.get_value(key)  # a replica may not have it yet
        return value

    async def _get_into(self, key: Key, out: NDArray[Any]) -> bool:
        """Whether there is such a key."""
        name = key_bytes(key)
        command = resp.encode("GET", name)
        batch = out[np.newaxis]
        header = self._header(batch)
        (row,) = row_views(batch)
        reply = await self.request(lambda: (command, value_reply(header, row)), name)
        if reply.matched:
            return True
        found = np.ones(1, np.bool_)
        await self._place([key], [0], [self._raise(reply.values[0], "GET", key)], batch, found)
        return bool(found[0])

    async def mset(
        self,
        items: Mapping[str, object] | Mapping[bytes, object] | Mapping[Key, object],
        *,
        ttl: float | None = None,
        codec: str | Codec | None = None,
    ) -> None:
        """Store many arrays, pipelined; not atomic. The arrays must not be written to before this returns.

        Raises:
            EncodeError: one of them cannot be stored. Those before it may have been.
            WriteFailed: those that the server did not take, with their keys.
        """
        from aionpredis.writer import Writer

        writer = Writer(self, max_inflight=MAX_INFLIGHT, copy=False, ttl=None, codec=codec, waits_when_full=False)
        async with writer:
            for key, array in items.items():
                await writer.put(key, array, ttl=ttl)

    async def mget(self, keys: Iterable[Key], *, out: NDArray[Any] | None = None) -> Any:
        """Load many arrays (``MGET``, in slices that are in flight together).

        Without ``out``: a list of arrays, ``None`` for each missing key.

        With ``out``, shape ``(len(keys), *shape)``: array *i* is received straight into ``out[i]``. Returns a ``bool``
        array, shape ``(len(keys),)``: ``False`` where the key is missing (or holds a list, a hash, …); such a row is filled
        with zeros. Nobody else may use ``out`` meanwhile; after an error its contents are undefined.

        Raises:
            OutMismatch: a stored array's dtype or shape is not that of the rows; it names the key.
            NotAnArray, WrongKind, CorruptValue, ServerError: as for :meth:`get`.
        """
        if isinstance(keys, str | bytes):
            raise UsageError(f"mget takes a list of keys, not one key: [{keys!r:.80}]")
        keys = list(keys)
        names = [key if type(key) is bytes else key_bytes(key) for key in keys]
        if out is not None:
            return await self._mget_into(keys, names, out)
        return await self._mget_fresh(keys, names)

    async def _mget_fresh(self, keys: list[Key], names: list[bytes]) -> list[NDArray[Any] | None]:
        """Arrays in memory of their own. They are predicted to look like the last one that was loaded."""
        arrays: list[NDArray[Any] | None] = [None] * len(keys)
        topology = self.topology
        joined = topology.joins_keys
        pipeline: Pipeline[tuple[list[int], bytes, list[NDArray[np.uint8]]]] = Pipeline(self)
        asked = 0
        try:
            while asked < len(names) or len(pipeline):
                while asked < len(names) and not pipeline.full:
                    header, nbytes = self._last_loaded
                    size = len(header) + nbytes  # 0: nothing is known, so ask for one
                    window = slice_keys(size, joined=joined) * len(topology.shards) if size else 1
                    for numbers in topology.groups([*range(len(names))[asked : asked + window]], names.__getitem__):
                        chosen = [names[number] for number in numbers]
                        command = values_command(chosen, joined=joined)
                        memories = [aligned_empty(nbytes) for _ in chosen] if nbytes else []
                        if memories:
                            places = [memory.data for memory in memories]
                            reply_to = partial(parts_reply, header, (nbytes,), places, joined=joined)
                        else:
                            reply_to = (
                                partial(ValueReply, length=len(chosen)) if joined else partial(ValueReply, len(chosen))
                            )
                        travels = max(size * len(chosen), 0 if size else SLICE)
                        pipeline.put(partial(_with, command, reply_to), chosen[0], travels, (numbers, header, memories))
                    asked += window
                reply, (numbers, header, memories) = await pipeline.next()
                if reply.matched:
                    known = npy.parse_header(memoryview(header))
                    for number, memory in zip(numbers, memories, strict=True):
                        arrays[number] = npy.over(known, memory)
                    continue
                for number, value in zip(numbers, self._answers(reply, numbers, keys), strict=True):
                    if value is not None:
                        arrays[number] = await self._open(codecs.open_array, value, keys[number])
                        if codecs.detect(value.data) is codecs.Kind.ARRAY:
                            parsed = npy.parse_header(value.data)
                            self._last_loaded = value[: parsed.size].tobytes(), parsed.nbytes
        finally:
            pipeline.abandon()
        return arrays

    def _answers(self, reply: Reply, numbers: Sequence[int], keys: Sequence[Key]) -> list[Any]:
        """The values of these keys; raises the first error among them."""
        if self.topology.joins_keys:
            return list(self._raise(reply.values[0], "MGET"))
        return [
            # That a key holds no string is no error of MGET.
            None
            if isinstance(value, ServerError) and value.code == "WRONGTYPE"
            else self._raise(value, "GET", keys[number])
            for number, value in zip(numbers, reply.values, strict=True)
        ]

    async def _mget_into(self, keys: list[Key], names: list[bytes], out: NDArray[Any]) -> NDArray[np.bool_]:
        if not isinstance(out, np.ndarray) or out.ndim < 1 or len(out) != len(names):
            shape = getattr(out, "shape", type(out).__name__)
            raise UsageError(f"out= has one row for each key, shape ({len(names)}, …), not {shape}")
        found = np.ones(len(names), np.bool_)
        if not names:
            return found
        out = _plain(out)
        header = self._header(out)
        rows = row_views(out)

        async def place(numbers: Sequence[int], values: list[Any]) -> None:
            await self._place(keys, numbers, values, out, found)

        await self.receive_parts(names, header, (len(rows[0]),), rows, place)
        return found

    async def receive_parts(
        self,
        keys: Sequence[bytes],
        header: bytes,
        sizes: tuple[int, ...],
        places: Sequence[memoryview],
        other: Callable[[Sequence[int], list[Any]], Awaitable[None]],
        *,
        immutable: bool = False,
    ) -> None:
        """``MGET``, in slices that are in flight together: what follows ``header`` in the value of ``keys[i]`` goes straight
        to the i-th ``len(sizes)`` of ``places``. For the modules built on the client.

        ``other(numbers, values)`` gets the values of a slice that were not all so, and whose they are.
        """
        count = len(sizes)
        size = len(header) + sum(sizes)
        topology = self.topology
        joined = topology.joins_keys
        window = slice_keys(size, joined=joined) * len(topology.shards)
        pipeline: Pipeline[list[int]] = Pipeline(self, immutable=immutable)
        asked = 0
        try:
            while asked < len(keys) or len(pipeline):
                while asked < len(keys) and not pipeline.full:
                    for numbers in topology.groups([*range(len(keys))[asked : asked + window]], keys.__getitem__):
                        chosen = [keys[number] for number in numbers]
                        command = values_command(chosen, joined=joined)
                        parts = [part for number in numbers for part in places[number * count : (number + 1) * count]]
                        reply_to = partial(parts_reply, header, sizes, parts, joined=joined)
                        pipeline.put(partial(_with, command, reply_to), chosen[0], len(chosen) * size, numbers)
                    asked += window
                reply, numbers = await pipeline.next()
                if not reply.matched:
                    await other(numbers, self._answers(reply, numbers, keys))
        finally:
            pipeline.abandon()

    def _header(self, out: NDArray[Any]) -> bytes:
        """With which the values begin that fill the rows of ``out=``."""
        try:
            header = npy.header_bytes(out.dtype, out.shape[1:])
        except EncodeError as error:
            raise UsageError(f"out=: {error}") from error
        size = len(header) + out.nbytes // len(out)
        if size > self._max_value_bytes:
            raise UsageError(
                f"out= takes values of {size:,} bytes, more than max_value_bytes={self._max_value_bytes:,}"
            )
        return header

    async def _place(
        self,
        keys: list[Key],
        numbers: Sequence[int],
        values: list[Any],
        out: NDArray[Any],
        found: NDArray[np.bool_],
    ) -> None:
        """Put values that were not as predicted into their rows: missing, compressed, or in another order of axes."""
        for index, value in zip(numbers, values, strict=True):
            key = keys[index]
            if value is None:
                found[index] = False
                # What came for others was received here before this reply turned out to be shorter than predicted.
                out[index] = np.zeros((), out.dtype)
                continue
            array = await self._open(codecs.open_array, value, key)
            if array.dtype != out.dtype or array.shape != out.shape[1:]:
                raise OutMismatch(
                    f"stored is {array.dtype} {array.shape}, out= takes {out.dtype} {out.shape[1:]}", key=key
                )
            out[index] = array

    # --- records -----------------------------------------------------------------------------------------------------

    async def set_record(
        self, key: Key, record: Mapping[str, object], *, ttl: float | None = None, codec: str | Codec | None = None
    ) -> None:
        """Store a record, a dict of arrays, as a ``.safetensors`` file. Otherwise like :meth:`set`.

        Raises:
            EncodeError: names the column whose dtype such a file cannot hold.
        """
        name = key_bytes(key)
        options = ttl_options(ttl)
        value = await self.encode_value(encode_record, record, codec, key)
        await self.send(name, set_command(name, value, options))

    async def get_record(self, key: Key) -> dict[str, NDArray[Any]] | None:
        """Load a record; ``None`` if there is no such key. Its arrays share one block of memory that is nobody else's.

        Raises:
            NotAnArray, WrongKind, CorruptValue, ServerError: as for :meth:`get`.
        """
        value = await self.get_value(key)
        return None if value is None else await self.open_record(value, key)

    async def open_record(self, value: NDArray[np.uint8], key: Key) -> dict[str, NDArray[Any]]:
        """The record in a value."""
        return await self._open(codecs.open_record, value, key)

    # --- keys and everything else --------------------------------------------------------------------------------------

    async def delete(self, *keys: Key) -> int:
        """Delete keys (``UNLINK``: their memory is freed in the background); how many of them existed.

        Raises:
            OutcomeUnknown: the connection broke meanwhile. The keys may be gone.
        """
        return await self.count_keys("UNLINK", keys)

    async def exists(self, *keys: Key) -> int:
        """How many of the keys exist (``EXISTS``)."""
        return await self.count_keys("EXISTS", keys, repeatable=True)

    async def scan(self, pattern: str | bytes = "*") -> AsyncIterator[bytes]:
        """Names of the keys that match a pattern (``SCAN``, of each primary of a cluster), for ``async for``.

        A key that is there all the time comes at least once, and may come twice; one that comes or goes meanwhile may not,
        nor, in a cluster, one that moves to another server. A server looks at all of its keys, a thousand at a time; after a
        fault, and when a cluster's slots have moved, perhaps from the first one on again.

        Raises:
            ServerError: the server refused it.
        """
        async for page in self.scan_pages(pattern):
            for name in page:
                yield name

    async def scan_pages(self, pattern: str | bytes = "*") -> AsyncIterator[list[bytes]]:
        """As :meth:`scan`, as the server gives them: page by page, some of them empty."""
        topology = self.topology
        done: set[Shard] = set()
        while True:
            # Anew each time: the slot of a key that stands for a shard may have moved, or a shard's server been replaced.
            key = next((key for key in topology.each() if topology.shard(key) not in done), None)
            if key is None:
                return
            shard = topology.shard(key)
            cursor: bytes | int = 0
            changes = self.faults.changes
            while cursor != b"0":
                scan = "SCAN", cursor, "MATCH", key_bytes(pattern), "COUNT", SCAN_KEYS
                cursor, names = await self.call(*scan, repeatable=True, key=key)
                yield names
                if self.faults.changes != changes or topology.shard(key) is not shard:
                    break  # to another server than the one that gave it, it says nothing
            else:
                done.add(shard)

    async def count_keys(self, command: str, keys: Iterable[Key], *, repeatable: bool = False) -> int:
        """The sum of what a command that takes any number of keys says of these, all shards at once."""
        names = [key_bytes(key) for key in keys]
        if self.topology.joins_keys:
            return int(await self.call(command, *names, repeatable=repeatable)) if names else 0
        counts = await self.call_many([(command, name) for name in names], repeatable=repeatable)
        return sum(int(self._raise(count, command, name)) for count, name in zip(counts, names, strict=True))

    async def execute(self, *arguments: str | bytes | int | float | Buffer) -> Any:
        """Any other command, its arguments one by one: ``await client.execute("INCRBY", "steps", 64)``.

        Returns the reply as RESP2 has it: ``bytes``, ``int``, ``None``, or a list of them.

        Raises:
            UsageError: the command would change, or block, the connection that other tasks share.
            ServerError: the server answered with an error.
            OutcomeUnknown: the connection broke after the command was sent. It is not repeated.

        What a server refuses for a reason that may pass (LOADING, …) has not run, and is tried again; an error that a script
        gives as its result is raised.
        """
        check_shared(arguments)
        key = key_of(arguments)
        if key is None and not self.topology.joins_keys:
            key = await self._key_in(arguments)
        return await self.call(*arguments, key=key_bytes(key or b""))

    async def _key_in(self, arguments: Sequence[Any]) -> bytes:
        """The first key of any command: the server knows."""
        try:
            keys: list[bytes] = await self.call("COMMAND", "GETKEYS", *arguments, repeatable=True)
        except ServerError:  # it has none; or is wrong, and will be told so
            return b""
        return keys[0] if keys else b""

    async def send(self, key: bytes, command: Sequence[Buffer]) -> None:
        """An encoded SET of the key."""
        reply = await self.request(lambda: (command, ok_reply()), key)
        if not reply.matched:
            self._raise(reply.values[0], "SET", key)

    async def call(
        self, *arguments: Any, repeatable: bool = False, key: bytes | None = None, retry: Retry | None = None
    ) -> Any:
        """:meth:`execute` unchecked; ``repeatable``: running it twice is harmless, so it survives a broken connection.

        ``key``: instead of the command's own. ``retry``: see :meth:`request`.
        """
        if key is None:
            key = key_bytes(key_of(arguments) or b"")
        reply = await self.request(
            lambda: (resp.encode(*arguments), Reply()), key, repeatable=repeatable, retry=retry, command=arguments
        )
        return self._raise(reply.values[0], *arguments)

    async def call_many(
        self, commands: Sequence[Sequence[Any]], *, repeatable: bool = False, retry: Retry | None = None
    ) -> list[Any]:
        """Several commands, those of a shard as one request, those of all shards at once; their replies in the order of the
        commands, :class:`ServerError` instances among them. ``retry``: see :meth:`request`.
        """
        keys = [key_bytes(key_of(command) or b"") for command in commands]
        replies: list[Any] = [None] * len(commands)
        failures: list[AionpredisError] = []

        async def ask(numbers: list[int]) -> None:
            buffers = [buffer for number in numbers for buffer in resp.encode(*commands[number])]
            try:
                reply = await self.request(
                    lambda: (buffers, Reply(len(numbers))),
                    keys[numbers[0]],
                    repeatable=repeatable,
                    retry=retry,
                    command=commands[numbers[0]],
                )
            except AionpredisError as error:
                failures.append(error)
                return
            for number, value in zip(numbers, reply.values, strict=True):
                replies[number] = refused(value, commands[number]) if isinstance(value, ServerError) else value

        groups = self.topology.groups([*range(len(commands))], keys.__getitem__) if commands else []
        async with anyio.create_task_group() as tasks:
            for group in groups[1:]:
                tasks.start_soon(ask, group)
            for group in groups[:1]:
                await ask(group)
        if failures:
            raise failures[0]
        return replies

    def stats(self) -> Stats:
        """What this client has done so far, and its writers, actors and readers with it."""
        return self.counters.snapshot()

    # --- larger things -------------------------------------------------------------------------------------------------

    def writer(
        self,
        *,
        max_inflight: int = MAX_INFLIGHT,
        copy: bool = True,
        ttl: float | None = None,
        codec: str | Codec | None = None,
        replicas: int = 0,
    ) -> Writer:
        """A batching writer with backpressure: see :class:`aionpredis.Writer`."""
        from aionpredis.writer import Writer

        return Writer(self, max_inflight=max_inflight, copy=copy, ttl=ttl, codec=codec, replicas=replicas)

    def replay(self, /, name: str, schema: Schema, **options: Any) -> Replay:
        """A replay: transitions from many actors for one or more learners. See :class:`aionpredis.Replay`."""
        from aionpredis.replay import Replay

        return Replay(self, name, schema, **options)

    def policy(self, /, name: str, **options: Any) -> Policy:
        """Published versions of a policy's weights. See :class:`aionpredis.Policy`."""
        from aionpredis.policy import Policy

        return Policy(self, name, **options)

    # --- how it is done --------------------------------------------------------------------------------------------------

    @property
    def topology(self) -> Topology:
        """Which server has which key, for the modules built on the client."""
        if self._topology is None:
            raise UsageError("the client is not open: use it inside of `async with aionpredis.connect(…) as client:`")
        return self._topology

    async def connection(self, key: bytes = b"", *, immutable: bool = False) -> Connection:
        """The shared data connection to who has the key (see :meth:`Topology.shard`), for the modules built on the client."""
        connection = self.topology.shard(key, immutable=immutable).live_connection
        if connection is None:
            connection = await (await self.reach(key, immutable=immutable)).connection()
        return connection

    async def reach(self, key: bytes, *, immutable: bool = False) -> Shard:
        """Who has the key, with a shared connection that works."""
        topology = self.topology
        shard = topology.shard(key, immutable=immutable)
        attempt = object()
        if shard.lost is not None:
            self.faults.begins(LOST, shard.lost, attempt)
        try:
            shard = await topology.reach(key, immutable=immutable)
            await shard.connection()
        except BaseException as error:
            self.faults.leaves(LOST, attempt, for_another=isinstance(error, ConnectError))
            raise
        self.faults.ends(LOST)
        return shard

    def live_connection(self, key: bytes = b"", *, immutable: bool = False) -> Connection | None:
        """That connection, if there is one that works."""
        return None if self._topology is None else self._topology.shard(key, immutable=immutable).live_connection

    def twin(self) -> Client:
        """The same client with connections of its own, for the modules built on the client: ``WAIT`` blocks its connection, and
        counts the writes that came over it. For ``async with``, which does no IO; closed with this client at the latest.

        Settings, counters and faults are shared.
        """
        twin = copy.copy(self)
        twin._topology, twin._embedded = None, None
        twin._twin_of, twin._twins = self, set()
        return twin

    @property
    def block_seconds(self) -> float:
        """How long a command may block: well below the time after which a silent connection counts as lost. Where a cluster
        replaces a silent server, readers find the new one that much later, so it is no longer than that takes itself.
        """
        return min(2.0, float(self._settings["timeout"]) / 2)

    @asynccontextmanager
    async def blocking(self, key: bytes = b"", shard: Shard | None = None) -> AsyncIterator[Connection]:
        """A connection of one's own to who has the key, or to ``shard``: see :meth:`Shard.own`."""
        shard = shard or await self.topology.reach(key)
        async with shard.own(self.block_seconds) as connection:
            yield connection

    async def request(
        self,
        make: Callable[[], tuple[Sequence[Buffer], Reply]],
        key: bytes,
        *,
        repeatable: bool = True,
        immutable: bool = False,
        retry: Retry | None = None,
        command: Sequence[Any] = (b"",),
    ) -> Reply:
        """Send what ``make`` makes to who has the key, and wait for its reply; again, after a fault that may pass, if that is
        harmless. All keys in it are on the shard of that one, as far as known.

        ``retry``: of a caller that tries again by itself. Its time goes on, instead of that of another one. ``command``: the
        only one, if it is not repeatable.
        """
        given = retry
        try:
            while True:
                buffers, reply = make()
                try:
                    connection = await self.connection(key, immutable=immutable)
                    if not repeatable:
                        connection.check()  # once it is sent, a broken connection leaves the outcome unknown
                    await connection.wait(connection.submit(buffers, reply), eager=True)
                    if reply.redirected:
                        await self.topology.follow(buffers, reply)
                except (ConnectionLost, ConnectError) as error:
                    if reply.sent and not repeatable:
                        self.faults.meets(error)
                        raise OutcomeUnknown(f"{error}; the command was sent, whether it ran is not known") from error
                    retry = retry or Retry(self.faults)
                    pause = retry.after(error)
                else:
                    # A command that was refused so has not run; of several, others may have.
                    if reply.refusal is None or not (
                        repeatable or (reply.count == 1 and has_not_run(command, reply.refusal))
                    ):
                        if retry is not None:
                            retry.succeeded()
                        return reply
                    retry = retry or Retry(self.faults)
                    try:
                        pause = retry.after(reply.refusal, connection)
                    except ServerUnavailable:
                        return reply  # who looks at its values raises it
                await anyio.sleep(pause)
        finally:
            if retry is not given and retry is not None:
                retry.reset()

    async def encode_value(
        self, encoder: Callable[[Any, Codec | None, Key], list[Buffer]], value: Any, codec: str | Codec | None, key: Key
    ) -> list[Buffer]:
        """A value's bytes, by ``encode_array`` or ``encode_record``; in a worker thread if there is much to compress or to
        copy.
        """
        chosen = self.codec if codec is None else codecs.resolve(codec)
        size = nbytes(value)
        if size < IN_THREAD or (chosen is None and copied_bytes(value) < IN_THREAD):
            return encoder(value, chosen, key)
        return await anyio.to_thread.run_sync(encoder, value, chosen, key)

    def _raise(self, value: Any, *command: Any) -> Any:
        """The value that answers this command; raises it if it is an error."""
        if isinstance(value, ServerError):
            raise refused(value, command)
        return value

    async def _open(self, decoder: Callable[..., T], value: NDArray[np.uint8], key: Key) -> T:
        view = value.data
        if len(view) < IN_THREAD or not codecs.compressed(view):
            return decoder(view, max_bytes=self._max_value_bytes, key=key)
        return await anyio.to_thread.run_sync(lambda: decoder(view, max_bytes=self._max_value_bytes, key=key))


def _with(command: Sequence[Buffer], reply: Callable[[], Reply]) -> tuple[Sequence[Buffer], Reply]:
    return command, reply()


def _plain(out: object) -> NDArray[Any]:
    """The memory of ``out=``, whatever its class makes of axes (``np.matrix``)."""
    if type(out) is np.ndarray:
        return out
    if not isinstance(out, np.ndarray):
        raise UsageError(f"out= is a NumPy array, not {type(out).__name__}")
    if isinstance(out, np.ma.MaskedArray):
        raise UsageError("out= is a masked array, and what is stored has no mask: give its .data")
    return out.view(np.ndarray)


def connect(
    source: Servers | None = None,
    *,
    codec: str | Codec | None = None,
    timeout: float = 30.0,
    connect_timeout: float = 10.0,
    retry_timeout: float = 30.0,
    max_value_bytes: int = MAX_VALUE,
    read_replicas: bool = False,
    **options: Any,
) -> Client:
    """A client, to be opened with ``async with aionpredis.connect(url) as client:``.

    ``source``: where the servers are.

    - ``redis://[user:password@]host[:port][/db]``, ``rediss://…`` (TLS, verified), ``unix:///path[?db=0]``.
    - ``redis+cluster://[user:password@]host:port,host:port``, ``rediss+cluster://…``: some nodes of a cluster.
    - ``redis+sentinel://[user:password@]host:port,host:port/service[/db]``, ``rediss+sentinel://…``: Sentinels, which are
      asked at every connect for the service's primary. Their own password, if they have one: ``sentinel_username``,
      ``sentinel_password``, here or behind the URL's ``?``.
    - A client of redis-py, blocking or asyncio: ``Redis``, ``RedisCluster``, or from ``Sentinel.master_for()``. Addresses,
      credentials and TLS are taken over as it was told them; its connections are not touched, and time-outs are those below.
    - None: the environment's ``REDIS_URL``, else an embedded server that lives as long as the client
      (``pip install "aionpredis[server]"``).

    ``codec``: how values are stored unless a call says otherwise: ``None`` or ``"raw"``, ``"lz4"``, or a registered one.
    ``timeout``: seconds **without progress** after which a connection is given up; a long transfer may take longer.
    ``connect_timeout``: seconds for connecting, with TLS and AUTH. ``retry_timeout``: seconds for which a server that broke
    the connection, is gone, or cannot answer yet is tried again, before the error is raised; 0: not at all, ``math.inf``:
    until the call is cancelled. Writers, actors and readers wait as long. Opening a client is one attempt.
    ``max_value_bytes``: the longest value accepted, and the longest that a compressed one may become. A longer one is a
    ``ProtocolError``, and the connection is made anew.
    ``read_replicas``: in a cluster, have chunks of a replay and weights of a policy sent by replicas: they never change, and
    what a replica does not have yet, its primary is asked for. Everything else is asked of primaries.
    ``options``: for redis-py's connection (``credential_provider``, ``ssl_ca_certs``, ``client_name``, …), and
    ``address_remap`` for a cluster whose servers are reached elsewhere than they say. They override a client's; a URL
    overrides them.

    Raises:
        UsageError: the source or an option is wrong.
        ConnectError, AuthenticationError: on opening.
    """
    return Client(
        source,
        codec=codec,
        timeout=timeout,
        connect_timeout=connect_timeout,
        retry_timeout=retry_timeout,
        max_value_bytes=max_value_bytes,
        read_replicas=read_replicas,
        options=options,
    )
