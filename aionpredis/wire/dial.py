"""redis-py makes the connection; we take its socket.

URL parsing, TCP, Unix sockets and TLS, AUTH and ACL users, credential providers, SELECT and the client's name are
redis-py's work, done in a worker thread because it blocks. RESP2, so that nothing is pushed between our replies. A service
that Sentinels watch is looked for at every dial, so that a reconnect after a failover finds the new primary.

No message of an error, nor of one that led to it, holds a password: a server may quote what it was sent.
"""

from __future__ import annotations

import copy
import math
import os
import ssl
import threading
from collections.abc import Mapping
from contextlib import suppress
from numbers import Real
from typing import Any

import anyio
import anyio.to_thread
import numpy as np
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from aionpredis.errors import AuthenticationError, ConnectError, UsageError
from aionpredis.stats import Counters
from aionpredis.wire.advice import advice, chain, is_refusal, scrub, secrets
from aionpredis.wire.connection import Connection
from aionpredis.wire.sentinel import Sentinels
from aionpredis.wire.socket import Socket, wrap
from aionpredis.wire.source import LOOKS_LIKE, Servers, Source, place, read

__all__ = ["Dialer", "seconds"]

MAX_SECONDS = 1e6
"""Of a time limit: eleven days. ``socket.settimeout()`` takes no more than 2**31 ms."""

_TLS_FILES = "ssl_ca_certs", "ssl_ca_path", "ssl_certfile", "ssl_keyfile"


def seconds(name: str, value: Any) -> float:
    """A time limit, as a float that a socket takes.

    Raises:
        UsageError: it is no positive number.
    """
    number: float = value.item() if isinstance(value, np.generic) else value
    if isinstance(number, bool) or not isinstance(number, Real) or not 0 < number < math.inf:
        raise UsageError(f"{name} is a positive number of seconds, not {value!r}")
    return float(min(number, MAX_SECONDS))


class Dialer:
    """Makes connections to one server.

    ``source``: a URL, a client of redis-py, or what :func:`read` made of one; of a cluster, its first node. ``options``:
    further keyword arguments of redis-py's connection (``credential_provider``, ``ssl_ca_certs``, …), and
    ``sentinel_username``, ``sentinel_password``. TLS is verified, the server's name included, unless
    ``ssl_cert_reqs="none"``, or the client says otherwise.

    Raises:
        UsageError: the source or an option is wrong.
    """

    def __init__(
        self,
        source: Servers | Source,
        *,
        connect_timeout: float,
        timeout: float,
        max_bulk: int,
        counters: Counters | None = None,
        **options: Any,
    ) -> None:
        source = source if isinstance(source, Source) else read(source)
        self.url: str = source.url
        """Where the server is, without secrets."""
        timeout, connect_timeout = seconds("timeout", timeout), seconds("connect_timeout", connect_timeout)
        self._timeout = timeout
        self._connect_timeout = connect_timeout
        self._max_bulk = max_bulk
        self._counters = counters
        self._sentinels: Sentinels | None = None
        settings: dict[str, Any] = dict(options)
        tls, problem = False, ""
        try:
            settings = source.settings(options)
            tls = settings.get("connection_class") is redis.SSLConnection
            if tls:
                _check_tls(settings)
            if source.sentinels:
                self._sentinels = Sentinels(source, _sentinel_settings(source, settings), timeout=connect_timeout)
            limits = {"socket_connect_timeout": connect_timeout, "socket_timeout": connect_timeout}
            # redis-py's parser for hiredis refers to itself, so its buffer stays until the garbage collector comes.
            limits["socket_read_size"] = 4096
            settings = {**limits, "retry": Retry(NoBackoff(), 0), **settings}
            settings["protocol"] = 2  # whatever an environment's REDIS_URL asks for
            self._credentials = settings.get("credential_provider")
            self._name = settings.pop("client_name", None)
            pool = redis.ConnectionPool(**settings)
            self._make = pool.connection_class
            self._arguments = pool.connection_kwargs
            self._make(**self._arguments)  # unknown options show here, before anything is connected
        except (ValueError, TypeError, redis.RedisError) as error:
            problem = scrub(str(error), secrets(settings))
        if problem:  # not while the other error is handled: it would remain as this one's context
            about_tls = "" if tls or "ssl_" not in problem else "ssl_… options are for rediss://; "
            raise UsageError(f"{self.url}: {problem}; {about_tls}{LOOKS_LIKE}")

    @property
    def database(self) -> int:
        """That connections are for."""
        return self._arguments.get("db") or 0

    @property
    def service(self) -> Mapping[str, Any]:
        """What the Sentinels said of the service when it was dialled last; nothing if there are none."""
        return {} if self._sentinels is None else self._sentinels.state

    def at(self, host: str, port: int) -> Dialer:
        """The same, to another server: its credentials, options and time-outs. TLS asks for that server's name."""
        other = copy.copy(self)
        other._sentinels = None
        other._arguments = {**self._arguments, "host": host, "port": port}
        if other._arguments.pop("path", None) is not None:
            other._make = redis.Connection
        scheme = "rediss" if issubclass(other._make, redis.SSLConnection) else "redis"
        other.url = f"{scheme}://{place((host, port))}" + (f"/{self.database}" if self.database else "")
        return other

    async def dial(self, *, readonly: bool = False) -> Connection:
        """A new connection, ready for commands, within ``connect_timeout``. ``readonly``: a replica in a cluster is told to
        answer reads (``READONLY``).

        Raises:
            ConnectError: nobody answers there, or not as a Redis server does.
            AuthenticationError: the server refused the user or password.
        """
        attempt = _Attempt()
        outcome: Socket | ConnectError | None = None
        try:
            # Each step in the thread has this limit, too; a name's look-up, or a server that trickles, has none there.
            with anyio.move_on_after(self._connect_timeout):
                outcome = await anyio.to_thread.run_sync(self._connect, attempt, readonly, abandon_on_cancel=True)
        except BaseException:
            attempt.abandon()
            raise
        if outcome is None:
            attempt.abandon()
            late = TimeoutError(f"timed out after {self._connect_timeout:g} s")
            raise ConnectError(self._describe(str(late), late))
        if isinstance(outcome, ConnectError):
            raise copy.copy(outcome) from outcome.__cause__
        return Connection(outcome, timeout=self._timeout, max_bulk=self._max_bulk, counters=self._counters)

    def _connect(self, attempt: _Attempt, readonly: bool) -> Socket | ConnectError:
        """Runs in the thread, whose frames keep what is raised through them: so an error is returned, and without the
        tracebacks of those that led to it.
        """
        arguments = dict(self._arguments)
        if self._credentials is not None:  # asked here, so that they are known where messages are made
            provider = arguments.pop("credential_provider")
            *user, arguments["password"] = provider.get_credentials()
            arguments["username"] = user[0] if user else None
        if self._sentinels is None:
            return self._connect_to(arguments, attempt, readonly)
        for sentinel, (host, port) in self._sentinels.find():
            outcome = self._connect_to(arguments | {"host": host, "port": port}, attempt, readonly)
            if not isinstance(outcome, ConnectError):
                self._sentinels.first = sentinel
            if not isinstance(outcome, ConnectError) or isinstance(outcome, AuthenticationError) or attempt.abandoned:
                break
        return outcome

    def _connect_to(self, arguments: dict[str, Any], attempt: _Attempt, readonly: bool) -> Socket | ConnectError:
        connection = self._make(**arguments)
        try:
            connection.connect()
            _greet(connection, self._name, readonly=readonly, primary=self._sentinels is not None)
        except (redis.RedisError, OSError, ValueError) as error:
            hidden = secrets(arguments)
            message = scrub(str(error), hidden)
            failure: ConnectError
            if is_refusal(error):
                failure = AuthenticationError(f"{self.url} refused to let us in: {message} ({_who(error)})")
            else:
                failure = ConnectError(self._describe(message, error))
            texts = [str(text) for each in chain(error) for text in (each, *each.args)]
            failure.__cause__ = error if all(scrub(text, hidden) == text for text in texts) else None
            for each in chain(error):
                each.__traceback__ = None
            return failure  # who raises it does not handle the other error, which would become its context
        raw, connection._sock = connection._sock, None
        if raw is None:
            return ConnectError(f"no connection to {self.url}: redis-py closed it at once")
        attempt.succeeded(raw)
        return wrap(raw)

    def _describe(self, message: str, error: Exception) -> str:
        hint = advice(error, scheme=self.url.partition(":")[0].partition("+")[0])
        return f"no connection to {self.url}: {message}{hint and f' ({hint})'}"


class _Attempt:
    """Closes the socket of a connection that was made after its caller had been cancelled."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.abandoned = False
        self._raw: Any = None

    def succeeded(self, raw: Any) -> None:
        with self._lock:
            self._raw = raw
            if self.abandoned:
                raw.close()
                raise ConnectError("cancelled while connecting")

    def abandon(self) -> None:
        with self._lock:
            self.abandoned = True
            if self._raw is not None:
                with suppress(OSError):
                    self._raw.close()


def _check_tls(settings: dict[str, Any]) -> None:
    """Verify unless asked not to; and see that the files are there.

    Raises:
        ValueError: names the option.
    """
    if "ssl_cert_reqs" in settings and settings["ssl_cert_reqs"] is None:
        # redis-py takes it for 'none'.
        raise ValueError("ssl_cert_reqs is 'required' (the default) or 'none', not None")
    if settings.get("ssl_cert_reqs") in ("none", ssl.CERT_NONE):
        settings["ssl_check_hostname"] = False
    settings.setdefault("ssl_check_hostname", True)  # not the default of redis-py 5
    settings.setdefault("ssl_password", "")  # else OpenSSL asks for that of an encrypted key on the terminal
    for name in _TLS_FILES:
        if settings.get(name) is not None and not os.path.exists(settings[name]):  # noqa: PTH110  # of any kind
            raise ValueError(f"{name}: there is no {os.fspath(settings[name])!r}")


def _sentinel_settings(source: Source, settings: dict[str, Any]) -> dict[str, Any]:
    """How the Sentinels are connected: as a client's are, else with the same TLS. Their credentials are taken out of the
    settings.
    """
    own = {name: settings.pop(f"sentinel_{name}", None) for name in ("username", "password")}
    if source.from_sentinel is None:
        shared = {
            name: value for name, value in settings.items() if name.startswith("ssl_") or name == "connection_class"
        }
    else:
        shared = dict(source.from_sentinel)
        if shared.get("connection_class") is redis.SSLConnection:
            _check_tls(shared)
    return shared | {name: value for name, value in own.items() if value is not None}


def _greet(connection: Any, name: str | None, *, readonly: bool, primary: bool) -> None:
    """Name this client, if the user may; and see whether commands are answered: without a password nothing of the
    handshake tells that one is needed. ``primary``: see that it is one.
    """
    try:
        if name:
            _ask(connection, "CLIENT", "SETNAME", name)
        _ask(connection, "PING")
        if readonly:
            connection.send_command("READONLY")
            connection.read_response()
        if primary:
            role = _ask(connection, "ROLE")
            if role is not None and role[0] not in (b"master", "master"):
                where = place((connection.host, connection.port))
                raise redis.ConnectionError(
                    f"the Sentinels say {where}, which is no primary (a failover may be under way)"
                )
    except BaseException:
        connection.disconnect()
        raise


def _ask(connection: Any, *command: str) -> Any:
    """The reply; ``None`` if the user has no right to it, or the server refuses it for a reason of its own."""
    connection.send_command(*command)
    try:
        return connection.read_response()
    except redis.exceptions.NoPermissionError:  # answered, too
        return None
    except redis.ResponseError as error:
        if not str(error).startswith("MISCONF"):  # it cannot save, and answers everything but writes and PING
            raise
        return None


def _who(error: Exception) -> str:
    if isinstance(error, redis.exceptions.NoPermissionError):
        return "what this user's ACL allows is not enough to connect"
    return "user and password: redis://user:password@…, username= and password=, or credential_provider="
