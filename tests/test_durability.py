"""What is acknowledged by replicas, too: connections of its own, and nothing lost with the primary."""

from __future__ import annotations

import anyio
import numpy as np
import pytest

import aionpredis
from aionpredis.errors import UsageError

from .cluster import Cluster

pytestmark = pytest.mark.anyio


async def test_a_twin_has_the_same_servers_and_connections_of_its_own(cluster: Cluster) -> None:
    async with aionpredis.connect(cluster.url) as client:
        with pytest.raises(UsageError, match="not open"):
            await client.twin().get("k")
        async with client.twin() as twin:
            for i in range(20):
                await twin.set(f"k{i}", np.array(i))
            assert await client.mget([f"k{i}" for i in range(20)]) == [*range(20)]
            assert twin.stats() == client.stats()  # shared
            assert not {shard.live_connection for shard in client.topology.shards} & {
                shard.live_connection for shard in twin.topology.shards
            }
            own = [shard.live_connection for shard in twin.topology.shards]
        assert all(connection is not None and connection.lost for connection in own)
        assert await client.exists("k1") == 1


async def test_a_twin_is_closed_with_its_client_whose_embedded_server_it_uses() -> None:
    async with aionpredis.connect() as client:
        twin = client.twin()
        await twin.__aenter__()
        await twin.set("k", np.array(1))
        own = twin.live_connection()
        assert own is not None
        assert own is not client.live_connection()
    assert own.lost is not None
    with anyio.fail_after(5), pytest.raises(UsageError, match="not open"):
        await twin.get("k")
    await twin.__aexit__(None, None, None)
