"""Do the tests notice when a rule is broken? ``python tests/mutations.py [name …]``; not part of the test suite.

Takes one rule at a time out of a copy of the library, runs the tests that should notice, and says which did so first.
The text to replace must be there exactly once, so this fails loudly when the code has changed. Exit code 1: a rule was
broken and no test noticed.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent

SELECTION = [
    *("tests/test_actor.py", "tests/test_runs.py", "tests/test_reader.py", "tests/test_replay_machine.py"),
    *("-k", "asyncio or machine", "-x", "-n", "2", "-q", "-p", "no:cacheprovider"),
]
WIRE = ["tests/test_connection.py"]
TIMEOUT = 240
"""Seconds for one of them. All tests pass in a sixth of that."""


class Mutation(NamedTuple):
    """``changes``: file, what is there, what to put there. ``tests``: to run besides."""

    name: str
    changes: list[tuple[str, str, str]]
    tests: list[str] = []  # noqa: RUF012


COMMIT = "replay/commit.py"
LOG = "replay/log.py"
RUNS = "replay/runs.py"
CONNECTION = "wire/connection.py"

XADD = 'arguments = [b"XADD", log, b"NOMKSTREAM", b"%d-*" % run, FIELD]'
SET_LONG = 'return resp.encode("SET", key, Blob(commit.value), "NX", "PX", self._lease_ms)'
SET_OPTIONS = r'options = b"$2\r\nNX\r\n$2\r\nPX\r\n$%d\r\n%b\r\n" % (len(self._lease_ms), self._lease_ms)'
SET_SHORT = 'return resp.encode_set(key, b"", commit.value[0], options, 3)'

MUTATIONS = [
    Mutation(
        "no lease",
        [
            (COMMIT, SET_LONG, 'return resp.encode("SET", key, Blob(commit.value), "NX")'),
            (COMMIT, SET_OPTIONS, r'options = b"$2\r\nNX\r\n"'),
            (COMMIT, SET_SHORT, SET_SHORT.replace("3)", "1)")),
        ],
    ),
    Mutation(
        "no NX",
        [
            (COMMIT, SET_LONG, SET_LONG.replace('"NX", ', "")),
            (COMMIT, SET_OPTIONS, SET_OPTIONS.replace(r"$2\r\nNX\r\n", "")),
            (COMMIT, SET_SHORT, SET_SHORT.replace("3)", "2)")),
        ],
    ),
    Mutation(
        "no NOMKSTREAM",
        [
            (COMMIT, XADD, XADD.replace('b"NOMKSTREAM", ', "")),
            (COMMIT, 'return b"*6" +', 'return b"*5" +'),
            (COMMIT, 'removeprefix(b"*5")', 'removeprefix(b"*4")'),
        ],
    ),
    Mutation("XADD * instead of run-*", [(COMMIT, XADD, XADD.replace('b"%d-*" % run', 'b"*"'))]),
    Mutation(
        "begin_run: r-* instead of r-0",
        [
            (
                "streams.py",
                'client.call("XADD", stream, *option, f"{left}-0", *pairs',
                'client.call("XADD", stream, *option, f"{left}-*", *pairs',
            )
        ],
    ),
    Mutation(
        "begin_run does not compare the token",
        [
            (
                "streams.py",
                'return (await page(client, stream, f"{left}-0", f"{left}-0")) == [((left, 0), fields)]',
                'return bool(await page(client, stream, f"{left}-0", f"{left}-0"))',
            )
        ],
    ),
    Mutation(
        "XTRIM before UNLINK",
        [
            (
                RUNS,
                "        deleted += await _unlink(client, names, entries)\n        left, right = entries[-1][0]\n",
                "        left, right = entries[-1][0]\n",
            ),
            (
                RUNS,
                '"XTRIM", names.log, "MINID", f"{left}-{right + 1}", repeatable=True)\n',
                (
                    '"XTRIM", names.log, "MINID", f"{left}-{right + 1}", repeatable=True)\n'
                    "        deleted += await _unlink(client, names, entries)\n"
                ),
            ),
        ],
    ),
    Mutation(
        "XDEL before UNLINK",
        [
            (
                RUNS,
                "        deleted += await _unlink(client, names, entries)\n        await client.call(",
                "        await client.call(",
            ),
            (
                RUNS,
                "for (left, right), _ in entries), repeatable=True)\n",
                (
                    "for (left, right), _ in entries), repeatable=True)\n"
                    "        deleted += await _unlink(client, names, entries)\n"
                ),
            ),
        ],
    ),
    Mutation("evicting takes r-0, too", [(RUNS, 'f"{run}-1", f"{run}-{entry}"', 'f"{run}-0", f"{run}-{entry}"')]),
    Mutation("evicts one chunk too many", [(COMMIT, "entry - self._capacity", "entry - self._capacity + 1")]),
    Mutation(
        "a high-water mark instead of Seen",
        [
            (
                LOG,
                "        if seq < self.mark or seq in self.beyond:\n            return False\n",
                (
                    "        if seq < self.mark:\n            return False\n"
                    "        self.mark = seq + 1\n        return True\n"
                ),
            )
        ],
    ),
    Mutation(
        "chunks are not told apart",
        [
            (
                LOG,
                "        if seq < self.mark or seq in self.beyond:\n            return False\n",
                "        return True\n",
            )
        ],
    ),
    Mutation(
        "PERSIST not sent",
        [
            (
                COMMIT,
                "                commit.repeated = True\n                self._queue(commit, _Step.KEEP)\n",
                "                self._settle(commit, committed=True)\n",
            )
        ],
    ),
    Mutation(
        "acknowledged before XADD's reply",
        [
            (
                COMMIT,
                "                commit.repeated |= value is None\n",
                (
                    "                commit.repeated |= value is None\n"
                    "                self._settled(commit.buffer, commit.chunk.rows, True)\n"
                ),
            ),
            (COMMIT, "        self._settled(commit.buffer, commit.chunk.rows, committed)\n", ""),
        ],
    ),
    Mutation(
        "lease not renewed",
        [(COMMIT, "case _Step.LOG if time.monotonic() - commit.leased < self._lease / 2:", "case _Step.LOG:")],
    ),
    Mutation(
        "PERSIST's 0 is taken for success",
        [(COMMIT, "case _Step.KEEP if value:", "case _Step.KEEP:")],
    ),
    Mutation("a late renewal begins a lease again", [(COMMIT, 'self._lease_ms, b"XX"]', "self._lease_ms]")]),
    Mutation(
        "after a broken connection on with the old step",
        [
            (
                COMMIT,
                "            commit.repeated |= commit.step is not _Step.SET\n            commit.step = _Step.SET\n",
                "            pass\n",
            )
        ],
    ),
    Mutation(
        "a stale SET is not deleted",
        [
            (
                COMMIT,
                "self._queue(commit, _Step.FIND if commit.repeated else _Step.DROP)",
                "self._queue(commit, _Step.FIND) if commit.repeated else self._settle(commit, committed=False)",
            )
        ],
    ),
    Mutation(
        "a repeated commit of an ended run is not looked for",
        [(COMMIT, "_Step.FIND if commit.repeated else _Step.DROP", "_Step.DROP")],
    ),
    Mutation(
        "a nil chunk's log entry is not looked at again",
        [
            (
                "replay/log.py",
                "    if not await streams.page(client, names.log, entry, entry):\n        return None, True\n",
                "",
            ),
            (
                "replay/log.py",
                "value is None and not await streams.page(client, names.log, entry, entry)",
                "False",
            ),
        ],
    ),
    Mutation(
        "a buffer is used again before its reply",
        [
            (
                "replay/actor.py",
                "        self._committer.commit(buffer, self.run.run, chunk)\n",
                "        self._committer.commit(buffer, self.run.run, chunk)\n        self._free.append(buffer)\n",
            ),
            (
                "replay/actor.py",
                "            self._stats.stale += rows\n        self._free.append(buffer)\n",
                "            self._stats.stale += rows\n",
            ),
        ],
    ),
    Mutation(
        "wire: a cancelled reply is not abandoned",
        [
            (
                CONNECTION,
                "            self.abandon(reply)\n            self._hand_over()  #",
                "            self._hand_over()  #",
            )
        ],
        WIRE,
    ),
    Mutation(
        "wire: replies go to the wrong requests",
        [(CONNECTION, "        pending.append(reply)\n", "        pending.appendleft(reply)\n")],
        WIRE,
    ),
    Mutation(
        "wire: a half-sent request's memory is not copied",
        [(CONNECTION, '= [b"".join(rest)], 0, 0', "= rest, 0, 0")],
        WIRE,
    ),
]


def mutate(tree: Path, mutation: Mutation) -> None:
    for name, old, new in mutation.changes:
        path = tree / "aionpredis" / name
        text = path.read_text(encoding="utf-8")
        if text.count(old) != 1:
            raise SystemExit(f"{mutation.name}: in {name} there is {text.count(old)} times, not once:\n{old}")
        path.write_text(text.replace(old, new), encoding="utf-8")


def noticed(tree: Path, tests: list[str]) -> str:
    """The first test that fails; empty: none."""
    command = [sys.executable, "-m", "pytest", *SELECTION, *tests]
    try:
        done = subprocess.run(command, cwd=tree, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    except subprocess.TimeoutExpired:
        return f"(no end within {TIMEOUT} s)"
    if found := re.search(r"^(?:FAILED|ERROR) (\S+::.*?)(?: - .*)?$", done.stdout, re.MULTILINE):
        return found[1].removeprefix("tests/")
    if done.returncode:
        raise SystemExit(f"pytest ended with {done.returncode}:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    return ""


def copy(source: Path, tree: Path) -> None:
    for folder in ("aionpredis", "tests"):
        shutil.copytree(source / folder, tree / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md"):
        shutil.copy(source / file, tree)


def main(names: list[str]) -> int:
    chosen = [mutation for mutation in MUTATIONS if not names or any(name in mutation.name for name in names)]
    survived = 0
    with tempfile.TemporaryDirectory() as name:
        original, tree = Path(name, "original"), Path(name, "tree")
        original.mkdir()
        copy(ROOT, original)  # somebody may be editing
        for mutation in chosen:  # all of them, before the first takes its time
            copy(original, tree)
            mutate(tree, mutation)
            shutil.rmtree(tree)
        for mutation in [Mutation("(nothing is broken)", []), *chosen]:
            copy(original, tree)
            mutate(tree, mutation)
            started = time.monotonic()
            test = noticed(tree, mutation.tests)
            shutil.rmtree(tree)
            if not mutation.changes:
                if test:
                    raise SystemExit(f"it fails as it is: {test}")
                test = "passes"
            survived += not test
            print(f"{mutation.name:52} {time.monotonic() - started:4.0f} s  {test or 'SURVIVED'}", flush=True)
    return min(survived, 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
