"""Every example runs, on an embedded server and on one that exists, and leaves that one as it was."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import redis

FOLDER = Path(__file__).parent.parent / "examples"
DQN = FOLDER / "dqn_prioritized.py"
EXAMPLES = [
    pytest.param(
        path, id=path.stem, marks=pytest.mark.skipif(path == DQN and not find_spec("gymnasium"), reason="Gymnasium")
    )
    for path in sorted(FOLDER.glob("*.py"))
]
ARGUMENTS = {DQN: ["--goal", "100", "--seconds", "30"]}  # who has learned nothing falls after 10 to 20 steps
LINES = {DQN: 205}


def start_example(path: Path, variables: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "REDIS_URL"} | variables
    command = [sys.executable, "-W", "error", str(path), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=40, check=False)


def run_example(path: Path, variables: dict[str, str]) -> str:
    done = start_example(path, variables, *ARGUMENTS.get(path, ()))
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@pytest.mark.parametrize("path", EXAMPLES)
def test_example_on_an_embedded_server(path: Path) -> None:
    assert run_example(path, {}).count("\n") >= (1 if path in ARGUMENTS else 2)
    assert len(path.read_text().splitlines()) <= LINES.get(path, 60)


@pytest.mark.parametrize("path", EXAMPLES)
def test_example_through_redis_url(path: Path, url: str, stock: redis.Redis) -> None:
    commands = stock.info("stats")["total_commands_processed"]
    run_example(path, {"REDIS_URL": url})
    assert stock.info("stats")["total_commands_processed"] > commands + 5
    assert [key for key in stock.scan_iter() if stock.ttl(key) == -1] == []  # actors may leave what has a lease


def test_dqn_that_has_not_learned_says_so() -> None:
    pytest.importorskip("gymnasium")
    done = start_example(DQN, {}, "--goal", "501", "--seconds", "1")
    assert (done.returncode, done.stderr) == (1, "a mean return of 501 was not reached within 1 s\n")


def test_first_example_of_the_readme(tmp_path: Path, url: str, stock: redis.Redis) -> None:
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    example = tmp_path / "example.py"
    example.write_text(readme.split("```python\n")[1].split("```")[0])
    run_example(example, {"REDIS_URL": url})
    assert len(stock.keys()) == 33
