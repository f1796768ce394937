"""redis-py makes the connection; we take its socket.

URL parsing, TCP, Unix sockets and TLS, AUTH and ACL users, credential providers, SELECT and the client's name are
redis-py's work, done in a worker thread because it blocks. RESP2, so that nothing is pushed between our replies.
"""

from __future__ import annotations

import math
import threading
from contextlib import suppress
from numbers import Real
from typing import Any
from urllib.parse import urlsplit

import anyio.to_thread
import redis
from redis.backoff import NoBackoff
from redis.connection import parse_url
from redis.retry import Retry

from aionpredis.errors import AuthenticationError, ConnectError, UsageError
from aionpredis.stats import Counters
from aionpredis.wire.connection import Connection
from aionpredis.wire.socket import Socket, wrap

__all__ = ["Dialer"]

# AuthenticationError is a redis ConnectionError in every release, so it is asked for first. NOAUTH comes as itself,
# WRONGPASS as either, NOPERM (an ACL user who may not SELECT) as a ResponseError.
_REFUSED = (redis.AuthenticationError, redis.exceptions.AuthorizationError)


def without_secrets(url: str) -> str:
    """The URL as it may stand in a message: no user, no password, no options."""
    try:
        parts = urlsplit(url)
        place = parts.hostname or ""
        if parts.port is not None:
            place += f":{parts.port}"
    except ValueError:
        return "the given URL"
    return f"{parts.scheme}://{place}{parts.path}"


class Dialer:
    """Makes connections to one server.

    ``url``: ``redis://``, ``rediss://`` or ``unix://``, as redis-py reads them; ``options``: further keyword arguments of
    redis-py's connection (``credential_provider``, ``ssl_ca_certs``, …).

    Raises:
        UsageError: the URL or an option is wrong.
    """

    def __init__(
        self,
        url: str,
        *,
        connect_timeout: float,
        timeout: float,
        max_bulk: int,
        counters: Counters | None = None,
        **options: Any,
    ) -> None:
        if not isinstance(url, str):
            raise UsageError(f"a URL is a str, not {type(url).__name__}")
        self.url = without_secrets(url)
        self._timeout = timeout
        self._max_bulk = max_bulk
        self._counters = counters
        for name, seconds in (("timeout", timeout), ("connect_timeout", connect_timeout)):
            if isinstance(seconds, bool) or not isinstance(seconds, Real) or not 0 < seconds < math.inf:
                raise UsageError(f"{name} is a positive number of seconds, not {seconds!r}")
        try:
            settings = {
                "socket_connect_timeout": connect_timeout,
                "socket_timeout": connect_timeout,
                "retry": Retry(NoBackoff(), 0),
                **options,
                **parse_url(url),  # type: ignore[no-untyped-call]
                "protocol": 2,  # whatever an environment's REDIS_URL asks for
            }
            pool = redis.ConnectionPool(**settings)
            self._make = pool.connection_class
            self._arguments = pool.connection_kwargs
            self._make(**self._arguments)  # unknown options show here, before anything is connected
        except (ValueError, TypeError, redis.RedisError) as error:
            raise UsageError(
                f"{self.url}: {_scrub(str(error), url)}; a URL looks like redis://host:6379/0, rediss://host:6379 "
                "or unix:///path/to/socket"
            ) from None

    async def dial(self) -> Connection:
        """A new connection, ready for commands.

        Raises:
            ConnectError: nobody answers there, or not as a Redis server does.
            AuthenticationError: the server refused the user or password.
        """
        attempt = _Attempt()
        try:
            sock = await anyio.to_thread.run_sync(self._connect, attempt, abandon_on_cancel=True)
        except BaseException:
            attempt.abandon()
            raise
        return Connection(sock, timeout=self._timeout, max_bulk=self._max_bulk, counters=self._counters)

    def _connect(self, attempt: _Attempt) -> Socket:
        connection = self._make(**self._arguments)
        try:
            connection.connect()
            _ping(connection)
        except _REFUSED as error:
            raise AuthenticationError(f"{self.url} refused to let us in: {error}") from error
        except (redis.RedisError, OSError, ValueError) as error:
            if str(error).startswith(("WRONGPASS", "NOAUTH", "NOPERM")):
                raise AuthenticationError(f"{self.url} refused to let us in: {error}") from error
            raise ConnectError(f"no connection to {self.url}: {error}") from error
        raw, connection._sock = connection._sock, None
        if raw is None:
            raise ConnectError(f"no connection to {self.url}: redis-py closed it at once")
        attempt.succeeded(raw)
        return wrap(raw)


class _Attempt:
    """Closes the socket of a connection that was made after its caller had been cancelled."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._abandoned = False
        self._raw: Any = None

    def succeeded(self, raw: Any) -> None:
        with self._lock:
            self._raw = raw
            if self._abandoned:
                raw.close()
                raise ConnectError("cancelled while connecting")

    def abandon(self) -> None:
        with self._lock:
            self._abandoned = True
            if self._raw is not None:
                with suppress(OSError):
                    self._raw.close()


def _ping(connection: Any) -> None:
    """See whether commands are answered: without a password nothing of the handshake tells that one is needed."""
    try:
        connection.send_command("PING")
        connection.read_response()
    except redis.exceptions.NoPermissionError:  # answered, too
        pass
    except redis.ResponseError as error:
        if not str(error).startswith("MISCONF"):  # it cannot save, and answers everything but writes and this
            connection.disconnect()
            raise
    except BaseException:
        connection.disconnect()
        raise


def _scrub(message: str, url: str) -> str:
    """redis-py quotes the URL, or parts of it, in some messages."""
    secret = urlsplit(url).password if "://" in url else None
    message = message.replace(url, without_secrets(url))
    return message.replace(secret, "***") if secret else message
