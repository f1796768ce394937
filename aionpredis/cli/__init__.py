"""The command ``aionpredis``: a module for each of its commands, and ``common`` for what these share.

At their top they import nothing that only their work needs: ``--help``, and each tab where a shell completes, is a new process.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable

try:
    import typer
except ModuleNotFoundError as missing:
    if missing.name != "typer":
        raise
    print('aionpredis: the command needs typer: pip install "aionpredis[cli]"', file=sys.stderr)
    raise SystemExit(2) from None

from typing import Annotated

from aionpredis import __version__
from aionpredis.cli.bench import bench
from aionpredis.cli.checkpoint import restore, save
from aionpredis.cli.common import said
from aionpredis.cli.delete import delete
from aionpredis.cli.demo import demo
from aionpredis.cli.doctor import doctor
from aionpredis.cli.files import get, put
from aionpredis.cli.ls import ls
from aionpredis.cli.serve import serve
from aionpredis.cli.show import show
from aionpredis.cli.watch import watch

__all__ = ["app", "main"]

app = typer.Typer(
    name="aionpredis",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
for command in (demo, ls, show, get, put, delete, save, restore, serve, watch, doctor, bench):
    app.command()(command)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"aionpredis {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version, and exit.")
    ] = False,
) -> None:
    """NumPy arrays between async Python programs through Redis or Valkey."""


def main() -> None:
    """Entry point of the command."""
    _open_missing()
    raw = getattr(sys.stdout, "buffer", None)
    if isinstance(raw, io.RawIOBase):  # PYTHONUNBUFFERED: each write to a pipe may be cut short, and nobody is told
        encoding, errors = sys.stdout.encoding, sys.stdout.errors
        sys.stdout = io.TextIOWrapper(io.BufferedWriter(raw), encoding, errors, line_buffering=True)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # what its encoding does not have is printed as \u…, and ends nothing
            stream.reconfigure(errors="backslashreplace")
    for size in ("COLUMNS", "LINES"):
        if os.environ.get(size) == "0":  # nobody knows; rich would print nothing into no columns
            del os.environ[size]
    code = _code_of(app)
    for stream in (sys.stdout, sys.stderr):
        if failed := _code_of(stream.flush, silent=bool(code)):
            code = code or failed
            # The interpreter flushes once more at its end, and would say in its own words that it cannot.
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    raise SystemExit(code)


def _open_missing() -> None:
    """Standard streams that were closed when this process began, from the first on: each gets the lowest descriptor, its own.

    Else a socket would get that one, and uvloop aborts the process.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            descriptor = os.open(os.devnull, os.O_RDWR)
            os.set_inheritable(descriptor, True)
            setattr(sys, name, os.fdopen(descriptor, mode, encoding="utf-8", closefd=False))


def _code_of(step: Callable[[], object], *, silent: bool = False) -> str | int | None:
    """The exit code of this step."""
    try:
        step()
    except SystemExit as end:
        return end.code
    except KeyboardInterrupt:  # between the last command's end and here
        return 130
    except OSError as error:  # stdout cannot be written: the disk is full, …
        return 1 if silent or isinstance(error, BrokenPipeError) else said(str(error), 1)
    return 0
