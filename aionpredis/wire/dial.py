"""redis-py makes the connection; we take its socket.

URL parsing, TCP, Unix sockets and TLS, AUTH and ACL users, credential providers, SELECT and the client's name are
redis-py's work, done in a worker thread because it blocks. RESP2, so that nothing is pushed between our replies.

No message of an error, nor of one that led to it, holds a password: a server may quote what it was sent.
"""

from __future__ import annotations

import math
import os
import re
import ssl
import threading
from contextlib import suppress
from numbers import Real
from typing import Any
from urllib.parse import urlsplit

import anyio
import anyio.to_thread
import redis
from redis.backoff import NoBackoff
from redis.connection import parse_url
from redis.retry import Retry

from aionpredis.errors import AuthenticationError, ConnectError, UsageError
from aionpredis.stats import Counters
from aionpredis.wire.advice import advice, chain
from aionpredis.wire.connection import Connection
from aionpredis.wire.socket import Socket, wrap

__all__ = ["Dialer"]

# AuthenticationError is a redis ConnectionError in every release, so it is asked for first. NOAUTH comes as itself,
# WRONGPASS as either, NOPERM (an ACL user who may not SELECT) as a ResponseError. All without that word.
_REFUSED = (
    redis.AuthenticationError,
    redis.exceptions.AuthorizationError,
    redis.exceptions.NoPermissionError,
)

_LOOKS_LIKE = "a URL looks like redis://host:6379/0, rediss://host:6379 or unix:///path/to/socket"

_ENCODED = "in a URL's user and password, write / as %2F, ? as %3F, # as %23, @ as %40"

# Redis and Valkey quote the arguments of a command that they do not know: AUTH's, where it was renamed. Cut after 128 bytes.
_QUOTED = re.compile(r",? with args beginning with:.*", re.DOTALL)

_TLS_FILES = "ssl_ca_certs", "ssl_ca_path", "ssl_certfile", "ssl_keyfile"


def without_secrets(url: str) -> str:
    """The URL as it may stand in a message: no user, no password, no options.

    Raises:
        UsageError: it is none, or it cannot be told where a password in it ends.
    """
    try:
        parts = urlsplit(url)
        place = parts.hostname or ""
        if ":" in place:
            place = f"[{place}]"
        if parts.port is not None:
            place += f":{parts.port}"
    except ValueError:  # it quotes the URL
        parts = None
    if parts is None or "://" not in url or parts.scheme not in ("redis", "rediss", "unix"):
        raise UsageError(f"this is no URL of a server: {_LOOKS_LIKE}" + (f"; {_ENCODED}" if "@" in url else ""))
    known = "@" in parts.netloc or (parts.scheme == "unix" and not parts.netloc)
    if not known and "@" in url:
        raise UsageError(f"an @ behind the host: {_ENCODED}")
    return f"{parts.scheme}://{place}{parts.path}"


class Dialer:
    """Makes connections to one server.

    ``url``: ``redis://``, ``rediss://`` or ``unix://``, as redis-py reads them; ``options``: further keyword arguments of
    redis-py's connection (``credential_provider``, ``ssl_ca_certs``, …). TLS is verified, the server's name included, unless
    ``ssl_cert_reqs="none"``.

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
        self._connect_timeout = connect_timeout
        self._max_bulk = max_bulk
        self._counters = counters
        for name, seconds in (("timeout", timeout), ("connect_timeout", connect_timeout)):
            if isinstance(seconds, bool) or not isinstance(seconds, Real) or not 0 < seconds < math.inf:
                raise UsageError(f"{name} is a positive number of seconds, not {seconds!r}")
        settings = {
            "socket_connect_timeout": connect_timeout,
            "socket_timeout": connect_timeout,
            "retry": Retry(NoBackoff(), 0),
            **options,
        }
        self._tls = url.startswith("rediss://")
        problem = ""
        try:
            settings |= parse_url(url)  # type: ignore[no-untyped-call]
            settings["protocol"] = 2  # whatever an environment's REDIS_URL asks for
            if self._tls:
                _check_tls(settings)
            self._credentials = settings.get("credential_provider")
            self._name = settings.pop("client_name", None)
            pool = redis.ConnectionPool(**settings)
            self._make = pool.connection_class
            self._arguments = pool.connection_kwargs
            self._make(**self._arguments)  # unknown options show here, before anything is connected
        except (ValueError, TypeError, redis.RedisError) as error:
            problem = _scrub(str(error), self._secrets(settings))
        if problem:  # not while the other error is handled: it would remain as this one's context
            about_tls = "" if self._tls or "ssl_" not in problem else "ssl_… options are for rediss://; "
            raise UsageError(f"{self.url}: {problem}; {about_tls}{_LOOKS_LIKE}")

    @staticmethod
    def _secrets(settings: dict[str, Any]) -> list[str]:
        return [str(value) for name in ("password", "ssl_password") if (value := settings.get(name))]

    async def dial(self) -> Connection:
        """A new connection, ready for commands, within ``connect_timeout``.

        Raises:
            ConnectError: nobody answers there, or not as a Redis server does.
            AuthenticationError: the server refused the user or password.
        """
        attempt = _Attempt()
        sock: Socket | None = None
        try:
            # Each step in the thread has this limit, too; a name's look-up, or a server that trickles, has none there.
            with anyio.move_on_after(float(self._connect_timeout)):
                sock = await anyio.to_thread.run_sync(self._connect, attempt, abandon_on_cancel=True)
        except BaseException:
            attempt.abandon()
            raise
        if sock is None:
            attempt.abandon()
            late = TimeoutError(f"timed out after {self._connect_timeout:g} s")
            raise ConnectError(self._describe(str(late), late))
        return Connection(sock, timeout=self._timeout, max_bulk=self._max_bulk, counters=self._counters)

    def _connect(self, attempt: _Attempt) -> Socket:
        arguments = dict(self._arguments)
        if self._credentials is not None:  # asked here, so that they are known where messages are made
            provider = arguments.pop("credential_provider")
            *user, arguments["password"] = provider.get_credentials()
            arguments["username"] = user[0] if user else None
        failure: ConnectError
        cause: Exception | None
        connection = self._make(**arguments)
        try:
            connection.connect()
            _greet(connection, self._name)
        except (redis.RedisError, OSError, ValueError) as error:
            secrets = self._secrets(arguments)
            message = _scrub(str(error), secrets)
            if isinstance(error, _REFUSED) or message.startswith(("WRONGPASS", "NOAUTH")):
                failure = AuthenticationError(f"{self.url} refused to let us in: {message} ({_who(error)})")
            else:
                failure = ConnectError(self._describe(message, error))
            texts = [str(text) for each in chain(error) for text in (each, *each.args)]
            cause = error if all(_scrub(text, secrets) == text for text in texts) else None
        else:
            raw, connection._sock = connection._sock, None
            if raw is None:
                raise ConnectError(f"no connection to {self.url}: redis-py closed it at once")
            attempt.succeeded(raw)
            return wrap(raw)
        raise failure from cause  # not while the other error is handled: it would be the context

    def _describe(self, message: str, error: Exception) -> str:
        hint = advice(error, scheme=self.url.partition(":")[0])
        return f"no connection to {self.url}: {message}{hint and f' ({hint})'}"


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


def _greet(connection: Any, name: str | None) -> None:
    """Name this client, if the user may; and see whether commands are answered: without a password nothing of the
    handshake tells that one is needed.
    """
    try:
        for command in (("CLIENT", "SETNAME", name), ("PING",)) if name else (("PING",),):
            connection.send_command(*command)
            try:
                connection.read_response()
            except redis.exceptions.NoPermissionError:  # answered, too
                pass
            except redis.ResponseError as error:
                if not str(error).startswith("MISCONF"):  # it cannot save, and answers everything but writes and PING
                    raise
    except BaseException:
        connection.disconnect()
        raise


def _who(error: Exception) -> str:
    if isinstance(error, redis.exceptions.NoPermissionError):
        return "what this user's ACL allows is not enough to connect"
    return "user and password: redis://user:password@…, username= and password=, or credential_provider="


def _scrub(message: str, secrets: list[str]) -> str:
    message = _QUOTED.sub("", message)
    for secret in secrets:
        message = message.replace(secret, "***")
    return message
