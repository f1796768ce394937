"""Commands: which have no place on a connection that many tasks share, each with the reason; what an error says of one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from aionpredis.errors import ServerError, ServerUnavailable, UsageError

__all__ = ["check_shared", "has_not_run", "key_of", "refused"]

_STATE = "it would change the connection that all tasks of this client share"
_PUSH = "the replies that it starts would be taken for those of other tasks"
_BLOCK = "it would block the connection that all tasks of this client share; redis-py's own client can do it"

_REFUSED = {
    "SELECT": f"{_STATE}: name the database in the URL",
    "AUTH": f"{_STATE}: name user and password in the URL",
    "HELLO": f"{_STATE}: this client speaks RESP2",
    "RESET": _STATE,
    "QUIT": f"{_STATE}: leave the client's `async with` block",
    "ASKING": _STATE,
    "READONLY": _STATE,
    "READWRITE": _STATE,
    "MULTI": f"{_STATE}: commands of other tasks would get into the transaction",
    "EXEC": _STATE,
    "DISCARD": _STATE,
    "WATCH": f"{_STATE}: it would fail the transactions of others",
    "UNWATCH": _STATE,
    "CLIENT REPLY": _PUSH,
    "CLIENT TRACKING": _PUSH,
    "CLIENT NO-TOUCH": _STATE,
    "SUBSCRIBE": _PUSH,
    "PSUBSCRIBE": _PUSH,
    "SSUBSCRIBE": _PUSH,
    "UNSUBSCRIBE": _PUSH,
    "PUNSUBSCRIBE": _PUSH,
    "SUNSUBSCRIBE": _PUSH,
    "MONITOR": _PUSH,
    "SYNC": _PUSH,
    "PSYNC": _PUSH,
    "REPLCONF": "it is not always answered, and the next task's reply would be taken for its own",
    **dict.fromkeys(
        ("BLPOP", "BRPOP", "BLMOVE", "BRPOPLPUSH", "BLMPOP", "BZPOPMIN", "BZPOPMAX", "BZMPOP", "WAIT", "WAITAOF"),
        _BLOCK,
    ),
}


def check_shared(arguments: Sequence[Any]) -> None:
    """Refuse a command that would change or block a shared connection.

    Raises:
        UsageError: it says why, and what to do instead.
    """
    if not arguments or not isinstance(arguments[0], str | bytes):  # not a bytearray: it could change until it is sent
        raise UsageError("execute() takes a command's name and its arguments, one by one")
    words = [_word(argument) for argument in arguments[:2]]
    name = words[0]
    if not name or " " in name:
        raise UsageError(f"{name!r} is not a command's name: give the arguments one by one, execute('GET', 'key')")
    reason = _REFUSED.get(name) or _REFUSED.get(" ".join(words))
    if reason is None and name in ("XREAD", "XREADGROUP") and _blocks(arguments):
        reason = _BLOCK
    if reason is not None:
        raise UsageError(f"{name} is refused: {reason}")


def _blocks(arguments: Sequence[Any]) -> bool:
    """Of XREAD and XREADGROUP: whether BLOCK is among the options, which come in any order."""
    options = iter(map(_word, arguments[1:]))
    for option in options:
        if option in ("BLOCK", "STREAMS"):
            return option == "BLOCK"
        for _ in range({"GROUP": 2, "COUNT": 1}.get(option, 0)):
            next(options, None)  # a group and a consumer may have any name
    return False


_KEY_FIRST = {
    *("DEL", "EXISTS", "EXPIRE", "GET", "GETRANGE", "MGET", "PERSIST", "PEXPIRE", "PTTL", "SET", "SETRANGE", "STRLEN"),
    *("TTL", "TYPE", "UNLINK", "WATCH", "DECR", "DECRBY", "INCR", "INCRBY", "INCRBYFLOAT"),
    *("HDEL", "HGET", "HGETALL", "HINCRBY", "HMGET", "HSET", "HVALS", "LLEN", "LPOP", "LPUSH", "LRANGE", "LTRIM"),
    *("RPOP", "RPUSH", "SADD", "SCARD", "SISMEMBER", "SMEMBERS", "SREM", "ZADD", "ZCARD", "ZRANGE", "ZREM", "ZSCORE"),
    *("XACK", "XADD", "XAUTOCLAIM", "XDEL", "XLEN", "XPENDING", "XRANGE", "XREVRANGE", "XTRIM"),
}
"""Commands whose first argument is a key; of those that have further ones, all must be on the same shard."""

_KEY_SECOND = {"MEMORY", "OBJECT", "XGROUP", "XINFO"}
"""Commands with a subcommand, behind which stands a key."""

_CONTAINERS = {
    *_KEY_SECOND,
    *("ACL", "CLIENT", "CLUSTER", "COMMAND", "CONFIG", "FUNCTION", "LATENCY", "MODULE", "PUBSUB", "SCRIPT", "SLOWLOG"),
}
"""Commands with subcommands, each of which is a right of its own."""

_KEYLESS = {"CLUSTER", "COMMAND", "CONFIG", "DBSIZE", "FLUSHALL", "FLUSHDB", "INFO", "PING", "SCAN", "TIME"}


def key_of(arguments: Sequence[Any]) -> str | bytes | None:
    """The first key of a command, if it is one of those that are known here; empty: it has none."""
    name = _word(arguments[0])
    key: Any = None
    if name in _KEY_FIRST and len(arguments) > 1:
        key = arguments[1]
    elif name in _KEY_SECOND and len(arguments) > 2:
        key = arguments[2]
    elif name in ("XREAD", "XREADGROUP") and "STREAMS" in arguments[:-1]:
        key = arguments[arguments.index("STREAMS") + 1]
    elif name in _KEYLESS:
        key = b""
    return key if isinstance(key, str | bytes) else None


_SCRIPTS = {"EVAL", "EVALSHA", "EVAL_RO", "EVALSHA_RO", "FCALL", "FCALL_RO"}

_SERVERS_OWN = (
    *("LOADING Redis is loading", "LOADING Valkey is loading", "BUSY Redis is busy", "BUSY Valkey is busy"),
    *("READONLY You can't write", "MASTERDOWN Link with MASTER", "NOREPLICAS Not enough good replicas"),
    *("CLUSTERDOWN The cluster is down", "CLUSTERDOWN Hash slot", "TRYAGAIN Multiple keys", "TRYAGAIN redirected"),
)
"""How a server says these things, the last one :mod:`aionpredis.wire.cluster`. If a script's command was refused so, no
command of it before has written anything."""


def has_not_run(arguments: Sequence[Any], refusal: ServerUnavailable) -> bool:
    """Whether a command that was refused so has done nothing. A script may give any error as its result."""
    return _word(arguments[0]) not in _SCRIPTS or refusal.args[0].startswith(_SERVERS_OWN)


def refused(error: ServerError, arguments: Sequence[Any]) -> ServerError:
    """A copy to be raised, with the name of the command that the server refused, and its first key, where known.

    No other argument: it may be a secret.
    """
    name = _word(arguments[0])
    command = f"{name} {_word(arguments[1])}" if name in _CONTAINERS and len(arguments) > 1 else name
    return error.about(command, key_of(arguments) or None)


def _word(argument: Any) -> str:
    if isinstance(argument, bytes | bytearray | memoryview):
        return bytes(argument[:32]).decode("latin-1").upper()
    return argument.upper() if isinstance(argument, str) else ""
