"""The replay, without async."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import aionpredis
from aionpredis.blocking.facade import Entered, Facade, Steps, in_loop, like, made, waits, waits_for
from aionpredis.blocking.loop import Loop
from aionpredis.blocking.policy import Policy
from aionpredis.replay import ActorStats, Position, ReadStats, Run, Sample, SampleStats, Schema
from aionpredis.replay.lanes import Where
from aionpredis.replay.log import LogReader
from aionpredis.replay.reader import Arrays

__all__ = ["Actor", "Batches", "Replay", "Sampler", "VectorActor"]


def _append(loop: Loop, actor: aionpredis.Actor) -> Callable[..., None]:
    """An ``append`` in the caller's thread."""
    loop.forsake_with(actor.forsake)
    return actor.append_from_thread(loop.post, loop.call)


class Batches(Steps[aionpredis.Batches, Arrays]):
    """``for batch in …``: :class:`aionpredis.Batches` without async. For one thread at a time."""

    acknowledge = waits(aionpredis.Batches.acknowledge)

    @property
    def stats(self) -> ReadStats:
        return self._target.stats

    @property
    def run(self) -> int:
        """The run that is read."""
        return self._target.run

    @property
    def position(self) -> Position:
        """How far the batches that were handed out have come: see :attr:`aionpredis.Batches.position`."""
        return self._target.position

    @property
    def log(self) -> LogReader:
        """What is known of the run, for a reader that goes on where this one ended."""
        return self._target.log


class Sampler(Steps[aionpredis.Sampler, Sample]):
    """``sampler.sample()``, or ``for batch in sampler``: :class:`aionpredis.Sampler` without async. One thread at a time."""

    sample = waits(aionpredis.Sampler.sample)
    refresh = waits(aionpredis.Sampler.refresh)
    update_priorities = in_loop(aionpredis.Sampler.update_priorities)

    @property
    def stats(self) -> SampleStats:
        return self._target.stats

    @property
    def run(self) -> int:
        """The run that is sampled."""
        return self._target.run

    def __len__(self) -> int:
        """How many transitions are known and present."""
        return len(self._target)


class Actor(Entered[aionpredis.Actor]):
    """:class:`aionpredis.Actor` without async. Made by :meth:`Replay.actor`; use it with ``with``. One thread at a time."""

    def __init__(self, loop: Loop, target: aionpredis.Actor, owner: object) -> None:
        super().__init__(loop, target, owner)
        self.append = _append(loop, target)
        """``append(*, column=value, …)``: add one transition, as :attr:`aionpredis.Actor.append`. It waits for the loop only
        while all buffers are travelling; else a full one is handed over, and the caller's thread goes on.
        """

    join = waits(aionpredis.Actor.join)
    flush = waits(aionpredis.Actor.flush)

    @property
    def name(self) -> str:
        return self._target.name

    @property
    def incarnation(self) -> bytes:
        """Identifies this start of the actor: one that is restarted, or a zombie, is another."""
        return self._target.incarnation

    @property
    def buffers(self) -> int:
        """How many chunks are filled or travelling at most."""
        return self._target.buffers

    @property
    def run(self) -> Run | None:
        """The run that is appended to; ``None`` before :meth:`join` and after :class:`aionpredis.RunEnded`."""
        return self._target.run

    @property
    def stats(self) -> ActorStats:
        """What was appended so far, and what became of it."""
        return self._target.stats


class VectorActor(Entered[aionpredis.VectorActor]):
    """:class:`aionpredis.VectorActor` without async. Made by :meth:`Replay.vector_actor`; use it with ``with``."""

    def __init__(self, loop: Loop, target: aionpredis.VectorActor, owner: object) -> None:
        super().__init__(loop, target, owner)
        for actor in target.actors:
            _append(loop, actor)

    join = waits(aionpredis.VectorActor.join)
    flush = waits(aionpredis.VectorActor.flush)
    _cut = waits(aionpredis.VectorActor.cut)

    @like(aionpredis.VectorActor.append)
    def append(self, where: Where = None, /, **values: Any) -> None:
        for actor, row in self._target.rows(values, where):
            actor.append(**row)  # the thread's own, which waits

    @property
    def lanes(self) -> int:
        return self._target.lanes

    @property
    def run(self) -> Run | None:
        """The run that is appended to; ``None`` before :meth:`join`, and after an error."""
        return self._target.run

    @property
    def stats(self) -> ActorStats:
        """The sum over all lanes."""
        return self._target.stats


class Replay(Facade[aionpredis.Replay]):
    """:class:`aionpredis.Replay` without async. Made by :meth:`Client.replay`."""

    begin_run = waits(aionpredis.Replay.begin_run)
    latest_run = waits(aionpredis.Replay.latest_run)
    delete_runs_before = waits(aionpredis.Replay.delete_runs_before)
    drop = waits(aionpredis.Replay.drop)
    delete = waits(aionpredis.Replay.delete)
    leftover_keys = waits(aionpredis.Replay.leftover_keys)
    actor = made(Actor, aionpredis.Replay.actor)
    vector_actor = made(VectorActor, aionpredis.Replay.vector_actor)
    count = waits(aionpredis.Replay.count)
    epoch = waits_for(Batches, aionpredis.Replay.epoch)
    follow = waits_for(Batches, aionpredis.Replay.follow)
    consume = waits_for(Batches, aionpredis.Replay.consume)
    draw_chunks = waits_for(Batches, aionpredis.Replay.draw_chunks)
    sampler = waits_for(Sampler, aionpredis.Replay.sampler)
    save = waits(aionpredis.Replay.save)
    restore = waits(aionpredis.Replay.restore)

    @property
    def name(self) -> str:
        return self._target.name

    @property
    def schema(self) -> Schema:
        return self._target.schema

    @property
    def policy(self) -> Policy:
        """The versions of the weights that the actors use."""
        return Policy(self._loop, self._target.policy, self)
