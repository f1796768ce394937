"""``aionpredis doctor``: what is wrong with a server, or could be better."""

from __future__ import annotations

import dataclasses
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
    from aionpredis.cli.checks import Finding
    from aionpredis.cli.facts import Server
    from aionpredis.cli.measure import Probe
    from aionpredis.client import Client

__all__ = ["Report", "doctor", "render"]

NBYTES = 4 << 20
"""That are written to the server at a time."""

ROUNDS = 3

PATIENCE = 5.0
"""Seconds for connecting, and of silence."""


def doctor(
    server: UrlFirst = None,
    url: Url = None,
    shape: Annotated[str, typer.Option(help="Of the arrays to measure with.")] = "80,80",
    dtype: Annotated[str, typer.Option(help="Of the arrays to measure with.")] = "uint16",
    as_json: AsJson = False,
) -> None:
    """Look whether a server does what this library needs, how fast it is, and which of its settings cost speed or safety.

    It writes up to 4 MB (or one array) under keys of its own, if there is room, and deletes them; it changes nothing else.
    Exit code 1: there are problems.
    """
    need("rich")
    with progress("looking and measuring"):
        report = until_done(lambda: _examine(server or url, shape, dtype))
    if as_json:
        print_json(dataclasses.asdict(report) | {"ok": report.ok})
    else:
        console().print(render(report))
    raise typer.Exit(0 if report.ok else 1)


@dataclasses.dataclass
class Report:
    """What was found. ``seconds``: of a single call, median and 99th percentile, by its name. ``rates``: by what does it,
    arrays a second, bytes a second, arrays a second over a bare socket, and how much of that it is. ``not_seen``: what could
    not be looked at, and why.
    """

    url: str
    shape: list[int] = dataclasses.field(default_factory=list)
    dtype: str = ""
    servers: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    seconds: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    rates: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    findings: list[Finding] = dataclasses.field(default_factory=list)
    checks: int = 0
    not_seen: list[str] = dataclasses.field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not any(finding.level == "problem" for finding in self.findings)


async def _examine(url: str | None, shape: str, dtype: str) -> Report:
    import logging

    import aionpredis
    from aionpredis.cli.checks import CHECKS, Finding, check
    from aionpredis.cli.facts import facts_of
    from aionpredis.cli.measure import Probe, frame_of
    from aionpredis.errors import AionpredisError, ConnectError

    logging.getLogger("aionpredis").addHandler(logging.NullHandler())  # what it would say is in the report
    frame = frame_of(shape, dtype)
    client = aionpredis.connect(url, retry_timeout=1, timeout=PATIENCE, connect_timeout=PATIENCE)
    report = Report(client.url, list(frame.shape), str(frame.dtype))
    try:
        async with client:
            servers = [await facts_of(client, key) for key in client.topology.each()]
            report.servers = [_summary(server) for server in servers]
            report.checks = len(CHECKS)
            report.findings = check(servers)
            report.not_seen = list(dict.fromkeys(reason for server in servers for reason in server.denied))
            if report.ok or not any(each.name in ("mode", "role", "loading") for each in report.findings):
                try:
                    async with Probe(client, frame, nbytes=NBYTES) as probe:
                        await _measure(client, probe, report)
                except AionpredisError as error:
                    report.not_seen.append(f"speed: {error}")
    except ConnectError as error:
        report.findings.insert(0, Finding("problem", "connection", "none", str(error), _remedy(error), [report.url]))
    return report


def _summary(server: Server) -> dict[str, Any]:
    name, version = server.version
    return {
        "url": server.url,
        "server": f"{name} {'.'.join(map(str, version))}" if version else "unknown",
        "mode": "cluster" if server.as_cluster else server.mode or "unknown",
        "role": {"master": "primary", "slave": "replica"}.get(server.info.get("role", ""), "unknown"),
        "replicas": server.number("connected_slaves"),
        "user": server.user,
        "used_memory": server.number("used_memory"),
        "maxmemory": server.number("maxmemory"),
    }


async def _measure(client: Client, probe: Probe, report: Report) -> None:
    from aionpredis.cli.measure import latency

    for name, call in (("PING", probe.ping), ("set", probe.set), ("get", probe.get)):
        report.seconds[name] = dataclasses.asdict(latency(await call()))
    ways: dict[str, tuple[Callable[[], Awaitable[float]], Callable[[], Awaitable[float]]]] = {
        "writer": (probe.write, probe.bare_write),
        "mget(out=)": (probe.read, probe.bare_read),
    }
    rounds: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, (ours, bare) in ways.items():
            rounds[name].append((await ours(), await bare()))
    for name, pairs in rounds.items():
        arrays, ceiling = (statistics.median(pair[index] for pair in pairs) for index in (0, 1))
        # Of the ratio, round by round: a slow moment of the machine hits both.
        of_bare = statistics.median(one / other for one, other in pairs)
        report.rates[name] = {
            "arrays": arrays,
            "bytes": arrays * probe.frame.nbytes,
            "bare": ceiling,
            "of_bare": of_bare,
        }


def _remedy(error: BaseException) -> list[str]:
    """What to do about a connection that could not be made, in plain words."""
    import socket

    from aionpredis.errors import AuthenticationError
    from aionpredis.wire.advice import chain

    if isinstance(error, AuthenticationError):
        return ["user and password: redis://user:password@host, or REDIS_URL; ACL LIST shows the server's users"]
    text = str(error).lower()
    kinds = [type(each) for each in chain(error)]
    if socket.gaierror in kinds or "name or service not known" in text or "temporary failure in name" in text:
        return ["the host's name is not known here: is it written correctly, does DNS know it (getent hosts NAME)?"]
    if FileNotFoundError in kinds or "no such file" in text:
        return ["there is no such socket: is the server running, and is `unixsocket` in its configuration this path?"]
    if PermissionError in kinds or "permission denied" in text:
        return [
            "this user may not use the socket: `unixsocketperm` in the server's configuration, and the folder's mode"
        ]
    if "refused" in text:
        return ["nobody listens there: is the server running, on this port, and is `bind` an address that is reached?"]
    if "timed out" in text or "timeout" in text:
        return [
            "nobody answers: a firewall or security group, another network, a server that hangs, or the wrong address"
        ]
    if "unreachable" in text or "no route" in text:
        return ["there is no way to that address from here: network, VPN, or the wrong address"]
    return []


# --- what it looks like ----------------------------------------------------------------------------------------------

STYLES = {"problem": "bold red", "hint": "yellow", "note": "cyan"}


def render(report: Report) -> Any:
    from rich.console import Group
    from rich.padding import Padding
    from rich.text import Text

    parts: list[Any] = []
    for server in report.servers:
        facts = [server["server"], server["mode"], server["role"]]
        facts += [f"{server['replicas']} replicas"] if server["replicas"] else []
        facts += [f"user {server['user']}"] if server["user"] else []
        parts.append(Text.assemble((shown(server["url"]), "bold"), f"  {shown(', '.join(facts))}"))
    if not report.servers:
        parts.append(Text(report.url, style="bold"))
    if report.rates:
        parts += [Text(), _speed(report)]
    for finding in report.findings:
        parts += [Text(), _finding(finding)]
        where = finding.servers if len(report.servers) > 1 and len(finding.servers) < len(report.servers) else []
        lines = [Text(shown(finding.why)), *(Text(f"on {shown(url)}", style="dim") for url in where)]
        lines += [Text(shown(line), style="green") for line in finding.how]
        parts += [Padding(line, (0, 0, 0, 4), expand=False) for line in lines]
    parts.append(Text())
    parts += [Text(f"not looked at: {shown(reason)}", style="dim") for reason in report.not_seen]
    counts = {level: sum(finding.level == level for finding in report.findings) for level in STYLES}
    said = ", ".join(f"{count} {level}{'s' * (count != 1)}" for level, count in counts.items() if count)
    done = f"{report.checks} checks of {len(report.servers)} server{'s' * (len(report.servers) != 1)}: "
    parts.append(
        Text(f"{done if report.checks else ''}{said or 'all is well'}", style="bold" if report.ok else "bold red")
    )
    return Group(*parts)


def _finding(finding: Finding) -> Any:
    from rich.text import Text

    return Text.assemble(
        (f"{finding.level}: ", STYLES[finding.level]), (finding.name, "bold"), f" = {shown(finding.value)}"
    )


def _speed(report: Report) -> Any:
    from rich.console import Group

    single = table_of("one at a time", "median", "p99")
    for name, each in report.seconds.items():
        single.add_row(name, f"{1e6 * each['median']:,.0f} µs", f"{1e6 * each['p99']:,.0f} µs")
    what = "×".join(map(str, report.shape)) or "scalar"
    many = table_of(f"many, {what} {report.dtype}", "arrays/s", "MB/s", "bare socket", "of it")
    for name, each in report.rates.items():
        figures = (
            f"{each['arrays']:,.0f}",
            f"{each['bytes'] / 1e6:,.0f}",
            f"{each['bare']:,.0f}",
            f"{each['of_bare']:.2f}",
        )
        many.add_row(name, *figures)
    return Group(single, "", many)
