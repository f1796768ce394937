"""Certificates made for a test, and servers that speak TLS with them."""

from __future__ import annotations

import asyncio
import datetime
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import unquote, urlsplit

import pytest
import trustme

from aionpredis.errors import ConnectError

from .servers import free_port, make_server

LONG_AGO = datetime.datetime(2001, 1, 1, tzinfo=datetime.UTC)


class Certificates:
    """A CA, and what it signed, as files in ``folder``. ``names``: whom the server's certificate is for."""

    def __init__(self, folder: Path, *names: str, expired: bool = False) -> None:
        self.ca = trustme.CA()
        self._folder = folder
        folder.mkdir()
        self.ca_file = folder / "ca.pem"
        self.ca.cert_pem.write_to_path(self.ca_file)
        leaf = self.ca.issue_cert(*(names or ("localhost", "127.0.0.1")), not_after=LONG_AGO if expired else None)
        self.server, self.server_key = self._write("server", leaf)

    def _write(self, name: str, leaf: trustme.LeafCert) -> tuple[Path, Path]:
        certificate, key = self._folder / f"{name}.pem", self._folder / f"{name}.key"
        certificate.write_bytes(b"".join(part.bytes() for part in leaf.cert_chain_pems))
        leaf.private_key_pem.write_to_path(key)
        return certificate, key

    def client(self) -> tuple[Path, Path]:
        """Certificate and key for a client."""
        return self._write("client", self.ca.issue_cert("client@example.org"))

    def directives(self) -> dict[str, str]:
        """Of a Redis that speaks TLS by itself."""
        return {
            "tls-cert-file": str(self.server),
            "tls-key-file": str(self.server_key),
            "tls-ca-cert-file": str(self.ca_file),
            "tls-auth-clients": "no",
        }

    def context(self, *, clients: bool = False) -> ssl.SSLContext:
        """For a server; ``clients``: they must have a certificate of the same CA, too."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.server, self.server_key)
        if clients:
            context.verify_mode = ssl.CERT_REQUIRED
            context.load_verify_locations(self.ca_file)
        return context


class Terminator:
    """Listens with TLS on 127.0.0.1 and passes bytes on to the Unix socket ``target``, in a thread with a loop of its own."""

    def __init__(self, target: str, context: ssl.SSLContext) -> None:
        self._target = unquote(urlsplit(target).path)
        self._context = context
        self._ready = threading.Event()
        self._writers: set[asyncio.StreamWriter] = set()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)
        self.port = 0

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._ready.wait(10)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._ended.set)
        self._thread.join(10)
        assert not self._thread.is_alive()

    def cut(self, *, politely: bool) -> None:
        """End all connections: with TLS's own goodbye (close_notify), or as a process does that is killed."""
        end = threading.Event()

        def now() -> None:
            for writer in self._writers:
                writer.close() if politely else writer.transport.abort()
            end.set()

        self._loop.call_soon_threadsafe(now)
        assert end.wait(10)

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._loop.set_exception_handler(lambda loop, context: None)  # handshakes that fail are meant to
        self._ended = asyncio.Event()
        server = await asyncio.start_server(self._accept, "127.0.0.1", 0, ssl=self._context)
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        await self._ended.wait()
        server.close()
        for writer in list(self._writers):
            writer.transport.abort()
        await asyncio.sleep(0.01)  # they are closed in the loop's next turns

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        up_reader, up_writer = await asyncio.open_unix_connection(self._target)
        self._writers |= {writer, up_writer}
        tasks = [
            asyncio.ensure_future(self._pass(reader, up_writer)),
            asyncio.ensure_future(self._pass(up_reader, writer)),
        ]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            for each in (writer, up_writer):
                each.close()
                self._writers.discard(each)

    @staticmethod
    async def _pass(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(1 << 17):
                writer.write(data)
                await writer.drain()
        except OSError:
            pass


@contextmanager
def tls_server(kind: str, certificates: Certificates, **config: str) -> Iterator[int]:
    """The port of a server that speaks TLS: Redis by itself, Valkey (whose packaged binary cannot) behind a terminator.

    ``config``: further directives of Redis, with _ for -.
    """
    if kind == "valkey":
        with make_server(kind) as server, Terminator(server.url, certificates.context()) as terminator:
            yield terminator.port
        return
    port = free_port()
    directives = {"bind": "127.0.0.1", "tls-port": str(port)} | certificates.directives()
    directives |= {name.replace("_", "-"): value for name, value in config.items()}
    server = make_server(kind, config=directives)
    try:
        server.start()
    except ConnectError as error:
        if "already in use" in str(error):
            raise
        pytest.skip(f"this redis-server has no TLS: {str(error).splitlines()[-1]}")
    with server:
        yield port


__all__ = ["Certificates", "Terminator", "tls_server"]
