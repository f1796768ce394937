"""A client's counters as OpenTelemetry metrics (``pip install "aionpredis[otel]"``)::

    from aionpredis.telemetry import observe

    async with aionpredis.connect(url) as client:
        observe(client)

They are read when the meter provider collects, so they cost nothing in between. Names and attributes are those of
OpenTelemetry's semantic conventions where there are any for database clients: ``db.system.name``, ``server.address``,
``server.port``, ``error.type``, ``network.io.direction``. What is only ours begins with ``aionpredis.``.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any
from urllib.parse import urlsplit

try:
    from opentelemetry import metrics
    from opentelemetry.metrics import CallbackOptions, MeterProvider, Observation
except ModuleNotFoundError as missing:
    hint = f'{missing}: aionpredis.telemetry needs it: pip install "aionpredis[otel]"'
    raise ModuleNotFoundError(hint, name=missing.name) from None

import aionpredis
from aionpredis.client import Client
from aionpredis.stats import Stats

__all__ = ["observe"]

COUNTERS = {
    "requests": ("aionpredis.client.requests", "{request}", "Requests that were sent"),
    "waits": ("aionpredis.client.waits", "{wait}", "Writers and actors that had to wait for room"),
    "retries": ("aionpredis.client.retries", "{attempt}", "Further attempts after a fault"),
    "reconnects": ("aionpredis.client.reconnects", "{connection}", "Shared connections that were made anew"),
    "repeated": ("aionpredis.client.repeated", "{item}", "Items and chunks that were sent again after a fault"),
    "acknowledged": ("aionpredis.replay.acknowledged", "{transition}", "Transitions committed to a log"),
    "stale": ("aionpredis.replay.stale", "{transition}", "Transitions given up, most of them of an ended run"),
    "evicted": ("aionpredis.replay.evicted", "{chunk}", "Chunks that were deleted before a reader came to them"),
    "lost": ("aionpredis.replay.lost", "{chunk}", "Chunks that a log names and the server does not have"),
}
"""By field of :class:`Stats`: name, unit, description."""

Read = Callable[[Stats], Iterable[tuple[float, dict[str, str]]]]


def observe(client: Client, meter_provider: MeterProvider | None = None) -> None:
    """Register the counters of ``client.stats()`` with a meter provider (default: the process' own).

    Call it once for a client, when it is open. The client is not kept alive by it.
    """
    meter = metrics.get_meter("aionpredis", aionpredis.__version__, meter_provider)
    attributes = _place(client.url)
    reference = weakref.ref(client)

    def callback(read: Read) -> Callable[[CallbackOptions], list[Observation]]:
        def observations(options: CallbackOptions) -> list[Observation]:
            observed = reference()
            values = [] if observed is None else read(observed.stats())
            return [Observation(value, attributes | more) for value, more in values]

        return observations

    for field, (name, unit, description) in COUNTERS.items():
        read = callback(lambda stats, field=field: [(getattr(stats, field), {})])  # type: ignore[misc]
        meter.create_observable_counter(name, [read], unit, description)
    meter.create_observable_counter("aionpredis.client.io", [callback(_io)], "By", "Bytes to and from the server")
    meter.create_observable_counter("aionpredis.client.errors", [callback(_errors)], "{error}", "Faults by kind")
    meter.create_observable_up_down_counter(
        "aionpredis.client.inflight",
        [callback(lambda stats: [(stats.inflight_bytes, {})])],
        "By",
        "Bytes that are neither stored, failed nor received",
    )


def _io(stats: Stats) -> Iterable[tuple[float, dict[str, str]]]:
    yield stats.bytes_sent, {"network.io.direction": "transmit"}
    yield stats.bytes_received, {"network.io.direction": "receive"}


def _errors(stats: Stats) -> Iterable[tuple[float, dict[str, str]]]:
    for kind, count in stats.errors.items():
        yield count, {"error.type": kind}


def _place(url: str) -> dict[str, Any]:
    """Where the server is, or the first of several: ``url`` has neither user nor password."""
    parts = urlsplit(url)
    parts = parts._replace(netloc=parts.netloc.split(",")[0])
    place: dict[str, Any] = {"db.system.name": "redis"}
    if parts.scheme == "unix":
        place["server.address"] = parts.path
    elif parts.hostname:
        place |= {"server.address": parts.hostname, "server.port": parts.port or 6379}
    return place
