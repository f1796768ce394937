"""NumPy arrays between async Python programs through Redis or Valkey, at the speed of the socket.

::

    async with aionpredis.connect("unix:///run/redis.sock") as client:
        await client.set("weights", array)
        array = await client.get("weights")
"""

from aionpredis.client import Client, connect
from aionpredis.codecs import Codec, Lz4, register
from aionpredis.errors import (
    AionpredisError,
    AuthenticationError,
    ConnectError,
    ConnectionLost,
    CorruptValue,
    DecodeError,
    EncodeError,
    NotAnArray,
    NotReplicated,
    OutcomeUnknown,
    OutMismatch,
    ProtocolError,
    Redirected,
    ReplayError,
    ReplayGone,
    RunConflict,
    RunEnded,
    SchemaMismatch,
    ServerError,
    ServerFull,
    ServerUnavailable,
    Stalled,
    UsageError,
    WriteFailed,
    WrongKind,
)
from aionpredis.loader import Loader
from aionpredis.loop import run
from aionpredis.policy import Policy, PolicyVersion
from aionpredis.replay import (
    Actor,
    ActorStats,
    Batches,
    Fifo,
    Lifo,
    Newest,
    NStep,
    Position,
    Prioritized,
    ReadStats,
    Replay,
    Run,
    Sample,
    Sampler,
    SampleStats,
    Schema,
    Selection,
    Shuffled,
    Uniform,
    VectorActor,
)
from aionpredis.server import Server
from aionpredis.stats import Stats
from aionpredis.writer import Writer

__version__ = "0.1.0"

__all__ = [
    "Actor",
    "ActorStats",
    "AionpredisError",
    "AuthenticationError",
    "Batches",
    "Client",
    "Codec",
    "ConnectError",
    "ConnectionLost",
    "CorruptValue",
    "DecodeError",
    "EncodeError",
    "Fifo",
    "Lifo",
    "Loader",
    "Lz4",
    "NStep",
    "Newest",
    "NotAnArray",
    "NotReplicated",
    "OutMismatch",
    "OutcomeUnknown",
    "Policy",
    "PolicyVersion",
    "Position",
    "Prioritized",
    "ProtocolError",
    "ReadStats",
    "Redirected",
    "Replay",
    "ReplayError",
    "ReplayGone",
    "Run",
    "RunConflict",
    "RunEnded",
    "Sample",
    "SampleStats",
    "Sampler",
    "Schema",
    "SchemaMismatch",
    "Selection",
    "Server",
    "ServerError",
    "ServerFull",
    "ServerUnavailable",
    "Shuffled",
    "Stalled",
    "Stats",
    "Uniform",
    "UsageError",
    "VectorActor",
    "WriteFailed",
    "Writer",
    "WrongKind",
    "connect",
    "register",
    "run",
]
