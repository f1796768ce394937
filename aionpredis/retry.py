"""Another attempt: which errors are worth one, how long to wait before it, when to give up, and what the log says.

Worth one is what passes by itself: a broken connection, a server that is not there at the moment, and a server that answers
but cannot yet (:class:`ServerUnavailable`). Final are a refused password and bytes that are no RESP2. Whether repeating is
*harmless* is for the caller to know; most requests of this package are, and for the others there is ``OutcomeUnknown``.
"""

from __future__ import annotations

import copy
import logging
import math
import time
from numbers import Real
from typing import TYPE_CHECKING, Any

from redis.backoff import FullJitterBackoff

from aionpredis.errors import (
    AionpredisError,
    AuthenticationError,
    ConnectError,
    ConnectionLost,
    ProtocolError,
    ServerError,
    ServerUnavailable,
    Stalled,
    UsageError,
)
from aionpredis.stats import Counters

if TYPE_CHECKING:
    from aionpredis.wire.connection import Connection

__all__ = ["BACKOFF", "LOST", "Faults", "Retry", "backoff"]

logger = logging.getLogger(__name__)

BACKOFF = FullJitterBackoff(cap=1.0, base=0.05)
"""Seconds between attempts: random, so that a thousand simulators do not come back in the same moment. A second at most:
nobody should wait much longer than the fault lasts."""

MAX_EXPONENT = 10
"""From here on the pauses do not grow anyway, and ``2**attempts`` would become too large for a float."""

FINAL = (AuthenticationError, ProtocolError)
"""Connection errors that the next attempt would meet, too."""


def backoff(attempts: int) -> float:
    """Seconds to wait after so many fruitless attempts in a row."""
    return float(BACKOFF.compute(min(attempts, MAX_EXPONENT)))


class Faults:
    """What the tasks of one client share about its server's faults: ``retry_timeout``, the counters and the log's lines.

    Each fault is one WARNING when it begins and one INFO when it is over, however many tasks meet it.
    """

    def __init__(self, *, retry_timeout: Any, timeout: float, counters: Counters) -> None:
        is_number = isinstance(retry_timeout, Real) and not isinstance(retry_timeout, bool)
        if not is_number or not 0 <= retry_timeout <= math.inf:
            raise UsageError(
                f"retry_timeout is a number of seconds, 0 for a single attempt, math.inf for ever; not {retry_timeout!r}"
            )
        self.retry_timeout = float(retry_timeout)
        self.timeout = timeout
        self.counters = counters
        self.place = ""
        """The server's address as it may stand in a log."""
        self._met = 0
        self._began: dict[str, tuple[float, set[object]]] = {}  # by kind: since when, and who tries again

    @property
    def changes(self) -> int:
        """Grows when the server may have become another one, or may have lost data: a failover can undo what was read."""
        return self._met + self.counters.reconnects + self.counters.changes

    def meets(self, error: AionpredisError) -> str:
        """Count an error, unless it is an answer, which was counted when it came; of which kind of fault it is."""
        if isinstance(error, ServerError):
            return error.code
        self.counters.errors[type(error).__name__] += 1
        # Between two connections that were refused nothing can be lost. All tasks of a client count these, many a second.
        self._met += not isinstance(error, ConnectError)
        return LOST

    def begins(self, kind: str, error: Exception, who: object) -> None:
        if kind not in self._began:
            self._began[kind] = time.monotonic(), set()
            logger.warning("%s: %s", self.place, str(error))  # a record may be kept, and all that an error refers to
        self._began[kind][1].add(who)

    def ends(self, kind: str) -> None:
        if kind in self._began:
            began, _ = self._began.pop(kind)
            logger.info("%s: %s is over after %.1f s", self.place, kind, time.monotonic() - began)

    def leaves(self, kind: str, who: object, *, for_another: bool = False) -> None:
        """Given up, or cancelled. When nobody tries any more the fault is forgotten: it is news when it is met again.

        ``for_another``: whom this one has tried for, and who may try again in a moment.
        """
        if kind in self._began:
            _, trying = self._began[kind]
            trying.discard(who)
            if not (trying or for_another):
                del self._began[kind]


LOST = "lost connection"
"""The kind of fault that every broken or refused connection is."""

_ELSEWHERE = {
    "READONLY": "the server has become a replica",
    "CLUSTERDOWN": "the server has lost its cluster",
}
"""Refusals of a server that may have been replaced."""


class Retry:
    """The attempts of one operation, or of one task that shall go on, since the last that succeeded.

    ::

        except (ConnectionLost, ConnectError) as error:
            pause = retry.after(error)
        await anyio.sleep(pause)

    ``seconds``: instead of the client's ``retry_timeout``. Nothing is made, and nothing called, while all goes well. Whoever
    made one calls :meth:`reset` at last, however it ends.
    """

    __slots__ = ("_began", "_faults", "_kinds", "_seconds", "attempts")

    def __init__(self, faults: Faults, seconds: float | None = None) -> None:
        self.attempts = 0
        """That failed, in a row."""
        self._faults = faults
        self._seconds = faults.retry_timeout if seconds is None else seconds
        self._began = 0.0
        self._kinds: set[str] = set()

    def after(self, error: AionpredisError, connection: Connection | None = None) -> float:
        """Seconds to wait before the next attempt; raises a copy of ``error`` if there shall be none, or who was called gave
        up.

        ``connection``: the one over which the server answered so, or redirected to who did. One that leads to a replica is
        given up: another server may be reached under that address by now.
        """
        if error.given_up:
            raise error
        faults, now = self._faults, time.monotonic()
        if not self.attempts:
            # A silence is noticed when it has lasted ``timeout`` already.
            self._began = now - (faults.timeout if isinstance(error, Stalled) else 0.0)
        self.attempts += 1
        elapsed = now - self._began
        kind = faults.meets(error)
        redirected = isinstance(error, ServerUnavailable) and error.redirected
        if kind in _ELSEWHERE and connection is not None and not redirected:
            connection.abort(ConnectionLost(_ELSEWHERE[kind]))
        is_final = isinstance(error, FINAL)
        if is_final or elapsed >= self._seconds - 1e-6:  # now - (now - x) may be less than x
            error.given_up = True
            if self.attempts > 1 and not is_final:
                times = f"{self.attempts} attempts in {elapsed:.1f} s"
                error.args = (f"{error.args[0]} (given up after {times})", *error.args[1:])
            faults.leaves(kind, self)
            self._kinds.discard(kind)
            raise copy.copy(error).with_traceback(error.__traceback__) from error.__cause__
        faults.counters.retries += 1
        faults.begins(kind, error, self)
        self._kinds.add(kind)
        pause = min(backoff(self.attempts), self._began + self._seconds - now)
        logger.debug("%s: attempt %d in %.3f s: %s", faults.place, self.attempts + 1, pause, str(error))
        return pause

    def succeeded(self) -> None:
        """The attempt after the last :meth:`after` did. What failed before does not count any more."""
        for kind in self._kinds:
            self._faults.ends(kind)
        self.reset()

    def reset(self) -> None:
        """Begin to count anew. What has failed so far is not tried again."""
        self.attempts = 0
        while self._kinds:
            self._faults.leaves(self._kinds.pop(), self)
