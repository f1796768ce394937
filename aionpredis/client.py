"""Arrays and records by key."""

from __future__ import annotations

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
from aionpredis.commands import check_shared, refused
from aionpredis.errors import (
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
from aionpredis.pipeline import Pipeline
from aionpredis.requests import (
    IN_THREAD,
    MAX_VALUE,
    SLICE,
    Key,
    ValueReply,
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
    values_reply,
)
from aionpredis.retry import LOST, Faults, Retry
from aionpredis.stats import Counters, Stats
from aionpredis.wire import resp
from aionpredis.wire.connection import Connection
from aionpredis.wire.dial import Dialer
from aionpredis.wire.resp import Buffer, Reply
from aionpredis.wire.topology import OneServer

if TYPE_CHECKING:
    from aionpredis.policy import Policy
    from aionpredis.replay import Replay, Schema
    from aionpredis.server import Server
    from aionpredis.writer import Writer

__all__ = ["Client", "connect"]

T = TypeVar("T")

MAX_INFLIGHT = 64 << 20
"""Bytes that a writer holds unless it is told otherwise."""


class Client:
    """A connection to one server, to be used with ``async with``; made by :func:`connect`.

    Any number of tasks of one event loop may use it at once: their requests share one connection and overlap.
    Cancelling a call is always safe: nothing is written into ``out=`` afterwards, and no other caller is disturbed.
    """

    def __init__(
        self,
        url: str | None,
        *,
        codec: str | Codec | None,
        timeout: float,
        connect_timeout: float,
        retry_timeout: float,
        max_value_bytes: int,
        options: Mapping[str, Any],
    ) -> None:
        if isinstance(max_value_bytes, bool) or not isinstance(max_value_bytes, int) or max_value_bytes < 1:
            raise UsageError(f"max_value_bytes is a positive number of bytes, not {max_value_bytes!r}")
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
        url = url if url is not None else os.environ.get("REDIS_URL")
        # An URL's mistakes show at once, not when it is first used.
        self._dialer = None if url is None else Dialer(url, **self._settings)
        self._embedded: Server | None = None
        self._topology: OneServer | None = None
        self._spare: list[Connection] = []
        self._last_loaded = b"", 0  # header and payload bytes of an array that mget() loaded

    @property
    def url(self) -> str:
        """Where the server is, without user and password."""
        return "the embedded server" if self._dialer is None else self._dialer.url

    def __repr__(self) -> str:
        return f"<aionpredis.Client {self.url} {'open' if self._topology else 'closed'}>"

    async def __aenter__(self) -> Client:
        if self._topology is not None:
            raise UsageError("this client is open already")
        try:
            if self._dialer is None:
                from aionpredis.server import Server

                self._embedded = Server()
                await anyio.to_thread.run_sync(self._embedded.start)
                self._dialer = Dialer(self._embedded.url, **self._settings)
            self.faults.place = self.url
            self._topology = OneServer(self._dialer, self.counters)
            await self._topology.connection()
        except BaseException:
            self._topology = None
            await self._stop_embedded()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        topology, self._topology = self._topology, None
        if topology is not None:
            topology.close()
        while self._spare:
            self._spare.pop().close()
        await self._stop_embedded()

    async def _stop_embedded(self) -> None:
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
        await self.send(set_command(name, value, options), key)

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
            if not isinstance(out, np.ndarray):
                raise UsageError(f"out= is a NumPy array, not {type(out).__name__}")
            return await self._get_into(key, out)
        value = await self.get_value(key)
        return None if value is None else await self._open(codecs.open_array, value, key)

    async def _get_into(self, key: Key, out: NDArray[Any]) -> NDArray[Any] | None:
        command = resp.encode("GET", key_bytes(key))
        batch = out[np.newaxis]
        header = _header(batch)
        (row,) = row_views(batch)
        reply = await self.request(lambda: (command, value_reply(header, row)))
        if reply.matched:
            return out
        found = np.ones(1, np.bool_)
        await self._place([key], [self._raise(reply.values[0], "GET", key)], batch, found)
        return out if found[0] else None

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
        keys = list(keys)
        names = [key if type(key) is bytes else key_bytes(key) for key in keys]
        if out is not None:
            return await self._mget_into(keys, names, out)
        return await self._mget_fresh(keys, names)

    async def _mget_fresh(self, keys: list[Key], names: list[bytes]) -> list[NDArray[Any] | None]:
        """Arrays in memory of their own. They are predicted to look like the last one that was loaded."""
        arrays: list[NDArray[Any] | None] = []
        pipeline: Pipeline[tuple[bytes, list[NDArray[np.uint8]]] | None] = Pipeline(self)
        asked = 0
        try:
            while asked < len(names) or len(pipeline):
                while asked < len(names) and not pipeline.full:
                    header, nbytes = self._last_loaded
                    size = len(header) + nbytes  # 0: nothing is known, so ask for one
                    chosen = names[asked : asked + (slice_keys(size) if size else 1)]
                    command = resp.encode_bytes([b"MGET", *chosen])
                    if size:
                        memories = [aligned_empty(nbytes) for _ in chosen]
                        reply_to = partial(values_reply, header, memories)
                        pipeline.put(partial(_with, command, reply_to), size * len(chosen), (header, memories))
                    else:
                        pipeline.put(partial(_with, command, partial(ValueReply, length=1)), SLICE, None)
                    asked += len(chosen)
                reply, predicted = await pipeline.next()
                if reply.matched and predicted is not None:
                    known = npy.parse_header(memoryview(predicted[0]))
                    arrays += [npy.over(known, memory) for memory in predicted[1]]
                    continue
                for value in self._raise(reply.values[0], "MGET"):
                    key = keys[len(arrays)]
                    arrays.append(None if value is None else await self._open(codecs.open_array, value, key))
                    if value is not None and codecs.detect(value.data) is codecs.Kind.ARRAY:
                        parsed = npy.parse_header(value.data)
                        self._last_loaded = value[: parsed.size].tobytes(), parsed.nbytes
        finally:
            pipeline.abandon()
        return arrays

    async def _mget_into(self, keys: list[Key], names: list[bytes], out: NDArray[Any]) -> NDArray[np.bool_]:
        if not isinstance(out, np.ndarray) or out.ndim < 1 or len(out) != len(names):
            shape = getattr(out, "shape", type(out).__name__)
            raise UsageError(f"out= has one row for each key, shape ({len(names)}, …), not {shape}")
        found = np.ones(len(names), np.bool_)
        if not names:
            return found
        header = _header(out)
        rows = row_views(out)

        async def place(start: int, values: Any) -> None:
            values = self._raise(values, "MGET")
            await self._place(keys[start : start + len(values)], values, out[start:], found[start:])

        await self.receive_parts(names, header, (len(rows[0]),), rows, place)
        return found

    async def receive_parts(
        self,
        keys: Sequence[bytes],
        header: bytes,
        sizes: tuple[int, ...],
        places: Sequence[memoryview],
        other: Callable[[int, Any], Awaitable[None]],
    ) -> None:
        """``MGET``, in slices that are in flight together: what follows ``header`` in the value of ``keys[i]`` goes straight
        to the i-th ``len(sizes)`` of ``places``. For the modules built on the client.

        ``other(start, values)`` gets a slice whose values were not all so, from ``keys[start]`` on, or the error instead.
        """
        count = len(sizes)
        size = len(header) + sum(sizes)
        step = slice_keys(size)
        pipeline: Pipeline[int] = Pipeline(self)
        asked = 0
        try:
            while asked < len(keys) or len(pipeline):
                while asked < len(keys) and not pipeline.full:
                    chosen = keys[asked : asked + step]
                    command = resp.encode_bytes([b"MGET", *chosen])
                    reply_to = partial(parts_reply, header, sizes, places[asked * count : (asked + step) * count])
                    pipeline.put(partial(_with, command, reply_to), len(chosen) * size, asked)
                    asked += step
                reply, start = await pipeline.next()
                if not reply.matched:
                    await other(start, reply.values[0])
        finally:
            pipeline.abandon()

    async def _place(self, keys: list[Key], values: list[Any], out: NDArray[Any], found: NDArray[np.bool_]) -> None:
        """Put values that were not as predicted into their rows: missing, compressed, or in another order of axes."""
        for index, (key, value) in enumerate(zip(keys, values, strict=True)):
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
        await self.send(set_command(name, value, options), key)

    async def get_record(self, key: Key) -> dict[str, NDArray[Any]] | None:
        """Load a record; ``None`` if there is no such key. Its arrays share one block of memory that is nobody else's.

        Raises:
            NotAnArray, WrongKind, CorruptValue, ServerError: as for :meth:`get`.
        """
        value = await self.get_value(key)
        return None if value is None else await self._open(codecs.open_record, value, key)

    # --- keys and everything else --------------------------------------------------------------------------------------

    async def delete(self, *keys: Key) -> int:
        """Delete keys (``UNLINK``: their memory is freed in the background); how many of them existed.

        Raises:
            OutcomeUnknown: the connection broke meanwhile. The keys may be gone.
        """
        return int(await self._keys_command("UNLINK", keys))

    async def exists(self, *keys: Key) -> int:
        """How many of the keys exist (``EXISTS``)."""
        return int(await self._keys_command("EXISTS", keys, repeatable=True))

    async def _keys_command(self, command: str, keys: tuple[Key, ...], *, repeatable: bool = False) -> Any:
        names = [key_bytes(key) for key in keys]
        return await self.call(command, *names, repeatable=repeatable) if names else 0

    async def execute(self, *arguments: str | bytes | int | float | Buffer) -> Any:
        """Any other command, its arguments one by one: ``await client.execute("INCRBY", "steps", 64)``.

        Returns the reply as RESP2 has it: ``bytes``, ``int``, ``None``, or a list of them.

        Raises:
            UsageError: the command would change, or block, the connection that other tasks share.
            ServerError: the server answered with an error.
            OutcomeUnknown: the connection broke after the command was sent. It is not repeated.
        """
        check_shared(arguments)
        return await self.call(*arguments)

    async def send(self, command: Sequence[Buffer], key: Key | None = None) -> None:
        """An encoded SET."""
        reply = await self.request(lambda: (command, ok_reply()))
        if not reply.matched:
            self._raise(reply.values[0], "SET", key)

    async def call(self, *arguments: Any, repeatable: bool = False) -> Any:
        """:meth:`execute` unchecked; ``repeatable``: running it twice is harmless, so it survives a broken connection."""
        reply = await self.request(lambda: (resp.encode(*arguments), Reply()), repeatable=repeatable)
        return self._raise(reply.values[0], *arguments)

    async def call_many(self, commands: Sequence[Sequence[Any]], *, repeatable: bool = False) -> list[Any]:
        """Several commands in one pipeline; their replies in order, :class:`ServerError` instances among them."""
        if not commands:
            return []
        buffers = [buffer for command in commands for buffer in resp.encode(*command)]
        reply = await self.request(lambda: (buffers, Reply(len(commands))), repeatable=repeatable)
        for value, command in zip(reply.values, commands, strict=True):
            if isinstance(value, ServerError):
                refused(value, command)
        return reply.values

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
    ) -> Writer:
        """A batching writer with backpressure: see :class:`aionpredis.Writer`."""
        from aionpredis.writer import Writer

        return Writer(self, max_inflight=max_inflight, copy=copy, ttl=ttl, codec=codec)

    def replay(self, name: str, schema: Schema, **options: Any) -> Replay:
        """A replay: transitions from many actors for one or more learners. See :class:`aionpredis.Replay`."""
        from aionpredis.replay import Replay

        return Replay(self, name, schema, **options)

    def policy(self, name: str, **options: Any) -> Policy:
        """Published versions of a policy's weights. See :class:`aionpredis.Policy`."""
        from aionpredis.policy import Policy

        return Policy(self, name, **options)

    # --- how it is done --------------------------------------------------------------------------------------------------

    async def connection(self) -> Connection:
        """The shared data connection, for the modules built on the client."""
        topology = self._topology
        if topology is None:
            raise UsageError("the client is not open: use it inside of `async with aionpredis.connect(…) as client:`")
        connection = topology.live_connection
        if connection is None:
            if topology.lost is not None:
                self.faults.begins(LOST, topology.lost)
            connection = await topology.connection()
            self.faults.ends(LOST)
        return connection

    @property
    def live_connection(self) -> Connection | None:
        """The shared data connection, if there is one that works."""
        return None if self._topology is None else self._topology.live_connection

    @property
    def block_seconds(self) -> float:
        """How long a command may block: well below the time after which a silent connection counts as lost."""
        return min(5.0, float(self._settings["timeout"]) / 2)

    @asynccontextmanager
    async def blocking(self) -> AsyncIterator[Connection]:
        """A connection of one's own, for a command that blocks or spans several requests; kept for the next if still good."""
        if self._dialer is None or self._topology is None:
            raise UsageError("the client is not open")
        connection = self._spare.pop() if self._spare else await self._dialer.dial()
        good = False
        try:
            yield connection
            good = True
        finally:
            if good and self._topology is not None and connection.lost is None:
                self._spare.append(connection)
            else:
                connection.close()

    async def request(self, make: Callable[[], tuple[Sequence[Buffer], Reply]], *, repeatable: bool = True) -> Reply:
        """Send what ``make`` makes and wait for its reply; again, after a fault that may pass, if that is harmless."""
        retry: Retry | None = None
        while True:
            buffers, reply = make()
            try:
                connection = await self.connection()
                if not repeatable:
                    connection.check()  # once it is sent, a broken connection leaves the outcome unknown
                await connection.wait(connection.submit(buffers, reply), eager=True)
            except (ConnectionLost, ConnectError) as error:
                if reply.sent and not repeatable:
                    self.faults.meets(error)
                    raise OutcomeUnknown(f"{error}; the command was sent, whether it ran is not known") from error
                retry = retry or Retry(self.faults)
                pause = retry.after(error)
            else:
                # A command that was refused so has not run; of several, others may have.
                if reply.refusal is None or not (repeatable or reply.count == 1):
                    if retry is not None:
                        retry.succeeded()
                    return reply
                retry = retry or Retry(self.faults)
                try:
                    pause = retry.after(reply.refusal, connection)
                except ServerUnavailable:
                    return reply  # who looks at its values raises it
            await anyio.sleep(pause)

    async def get_value(self, key: Key) -> NDArray[np.uint8] | None:
        """The bytes stored under a key, in aligned memory."""
        command = resp.encode("GET", key_bytes(key))
        reply = await self.request(lambda: (command, ValueReply()))
        value: NDArray[np.uint8] | None = self._raise(reply.values[0], "GET", key)
        return value

    async def encode_value(
        self, encoder: Callable[[Any, Codec | None, Key], list[Buffer]], value: Any, codec: str | Codec | None, key: Key
    ) -> list[Buffer]:
        """A value's bytes, by ``encode_array`` or ``encode_record``; in a worker thread if a codec has much to do."""
        chosen = self.codec if codec is None else codecs.resolve(codec)
        if chosen is None or nbytes(value) < IN_THREAD:
            return encoder(value, chosen, key)
        return await anyio.to_thread.run_sync(encoder, value, chosen, key)

    def _raise(self, value: Any, *command: Any) -> Any:
        """The value that answers this command; raises it if it is an error."""
        if isinstance(value, ServerError):
            refused(value, command)
            if not isinstance(value, ServerUnavailable):  # counted with each attempt
                self.faults.meets(value)
            raise value
        return value

    async def _open(self, decoder: Callable[..., T], value: NDArray[np.uint8], key: Key) -> T:
        view = value.data
        if len(view) < IN_THREAD or not codecs.compressed(view):
            return decoder(view, max_bytes=self._max_value_bytes, key=key)
        return await anyio.to_thread.run_sync(lambda: decoder(view, max_bytes=self._max_value_bytes, key=key))


def _with(command: Sequence[Buffer], reply: Callable[[], Reply]) -> tuple[Sequence[Buffer], Reply]:
    return command, reply()


def _header(out: NDArray[Any]) -> bytes:
    try:
        return npy.header_bytes(out.dtype, out.shape[1:])
    except EncodeError as error:
        raise UsageError(f"out=: {error}") from error


def connect(
    url: str | None = None,
    *,
    codec: str | Codec | None = None,
    timeout: float = 30.0,
    connect_timeout: float = 10.0,
    retry_timeout: float = 30.0,
    max_value_bytes: int = MAX_VALUE,
    **options: Any,
) -> Client:
    """A client, to be opened with ``async with aionpredis.connect(url) as client:``.

    ``url``: ``redis://[user:password@]host[:port][/db]``, ``rediss://…`` (TLS, verified), ``unix:///path[?db=0]``.
    Without one: the environment's ``REDIS_URL``, else an embedded server that lives as long as the client
    (``pip install "aionpredis[server]"``).
    ``codec``: how values are stored unless a call says otherwise: ``None`` or ``"raw"``, ``"lz4"``, or a registered one.
    ``timeout``: seconds **without progress** after which a connection is given up; a long transfer may take longer.
    ``connect_timeout``: seconds for connecting, with TLS and AUTH. ``retry_timeout``: seconds for which a server that broke
    the connection, is gone, or cannot answer yet is tried again, before the error is raised; 0: not at all, ``math.inf``:
    until the call is cancelled. Writers, actors and readers wait as long. Opening a client is one attempt.
    ``max_value_bytes``: the longest value accepted, and the longest that a compressed one may become. ``options``: for
    redis-py's connection (``credential_provider``, ``ssl_ca_certs``, ``client_name``, …).

    Raises:
        UsageError: the URL or an option is wrong.
        ConnectError, AuthenticationError: on opening.
    """
    return Client(
        url,
        codec=codec,
        timeout=timeout,
        connect_timeout=connect_timeout,
        retry_timeout=retry_timeout,
        max_value_bytes=max_value_bytes,
        options=options,
    )
