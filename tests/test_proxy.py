"""The proxy does what its faults say: else the tests that rely on it would prove nothing."""

from __future__ import annotations

import itertools
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import redis

from .proxy import Faults, Proxy, Seeded
from .servers import until

pytestmark = pytest.mark.one_server("the proxy is looked at")

PING, PONG = b"PING\r\n", b"+PONG\r\n"


@contextmanager
def connected(proxy: Proxy) -> Iterator[socket.socket]:
    url = urlsplit(proxy.url)
    with socket.socket(socket.AF_INET if url.hostname else socket.AF_UNIX) as sock:
        sock.settimeout(20)
        sock.connect((url.hostname, url.port) if url.hostname else url.path)
        yield sock


def received(sock: socket.socket, count: int = 1 << 30) -> bytes:
    """So many bytes, or all until the end."""
    data = b""
    while len(data) < count and (more := sock.recv(min(count - len(data), 1 << 16))):
        data += more
    return data


@pytest.fixture(params=["unix", "tcp"])
def make(request: pytest.FixtureRequest, url: str, tmp_path: Path) -> Callable[..., Proxy]:
    def make(*script: Faults) -> Proxy:
        return Proxy(url, tmp_path if request.param == "unix" else None, script)

    return make


@pytest.mark.parametrize("chunk", [1, 5, 1 << 16])
def test_connection_ends_at_the_byte(make: Callable[..., Proxy], stock: redis.Redis, chunk: int) -> None:
    with make(Faults(cut_down=10, chunk=chunk), Faults(cut_up=11, chunk=chunk)) as proxy:
        with connected(proxy) as sock:
            sock.sendall(3 * PING)
            assert received(sock) == (3 * PONG)[:10]
        with connected(proxy) as sock:
            sock.sendall(b"INCR a\r\n" + b"INCR b\r\n")
            assert b":1\r\n".startswith(received(sock))  # its reply may come too late
        with connected(proxy) as sock:
            sock.sendall(PING)
            assert received(sock, 7) == PONG
        assert proxy.cuts == 2
    until(lambda: bool(stock.exists("a")), "the command before the cut is executed")
    assert not stock.exists("b")


@pytest.mark.parametrize("chunk", [1, 7, 1 << 16])
def test_connection_ends_after_so_many_replies(make: Callable[..., Proxy], stock: redis.Redis, chunk: int) -> None:
    stock.mset({"k": b"*9\r\n$5\r\n" * 50, "e": b""})
    commands = [b"PING", b"GET k", b"GET none", b"GET e", b"MGET k none e", b"INCR n", b"NONSENSE", b"LRANGE l 0 -1"]
    with make() as proxy, connected(proxy) as sock:
        sock.sendall(b"\r\n".join([*commands, PING]))
        whole = b""
        while not whole.endswith(b"*0\r\n" + PONG):  # the replies to the last two
            whole += received(sock, 1)
    ends = [0]
    for count in range(1, len(commands) + 1):
        with make(Faults(cut_replies=count, chunk=chunk)) as proxy, connected(proxy) as sock:
            stock.delete("n")
            sock.sendall(b"\r\n".join([*commands, PING]))
            got = received(sock)
            assert whole.startswith(got)
            assert got.endswith(b"\r\n")
            ends.append(len(got))
    assert whole[ends[-1] :] == PONG
    for (start, stop), kind in zip(itertools.pairwise(ends), b"+$$$*:-*", strict=True):
        assert start < stop
        assert whole[start] == kind


def test_reset_is_an_rst(url: str) -> None:
    with Proxy(url, script=[Faults(cut_down=3, ending="reset")]) as proxy, connected(proxy) as sock:
        sock.sendall(PING)
        with pytest.raises(ConnectionResetError):
            received(sock)


def test_half_closed_for_writing_still_takes_requests(make: Callable[..., Proxy], stock: redis.Redis) -> None:
    with make(Faults(cut_down=3, ending="half")) as proxy, connected(proxy) as sock:
        sock.sendall(PING)
        assert received(sock) == PONG[:3]
        sock.sendall(b"SET k v\r\n")
        until(lambda: bool(stock.exists("k")), "the request is executed")


def test_half_closed_for_reading_still_sends_replies(url: str, tmp_path: Path) -> None:
    with Proxy(url, tmp_path, [Faults(cut_up=6, ending="half")]) as proxy, connected(proxy) as sock:
        sock.sendall(PING)
        assert received(sock, 7) == PONG
        deadline = time.monotonic() + 20
        with pytest.raises(BrokenPipeError):
            while time.monotonic() < deadline:  # the proxy closes after it has passed that on
                sock.sendall(PING)
                time.sleep(0.001)


def test_stall_closes_nothing_and_loses_nothing(make: Callable[..., Proxy]) -> None:
    faults = Faults(cut_down=3, ending="stall")
    with make(faults) as proxy, connected(proxy) as sock:
        sock.sendall(2 * PING)
        assert received(sock, 3) == PONG[:3]
        sock.settimeout(0.05)
        with pytest.raises(TimeoutError):
            sock.recv(1)
        with connected(proxy) as other:  # is another connection
            other.sendall(PING)
            assert received(other, 7) == PONG
        sock.settimeout(20)
        faults.stalled = False
        assert received(sock, 11) == (2 * PONG)[3:]


def test_delay_limits_no_throughput(make: Callable[..., Proxy], stock: redis.Redis) -> None:
    stock.set("k", bytes(8 << 20))
    with make(Faults(delay=0.1)) as proxy, connected(proxy) as sock:
        start = time.monotonic()
        sock.sendall(b"GET k\r\n")
        received(sock, 8 << 20)
        assert 0.2 < time.monotonic() - start < 12  # one by one its 128 pieces would take 12.8 s


def test_refused_connection_is_closed_at_once(make: Callable[..., Proxy]) -> None:
    with make(Faults(refusing=True)) as proxy:
        with connected(proxy) as sock:
            assert received(sock) == b""
        with connected(proxy) as sock:
            sock.sendall(PING)
            assert received(sock, 7) == PONG


def test_seed_decides_and_a_failure_names_it(url: str, tmp_path: Path) -> None:
    first, second, third = (list(itertools.islice(map(vars, Seeded(seed)), 50)) for seed in (7, 7, 8))
    assert first == second != third
    with pytest.raises(AssertionError) as raised, Proxy(url, tmp_path, Seeded(7)):
        raise AssertionError
    assert "Seeded(7)" in raised.value.__notes__[0]
