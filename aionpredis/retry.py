"""Another attempt: which errors are worth one, how long to wait before it, when to give up, and what the log says.

Worth one is what passes by itself: a broken connection, a server that is not there at the moment, and a server that answers
but cannot yet (:class:`ServerUnavailable`). Final are a refused password and bytes that are no RESP2. Whether repeating is
*harmless* is for the caller to know; most requests of this package are, and for the others there is ``OutcomeUnknown``.
"""

from __future__ import annotations

import logging
import math
import time
from numbers import Real
from typing import TYPE_CHECKING, Any

from redis.backoff import FullJitterBackoff

from aionpredis.errors import (
    AionpredisError,
    AuthenticationError,
    ConnectionLost,
    ProtocolError,
    ServerError,
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


GIVEN_UP = "given up after"


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
        self._began: dict[str, float] = {}  # by kind

    @property
    def changes(self) -> int:
        """Grows when the server may have become another one, or may have lost data: a failover can undo what was read."""
        return self._met + self.counters.reconnects

    def replaced(self) -> None:
        """Another server has taken the place of one that this client used."""
        self._met += 1

    def meets(self, error: AionpredisError) -> str:
        """Count an error; of which kind of fault it is."""
        is_answer = isinstance(error, ServerError)
        code = error.code if isinstance(error, ServerError) else type(error).__name__
        if code not in ANSWERS:
            self.counters.errors[code] += 1
        self._met += not is_answer or code in CHANGES
        return code if is_answer else LOST

    def begins(self, kind: str, error: Exception) -> None:
        if kind not in self._began:
            self._began[kind] = time.monotonic()
            logger.warning("%s: %s", self.place, error)

    def ends(self, kind: str) -> None:
        began = self._began.pop(kind, None)
        if began is not None:
            logger.info("%s: %s is over after %.1f s", self.place, kind, time.monotonic() - began)

    def forget(self, kind: str) -> None:
        """It was given up, and raised: it is news again when it is met again."""
        self._began.pop(kind, None)


LOST = "lost connection"
"""The kind of fault that every broken or refused connection is."""

CHANGES = {"LOADING", "READONLY", "MASTERDOWN", "UNBLOCKED"}
"""Refusals of a server whose data are being replaced, or whose role was changed."""

_ELSEWHERE = {
    "READONLY": "the server has become a replica",
    "CLUSTERDOWN": "the server has lost its cluster",
}
"""Refusals of a server that may have been replaced."""

ANSWERS = {"ERR", "BUSYGROUP", "NOGROUP"}
"""Codes of errors that are no faults: a stream that does not exist, an id that is taken, a command that is wrong."""


class Retry:
    """The attempts of one operation, or of one task that shall go on, since the last that succeeded.

    ::

        except (ConnectionLost, ConnectError) as error:
            pause = retry.after(error)
        await anyio.sleep(pause)

    ``seconds``: instead of the client's ``retry_timeout``. Nothing is made, and nothing called, while all goes well.
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
        """Seconds to wait before the next attempt; raises ``error`` if there shall be none.

        ``connection``: the one over which the server answered so. One that leads to a replica is given up: another server
        may be reached under that address by now.
        """
        faults, now = self._faults, time.monotonic()
        if not self.attempts:
            # A silence is noticed when it has lasted ``timeout`` already.
            self._began = now - (faults.timeout if isinstance(error, Stalled) else 0.0)
        self.attempts += 1
        elapsed = now - self._began
        kind = faults.meets(error)
        if kind in _ELSEWHERE and connection is not None:
            connection.abort(ConnectionLost(_ELSEWHERE[kind]))
        is_final = isinstance(error, FINAL)
        if is_final or elapsed >= self._seconds - 1e-6:  # now - (now - x) may be less than x
            if self.attempts > 1 and not is_final and GIVEN_UP not in str(error):  # who called may have tried by itself
                times = f"{self.attempts} attempts in {elapsed:.1f} s"
                error.args = (f"{error.args[0]} ({GIVEN_UP} {times})", *error.args[1:])
            faults.forget(kind)
            self._kinds.discard(kind)
            raise error
        faults.counters.retries += 1
        faults.begins(kind, error)
        self._kinds.add(kind)
        pause = min(backoff(self.attempts), self._began + self._seconds - now)
        logger.debug("%s: attempt %d in %.3f s: %s", faults.place, self.attempts + 1, pause, error)
        return pause

    def succeeded(self) -> None:
        """The attempt after the last :meth:`after` did. What failed before does not count any more."""
        for kind in self._kinds:
            self._faults.ends(kind)
        self.reset()

    def reset(self) -> None:
        """Begin to count anew."""
        self.attempts = 0
        self._kinds.clear()
