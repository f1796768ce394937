"""The library without async: for scripts, notebooks, and the workers of multiprocessing and of torch's DataLoader.

::

    from aionpredis import blocking

    with blocking.connect("unix:///run/redis.sock") as client:
        client.set("weights", array)
        array = client.get("weights")

Names and parameters are those of the async classes. Calls wait; ``async with`` is ``with``, ``async for`` is ``for``. All
clients of a process share an event loop in a thread of its own, so they work beside a loop of the program's, too. Schemas,
selections and errors are those of :mod:`aionpredis`.
"""

from aionpredis.blocking.client import Client, connect
from aionpredis.blocking.loader import Loader
from aionpredis.blocking.policy import Policy, PolicyWatch
from aionpredis.blocking.replay import Actor, Batches, Replay, Sampler, VectorActor
from aionpredis.blocking.writer import Writer

__all__ = [
    "Actor",
    "Batches",
    "Client",
    "Loader",
    "Policy",
    "PolicyWatch",
    "Replay",
    "Sampler",
    "VectorActor",
    "Writer",
    "connect",
]
