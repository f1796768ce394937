"""No password gets into a message, a repr, a log record or an output, whatever goes wrong."""

from __future__ import annotations

import json
import logging
import os
import socket
import subprocess
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
import redis
import redis.asyncio
import redis.asyncio.sentinel
import redis.sentinel
from typer.testing import CliRunner

import aionpredis
from aionpredis import Schema, cli
from aionpredis.errors import AionpredisError, AuthenticationError, ConnectError, UsageError
from aionpredis.server import Server
from aionpredis.wire.advice import chain
from aionpredis.wire.dial import Dialer
from aionpredis.wire.discovery import ClusterDialer, open_source
from aionpredis.wire.resp import MAX_BULK
from aionpredis.wire.source import read

from .replays import pause
from .servers import free_port, make_server, until
from .test_tls import listener, stay_silent
from .tls import Certificates, Terminator

pytestmark = pytest.mark.anyio

CANARY = "c4n4ry/in?a#coal@mine%"
"""With all characters that must be written as %xx in a URL."""
ENCODED = quote(CANARY, safe="")
SPOILT = "c4n4ry", "coal", "mine"
"""Parts of it, in case that somebody cuts it at such a character."""


def clean(*texts: object) -> None:
    for text in texts:
        assert not any(part in str(text) for part in SPOILT), text


def clean_error(error: BaseException) -> None:
    """The error, and all that led to it, however it is shown."""
    for each in (*chain(error), error.__context__):
        if each is not None:
            clean(str(each), repr(each), each.args, getattr(each, "__notes__", ""))
    shown = "".join(traceback.format_exception(error))
    source = [line for line in shown.splitlines() if line.startswith("    ")]  # this file's own lines
    clean(*[line for line in shown.splitlines() if line not in source])


@pytest.fixture
def anyio_backend() -> str:
    """Texts are the same on every loop, and connections are made in a thread."""
    return "asyncio"


class Provider(redis.CredentialProvider):
    def get_credentials(self) -> tuple[str, str]:
        return "default", CANARY


GIVEN: dict[str, Any] = {
    "password in the URL": (f":{ENCODED}@", "", {}),
    "user and password in the URL": (f"default:{ENCODED}@", "", {}),
    "credentials behind ?": ("", f"?username=default&password={ENCODED}", {}),
    "options": ("", "", {"username": "default", "password": CANARY}),
    "credential_provider": ("", "", {"credential_provider": Provider()}),
}
"""Ways to give a password: what stands before the host, behind the path, and options."""


@pytest.fixture(params=[*GIVEN.values()], ids=[*GIVEN])
def given(request: pytest.FixtureRequest) -> Any:
    return request.param


def make(given: Any, place: str, scheme: str = "redis", **options: Any) -> aionpredis.Client:
    before, behind, more = given
    limits = {"connect_timeout": 5.0, "retry_timeout": 0.5}
    return aionpredis.connect(f"{scheme}://{before}{place}{behind}", **limits | more | options)


async def refused(client: aionpredis.Client, kind: type[ConnectError] = ConnectError) -> str:
    clean(client, client.url)
    with pytest.raises(kind) as raised:
        async with client:
            pass
    clean_error(raised.value)
    return str(raised.value)


@pytest.fixture(autouse=True)
def _logged(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    caplog.set_level(logging.DEBUG)
    yield
    clean(caplog.text)


# --- connecting ------------------------------------------------------------------------------------------------------


async def test_nobody_listens(given: Any, tmp_path: Path) -> None:
    await refused(make(given, f"127.0.0.1:{free_port()}"))
    await refused(make(given, f"{tmp_path}/nobody.sock", "unix"))


async def test_name_is_not_known(given: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    assert "nowhere.example:6379" in await refused(make(given, "nowhere.example:6379"))


async def test_silence(given: Any) -> None:
    with listener(stay_silent) as port:
        assert "rediss://" in await refused(make(given, f"127.0.0.1:{port}", connect_timeout=0.4))


async def test_tls_fails(given: Any, tmp_path: Path) -> None:
    certificates = Certificates(tmp_path / "c")
    with make_server("valkey") as server, Terminator(server.url, certificates.context()) as terminator:
        assert "ssl_ca_certs" in await refused(make(given, f"127.0.0.1:{terminator.port}", "rediss"))


@pytest.mark.parametrize("kind", ["valkey", "redis"])
async def test_password_is_refused(given: Any, kind: str) -> None:
    with make_server(kind, config={"requirepass": "another"}) as server:
        path = server.url.removeprefix("unix://")
        await refused(make(given, path, "unix"), AuthenticationError)
        await refused(make(given, path, "unix", protocol=3), AuthenticationError)


def answering(reply: bytes) -> Any:
    """A server that quotes in an error what it was sent."""

    def answer(connection: socket.socket, ended: Any) -> None:
        while data := connection.recv(1 << 16):
            connection.sendall(reply.replace(b"?", b" ".join(data.split(b"\r\n"))))

    return answer


@pytest.mark.parametrize("reply", [b"-ERR unknown command ?\r\n", b"-WRONGPASS ?\r\n", b"?\r\n", b"+?\r\n"])
async def test_server_quotes_what_it_was_sent(given: Any, reply: bytes) -> None:
    with listener(answering(reply)) as port:
        await refused(make(given, f"127.0.0.1:{port}"))


async def test_server_that_knows_no_auth(given: Any) -> None:
    with make_server("redis", config={"rename-command": 'AUTH ""'}) as server:
        path = server.url.removeprefix("unix://")
        assert "unknown command" in await refused(make(given, path, "unix"))
        long = "", "", {"password": CANARY * 20}  # the server quotes its beginning
        assert "unknown command" in await refused(make(long, path, "unix"))


# --- clusters and Sentinels --------------------------------------------------------------------------------------------

SEVERAL = {
    "cluster": ("redis+cluster", "", ""),
    "service": ("redis+sentinel", "/svc", ""),
    "Sentinels' password": ("redis+sentinel", "/svc", f"sentinel_password={ENCODED}"),
}
"""Scheme, what stands behind the hosts, and a further option."""


@pytest.fixture(params=[*SEVERAL.values()], ids=[*SEVERAL])
def several(request: pytest.FixtureRequest) -> Any:
    return request.param


def finder(given: Any, several: Any, *hosts: str) -> Dialer | ClusterDialer:
    (before, behind, more), (scheme, path, option) = given, several
    query = "&".join(part for part in (behind.removeprefix("?"), option) if part)
    url = f"{scheme}://{before}{','.join(hosts)}{path}?{query}"
    made = open_source(url, connect_timeout=5, timeout=5, max_bulk=MAX_BULK, **more)
    clean(made, repr(made), made.url, read(url), repr(read(url)))
    return made


async def not_found(made: Dialer | ClusterDialer, kind: type[ConnectError] = ConnectError) -> str:
    with pytest.raises(kind) as raised:
        await (made.discover() if isinstance(made, ClusterDialer) else made.dial())
    clean_error(raised.value)
    return str(raised.value)


async def test_nobody_listens_in_the_whole_cluster(given: Any, several: Any) -> None:
    one, two = f"127.0.0.1:{free_port()}", f"localhost:{free_port()}"
    message = await not_found(finder(given, several, one, two))
    assert f"{several[0]}://{one},{two}{several[1]}" in message


@pytest.mark.parametrize("reply", [b"-ERR unknown command ?\r\n", b"-WRONGPASS ?\r\n", b"?\r\n", b"+?\r\n"])
async def test_node_quotes_what_it_was_sent(given: Any, several: Any, reply: bytes) -> None:
    with listener(answering(reply)) as one, listener(answering(reply)) as two:
        await not_found(finder(given, several, f"127.0.0.1:{one}", f"127.0.0.1:{two}"))


async def test_node_refuses_the_password(given: Any, several: Any) -> None:
    with make_server("valkey", port=(port := free_port()), config={"requirepass": "another"}):
        await not_found(finder(given, several, f"127.0.0.1:{port}"), AuthenticationError)


def clients() -> Iterator[Any]:
    port = free_port()
    for module in (redis, redis.asyncio):
        for login in ({"password": CANARY}, {"credential_provider": Provider()}):
            yield module.Redis(port=port, **login)
            yield module.Redis.from_url(f"redis://127.0.0.1:{port}", **login)
            watchers = module.sentinel.Sentinel([("127.0.0.1", port)], sentinel_kwargs={"password": CANARY}, **login)
            yield watchers.master_for("svc")
    yield redis.asyncio.RedisCluster(host="127.0.0.1", port=port, password=CANARY)


async def test_client_of_redis_py_as_the_source() -> None:
    for client in clients():
        clean(repr(read(client)))
        await not_found(open_source(client, connect_timeout=5, timeout=5, max_bulk=MAX_BULK))
        with pytest.raises(UsageError) as raised:
            open_source(client, connect_timeout=5, timeout=5, max_bulk=MAX_BULK, nonsense=1)
        clean_error(raised.value)


# --- URLs and options that are wrong ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    [
        f"redis://user:{CANARY}@host:6379",  # its special characters as they are
        "redis://user:6379/coal@host",
        "redis://:1?coal@host",
        "redis://:1#coal@host",
        "unix://user:c4n4ry/coal@/run/s.sock",
        "redis:///:coal@host",
        "redis:coal@host",
        "redis:/:coal@host",
        "coal@host",
        "user:coal@host:6379",
        "http://user:coal@host",
        "redis://user:coal",  # without the host
        "redis://user:coal@host:port",
        "redis://user:coal@host:99999",
        "redis://user:coal@[::1",
        "redis://user:coal\u2100@host",  # NFKC: urllib quotes it
        f"redis+cluster://user:{CANARY}@host:6379,host",
        "redis+cluster://user:6379/coal@host,host",
        "redis+cluster://user:coal",  # without the host
        "redis+cluster://user:coal,host",
        "redis+cluster://user:coal@host:port",
        "redis+cluster://user:coal@host,[::1",
        "redis+cluster://user:coal\u2100@host",
        f"redis+cluster://:{ENCODED}@host/7",
        f"redis+cluster://:{ENCODED}@host?db=7",
        f"redis+cluster://:{ENCODED}@host?db=c4n4ry",
        f"redis+sentinel://:{ENCODED}@host",
        f"redis+sentinel://:{ENCODED}@host/svc/db",
        f"redis+sentinel://user:{CANARY}@host/svc",
        "redis+sentinel://:1?coal@host/svc",
        "redis+sentinel://:1#coal@host/svc",
        f"redis+sentinel://host/svc?sentinel_password={ENCODED}&nonsense=1",
        f"redis+sentinel://host/svc?sentinel_password={ENCODED}&socket_timeout=soon",
        f"redis+sentinel://host/svc?sentinel_pass={ENCODED}",
        f"rediss+sentinel://host/svc?sentinel_password={ENCODED}&ssl_ca_certs=/nowhere",
        f"redis://:{ENCODED}@host?socket_timeout=soon",
        f"redis://:{ENCODED}@host?nonsense=1",
        f"redis://host?password={ENCODED}&nonsense=1",
        f"redis://host/x?password={ENCODED}&db=c4n4ry",
        f"redis://:{ENCODED}@host?ssl_ca_certs=x",
        f"rediss://:{ENCODED}@host?ssl_cert_reqs=maybe",
        f"rediss://:{ENCODED}@host?ssl_ca_certs=/nowhere",
    ],
)
def test_wrong_url_is_not_quoted(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError) as raised:
        aionpredis.connect(url)
    clean_error(raised.value)
    monkeypatch.setenv("REDIS_URL", url)
    with pytest.raises(UsageError) as raised:
        aionpredis.connect()
    clean_error(raised.value)


def test_special_characters_are_said_to_be_encoded() -> None:
    with pytest.raises(UsageError, match="%2F"):
        aionpredis.connect("redis://user:c4n4ry/coal@host:6379")


@pytest.mark.parametrize("place", ["host:6379/0", "[::1]:6379", "host"])
def test_url_is_shown_without_what_is_secret(given: Any, place: str) -> None:
    assert make(given, place).url == f"redis://{place}"


@pytest.mark.parametrize(
    "options",
    [
        {"tiemout": 3},
        {"timeout": 0},
        {"codec": "none such"},
        {"ssl_ca_certs": "x"},
        {"username": "u", "credential_provider": Provider()},
        {"sentinel_password": CANARY},
    ],
)
def test_wrong_option_does_not_quote_the_others(options: dict[str, Any]) -> None:
    with pytest.raises((UsageError, AionpredisError)) as raised:
        aionpredis.connect("redis://host", password=CANARY, **options)
    clean_error(raised.value)


async def test_encrypted_key(tmp_path: Path) -> None:
    certificates = Certificates(tmp_path / "c")
    certificate, key = certificates.client()
    key.write_text("no key")
    with make_server("valkey") as server, Terminator(server.url, certificates.context()) as terminator:
        client = aionpredis.connect(
            f"rediss://127.0.0.1:{terminator.port}",
            ssl_certfile=str(certificate),
            ssl_keyfile=str(key),
            ssl_password=CANARY,
        )
        await refused(client)


# --- at work ---------------------------------------------------------------------------------------------------------


@contextmanager
def locked(kind: str) -> Iterator[Server]:
    with make_server(kind, config={"requirepass": f'"{CANARY}"'}) as server:
        yield server


async def test_what_a_client_makes(given: Any) -> None:
    with locked("valkey") as server:
        async with make(given, server.url.removeprefix("unix://"), "unix") as client:
            await client.set("k", np.ones(3))
            replay = client.replay("r", Schema(x="int64"))
            run = await replay.begin_run({"w": np.ones(3)})
            async with client.writer() as writer, replay.actor() as actor:
                await actor.join()
                await actor.append(x=1)
                await actor.flush()
                batches = await replay.epoch()
                sampler = await replay.sampler()
                policy = await replay.policy.latest()
                connection = await client.connection()
                for thing in (client, client.url, writer, replay, replay.policy, actor, run, batches, sampler, policy):
                    clean(thing, repr(thing))
                clean(connection, repr(connection), server, repr(server), server.url)
            with pytest.raises(AionpredisError) as raised:
                await client.execute("LPUSH", "k", "x")
            clean_error(raised.value)
            server.stop()
            with pytest.raises(AionpredisError) as raised:
                await client.get("k")
            clean_error(raised.value)
    clean(client, repr(client))


async def test_provider_is_asked_for_each_connection() -> None:
    passwords = iter([CANARY, CANARY[::-1]])

    class Rotating(redis.CredentialProvider):
        def get_credentials(self) -> tuple[str]:
            return (next(passwords),)

    with locked("valkey") as server, redis.Redis.from_url(server.url, password=CANARY) as stock:
        async with aionpredis.connect(server.url, credential_provider=Rotating()) as client:
            await client.set("k", np.ones(3))
            stock.config_set("requirepass", CANARY[::-1])
            stock.client_kill_filter(_type="normal", skipme=True)
            assert await client.get("k") is not None
        assert next(passwords, None) is None


# --- outputs ---------------------------------------------------------------------------------------------------------


def run(*arguments: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", *arguments],
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
        env=os.environ | environment,
        stdin=subprocess.DEVNULL,
    )
    output = done.stdout + done.stderr
    clean(output)
    return output


def test_commands(tmp_path: Path) -> None:
    url = f"redis://:{ENCODED}@127.0.0.1:1/0"
    assert "no connection" in run("aionpredis", "save", "pong", str(tmp_path / "s"), REDIS_URL=url)
    assert "refused" in run("bench", "write", "--quick", "--url", url)
    shown = CliRunner().invoke(cli.app, ["save", "--help"], env={"REDIS_URL": url}).output
    assert "REDIS_URL" in shown
    clean(shown)


def test_demo() -> None:
    """A whole demo on a server with a password: its output, its results, its processes' command lines."""
    pytest.importorskip("gymnasium")
    with locked("valkey") as server, redis.Redis.from_url(server.url, password=CANARY) as stock:
        pause(stock, 30_000)  # no run begins, for which the simulators wait, before they were looked at
        url = server.url.replace("unix://", f"unix://:{ENCODED}@")
        command = [sys.executable, "-m", "aionpredis", "demo", "--url", url, "--runs", "1", "--transitions", "200"]
        with subprocess.Popen(
            [*command, "--simulators", "1", "--json"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            simulators: list[bytes] = []

            def found() -> bool:
                simulators[:] = [
                    line for line in command_lines(children_of(process.pid)) if b"aionpredis.demo.simulator" in line
                ]
                return bool(simulators) or process.poll() is not None

            until(found, "a simulator", 30)
            stock.client_unpause()
            results, progress = process.communicate(timeout=50)
        clean(results, progress, *simulators)
        assert simulators
        assert json.loads(results)


def children_of(pid: int) -> list[int]:
    return [int(child) for task in Path(f"/proc/{pid}/task").glob("*/children") for child in task.read_text().split()]


def command_lines(pids: list[int]) -> list[bytes]:
    lines = []
    for pid in pids:
        try:
            lines.append(Path(f"/proc/{pid}/cmdline").read_bytes())
        except OSError:
            continue
    return lines


def test_what_a_benchmark_tells_of_its_machine() -> None:
    machine = pytest.importorskip("bench.machine")
    servers = pytest.importorskip("bench.servers")
    with locked("valkey") as server:
        url = server.url.replace("unix://", f"unix://:{ENCODED}@")
        with servers.target(url=url) as target:
            clean(json.dumps(machine.describe(target.facts)))
