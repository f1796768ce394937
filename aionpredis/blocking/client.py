"""Arrays and records by key, without async."""

from __future__ import annotations

import functools
import weakref
from collections.abc import AsyncIterator, Callable
from types import TracebackType
from typing import ParamSpec, Self

import aionpredis
from aionpredis.blocking import loop
from aionpredis.blocking.facade import Facade, Steps, made, waits
from aionpredis.blocking.policy import Policy
from aionpredis.blocking.replay import Replay
from aionpredis.blocking.writer import Writer
from aionpredis.errors import UsageError
from aionpredis.stats import Stats

__all__ = ["Client", "connect"]

P = ParamSpec("P")


class Keys(Steps[AsyncIterator[bytes], bytes]):
    """``for key in client.scan():`` Made by :meth:`Client.scan`; it need not be finished."""


class Client(Facade[aionpredis.Client]):
    """:class:`aionpredis.Client` without async; made, and opened, by :func:`connect`.

    Any number of threads may use it at once. It belongs to its process: another one, also a fork, opens its own.
    """

    def __init__(self, target: aionpredis.Client) -> None:
        home = loop.acquire()
        try:
            self._host = home.enter(target)
        except BaseException:
            loop.release(home)
            raise
        super().__init__(home, target, None)
        self._forgotten = weakref.finalize(self, home.forget, self._host)
        self._forgotten.atexit = False

    def __enter__(self) -> Self:
        if not self._forgotten.alive:
            raise UsageError(loop.CLOSED)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections. What ``with`` does at its end; for a notebook, whose cells are no block. Again: nothing."""
        if self._forgotten.detach() is not None:
            try:
                self._loop.leave(self._host, None, None, None)
            finally:
                loop.release(self._loop)

    set = waits(aionpredis.Client.set)
    get = waits(aionpredis.Client.get)
    get_value = waits(aionpredis.Client.get_value)
    mset = waits(aionpredis.Client.mset)
    mget = waits(aionpredis.Client.mget)
    set_record = waits(aionpredis.Client.set_record)
    get_record = waits(aionpredis.Client.get_record)
    delete = waits(aionpredis.Client.delete)
    exists = waits(aionpredis.Client.exists)
    scan = made(Keys, aionpredis.Client.scan)
    execute = waits(aionpredis.Client.execute)
    writer = made(Writer, aionpredis.Client.writer)
    replay = made(Replay, aionpredis.Client.replay)
    policy = made(Policy, aionpredis.Client.policy)

    @property
    def url(self) -> str:
        """Where the server is, without user and password."""
        return self._target.url

    @property
    def is_embedded(self) -> bool:
        """Whether the server lives as long as this client."""
        return self._target.is_embedded

    def stats(self) -> Stats:
        """What this client has done so far, and its writers, actors and readers with it."""
        return self._target.stats()


def _opened(make: Callable[P, aionpredis.Client]) -> Callable[P, Client]:
    @functools.wraps(make)
    def connect(*arguments: P.args, **options: P.kwargs) -> Client:
        return Client(make(*arguments, **options))

    return connect


connect = _opened(aionpredis.connect)
