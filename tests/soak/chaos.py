"""What goes wrong in a soak: at random, by a seed."""

from __future__ import annotations

import contextlib
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import redis

from aionpredis import Server

from ..proxy import Faults, Proxy


@dataclass
class Chaos:
    """``proxies``: one for each process. ``kill``: ends a random process with SIGKILL, another takes its place."""

    server: Server
    proxies: list[Proxy]
    kill: Callable[[], object]
    rng: random.Random
    seconds: float
    done: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._ends = time.monotonic() + self.seconds

    @property
    def over(self) -> bool:
        return time.monotonic() > self._ends

    def step(self) -> None:
        """One fault."""
        weights: dict[Callable[[], object], int] = {
            self.cut: 8,
            self.cut_in_the_midst: 12,
            self.stall: 4,
            self.trickle: 3,
            self.delay: 3,
            self.refuse: 3,
            self.kill_connections: 4,
            self.pause: 2,
            self.kill: 4,
            self.restart: 2,
        }
        (fault,) = self.rng.choices(list(weights), list(weights.values()))
        self.done[fault.__name__.replace("_", " ")] += 1
        fault()

    def heal(self) -> None:
        """Nothing goes wrong any more, and no connection that was cut in one direction stays silent until its timeout."""
        for proxy in self.proxies:
            vars(proxy).update(vars(Faults()))
            proxy.cut()

    def _for(self, seconds: float, **faults: object) -> None:
        proxy = self.rng.choice(self.proxies)
        for name, value in faults.items():
            setattr(proxy, name, value)
        time.sleep(self.rng.uniform(0, seconds))
        vars(proxy).update(vars(Faults()))

    def cut(self) -> None:
        self.rng.choice(self.proxies).cut()

    def cut_in_the_midst(self) -> None:
        proxy = self.rng.choice(self.proxies)
        name = self.rng.choice(("cut_up", "cut_down", "cut_replies"))
        setattr(proxy, name, self.rng.randrange(1, 50) if name == "cut_replies" else int(10 ** self.rng.uniform(0, 5)))
        proxy.ending = self.rng.choice(("close", "half"))

    def stall(self) -> None:
        self._for(1.0, stalled=True)

    def trickle(self) -> None:
        self._for(0.5, chunk=self.rng.choice((1, 7, 100)), pause=0.0001)

    def delay(self) -> None:
        self._for(1.0, delay=self.rng.uniform(0, 0.05))

    def refuse(self) -> None:
        self.cut()
        self._for(1.0, refusing=True)

    def _admin(self, *command: object) -> None:
        with contextlib.suppress(redis.ConnectionError), redis.Redis.from_url(self.server.url) as admin:
            admin.execute_command(*command)

    def kill_connections(self) -> None:
        self._admin("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")

    def pause(self) -> None:
        self._admin("CLIENT", "PAUSE", self.rng.randrange(50, 500))

    def restart(self) -> None:
        """SIGKILL for the server. What it has acknowledged is in its append-only file."""
        self.server.stop()
        time.sleep(self.rng.uniform(0, 1))
        self.server.start()
        for proxy in self.proxies:
            proxy.target = self.server.url
            proxy.cut()
