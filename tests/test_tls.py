"""TLS: whom it lets in and whom not, and that what travels through it is the same as without."""

from __future__ import annotations

import random
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import anyio
import anyio.lowlevel
import numpy as np
import pytest

import aionpredis
from aionpredis import Replay
from aionpredis.errors import ConnectError, ConnectionLost, OutcomeUnknown, Stalled, UsageError
from aionpredis.requests import set_command, value_reply
from aionpredis.wire.connection import Connection
from aionpredis.wire.resp import MAX_BULK, TURN, Reply, encode
from aionpredis.wire.socket import RECORD, TLSSocket, wrap

from .cluster import Cluster, slot_of
from .replays import SCHEMA, fill, uids
from .servers import binary_of, free_port, make_server
from .strategies import equal
from .tls import Certificates, Terminator, tls_server

pytestmark = pytest.mark.anyio

STATE = np.arange(6400, dtype=np.uint16).reshape(80, 80)
PAYLOAD = np.random.default_rng(1).integers(0, 256, 12 << 20, np.uint8)


class Place(NamedTuple):
    url: str
    options: dict[str, Any]

    def connect(self, **options: Any) -> aionpredis.Client:
        return aionpredis.connect(self.url, **self.options, **options)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("tls") / "certificates")


@pytest.fixture(scope="module", params=["valkey", "redis"])
def place(request: pytest.FixtureRequest, certificates: Certificates) -> Iterator[Place]:
    with tls_server(request.param, certificates) as port:
        yield Place(f"rediss://127.0.0.1:{port}", {"ssl_ca_certs": str(certificates.ca_file)})


@pytest.fixture(scope="module")
def terminator(certificates: Certificates) -> Iterator[Terminator]:
    with make_server("valkey") as server, Terminator(server.url, certificates.context()) as terminator:
        yield terminator


# --- what travels ----------------------------------------------------------------------------------------------------


async def test_large_values_travel_whole_and_others_run_meanwhile(place: Place) -> None:
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            await anyio.lowlevel.checkpoint()
            turns += 1

    out = np.zeros((2, *PAYLOAD.shape), np.uint8)
    record = {"weights": PAYLOAD.reshape(-1, 1024), "bias": np.ones(2, np.float32)}
    async with place.connect() as client:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(count)
            for name in ("a", "b"):
                await client.set(name, PAYLOAD)
            found = await client.mget(["a", "b"], out=out)
            fresh = await client.get("a")
            tasks.cancel_scope.cancel()
        assert found.all()
        assert (out == PAYLOAD).all()
        assert equal(fresh, PAYLOAD)
        await client.set_record("r", record)
        got = await client.get_record("r")
        assert got is not None
        assert all((got[name] == column).all() for name, column in record.items())
    assert turns > 5 * PAYLOAD.nbytes // TURN  # five such values; no turn moves more


async def test_many_tasks_get_their_own_replies(place: Place) -> None:
    async def use(client: aionpredis.Client, task: int) -> None:
        for step in range(10):
            array = np.full(1 + 37 * task, task * 100 + step)
            await client.set(f"k{task}", array)
            assert equal(await client.get(f"k{task}"), array)

    async with place.connect() as client, anyio.create_task_group() as tasks:
        for task in range(64):
            tasks.start_soon(use, client, task)


async def test_writer_and_mget(place: Place) -> None:
    frames = {f"frame:{i}": STATE + np.uint16(i) for i in range(400)}
    async with place.connect() as client:
        async with client.writer(max_inflight=1 << 20) as writer:
            for key, frame in frames.items():
                await writer.put(key, frame)
        out = np.empty((len(frames), *STATE.shape), STATE.dtype)
        assert (await client.mget(frames, out=out)).all()
        assert (out == np.stack(list(frames.values()))).all()


async def test_actors_are_followed(place: Place) -> None:
    async with place.connect() as client:
        replay: Replay = client.replay("r", SCHEMA, chunk=4)
        run = await replay.begin_run({"w": STATE})
        found: list[int] = []

        async def learn() -> None:
            found.extend(await uids(await replay.follow(run, batch=8)))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(learn)
            async with replay.actor() as actor:
                await actor.join()
                await fill(actor, range(300))
            await replay.begin_run(keep=2)
        assert sorted(found) == list(range(300))
        await replay.delete()


async def test_cancelled_transfer_writes_nothing_later_and_disturbs_nobody(place: Place) -> None:
    rng = random.Random(3)
    payload = PAYLOAD[: 4 << 20]
    out = np.zeros_like(payload)
    async with place.connect() as client:
        await client.set("big", payload)
        await client.set("small", STATE)
        cancelled = 0
        for round_ in range(20):
            with anyio.move_on_after(rng.uniform(0, 0.006)) as scope:
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(client.get, "small")
                    if round_ % 2:
                        await client.set("big", payload)
                    else:
                        await client.get("big", out=out)
            cancelled += scope.cancelled_caught
            out[:] = 7
            assert equal(await client.get("small"), STATE)
            assert (out == 7).all()
        assert cancelled
        assert equal(await client.get("big"), payload)


# --- the end of a connection -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("politely", [True, False], ids=["close_notify", "reset"])
async def test_end_of_the_peer_is_a_lost_connection_that_is_made_again(
    terminator: Terminator, certificates: Certificates, politely: bool
) -> None:
    url = f"rediss://127.0.0.1:{terminator.port}"
    async with aionpredis.connect(url, ssl_ca_certs=str(certificates.ca_file)) as client:
        await client.set("k", STATE)
        before = await client.connection()

        waiting = anyio.Event()

        async def block() -> None:
            async with client.blocking() as own:
                reply = own.submit(encode("BLPOP", "nothing", 0), Reply())
                waiting.set()
                with pytest.raises(ConnectionLost):
                    await own.wait(reply)

        with anyio.fail_after(30):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(block)
                await waiting.wait()
                await anyio.to_thread.run_sync(lambda: terminator.cut(politely=politely))
            assert equal(await client.get("k"), STATE)
        assert before.lost is not None
        assert await client.connection() is not before


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_killed_server_leaves_the_outcome_unknown(certificates: Certificates) -> None:
    with make_server("valkey") as server, Terminator(server.url, certificates.context()) as terminator:
        url = f"rediss://localhost:{terminator.port}"
        async with aionpredis.connect(url, ssl_ca_certs=str(certificates.ca_file)) as client:
            await client.execute("CLIENT", "PAUSE", 60_000, "WRITE")
            with anyio.fail_after(30), pytest.raises(OutcomeUnknown):
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(anyio.to_thread.run_sync, server.stop)
                    try:
                        await client.execute("INCR", "n")
                    except OutcomeUnknown as error:
                        unknown = error
                raise unknown


# --- who is let in ---------------------------------------------------------------------------------------------------


async def refused(url: str, *, connect_timeout: float = 5.0, **options: Any) -> ConnectError:
    """The error of connecting, which comes in time."""
    started = time.monotonic()
    with pytest.raises(ConnectError) as raised:
        async with aionpredis.connect(url, connect_timeout=connect_timeout, **options):
            pass
    assert time.monotonic() - started < connect_timeout + 20
    return raised.value


async def test_certificate_of_an_unknown_ca_is_refused_and_accepted_only_when_asked(place: Place) -> None:
    assert "ssl_ca_certs=" in str(await refused(place.url))
    for url in (f"{place.url}?ssl_cert_reqs=none", f"{place.url}?ssl_cert_reqs=none&ssl_check_hostname=true"):
        async with aionpredis.connect(url) as client:
            await client.set("k", STATE)
    async with aionpredis.connect(place.url, ssl_cert_reqs="none") as client:
        assert equal(await client.get("k"), STATE)


async def test_certificate_for_another_name_is_refused(tmp_path: Path) -> None:
    for names, host in ((("localhost",), "127.0.0.1"), (("elsewhere.example", "127.0.0.1"), "localhost")):
        others = Certificates(tmp_path / host, *names)
        with make_server("valkey") as server, Terminator(server.url, others.context()) as terminator:
            url = f"rediss://{host}:{terminator.port}"
            error = await refused(url, ssl_ca_certs=str(others.ca_file))
            assert "by a name that is in the server's certificate" in str(error)
            async with aionpredis.connect(f"{url}?ssl_check_hostname=false", ssl_ca_certs=str(others.ca_file)):
                pass


async def test_expired_certificate_is_refused(tmp_path: Path) -> None:
    expired = Certificates(tmp_path / "c", expired=True)
    with make_server("valkey") as server, Terminator(server.url, expired.context()) as terminator:
        url = f"rediss://127.0.0.1:{terminator.port}"
        assert "has to be renewed" in str(await refused(url, ssl_ca_certs=str(expired.ca_file)))


@pytest.mark.parametrize("kind", ["valkey", "redis"])
async def test_client_certificates(certificates: Certificates, kind: str) -> None:
    certificate, key = certificates.client()
    options = f"?ssl_ca_certs={certificates.ca_file}&ssl_certfile={certificate}&ssl_keyfile={key}"
    with client_certificates_wanted(kind, certificates) as port:
        async with aionpredis.connect(f"rediss://127.0.0.1:{port}{options}") as client:
            await client.set("k", STATE)
        error = await refused(f"rediss://127.0.0.1:{port}", ssl_ca_certs=str(certificates.ca_file))
        assert "ssl_certfile=" in str(error)


@contextmanager
def client_certificates_wanted(kind: str, certificates: Certificates) -> Iterator[int]:
    if kind == "redis":
        with tls_server("redis", certificates, tls_auth_clients="yes") as port:
            yield port
    else:
        with make_server("valkey") as server:
            with Terminator(server.url, certificates.context(clients=True)) as terminator:
                yield terminator.port


@pytest.mark.parametrize("kind", ["valkey", "redis"])
async def test_client_certificate_of_another_ca_is_refused(
    certificates: Certificates, tmp_path: Path, kind: str
) -> None:
    certificate, key = Certificates(tmp_path / "other").client()
    with client_certificates_wanted(kind, certificates) as port:
        error = await refused(
            f"rediss://127.0.0.1:{port}",
            ssl_ca_certs=str(certificates.ca_file),
            ssl_certfile=str(certificate),
            ssl_keyfile=str(key),
        )
        assert "ssl_certfile=" in str(error)


@pytest.mark.parametrize("kind", ["valkey", "redis"])
async def test_tls_and_none_do_not_meet(kind: str, certificates: Certificates) -> None:
    with tls_server(kind, certificates) as port:
        assert "if that port speaks TLS: rediss://" in str(await refused(f"redis://127.0.0.1:{port}"))
    port = free_port()
    with make_server(kind, port=port):
        assert "without TLS: redis://" in str(await refused(f"rediss://127.0.0.1:{port}", connect_timeout=0.3))


# --- a cluster -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tls_cluster(certificates: Certificates) -> Iterator[Cluster]:
    with tls_server("redis", certificates):  # or it is skipped
        pass
    with Cluster(binary=binary_of("redis"), tls=certificates.directives()) as cluster:
        yield cluster


@pytest.mark.one_loop("a cluster whose servers are replaced, which takes seconds")
async def test_cluster_that_speaks_tls_is_used_and_followed(tls_cluster: Cluster, certificates: Certificates) -> None:
    """Each server by its own address and by TLS alone, also those that take over, or get a slot."""
    keys = [f"k{i}" for i in range(100)]
    await refused(tls_cluster.url)  # the CA is not known
    options: dict[str, Any] = {"ssl_ca_certs": str(certificates.ca_file), "read_replicas": True}
    async with aionpredis.connect(tls_cluster.url, **options) as client, client.writer(replicas=1) as writer:
        changes: list[Callable[[Cluster], None]] = [lambda cluster: None, move_a_slot, kill_one]
        for turn, change in enumerate(changes):
            with anyio.fail_after(30):
                await anyio.to_thread.run_sync(change, tls_cluster)
                for key in keys:
                    await writer.put(key, STATE + np.uint16(turn))
                await writer.flush()
                assert all(equal(array, STATE + np.uint16(turn)) for array in await client.mget(keys))
                replay = Replay(client, f"r{turn}", SCHEMA)
                await replay.begin_run()
                async with replay.actor() as actor:
                    await actor.join()
                    await fill(actor, range(100))
                assert sorted(await uids(await replay.epoch())) == [*range(100)]
        connections = [await shard.connection() for shard in client.topology.shards]
        assert [type(connection._sock) for connection in connections] == [TLSSocket] * 3


def move_a_slot(cluster: Cluster) -> None:
    slot = slot_of("k1")
    cluster.migrate(slot, next(node for node in cluster.primaries() if node is not cluster.owner(slot)))


def kill_one(cluster: Cluster) -> None:
    old = cluster.owner(slot_of("k2"))
    cluster.failover(old)
    cluster.restart(old)


# --- never for ever --------------------------------------------------------------------------------------------------


@contextmanager
def listener(answer: Any) -> Iterator[int]:
    """The port of a server that does ``answer(connection, ended)`` in a thread."""
    ended = threading.Event()
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()

        def serve() -> None:
            try:
                connection, _ = sock.accept()
            except OSError:  # nobody came
                return
            with connection:
                answer(connection, ended)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        try:
            yield sock.getsockname()[1]
        finally:
            ended.set()
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            thread.join(30)
            assert not thread.is_alive()


def stay_silent(connection: socket.socket, ended: threading.Event) -> None:
    ended.wait(50)


def trickle(connection: socket.socket, ended: threading.Event) -> None:
    """A TLS record that never comes to its end, or a RESP line, depending on who listens."""
    try:
        connection.sendall(b"\x16\x03\x03\x40\x00" if connection.recv(1, socket.MSG_PEEK) == b"\x16" else b"+")
        while not ended.wait(0.05):
            connection.sendall(b"\2")
    except OSError:
        pass


@pytest.mark.parametrize("answer", [stay_silent, trickle])
@pytest.mark.parametrize("scheme", ["redis", "rediss"])
async def test_connecting_ends_in_time_whatever_the_peer_does(scheme: str, answer: Any) -> None:
    with listener(answer) as port:
        started = time.monotonic()
        with pytest.raises(ConnectError, match=r"timed out|Timeout|timeout") as raised:
            async with aionpredis.connect(f"{scheme}://127.0.0.1:{port}", connect_timeout=0.3):
                pass
        assert time.monotonic() - started < 20
        assert ("redis://" if scheme == "rediss" else "rediss://") in str(raised.value)


async def test_slow_look_up_of_a_name_ends_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    ended = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: ended.wait(50))
    started = time.monotonic()
    try:
        with pytest.raises(ConnectError, match=r"somewhere\.example:6379: timed out"):
            async with aionpredis.connect("rediss://somewhere.example:6379", connect_timeout=0.2):
                pass
        assert time.monotonic() - started < 20
    finally:
        ended.set()


# --- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "options", "about"),
    [
        ("rediss://h", {"ssl_cert_reqs": None}, "'required'"),
        ("rediss://h?ssl_cert_reqs=maybe", {}, "maybe"),
        ("rediss://h", {"ssl_ca_certs": "/nowhere/ca.pem"}, "ssl_ca_certs: there is no '/nowhere/ca.pem'"),
        ("rediss://h?ssl_certfile=/nowhere/c.pem", {}, "ssl_certfile: there is no"),
        ("rediss://h?ssl_keyfile=/nowhere/c.key", {}, "ssl_keyfile: there is no"),
        ("redis://h", {"ssl_ca_certs": "ca.pem"}, "options are for rediss://"),
    ],
)
def test_wrong_option_shows_at_once(url: str, options: dict[str, Any], about: str) -> None:
    with pytest.raises(UsageError, match=about):
        aionpredis.connect(url, **options)


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_encrypted_key_without_its_password_is_not_asked_for_on_the_terminal(
    terminator: Terminator, certificates: Certificates
) -> None:
    from cryptography.hazmat.primitives import serialization

    certificate, key = certificates.client()
    loaded = serialization.load_pem_private_key(key.read_bytes(), None)
    locked = key.with_name("locked.key")
    locked.write_bytes(
        loaded.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"open-sesame"),
        )
    )
    options: dict[str, Any] = {
        "ssl_ca_certs": str(certificates.ca_file),
        "ssl_certfile": str(certificate),
        "ssl_keyfile": str(locked),
    }
    url = f"rediss://127.0.0.1:{terminator.port}"
    assert "ssl_password=" in str(await refused(url, **options))
    async with aionpredis.connect(url, **options, ssl_password="open-sesame"):
        pass


# --- the socket ------------------------------------------------------------------------------------------------------


@contextmanager
def encrypted(certificates: Certificates, play: Any, *, send_buffer: int = 0) -> Iterator[ssl.SSLSocket]:
    """A TLS socket whose peer does ``play(socket)`` in a thread, then waits for the end."""
    ours, theirs = socket.socketpair()
    if send_buffer:
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
    context = ssl.create_default_context(cafile=str(certificates.ca_file))

    def serve() -> None:
        with certificates.context().wrap_socket(theirs, server_side=True) as peer:
            try:
                play(peer)
                while peer.recv(1 << 16):
                    pass
            except OSError:
                pass

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    sock = context.wrap_socket(ours, server_hostname="localhost")
    try:
        yield sock
    finally:
        sock.close()
        thread.join(30)
        assert not thread.is_alive()


async def test_decrypted_bytes_are_not_waited_for(certificates: Certificates) -> None:
    """Both replies come in one record, whose first part the first reply takes: the socket is not readable again."""
    value = bytes(5000)

    def play(peer: ssl.SSLSocket) -> None:
        peer.recv(1 << 16)
        peer.sendall(b"$5000\r\n" + value + b"\r\n+OK\r\n")

    with encrypted(certificates, play) as sock:
        connection = Connection(wrap(sock), timeout=20.0, max_bulk=MAX_BULK)
        memory = np.ones(5000, np.uint8)
        first, second = value_reply(b"", memory.data), Reply()
        connection.submit(encode("GET", "a"), first, send=False)
        connection.submit(encode("SET", "a", "b"), second)
        await connection.wait(first)
        await connection.wait(second)
        assert first.matched
        assert second.result() == b"OK"
        connection.close()


async def test_sends_that_are_taken_piecemeal_arrive_whole(certificates: Certificates) -> None:
    payload = PAYLOAD[: 2 << 20].copy()
    arrived = bytearray()
    go = threading.Event()

    def play(peer: ssl.SSLSocket) -> None:
        go.wait(30)
        while len(arrived) < payload.nbytes and (data := peer.recv(1 << 14)):
            arrived.extend(data)

    with encrypted(certificates, play, send_buffer=1 << 14) as sock:
        tls = TLSSocket(sock)
        sock.setblocking(False)
        sent = tls.send([payload.data])
        assert 0 < sent < payload.nbytes
        assert tls.waits_for_write(False)  # a record was accepted and not taken
        expected = payload.tobytes()
        payload[:sent] = 0  # what counts as sent is the caller's again
        go.set()
        while sent < payload.nbytes:
            sent += tls.send([payload.data[sent:]])
        while tls.waits_for_write(False):
            assert tls.receive([memoryview(bytearray(8))]) == -1
        while len(arrived) < payload.nbytes:
            await anyio.sleep(0.001)
        assert bytes(arrived) == expected


def test_held_record_is_a_copy() -> None:
    with moody() as (raw, peer):
        tls = TLSSocket(raw)  # type: ignore[arg-type]
        raw.blocked = True
        memory = bytearray(b"x" * RECORD)
        assert tls.send([memory]) == len(memory)
        memory[:] = bytes(len(memory))
        raw.blocked = False
        assert tls.receive([memoryview(bytearray(1))]) == -1
        assert peer.recv(RECORD) == b"x" * RECORD


async def test_both_directions_move_when_both_buffers_are_full(certificates: Certificates) -> None:
    """The peer does not read before it has sent everything, and its value does not fit into any buffer."""
    size = 4 << 20

    def play(peer: ssl.SSLSocket) -> None:
        peer.recv(1)
        peer.sendall(b"$%d\r\n%b\r\n" % (size, PAYLOAD[:size].tobytes()))
        left = size
        while left > 0:
            left -= len(peer.recv(1 << 16))
        peer.sendall(b"+OK\r\n")

    with encrypted(certificates, play, send_buffer=1 << 14) as sock:
        connection = Connection(wrap(sock), timeout=20.0, max_bulk=MAX_BULK)
        memory = np.zeros(size, np.uint8)
        first, second = value_reply(b"", memory.data), Reply()
        connection.submit(encode("GET", "a"), first)
        connection.submit(set_command(b"a", [b"", PAYLOAD[:size].data]), second)
        with anyio.fail_after(30):
            await connection.wait(first)
            await connection.wait(second)
        assert (memory == PAYLOAD[:size]).all()
        connection.close()


class Moody:
    """A socket on which TLS, renegotiating, must read before it can write, or write before it can read."""

    def __init__(self, raw: socket.socket, *, write_needs: str = "", read_needs: str = "") -> None:
        self._raw = raw
        self._write_needs = write_needs
        self._read_needs = read_needs
        self.attempts = 0
        self.blocked = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._raw, name)

    def send(self, data: Any) -> int:
        self.attempts += 1
        if self.blocked:
            raise ssl.SSLWantWriteError
        if self._write_needs == "read":
            try:
                self._raw.recv(1)
            except BlockingIOError:
                raise ssl.SSLWantReadError from None
            self._write_needs = ""
        return self._raw.send(data)

    def recv_into(self, buffer: Any) -> int:
        self.attempts += 1
        if self._write_needs:
            raise ssl.SSLWantReadError
        try:
            if self._read_needs == "write":
                self._raw.send(b"!")
                self._read_needs = ""
            return self._raw.recv_into(buffer)
        except BlockingIOError:
            raise (ssl.SSLWantWriteError if self._read_needs else ssl.SSLWantReadError) from None


@contextmanager
def moody(**needs: str) -> Iterator[tuple[Moody, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        theirs.settimeout(20)
        yield Moody(ours, **needs), theirs


async def test_write_that_must_read_first_waits_for_that(certificates: Certificates) -> None:
    with moody(write_needs="read") as (raw, peer):
        connection = Connection(TLSSocket(raw), timeout=20.0, max_bulk=MAX_BULK)  # type: ignore[arg-type]
        reply = Reply()
        connection.submit(encode("PING"), reply)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(connection.wait, reply)
            await anyio.sleep(0.1)
            assert raw.attempts < 30  # it sleeps: a socket that is writable all the time does not wake it
            peer.sendall(b"!")
            await anyio.to_thread.run_sync(peer.recv, 100)
            peer.sendall(b"+PONG\r\n")
        assert reply.result() == b"PONG"
        connection.close()


async def test_write_that_must_read_first_ends_after_the_timeout() -> None:
    with moody(write_needs="read") as (raw, _):
        connection = Connection(TLSSocket(raw), timeout=0.1, max_bulk=MAX_BULK)  # type: ignore[arg-type]
        reply = connection.submit(encode("PING", bytes(4 * RECORD)), Reply())  # more than is held: some is queued
        with anyio.fail_after(20), pytest.raises(Stalled):
            await connection.wait(reply)


async def test_read_that_must_write_first_waits_for_that() -> None:
    with moody(read_needs="write") as (raw, peer):
        connection = Connection(TLSSocket(raw), timeout=20.0, max_bulk=MAX_BULK)  # type: ignore[arg-type]
        reply = connection.submit(encode("PING"), Reply())
        filler = 0
        while True:  # until nothing more fits
            try:
                filler += raw._raw.send(bytes(1 << 16))
            except BlockingIOError:
                break
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(connection.wait, reply)
            await anyio.sleep(0.05)
            assert raw.attempts < 30

            def read_all() -> None:
                left = filler + len(b"*1\r\n$4\r\nPING\r\n") + 1
                while left:
                    left -= len(peer.recv(min(left, 1 << 16)))
                peer.sendall(b"+PONG\r\n")

            await anyio.to_thread.run_sync(read_all)
        assert reply.result() == b"PONG"
        connection.close()


async def test_request_that_tls_holds_wakes_the_task_that_drives() -> None:
    """The socket took the first request, so the driving task waits for the reply only; the second is held by TLS."""
    with moody() as (raw, peer):
        connection = Connection(TLSSocket(raw), timeout=20.0, max_bulk=MAX_BULK)  # type: ignore[arg-type]
        first = connection.submit(encode("PING"), Reply())
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(connection.wait, first)
            while not connection._parked:
                await anyio.lowlevel.checkpoint()
            raw.blocked = True
            second = connection.submit(encode("PING"), Reply())
            raw.blocked = False

            def answer() -> None:
                left = 2 * len(b"*1\r\n$4\r\nPING\r\n")
                while left:
                    left -= len(peer.recv(left))
                peer.sendall(b"+PONG\r\n" * 2)

            await anyio.to_thread.run_sync(answer)
        await connection.wait(second)
        connection.close()
