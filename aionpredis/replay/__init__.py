"""Replay: transitions from many actors for one or more learners, through data keys and one commit log.

``schema`` the columns · ``chunk`` the buffers · ``log`` the commits · ``runs`` begin and delete · ``actor`` and ``lanes``
write, ``commit`` sends, ``entries`` come back after a failover, ``lag`` holds back · ``reader`` reads whole chunks ·
``sampler`` draws transitions, by a ``selection`` from an ``index``, and ``fetch``es them · ``checkpoint`` saves and restores ·
``observer`` looks on. Built on the client alone; no code runs on the server.
"""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from aionpredis.errors import AionpredisError, ReplayGone, RunConflict, ServerFull, UsageError
from aionpredis.memory import Empty, aligned_empty
from aionpredis.names import check_name, is_count
from aionpredis.policy import Policy
from aionpredis.replay import checkpoint, runs
from aionpredis.replay.actor import Actor, ActorStats
from aionpredis.replay.group import GroupSource
from aionpredis.replay.lag import Progress
from aionpredis.replay.lanes import VectorActor
from aionpredis.replay.log import Begin as Run
from aionpredis.replay.log import ChunkId, LogReader, Names
from aionpredis.replay.reader import (
    Batches,
    DrawSource,
    EpochSource,
    FollowSource,
    Position,
    ReadStats,
    Source,
    where_ended,
)
from aionpredis.replay.sampler import NStep, Sample, Sampler, SampleStats
from aionpredis.replay.schema import MAX_CHUNK_BYTES, Schema
from aionpredis.replay.selection import Fifo, Lifo, Newest, Prioritized, Selection, Shuffled, Uniform
from aionpredis.replicas import Replicas
from aionpredis.streams import RIGHT_MAX

if TYPE_CHECKING:
    from aionpredis.client import Client

__all__ = [
    "Actor",
    "ActorStats",
    "Batches",
    "Fifo",
    "Lifo",
    "NStep",
    "Newest",
    "Position",
    "Prioritized",
    "ReadStats",
    "Replay",
    "Run",
    "Sample",
    "SampleStats",
    "Sampler",
    "Schema",
    "Selection",
    "Shuffled",
    "Uniform",
    "VectorActor",
]


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

    ``capacity``: transitions that a run keeps, for off-policy learning; the oldest chunks are deleted by the actors, every
    16th commit or so. Counted in chunks, a partial one as a full one. The same number for all actors and learners.

    ``max_lag``: transitions of a run that may be committed and not yet read by the slowest of its learners; beyond that
    the actors wait. Learners are those that ``follow`` or sample, told apart by which of both they do and by their ``shard=``;
    nobody waits for those that ``consume``, so they need one of these beside them. An actor waits when a chunk is full: one
    that calls ``flush`` before is never held. The same number for all actors and learners.

    ``replicas``: actors acknowledge a transition when so many replicas of each primary server have it, too (command ``WAIT``,
    over connections of each actor's own): then a failover loses nothing of it. So does :meth:`restore`. 0: when the primary has
    it.

    ``empty``: makes the memory that batches are received into, ``empty(nbytes)`` as uint8, shape ``(nbytes,)``; for example
    pinned, for a GPU: :func:`aionpredis.frameworks.torch.pinned_empty`. It is used again once nobody refers to it.

    The server must not evict keys by itself (``maxmemory-policy noeviction``): see :meth:`begin_run`.
    """

    def __init__(
        self,
        client: Client,
        name: str,
        schema: Schema,
        *,
        chunk: int = 16,
        lease: float = 60.0,
        capacity: int | None = None,
        max_lag: int | None = None,
        replicas: int = 0,
        empty: Empty = aligned_empty,
    ) -> None:
        if not isinstance(schema, Schema):
            raise UsageError(f"the schema of a replay is an aionpredis.Schema, not {type(schema).__name__}")
        if not is_count(chunk):
            raise UsageError(f"chunk is a positive number of transitions, not {chunk!r}")
        if chunk > schema.max_chunk:
            raise UsageError(
                f"chunk={chunk} makes {schema.row_nbytes * chunk:,} bytes: at most {MAX_CHUNK_BYTES:,}; choose a smaller one"
            )
        if not 0.1 <= lease <= 86_400:
            raise UsageError(f"lease is 0.1 to 86400 seconds, not {lease!r}")
        for option, value in (("capacity", capacity), ("max_lag", max_lag)):
            if not (value is None or is_count(value, chunk)):
                raise UsageError(f"{option} is a number of transitions, a chunk ({chunk}) or more, not {value!r}")
        self.schema = schema
        self.policy = Policy(client, name)
        self._client = client
        self._names = Names(name)
        self._chunk = chunk
        self._lease = lease
        self._capacity = -(-(capacity or 0) // chunk)  # in chunks
        self._max_lag = -(-(max_lag or 0) // chunk)
        self._replicas = None if type(replicas) is int and replicas == 0 else Replicas(client, replicas)
        self._empty = empty
        self._beginning: runs.Beginning | None = None  # of the run that was begun here

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
            RunConflict: another trainer began this run. ``weights`` were published, and are deleted again.
            ReplayGone: the replay was deleted meanwhile. ``weights`` as before.
            ReplayError: the server may evict keys by itself.
            ServerFull: no memory is left for the log or the policy, and no run to delete.
        """
        _check_count("keep", keep, "runs")
        await runs.check_eviction(self._client, self._names)
        # Before it begins: the actors that join it say their names anew.
        await self._client.call("UNLINK", self._names.actors, repeatable=True)
        version = 0
        while True:
            try:
                if weights is not None and not version:
                    version = await self.policy.publish(weights)
                run = await runs.begin(
                    self._client,
                    self._names,
                    policy=version,
                    schema=self.schema.digest,
                    above=0 if self._beginning is None else self._beginning.begin.run,
                )
                break
            except ServerFull:  # for SET and XADD; UNLINK is not refused
                if not await runs.delete_oldest(self._client, self._names):
                    raise
            except (RunConflict, ReplayGone):
                if version:
                    with suppress(AionpredisError):
                        await self.policy._withdraw(version)
                raise
        self._beginning = runs.Beginning(self._client, self._names, run)
        await self.delete_runs_before(max(1, run.run - keep + 1))
        return run

    async def latest_run(self) -> Run | None:
        """The newest run; ``None`` if none was ever begun."""
        while True:
            run = await runs.latest(self._client, self._names)
            mine = self._beginning
            if mine is None or not mine.doubtful:
                return run
            if not await mine.confirm() and self._beginning is mine:
                self._beginning = None  # a failover has lost it, and its number is another run's

    async def delete_runs_before(self, run: int | Run) -> int:
        """Delete the data of all runs before this one; how many chunks were deleted. Finishes what a crash interrupted.

        As all that deletes runs, it deletes again what a failover has brought back of what this client deleted before.
        """
        return await runs.delete_below(self._client, self._names, _number(run))

    async def drop(self, run: int | Run) -> int:
        """Delete one run, which is not the newest; how many chunks were deleted. After a crash, call it again.

        Raises:
            UsageError: it is the newest run: actors may be appending to it.
        """
        latest = await self.latest_run()
        if latest is not None and _number(run) >= latest.run:
            raise UsageError(f"run {_number(run)} is the newest: begin another one before dropping it, or delete() all")
        return await runs.drop(self._client, self._names, _number(run))

    async def delete(self) -> None:
        """Delete the replay: the data of all runs, the policy, and the log at last. After a crash, call it again.

        From its first step on the server refuses every commit. Actors get :class:`ReplayGone` or :class:`RunEnded`; one
        that calls ``join()`` then waits until a trainer begins a replay of this name anew.
        """
        await runs.delete(self._client, self._names)

    async def leftover_keys(self, before: int | Run) -> list[bytes]:
        """Data keys of runs before this one that are still there. Of deleted runs there is none after one lease.

        Looks at every key of the server: for checks.
        """
        return await runs.leftover_keys(self._client, self._names, below=_number(before))

    # --- actors and learners -----------------------------------------------------------------------------------------

    def actor(self, name: str | None = None) -> Actor:
        """One writer of transitions, for ``async with``. ``name``: for people only (``aionpredis watch``), by default host and
        process; each start is an identity of its own.
        """
        return Actor(
            self._client,
            self._names,
            self.schema,
            name or f"{os.uname().nodename if hasattr(os, 'uname') else 'host'}-{os.getpid()}",
            chunk=self._chunk,
            lease=self._lease,
            capacity=self._capacity,
            max_lag=self._max_lag,
            replicas=self._replicas,
        )

    def vector_actor(self, lanes: int, name: str | None = None) -> VectorActor:
        """Actors for a vectorized environment, for ``async with``: ``append`` takes each column as ``(lanes, *shape)``."""
        _check_count("lanes", lanes, "lanes")
        return VectorActor([self.actor(name) for _ in range(lanes)])

    async def count(self, run: int | Run | None = None) -> int:
        """How many transitions are committed to the run (default: the newest)."""
        log = self._log(await self._run(run))
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
        after: Batches | Iterable[int] | None = None,
        shard: tuple[int, int] | None = None,
    ) -> Batches:
        """Everything that is committed to the run (default: the newest) now, each transition once, in batches::

            async for batch in await replay.epoch(batch=256):
                train(batch["state"], batch["action"])

        ``shuffle``: chunks in random order, the same for the same ``seed`` and content; the transitions within a chunk
        stay together. ``drop_last``: leave out a last, shorter batch. ``after``: an earlier reader of this run that has
        come to its end, or the :attr:`~Batches.position` of one; what it has handed out is left out, what its ``drop_last``
        left out is not. ``shard``: ``(i, n)`` is the i-th of n learners, 0 the first, that share the run: each chunk goes to
        exactly one of them; by default the whole run, or the share of the reader that is ``after``.

        Raises:
            UsageError: ``after`` is a reader that has not come to its end, has read another run or share, or is one of
                :meth:`consume`.
        """
        number = await self._run(run)
        position: Position | None
        rest: list[ChunkId] = []
        if isinstance(after, Batches):
            _check_after(after.run, number)
            log, position, rest = where_ended(after)
            if shard is not None and _shard(shard) != log.shard:
                raise UsageError(f"after= has read shard={log.shard}, not {shard}")
        else:
            position = _position(after, number)
            log = self._log(number, (0, 1) if shard is None else shard, position)
        # What a shuffled reader has left out lies between what it has handed out: no position tells them apart.
        in_order = not shuffle and position is not None
        source = EpochSource(log, np.random.default_rng(seed) if shuffle else None, rest, in_order=in_order)
        return self._batches(log, source, batch, drop_last, position)

    async def follow(
        self,
        run: int | Run | None = None,
        *,
        batch: int = 256,
        drop_last: bool = False,
        after: Iterable[int] | None = None,
        shard: tuple[int, int] = (0, 1),
    ) -> Batches:
        """The run's transitions as they are committed, each once; ends when the run has ended::

            batches = await replay.follow(run, after=position)  # None for the first time
            async for batch in batches:
                train(batch)
                position = batches.position  # to be stored together with the result, for the next process

        Otherwise as :meth:`epoch`.
        """
        number = await self._run(run)
        position = _position(after, number)
        log = self._log(number, shard, position)
        return self._batches(log, FollowSource(log), batch, drop_last, position, self._progress("follow", log))

    async def consume(
        self, run: int | Run | None = None, *, group: str, batch: int = 256, reclaim: float = 60.0
    ) -> Batches:
        """The run's transitions, shared among all readers of this ``group`` as they come for them; ends when the run has
        ended and everything is acknowledged::

            batches = await replay.consume(group="learners")
            async for batch in batches:
                train(batch["state"], batch["action"])
                await batches.acknowledge()

        **At least once**: what a reader took and did not acknowledge within ``reclaim`` seconds (it died, or was slow) goes
        to another one of the group. A batch is shorter when nothing has come for a second (a quarter of ``reclaim``, if that is
        less), and at the run's end. By a consumer group of the server's; readers that need each chunk exactly once share by
        ``shard=``. How far the group is holds no actor back: ``max_lag`` does not count it.
        """
        log = self._log(await self._run(run))
        source = GroupSource(self._client, self._names, log, check_name(group), reclaim=reclaim)
        return self._batches(log, source, batch, False, None)

    def _progress(self, kind: str, log: LogReader) -> Progress | None:
        if not self._max_lag:
            return None
        index, learners = log.shard
        # Not a name for each start: one that is gone for good would hold the actors for ever.
        return Progress(self._client, self._names, log.run, f"{kind}:{index}/{learners}")

    async def draw_chunks(
        self,
        run: int | Run | None = None,
        *,
        batch: int = 256,
        seed: int | None = None,
        shard: tuple[int, int] = (0, 1),
    ) -> Batches:
        """Batches of the run's transitions for ever: whole chunks, drawn uniformly with replacement.

        Each transition has the same share, but those of a chunk come together, so a batch of 256 from chunks of 16 holds
        16 independent draws. That makes it as fast as :meth:`epoch`; :meth:`sampler` draws each transition on its own.
        """
        log = self._log(await self._run(run), shard)
        source = DrawSource(log, np.random.default_rng(seed), self._capacity)
        return self._batches(log, source, batch, False, _position(None, log.run))

    async def sampler(
        self,
        run: int | Run | None = None,
        *,
        batch: int = 256,
        selection: Selection | None = None,
        columns: Sequence[str] | None = None,
        length: int = 1,
        n_step: NStep | None = None,
        max_times_sampled: int = 0,
        min_size: int = 1,
        samples_per_insert: float = math.inf,
        tolerance: float = 0.0,
        seed: int | None = None,
        shard: tuple[int, int] = (0, 1),
    ) -> Sampler:
        """Samples of the run (default: the newest), while actors append to it::

            sampler = await replay.sampler(batch=256, selection=Prioritized(), n_step=NStep(3, discount=0.99))
            async for batch in sampler:
                errors = train(batch["state"], batch["action"], batch["return"], batch["next_state"], batch.weights)
                sampler.update_priorities(batch.ids, abs(errors))

        ``selection``: :class:`Uniform` (default), :class:`Prioritized`, :class:`Shuffled` (without replacement),
        :class:`Newest`, :class:`Fifo`, :class:`Lifo`; the instance belongs to this sampler. ``columns``: only these (default:
        all). ``length``: slices of so many consecutive transitions of one trajectory, that never cross the end of an
        episode. ``n_step``: see :class:`NStep`.

        Limits: ``max_times_sampled``: after so many samples a transition is not drawn any more, nor counted; 0: no limit. It is
        still there for those that it follows (``length``, ``n_step``). ``min_size``: :meth:`~Sampler.sample` waits until so
        many transitions are there. ``samples_per_insert``: it also waits rather than draw more transitions than this for each
        appended one, plus ``tolerance``.
        """
        _check_count("batch", batch)
        _check_count("length", length)
        _check_count("min_size", min_size)
        if not is_count(max_times_sampled, 0):
            raise UsageError(f"max_times_sampled is a number of samples, or 0 for no limit, not {max_times_sampled!r}")
        if not samples_per_insert > 0 or not tolerance >= 0:
            raise UsageError(
                f"samples_per_insert is positive and tolerance not negative, not {samples_per_insert!r}, {tolerance!r}"
            )
        _, learners = _shard(shard)
        share = f"{{}} transitions of its share of 1/{learners}" if learners > 1 else "{} transitions"
        if self._capacity and min_size * learners > self._capacity * self._chunk:
            raise UsageError(
                f"sample() waits for {share.format(min_size)} (min_size), and of the run the last "
                f"{self._capacity * self._chunk} are kept: make capacity larger"
            )
        if self._max_lag and not math.isinf(samples_per_insert):  # else what was seen counts as read
            least = max(min_size, math.ceil((batch - tolerance) / samples_per_insert))
            if least * learners > self._max_lag * self._chunk:
                raise UsageError(
                    f"sample() waits for {share.format(least)} (min_size, samples_per_insert), and the actors stop at "
                    f"max_lag={self._max_lag * self._chunk}: make max_lag larger"
                )
        log = self._log(await self._run(run), shard)
        return Sampler(
            self._client,
            self._names,
            self.schema,
            log,
            self._progress("sampler", log),
            capacity=self._capacity,
            batch=batch,
            selection=selection,
            columns=columns,
            length=length,
            n_step=n_step,
            max_times_sampled=max_times_sampled,
            min_size=min_size,
            samples_per_insert=samples_per_insert,
            tolerance=tolerance,
            seed=seed,
            empty=self._empty,
        )

    def _batches(
        self,
        log: LogReader,
        source: Source,
        batch: int,
        drop_last: bool,
        position: Position | None,
        progress: Progress | None = None,
    ) -> Batches:
        _check_count("batch", batch)
        return Batches(
            self._client,
            self._names,
            self.schema,
            log,
            source,
            batch,
            drop_last,
            position,
            progress,
            empty=self._empty,
        )

    def _log(self, run: int, shard: tuple[int, int] = (0, 1), after: Position | None = None) -> LogReader:
        mine = self._beginning is not None and self._beginning.begin.run == run
        return LogReader(
            self._client,
            self._names,
            run,
            _shard(shard),
            after=(0, 0) if after is None else after[1:],
            max_rows=self.schema.max_chunk,
            beginning=self._beginning if mine else None,
        )

    async def _run(self, run: int | Run | None) -> int:
        if run is not None:
            return _number(run)
        latest = await self.latest_run()
        if latest is None:
            raise ReplayGone(f"no run of {self.name!r} was begun", replay=self.name)
        return latest.run

    # --- checkpoints -------------------------------------------------------------------------------------------------

    async def save(
        self,
        folder: str | os.PathLike[str],
        run: int | Run | None = None,
        *,
        progress: checkpoint.Progress | None = None,
        extra: checkpoint.Extra | None = None,
    ) -> int:
        """Save a run (default: the newest) and the newest policy as a new folder of ``.safetensors`` files.

        What is committed now is saved, in its order; how many transitions that are. Actors may go on. A chunk that is
        evicted meanwhile is left out and counted in ``replay.json``. Files of 64 MB, each a bundle of chunks with their
        columns ``(transitions, *shape)``: see :mod:`aionpredis.replay.checkpoint`.

        ``progress(done, all)``: called with numbers of transitions. ``extra``: arrays to save with them, by file and
        name; :func:`aionpredis.replay.checkpoint.load_extra` reads them back. Do not write to them before this returns.

        After an error, or cancelled, there is no such folder.

        Raises:
            UsageError: the folder exists already, or the one that it shall be in does not.
            ReplayGone: there is no such run (any more).
            SchemaMismatch: the run has other columns.
            EncodeError: an array of ``extra`` cannot stand in a record.
        """
        number = await self._run(run)
        facts = await checkpoint.save(
            self._client, self._names, self.schema, number, Path(folder), progress=progress, extra=extra
        )
        return int(facts["transitions"])

    async def restore(
        self, folder: str | os.PathLike[str], *, keep: int = 1, progress: checkpoint.Progress | None = None
    ) -> Run:
        """Begin the next run, with the policy and all transitions of a saved one: the same chunks, in the same order.

        The folder is looked through before anything is written. ``keep``: as for :meth:`begin_run`. If this is cancelled
        or fails half-way, the run holds fewer transitions; data without a log entry is gone after one lease.

        Raises:
            UsageError: the folder, or a file in it, is missing.
            CorruptValue: a file was damaged.
            SchemaMismatch: it was saved with other columns; the message names one.
            RunEnded, ReplayGone: another trainer began a newer run meanwhile, or deleted the replay.
            ServerFull: the server had no room for one lease.
            NotReplicated: fewer replicas than the replay wants have acknowledged it.
            RunConflict, ReplayError: as for :meth:`begin_run`.
        """
        _check_count("keep", keep, "runs")
        saved = await checkpoint.look_through(Path(folder), self.name, self.schema)
        async with AsyncExitStack() as stack:
            sender = self._client
            if self._replicas is not None:
                sender = await stack.enter_async_context(sender.twin())
                await self._replicas.check(sender.topology.shards)
            run = await self.begin_run(saved.weights, keep=keep)
            await saved.write(
                sender, self._names, run.run, lease=self._lease, replicas=self._replicas, progress=progress
            )
        return run


def _position(after: Iterable[int] | None, run: int) -> Position:
    if after is None:
        return Position(run, 0, 0)
    try:
        position = Position(*map(operator.index, after))
    except TypeError:  # not a sequence, not of ints, not three of them
        raise UsageError(f"after= is a reader's position, three ints, not {after!r}") from None
    _check_after(position.run, run)
    return position


def _check_after(read: int, run: int) -> None:
    if read != run:
        raise UsageError(f"after= has read run {read}, not {run}")


def _shard(shard: tuple[int, int]) -> tuple[int, int]:
    try:
        index, learners = (operator.index(number) for number in shard if not isinstance(number, bool))
        if 0 <= index < learners:
            return index, learners
    except (TypeError, ValueError):  # not a sequence, not of ints, not two of them
        pass
    raise UsageError(f"shard=(i, n) is the i-th of n learners, 0 the first, not {shard!r}")


def _check_count(name: str, value: object, what: str = "transitions") -> None:
    if not is_count(value):
        raise UsageError(f"{name} is a positive number of {what}, not {value!r}")


def _number(run: int | Run) -> int:
    number = run.run if isinstance(run, Run) else run
    if not (is_count(number) and number <= RIGHT_MAX):
        raise UsageError(f"a run is an aionpredis.Run or its number, not {run!r}")
    return number
