"""What the commands share: options, a client until Ctrl-C, errors and exit codes, progress, output.

What was asked for goes to stdout, progress and errors to stderr. Exit codes: 0; 1: it failed, for a reason that is said in
one line; 2: it was called wrongly, or something is not installed; 128 + the number of the signal that interrupted it.

What others stored or a server says reaches a terminal by :func:`shown` only.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TypeVar

import typer

from aionpredis.errors import AionpredisError, UsageError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from aionpredis.client import Client

__all__ = [
    "AsJson",
    "Url",
    "UrlFirst",
    "console",
    "fail",
    "given",
    "in_one_line",
    "need",
    "print_json",
    "print_table",
    "progress",
    "said",
    "shown",
    "table_of",
    "until_done",
    "with_client",
]

T = TypeVar("T")

Url = Annotated[str | None, typer.Option("--url", envvar="REDIS_URL", help="The server, as connect() takes it.")]
UrlFirst = Annotated[
    str | None,
    typer.Argument(metavar="URL", help="The same as --url, which it goes before. Without both: an embedded one."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def shown(name: str | bytes) -> str:
    """For a terminal: one line, and no control codes, whatever somebody stored."""
    text = name.decode("utf-8", "backslashreplace") if isinstance(name, bytes) else name
    return "".join(char if char.isprintable() else char.encode("unicode_escape", "replace").decode() for char in text)


def said(message: str, code: int) -> int:
    """The code, after this has been said on stderr."""
    with suppress(OSError):  # that cannot be written: the code has to do
        print(f"aionpredis: {shown(message)}", file=sys.stderr, flush=True)
    return code


def fail(message: str, code: int = 1) -> NoReturn:
    """End the command."""
    raise typer.Exit(said(message, code))


def need(*modules: str, extra: str = "cli") -> None:
    """End the command, unless all these modules are installed; ``extra`` is what brings them."""
    if lacking := [name for name in modules if importlib.util.find_spec(name) is None]:
        fail(f'this needs {" and ".join(lacking)}: pip install "aionpredis[{extra}]"', 2)


def given(url: str | None) -> str:
    """The server that was named; else the command ends."""
    if url is None:
        fail("which server? --url, or the environment's REDIS_URL", 2)
    return url


@contextmanager
def in_one_line() -> Iterator[None]:
    """An error of this package or the system's (a file cannot be written, …), and Ctrl-C, end the command with a line on
    stderr; with 2 if what the command was given is wrong.
    """
    from aionpredis.demo.failure import cause_of

    try:
        yield
    except KeyboardInterrupt:
        fail("interrupted by SIGINT", 130)
    except (AionpredisError, OSError, BaseExceptionGroup) as error:
        cause = cause_of(error, (AionpredisError, OSError))
        if cause is None:
            raise
        if isinstance(cause, BrokenPipeError):  # who read stdout (head, …) has seen enough; typer ends it silently
            raise cause from None
        fail(str(cause), 2 if isinstance(cause, UsageError) else 1)


def until_done(
    work: Callable[[], Awaitable[T]], *, interrupted: Callable[[], str] | None = None, endless: bool = False
) -> T:
    """The result of ``await work()``, in an event loop of its own; errors as :func:`in_one_line` has them.

    Ctrl-C and SIGTERM cancel ``work``. ``interrupted``: says what had been done until then, when it has ended. ``endless``:
    nothing but these end it, so that is no failure.
    """
    with in_one_line():
        from aionpredis.cli.interrupt import Interrupted, until_interrupted
        from aionpredis.loop import run

        try:
            result: T = run(until_interrupted, work)
        except Interrupted as error:
            if endless:
                raise typer.Exit(0) from None
            fail(f"{error}; {interrupted()}" if interrupted else str(error), error.exit_code)
    return result


def with_client(
    url: str | None, work: Callable[[Client], Awaitable[T]], *, interrupted: Callable[[], str] | None = None
) -> T:
    """The result of ``await work(client)``, as :func:`until_done` has it; a client of this server, open."""
    server = given(url)

    import aionpredis

    async def connected() -> T:
        async with aionpredis.connect(server) as client:
            return await work(client)

    return until_done(connected, interrupted=interrupted)


@contextmanager
def progress(what: str) -> Iterator[Callable[[int, int | None], None]]:
    """A bar on stderr, if that is a terminal; gives ``report(done, total)``. ``total=None``: nobody knows."""
    need("rich")
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    text = TextColumn("{task.description}", markup=False)  # it names what the user named
    columns = text, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    errors = Console(stderr=True)
    if not errors.is_terminal:
        yield lambda done, total: None
        return
    with Progress(*columns, console=errors, transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def console() -> Console:
    """Where tables go: stdout, whose lines are as long as they need to be if it is no terminal."""
    need("rich")
    from rich.console import Console

    return Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 10_000)


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Rows of text on stdout and an empty line, or nothing if there is no row; ``>size``: numbers, to the right.

    Not rich's table, which takes 1 ms for a row: 95 s for 100,000 keys instead of 1.
    """
    from rich.cells import cell_len

    if not rows:
        return
    widths = [max(map(cell_len, (name.lstrip(">"), *cells))) for name, *cells in zip(columns, *rows, strict=True)]

    def line(cells: Iterable[str]) -> str:
        padded = []
        for name, cell, width in zip(columns, cells, widths, strict=True):
            room = " " * (width - cell_len(cell))
            padded.append(room + cell if name.startswith(">") else cell + room)
        return "  ".join(padded).rstrip()

    console().print(line(name.lstrip(">") for name in columns), style="bold", soft_wrap=True)
    sys.stdout.writelines(f"{line(row)}\n" for row in rows)
    print()


def table_of(title: str, *columns: str) -> Table:
    """A small table, to be filled: what the rows are, and figures."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False, border_style="dim")
    table.header_style = "cyan"
    table.add_column(title, style="bold", no_wrap=True, overflow="ellipsis")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def print_json(facts: Any, *, indent: int | None = 2) -> None:
    """One JSON document on stdout, at once."""
    print(json.dumps(facts, indent=indent), flush=True)
