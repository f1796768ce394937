"""System calls on a connected, non-blocking stream socket. Never waits; :mod:`.ready` does.

Everything that differs between a plain socket and TLS (or a platform without ``sendmsg``) ends here.
"""

from __future__ import annotations

import socket
import ssl
from collections.abc import Iterator, Sequence
from typing import Protocol

from aionpredis.wire.resp import Buffer

__all__ = ["PlainSocket", "Socket", "TLSSocket", "wrap"]

SEND_BUFFER = 4 << 20
"""Bytes of kernel buffer asked for on Unix sockets. The default, 208 KiB, gives 0.57 of the throughput. Not on TCP:
setting it there turns the kernel's own tuning off."""

RECORD = 16 * 1024
"""Bytes: the longest TLS record. More at once would only be cut again."""

TLS_TURN = 256 * 1024
"""Bytes after which TLS lets other tasks run."""


class Socket(Protocol):
    """What a connection needs of a socket."""

    raw: socket.socket
    is_local: bool
    """A Unix socket: no distance, and buffers of a fixed size."""

    def waits_for_write(self, queued: bool) -> bool:
        """Whether to wait for the socket to become writable, and not only readable; ``queued``: there is more to send."""

    def send(self, buffers: Sequence[Buffer]) -> int:
        """Hand bytes to the kernel; how many it took, 0 if it would block. Raises ``OSError``."""

    def receive(self, buffers: Sequence[memoryview]) -> int:
        """Fill the buffers in order; how many bytes came, -1 if it would block, 0 at the end. Raises ``OSError``."""


class PlainSocket:
    """Scatter and gather by ``sendmsg`` and ``recvmsg_into``: no byte is joined or copied on this side."""

    def __init__(self, raw: socket.socket) -> None:
        self.raw = raw
        self.is_local = raw.family == getattr(socket, "AF_UNIX", None)
        if self.is_local:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)

    def waits_for_write(self, queued: bool) -> bool:
        return queued

    def send(self, buffers: Sequence[Buffer]) -> int:
        try:
            return self.raw.sendmsg(buffers)
        except BlockingIOError:
            return 0

    def receive(self, buffers: Sequence[memoryview]) -> int:
        try:
            return self.raw.recvmsg_into(buffers)[0]
        except BlockingIOError:
            return -1


class TLSSocket:
    """One buffer a system call. Also serves plain sockets where the platform has no ``sendmsg``.

    TLS wants a blocked send repeated with the same bytes: they are copied then, and count as sent. It may have to write
    before it can read, and the reverse (a renegotiation, a new key).

    Redis 7.0 over loopback TCP, a core each, with TLS against without: 0.45 of the 80x80 uint16 arrays a second, by a writer
    and by mget; 0.53 of the bytes of a 32 MB set, 0.73 of its get; 0.68 of the single sets. (In one record a turn: 0.26,
    0.20, 0.48, 0.57 and 0.73.)
    """

    is_local = False

    def __init__(self, raw: socket.socket) -> None:
        self.raw = raw
        self._held = b""
        self._read_blocked_on_write = False
        self._write_blocked_on_read = False

    def waits_for_write(self, queued: bool) -> bool:
        if self._read_blocked_on_write:
            return True
        return (queued or bool(self._held)) and not self._write_blocked_on_read

    def send(self, buffers: Sequence[Buffer]) -> int:
        count = 0
        if self._push(self._held):
            for record in _records(buffers):
                count += len(record)
                if not self._push(record) or count >= TLS_TURN:
                    break
        return count

    def _push(self, record: bytes | bytearray | memoryview) -> bool:
        """Send a record, or hold what was not taken of it; whether all was."""
        self._write_blocked_on_read = False
        try:
            while record:
                record = record[self.raw.send(record) :]
        except ssl.SSLWantReadError:
            self._write_blocked_on_read = True
        except (BlockingIOError, ssl.SSLWantWriteError):
            pass
        self._held = bytes(record)  # until now it was the caller's memory
        return not self._held

    def receive(self, buffers: Sequence[memoryview]) -> int:
        self._push(self._held)
        self._read_blocked_on_write = False
        count = 0
        try:
            for buffer in buffers:
                while len(buffer):
                    # Until it blocks: what TLS has decrypted already does not make the socket readable.
                    received = self.raw.recv_into(buffer)
                    count += received
                    if not received or count >= TLS_TURN:
                        return count
                    buffer = buffer[received:]
        except ssl.SSLWantWriteError:
            self._read_blocked_on_write = True
        except (BlockingIOError, ssl.SSLWantReadError):
            pass
        except (ssl.SSLEOFError, ssl.SSLZeroReturnError):
            return count
        except OSError:
            if not count:  # otherwise the next call says it again
                raise
        return count or -1


def _records(buffers: Sequence[Buffer]) -> Iterator[memoryview | bytearray]:
    """The bytes in pieces of a record's length. Those of small buffers are joined: a record costs more than a copy."""
    joined = bytearray()
    for buffer in buffers:
        view = memoryview(buffer)
        while len(view):
            if not joined and len(view) >= RECORD:
                yield view[:RECORD]
                view = view[RECORD:]
                continue
            room = RECORD - len(joined)
            joined += view[:room]
            view = view[room:]
            if len(joined) == RECORD:
                yield joined
                joined = bytearray()
    if joined:
        yield joined


def wrap(raw: socket.socket) -> Socket:
    """The :class:`Socket` for a connected socket; makes it non-blocking."""
    raw.setblocking(False)
    if isinstance(raw, ssl.SSLSocket) or not hasattr(raw, "recvmsg_into"):
        return TLSSocket(raw)
    return PlainSocket(raw)
