"""What no Python client can pass: the C client, and the bare socket between two processes."""

from __future__ import annotations

import multiprocessing
import os
import socket
import subprocess
from multiprocessing.connection import Connection
from typing import ClassVar

import numpy as np

from aionpredis.errors import UsageError
from bench.harness import Contender, Sample
from bench.machine import server_core
from bench.peers import unix_path

SEND_BUFFER = 4 << 20


class CClient(Contender):
    """``redis-benchmark``: pipelines of 64 over 1 to 4 connections, one C thread, values that are parsed and dropped."""

    kind = "c"
    needs = "redis-benchmark"
    command: ClassVar[str]
    connections: ClassVar[int]
    count: ClassVar[int]
    nbytes: ClassVar[int]

    async def run(self) -> Sample:
        count = self.work.size(self.count)
        path = unix_path(self.work.url)
        where = ["-s", path] if path else ["-u", self.work.url]
        program = ["redis-benchmark", *where, "-t", self.command, "-d", str(self.nbytes), "-n", str(count)]
        program += ["-r", str(self.count), "-P", "64", "-c", str(self.connections), "--csv"]
        done = subprocess.run(program, capture_output=True, text=True, check=False)  # noqa: ASYNC221  # nothing else runs here
        if done.returncode:  # not by check=True, which tells the URL
            raise UsageError(f"redis-benchmark failed: {done.stderr or done.stdout}")
        lines = done.stdout.splitlines()
        header, figures = (line.replace('"', "").split(",") for line in lines[-2:])
        rate = float(figures[header.index("rps")])
        return Sample(count, count * self.nbytes, seconds=count / rate)  # without the program's start


def _peer(pipe: Connection, sock: socket.socket, sends: bool, core: int | None) -> None:
    if core is not None:
        os.sched_setaffinity(0, {core})
    while (order := pipe.recv()) is not None:
        size, count = order
        view = np.random.default_rng(1).integers(0, 255, size, np.uint8).data
        pipe.send(None)
        for _ in range(count):
            done = 0
            while done < size:
                done += sock.send(view[done:]) if sends else sock.recv_into(view[done:])
        pipe.send(None)


class SocketPair(Contender):
    """Messages through a Unix socket pair, from process to process: no server, no protocol."""

    name = "socketpair"
    kind = "socket"
    receives: ClassVar[bool]
    size: ClassVar[int]
    count: ClassVar[int]
    circulating: ClassVar[int] = 4
    """How many messages' memory takes turns, as in a batch."""

    async def open(self) -> None:
        mine, theirs = socket.socketpair()
        for end in (mine, theirs):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        context = multiprocessing.get_context("fork")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=_peer, args=(other, theirs, self.receives, server_core()), daemon=True)
        self._process.start()
        theirs.close()
        self._sock = mine
        self._memory = np.zeros(self.circulating * self.size, np.uint8).data  # an array's memory has huge pages

    async def run(self) -> Sample:
        import time

        count, size = self.work.size(self.count), self.size
        self._pipe.send((size, count))
        memory = self._memory
        self._pipe.recv()
        start = time.perf_counter()
        for index in range(count):
            view = memory[index % self.circulating * size :][:size]
            done = 0
            while done < size:
                done += self._sock.recv_into(view[done:]) if self.receives else self._sock.send(view[done:])
        self._pipe.recv()
        return Sample(count, count * size, seconds=time.perf_counter() - start)

    async def close(self) -> None:
        self._pipe.send(None)
        self._process.join(5)
        self._sock.close()
