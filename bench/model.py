"""What a command costs a server, what a fleet should cost by that, and what a small one does: the model of docs/deploy.md.

CPU time of the servers from ``/proc``, not rates: a busy machine changes it, too, but by a factor of two at most.

A server's limit is what it does when it finds many commands at each turn; with nothing else to do it wakes up for each,
which takes several times as long. So for the costs it is stopped (SIGSTOP) while a thousand connections send a command each,
and a fleet's servers, which two cores of actors cannot keep busy, get a twentieth of the time.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import resource
import signal
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AsyncExitStack, ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any, Final

import anyio
import anyio.to_thread
import numpy as np
from redis.crc import key_slot
from rich.console import Console
from rich.table import Table

import aionpredis
from aionpredis import Schema
from aionpredis.wire import resp
from tests.cluster import Cluster
from tests.nodes import Node, Nodes

CHUNK: Final = 16

SCHEMAS: Final = {
    "64 float32": Schema(state=("float32", (64,)), action="int64", reward="float32", terminated="bool"),
    "80x80 uint8": Schema(state=("uint8", (80, 80)), action="int64", reward="float32", terminated="bool"),
    "80x80 uint16": Schema(state=("uint16", (80, 80)), action="int64", reward="float32", terminated="bool"),
}

POLICY: Final = 10_000_000
"""Bytes of the weights that many fetch."""

CONNECTIONS: Final = 1_000
IN_FLIGHT: Final = 40_000_000
"""Bytes of commands, or of replies, that are on their way at once at most."""

LEASE: Final = ("NX", "PX", "60000")
"""What an actor's SET has behind the value."""

LOG: Final = "{model}:log"

SHARE: Final = 0.05
CYCLE: Final = 0.04
"""Seconds. Of each cycle the servers of a fleet run for this share: about as long as what has come meanwhile takes them."""

MESSAGE: Final = 8.0
"""µs more for a command of a fleet's. Fitted to the first fleet below; the others are predictions. Two of them are the waking
of a client that waits; the rest is not explained: it is the same with a core for the server alone and with 1,024 actors."""


class One(Nodes):
    """A single server, no cluster."""

    def _start(self) -> None:
        self._add({})

    def _is_ok(self) -> bool:
        return True


def _command(*arguments: Any) -> bytes:
    return b"".join(resp.encode(*arguments))


ADD: Final = _command("XADD", LOG, "1-*", "c", bytes(16))
"""A commit; longer by a byte for eight transitions if an episode ends in it."""

KINDS: Final[dict[str, Callable[[], Nodes]]] = {
    "one server": One,
    "a cluster's": partial(Cluster, 1, replicas=0),
    "with a replica": partial(Cluster, 1, replicas=1),
}


def model(console: Console, *, quick: bool) -> dict[str, Any]:
    """Print, and return, the costs, and the fleets beside what the costs predict."""
    costs = {name: measure(kind, quick=quick) for name, kind in KINDS.items()}
    print_costs(console, costs)
    fleets = []
    for state, primaries in itertools.product(("64 float32", "80x80 uint8"), (1, 3)):
        fleet = measure_fleet(state, primaries, actors=64 if quick else 256, seconds=3 if quick else 10)
        each = costs["one server" if primaries == 1 else "a cluster's"]
        # Of all chunks a part goes to each primary, and the log's has besides the entries of all.
        fleet.predicted_data = (each[f"SET {state}, new memory"] + each["PERSIST"] + 2 * MESSAGE) / primaries
        fleet.predicted_log = fleet.predicted_data + each["XADD"] + MESSAGE
        fleets.append(fleet)
    print_fleets(console, fleets)
    return {"costs": costs, "fleets": [vars(fleet) for fleet in fleets]}


def print_costs(console: Console, costs: dict[str, dict[str, float]]) -> None:
    table = Table(title="CPU µs of a busy server for a command; bytes of its memory", title_justify="left")
    for column in ("", *costs):
        table.add_column(column, justify="right" if column else "left")
    for name in costs["one server"]:
        table.add_row(name, *(f"{figures[name]:,.1f}" if name in figures else "" for figures in costs.values()))
    console.print(table)


def print_fleets(console: Console, fleets: Sequence[Fleet]) -> None:
    table = Table(title=f"Fleets: CPU µs of a server for a chunk of {CHUNK} of any actor", title_justify="left")
    columns = (
        "state",
        "actors",
        "primaries",
        "chunks",
        "data",
        "predicted",
        "log's",
        "predicted",
        "keys",
        "client/transition",
    )
    for column in columns:
        table.add_column(column, justify="right")
    for fleet in fleets:
        data = [f"{fleet.data:.1f}", f"{fleet.predicted_data:.1f}"] if fleet.primaries > 1 else ["", ""]
        table.add_row(
            fleet.state,
            f"{fleet.actors}",
            f"{fleet.primaries}",
            f"{fleet.chunks:,}",
            *data,
            f"{fleet.log:.1f}",
            f"{fleet.predicted_log:.1f}",
            " ".join(f"{share:.1%}" for share in fleet.shares),
            f"{fleet.client:.1f}",
        )
    console.print(table)


def cpu_seconds(pid: int) -> float:
    """User and system, all threads; in ns, where ``stat`` has hundredths of a second."""
    tasks = Path(f"/proc/{pid}/task")
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks.iterdir()) / 1e9


# --- what a command costs --------------------------------------------------------------------------------------------


def measure(kind: Callable[[], Nodes], *, quick: bool) -> dict[str, float]:
    """µs of the server's CPU for each command of the replay; bytes of memory for a connection, a chunk, an entry."""
    costs: dict[str, float] = {}
    rounds = 2 if quick else 8
    with kind() as nodes:
        node = nodes.nodes[0]
        empty = _used(node)
        with _connected(node) as sockets:
            costs["connection, bytes"] = (_used(node) - empty) / len(sockets)
            costs["XADD"] = median(_cost(node, sockets, [ADD] * len(sockets)) for _ in range(rounds))
            costs["log entry, bytes"] = node.call("MEMORY", "USAGE", LOG, "SAMPLES", 0) / node.call("XLEN", LOG)
            page = _command("XRANGE", LOG, "-", "+", "COUNT", 1000)
            costs["XRANGE, an entry"] = median(_cost(node, sockets[:50], [page] * 50) for _ in range(rounds)) / 1000
            node.admin.set("weights", bytes(POLICY))
            load = _command("GET", "weights")
            costs["GET 10 MB"] = median(_cost(node, sockets[:4], [load] * 4, POLICY) for _ in range(rounds))
    keeps: list[float] = []
    for state, schema in SCHEMAS.items():
        size = schema.layout(CHUNK).size
        value = bytes(size)
        with kind() as nodes, _connected(node := nodes.nodes[0]) as sockets:  # one whose heap has not grown yet
            some = sockets[: IN_FLIGHT // size]

            def cost(batch: list[bytes], *command: Any, nbytes: int = 0) -> float:
                commands = [_command(command[0], key, *command[1:]) for key in batch]
                return _cost(node, some, commands, nbytes)  # noqa: B023  # called in this turn only

            batches = [
                [b"model:1:0011223344556677:%d" % (1000 * i + j) for j in range(len(some))] for i in range(rounds)
            ]
            before = _used(node)
            costs[f"SET {state}, new memory"] = median(cost(batch, "SET", value, *LEASE) for batch in batches)
            keeps += [cost(batch, "PERSIST") for batch in batches]
            if len(nodes.nodes) == 1:  # else what waits for the replica counts as used, too
                name = f"chunk {state}, bytes beside its {schema.row_nbytes * CHUNK:,}"
                costs[name] = (_used(node) - before) / rounds / len(some) - schema.row_nbytes * CHUNK
            costs[f"GET {state}"] = median(cost(batch, "GET", nbytes=size) for batch in batches)
            costs[f"UNLINK {state}"] = median(cost(batch, "UNLINK") for batch in batches)
            costs[f"SET {state}"] = median(cost(batch, "SET", value, *LEASE) for batch in batches)
    costs["PERSIST"] = median(keeps)
    return costs


@contextmanager
def _connected(node: Node) -> Iterator[list[socket.socket]]:
    with ExitStack() as stack:
        sockets = []
        for _ in range(CONNECTIONS):
            each = stack.enter_context(socket.create_connection((node.address, node.port)))
            # So that a whole chunk waits in the kernel while the server is stopped.
            each.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
            sockets.append(each)
        _cost(node, sockets, [b"PING\r\n"] * len(sockets))
        yield sockets


def _cost(node: Node, sockets: Sequence[socket.socket], commands: Iterable[bytes], nbytes: int = 0) -> float:
    """µs for one of the commands, each on a connection of its own. ``nbytes``: of a value in each reply."""
    before, count = cpu_seconds(node.pid), 0
    node.send(signal.SIGSTOP)
    for each, command in zip(sockets, commands, strict=True):
        each.sendall(command)
        count += 1
    node.send(signal.SIGCONT)
    scratch = bytearray(1 << 20)
    for each in sockets:
        rest = nbytes or 1
        while rest > 0:
            rest -= each.recv_into(scratch)
    spent = cpu_seconds(node.pid) - before
    for each in sockets:  # the end of a long reply, or the page of a log
        each.setblocking(False)
        try:
            while each.recv_into(scratch):
                pass
        except BlockingIOError:
            each.setblocking(True)
    return spent / count * 1e6


def _used(node: Node) -> int:
    time.sleep(3)  # buffers shrink by and by, and what is unlinked goes in the background
    return int(node.admin.info("memory")["used_memory"])


# --- a fleet ---------------------------------------------------------------------------------------------------------


@dataclass
class Fleet:
    """``data``, ``log``: µs of CPU for a chunk of any actor, on a primary without the log and on the one with it.

    ``idle``: ms a second of a primary with nothing to do, which are taken off; ``shares``: of the keys on each;
    ``client``: µs for a transition.
    """

    state: str
    actors: int
    primaries: int
    chunks: int = 0
    data: float = 0.0
    log: float = 0.0
    predicted_data: float = 0.0
    predicted_log: float = 0.0
    idle: float = 0.0
    shares: list[float] = field(default_factory=list)
    connections: list[int] = field(default_factory=list)
    client: float = 0.0


def measure_fleet(state: str, primaries: int, *, actors: int, seconds: float) -> Fleet:
    """Actors with a client each, in a process for each core; they append as fast as they can."""
    fleet = Fleet(state, actors, primaries)
    with ExitStack() as stack:
        nodes: Nodes = stack.enter_context(One() if primaries == 1 else Cluster(primaries, replicas=0))
        if isinstance(nodes, Cluster):
            url, log = nodes.url, nodes.owner(key_slot(LOG.encode()))
        else:
            url, log = f"redis://127.0.0.1:{nodes.nodes[0].port}", nodes.nodes[0]
        anyio.run(_begin, url, state)
        context = multiprocessing.get_context("spawn")
        pipes = []
        processes = os.cpu_count() or 1
        for _ in range(processes):
            mine, other = context.Pipe()
            process = context.Process(target=_simulate, args=(other, url, state, actors // processes, seconds))
            process.start()
            other.close()
            stack.callback(process.join)
            pipes.append(mine)
        for pipe in pipes:
            _receive(pipe)
        fleet.connections = [int(node.admin.info("clients")["connected_clients"]) - 1 for node in nodes.nodes]
        idle = {node: cpu_seconds(node.pid) for node in nodes.nodes}
        time.sleep(2)
        before = {node: cpu_seconds(node.pid) for node in nodes.nodes}
        start = time.monotonic()
        for pipe in pipes:
            pipe.send(None)
        while not all(pipe.poll() for pipe in pipes):
            for node in nodes.nodes:
                node.send(signal.SIGSTOP)
            time.sleep(CYCLE * (1 - SHARE))
            for node in nodes.nodes:
                node.send(signal.SIGCONT)
            time.sleep(CYCLE * SHARE)
        reports = [_receive(pipe) for pipe in pipes]
        fleet.chunks = sum(chunks for chunks, _ in reports)
        fleet.client = sum(cpu for _, cpu in reports) / fleet.chunks / CHUNK * 1e6
        seconds = time.monotonic() - start
        fleet.idle = sum(before[node] - idle[node] for node in nodes.nodes) / len(nodes.nodes) / 2 * 1e3
        spent = {node: cpu_seconds(node.pid) - before[node] - fleet.idle / 1e3 * seconds for node in nodes.nodes}
        spent = {node: cpu / fleet.chunks * 1e6 for node, cpu in spent.items()}
        fleet.log = spent.pop(log)
        fleet.data = sum(spent.values()) / len(spent) if spent else 0.0
        sizes = [int(node.admin.dbsize()) for node in nodes.nodes]
        fleet.shares = [size / sum(sizes) for size in sizes]
    return fleet


def _receive(pipe: Connection) -> Any:
    report = pipe.recv()
    if isinstance(report, Exception):
        raise report
    return report


async def _begin(url: str, state: str) -> None:
    async with aionpredis.connect(url) as client:
        await client.replay("model", SCHEMAS[state], chunk=CHUNK).begin_run()


def _simulate(pipe: Connection, url: str, state: str, actors: int, seconds: float) -> None:
    schema = SCHEMAS[state]
    known = np.zeros(schema["state"][1], schema["state"][0])

    async def act(actor: aionpredis.replay.Actor, until: float) -> None:
        while time.monotonic() < until:
            # A chunk, until it is acknowledged: what an actor has under way that steps a thousand times a second.
            for step in range(CHUNK):
                await actor.append(state=known, action=1, reward=0.0, terminated=step == 3)
            await actor.flush()

    async def main() -> None:
        async with AsyncExitStack() as stack:
            joined = []
            for _ in range(actors):
                client = await stack.enter_async_context(aionpredis.connect(url))
                actor = await stack.enter_async_context(client.replay("model", schema, chunk=CHUNK).actor())
                await actor.join()
                joined.append(actor)
                for _ in range(8):  # so that it is connected to every primary, most likely
                    await act(actor, time.monotonic() + 0.001)
            pipe.send(None)
            await anyio.to_thread.run_sync(pipe.recv)
            before = sum(actor.stats.chunks for actor in joined)
            start = resource.getrusage(resource.RUSAGE_SELF)
            async with anyio.create_task_group() as tasks:
                for actor in joined:
                    tasks.start_soon(act, actor, time.monotonic() + seconds)
            end = resource.getrusage(resource.RUSAGE_SELF)
            cpu = end.ru_utime + end.ru_stime - start.ru_utime - start.ru_stime
            pipe.send((sum(actor.stats.chunks for actor in joined) - before, cpu))

    try:
        aionpredis.run(main)
    except Exception as error:
        pipe.send(RuntimeError(repr(error)))
