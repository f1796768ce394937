"""``aionpredis watch``: a replay, live."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from aionpredis.cli.common import AsJson, Url, console, given, need, print_json, shown, table_of, until_done

if TYPE_CHECKING:
    from rich.console import RenderableType

    from aionpredis.replay.observer import View

__all__ = ["watch"]

PATIENCE = 5.0
"""Seconds of silence after which the view says that the server is silent."""

SILENT_SECONDS = 10.0
"""An actor without a chunk for so long is called silent."""


MAX_ADDRESS, MAX_NAME = 20, 22
"""Characters, so that each table fits into 80 columns."""


def watch(
    name: Annotated[str, typer.Argument(help="Of the replay.")],
    url: Url = None,
    interval: Annotated[float, typer.Option(min=0.05, help="Seconds between two looks.")] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Look once, and end.")] = False,
    as_json: AsJson = False,
) -> None:
    """Look at a replay while it is used: runs, actors, learners, the policy, the servers.

    It reads the log, never the data. It goes on when the server restarts, fails over, or the replay is deleted; Ctrl-C or
    SIGTERM ends it, with exit code 0. --json: one document for each look, each on a line; after a failed one
    {"replay": …, "at": …, "error": …}.
    """
    server = given(url)
    need("rich")
    display = partial(_display, as_json, live=not once)
    until_done(lambda: _watch(server, name, interval, display, once=once), endless=not once)


@contextmanager
def _display(as_json: bool, *, live: bool) -> Iterator[Callable[[View | Trouble], None]]:
    """Gives what shows a look."""
    screen = console()
    if as_json:
        yield _print_line
    elif live and screen.is_terminal:
        from rich.live import Live

        # On the alternate screen: what it shows may be as high as the terminal, and is gone at the end.
        with Live(console=screen, screen=True, auto_refresh=False) as picture:
            yield lambda seen: picture.update(render(seen, height=screen.height), refresh=True)
    else:
        yield lambda seen: screen.print(render(seen, height=None))


async def _watch(
    url: str,
    name: str,
    interval: float,
    display: Callable[[], AbstractContextManager[Callable[[View | Trouble], None]]],
    *,
    once: bool,
) -> None:
    import anyio

    import aionpredis
    from aionpredis.errors import AionpredisError, AuthenticationError, ServerError
    from aionpredis.replay.observer import Observer

    logging.getLogger("aionpredis").addHandler(logging.NullHandler())  # what it would say is in the view
    # A fault shows at once, and the next look is the next attempt.
    async with aionpredis.connect(url, retry_timeout=0, timeout=PATIENCE, connect_timeout=PATIENCE) as client:
        observer = Observer(client, name)
        last: View | None = None
        with display() as show:
            while True:
                began = time.monotonic()
                try:
                    last = await observer.look()
                    show(last)
                except AionpredisError as error:
                    denied = isinstance(error, ServerError) and error.code == "NOPERM"
                    if once or denied or isinstance(error, AuthenticationError):
                        raise
                    show(Trouble(name, time.time(), str(error), last))
                if once:
                    return
                await anyio.sleep(max(0.0, began + interval - time.monotonic()))


@dataclasses.dataclass
class Trouble:
    """A look that failed, and the last one that did not."""

    replay: str
    at: float
    error: str
    last: View | None


def _print_line(seen: View | Trouble) -> None:
    facts = dataclasses.asdict(seen)
    facts.pop("last", None)
    print_json(facts, indent=None)


# --- what it looks like ----------------------------------------------------------------------------------------------


def render(seen: View | Trouble, *, height: int | None) -> RenderableType:
    """The picture; with not more lines than ``height``."""
    from rich.console import Group
    from rich.text import Text

    view = seen.last if isinstance(seen, Trouble) else seen
    clock = time.strftime("%H:%M:%S", time.localtime(seen.at))
    head = Text.assemble((seen.replay, "bold"), f"  {clock}")
    if view is None:
        parts: list[RenderableType] = [head]
    else:
        parts = [head, *_tables(view, height)]
    if isinstance(seen, Trouble):
        since = "" if view is None else f"; below is what was seen {_ago(seen.at - view.at)} ago"
        parts.insert(1, Text(f"{shown(seen.error)}{since}", style="bold red"))
    return Group(*parts)


def _tables(view: View, height: int | None) -> list[RenderableType]:
    from rich.text import Text

    parts: list[RenderableType] = []
    if view.run is None:
        parts.append(Text("no run: it was deleted, or no trainer has begun one yet", style="yellow"))
    else:
        parts.append(_summary(view))
    others = [table for table in (_runs(view), _readers(view), _servers(view)) if table.row_count]
    # Of the actors as many as there is room for. A table has 3 lines besides its rows, with the empty one before it; above
    # them are 3 with that of a fault.
    room = None if height is None else height - 6 - len(view.denied) - sum(table.row_count + 3 for table in others)
    tables = [*others[:1], *([_actors(view, room)] if view.actors else []), *others[1:]]
    for table in tables:
        parts += ["", table]
    parts += [Text(f"not seen: {shown(reason)}", style="dim") for reason in view.denied]
    return parts


def _summary(view: View) -> RenderableType:
    from rich.text import Text

    assert view.run is not None
    silent = sum(actor.seen is not None and actor.seen > SILENT_SECONDS for actor in view.actors)
    facts = [
        (
            f"{_count(view.rate)} transitions/s" if view.rate is not None else "rates from the next look on",
            "bold green",
        ),
        (f"{len(view.actors)} actor{'s' * (len(view.actors) != 1)}" + (f", {silent} silent" * bool(silent)), ""),
        (f"policy {view.policy or 'none'}", ""),
    ]
    if view.policy and view.run.policy and view.policy != view.run.policy:
        facts[2] = (f"policy {view.policy} (the run began with {view.run.policy})", "")
    return Text("  ·  ").join(Text(*fact) for fact in facts)


def _runs(view: View) -> Any:
    table = table_of("run", "age", "transitions", "chunks", "bytes", "committed", "policy")
    for run in [] if view.run is None else [view.run, *view.older]:
        table.add_row(
            str(run.run),
            "–" if run.begun is None else _ago(view.at - run.begun),
            f"{run.transitions:,}",
            f"{run.chunks:,}",
            "–" if run.nbytes is None else _bytes(run.nbytes),
            f"{run.committed:,}",
            str(run.policy or "–"),
            style=None if run is view.run else "dim",
        )
    return table


def _actors(view: View, room: int | None) -> Any:
    """The fastest first, the silent last."""
    table = table_of("actor", "per second", "transitions", "chunks", "episodes", "last chunk")
    actors = sorted(view.actors, key=lambda actor: (-(actor.rate or 0), -actor.transitions))
    first = actors if room is None or len(actors) <= room else actors[: max(0, room - 1)]
    for actor in first:
        seen = "before" if actor.seen is None else f"{_ago(actor.seen)} ago"
        late = actor.seen is not None and actor.seen > SILENT_SECONDS
        table.add_row(
            _short(shown(actor.name or actor.incarnation), MAX_NAME),
            "–" if actor.rate is None else _count(actor.rate),
            f"{actor.transitions:,}",
            f"{actor.chunks:,}",
            f"{actor.episodes:,}",
            seen,
            style="yellow" if late else None,
        )
    if rest := actors[len(first) :]:
        rates = [actor.rate for actor in rest if actor.rate is not None]
        table.add_row(
            f"… {len(rest)} more",
            _count(sum(rates)) if rates else "–",
            f"{sum(actor.transitions for actor in rest):,}",
            f"{sum(actor.chunks for actor in rest):,}",
            f"{sum(actor.episodes for actor in rest):,}",
            style="dim",
        )
    return table


def _readers(view: View) -> Any:
    groups = any(reader.pending is not None for reader in view.readers)
    table = table_of("learner", "transitions behind", "chunks behind", *(["unacknowledged", "readers"] * groups))
    for reader in view.readers:
        cells = [shown(reader.name), f"{reader.transitions_behind:,}", f"{reader.chunks_behind:,}"]
        if reader.pending is not None:
            cells += [f"{reader.pending:,}", f"{reader.consumers:,}"]
        table.add_row(*cells)
    return table


def _servers(view: View) -> Any:
    table = table_of("server", "memory", "of", "evicted", "calls/s", "in/s", "out/s")
    for server in view.servers:
        share = server.used_memory / server.maxmemory if server.maxmemory else 0
        table.add_row(
            _short(shown(server.url.partition("://")[2]), MAX_ADDRESS),
            _bytes(server.used_memory),
            f"{_bytes(server.maxmemory)} ({share:.0%})" if server.maxmemory else "no limit",
            f"{server.evicted:,}",
            f"{server.commands:,}",
            _bytes(server.bytes_in),
            _bytes(server.bytes_out),
            style="red" if share > 0.9 or server.evicted else None,
        )
    return table


def _short(text: str, most: int) -> str:
    """Its end, if it is too long: there paths and hosts differ."""
    return text if len(text) <= most else f"…{text[1 - most :]}"


def _count(number: float) -> str:
    return f"{number:,.0f}" if number >= 10 or not number else f"{number:.1f}"


def _bytes(number: float) -> str:
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if number < 1000 or unit == "TB":
            return f"{number:.0f} {unit}" if unit == "B" or number >= 100 else f"{number:.1f} {unit}"
        number /= 1000
    raise AssertionError


def _ago(seconds: float) -> str:
    if seconds < 0:
        return "0 s"  # the trainer's clock is ahead of this one's
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 6000:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 360_000 else f"{seconds / 86400:.1f} d"
