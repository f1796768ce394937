"""``aionpredis bench``: this library on the user's own server, with arrays like the user's."""

from __future__ import annotations

import platform
import random
import statistics
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from aionpredis.cli.common import (
    AsJson,
    Url,
    UrlFirst,
    console,
    need,
    print_json,
    progress,
    shown,
    table_of,
    until_done,
)

if TYPE_CHECKING:
    from aionpredis.cli.measure import Probe

__all__ = ["bench"]

NBYTES = 32 << 20
"""Of arrays that are on the server at a time; the replay has as much again."""


def bench(
    server: UrlFirst = None,
    url: Url = None,
    shape: Annotated[str, typer.Option(help="Of the arrays.")] = "80,80",
    dtype: Annotated[str, typer.Option(help="Of the arrays.")] = "uint16",
    rounds: Annotated[int, typer.Option(min=1, help="Of which medians are taken.")] = 5,
    as_json: AsJson = False,
) -> None:
    """Measure how fast this library is on a server: single calls, writer, mget, an actor, an epoch.

    Each round measures everything once, in another order. All keys are deleted at the end; Ctrl-C ends it sooner, with the
    rounds so far. It compares nothing: `python -m bench` in the project's repository does, with other libraries and the C
    client, each in a process and on a core of its own.
    """
    need("rich")
    result = Bench()
    try:
        with progress("measuring") as report:
            until_done(lambda: result.run(server or url, shape, dtype, rounds, report), interrupted=result.so_far)
    finally:
        if any(result.samples.values()):
            if as_json:
                print_json(result.facts())
            else:
                console().print(result.table())


class Bench:
    """The rounds so far."""

    def __init__(self) -> None:
        self.environment: dict[str, Any] = {}
        self.nbytes = 0
        self.samples: dict[str, list[float]] = {}
        """Of single calls, the median seconds of each round; of the others arrays, or transitions, a second."""
        self.single: set[str] = set()
        self.left_out: dict[str, str] = {}

    async def run(
        self, url: str | None, shape: str, dtype: str, rounds: int, report: Callable[[int, int | None], None]
    ) -> None:
        import numpy as np

        import aionpredis
        from aionpredis import info
        from aionpredis.cli.facts import Server
        from aionpredis.cli.measure import Probe, frame_of
        from aionpredis.errors import ServerError

        frame = frame_of(shape, dtype)
        self.nbytes = frame.nbytes
        async with aionpredis.connect(url) as client:
            self.environment = {
                "server": client.url,
                "array": f"{'×'.join(map(str, frame.shape)) or 'scalar'} {frame.dtype}, {frame.nbytes:,} bytes",
                "aionpredis": aionpredis.__version__,
                "python": platform.python_version(),
                "numpy": np.__version__,
                "machine": f"{platform.system()} {platform.release()}, {platform.machine()}",
            }
            try:
                name, version = Server(client.url, info=await info.ask(client)).version
                self.environment["server"] += f", {name} {'.'.join(map(str, version))}"
            except ServerError:
                pass
            async with Probe(client, frame, nbytes=NBYTES) as probe:
                await self._rounds(probe, rounds, report)

    async def _rounds(self, probe: Probe, rounds: int, report: Callable[[int, int | None], None]) -> None:
        from aionpredis.errors import EncodeError, ReplayError, ServerError

        async def single(call: Callable[[int], Awaitable[list[float]]]) -> float:
            return statistics.median(await call(100))

        cases: dict[str, Callable[[], Awaitable[float]]] = {
            "PING": lambda: single(probe.ping),
            "set": lambda: single(probe.set),
            "get": lambda: single(probe.get),
            "writer": probe.write,
            "mget(out=)": probe.read,
            "actor": probe.append,
            "epoch": probe.epoch,
        }
        self.single = {"PING", "set", "get"}
        self.samples = {name: [] for name in cases}
        total = len(cases) * (rounds + 1)
        done = 0
        for number in range(rounds + 1):  # one to warm up: the server's memory, this one's caches
            order = list(cases)
            random.shuffle(order)
            for name in order:
                done += 1
                if name in self.left_out:
                    continue
                try:
                    sample = await cases[name]()
                except (EncodeError, ReplayError, ServerError) as error:
                    self.left_out[name] = str(error)
                    self.samples.pop(name)
                    continue
                if number:
                    self.samples[name].append(sample)
                report(done, total)

    def so_far(self) -> str:
        """What there is when it was interrupted."""
        count = min(map(len, self.samples.values()), default=0)
        return f"after {count} complete round{'s' * (count != 1)}; what was written is deleted, or expires in 10 s"

    def facts(self) -> dict[str, Any]:
        """As JSON."""
        results: dict[str, dict[str, Any]] = {}
        for name, samples in self.samples.items():
            if samples and name in self.single:
                results[name] = {"seconds": statistics.median(samples), "rounds": samples}
            elif samples:
                rate = statistics.median(samples)
                results[name] = {"arrays": rate, "bytes": rate * self.nbytes, "rounds": samples}
        return {"environment": self.environment, "results": results, "left_out": self.left_out}

    def table(self) -> Any:
        from rich.console import Group
        from rich.text import Text

        table = table_of("", "median", "lowest", "highest", "MB/s")
        for name, samples in self.samples.items():
            if not samples:
                continue
            three = statistics.median(samples), min(samples), max(samples)
            if name in self.single:
                table.add_row(name, *(f"{1e6 * seconds:,.0f} µs" for seconds in three), "")
            else:
                table.add_row(name, *(f"{rate:,.0f}/s" for rate in three), f"{three[0] * self.nbytes / 1e6:,.0f}")
        lines = [Text(f"{name}: {shown(value)}", style="dim") for name, value in self.environment.items()]
        missing = [Text(f"left out: {name}: {shown(reason)}", style="yellow") for name, reason in self.left_out.items()]
        return Group(*lines, "", table, *missing)
