"""Hosts with addresses of their own on one machine, to show that nothing assumes a single one.

::

    with hosts(3) as network:
        with Cluster(hosts=network) as cluster:
            network.run(2, [sys.executable, "-m", "simulator", cluster.url])
            network.cut(0)

A host is a network namespace: own interfaces, own 127.0.0.1, own firewall and ports; files and processes are those of
this machine. All hosts hang on one switch, a bridge in a namespace of its own, and so does this process if it is root.
Each namespace lives as long as a process that reads from a pipe of ours, so that the kernel takes it down when this
process ends, however that happens (pytest-timeout lets nobody clean up); commands of `run` then have to end by themselves.
"""

from __future__ import annotations

import os
import random
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Final, Self

__all__ = ["Hosts", "folder", "hosts"]

_ENVIRONMENT: Final = os.environ | {"PATH": os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin"}  # for ip

# As root, and as anybody who may make user namespaces, where they are root.
_WAYS: Final = (["unshare", "--net"], ["unshare", "--user", "--map-root-user", "--net"])
_PROBE: Final = (
    "ip link add end0 type veth peer name end1 && ip link add switch type bridge && bridge link && command -v nsenter"
)

# Ends with the pipe that it reads. Twice: a server that is being killed may write once more.
_FOLDER: Final = 'f=$(mktemp -d "$1") && echo "$f" && cat && rm -rf "$f" || { sleep 1; rm -rf "$f"; }'

_SUBNET: Final = "198.18.{}.{}"  # 198.18.0.0/15 is set aside for tests between networks (RFC 2544)
_OURS: Final = 254  # this process's address there


def hosts(count: int) -> Hosts:
    """As many hosts, in a ``with`` block: namespaces if this process may make them, else addresses 127.0.0.2 and on."""
    for way in _WAYS if shutil.which("unshare") else ():
        probe = subprocess.run([*way, "sh", "-c", _PROBE], capture_output=True, env=_ENVIRONMENT, check=False)
        if probe.returncode == 0:
            return _Namespaces(count, way)
    return Hosts(count)


@contextmanager
def folder() -> Iterator[Path]:
    """A temporary folder that is gone after the block and after this process, however that ends."""
    with subprocess.Popen(
        ["sh", "-c", _FOLDER, "sh", Path(tempfile.gettempdir()) / "aionpredis-kit-XXXXXX"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        yield Path(process.stdout.readline().rstrip("\n"))


class Hosts:
    """Hosts by address only, all of them this one: the fallback where there are no namespaces.

    ``separate``: whether they are more than that. ``reachable``: whether this process can connect to them; if not,
    only what `run` starts can.
    """

    separate = False
    reachable = True

    def __init__(self, count: int) -> None:
        self._count = count
        self._stack = ExitStack()

    def __len__(self) -> int:
        return self._count

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def address(self, host: int) -> str:
        return f"127.0.0.{2 + host}"

    def binary(self, host: int, binary: Path) -> Path:
        """An executable that runs ``binary`` on this host, as the process that was started, not as its child."""
        return binary

    def cut(self, host: int) -> None:
        """Drop all that the host sends and receives; nobody is told, as when a switch fails."""
        raise NotImplementedError("these hosts are one, and cannot be cut off")

    def mend(self, host: int) -> None:
        """The end of `cut`."""
        raise NotImplementedError("these hosts are one, and cannot be cut off")

    def run(self, host: int, command: Sequence[str | os.PathLike[str]], **options: Any) -> subprocess.Popen[Any]:
        """Start a command on this host; options are those of Popen. Killed at the end of the ``with`` block."""
        process = subprocess.Popen([*self._prefix(host), *command], **options)
        self._stack.callback(_end, process)
        return process

    def _prefix(self, host: int) -> list[str]:
        return []


class _Namespaces(Hosts):
    separate = True

    def __init__(self, count: int, way: list[str]) -> None:
        super().__init__(count)
        self._way = way
        self.reachable = way == _WAYS[0]

    def __enter__(self) -> Self:
        try:
            self._build()
        except BaseException:
            self._stack.close()
            raise
        return self

    def address(self, host: int) -> str:
        return _SUBNET.format(self._subnet, 1 + host)

    def binary(self, host: int, binary: Path) -> Path:
        script = self._folder / f"{len(list(self._folder.iterdir()))}-{binary.name}"
        script.write_text(f'#!/bin/sh\nexec {shlex.join([*self._prefix(host), str(binary)])} "$@"\n')
        script.chmod(0o700)
        return script

    def cut(self, host: int) -> None:
        self._at_switch(f"bridge link set dev host{host} state 0")

    def mend(self, host: int) -> None:
        self._at_switch(f"bridge link set dev host{host} state 3")

    def _prefix(self, host: int) -> list[str]:
        return self._enter(self._pids[host])

    def _build(self) -> None:
        self._folder = self._stack.enter_context(folder())
        self._switch = self._namespace(self._way)
        self._at_switch("ip link add switch type bridge && ip link set switch up")
        self._subnet = self._free_subnet()
        self._pids: list[int] = []
        for host in range(len(self)):
            # In the user namespace of the switch, which has the right to connect them.
            pid = self._namespace([*self._enter(self._switch), *_WAYS[0]])
            self._pids.append(pid)
            self._plug(f"host{host}", pid)
            self._sh(self._prefix(host), f"ip link set lo up && ip addr add {self.address(host)}/24 dev eth0")
            self._sh(self._prefix(host), "ip link set eth0 up")
        if self.reachable:
            name = f"aion{self._switch}"  # goes with the switch
            self._plug("ours", os.getpid(), name)
            self._sh([], f"ip addr add {_SUBNET.format(self._subnet, _OURS)}/24 dev {name} && ip link set {name} up")

    def _free_subnet(self) -> int:
        taken = subprocess.run(["ip", "addr"], capture_output=True, text=True, env=_ENVIRONMENT, check=True).stdout
        return random.SystemRandom().choice([n for n in range(256) if _SUBNET.format(n, _OURS) not in taken])

    def _plug(self, port: str, pid: int, name: str = "eth0") -> None:
        """A cable from this port of the switch to this process's namespace."""
        self._at_switch(f"ip link add {port} type veth peer name {name} netns {pid}")
        self._at_switch(f"ip link set {port} master switch up")

    def _namespace(self, way: list[str]) -> int:
        """A new namespace; the process that holds it."""
        process = subprocess.Popen(
            [*way, "sh", "-c", "echo && exec cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=_ENVIRONMENT
        )
        self._stack.callback(_end, process)
        assert process.stdout is not None
        assert process.stdout.readline() == b"\n"
        return process.pid

    def _enter(self, pid: int) -> list[str]:
        user = [] if self.reachable else [f"--user=/proc/{pid}/ns/user", "--preserve-credentials"]
        return ["nsenter", *user, f"--net=/proc/{pid}/ns/net", "--"]

    def _at_switch(self, script: str) -> None:
        self._sh(self._enter(self._switch), script)

    @staticmethod
    def _sh(prefix: list[str], script: str) -> None:
        subprocess.run([*prefix, "sh", "-c", script], env=_ENVIRONMENT, check=True)


def _end(process: subprocess.Popen[Any]) -> None:
    process.kill()
    process.wait()
    pipes: list[IO[Any] | None] = [process.stdin, process.stdout, process.stderr]
    for pipe in pipes:
        if pipe is not None:
            pipe.close()
