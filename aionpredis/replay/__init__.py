"""Replay: transitions from many actors for one or more learners, through data keys and one commit log.

``schema`` the columns · ``chunk`` the buffers · ``log`` the commits · ``runs`` begin and delete · ``actor`` writes ·
``reader`` reads. Built on the client alone; no code runs on the server.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from aionpredis.errors import ReplayGone, ServerFull, UsageError
from aionpredis.policy import Policy
from aionpredis.replay import runs
from aionpredis.replay.actor import Actor, ActorStats
from aionpredis.replay.log import Begin as Run
from aionpredis.replay.log import ChunkId, LogReader, Names
from aionpredis.replay.reader import Batches, EpochSource, FollowSource, ReadStats
from aionpredis.replay.schema import Schema

if TYPE_CHECKING:
    from aionpredis.client import Client

__all__ = ["Actor", "ActorStats", "Batches", "ReadStats", "Replay", "Run", "Schema"]

MAX_CHUNK_BYTES = 64 << 20
"""Bytes of one chunk. It is received in one piece, and four of them circulate in every actor."""


class Replay:
    """Transitions of successive runs. Made by :meth:`aionpredis.Client.replay`; every process makes its own::

        replay = client.replay("pong", Schema(state=("uint8", (80, 80)), action="int64", reward="float32"))

    The trainer begins runs, actors append to the newest, readers read one:

    * a **run** is a number that grows. Beginning one makes the server refuse whatever belongs to older ones;
    * a **chunk** is up to ``chunk`` transitions of one actor, one ``.safetensors`` value on the server;
    * ``policy``: the versions of the weights that the actors use, see :class:`aionpredis.Policy`.

    ``name``: letters, digits, ``_``, ``.``, ``-``; keys begin with ``name:`` and ``{name}:``. ``chunk``: transitions
    committed together; more are cheaper, fewer are visible sooner. ``lease``: seconds that data which was never
    committed (its actor died) stays on the server; longer than any pause of an actor or the network.

    The server must not evict keys by itself (``maxmemory-policy noeviction``): see :meth:`begin_run`.
    """

    def __init__(self, client: Client, name: str, schema: Schema, *, chunk: int = 16, lease: float = 60.0) -> None:
        if not isinstance(schema, Schema):
            raise UsageError(f"the schema of a replay is an aionpredis.Schema, not {type(schema).__name__}")
        if isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1:
            raise UsageError(f"chunk is a positive number of transitions, not {chunk!r}")
        if schema.row_nbytes * chunk > MAX_CHUNK_BYTES:
            raise UsageError(
                f"chunk={chunk} makes {schema.row_nbytes * chunk:,} bytes: at most {MAX_CHUNK_BYTES:,}; choose a smaller one"
            )
        if not 0.1 <= lease <= 86_400:
            raise UsageError(f"lease is 0.1 to 86400 seconds, not {lease!r}")
        self.schema = schema
        self.policy = Policy(client, name)
        self._client = client
        self._names = Names(name)
        self._chunk = chunk
        self._lease = lease

    @property
    def name(self) -> str:
        return self._names.name

    def __repr__(self) -> str:
        return f"<aionpredis.Replay {self.name} {self.schema!r}>"

    # --- the trainer -------------------------------------------------------------------------------------------------

    async def begin_run(self, weights: Mapping[str, object] | None = None, *, keep: int = 1) -> Run:
        """Begin the next run, with ``weights`` as its policy; delete the data of all but the newest ``keep`` runs.

        From its return on, the server refuses every commit to an older run, from whichever host. Actors notice with
        their next commit (:class:`RunEnded`). If the server's memory is full, the data of the oldest run is deleted
        before, and of the next, until there is room.

        Raises:
            RunConflict: another trainer began this run.
            ReplayGone: the replay was deleted meanwhile.
            ReplayError: the server may evict keys by itself.
            ServerFull: no memory is left for the log or the policy, and no run to delete.
        """
        if keep < 1:
            raise UsageError(f"keep is at least 1, the run that is begun; not {keep}")
        await runs.check_eviction(self._client, self._names)
        version = 0
        while True:
            try:
                if weights is not None and not version:
                    version = await self.policy.publish(weights)
                run = await runs.begin(self._client, self._names, policy=version, schema=self.schema.digest)
                break
            except ServerFull:  # for SET and XADD; UNLINK is not refused
                if not await runs.delete_oldest(self._client, self._names):
                    raise
        await runs.delete_below(self._client, self._names, run.run - keep + 1)
        return run

    async def latest_run(self) -> Run | None:
        """The newest run; ``None`` if none was ever begun."""
        return await runs.latest(self._client, self._names)

    async def delete_runs_before(self, run: int | Run) -> int:
        """Delete the data of all runs before this one; how many chunks were deleted. Finishes what a crash interrupted."""
        return await runs.delete_below(self._client, self._names, _number(run))

    async def delete(self) -> None:
        """Delete the replay: the data of all runs, the policy, and the log at last. After a crash, call it again.

        From its first step on the server refuses every commit. Actors get :class:`ReplayGone` or :class:`RunEnded`; one
        that calls ``join()`` then waits until a trainer begins a replay of this name anew.
        """
        await runs.close(self._client, self._names)
        await runs.delete_below(self._client, self._names, runs.CLOSED)
        await self.policy.delete()
        await self._client.call("UNLINK", self._names.log, repeatable=True)

    async def leftover_keys(self, before: int | Run) -> list[bytes]:
        """Data keys of runs before this one that are still there. Of deleted runs there is none after one lease.

        Looks at every key of the server: for checks.
        """
        return await runs.leftover_keys(self._client, self._names, below=_number(before))

    # --- actors and learners -----------------------------------------------------------------------------------------

    def actor(self, name: str | None = None) -> Actor:
        """One writer of transitions, for ``async with``. ``name``: for people only; each start is an identity of its own."""
        return Actor(
            self._client,
            self._names,
            self.schema,
            name or f"{os.uname().nodename if hasattr(os, 'uname') else 'host'}-{os.getpid()}",
            chunk=self._chunk,
            lease=self._lease,
        )

    async def count(self, run: int | Run | None = None) -> int:
        """How many transitions are committed to the run (default: the newest)."""
        log = LogReader(self._client, self._names, await self._run(run))
        chunks: list[ChunkId] = []
        await log.read_all(chunks)
        return sum(chunk.rows for chunk in chunks)

    async def epoch(
        self,
        run: int | Run | None = None,
        *,
        batch: int = 256,
        shuffle: bool = True,
        seed: int | None = None,
        drop_last: bool = False,
        after: Batches | None = None,
    ) -> Batches:
        """Everything that is committed to the run (default: the newest) now, each transition once, in batches::

            async for batch in await replay.epoch(batch=256):
                train(batch["state"], batch["action"])

        ``shuffle``: chunks in random order, the same for the same ``seed`` and content; the transitions within a chunk
        stay together. ``drop_last``: leave out a last, shorter batch. ``after``: an earlier reader of this run that has
        come to its end; what it has read is left out.
        """
        number = await self._run(run)
        if after is None:
            log = LogReader(self._client, self._names, number)
        elif after.run == number:
            log = after.log
        else:
            raise UsageError(f"after= has read run {after.run}, not {number}")
        source = EpochSource(log, np.random.default_rng(seed) if shuffle else None)
        return self._batches(log, source, batch, drop_last)

    async def follow(self, run: int | Run | None = None, *, batch: int = 256, drop_last: bool = False) -> Batches:
        """The run's transitions as they are committed, each once; ends when the run has ended. Otherwise like epoch."""
        log = LogReader(self._client, self._names, await self._run(run))
        return self._batches(log, FollowSource(log), batch, drop_last)

    def _batches(self, log: LogReader, source: EpochSource | FollowSource, batch: int, drop_last: bool) -> Batches:
        if isinstance(batch, bool) or not isinstance(batch, int) or batch < 1:
            raise UsageError(f"batch is a positive number of transitions, not {batch!r}")
        return Batches(self._client, self._names, self.schema, log, source, batch, drop_last)

    async def _run(self, run: int | Run | None) -> int:
        if run is not None:
            return _number(run)
        latest = await self.latest_run()
        if latest is None:
            raise ReplayGone(f"no run of {self.name!r} was begun", replay=self.name)
        return latest.run


def _number(run: int | Run) -> int:
    return run if isinstance(run, int) else run.run
