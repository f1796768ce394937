"""Vectorized environments: one call appends a transition to each lane, and each lane is a trajectory of its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import astuple
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aionpredis.errors import AionpredisError, EncodeError
from aionpredis.replay.actor import Actor, ActorStats
from aionpredis.replay.log import Begin

__all__ = ["VectorActor", "Where"]

Where = Sequence[bool] | NDArray[np.bool_] | None


class VectorActor:
    """As many actors as an environment has lanes. Made by :meth:`aionpredis.Replay.vector_actor`; used like one actor.

    Transitions of a lane follow each other in the replay, so slices and n-step targets never mix lanes.
    """

    def __init__(self, actors: Sequence[Actor]) -> None:
        self.actors = actors
        """One for each lane, in order."""
        self._stack = AsyncExitStack()

    @property
    def lanes(self) -> int:
        return len(self.actors)

    @property
    def run(self) -> Begin | None:
        """The run that is appended to; ``None`` before :meth:`join`, and after an error."""
        runs = {actor.run for actor in self.actors}
        return runs.pop() if len(runs) == 1 else None

    @property
    def stats(self) -> ActorStats:
        """The sum over all lanes."""
        return ActorStats(*map(sum, zip(*(astuple(actor.stats) for actor in self.actors), strict=True)))

    async def __aenter__(self) -> VectorActor:
        async with AsyncExitStack() as stack:  # of the lanes that were opened, if one cannot be
            for actor in self.actors:
                await stack.enter_async_context(actor)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        return await self._stack.__aexit__(kind, error, trace)

    async def join(self) -> Begin:
        """Go with all lanes to the newest run; after an error of some lanes, with those. Otherwise as :meth:`Actor.join`."""
        appending = [actor for actor in self.actors if actor.run is not None]
        if self.run is None:
            for actor in appending:
                with suppress(AionpredisError):  # it has met that error, too, and not told yet
                    await actor.flush()
        goes_on = {actor for actor in appending if actor.run is not None} if self.run is None else set()
        last: Begin | None = None
        for actor in self.actors:
            if actor not in goes_on:
                last = await actor.join()
        while self.run is None:  # one has begun meanwhile
            newest = max(actor.run.run for actor in self.actors if actor.run is not None)
            behind = [actor for actor in self.actors if actor.run is None or actor.run.run < newest]
            # Or a failover has lost a run, and another one has taken its number.
            behind = behind or [actor for actor in self.actors if actor.run != last]
            last = await behind[0].join()
        return self.run

    def rows(self, values: Mapping[str, Any], where: Where) -> Iterator[tuple[Actor, dict[str, Any]]]:
        """What the lanes' actors have to append.

        Raises:
            EncodeError: a column has not one value for each lane, or ``where`` does not.
        """
        if where is not None and np.shape(where) != (len(self.actors),):
            raise EncodeError(f"where has shape {np.shape(where)} for {len(self.actors)} lanes")
        for name, column in values.items():
            try:
                count = len(column)
            except TypeError:
                raise EncodeError(f"column {name!r} is one value, not one for each lane: {column!r:.100}") from None
            if count != len(self.actors):
                raise EncodeError(f"column {name!r} has {count} values for {len(self.actors)} lanes")
        names = tuple(values)
        rows = zip(*values.values(), strict=True) if values else [()] * len(self.actors)
        for lane, (actor, row) in enumerate(zip(self.actors, rows, strict=True)):
            if where is None or where[lane]:
                yield actor, dict(zip(names, row, strict=True))

    async def append(self, where: Where = None, /, **values: Any) -> None:
        """Add a transition to each lane, or to those that are true in ``where``: each column with a leading axis,
        ``(lanes, *shape)``.

        Raises:
            EncodeError: a column has not one value for each lane (nothing was added), or one does not fit.
            TypeError, RunEnded, ConnectionLost, ConnectError, ServerError, NotReplicated: as for :attr:`Actor.append`.
                Lanes before the one that raises have theirs.
        """
        for actor, row in self.rows(values, where):
            await actor.append(**row)

    async def flush(self) -> None:
        """Return when all that was appended is acknowledged. Otherwise as :meth:`Actor.flush`."""
        for actor in self.actors:
            await actor.flush()

    async def cut(self, where: NDArray[np.bool_]) -> int:
        """:meth:`Actor.cut` for the lanes that are true in ``where``; how many were."""
        return sum([await actor.cut() for actor, here in zip(self.actors, where, strict=True) if here])
