"""The rules of the house that a machine can check."""

from __future__ import annotations

import ast
import copy
import importlib
import inspect
import pickle
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

import pytest
import redis

import aionpredis
from aionpredis import errors

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "aionpredis"
MODULES = sorted(PACKAGE.rglob("*.py"))


def imports(path: Path) -> set[str]:
    """The modules that this file imports, wherever in it, with their parents: ``{"anyio", "anyio.abc"}``."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return {".".join(name.split(".")[: n + 1]) for name in names for n in range(name.count(".") + 1)}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_module_says_what_it_is(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))


@pytest.mark.parametrize("path", [p for p in MODULES if name_of(p) != "aionpredis/wire/ready.py"], ids=name_of)
def test_no_module_is_bound_to_one_event_loop(path: Path) -> None:
    assert not imports(path) & {"asyncio", "trio"}


def in_order(names: Iterable[str]) -> list[str]:
    """As ruff sorts ``__all__``: constants, classes, the rest."""
    return sorted(names, key=lambda name: (0 if name.isupper() else 1 if name[0].isupper() else 2, name))


def test_protocol_is_free_of_io() -> None:
    forbidden = {"anyio", "asyncio", "select", "selectors", "socket", "ssl", "threading", "trio", "uvloop"}
    assert not imports(PACKAGE / "wire" / "resp.py") & forbidden


def test_nothing_is_pickled() -> None:
    for path in MODULES:
        assert not imports(path) & {"pickle", "cloudpickle", "marshal", "dill", "shelve"}, path


def test_public_names_are_sorted_and_complete() -> None:
    public = {
        name
        for name, value in vars(aionpredis).items()
        if not name.startswith("_")
        and not isinstance(value, ModuleType)
        and name not in ("annotations", "TYPE_CHECKING")
    }
    names = [name for name in aionpredis.__all__ if not name.startswith("_")]
    assert names == in_order(names)
    assert len(set(names)) == len(names)
    for name in aionpredis.__all__:
        assert hasattr(aionpredis, name)  # also names that are imported on demand
    assert public <= set(names)
    assert set(errors.__all__) <= set(names)


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_public_names_of_modules_exist(path: Path) -> None:
    if path.name == "__main__.py":
        pytest.skip("importing it runs it")
    name = name_of(path).removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and error.name.startswith("aionpredis"):
            raise
        pytest.skip(f"needs {error.name}")
    names = getattr(module, "__all__", [])
    assert list(names) == in_order(names)
    assert [each for each in names if not hasattr(module, each)] == []


# What is imported


def modules_after(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_an_import_brings_only_what_is_always_needed() -> None:
    """It takes 1.2 times as long as NumPy's and redis-py's (``python -m bench imports``): no extra, not uvloop, no demo."""
    needed = {name.partition(".")[0] for name in modules_after("import anyio.to_thread, numpy, redis")}
    names = modules_after("import aionpredis")
    assert {name.partition(".")[0] for name in names} - needed - sys.stdlib_module_names == {"aionpredis"}
    assert not names & {"aionpredis.cli", "aionpredis.demo", "aionpredis.telemetry"}


# errors.py

DRAWN = re.compile(
    r"^ {4}(?P<indent>(?:[│ ] {3}|[├└]── )*)(?P<name>[A-Z]\w+)(?:.*?\(also a (?P<also>\w+)\))?", re.MULTILINE
)


def drawn_tree() -> dict[str, tuple[str, str | None]]:
    """Of each class in the docstring of errors.py: the class above it, and the builtin that it is, too."""
    tree: dict[str, tuple[str, str | None]] = {}
    above: list[str] = []
    for match in DRAWN.finditer(inspect.cleandoc(errors.__doc__ or "")):
        depth = len(match["indent"]) // 4
        del above[depth:]
        tree[match["name"]] = (above[-1] if above else "Exception", match["also"])
        above.append(match["name"])
    return tree


def test_errors_can_be_copied_and_sent_to_another_process() -> None:
    """What is kept is raised as a copy; and a worker's error has to come home."""
    made = [
        errors.EncodeError("x", key="k"),
        errors.ServerError("NOPERM x", command="SET", key=b"k"),
        errors.Redirected("MOVED 1 h:2"),
        errors.NotReplicated(2, 1),
        errors.WriteFailed([("k", errors.ServerFull("OOM x"))]),
        errors.RunEnded("x", replay="r", run=3),
    ]
    for error in made:
        for other in (copy.copy(error), pickle.loads(pickle.dumps(error))):
            assert type(other) is type(error)
            assert str(other) == str(error)
            assert str(other.__dict__) == str(error.__dict__)


def test_errors_are_as_drawn() -> None:
    tree = drawn_tree()
    assert sorted(tree) == errors.__all__
    for name, (above, also) in tree.items():
        lineage = getattr(errors, name).__mro__[1:]
        assert next(cls.__name__ for cls in lineage if cls.__name__ in {*tree, "Exception"}) == above, name
        builtins = {cls.__name__ for cls in getattr(errors, name).__bases__ if cls.__module__ == "builtins"}
        assert builtins == ({also} if also else {"Exception"} if above == "Exception" else set()), name


# The fixtures of conftest.py


@pytest.mark.anyio
@pytest.mark.one_server("redis-py knows no URL of a cluster")
async def test_every_server_is_reached_from_every_loop(url: str, stock: redis.Redis, anyio_backend_name: str) -> None:
    assert stock.dbsize() == 0
    stock.set("loop", anyio_backend_name)
    with redis.Redis.from_url(url) as other:
        assert other.get("loop") == anyio_backend_name.encode()
