"""A proxy in front of a server that misbehaves on command: slow, silent, or gone at a chosen byte or reply."""

from __future__ import annotations

import contextlib
import random
import select
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal, Self
from urllib.parse import unquote, urlsplit

Ending = Literal["close", "reset", "half", "stall"]

RESET = struct.pack("ii", 1, 0)
"""For ``SO_LINGER``: TCP's close() sends RST instead of FIN."""


@dataclass(eq=False)
class Faults:
    """What happens to a connection; everything may be changed while it is open.

    ``cut_up`` / ``cut_down``: it ends after so many bytes to the server / to the client. ``cut_replies``: it ends after so
    many further replies. Each of them is used once. ``ending``: how it ends then: ``close``; ``reset`` (an RST; on a Unix
    socket as close); ``half``: in this direction only, the server's end is shut for reading or for writing; ``stall``: not
    at all, nothing is passed on any more.

    ``chunk``: bytes passed on at a time, 1 is a trickle; ``pause``: seconds after each. ``delay``: seconds that everything
    takes on its way, without limiting how much travels. ``stalled``: nothing is passed on. ``refusing``: it is closed as
    soon as it is made.
    """

    cut_up: int | None = None
    cut_down: int | None = None
    cut_replies: int | None = None
    ending: Ending = "close"
    chunk: int = 1 << 16
    pause: float = 0.0
    delay: float = 0.0
    stalled: bool = False
    refusing: bool = False

    def room_up(self, passed: int, size: int) -> int | None:
        """How many of ``size`` bytes, after those that have ``passed``, still get through; ``None``: all, and no cut."""
        if self.cut_up is None or passed + size < self.cut_up:
            return None
        room, self.cut_up = max(0, self.cut_up - passed), None
        return room

    def room_down(self, passed: int, size: int, ends: list[int]) -> int | None:
        """The same; ``ends``: where replies end in them."""
        if self.cut_down is not None and passed + size >= self.cut_down:
            room, self.cut_down = max(0, self.cut_down - passed), None
            return room
        if self.cut_replies is not None:
            if len(ends) >= self.cut_replies:
                room, self.cut_replies = ends[self.cut_replies - 1], None
                return room
            self.cut_replies -= len(ends)
        return None


class Seeded(Iterator[Faults]):
    """The faults of one connection after another, without end, drawn by this seed. Every other one has none."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._rng = random.Random(seed)

    def __repr__(self) -> str:
        return f"Seeded({self.seed})"

    def __next__(self) -> Faults:
        rng = self._rng
        size = int(10 ** rng.uniform(1, 5.5))  # the handshake has ~150 bytes
        ending: Ending = rng.choice(("close", "reset", "half"))
        kinds = [
            Faults(cut_up=size, ending=ending),
            Faults(cut_down=size, ending=ending),
            Faults(cut_replies=rng.randrange(1, 40), ending=ending),
            Faults(chunk=rng.choice((1, 7, 100)), pause=0.0001, cut_down=size // 10),
            Faults(delay=rng.uniform(0, 0.01), cut_up=size),
            Faults(refusing=True),
        ]
        return rng.choice(kinds) if rng.random() < 0.5 else Faults()


class _Replies:
    """Finds where replies end in a stream of RESP2."""

    def __init__(self) -> None:
        self._line = b""
        self._skip = 0  # bytes of a bulk string, with its end of line
        self._open = 1  # values that the present reply still has

    def ends(self, data: bytes) -> list[int]:
        found: list[int] = []
        at = 0
        while at < len(data):
            if self._skip:
                at += (step := min(self._skip, len(data) - at))
                self._skip -= step
                if self._skip:
                    break
            else:
                stop = data.find(b"\n", at) + 1
                self._line += data[at : stop or None]
                if not stop:
                    break
                at, line, self._line = stop, self._line, b""
                kind, number = line[:1], line[1:].strip()
                if kind not in b"+-:$*":  # TLS: there is no end to be seen
                    self._skip = 1 << 62
                elif kind == b"$" and number != b"-1":
                    self._skip = int(number) + 2
                if self._skip:
                    continue
                if kind == b"*":
                    self._open += max(0, int(number))
            self._open -= 1
            if not self._open:
                found.append(at)
                self._open = 1
        return found


class _Pair:
    """A connection: the client's socket and the server's, and how many threads still use them."""

    def __init__(self, client: socket.socket, server: socket.socket, faults: Faults) -> None:
        self.client = client
        self.server = server
        self.faults = faults
        self.users = 2
        self.reset = False

    def shut(self) -> None:
        # With FIN on its way an RST would come too late.
        _shut(self.client, socket.SHUT_RD if self.reset else socket.SHUT_RDWR)
        _shut(self.server, socket.SHUT_RDWR)


class Proxy(Faults):
    """Listens on a Unix socket in ``folder``, without one on a TCP port, and passes bytes on to ``target``, in threads.

    ``script``: the faults of the next connection, the one after that, …; a connection behind its end has the proxy's own,
    which all such connections share.
    """

    def __init__(self, target: str, folder: Path | None = None, script: Iterable[Faults] = ()) -> None:
        super().__init__()
        self.target = target
        self.connections = 0
        self.cuts = 0
        self.passed_up = 0
        self.script = iter(script)
        self._pairs: dict[socket.socket, _Pair] = {}  # by either socket, while it is open
        self._threads: list[threading.Thread] = []
        self._accepting = threading.Thread(target=self._accept, daemon=True)
        self._ended = threading.Event()
        self._lock = threading.Lock()
        if folder is None:
            self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
            self.url = f"redis://127.0.0.1:{self._listener.getsockname()[1]}"
        else:
            self.url = f"unix://{folder / 'p.sock'}"
            self._listener = socket.socket(socket.AF_UNIX)
            self._listener.bind(self.url.removeprefix("unix://"))
            self._listener.listen(64)

    def __enter__(self) -> Self:
        self._accepting.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            error.add_note(f"the proxy: {self.script!r}, {self.connections} connections, {self.cuts} cuts")
        self._ended.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        if self.url.startswith("unix://"):
            Path(self.url.removeprefix("unix://")).unlink()
        self._accepting.join(30)  # it may be connecting to the server: what it makes then must not be left
        self.cut()
        for thread in (self._accepting, *self._threads):
            thread.join(30)
            assert not thread.is_alive()

    def cut(self) -> None:
        """Close all connections now."""
        for pair in set(self._pairs.values()):
            pair.shut()

    def _start(self, work: object, *arguments: object) -> None:
        thread = threading.Thread(target=work, args=arguments, daemon=True)  # type: ignore[arg-type]
        self._threads = [thread, *(each for each in self._threads if each.is_alive())]
        thread.start()

    def _accept(self) -> None:
        while not self._ended.is_set():
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            faults = next(self.script, self)
            try:
                if faults.refusing:
                    raise OSError
                server = _connected(self.target)
            except OSError:
                client.close()
                continue
            if client.family == socket.AF_INET:
                client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            pair = self._pairs[client] = self._pairs[server] = _Pair(client, server, faults)
            self._start(self._pass, pair, client, server)
            self._start(self._pass, pair, server, client)

    def _pass(self, pair: _Pair, source: socket.socket, sink: socket.socket) -> None:
        up = source is pair.client
        faults = pair.faults
        replies = _Replies()
        passed = 0
        half = False
        with contextlib.suppress(OSError):
            for data in self._chunks(source):
                self._while_stalled(faults)
                room = (
                    faults.room_up(passed, len(data)) if up else faults.room_down(passed, len(data), replies.ends(data))
                )
                if room is not None:
                    self.cuts += 1
                    sink.sendall(data[:room])
                    data = data[room:]
                    if faults.ending != "stall":
                        half, pair.reset = faults.ending == "half", faults.ending == "reset"
                        break
                    faults.stalled = True
                    self._while_stalled(faults)
                passed += len(data)
                if up:
                    self.passed_up += len(data)  # before the answer to it may come
                sink.sendall(data)
                if faults.pause:
                    time.sleep(faults.pause)
        if half:
            _shut(pair.client, socket.SHUT_RD if up else socket.SHUT_WR)
        else:
            pair.shut()
        with self._lock:
            pair.users -= 1
            if pair.users:
                return
        if pair.reset:
            pair.client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        for end in (source, sink):
            del self._pairs[end]
            end.close()

    def _while_stalled(self, faults: Faults) -> None:
        while faults.stalled and not self._ended.is_set():
            time.sleep(0.005)

    def _chunks(self, source: socket.socket) -> Iterator[bytes]:
        """What comes from here, when it is due."""
        faults = self._pairs[source].faults
        poll = select.poll()
        poll.register(source, select.POLLIN)
        held: deque[tuple[float, bytes]] = deque()
        ended = False
        while held or not ended:
            wait = max(0.0, held[0][0] - time.monotonic()) if held else None
            if wait == 0.0:
                _, data = held.popleft()
                while data:
                    chunk = faults.chunk
                    yield data[:chunk]
                    data = data[chunk:]
            elif ended:
                time.sleep(wait or 0)
            elif poll.poll(None if wait is None else 1000 * wait):
                data = source.recv(1 << 16)
                held.append((time.monotonic() + faults.delay, data))
                ended = not data


def _connected(target: str) -> socket.socket:
    url = urlsplit(target)
    if url.hostname:
        return socket.create_connection((url.hostname, url.port or 6379))
    server = socket.socket(socket.AF_UNIX)
    try:
        server.connect(unquote(url.path))
    except OSError:
        server.close()
        raise
    return server


def _shut(end: socket.socket, how: int) -> None:
    with contextlib.suppress(OSError):
        end.shutdown(how)


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
        thread.join(20)
        theirs.close()
        ours.close()
        assert not thread.is_alive()
