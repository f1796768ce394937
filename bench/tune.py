"""The server settings that matter: our writer, ``mget(out=)`` and epoch under each of them."""

from __future__ import annotations

import os
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.cases import read, replay, write
from bench.harness import Case, Work, run_case
from bench.servers import target

SETTINGS: dict[str, dict[str, Any]] = {
    "embedded defaults (avoid-copy 4096, Unix)": {},
    "min-string-size-avoid-copy-reply 16384 (stock)": {"config": {"min-string-size-avoid-copy-reply": "16384"}},
    "min-string-size-avoid-copy-reply 0": {"config": {"min-string-size-avoid-copy-reply": "0"}},
    "io-threads 2": {"config": {"io-threads": "2"}},
    "TCP on loopback": {"tcp": True},
}


CORES_FOR_IO_THREADS = 4
"""With fewer, the server's waiting threads take the clients' time: on 2 cores a case did not end within 10 minutes."""


def tune(console: Console, *, quick: bool) -> dict[str, dict[str, float]]:
    contenders = (write.OurWriter, read.OurMgetOut, replay.Append1, replay.Epoch)
    case = Case("tune", "settings", contenders, prepare=read.prepare)
    table = Table(title="Server settings: arrays/s, median of 3 rounds", title_justify="left")
    table.add_column("setting")
    for contender in contenders:
        table.add_column(contender.name, justify="right")
    figures: dict[str, dict[str, float]] = {}
    for name, setting in SETTINGS.items():
        if "io-threads" in name and (os.cpu_count() or 1) < CORES_FOR_IO_THREADS:
            console.print(f"{name}: skipped, this machine has fewer than {CORES_FOR_IO_THREADS} cores")
            continue
        with target(config=setting.get("config"), tcp=bool(setting.get("tcp"))) as place, console.status("") as status:
            url = place.tcp_url if setting.get("tcp") else place.url
            work = Work(url, quick)
            result = run_case(case, work, rounds=3, server_pid=place.pid, progress=status.update)
        figures[name] = {c.name: result.median(c.name, "rate") for c in contenders}
        table.add_row(name, *(f"{figures[name][c.name]:,.0f}" for c in contenders))
    console.print(table)
    return figures
