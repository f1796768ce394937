"""The sentinels that other tests rely on do what those tests rely on: seen by stock redis-py."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry
from redis.sentinel import Sentinel

from .nodes import Node
from .sentinel import SERVICE, Sentinels
from .servers import binary_of


@pytest.fixture
def service(sentinels: Sentinels) -> Iterator[redis.Redis]:
    """A client of the primary, whoever that is."""
    finder = Sentinel([(node.address, node.port) for node in sentinels.sentinels])  # type: ignore[no-untyped-call]
    with finder.master_for(SERVICE, socket_timeout=5) as client:  # type: ignore[no-untyped-call]
        yield client
    for each in finder.sentinels:
        each.close()


@pytest.mark.parametrize("replace", [Sentinels.kill_primary, Sentinels.failover], ids=["killed", "graceful"])
def test_a_replica_takes_the_place_of_the_primary(
    sentinels: Sentinels, service: redis.Redis, replace: Callable[[Sentinels], Node]
) -> None:
    old = sentinels.primary()
    service.set("key", "value")
    assert old.admin.wait(1, 5000) == 1
    new = replace(sentinels)
    assert sentinels.primary() is new is not old
    assert service.get("key") == b"value"
    sentinels.heal()
    with pytest.raises(redis.ReadOnlyError):
        old.admin.set("key", "other")


def test_a_minority_of_the_sentinels_may_fail(sentinels: Sentinels) -> None:
    old = sentinels.primary()
    sentinels.kill(sentinels.sentinels[0])
    assert sentinels.kill_primary() is not old
    sentinels.heal()
    assert sentinels.primary() is not old


@pytest.mark.parametrize("kind", ["valkey", "redis"])
def test_passwords_of_servers_and_of_sentinels_differ(kind: str) -> None:
    with Sentinels(binary=binary_of(kind), password="a b/ä", sentinel_password='s"\\') as sentinels:
        assert sentinels.url.endswith("/mymaster?sentinel_password=s%22%5C")
        for node in sentinels.nodes:
            with redis.Redis(host=node.address, port=node.port, retry=Retry(NoBackoff(), 0)) as client:
                with pytest.raises(redis.AuthenticationError):
                    client.ping()
        old = sentinels.primary()
        assert sentinels.kill_primary() is not old
