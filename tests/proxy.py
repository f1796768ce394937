"""A proxy in front of a server that misbehaves on command: slow, silent, or gone at a chosen byte."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self


class Proxy:
    """Listens on a Unix socket in ``folder`` and passes bytes on to the Unix socket ``target``, in threads.

    Of each connection: ``cut_up`` / ``cut_down``: after so many bytes to the server / to the client it is closed (each
    cut is used once). ``chunk``: bytes passed on at a time. ``pause``: seconds after each. ``stalled``: nothing is passed
    on. ``refusing``: new connections are closed at once.
    """

    def __init__(self, target: str, folder: Path) -> None:
        self.target = target.removeprefix("unix://")
        self.url = f"unix://{folder / 'p.sock'}"
        self.cut_up: int | None = None
        self.cut_down: int | None = None
        self.chunk = 1 << 16
        self.pause = 0.0
        self.stalled = False
        self.refusing = False
        self.connections = 0
        self.cuts = 0
        self.passed_up = 0
        self._open: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._ended = threading.Event()
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(self.url.removeprefix("unix://"))
        self._listener.listen(64)

    def __enter__(self) -> Self:
        self._start(self._accept)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()
        for thread in self._threads:
            thread.join(5)
            assert not thread.is_alive()

    def cut(self) -> None:
        """Close all connections now."""
        for end in list(self._open):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def _start(self, work: object, *arguments: object) -> None:
        thread = threading.Thread(target=work, args=arguments, daemon=True)  # type: ignore[arg-type]
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while not self._ended.is_set():
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            server = socket.socket(socket.AF_UNIX)
            try:
                if self.refusing:
                    raise OSError
                server.connect(self.target)
            except OSError:
                client.close()
                server.close()
                continue
            self._open |= {client, server}
            both_done = threading.Barrier(2)
            self._start(self._pass, client, server, "cut_up", both_done)
            self._start(self._pass, server, client, "cut_down", both_done)

    def _pass(self, source: socket.socket, sink: socket.socket, cut: str, both_done: threading.Barrier) -> None:
        passed = 0
        with contextlib.suppress(OSError):
            for data in self._chunks(source):
                while self.stalled and not self._ended.is_set():
                    time.sleep(0.005)
                limit = getattr(self, cut)
                if limit is not None and passed + len(data) >= limit:
                    setattr(self, cut, None)
                    self.cuts += 1
                    sink.sendall(data[: limit - passed])
                    break
                sink.sendall(data)
                passed += len(data)
                if cut == "cut_up":
                    self.passed_up += len(data)
                if self.pause:
                    time.sleep(self.pause)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        with contextlib.suppress(threading.BrokenBarrierError):
            both_done.wait(5)
        self._open.discard(source)
        source.close()

    def _chunks(self, source: socket.socket) -> Iterator[bytes]:
        while data := source.recv(1 << 16):
            while data:
                chunk = self.chunk
                yield data[:chunk]
                data = data[chunk:]


@contextlib.contextmanager
def scripted(*steps: bytes | int) -> Iterator[socket.socket]:
    """A connected socket whose peer, in a thread, sends the bytes and receives the numbers of bytes, in order; then it
    waits until the socket is closed."""
    ours, theirs = socket.socketpair()

    def play() -> None:
        with contextlib.suppress(OSError):
            for step in steps:
                if isinstance(step, bytes):
                    theirs.sendall(step)
                else:
                    left = step
                    while left:
                        left -= len(theirs.recv(min(left, 1 << 16))) or left
            while theirs.recv(1 << 16):
                pass

    thread = threading.Thread(target=play, daemon=True)
    thread.start()
    try:
        yield ours
    finally:
        with contextlib.suppress(OSError):
            theirs.shutdown(socket.SHUT_RDWR)
        thread.join(5)
        theirs.close()
        ours.close()
        assert not thread.is_alive()
