"""A server that takes its time: a proxy for Unix sockets with a limited rate towards the server."""

from __future__ import annotations

import socket
import tempfile
import threading
import time
from pathlib import Path
from types import TracebackType
from urllib.parse import unquote, urlsplit


class SlowServer:
    """``with SlowServer(url, rate) as slow: connect(slow.url)``: passes on ``rate`` bytes a second."""

    def __init__(self, url: str, rate: float) -> None:
        self._target = unquote(urlsplit(url).path)
        self._rate = rate
        self._folder = tempfile.TemporaryDirectory(prefix="slow-")
        path = Path(self._folder.name) / "s.sock"
        self.url = f"unix://{path}"
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._sockets = [self._listener]

    def __enter__(self) -> SlowServer:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for sock in self._sockets:
            sock.close()
        self._folder.cleanup()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.socket(socket.AF_UNIX)
            server.connect(self._target)
            self._sockets += [client, server]
            threading.Thread(target=self._copy, args=(client, server, self._rate), daemon=True).start()
            threading.Thread(target=self._copy, args=(server, client, None), daemon=True).start()

    @staticmethod
    def _copy(source: socket.socket, target: socket.socket, rate: float | None) -> None:
        try:
            while data := source.recv(1 << 18):
                if rate is not None:
                    time.sleep(len(data) / rate)
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)
        except OSError:
            pass
