"""Every code block of README and docs/ runs as it stands, against a real server; links lead somewhere; the site is built.

What stands in a comment on the line before a block says how, several things separated by ``; ``:

* ``with simulators``: actors append meanwhile. ``needs torch``: skipped where that cannot be imported;
* ``name.py``: the block is that file. ``run``: a command, run in a folder with the files before it. ``output``: what the
  command before printed, but for its numbers.

Any other Python block is run with the names of this package and a replay that holds some transitions.
"""

from __future__ import annotations

import ast
import html
import inspect
import json
import math
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import anyio
import anyio.to_thread
import numpy as np
import pytest
from numpy.typing import NDArray
from redis import UsernamePasswordCredentialProvider

import aionpredis
import aionpredis.blocking
from aionpredis import Replay, Run, RunEnded, Schema

from .servers import until

pytestmark = pytest.mark.anyio

ROOT = Path(__file__).parent.parent
GUIDES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

FENCE = re.compile(
    r"^(?:<!-- (?P<mark>.+?) -->\n)?(?P<fence>`{3,})(?P<language>.*)\n(?P<code>(?:.*\n)*?)(?P=fence)$", re.MULTILINE
)
NOT_PYTHON = {"sh", "text", "{toctree}"}
"""Languages of other blocks: commands, output or drawings, and the site's table of contents."""
WITH_SIMULATORS, RUN, OUTPUT = "with simulators", "run", "output"
IS_FILE, NEEDS = re.compile(r"\w+\.py"), re.compile(r"needs (\w+)")

SCHEMA = Schema(state=("float32", (4,)), action="int64", reward="float32", terminated="bool", truncated="bool")
WEIGHTS = {"weight": np.ones((4, 2), np.float32)}
STEPS = 6
"""Training steps after which a block that trains for ever has run well enough."""


class Block(NamedTuple):
    path: Path
    line: int
    marks: list[str]
    language: str
    code: str

    def __str__(self) -> str:
        return f"{self.path.name}:{self.line}"

    @property
    def file(self) -> str | None:
        """The name of the file that it is."""
        return next(filter(IS_FILE.fullmatch, self.marks), None)

    @property
    def needs(self) -> list[str]:
        return [match[1] for match in map(NEEDS.fullmatch, self.marks) if match]


def blocks_of(path: Path) -> list[Block]:
    text = path.read_text(encoding="utf-8")
    return [
        Block(
            path,
            text.count("\n", 0, match.start("code")),
            match["mark"].split("; ") if match["mark"] else [],
            match["language"],
            match["code"],
        )
        for match in FENCE.finditer(text)
    ]


BLOCKS = [block for path in GUIDES for block in blocks_of(path)]
PYTHON = [block for block in BLOCKS if block.language == "python" and not block.file]


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
    if code.co_flags & inspect.CO_COROUTINE:
        await eval(code, namespace)
    else:  # what awaits nothing may block
        await anyio.to_thread.run_sync(eval, code, namespace)


FRAMEWORK = [pytest.mark.one_server("the framework is the point, and takes its time")]


@pytest.mark.one_loop("that it runs is the point")
@pytest.mark.parametrize(
    "block", [pytest.param(block, marks=FRAMEWORK if block.needs else []) for block in PYTHON], ids=str
)
async def test_block_runs(url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], block: Block) -> None:
    for name in block.needs:
        pytest.importorskip(name, reason=f"{name} is not installed")
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
            "blocking": aionpredis.blocking,
            "client": client,
            "folder": tmp_path / "checkpoint",
            "make_env": Environment,
            "math": math,
            "np": np,
            "replay": replay,
            "run": run,
            "schema": SCHEMA,
            "train": Training(),
            "url": url,
            "weights": WEIGHTS,
        }
        with anyio.fail_after(40):
            try:
                async with anyio.create_task_group() as tasks:
                    if WITH_SIMULATORS in block.marks:
                        for _ in range(2):
                            tasks.start_soon(append, replay, math.inf)
                    await execute(block, namespace)
                    tasks.cancel_scope.cancel()
            except* EnoughError:
                pass


def start(*command: str, folder: Path, url: str | None) -> subprocess.Popen[str]:
    environment = {name: value for name, value in os.environ.items() if name != "REDIS_URL"}
    if url is not None:
        environment["REDIS_URL"] = url
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=pipe, stderr=pipe, text=True)


def output_of(*command: str, folder: Path, url: str | None) -> str:
    with start(*command, folder=folder, url=url) as process:
        try:
            output, errors = process.communicate(timeout=40)
        finally:
            process.kill()
    assert (process.returncode, errors) == (0, "")
    return output


def without_numbers(text: str) -> str:
    return re.sub(r"\d+", "0", text)


@pytest.mark.parametrize(
    "path", sorted({block.path for block in BLOCKS if RUN in block.marks}), ids=lambda path: path.name
)
def test_commands_print_what_is_shown(path: Path, tmp_path: Path) -> None:
    """In an empty folder, in the order of the page, with the files as they are at that place of it."""
    printed = ""
    for block in blocks_of(path):
        if block.file:
            (tmp_path / block.file).write_text(block.code)
        elif RUN in block.marks:
            (command,) = block.code.splitlines()
            name, *arguments = command.split()
            assert name == "python", block
            printed = output_of(sys.executable, *arguments, folder=tmp_path, url=None)
        elif OUTPUT in block.marks:
            assert without_numbers(printed) == without_numbers(block.code), block


@pytest.mark.one_server("the program is the point; what it does is tested elsewhere")
def test_tutorial_on_a_server_with_one_more_simulator(url: str, tmp_path: Path) -> None:
    for block in blocks_of(ROOT / "docs" / "tutorial.md"):
        if block.file:
            (tmp_path / block.file).write_text(block.code)
    with start(sys.executable, "simulator.py", folder=tmp_path, url=url) as simulator:
        try:
            lines = output_of(sys.executable, "trainer.py", folder=tmp_path, url=url).splitlines()
            watch = sys.executable, "-m", "aionpredis", "watch", "catch", "--once"
            # It may not have joined yet; it plays on when the trainer, and the simulators of that, have ended.
            name = f"simulator-{simulator.pid}"
            until(lambda: name in output_of(*watch, folder=tmp_path, url=url), "it has joined", 20)
            assert simulator.poll() is None
        finally:
            simulator.kill()
    assert "catch " in output_of(sys.executable, "-m", "aionpredis", "ls", folder=tmp_path, url=url)
    (first, balls), (last, of_balls) = [map(int, re.findall(r"\d+", lines[number])[-2:]) for number in (0, -1)]
    assert last / of_balls > 0.5 > first / balls  # it has learned something


@pytest.mark.parametrize("path", GUIDES, ids=lambda path: path.name)
def test_every_block_is_run_or_marked(path: Path) -> None:
    found = blocks_of(path)
    fences = [line for line in path.read_text(encoding="utf-8").splitlines() if line.lstrip().startswith("```")]
    assert len(fences) == 2 * len(found)
    for block in found:
        assert block.language in {"python", *NOT_PYTHON}, block
        for mark in block.marks:
            if mark == WITH_SIMULATORS or IS_FILE.fullmatch(mark) or NEEDS.fullmatch(mark):
                assert block.language == "python", block
            else:
                assert (mark, block.language) in {(RUN, "sh"), (OUTPUT, "text")}, block


def anchors_of(path: Path) -> list[str]:
    """As GitHub and the site make them of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", path.read_text(encoding="utf-8")), re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]


@pytest.mark.parametrize("path", GUIDES, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    anchors = anchors_of(path)
    assert len(set(anchors)) == len(anchors)
    for target in re.findall(r"\]\(([^)]+)\)", FENCE.sub("", path.read_text(encoding="utf-8"))):
        if "://" not in target:
            file, _, anchor = target.partition("#")
            page = path.parent / file if file else path
            assert page.exists(), target
            assert not anchor or anchor in anchors_of(page), target


def test_pictures_of_results_are_those_of_the_figures() -> None:
    """Names and medians stand in the pictures as text."""
    cases = json.loads((ROOT / "bench" / "results" / "2026-11-22.json").read_text(encoding="utf-8"))["cases"]
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    for name, case in cases.items():
        assert f"(images/bench-{name}.svg)" in page
        picture = (ROOT / "docs" / "images" / f"bench-{name}.svg").read_text(encoding="utf-8")
        texts = [html.unescape(text) for text in re.findall(r"<text[^>]*>([^<]*)</text>", picture)]
        for contender, figures in case["contenders"].items():
            assert contender in texts, name
            assert "rate" not in figures or f"{figures['rate']['median']:,.0f}" in texts, contender


def test_what_bench_writes_is_as_much_as_the_page_says() -> None:
    """That a replay has as much again: test_doctor.py."""
    pytest.importorskip("typer", reason='needs pip install "aionpredis[cli]"')
    from aionpredis.cli.bench import NBYTES

    page = (ROOT / "docs" / "terminal.md").read_text(encoding="utf-8")
    assert f"About {2 * NBYTES / 1e6:.0f} MB are on the server at a time" in page
    assert f"more than {NBYTES / 1e6:.0f} MB one in each" in page


# The site


def test_reference_has_every_public_name() -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs" / "reference").glob("*.rst"))
    described = set(re.findall(r"^\.\. auto(?:class|exception|function):: ([\w.]+)$", text, re.MULTILINE))
    public = {name for name in aionpredis.__all__ if not name.startswith("_")}
    public |= {f"aionpredis.blocking.{name}" for name in aionpredis.blocking.__all__}
    assert public <= described
    modules = set(re.findall(r"^\.\. automodule:: ([\w.]+)$", text, re.MULTILINE))
    frameworks = {path.stem for path in (ROOT / "aionpredis" / "frameworks").glob("[!_]*.py")}
    assert {f"aionpredis.frameworks.{name}" for name in frameworks} <= modules


SPHINX = ["furo", "myst_parser", "sphinx"]


@pytest.mark.skipif(not all(map(find_spec, SPHINX)), reason=f"needs {', '.join(SPHINX)}: the extra docs")
def test_site_is_built_without_a_warning(tmp_path: Path) -> None:
    options = ["--quiet", "--fresh-env", "--fail-on-warning", "--keep-going"]
    assert (
        output_of(sys.executable, "-m", "sphinx", *options, "docs", str(tmp_path / "site"), folder=ROOT, url=None) == ""
    )
    assert (tmp_path / "site" / "reference" / "client.html").exists()


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
