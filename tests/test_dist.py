"""What is published: an sdist, and a wheel that needs nothing but the core dependencies."""

from __future__ import annotations

import email
import email.message
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import aionpredis

ROOT = Path(__file__).parent.parent
CORE = {"anyio", "numpy", "redis", "uvloop"}

pytest.importorskip("hatchling", reason="hatchling, which makes them, is not installed")


def build(target: str, source: Path, folder: Path) -> Path:
    command = [sys.executable, "-m", "hatchling", "build", "--target", target, "--directory", str(folder)]
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    (made,) = folder.iterdir()
    return made


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("sdist", ROOT, tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("wheel", ROOT, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> email.message.Message:
    with zipfile.ZipFile(wheel) as archive:
        return email.message_from_bytes(archive.read(f"aionpredis-{aionpredis.__version__}.dist-info/METADATA"))


def test_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    info = f"aionpredis-{aionpredis.__version__}.dist-info"
    package = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "aionpredis").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert "aionpredis/py.typed" in package
    extra = {"METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE"}
    with zipfile.ZipFile(wheel) as archive:
        assert set(archive.namelist()) == package | {f"{info}/{name}" for name in extra}


def test_sdist_makes_the_same_wheel_and_holds_what_tests_it(sdist: Path, wheel: Path, tmp_path: Path) -> None:
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (source,) = tmp_path.iterdir()
    for name in ("CHANGELOG.md", "LICENSE", "Makefile", "README.md", "bench", "docs", "examples", "tests"):
        assert (source / name).exists(), name
    assert build("wheel", source, tmp_path / "made").read_bytes() == wheel.read_bytes()


def test_metadata_is_true(metadata: email.message.Message) -> None:
    assert metadata["Name"] == "aionpredis"
    assert metadata["Version"] == aionpredis.__version__
    assert metadata["License-Expression"] == "MIT"
    assert metadata["Description-Content-Type"] == "text/markdown"
    description = metadata.get_payload(decode=True)
    assert isinstance(description, bytes)
    assert description.decode() == (ROOT / "README.md").read_text(encoding="utf-8")
    required = [Requirement(line) for line in metadata.get_all("Requires-Dist", [])]
    assert {each.name for each in required if "extra" not in str(each.marker)} == CORE
    assert f"\n## {aionpredis.__version__} – " in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def needed(names: set[str]) -> set[str]:
    """These distributions, and what they need in this environment without extras."""
    found: set[str] = set()
    while names:
        name = names.pop()
        found.add(name)
        for line in distribution(name).requires or []:
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                names |= {requirement.name} - found
    return found


PROGRAM = """
import importlib, pathlib, sys, traceback
import aionpredis

root = pathlib.Path(aionpredis.__file__).parent
for path in sorted(root.rglob("*.py")):
    name = ".".join(path.relative_to(root.parent).with_suffix("").parts).removesuffix(".__init__")
    if path.name == "__main__.py" or name.startswith("aionpredis.demo."):
        continue  # parts of the command, which says first what is missing
    try:
        importlib.import_module(name)
    except (ImportError, SystemExit) as error:
        if "aionpredis[" not in str(error) and not isinstance(error, SystemExit):
            traceback.print_exc(file=sys.stdout)

async def use(**options):
    async with aionpredis.connect(**options):
        pass

for options in ({}, {"codec": "lz4"}):
    try:
        aionpredis.run(lambda: use(**options))
    except aionpredis.UsageError as error:
        print(error)
"""


def test_wheel_works_with_the_core_dependencies_alone_and_says_what_is_missing(wheel: Path, tmp_path: Path) -> None:
    """In an environment of nothing else: each module is imported, or names the extra that it needs."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    for name in needed({*CORE}):
        files = distribution(name).files or []
        for top in {file.parts[0] for file in files} - {"..", "__pycache__"}:
            (tmp_path / top).symlink_to(distribution(name).locate_file(top))  # type: ignore[arg-type]
    done = subprocess.run(
        [sys.executable, "-S", "-c", PROGRAM],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines() == [
        'no server to embed: pip install "aionpredis[server]", or name one with Server(binary=…)',
        "the codec 'lz4' needs a package: pip install aionpredis[lz4]",
    ]
    assert done.stderr
    assert all("pip install" in line and "aionpredis[" in line for line in done.stderr.splitlines())
