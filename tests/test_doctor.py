"""``aionpredis doctor``: every check is seen to find what it is for, on a server that has it, and nothing else."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from typing import Any, NamedTuple

import numpy as np
import pytest
import redis

import aionpredis
from aionpredis.cli.checks import Finding, check
from aionpredis.cli.facts import Server as Facts
from aionpredis.cli.facts import facts_of
from aionpredis.cli.measure import Probe, frame_of, latency
from aionpredis.errors import ServerFull, UsageError
from aionpredis.server import Server

from .cluster import Cluster
from .sentinel import SERVICE, Sentinels
from .servers import free_port, make_server
from .stock import stock_of

pytestmark = [pytest.mark.anyio, pytest.mark.one_loop("what it asks is asked by the client, which is tested on each")]

KINDS = ["valkey", "redis"]

GOOD = {"maxmemory": "256mb", "maxmemory-policy": "noeviction", "tcp-backlog": "511"}
"""What the guide of deployment wants, beside what the embedded server has."""


async def findings_of(url: str, **options: Any) -> dict[str, Finding]:
    """By name. What depends on this machine is left out."""
    async with aionpredis.connect(url, **options) as client:
        servers = [await facts_of(client, key) for key in client.topology.each()]
    for server in servers:
        server.kernel.clear()
    found = check(servers)
    return {finding.name: finding for finding in found if finding.level != "note"}


@pytest.mark.one_server("servers of its own")
@pytest.mark.parametrize("kind", KINDS)
async def test_a_server_as_the_guide_wants_it_is_found_well(kind: str) -> None:
    with make_server(kind, config=GOOD) as server:
        assert await findings_of(server.url) == {}


class Bad(NamedTuple):
    """``config``: of a server, to which nothing else is wrong; ``name``, ``level``: of what is found."""

    config: dict[str, str]
    name: str
    level: str
    kinds: tuple[str, ...] = ("valkey", "redis")


BAD = [
    Bad({"maxmemory-policy": "allkeys-lru"}, "maxmemory-policy", "problem"),
    Bad({"maxmemory-policy": "volatile-lru"}, "maxmemory-policy", "problem"),
    Bad({"maxmemory": "0"}, "maxmemory", "hint"),
    Bad({"maxmemory": "900gb"}, "maxmemory", "hint"),
    Bad({"maxmemory": "1mb"}, "used_memory", "problem", ("valkey",)),  # it has that much when it is empty
    Bad({"min-string-size-avoid-copy-reply": "16384"}, "min-string-size-avoid-copy-reply", "hint", ("valkey",)),
    Bad({"client-output-buffer-limit": "normal 1mb 0 0"}, "client-output-buffer-limit normal", "problem"),
    Bad({"client-output-buffer-limit": "normal 64mb 32mb 10"}, "client-output-buffer-limit normal", "hint"),
    Bad({"proto-max-bulk-len": "32mb"}, "proto-max-bulk-len", "problem"),
    Bad({"proto-max-bulk-len": "256mb"}, "proto-max-bulk-len", "hint"),
    Bad({"save": "3600 1"}, "save", "hint"),
    Bad({"appendonly": "yes", "appendfsync": "always"}, "appendfsync", "hint"),
    Bad({"io-threads": "64"}, "io-threads", "hint"),
    Bad({"maxclients": "10"}, "maxclients", "hint"),
]


@pytest.mark.one_server("servers of its own")
@pytest.mark.parametrize(
    ("kind", "bad"), [pytest.param(k, bad, id=f"{k}-{bad.config}") for bad in BAD for k in KINDS if k in bad.kinds]
)
async def test_what_is_wrong_is_found_and_nothing_else(kind: str, bad: Bad) -> None:
    with make_server(kind, config=GOOD | bad.config) as server, stock_of(server) as stock:
        others = [redis.Redis.from_url(server.url) for _ in range(8 if "maxclients" in bad.config else 0)]
        for other in others:
            other.ping()
        found = await findings_of(server.url)
        for other in others:
            other.close()
        assert {name: finding.level for name, finding in found.items()} == {bad.name: bad.level}
        finding = found[bad.name]
        assert len(finding.why) > 20
        # What it says to do is taken by the server, and ends the matter.
        settings = [line.split(" ", 3) for line in finding.how if line.startswith("CONFIG SET")]
        assert settings or bad.name in ("io-threads", "used_memory")
        for _, _, name, value in settings:
            stock.config_set(name, value.strip('"'))
        if settings:
            assert await findings_of(server.url) == {}


@pytest.mark.one_server("servers of its own")
async def test_lines_for_the_configuration_file_are_taken_by_a_server() -> None:
    config = dict(GOOD) | {"save": "3600 1", "client-output-buffer-limit": "normal 1mb 0 0", "maxmemory": "0"}
    with make_server("valkey", config=config) as server:
        found = await findings_of(server.url)
    for finding in found.values():
        where, _, line = finding.how[1].partition(": ")
        assert where == "in its configuration file"
        assert "#" not in line  # of which these servers know nothing: they would not start
        name, _, value = line.partition(" ")
        config[name] = value
    with make_server("valkey", config=config) as server:
        assert await findings_of(server.url) == {}


@pytest.mark.one_server("servers of its own")
async def test_a_unix_socket_that_is_not_used_is_found() -> None:
    with make_server("valkey", config=GOOD, port=free_port()) as server:
        found = await findings_of(f"redis://127.0.0.1:{server.port}")
        assert found.keys() == {"connection"}
        (how,) = found["connection"].how
        url = how.removeprefix("connect with ")
        assert url == server.url
        assert await findings_of(url) == {}


@pytest.mark.one_server("servers of its own")
async def test_an_open_port_without_a_password_is_found() -> None:
    config = GOOD | {"bind": "0.0.0.0", "protected-mode": "no"}
    with make_server("valkey", config=config, port=free_port()) as server:
        url = f"redis://127.0.0.1:{server.port}"
        for way in (url, server.url):
            assert (await findings_of(way))["user default"].level == "problem"
        with stock_of(server) as stock:
            stock.execute_command("ACL", "SETUSER", "default", "resetpass", ">s3cret")
        assert "user default" not in await findings_of(f"redis://:s3cret@127.0.0.1:{server.port}")


@pytest.mark.one_server("servers of its own")
async def test_a_replica_and_what_its_primary_lacks_are_found(sentinels: Sentinels) -> None:
    found = await findings_of(sentinels.url)
    assert {"repl-backlog-size", "client-output-buffer-limit replica", "maxmemory"} <= found.keys()
    name = next(name for name in found if name.startswith("min-"))
    assert name in ("min-replicas-to-write", "min-slaves-to-write")
    assert all(finding.level == "hint" for finding in found.values())
    assert "down-after-milliseconds" not in found  # it is 500
    for sentinel in sentinels.sentinels:
        sentinel.call("SENTINEL", "SET", SERVICE, "down-after-milliseconds", 30_000)
    try:
        slow = (await findings_of(sentinels.url))["down-after-milliseconds"]
        command = slow.how[0].removeprefix("on each Sentinel: ").split()
        for sentinel in sentinels.sentinels:
            sentinel.call(*command)
        assert "down-after-milliseconds" not in await findings_of(sentinels.url)
    finally:
        for sentinel in sentinels.sentinels:
            sentinel.call("SENTINEL", "SET", SERVICE, "down-after-milliseconds", 500)
    (replica,) = (node for node in sentinels.servers if node is not sentinels.primary())
    found = await findings_of(f"redis://127.0.0.1:{replica.port}")
    assert found["role"].level == "problem"
    assert str(sentinels.primary().port) in found["role"].how[0]


@pytest.mark.one_server("servers of its own")
async def test_a_cluster_is_looked_at_as_a_whole() -> None:
    with Cluster(replicas=0) as cluster:
        found = await findings_of(cluster.url)
        assert found["replicas"].level == "hint"
        assert len(found["replicas"].servers) == len(set(found["replicas"].servers)) == 3
        assert "cluster-node-timeout" not in found  # it is 1000
        found = await findings_of(f"redis://127.0.0.1:{cluster.ports[0]}")
        assert found["mode"].level == "problem"
        assert "redis+cluster://" in found["mode"].how[0]


@pytest.mark.one_server("servers of its own")
async def test_settings_of_a_cluster() -> None:
    config = {"cluster-node-timeout": "15000", "cluster-require-full-coverage": "yes"}
    with Cluster(1, 0, config=config) as cluster:
        found = await findings_of(cluster.url)
        assert {"cluster_size", "replicas", "cluster-node-timeout", "cluster-require-full-coverage"} <= found.keys()
        cluster.nodes[0].call("CLUSTER", "DELSLOTS", 7)
        async with aionpredis.connect(cluster.url) as client:
            (facts,) = [await facts_of(client, key) for key in client.topology.each()]
        state = next(finding for finding in check([facts]) if finding.name == "cluster_state")
        assert state.level == "problem"
        assert "16,383 of 16,384" in state.value


INFO = {"role": "master", "mem_allocator": "jemalloc-5.3.0", "redis_version": "7.0.15"}

RARE: list[tuple[Facts, str, str]] = [
    (Facts("u", info=INFO | {"redis_version": "6.2.1"}), "version", "problem"),
    (Facts("u", info=INFO | {"server_name": "valkey", "valkey_version": "7.2.5"}), "version", "problem"),
    (Facts("u", info=INFO | {"redis_mode": "sentinel"}), "mode", "problem"),
    (Facts("u", info=INFO | {"loading": "1"}), "loading", "problem"),
    (Facts("u", info=INFO | {"rdb_last_bgsave_status": "err"}), "rdb_last_bgsave_status", "problem"),
    (Facts("u", info=INFO | {"evicted_keys": "12"}), "evicted_keys", "hint"),
    (Facts("u", info=INFO | {"latest_fork_usec": "250000"}), "latest_fork_usec", "hint"),
    (Facts("u", info=INFO | {"mem_allocator": "libc"}), "mem_allocator", "note"),
    (
        Facts("u", info=INFO | {"connected_slaves": "1", "slave0": "ip=h,port=1,state=wait_bgsave,offset=0,lag=0"}),
        "replica",
        "hint",
    ),
    (
        Facts("u", info=INFO | {"connected_slaves": "1", "slave0": "ip=h,port=1,state=online,offset=9,lag=60"}),
        "replica",
        "hint",
    ),
    (Facts("u", is_unix=True, info=INFO, kernel={"net.core.wmem_default": "212992"}), "net.core.wmem_default", "hint"),
    (Facts("u", info=INFO, kernel={"net.core.somaxconn": "128"}), "tcp-backlog", "hint"),
    (Facts("u", info=INFO, config={"tcp-backlog": "128"}), "tcp-backlog", "hint"),
    (Facts("u", info=INFO, config={"timeout": "300"}), "timeout", "note"),
    (Facts("u", info=INFO, config={"appendonly": "no", "save": ""}), "appendonly", "note"),
    (Facts("rediss://h", info=INFO), "connection", "note"),
    (Facts("u", info=INFO, skew=-3600.0), "clock", "hint"),
    (Facts("u", info=INFO, service={"name": "s", "num-other-sentinels": 2}), "replicas", "hint"),
    (Facts("u", info=INFO | {"connected_slaves": "1"}, service={"num-other-sentinels": 1}), "Sentinels", "hint"),
    (Facts("u", info=INFO, slow=3), "slow commands", "note"),
]


@pytest.mark.parametrize(("facts", "name", "level"), [pytest.param(*each, id=each[1]) for each in RARE])
def test_what_no_server_can_be_made_to_say(facts: Facts, name: str, level: str) -> None:
    assert [(finding.name, finding.level) for finding in check([facts])] == [(name, level)]


def test_a_server_that_says_nothing_is_not_blamed() -> None:
    assert check([Facts("redis://h")]) == []


# --- what it may not look at ------------------------------------------------------------------------------------------

COMMAND = [sys.executable, "-m", "aionpredis", "doctor"]


def ran(*arguments: str, command: list[str] = COMMAND) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "REDIS_URL"}
    return subprocess.run(
        [*command, *arguments], env=environment, capture_output=True, text=True, timeout=50, check=False
    )


@pytest.mark.one_server("the command")
@pytest.mark.parametrize("kind", KINDS)
def test_the_command_measures_and_leaves_nothing(kind: str) -> None:
    with make_server(kind, config=GOOD) as server, stock_of(server) as stock:
        stock.set("mine", "1")
        done = ran(server.url, "--json", "--shape", "40x30", "--dtype", "float32")
        report = json.loads(done.stdout)
        assert (done.returncode, done.stderr, report["ok"]) == (0, "", True)
        assert (report["shape"], report["dtype"]) == ([40, 30], "float32")
        assert [finding["level"] for finding in report["findings"] if finding["level"] == "problem"] == []
        assert report["not_seen"] == []
        for name in ("PING", "set", "get"):
            assert 0 < report["seconds"][name]["median"] <= report["seconds"][name]["p99"] < 1
        for name in ("writer", "mget(out=)"):
            assert report["rates"][name]["arrays"] > 100
            assert report["rates"][name]["bytes"] == pytest.approx(report["rates"][name]["arrays"] * 40 * 30 * 4)
            assert 0 < report["rates"][name]["of_bare"] < 20
        assert report["servers"][0]["server"].startswith(kind.title())
        assert report["servers"][0]["role"] == "primary"
        assert stock.keys() == [b"mine"]


@pytest.mark.one_server("the command")
def test_a_problem_is_exit_code_1_and_says_how_to_end_it() -> None:
    with make_server("valkey", config=GOOD | {"maxmemory-policy": "allkeys-lru"}) as server:
        done = ran("--url", server.url)
    assert (done.returncode, done.stderr) == (1, "")
    assert "problem: maxmemory-policy = allkeys-lru" in done.stdout
    assert "CONFIG SET maxmemory-policy noeviction" in done.stdout
    assert "begin_run() refuses it" in done.stdout
    assert "\x1b" not in done.stdout
    assert not re.search(" {40}", done.stdout)


@pytest.mark.one_server("the command")
def test_what_is_forbidden_is_said_and_no_problem() -> None:
    """As at a managed service: no CONFIG, SLOWLOG or ACL, and no right to write where it wants to."""
    with make_server("valkey", config=GOOD) as server, stock_of(server) as stock:
        stock.execute_command("ACL", "SETUSER", "guest", "on", ">p", "+@all", "-@admin", "~frames:*")
        done = ran(f"{server.url}?username=guest&password=p", "--json")
        report = json.loads(done.stdout)
        assert (done.returncode, report["ok"]) == (0, True)
        seen = " ".join(report["not_seen"])
        assert "CONFIG GET: NOPERM" in seen
        assert "SLOWLOG LEN: NOPERM" in seen
        assert "speed: NOPERM" in seen
        assert "guest" in report["servers"][0]["user"]
        assert '"p"' not in done.stdout


@pytest.mark.one_server("the command")
@pytest.mark.parametrize(
    ("url", "advice"),
    [
        ("redis://127.0.0.1:1", "nobody listens there"),
        ("redis://no-such-host.invalid:6379", "the host's name is not known"),
        ("unix:///nowhere/s.sock", "there is no such socket"),
        ("{url}?password=wrong", "user and password"),
    ],
)
def test_why_there_is_no_connection_in_plain_words(url: str, advice: str) -> None:
    with make_server("valkey", config={"requirepass": "s3cret"}) as server:
        done = ran(url.format(url=server.url))
    assert done.returncode == 1
    assert "problem: connection" in done.stdout
    assert advice in done.stdout
    assert "wrong" not in done.stdout.replace("WRONGPASS", "")


# --- measuring --------------------------------------------------------------------------------------------------------


async def test_a_probe_is_bounded_and_leaves_nothing(url: str, stock: redis.Redis) -> None:
    frame = frame_of("80,80", "uint16")
    async with aionpredis.connect(url) as client:
        async with Probe(client, frame, nbytes=1 << 20) as probe:
            assert probe.count == (1 << 20) // (12_800 + 128)
            for rate in (probe.write, probe.bare_write, probe.read, probe.bare_read, probe.append, probe.epoch):
                assert await rate() > 0
            for seconds in (await probe.ping(5), await probe.set(5), await probe.get(5)):
                assert len(seconds) == 5
                assert latency(seconds).p99 >= latency(seconds).median > 0
            data = [key for key in stock.scan_iter() if key.count(b":") == 2]
            assert len(data) == probe.count
            assert all(0 < stock.ttl(key) <= 120 for key in data)
            # arrays, and a replay with as much: docs/terminal.md
            there = sum(stock.strlen(key) for key in stock.scan_iter(_type="STRING"))
            assert 2 * 0.95 < there / (1 << 20) < 2 * 1.05
        assert stock.keys() == []


@pytest.mark.one_server("settings of one server")
async def test_nothing_is_written_to_a_server_without_room(server: Server, url: str, stock: redis.Redis) -> None:
    used = int(stock.info("memory")["used_memory"])
    stock.config_set("maxmemory", used + (1 << 20))
    try:
        async with aionpredis.connect(url, retry_timeout=0) as client:
            with pytest.raises(ServerFull, match="bytes left of maxmemory"):
                async with Probe(client, frame_of("80,80", "uint16"), nbytes=1 << 20):
                    pass
            async with Probe(client, frame_of("80,80", "uint16"), nbytes=1 << 18) as probe:
                await probe.write()
    finally:
        stock.config_set("maxmemory", 0)
    assert stock.keys() == []


@pytest.mark.parametrize(
    ("shape", "dtype"), [("80,80", "object"), ("a", "u1"), ("0", "u1"), ("-1,3", "u1"), ("2", "nope")]
)
def test_what_is_no_array_is_said(shape: str, dtype: str) -> None:
    with pytest.raises(UsageError, match="try --shape 80,80 --dtype uint16"):
        frame_of(shape, dtype)


def test_frames_have_the_shape_and_dtype_that_was_asked_for() -> None:
    for shape, dtype, sizes in (
        ("80x80", "uint16", (80, 80)),
        ("7", "bool", (7,)),
        ("2,3,4", "float64", (2, 3, 4)),
        ("", "u1", ()),
    ):
        frame = frame_of(shape, dtype)
        assert (frame.shape, frame.dtype) == (sizes, np.dtype(dtype))
    with pytest.raises(UsageError, match="at most"):
        frame_of("100000,100000", "float64")


# --- bench ------------------------------------------------------------------------------------------------------------

BENCH = [sys.executable, "-m", "aionpredis", "bench"]


@pytest.mark.one_server("the command")
def test_bench_measures_everything_and_leaves_nothing() -> None:
    with make_server("valkey", config=GOOD) as server, stock_of(server) as stock:
        done = ran(server.url, "--json", "--rounds", "1", command=BENCH)
        assert done.returncode == 0, done.stderr
        facts = json.loads(done.stdout)
        assert stock.keys() == []
    assert facts["left_out"] == {}
    assert facts["results"].keys() == {"PING", "set", "get", "writer", "mget(out=)", "actor", "epoch"}
    assert all(len(result["rounds"]) == 1 for result in facts["results"].values())
    assert facts["environment"]["array"] == "80×80 uint16, 12,800 bytes"
    assert "Valkey 9" in facts["environment"]["server"]


@pytest.mark.one_server("the command")
def test_bench_says_what_it_has_left_out_and_why() -> None:
    with make_server("valkey", config=GOOD | {"maxmemory-policy": "allkeys-lru"}) as server:
        done = ran("--url", server.url, "--rounds", "1", "--shape", "8", command=BENCH)
    assert done.returncode == 0
    assert "left out: actor: the server evicts keys by itself" in done.stdout
    assert "mget(out=)" in done.stdout


@pytest.mark.one_server("the command")
def test_bench_that_is_interrupted_shows_what_it_has_and_cleans_up() -> None:
    with make_server("valkey", config=GOOD) as server, stock_of(server) as stock:
        with subprocess.Popen([*BENCH, server.url, "--rounds", "1000"], stdout=-1, stderr=-1, text=True) as process:
            try:
                seen: set[bytes] = set()
                while len(seen) < 3:  # the commands of three different measurements
                    seen |= {
                        key.split(b"_")[1] for key in _calls(stock) & {b"cmdstat_mget", b"cmdstat_xadd", b"cmdstat_set"}
                    }
                process.send_signal(2)
                _, errors = process.communicate(timeout=30)
            finally:
                process.kill()
        assert process.returncode == 130
        assert "interrupted by SIGINT; after" in errors
        assert "what was written is deleted" in errors
        left = [key for key in stock.scan_iter() if stock.ttl(key) == -1 or stock.ttl(key) > 10]
        assert left == []


def _calls(stock: redis.Redis) -> set[bytes]:
    return {name.encode() for name in stock.info("commandstats")}
