"""Fixtures: every server, and every event loop."""

from __future__ import annotations

import gc
import signal
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import redis
from hypothesis import HealthCheck, Phase, settings

from aionpredis.server import Server

from .cluster import PATIENT, Cluster
from .proxy import Proxy
from .sentinel import Sentinels
from .servers import binary_of, make_server
from .stock import stock_of

# A machine that stands still for a moment is no failure of an example.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")
# For mutations.py: that an example fails is all it wants to know.
settings.register_profile("unshrunk", phases=[Phase.explicit, Phase.reuse, Phase.generate])


LOOPS = [
    pytest.param(("asyncio", {"use_uvloop": False}), id="asyncio"),
    pytest.param(("asyncio", {"use_uvloop": True}), id="uvloop"),
    pytest.param(("trio", {}), id="trio"),
]


@pytest.fixture(params=LOOPS)
def anyio_backend(request: pytest.FixtureRequest) -> Any:
    """The event loop that an async test runs on."""
    return request.param


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--one-loop", action="store_true", help="each test on one of the loops: a third of the time")


def pytest_configure(config: pytest.Config) -> None:
    # `nohup` and shells without a terminal have them ignored in the background, and so would every process that a test starts.
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
    config.addinivalue_line("markers", "one_server(reason): not on a cluster, too")
    config.addinivalue_line("markers", "one_loop(reason): each test on one of the loops, not on all of them")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Valkey meets all loops, Redis and a cluster one of them with each test: what a server answers does not depend on who
    waits for it. A cluster runs what does not say that one server is the point, and what no proxy stands in front of.
    """
    always: bool = config.getoption("one_loop")

    def fits(item: pytest.Item) -> bool:
        assert isinstance(item, pytest.Function)
        if not hasattr(item, "callspec"):
            return True
        ids = item.callspec.id.split("-")
        if always or not {"redis", "cluster"}.isdisjoint(ids) or item.get_closest_marker("one_loop") is not None:
            loop = next((number for number, each in enumerate(LOOPS) if each.id in ids), None)
            if loop is not None:
                ids.remove(str(LOOPS[loop].id))
                if loop != zlib.crc32(f"{item.originalname} {ids}".encode()) % len(LOOPS):
                    return False
        on_cluster = item.callspec.params.get("server") == "cluster"
        return not on_cluster or (item.get_closest_marker("one_server") is None and "proxy" not in item.fixturenames)

    items[:] = filter(fits, items)


def pytest_collection_finish() -> None:
    """What the collection of thousands of tests has made stays; the garbage collector need not look at it in each of them."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", params=["valkey", "redis", "cluster"])
def server(request: pytest.FixtureRequest) -> Iterator[Server | Cluster]:
    """One server of each kind for the whole session, and a cluster of three."""
    with Cluster(replicas=0) if request.param == "cluster" else make_server(request.param) as server:
        if isinstance(server, Cluster):
            server.patience(PATIENT)
        yield server


@pytest.fixture(scope="session")
def _stock(server: Server | Cluster) -> Iterator[redis.Redis]:
    with stock_of(server) as client:
        yield client


@pytest.fixture
def stock(_stock: redis.Redis) -> redis.Redis:
    """Stock redis-py on the same server, which is empty."""
    _stock.flushall()
    return _stock


@pytest.fixture
def url(server: Server | Cluster, stock: redis.Redis) -> str:
    """The address of the server, which is empty."""
    return server.url


@pytest.fixture
def proxy(url: str, tmp_path: Path) -> Iterator[Proxy]:
    """A proxy in front of the server, which is empty."""
    with Proxy(url, tmp_path) as proxy:
        yield proxy


@pytest.fixture(scope="session", params=["valkey", "redis"])
def _whole_cluster(request: pytest.FixtureRequest) -> Iterator[Callable[[], Cluster]]:
    with ExitStack() as stack:
        clusters: list[Cluster] = []

        def whole() -> Cluster:
            if clusters:
                try:
                    clusters[-1].heal()
                except TimeoutError:  # after many failovers and migrations its nodes may disagree for long
                    stack.close()
                    clusters.clear()
            if not clusters:
                clusters.append(stack.enter_context(Cluster(binary=binary_of(request.param))))
            clusters[-1].patience(PATIENT)
            clusters[-1].flush()
            return clusters[-1]

        yield whole


@pytest.fixture
def cluster(_whole_cluster: Callable[[], Cluster]) -> Cluster:
    """A complete cluster, which is empty: one of each kind for the whole session, 2 s to start. Its roles may be swapped."""
    return _whole_cluster()


@pytest.fixture(scope="session", params=["valkey", "redis"])
def _sentinels(request: pytest.FixtureRequest) -> Iterator[Sentinels]:
    with Sentinels(binary=binary_of(request.param)) as sentinels:
        yield sentinels


@pytest.fixture
def sentinels(_sentinels: Sentinels) -> Sentinels:
    """A primary, a replica and three sentinels: of each kind for the whole session, 1.5 s to start. No keys."""
    _sentinels.heal()
    _sentinels.primary().call("FLUSHALL")
    return _sentinels
