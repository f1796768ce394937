"""Every code block of the guides runs as it stands, against a real server; links lead somewhere."""

from __future__ import annotations

import ast
import inspect
import math
import re
from pathlib import Path
from typing import Any, NamedTuple

import anyio
import numpy as np
import pytest
from numpy.typing import NDArray
from redis import UsernamePasswordCredentialProvider

import aionpredis
from aionpredis import Replay, Run, RunEnded, Schema

pytestmark = pytest.mark.anyio

ROOT = Path(__file__).parent.parent
GUIDES = sorted((ROOT / "docs").glob("*.md"))

FENCE = re.compile(
    r"^(?:<!-- (?P<mark>.+?) -->\n)?(?P<fence>`{3,})(?P<language>.*)\n(?P<code>(?:.*\n)*?)(?P=fence)$", re.MULTILINE
)
NOT_RUN = {"sh", "text"}
"""Languages of blocks that are no Python: commands, and output or drawings."""
WITH_SIMULATORS = "with simulators"
"""What stands in a comment on the line before a block during which actors append."""

SCHEMA = Schema(state=("float32", (4,)), action="int64", reward="float32", terminated="bool", truncated="bool")
WEIGHTS = {"weight": np.ones((4, 2), np.float32)}
STEPS = 6
"""Training steps after which a block that trains for ever has run well enough."""


class Block(NamedTuple):
    path: Path
    line: int
    mark: str | None
    language: str
    code: str

    def __str__(self) -> str:
        return f"{self.path.name}:{self.line}"


def blocks_of(path: Path) -> list[Block]:
    text = path.read_text(encoding="utf-8")
    return [
        Block(path, text.count("\n", 0, match.start("code")), match["mark"], match["language"], match["code"])
        for match in FENCE.finditer(text)
    ]


BLOCKS = [block for path in GUIDES for block in blocks_of(path)]
PYTHON = [block for block in BLOCKS if block.language == "python"]


class EnoughError(Exception):
    """The block has trained as often as we wanted to see."""


class Environment:
    """Episodes of 25 steps; every second one is truncated."""

    def __init__(self) -> None:
        self._step = 0

    def reset(self) -> tuple[NDArray[np.float32], dict[str, Any]]:
        return np.zeros(4, np.float32), {}

    def step(self, action: int) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        self._step += 1
        terminated, truncated = self._step % 50 == 25, self._step % 50 == 0
        return np.full(4, self._step % 25, np.float32), float(action), terminated, truncated, {}


def act(weights: dict[str, NDArray[np.float32]], state: NDArray[np.float32]) -> int:
    return int((state @ weights["weight"]).argmax())


class Training:
    """The training step of the blocks: gives an error for each transition."""

    def __init__(self) -> None:
        self.steps = 0

    def __call__(self, first: NDArray[Any], *others: NDArray[Any]) -> NDArray[np.float32]:
        assert len(first)
        assert {len(other) for other in others} <= {len(first)}
        self.steps += 1
        if self.steps > STEPS:
            raise EnoughError
        return np.linspace(-1, 1, len(first), dtype=np.float32)


async def append(replay: Replay, count: float) -> None:
    """Append so many transitions to the newest run, or to the next ones as they begin."""
    environment, appended = Environment(), 0
    state, _ = environment.reset()
    async with replay.actor() as actor:
        while appended < count:
            try:
                await actor.join()
                while appended < count:
                    following, reward, terminated, truncated, _ = environment.step(1)
                    await actor.append(state=state, action=1, reward=reward, terminated=terminated, truncated=truncated)
                    state, appended = following, appended + 1
                    if appended % 100 == 0:
                        await anyio.sleep(0.001)
            except RunEnded:
                pass


async def execute(block: Block, namespace: dict[str, Any]) -> None:
    code = compile(
        "\n" * block.line + block.code, block.path, "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True
    )
    result = eval(code, namespace)
    if inspect.iscoroutine(result):
        await result


@pytest.mark.parametrize("block", PYTHON, ids=str)
async def test_block_runs(url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], block: Block) -> None:
    async with aionpredis.connect(url) as client:
        replay = client.replay("pong", SCHEMA)
        run: Run = await replay.begin_run(WEIGHTS)
        await append(replay, 300)
        await append(replay, 300)
        namespace = {name: getattr(aionpredis, name) for name in aionpredis.__all__ if not name.startswith("_")} | {
            "act": act,
            "ca_file": __file__,  # any file: it is not read before connecting
            "certificate_file": __file__,
            "key_file": __file__,
            "provider": UsernamePasswordCredentialProvider("actor", "p@ssword"),
            "aionpredis": aionpredis,
            "anyio": anyio,
            "client": client,
            "folder": tmp_path / "checkpoint",
            "make_env": Environment,
            "math": math,
            "np": np,
            "replay": replay,
            "run": run,
            "schema": SCHEMA,
            "train": Training(),
            "weights": WEIGHTS,
        }
        with anyio.fail_after(20):
            try:
                async with anyio.create_task_group() as tasks:
                    if block.mark == WITH_SIMULATORS:
                        for _ in range(2):
                            tasks.start_soon(append, replay, math.inf)
                    await execute(block, namespace)
                    tasks.cancel_scope.cancel()
            except* EnoughError:
                pass


@pytest.mark.parametrize("path", GUIDES, ids=lambda path: path.name)
def test_every_block_is_run_or_marked(path: Path) -> None:
    found = blocks_of(path)
    fences = [line for line in path.read_text(encoding="utf-8").splitlines() if line.lstrip().startswith("```")]
    assert len(fences) == 2 * len(found)
    for block in found:
        assert block.language in {"python", *NOT_RUN}, block
        assert block.mark in {None, WITH_SIMULATORS}, block
        assert block.language == "python" or block.mark is None, block


@pytest.mark.parametrize("path", GUIDES, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    text = FENCE.sub("", path.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    anchors = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
    assert len(set(anchors)) == len(anchors)
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if target.startswith("#"):
            assert target[1:] in anchors, target
        elif "://" not in target:
            assert (path.parent / target.partition("#")[0]).exists(), target


TEST_ID = re.compile(r"`(?P<file>test_\w+\.py)::(?P<name>test_\w+)(?:\[(?P<case>\w+)\])?`")


def test_tests_that_hold_a_promise_exist() -> None:
    """Each row of a table in reliability.md names at least one; a case is a name in that file."""
    text = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    for line in text.splitlines():
        if "::" in line:
            assert TEST_ID.search(line), line
            assert line.count("::") == len(TEST_ID.findall(line)), line
    matches = list(TEST_ID.finditer(text))
    functions = {file: functions_of(ROOT / "tests" / file) for file in {match["file"] for match in matches}}
    for match in matches:
        assert {match["name"], match["case"] or match["name"]} <= functions[match["file"]], match[0]


def functions_of(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
