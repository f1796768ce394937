"""The command ``aionpredis``: a module for each of its commands, and ``common`` for what these share.

At their top they import nothing that only their work needs: ``--help``, and each tab where a shell completes, is a new process.
"""

from __future__ import annotations

import sys

try:
    import typer
except ModuleNotFoundError as missing:
    if missing.name != "typer":
        raise
    print('aionpredis: the command needs typer: pip install "aionpredis[cli]"', file=sys.stderr)
    raise SystemExit(2) from None

from aionpredis.cli.bench import bench
from aionpredis.cli.checkpoint import restore, save
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
    help="NumPy arrays between async Python programs through Redis or Valkey.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
for command in (demo, ls, show, get, put, delete, save, restore, serve, watch, doctor, bench):
    app.command()(command)


def main() -> None:
    """Entry point of the command."""
    try:
        app()
    except KeyboardInterrupt:  # between the last command's end and here
        raise SystemExit(130) from None
