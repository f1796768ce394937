"""Every example runs, on an embedded server and on one that exists, and leaves that one as it was."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import redis

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))


def run_example(path: Path, variables: dict[str, str]) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "REDIS_URL"} | variables
    done = subprocess.run(
        [sys.executable, "-W", "error", path], env=environment, capture_output=True, text=True, timeout=40, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_on_an_embedded_server(path: Path) -> None:
    assert run_example(path, {}).count("\n") >= 2
    assert len(path.read_text().splitlines()) <= 60


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_through_redis_url(path: Path, url: str, stock: redis.Redis) -> None:
    commands = stock.info("stats")["total_commands_processed"]
    run_example(path, {"REDIS_URL": url})
    assert stock.info("stats")["total_commands_processed"] > commands + 5
    assert [key for key in stock.scan_iter() if stock.ttl(key) < 0] == []  # actors may leave what has a lease


def test_first_example_of_the_readme(tmp_path: Path, url: str, stock: redis.Redis) -> None:
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    example = tmp_path / "example.py"
    example.write_text(readme.split("```python\n")[1].split("```")[0].replace("unix:///run/redis.sock", url))
    run_example(example, {})
    assert stock.dbsize() == 34
