"""What is wrong with a server's settings, or could be better, for this library: only what it promises or has measured.

Each check looks at one thing and knows nothing of the others. The figures are those of docs/deploy.md.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Literal

from aionpredis.cli.facts import Server

__all__ = ["CHECKS", "Finding", "check"]

Level = Literal["problem", "hint", "note"]

GB = 1 << 30
AVOID_COPY = 4096
PLAIN_BUFFER = 4 << 20
"""Bytes of replies that a client asks for at once, over TCP."""
LARGEST_VALUE = 512 << 20
LARGEST_CHUNK = 64 << 20
LARGEST_PART = 404 << 20
"""Of a policy's weights, in one value."""
SEND_BUFFER = 4 << 20


@dataclass
class Finding:
    """``level``: a problem breaks a promise, or will; a hint costs speed or safety; a note is good to know. ``how``: commands,
    and lines of the server's configuration; where they belong stands before them, since neither can have a comment.
    ``servers``: whose it is.
    """

    level: Level
    name: str
    value: str
    why: str
    how: list[str] = field(default_factory=list)
    servers: list[str] = field(default_factory=list)


CHECKS: list[Callable[[Server], Finding | None]] = []


def _check(function: Callable[[Server], Finding | None]) -> Callable[[Server], Finding | None]:
    CHECKS.append(function)
    return function


def check(servers: Iterable[Server]) -> list[Finding]:
    """Of all servers: problems first, then hints, then notes. What several have in common is found once."""
    found: list[Finding] = []
    for server in servers:
        for each in CHECKS:
            finding = each(server)
            if finding is None:
                continue
            for known in found:
                if (known.name, known.value, known.why) == (finding.name, finding.value, finding.why):
                    known.servers.append(server.url)
                    break
            else:
                finding.servers = [server.url]
                found.append(finding)
    return sorted(found, key=lambda finding: ("problem", "hint", "note").index(finding.level))


def _set(name: str, value: str) -> list[str]:
    quoted = value if value and " " not in value else f'"{value}"'
    return [f"CONFIG SET {name} {quoted}", f"in its configuration file: {name} {value or quoted}"]


def _in_file(line: str) -> list[str]:
    return [f"in its configuration file, and it must be restarted: {line}"]


def _size(nbytes: int) -> str:
    """Rounded down, as the server's configuration takes it."""
    for unit, size in (("gb", 1 << 30), ("mb", 1 << 20), ("kb", 1 << 10)):
        if nbytes >= size and (nbytes % size == 0 or nbytes >= 10 * size):
            return f"{nbytes // size}{unit}"
    return str(nbytes)


# --- who it is -------------------------------------------------------------------------------------------------------


@_check
def _version(server: Server) -> Finding | None:
    name, version = server.version
    least = (8,) if name == "Valkey" else (7, 0)
    if not version or version >= least:
        return None
    wanted = ".".join(map(str, least))
    return Finding(
        "problem",
        "version",
        f"{name} {'.'.join(map(str, version))}",
        f"this library needs Redis 7.0 or Valkey 8, or newer: {wanted} here",
        ["install a newer one; it reads the older one's data"],
    )


@_check
def _mode(server: Server) -> Finding | None:
    if server.mode == "sentinel":
        how = "redis+sentinel://host:26379,host:26379/service"
        return Finding(
            "problem", "mode", "sentinel", "this is a Sentinel, which stores nothing", [f"connect with {how}"]
        )
    if server.info.get("cluster_enabled") == "1" and not server.as_cluster:
        why = "this is one server of a cluster: keys that others have are refused (MOVED)"
        return Finding("problem", "mode", "cluster", why, ["connect with redis+cluster://host:port"])
    return None


@_check
def _role(server: Server) -> Finding | None:
    if server.info.get("role") != "slave":
        return None
    where = f"{server.info.get('master_host')}:{server.info.get('master_port')}"
    why = "this is a replica: it refuses writes, and what it has may be old"
    return Finding("problem", "role", "replica", why, [f"connect to its primary, {where}, or by Sentinels"])


@_check
def _loading(server: Server) -> Finding | None:
    if server.info.get("loading", "0") == "0":
        return None
    return Finding("problem", "loading", "yes", "it still reads its data, and answers nothing else", ["wait"])


# --- memory ----------------------------------------------------------------------------------------------------------


@_check
def _eviction(server: Server) -> Finding | None:
    policy = server.info.get("maxmemory_policy") or server.config.get("maxmemory-policy")
    if policy in (None, "noeviction"):
        return None
    has_limit = server.number("maxmemory") > 0
    why = (
        "the server evicts keys by itself, so it may drop what was acknowledged, and the log with its fence; "
        "begin_run() refuses it"
    )
    if not has_limit:
        why += " as soon as there is a maxmemory"
    return Finding(
        "problem" if has_limit else "hint", "maxmemory-policy", policy, why, _set("maxmemory-policy", "noeviction")
    )


def _forks(server: Server) -> bool:
    """Whether it has, or will have, a copy of itself that writes its data somewhere."""
    saves = bool(server.config.get("save")) or server.config.get("appendonly") == "yes"
    return saves or server.number("connected_slaves") > 0


@_check
def _maxmemory(server: Server) -> Finding | None:
    most, total = server.number("maxmemory"), server.number("total_system_memory")
    if not total or "maxmemory" not in server.info:
        return None
    share = 0.5 if _forks(server) else 0.8
    wanted = max(1, int(total * share) >> 20) << 20
    reason = (
        "half of the machine: it forks, and what is overwritten meanwhile exists twice"
        if share == 0.5
        else ("four fifths of the machine")
    )
    if not most:
        why = (
            "it grows until the kernel kills it, and all data with it; with a limit, actors and writers wait instead. "
            f"Suggested: {reason}"
        )
        return Finding("hint", "maxmemory", "0 (no limit)", why, _set("maxmemory", _size(wanted)))
    if most > total * (share + 0.2):
        why = f"the machine has {_size(total)}: the kernel may kill the server before it is full. Suggested: {reason}"
        return Finding("hint", "maxmemory", _size(most), why, _set("maxmemory", _size(wanted)))
    return None


@_check
def _full(server: Server) -> Finding | None:
    most, used = server.number("maxmemory"), server.number("used_memory")
    if not most or used < 0.9 * most:
        return None
    why = "when it is full, writes are refused: actors and writers wait, set() raises ServerFull"
    how = [
        "delete what is not needed; capacity= of the replay; begin_run(keep=1)",
        "a larger maxmemory, if the machine has it",
    ]
    return Finding("problem" if used >= most else "hint", "used_memory", f"{used / most:.0%} of maxmemory", why, how)


@_check
def _evicted(server: Server) -> Finding | None:
    count = server.number("evicted_keys")
    if not count:
        return None
    return Finding("hint", "evicted_keys", f"{count:,}", "it has dropped so many keys by itself since it was started")


@_check
def _allocator(server: Server) -> Finding | None:
    if server.info.get("mem_allocator") != "libc" or server.is_embedded:
        return None
    why = (
        "libc's malloc gives memory back and takes it anew, unless its environment says otherwise, which cannot be seen: "
        "chunks of 205 kB are written for the first time at 1.0 instead of 1.45 GB/s, 100 MB overwritten at 1.2 instead of 3.7"
    )
    variables = "MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=1099511627776 MALLOC_TOP_PAD_=67108864"
    return Finding("note", "mem_allocator", "libc", why, [f"in its environment, and it must be restarted: {variables}"])


# --- speed -----------------------------------------------------------------------------------------------------------


@_check
def _avoid_copy(server: Server) -> Finding | None:
    name = "min-string-size-avoid-copy-reply"
    value = server.config.get(name)
    if value is None or 0 < int(value) <= AVOID_COPY:
        return None
    why = "replies of 4 to 16 kB are copied before they are sent: mget(out=) of 12.8 kB 77,000 instead of 167,000 a second"
    return Finding("hint", name, value, why, _set(name, str(AVOID_COPY)))


@_check
def _socket(server: Server) -> Finding | None:
    path = server.config.get("unixsocket")
    if server.is_unix or not server.is_here or not path or not os.path.exists(path):  # noqa: PTH110
        return None
    why = "it is on this machine and has a Unix socket, which writes small arrays 1.5 times as fast"
    return Finding("hint", "connection", "TCP on one machine", why, [f"connect with unix://{path}"])


@_check
def _send_buffer(server: Server) -> Finding | None:
    value = server.kernel.get("net.core.wmem_default")
    if not server.is_unix or value is None or int(value) >= SEND_BUFFER:
        return None
    why = "the server's end of a Unix socket is full with one chunk of 205 kB: reading 167,000 instead of 220,000 a second"
    how = [f"sysctl net.core.wmem_default={SEND_BUFFER}", "restart the server"]
    return Finding("hint", "net.core.wmem_default", value, why, how)


@_check
def _io_threads(server: Server) -> Finding | None:
    value, cores = server.config.get("io-threads"), os.cpu_count() or 1
    if value is None or not server.is_here or int(value) < 2 or cores > int(value) + 1:
        return None
    why = f"this machine has {cores} cores: threads that wait for work take them from the clients, to a halt on two"
    return Finding("hint", "io-threads", value, why, _in_file("io-threads 1"))


@_check
def _tls(server: Server) -> Finding | None:
    if not server.url.startswith("rediss"):
        return None
    why = "TLS costs about half of the throughput"
    return Finding("note", "connection", "TLS", why + (": on one machine a Unix socket" if server.is_here else ""))


# --- limits ----------------------------------------------------------------------------------------------------------


@_check
def _output_buffer(server: Server) -> Finding | None:
    limits = server.config.get("client-output-buffer-limit", "")
    found = re.search(r"normal (\d+) (\d+) (\d+)", limits)
    if found is None:
        return None
    hard, soft = int(found[1]), int(found[2])
    most = min(value for value in (hard, soft, 1 << 62) if value)
    if most >= LARGEST_VALUE:
        return None
    is_small = 0 < hard < PLAIN_BUFFER
    why = "the server cuts a client off that has so many bytes of replies waiting: " + (
        "about 4 MB at once are asked for" if is_small else "a single value beyond it, as a policy, cannot be read"
    )
    how = _set("client-output-buffer-limit", "normal 0 0 0")
    value = " ".join(found.groups())
    return Finding("problem" if is_small else "hint", "client-output-buffer-limit normal", value, why, how)


@_check
def _bulk(server: Server) -> Finding | None:
    value = server.config.get("proto-max-bulk-len")
    if value is None or int(value) >= LARGEST_VALUE:
        return None
    size = int(value)
    breaks = (
        "a chunk of a replay has up to 64 MiB"
        if size < LARGEST_CHUNK
        else ("a part of a policy has up to 404 MiB" if size < LARGEST_PART else "an array may have 512 MiB")
    )
    why = f"a longer value breaks the connection, and {breaks}"
    level: Level = "problem" if size < LARGEST_CHUNK else "hint"
    return Finding(level, "proto-max-bulk-len", value, why, _set("proto-max-bulk-len", "512mb"))


@_check
def _clients(server: Server) -> Finding | None:
    most, now = int(server.config.get("maxclients", 0)), server.number("connected_clients")
    rejected = server.number("rejected_connections")
    if not rejected and (not most or now < 0.8 * most):
        return None
    value = f"{now:,} of {most:,}" + (f", {rejected:,} refused so far" if rejected else "")
    why = (
        "each process has a connection, and one more where it waits, or for replicas=; more are refused and tried again"
    )
    return Finding("hint", "maxclients", value, why, [*_set("maxclients", str(max(10_000, 2 * now))), "ulimit -n, too"])


@_check
def _backlog(server: Server) -> Finding | None:
    value = min(
        (int(each) for each in (server.config.get("tcp-backlog"), server.kernel.get("net.core.somaxconn")) if each),
        default=511,
    )
    if value >= 511 or server.is_unix:
        return None
    why = "so many may connect at the same moment; others are tried again by the kernel after a second"
    return Finding(
        "hint", "tcp-backlog", str(value), why, [*_in_file("tcp-backlog 511"), "sysctl net.core.somaxconn=4096"]
    )


@_check
def _timeout(server: Server) -> Finding | None:
    value = server.config.get("timeout", "0")
    if value == "0":
        return None
    why = "idle connections are ended after so many seconds, and made again when they are needed: nothing is lost by it"
    return Finding("note", "timeout", value, why, _set("timeout", "0"))


# --- what is kept ----------------------------------------------------------------------------------------------------


@_check
def _disk(server: Server) -> Finding | None:
    bad = [
        name
        for name in ("rdb_last_bgsave_status", "aof_last_write_status", "aof_last_bgrewrite_status")
        if server.info.get(name, "ok") != "ok"
    ]
    if not bad:
        return None
    why = "it could not write to its disk, or fork; until it can, it may refuse all writes (MISCONF)"
    return Finding("problem", bad[0], server.info[bad[0]], why, ["make room on its disk, or memory; its log says more"])


@_check
def _persistence(server: Server) -> Finding | None:
    appends, replicas = server.config.get("appendonly"), server.number("connected_slaves")
    if appends is None or appends == "yes" or replicas:
        return None
    if server.config.get("save"):
        why = "what was acknowledged since the last snapshot is gone when the server ends; with the AOF, a second of it"
    else:
        why = "nothing is kept: when the server ends, what was acknowledged is gone, and the log. Right for runs made anew"
    return Finding("note", "appendonly", "no, and no replica", why, _set("appendonly", "yes"))


@_check
def _snapshots(server: Server) -> Finding | None:
    value = server.config.get("save")
    if not value:
        return None
    why = "it forks for each snapshot: what is overwritten meanwhile exists twice, and all goes to the disk again and again"
    return Finding("hint", "save", value, why, _set("save", ""))


@_check
def _always(server: Server) -> Finding | None:
    if server.config.get("appendonly") != "yes" or server.config.get("appendfsync") != "always":
        return None
    why = "each acknowledgement waits for the disk, an XADD takes 11 to 12 µs instead of 6 to 9; everysec may lose a second"
    return Finding("hint", "appendfsync", "always", why, _set("appendfsync", "everysec"))


@_check
def _fork(server: Server) -> Finding | None:
    micros = server.number("latest_fork_usec")
    if micros < 100_000:
        return None
    why = "nobody was served during its last fork: each snapshot, AOF rewrite and new replica takes one"
    return Finding("hint", "latest_fork_usec", f"{micros:,}", why)


# --- replicas and clusters --------------------------------------------------------------------------------------------


def _redundant(server: Server) -> bool:
    return server.number("connected_slaves") > 0


@_check
def _replicas(server: Server) -> Finding | None:
    lines = [value for name, value in server.info.items() if re.fullmatch(r"slave\d+", name)]
    replicas = [dict(pair.split("=", 1) for pair in line.split(",") if "=" in pair) for line in lines]
    late = [each for each in replicas if each.get("state") != "online" or int(each.get("lag") or 0) > 10]
    if not late:
        return None
    value = ", ".join(
        f"{each.get('ip')}:{each.get('port')} {each.get('state')}, lag {each.get('lag')} s" for each in late
    )
    return Finding(
        "hint", "replica", value, "a failover to it would lose what it does not have; replicas= waits for it"
    )


@_check
def _repl_backlog(server: Server) -> Finding | None:
    value = server.config.get("repl-backlog-size")
    if value is None or not _redundant(server) or int(value) >= 256 << 20:
        return None
    why = (
        "a replica that misses more is sent everything anew; so much is a moment of a server that takes 1 GB/s. "
        "Seconds of a restart × bytes a second"
    )
    return Finding("hint", "repl-backlog-size", _size(int(value)), why, _set("repl-backlog-size", "1gb"))


@_check
def _replica_buffer(server: Server) -> Finding | None:
    found = re.search(r"(?:slave|replica) (\d+) (\d+) (\d+)", server.config.get("client-output-buffer-limit", ""))
    if found is None or not _redundant(server) or not 0 < int(found[1]) < GB:
        return None
    why = "a replica that is so far behind is cut off, and then begins anew, and again; make it as large as the backlog"
    how = _set("client-output-buffer-limit", "replica 1gb 1gb 60")
    return Finding("hint", "client-output-buffer-limit replica", " ".join(found.groups()), why, how)


@_check
def _min_replicas(server: Server) -> Finding | None:
    name = next((each for each in ("min-replicas-to-write", "min-slaves-to-write") if each in server.config), None)
    if name is None or server.config[name] != "0" or not _redundant(server):
        return None
    why = (
        "a primary that is cut off goes on taking writes, and loses them when its replica has taken over; "
        "with 1 it refuses them, and actors wait"
    )
    return Finding("hint", name, "0", why, _set("min-replicas-to-write", "1"))


@_check
def _down_after(server: Server) -> Finding | None:
    milliseconds, name = int(server.service.get("down-after-milliseconds", 0)), server.service.get("name")
    if milliseconds <= 5000:
        return None
    why = "so long nobody is served before a successor is looked for; retry_timeout, 30 s, has to be longer than all of it"
    how = [
        f"on each Sentinel: SENTINEL SET {name} down-after-milliseconds 5000",
        f"in their configuration files: sentinel down-after-milliseconds {name} 5000",
    ]
    return Finding("hint", "down-after-milliseconds", str(milliseconds), why, how)


@_check
def _sentinels(server: Server) -> Finding | None:
    count = int(server.service.get("num-other-sentinels", 2)) + 1
    if count >= 3:
        return None
    why = "three on different machines are the least that agree when one of them is gone with the primary"
    return Finding("hint", "Sentinels", str(count), why)


@_check
def _successor(server: Server) -> Finding | None:
    if not server.service or _redundant(server):
        return None
    why = "its Sentinels have nobody to take its place"
    return Finding("hint", "replicas", "0", why, ["on another server: REPLICAOF <host> <port>"])


@_check
def _cluster_state(server: Server) -> Finding | None:
    if not server.cluster:
        return None
    assigned, state = int(server.cluster.get("cluster_slots_assigned", 16384)), server.cluster.get("cluster_state")
    if state == "ok" and assigned == 16384:
        return None
    value = f"{state}, {assigned:,} of 16,384 slots assigned, {server.cluster.get('cluster_slots_fail')} failed"
    why = "keys of slots that nobody serves are refused (CLUSTERDOWN)"
    return Finding("problem", "cluster_state", value, why, ["who is gone: CLUSTER NODES", "CLUSTER ADDSLOTSRANGE …"])


@_check
def _cluster_size(server: Server) -> Finding | None:
    size = int(server.cluster.get("cluster_size", 3))
    if size >= 3:
        return None
    why = "three primaries are the least that can elect a successor to one of them"
    return Finding("hint", "cluster_size", str(size), why)


@_check
def _cluster_replica(server: Server) -> Finding | None:
    if not server.cluster or _redundant(server):
        return None
    why = "when this primary is gone, so are its keys, and nobody takes its place"
    return Finding("hint", "replicas", "0", why, ["on another server: CLUSTER REPLICATE <its id>"])


@_check
def _coverage(server: Server) -> Finding | None:
    if not server.cluster or server.config.get("cluster-require-full-coverage") != "yes":
        return None
    why = "all primaries refuse everything while one of them has no successor"
    return Finding("hint", "cluster-require-full-coverage", "yes", why, _set("cluster-require-full-coverage", "no"))


@_check
def _node_timeout(server: Server) -> Finding | None:
    value = server.config.get("cluster-node-timeout")
    if not server.cluster or value is None or int(value) <= 5000:
        return None
    why = (
        "so long nobody is served when a primary is gone, and longer: with 15000 up to 24 s of the 30 of retry_timeout, "
        "with 5000 up to 8"
    )
    return Finding("hint", "cluster-node-timeout", value, why, _set("cluster-node-timeout", "5000"))


# --- the rest ---------------------------------------------------------------------------------------------------------


@_check
def _open(server: Server) -> Finding | None:
    bind = server.config.get("bind", "")
    has_port = any(server.config.get(name, "0") != "0" for name in ("port", "tls-port"))
    only_here = all(address.lstrip("-") in ("127.0.0.1", "::1") for address in bind.split() or ["*"])
    if not server.anybody or not has_port or only_here or server.config.get("protected-mode") == "yes":
        return None
    why = "whoever reaches the port may do everything, without a password"
    return Finding("problem", "user default", f"nopass, bind {bind or 'all'}", why, ["ACL SETUSER default >PASSWORD"])


@_check
def _clock(server: Server) -> Finding | None:
    if abs(server.skew) < 60:
        return None
    why = (
        "a replay's first run is numbered by the server's clock, and must be above those of a deleted replay of that name: "
        "one of the two clocks is wrong"
    )
    return Finding("hint", "clock", f"{server.skew:+.0f} s from this machine's", why, ["run NTP on both"])


@_check
def _slow(server: Server) -> Finding | None:
    if not server.slow:
        return None
    limit = server.config.get("slowlog-log-slower-than", "10000")
    why = f"commands that took the server {int(limit) / 1000:g} ms or more, and made all others wait"
    return Finding("note", "slow commands", f"{server.slow:,}", why, ["SLOWLOG GET 10"])
