"""Which server is the primary of a service now, as its Sentinels say. Blocking, for a worker thread.

redis-py asks and judges; the Sentinels are gone through here, because its own search ends at the first that answers with an
error, and reorders a list that all threads share.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry
from redis.sentinel import Sentinel

from aionpredis.errors import AuthenticationError, ConnectError
from aionpredis.wire.advice import is_refusal, scrub, secrets
from aionpredis.wire.source import Address, Source

__all__ = ["Sentinels"]


class Sentinels:
    """``settings``: arguments of redis-py's connection to each Sentinel; ``timeout``: seconds for all of them."""

    def __init__(self, source: Source, settings: Mapping[str, Any], *, timeout: float) -> None:
        self._source = source
        # As many steps as there are hosts that may be silent, and one for the server itself.
        seconds = timeout / (len(source.sentinels) + 1)
        self._settings = {
            **settings,
            "socket_connect_timeout": seconds,
            "socket_timeout": seconds,
            "retry": Retry(NoBackoff(), 0),
            "protocol": 2,
        }
        self.first = source.sentinels[0]
        """Who is asked first: the last that knew, as who connects to the primary says."""
        self.state: Mapping[str, Any] = {}
        """What that one said of the service, as ``SENTINEL MASTERS`` has it."""

    def find(self) -> Iterator[tuple[Address, Address]]:
        """A Sentinel, and where the primary is, as it says. Then the others that say something else: one may be behind them.

        Raises:
            ConnectError: no Sentinel that answers knows one that is up.
            AuthenticationError: all of them refused us.
        """
        failures: list[Exception] = []
        said: list[str] = []
        named: set[Address] = set()
        sentinels = self._source.sentinels
        begin = sentinels.index(self.first)
        for number in range(begin, begin + len(sentinels)):
            address = sentinels[number % len(sentinels)]
            try:
                primary = self._ask(address)
            except (redis.RedisError, OSError, ValueError) as error:
                failures.append(error)
                said.append(f"{address[0]}:{address[1]}: {scrub(str(error), secrets(self._settings))}")
                continue
            if primary not in named:
                named.add(primary)
                # For the next attempt, if this one is over before anything is known: a host that is gone is waited for.
                self.first = sentinels[(number + 1) % len(sentinels)]
                yield address, primary
        if named:
            return
        message = f"no Sentinel of {self._source.url} knows the primary of {self._source.service!r}: {'; '.join(said)}"
        if all(map(is_refusal, failures)):
            raise AuthenticationError(
                f"{message} (user and password of Sentinels: sentinel_username=, sentinel_password=)"
            )
        raise ConnectError(message)

    def _ask(self, address: Address) -> Address:
        source = self._source
        pool = redis.ConnectionPool(**self._settings | {"host": address[0], "port": address[1]})
        judge: Any = Sentinel([], source.min_other_sentinels)  # type: ignore[no-untyped-call]
        try:
            services: Any = redis.Redis(connection_pool=pool).sentinel_masters()
            state = services.get(source.service)
            if state is None:
                raise redis.ConnectionError(f"it watches {', '.join(map(repr, services)) or 'nothing'}")
            if not judge.check_master_state(state, source.service):
                raise redis.ConnectionError(f"{state['ip']}:{state['port']} is down, or too few Sentinels agree")
            self.state = state
            return source.force_ip or state["ip"], int(state["port"])
        except (ValueError, TypeError, LookupError, AttributeError):
            raise redis.ConnectionError("it answers SENTINEL MASTERS with something else") from None
        finally:
            pool.disconnect()
