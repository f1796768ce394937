"""Which server of a cluster serves which hash slots, and how to connect to each.

``CLUSTER SLOTS`` is sent over a connection of our own: redis-py's ``NodesManager`` would make a client for every node, ask
all nodes one after another where slots are without a server, and replace names by IP addresses, which TLS cannot verify.
What is answered is read by redis-py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import anyio
from redis.cluster import parse_cluster_slots

from aionpredis.errors import AuthenticationError, ConnectError, ConnectionLost, ServerError, UsageError
from aionpredis.wire import resp
from aionpredis.wire.dial import Dialer
from aionpredis.wire.resp import Reply
from aionpredis.wire.source import Address, Servers, Source, read

__all__ = ["Address", "ClusterDialer", "Slots", "open_source"]

PATIENCE = 0.5
"""Seconds after which another node is asked, too: one whose host is gone would be waited for as long as
``connect_timeout``, while the others know already who replaces it."""


class Slots(NamedTuple):
    """The hash slots ``first`` to ``last`` (included), and who serves them."""

    first: int
    last: int
    primary: Address
    replicas: tuple[Address, ...]


class ClusterDialer:
    """Makes connections to the servers of one cluster. ``url``: its first nodes, without secrets.

    ``address_remap``: from the address that the cluster gives for a server to the one where it is reached. ``settings``: as
    for :class:`Dialer`.

    Raises:
        UsageError: the source or an option is wrong.
    """

    def __init__(
        self,
        source: Source,
        *,
        connect_timeout: float,
        address_remap: Callable[[Address], Address] | None = None,
        **settings: Any,
    ) -> None:
        self.url = source.url
        self._any = Dialer(source, connect_timeout=connect_timeout, **settings)
        if self._any.database:
            raise UsageError(f"{self.url}: a cluster has no other database than 0: leave out db={self._any.database}")
        self._connect_timeout = connect_timeout
        self._remap = address_remap or source.remap
        self._startup = source.nodes
        self._known: tuple[Address, ...] = ()  # who answered last, and those that it named

    def at(self, address: Address) -> Dialer:
        """Makes connections to this server of the cluster."""
        return self._any.at(*address)

    async def discover(self, first: Address | None = None) -> list[Slots]:
        """The slots, as the first node says that answers: ``first``, those known, then those in the URL. Slots that nobody
        serves are in none of the ranges.

        Raises:
            ConnectError: no node answers as one of a cluster, each within ``connect_timeout``.
            AuthenticationError: all of them refused us.
        """
        nodes = list(dict.fromkeys((*([] if first is None else [first]), *self._known, *self._startup)))
        found: list[tuple[Address, list[Slots]]] = []
        doubtful: list[tuple[Address, list[Slots]]] = []  # by nodes that are cut off from most others, perhaps
        failures: list[Exception] = []

        async def ask(node: Address, failed: anyio.Event) -> None:
            try:
                is_ok, slots = await self._ask(node)
            except Exception as error:
                failures.append(error)
                failed.set()
            else:
                if not is_ok:
                    doubtful.append((node, slots))
                    failed.set()
                    return
                if not found:
                    found.append((node, slots))
                tasks.cancel_scope.cancel()

        async with anyio.create_task_group() as tasks:
            for node in nodes:
                failed = anyio.Event()
                tasks.start_soon(ask, node, failed)
                with anyio.move_on_after(PATIENCE):
                    await failed.wait()
        for node, slots in (found or doubtful)[:1]:
            named = (each for span in slots for each in (span.primary, *span.replicas))
            self._known = tuple(dict.fromkeys((node, *named)))
            return slots
        for error in failures:
            if not isinstance(error, ConnectError):  # raised by the caller's address_remap or credential_provider
                raise error
        refused = all(isinstance(error, AuthenticationError) for error in failures)
        kind = AuthenticationError if refused else ConnectError
        raise kind(f"no node of {self.url} answered: {'; '.join(map(str, failures))}")

    async def _ask(self, node: Address) -> tuple[bool, list[Slots]]:
        """Whether the node takes its cluster for complete, and the slots as it knows them."""
        dialer = self.at(node)
        slots: list[Slots] | None = None
        is_ok = False
        deadline = anyio.current_time() + self._connect_timeout  # of both
        try:
            connection = await dialer.dial()
            try:
                with anyio.CancelScope(deadline=deadline):
                    info = connection.submit(resp.encode("CLUSTER", "INFO"), Reply())
                    reply = connection.submit(resp.encode("CLUSTER", "SLOTS"), Reply())
                    await connection.wait(reply)
                    (state,) = info.values  # an error, if that is not allowed
                    is_ok = not (isinstance(state, bytes) and b"cluster_state:fail" in state)
                    slots = _parse(reply.result(), node)
            finally:
                connection.close()
        except ServerError as error:
            raise ConnectError(
                f"{dialer.url} is not known as part of a cluster: {error.about('CLUSTER SLOTS')}"
            ) from error
        except ConnectionLost as error:
            raise ConnectError(f"{dialer.url}: {error}") from error
        if slots is None:
            raise ConnectError(f"{dialer.url}: CLUSTER SLOTS timed out after {self._connect_timeout:g} s")
        if not slots:  # it was removed, or never joined
            raise ConnectError(
                f"{dialer.url} knows of no slots: it is not a part of the cluster (CLUSTER MEET, ADDSLOTS)"
            )
        return is_ok, [
            Slots(span.first, span.last, self.reached(span.primary), tuple(map(self.reached, span.replicas)))
            for span in slots
        ]

    def reached(self, address: Address) -> Address:
        """Where the server is reached that the cluster says is at this address (in ``MOVED``, for one)."""
        return address if self._remap is None else self._remap(address)


def _parse(answer: Any, node: Address) -> list[Slots]:
    try:
        # A node that does not know an address leaves it out, or says "?": it is where that node was asked.
        return [
            Slots(int(first), int(last), *_addresses(who, node[0]))
            for (first, last), who in sorted(parse_cluster_slots(answer, current_host=node[0]).items())
        ]
    except (ValueError, TypeError, IndexError) as error:
        raise ConnectError(f"{node[0]}:{node[1]} answers CLUSTER SLOTS with something else") from error


def _addresses(parsed: Mapping[str, Any], here: str) -> tuple[Address, tuple[Address, ...]]:
    """Of the primary and of its replicas."""
    primary, *replicas = (
        (here if host == "?" else host, int(port)) for host, port, *_ in (parsed["primary"], *parsed["replicas"])
    )
    return primary, tuple(replicas)


def open_source(source: Servers, **settings: Any) -> Dialer | ClusterDialer:
    """What makes connections to the server, or the servers, that a URL or a client of redis-py names. ``settings``: as for
    :class:`Dialer`, and ``address_remap`` for a cluster.

    Raises:
        UsageError: the source or a setting is wrong.
    """
    where = read(source)
    return ClusterDialer(where, **settings) if where.nodes else Dialer(where, **settings)
