"""System calls on a connected, non-blocking stream socket. Never waits; :mod:`.ready` does.

Everything that differs between a plain socket and TLS (or a platform without ``sendmsg``) ends here.
"""

from __future__ import annotations

import socket
import ssl
from collections.abc import Sequence
from typing import Protocol

from aionpredis.wire.resp import Buffer

__all__ = ["PlainSocket", "Socket", "TLSSocket", "wrap"]

SEND_BUFFER = 4 << 20
"""Bytes of kernel buffer asked for on Unix sockets. The default, 208 KiB, gives 0.57 of the throughput. Not on TCP:
setting it there turns the kernel's own tuning off."""

RECORD = 16 * 1024
"""Bytes: the longest TLS record. More at once would only be cut again."""


class Socket(Protocol):
    """What a connection needs of a socket."""

    raw: socket.socket
    is_local: bool
    """A Unix socket: no distance, and buffers of a fixed size."""

    @property
    def wants_write(self) -> bool:
        """Whether bytes that were accepted (or TLS itself) still wait for the socket to become writable."""

    def send(self, buffers: Sequence[Buffer]) -> int:
        """Hand bytes to the kernel; how many it took, 0 if it would block. Raises ``OSError``."""

    def receive(self, buffers: Sequence[memoryview]) -> int:
        """Fill the buffers in order; how many bytes came, -1 if it would block, 0 at the end. Raises ``OSError``."""


class PlainSocket:
    """Scatter and gather by ``sendmsg`` and ``recvmsg_into``: no byte is joined or copied on this side."""

    wants_write = False

    def __init__(self, raw: socket.socket) -> None:
        self.raw = raw
        self.is_local = raw.family == getattr(socket, "AF_UNIX", None)
        if self.is_local:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)

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
    """One buffer a call. Also serves plain sockets where the platform has no ``sendmsg``.

    TLS wants a blocked send repeated with the same bytes; so a record's worth is copied, and counts as sent from then on.
    """

    is_local = False

    def __init__(self, raw: socket.socket) -> None:
        self.raw = raw
        self._held = b""
        self._read_blocked_on_write = False

    @property
    def wants_write(self) -> bool:
        return bool(self._held) or self._read_blocked_on_write

    def send(self, buffers: Sequence[Buffer]) -> int:
        if self._held and not self._push():
            return 0
        record = bytearray()
        for buffer in buffers:
            record += memoryview(buffer)[: RECORD - len(record)]
            if len(record) == RECORD:
                break
        self._held = bytes(record)
        self._push()
        return len(record)

    def _push(self) -> bool:
        try:
            while self._held:
                self._held = self._held[self.raw.send(self._held) :]
        except (BlockingIOError, ssl.SSLWantWriteError, ssl.SSLWantReadError):
            return False
        return True

    def receive(self, buffers: Sequence[memoryview]) -> int:
        if self._held:
            self._push()
        self._read_blocked_on_write = False
        try:
            return self.raw.recv_into(next(buffer for buffer in buffers if len(buffer)))
        except ssl.SSLWantWriteError:
            self._read_blocked_on_write = True
            return -1
        except (BlockingIOError, ssl.SSLWantReadError):
            return -1
        except (ssl.SSLEOFError, ssl.SSLZeroReturnError):
            return 0


def wrap(raw: socket.socket) -> Socket:
    """The :class:`Socket` for a connected socket; makes it non-blocking."""
    raw.setblocking(False)
    if isinstance(raw, ssl.SSLSocket) or not hasattr(raw, "recvmsg_into"):
        return TLSSocket(raw)
    return PlainSocket(raw)
