"""Everything that this package raises on purpose.

::

    AionpredisError
    ├── UsageError             an argument, option or URL is wrong              (also a ValueError)
    ├── EncodeError            this value cannot be stored                      (also a TypeError)
    ├── DecodeError            the stored value cannot be handed out            (also a ValueError)
    │   ├── NotAnArray         neither .npy, .safetensors nor a registered codec
    │   ├── WrongKind          a record where an array was asked for, or the reverse
    │   ├── CorruptValue       a known format whose bytes contradict themselves
    │   └── OutMismatch        the array does not fit the caller's ``out=``
    ├── ConnectError           no connection could be made                      (also a ConnectionError)
    │   └── AuthenticationError
    ├── ConnectionLost         an established connection broke                  (also a ConnectionError)
    │   ├── Stalled            no byte moved for ``timeout`` seconds            (also a TimeoutError)
    │   ├── ProtocolError      the peer does not speak RESP2
    │   └── OutcomeUnknown     the command was sent; whether it ran is not known
    ├── ServerError            the server answered with an error
    │   ├── Redirected         … because another server of its cluster has the key (MOVED, ASK)
    │   ├── ServerFull         … because its ``maxmemory`` is reached (OOM)
    │   ├── ServerUnavailable  … because it cannot yet, or not any more (LOADING, READONLY, …)
    │   └── NotReplicated      it stored the value, and too few of its replicas have it
    ├── WriteFailed            a writer's items that were not stored, with their keys
    └── ReplayError
        ├── RunEnded           a newer run has begun: fetch its policy and go on
        ├── RunConflict        another trainer began this run
        ├── ReplayGone         the replay's log does not exist (any more)
        └── SchemaMismatch     the run was begun with other columns

Facts are attributes (``key``, ``run``, …), so that a program need not parse a message.

An error that is kept somewhere is not raised itself, but a copy: its traceback would lead to the frames that refer to it, and
what these hold (a broken connection's 256 KiB, the caller's arrays) would stay until the garbage collector comes. A program
that makes few objects waits for that for minutes.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, ClassVar

__all__ = [
    "AionpredisError",
    "AuthenticationError",
    "ConnectError",
    "ConnectionLost",
    "CorruptValue",
    "DecodeError",
    "EncodeError",
    "NotAnArray",
    "NotReplicated",
    "OutMismatch",
    "OutcomeUnknown",
    "ProtocolError",
    "Redirected",
    "ReplayError",
    "ReplayGone",
    "RunConflict",
    "RunEnded",
    "SchemaMismatch",
    "ServerError",
    "ServerFull",
    "ServerUnavailable",
    "Stalled",
    "UsageError",
    "WriteFailed",
    "WrongKind",
]


class AionpredisError(Exception):
    """Root of this package's exceptions. ``given_up``: it has been tried again, as far as that makes sense.

    They can be copied, and sent to another process.
    """

    given_up = False

    def __reduce__(self) -> tuple[Any, ...]:
        return _remade, (type(self), self.args), self.__dict__


def _remade(kind: type[AionpredisError], args: tuple[Any, ...]) -> AionpredisError:
    return kind.__new__(kind, *args)  # not by __init__, which wants the facts


class UsageError(AionpredisError, ValueError):
    """An argument, an option or a URL is wrong; nothing was sent."""


class KeyedError(AionpredisError):
    """An error about one stored value. ``key``: its name on the server, where known."""

    def __init__(self, message: str, *, key: str | bytes | None = None) -> None:
        super().__init__(message)
        self.key = key

    def __str__(self) -> str:
        message = super().__str__()
        return message if self.key is None else f"{message} [key {self.key!r}]"


class EncodeError(KeyedError, TypeError):
    """The value cannot be stored; nothing was sent."""


class DecodeError(KeyedError, ValueError):
    """The stored value cannot be handed out."""


class NotAnArray(DecodeError):
    """The value is neither ``.npy``, ``.safetensors`` nor the output of a registered codec."""


class WrongKind(DecodeError):
    """An array was asked for and a record is stored, or the reverse."""


class CorruptValue(DecodeError):
    """The value begins like a known format, but its bytes contradict themselves."""


class OutMismatch(DecodeError):
    """The stored array has another dtype, shape or order than ``out=``; the contents of ``out`` are undefined."""


class ConnectError(AionpredisError, ConnectionError):
    """No connection could be made."""


class AuthenticationError(ConnectError):
    """The server refused user name, password or rights at connecting."""


class ConnectionLost(AionpredisError, ConnectionError):
    """An established connection broke."""


class Stalled(ConnectionLost, TimeoutError):
    """Something was outstanding, and no byte moved in either direction for ``timeout`` seconds."""


class ProtocolError(ConnectionLost):
    """The peer sent bytes that are not RESP2. The connection was closed."""


class OutcomeUnknown(ConnectionLost):
    """The connection broke after the command was sent, at least in part: it may or may not have run."""


class ServerError(AionpredisError):
    """The server answered with an error.

    ``code``: its first word (``WRONGTYPE``, ``NOPERM``, …); ``command``: the name of the command; ``key``: where one is
    meant. Of ``NOPERM`` the message says which rule the user's ACL lacks.
    """

    HINTS: ClassVar[dict[str, str]] = {
        "MISCONF": "the server cannot write to its disk, and refuses writes until it can: make room there; its log says more",
        "MOVED": "the server is one of a cluster: connect with redis+cluster://host:port",
        "ASK": "the server is one of a cluster: connect with redis+cluster://host:port",
        "CROSSSLOT": "in a cluster all keys of one command must have the same slot: give them a {common} part",
    }

    def __init__(self, message: str, *, command: str | None = None, key: str | bytes | None = None) -> None:
        super().__init__(message)
        self.code = message.partition(" ")[0]
        self.command = command
        self.key = key

    def about(self, command: str, key: str | bytes | None = None) -> ServerError:
        """A copy that names the command and the key, to be raised."""
        error = copy.copy(self)
        error.command, error.key = command, key
        return error

    def __str__(self) -> str:
        message = super().__str__()
        if "NOPERM" in message and self.command:  # EXEC's begins with another word
            key = self.key.decode("utf-8", "backslashreplace") if isinstance(self.key, bytes) else self.key
            rule = f"+{self.command.lower().replace(' ', '|')}" + (f" together with ~{key}" if key else "")
            message += f"; the user's ACL needs {rule}"
        if self.code in self.HINTS:
            message += f": {self.HINTS[self.code]}"
        about = [part for part in (self.command, self.key and f"key {self.key!r}") if part]
        return f"{message} [{', '.join(about)}]" if about else message


class Redirected(ServerError):
    """Another server of the cluster serves the key's slot (MOVED), or the key while its slot moves there (ASK).

    A client of a cluster follows it; so it is raised only by one that was connected to a single server.
    """

    @property
    def asks(self) -> bool:
        """Whether only this command goes there; else the slot has moved."""
        return self.code == "ASK"

    @property
    def slot(self) -> int:
        return int(self.args[0].split()[1])

    @property
    def address(self) -> tuple[str, int]:
        """Host and port; the host is empty if it is that of the server that says so."""
        host, _, port = self.args[0].split()[2].rpartition(":")
        return host, int(port)


class ServerFull(ServerError):
    """The server's ``maxmemory`` is reached, and its policy does not let it free anything (OOM)."""


class ServerUnavailable(ServerError):
    """The server did nothing, for a reason that may pass: it loads its data (LOADING), is a replica (READONLY, MASTERDOWN,
    NOREPLICAS, UNBLOCKED), runs a script (BUSY), or its cluster moves slots (TRYAGAIN, CLUSTERDOWN). It was tried again for
    ``retry_timeout`` seconds. ``redirected``: another server had named it.
    """

    redirected = False

    CODES = frozenset(
        ("LOADING", "READONLY", "MASTERDOWN", "NOREPLICAS", "UNBLOCKED", "BUSY", "TRYAGAIN", "CLUSTERDOWN")
    )


class NotReplicated(ServerError):
    """The primary server has it, and fewer replicas than were asked for say so, too; it may still reach them.

    ``replicas``: how many were asked for; ``acknowledged``: how many have it.
    """

    def __init__(self, replicas: int, acknowledged: int) -> None:
        super().__init__(
            f"NOTREPLICATED only {acknowledged} of {replicas} replicas acknowledge what the primary has stored"
        )
        self.replicas = replicas
        self.acknowledged = acknowledged


class WriteFailed(AionpredisError):
    """Items that a writer accepted and could not store. ``failures``: ``(key, exception)`` pairs."""

    def __init__(self, failures: Sequence[tuple[str | bytes, Exception]]) -> None:
        self.failures = list(failures)
        keys = ", ".join(repr(key) for key, _ in self.failures[:3])
        more = f" and {len(self.failures) - 3} more" if len(self.failures) > 3 else ""
        super().__init__(f"{len(self.failures)} not stored: {keys}{more}; the first: {self.failures[0][1]}")


class ReplayError(AionpredisError):
    """An error about one replay. ``replay``: its name; ``run``: the run's number, where one is meant."""

    def __init__(self, message: str, *, replay: str, run: int | None = None) -> None:
        super().__init__(message)
        self.replay = replay
        self.run = run


class RunEnded(ReplayError):
    """A newer run has begun, so the server refuses what belongs to this one."""


class RunConflict(ReplayError):
    """Another trainer began a run at the same moment and won."""


class ReplayGone(ReplayError):
    """The replay's log does not exist: it was deleted, or no trainer has begun a run."""


class SchemaMismatch(ReplayError):
    """The run was begun with other columns than this process declares."""
