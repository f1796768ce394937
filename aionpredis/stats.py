"""What a client counts, for people and for :mod:`aionpredis.telemetry`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from aionpredis.writer import Writer

__all__ = ["Counters", "Stats"]

ANSWERS = {"ERR", "BUSYGROUP", "NOGROUP", "MOVED", "ASK"}
"""Codes of errors that are no faults: a stream that does not exist, an id that is taken, a command that is wrong; and which
other server of a cluster to ask."""

CHANGES = {"LOADING", "READONLY", "MASTERDOWN", "UNBLOCKED"}
"""Refusals of a server whose data are being replaced, or whose role was changed."""


@dataclass(frozen=True, slots=True)
class Stats:
    """What a client, with all that was made from it, has done since it was made. All but ``inflight_bytes`` only grow."""

    bytes_sent: int
    """Given to the kernel, over all connections."""
    bytes_received: int
    requests: int
    """Sent, each time; one may have several commands. What a connection's opening takes is not counted."""
    inflight_bytes: int
    """Now: held by writers and actors, and neither stored nor failed; and of replies that were asked for in pipelines."""
    waits: int
    """How often a writer's ``put`` or an actor's ``append`` had to wait for room: backpressure."""
    retries: int
    """Further attempts, after a fault that may pass."""
    reconnects: int
    """Connections that were made anew, of those that tasks share."""
    errors: Mapping[str, int]
    """Faults by kind: the server's code (``OOM``, ``LOADING``, …), once for each command that it refused, or an exception's
    name. Also those that a retry hid."""
    repeated: int
    """A writer's items and an actor's chunks that were sent again, because a fault left open what had become of them."""
    acknowledged: int
    """Transitions: committed to a log by this client's actors."""
    stale: int
    """Transitions: given up, because their run ended before they were committed, or after an error."""
    evicted: int
    """Chunks that were deleted before a reader came to them: by ``capacity``, or with their run."""
    lost: int
    """Chunks that a log names and the server does not have, of a run that is kept. 0, unless the server lost data, or an actor
    died while it committed one (then it was not acknowledged)."""


class Counters:
    """Counted where it happens: once for a system call, a request or a batch, never for an array."""

    __slots__ = (*(field.name for field in fields(Stats)), "changes", "writers")

    bytes_sent: int
    bytes_received: int
    requests: int
    inflight_bytes: int
    waits: int
    retries: int
    reconnects: int
    errors: Counter[str]
    repeated: int
    acknowledged: int
    stale: int
    evicted: int
    lost: int

    changes: int
    """Events from which one must conclude that the server has, or will have, other data: refusals, and failovers."""

    writers: set[Writer]
    """Those that are open. What they hold is asked for: counted with each array it would cost 0.3 µs of 7."""

    def __init__(self) -> None:
        for field in fields(Stats):
            setattr(self, field.name, 0)
        self.errors = Counter()
        self.changes = 0
        self.writers = set()

    def refused(self, code: str) -> None:
        """The server has answered with this error, whoever asked."""
        if code not in ANSWERS:
            self.errors[code] += 1
        self.changes += code in CHANGES

    def snapshot(self) -> Stats:
        values = {field.name: getattr(self, field.name) for field in fields(Stats)}
        values["inflight_bytes"] += sum(writer.inflight for writer in tuple(self.writers))  # by any thread
        return Stats(**values | {"errors": MappingProxyType(dict(self.errors))})
