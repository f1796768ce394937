"""What servers say of themselves, and what is seen of them from here."""

from __future__ import annotations

import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aionpredis import info
from aionpredis.errors import ServerError

if TYPE_CHECKING:
    from aionpredis.client import Client

__all__ = ["Server", "facts_of"]


@dataclass
class Server:
    """A primary. Mappings are empty if they could not be looked at; ``denied`` says why.

    ``info``, ``config``, ``cluster``: by INFO, CONFIG GET, CLUSTER INFO. ``kernel``: settings of its machine, if that is this
    one; its environment cannot be seen, since it writes its title there. ``skew``: seconds that its clock is ahead of this
    machine's.
    """

    url: str
    is_unix: bool = False
    is_here: bool = False
    as_cluster: bool = False
    """Whether it was connected as one of a cluster."""
    is_embedded: bool = False
    user: str = ""
    anybody: bool = False
    """Whether who connects needs no password."""
    skew: float = 0.0
    slow: int = 0
    """Entries in its log of slow commands."""
    info: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, str] = field(default_factory=dict)
    cluster: Mapping[str, str] = field(default_factory=dict)
    kernel: dict[str, str] = field(default_factory=dict)
    service: Mapping[str, Any] = field(default_factory=dict)
    """What its Sentinels say of it."""
    denied: list[str] = field(default_factory=list)

    def number(self, name: str) -> int:
        """Of INFO; 0 if it is not there."""
        return info.number(self.info, name)

    @property
    def mode(self) -> str:
        """``standalone``, ``cluster`` or ``sentinel``."""
        return self.info.get("server_mode") or self.info.get("redis_mode") or ""

    @property
    def version(self) -> tuple[str, tuple[int, ...]]:
        """Name and version."""
        name = "Valkey" if self.info.get("server_name") == "valkey" else "Redis"
        text = self.info.get("valkey_version") or self.info.get("redis_version") or ""
        return name, tuple(int(part) for part in text.split(".") if part.isdigit())


async def facts_of(client: Client, key: bytes) -> Server:
    """All that can be seen of who has the key. Nothing is changed."""
    topology = client.topology
    shard = topology.shard(key)
    server = Server(shard.dialer.url, as_cluster=not topology.joins_keys, is_embedded=client.is_embedded)

    async def may(*command: Any) -> Any:
        try:
            return await client.call(*command, repeatable=True, key=key)
        except ServerError as error:
            server.denied.append(f"{' '.join(map(str, command[:2]))}: {error}")
            return None

    if said := await may("INFO"):
        server.info = info.parse(said)
    if config := await may("CONFIG", "GET", "*", "min-string-size-avoid-copy-reply"):  # which * leaves out
        text = [part.decode("utf-8", "replace") for part in config]
        server.config = dict(zip(text[::2], text[1::2], strict=True))
    if server.info.get("cluster_enabled") == "1" and (state := await may("CLUSTER", "INFO")):
        server.cluster = info.parse(state)
    if user := await may("ACL", "WHOAMI"):
        server.user = user.decode("utf-8", "replace")
    if default := await may("ACL", "GETUSER", "default"):
        flags = dict(zip(default[::2], default[1::2], strict=True)).get(b"flags", [])
        server.anybody = b"on" in flags and b"nopass" in flags
    before = time.time()
    if clock := await may("TIME"):
        server.skew = int(clock[0]) + int(clock[1]) / 1e6 - (before + time.time()) / 2
    server.slow = await may("SLOWLOG", "LEN") or 0

    connection = await shard.dialer.dial()
    server.service = shard.dialer.service
    with connection.detach() as raw:
        server.is_unix = raw.family == getattr(socket, "AF_UNIX", None)
        # Who is connected to an address of his own machine comes from that address.
        server.is_here = server.is_unix or raw.getsockname()[0] == raw.getpeername()[0]
    if server.is_here:
        for name in ("net.core.wmem_default", "net.core.somaxconn"):
            with suppress(OSError):
                server.kernel[name] = Path("/proc/sys", *name.split(".")).read_text().strip()  # noqa: ASYNC240  # no disk
    return server
