"""Samples of a run: transitions, slices or n-step targets, drawn by a selection, while actors append."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from aionpredis.errors import RunEnded, UsageError
from aionpredis.memory import Empty, Recycler
from aionpredis.names import is_count
from aionpredis.replay.fetch import Arrays, Fetcher
from aionpredis.replay.index import Ids, Index
from aionpredis.replay.lag import Progress
from aionpredis.replay.log import ChunkId, LogReader, Names, look_again
from aionpredis.replay.schema import Schema
from aionpredis.replay.selection import Prioritized, Selection, Shuffled, Uniform

if TYPE_CHECKING:
    from aionpredis.client import Client

__all__ = ["NStep", "Sample", "SampleStats", "Sampler"]

MIN_IDLE = 1024
"""Transitions that were used up since chunks nobody draws from were looked for: then it is done again, if not later."""

REFRESH_SECONDS = 0.01
"""How long what is known of the log may be old. Looking takes ~0.1 ms, 256 transitions of 12.8 kB take 1.5."""


@dataclass(frozen=True)
class NStep:
    """Samples get what n-step learning needs; `gamma` is ``discount``.

    ``return``, float32: the discounted sum of up to ``steps`` rewards, to the end of the episode at most. ``discount``,
    float32: what the value of the state behind them is to be multiplied with, 0 where the episode terminated.
    ``next_<column>`` for each of ``columns``: that state. Where an episode was truncated the state behind it is not known,
    so the last one that is takes its place, and its reward is left out; the truncated transition itself is never drawn.

    Stored columns of these names have to be left out, by ``columns=`` of the sampler.
    """

    steps: int = 1
    discount: float = 0.99
    columns: Sequence[str] = ("state",)
    reward: str = "reward"

    def __post_init__(self) -> None:
        if not (is_count(self.steps) and 0 <= self.discount <= 1):
            raise UsageError(f"n-step learning takes 1 step or more and a discount of 0 to 1, not {self}")
        if isinstance(self.columns, str):
            raise UsageError(f"columns= of n-step learning are names, not {self.columns!r}")


class Sample(dict[str, NDArray[Any]]):
    """Arrays by column, and ``ids``: int64, shape ``(batch,)``, the transitions' numbers in the run, for
    :meth:`Sampler.update_priorities`; ``weights``: float32, shape ``(batch,)``, importance weights, 1 if not prioritized.
    """

    ids: Ids
    weights: NDArray[np.float32]


@dataclass
class SampleStats:
    """``transitions``: known, present and not used up; ``inserted``: seen in the log so far; ``sampled``: drawn; ``lost``: of
    chunks that were gone from the server when they were wanted (evicted, or the run was dropped); ``waits``: samples that a
    limit held back.
    """

    transitions: int = 0
    inserted: int = 0
    sampled: int = 0
    lost: int = 0
    waits: int = 0


class Sampler:
    """``await sampler.sample()``, or ``async for batch in sampler``. Made by :meth:`aionpredis.Replay.sampler`.

    Batches are contiguous, of memory that nobody else refers to; memory of one that is not referred to any more is used
    again. A cancelled call writes nothing any more. For one task at a time.
    """

    def __init__(
        self,
        client: Client,
        names: Names,
        schema: Schema,
        log: LogReader,
        progress: Progress | None,
        *,
        capacity: int,
        batch: int,
        selection: Selection | None,
        columns: Sequence[str] | None,
        length: int,
        n_step: NStep | None,
        max_times_sampled: int,
        min_size: int,
        samples_per_insert: float,
        tolerance: float,
        seed: int | None,
        empty: Empty,
    ) -> None:
        if isinstance(selection, type) or not (selection is None or hasattr(selection, "draw")):
            raise UsageError(f"selection= is an instance, such as Uniform(), not {selection!r}")
        if not (n_step is None or isinstance(n_step, NStep)):
            raise UsageError(f"n_step= is an NStep, not {n_step!r}")
        self._client = client
        self._schema = schema
        self._names = names
        self._log = log
        self._progress = progress
        self._capacity = capacity  # chunks
        self._batch = batch
        self._selection: Selection = Uniform() if selection is None else selection
        self._columns = _columns(schema, columns)
        self._length = length
        self._n_step = n_step
        self._max_times = max_times_sampled
        self._min_size = min_size
        self._ratio = samples_per_insert
        self._tolerance = tolerance
        self._rng = np.random.default_rng(seed)
        self._index = Index()
        self._found: list[ChunkId] = []  # by a reading of the log that was cancelled between its pages
        self._drawn: list[Ids] = []  # and not handed out yet
        self._times: dict[int, int] = {}
        self._behind = max(length - 1, 0 if n_step is None else n_step.steps)
        """How many transitions a sample needs behind the one that is drawn, at most."""
        self._hopeless: list[Ids] = []  # seen while drawing: their episode ends before a slice of it would
        self._used_up = 0  # transitions that are there for those that they follow only
        self._idle_at = MIN_IDLE  # so many of them, and it is time to look which of them nobody needs
        self._fetcher = Fetcher(client, names, schema, log.run, self._index)
        self._empty = empty
        self._recyclers: dict[tuple[str, int], Recycler] = {}
        self._looked = -math.inf
        self._stats = SampleStats()
        if n_step is not None:
            _check_n_step(n_step, schema, self._columns)

    @property
    def stats(self) -> SampleStats:
        self._stats.transitions = len(self)
        return self._stats

    @property
    def run(self) -> int:
        """The run that is sampled."""
        return self._log.run

    def __len__(self) -> int:
        """How many transitions are known, present and not used up (``max_times_sampled``)."""
        return self._index.present_count - self._used_up

    def __aiter__(self) -> Sampler:
        return self

    async def __anext__(self) -> Sample:
        return await self.sample()

    async def refresh(self) -> int:
        """Read the log; how many transitions are new."""
        await self._log.read_all(self._found)
        self._looked = time.monotonic()
        chunks, self._found = self._found, []
        return self._add(chunks)

    async def sample(self) -> Sample:
        """The next batch: by column shape ``(batch, *shape)``, with ``length`` ``(batch, length, *shape)``.

        Waits while a limit is not met, or nothing is there to be drawn.

        Raises:
            RunEnded: a newer run has begun, so what is waited for will never come.
            SchemaMismatch, ServerError, ConnectionLost, ConnectError: as for :meth:`aionpredis.Client.get`.
        """
        if time.monotonic() - self._looked > REFRESH_SECONDS:
            await self.refresh()
        await self._report(now=False)
        await self._wait_for_limits()
        out = self._allocate()
        self._put_back(self._drawn)  # by a sample that was cancelled or failed
        ids = np.zeros(self._batch, np.int64)
        weights = np.ones(self._batch, np.float32)
        open_rows = np.arange(self._batch)  # rows that have to be drawn (again)
        while len(open_rows):
            ids[open_rows] = await self._draw(len(open_rows), np.delete(ids, open_rows))
            if isinstance(self._selection, Prioritized):
                weights[open_rows] = self._selection.weights(ids[open_rows])
            found = await self._receive(ids[open_rows], out, open_rows)
            open_rows = open_rows[~found]
            lost = ids[open_rows]
            await self._lose(lost[~self._index.is_barred(lost)])
            self._put_back([lost])  # it may have been there when it was looked for again
        self._drawn = []
        batch = Sample(out)
        batch.ids, batch.weights = ids, weights
        self._stats.sampled += len(ids)
        self._use_up(ids)
        return batch

    def update_priorities(self, ids: Ids, priorities: NDArray[np.floating]) -> None:
        """Priorities, such as the absolute TD errors of a batch, for transitions of earlier batches; those that are not
        present any more, or used up, are passed over.

        Raises:
            UsageError: the selection is not :class:`Prioritized`, ``ids`` are no integers, or a priority is negative, not
                finite or too large for ``alpha``; nothing was changed.
        """
        if not isinstance(self._selection, Prioritized):
            raise UsageError(
                f"update_priorities() is for selection=Prioritized(), not {type(self._selection).__name__}"
            )
        ids = np.asarray(ids)
        if ids.size and ids.dtype.kind not in "iu":
            raise UsageError(f"ids are those of a batch, integers, not {ids.dtype}")
        ids = ids.astype(np.int64, copy=False)
        try:
            priorities = np.asarray(priorities, np.float64)
        except (TypeError, ValueError) as error:
            raise UsageError(f"priorities are numbers: {error}") from None
        if ids.shape != priorities.shape:
            raise UsageError(f"one priority for each transition: {ids.shape} and {priorities.shape}")
        known = self._index.is_open(ids)
        self._selection.update(ids[known], priorities[known])

    # --- what is known -------------------------------------------------------------------------------------------------

    def _add(self, chunks: Sequence[ChunkId]) -> int:
        if not chunks:
            return 0
        ids = self._index.add(chunks)
        self._selection.add(ids, self._index)
        self._stats.inserted += len(ids)
        if self._capacity:
            # They are evicted by now, or will be soon.
            self._discard(self._index.committed_until(chunks[-1].entry - self._capacity))
        return len(ids)

    def _discard(self, ids: Ids) -> int:
        """How many of them were not used up."""
        before = len(self)
        self._bar(ids)  # of what is barred the selection knows nothing any more
        gone = self._index.discard(ids)
        for number in gone.tolist() if self._times else ():
            self._used_up -= self._times.pop(number, 0) >= self._max_times
        return before - len(self)

    def _bar(self, ids: Ids) -> None:
        """They are not drawn any more. Their priorities would count for the largest weight, though nothing changes them."""
        self._selection.remove(self._index.bar(ids))

    async def _lose(self, ids: Ids) -> None:
        """Chunks that samples from these transitions on need were not on the server."""
        if not len(ids):
            return
        path = self._index.follow(ids, self._behind + 1)
        gone = [np.zeros(0, np.int64)]
        evictions = losses = 0
        for number in np.unique(self._index.locate(path[path >= 0])[0]).tolist():
            chunk = self._index.chunk(number)
            value, evicted = await look_again(self._client, self._names, self.run, chunk)
            if value is not None:
                continue  # drawn again some time
            evictions += evicted
            losses += not evicted
            self._log.miss(chunk, evicted)
            gone.append(self._index.rows(number))
        self._client.counters.evicted += evictions
        self._client.counters.lost += losses
        self._stats.lost += self._discard(np.concatenate(gone))

    def _use_up(self, ids: Ids) -> None:
        """They were sampled once more."""
        if not self._max_times:
            return
        ids = ids[self._index.is_present(ids)]  # the capacity may have moved on meanwhile
        for number in ids.tolist():
            self._times[number] = self._times.get(number, 0) + 1
        used = np.array([i for i in set(ids.tolist()) if self._times[i] >= self._max_times], np.int64)
        self._used_up += len(used)
        if not self._behind:
            self._discard(used)
            return
        self._bar(used)
        if self._used_up >= self._idle_at:
            self._discard(self._index.idle(self._behind))
            # It looks at all that is present.
            self._idle_at = self._used_up + max(MIN_IDLE, self._index.present_count // 4)

    # --- limits --------------------------------------------------------------------------------------------------------

    def _held_back(self) -> bool:
        if len(self) < self._min_size:
            return True
        if math.isinf(self._ratio):
            return False
        return self._stats.sampled + self._batch > self._ratio * self._stats.inserted + self._tolerance

    async def _wait_for_limits(self) -> None:
        self._stats.waits += self._held_back()
        while self._held_back():
            await self._wait_for_more()

    async def _report(self, *, now: bool, drawn_out: bool = False) -> None:
        """Tell the actors how far this learner is: it has seen what the samples so far entitle it to; all that it knows, if
        nothing is left to be drawn, since not each transition can be, so that the samples would never come up to them.
        """
        if self._progress is None or not self._index.chunk_count:
            return
        entry = self._log.entry
        if not math.isinf(self._ratio) and not drawn_out:
            used = int(self._stats.sampled / self._ratio)
            low, high = self._index.span
            if used < high:
                chunk, _ = self._index.locate(np.array([max(low, used)]))
                entry = self._index.chunk(int(chunk[0])).entry - 1
        await self._progress.note(entry, now=now)

    async def _wait_for_more(self, *, drawn_out: bool = False) -> None:
        await self._report(now=True, drawn_out=drawn_out)
        if self._log.ended:
            raise RunEnded(
                f"run {self.run} has ended: nothing more will be appended to it", replay=self._names.name, run=self.run
            )
        self._add(await self._log.read(wait=True))

    # --- drawing ---------------------------------------------------------------------------------------------------------

    async def _draw(self, count: int, beside: Ids) -> Ids:
        """``count`` transitions; waits if there are not enough. ``beside``: what the batch has already."""
        self._drawn = [beside]
        missing = count
        while missing:
            taken = np.concatenate(self._drawn)
            ids = self._selection.draw(missing, self._index, partial(self._eligible, taken), self._rng)
            hopeless, self._hopeless = self._hopeless, []
            for one in hopeless:  # not while the selection draws
                self._bar(one)
            ids = self._within_times(ids, taken)
            if not len(ids):
                await self._wait_for_more(drawn_out=True)
                # The capacity may have moved on meanwhile.
                self._drawn[1:] = [one[self._index.is_present(one)] for one in self._drawn[1:]]
            self._drawn.append(ids)
            missing = count - sum(map(len, self._drawn[1:]))
        return np.concatenate(self._drawn[1:])

    def _put_back(self, drawn: list[Ids]) -> None:
        """What is not handed out, for the one selection that draws nothing twice. What is gone it passes over."""
        if isinstance(self._selection, Shuffled) and any(map(len, drawn)):
            self._selection.put_back(np.concatenate(drawn))

    def _eligible(self, taken: Ids, ids: Ids) -> NDArray[np.bool_]:
        eligible = self._index.is_open(ids) if self._behind else self._index.is_present(ids)
        if self._max_times and len(taken):
            used_up = [i for i, n in _counts(taken).items() if self._times.get(i, 0) + n >= self._max_times]
            eligible &= ~np.isin(ids, used_up)
        if self._behind:
            chosen = np.flatnonzero(eligible)
            eligible[chosen] = self._has_followers(ids[chosen])
        return eligible

    def _within_times(self, ids: Ids, taken: Ids) -> Ids:
        """Those that do not exceed ``max_times_sampled`` when one was drawn several times at once."""
        if not self._max_times:
            return ids
        counts = _counts(taken)
        kept: list[int] = []
        for number in ids.tolist():
            counts[number] = counts.get(number, 0) + 1
            if self._times.get(number, 0) + counts[number] <= self._max_times:
                kept.append(number)
        return np.array(kept, np.int64)

    def _has_followers(self, ids: Ids) -> NDArray[np.bool_]:
        """Whether all that a sample needs behind these transitions is present. Where it will never be is noted."""
        fits = np.ones(len(ids), np.bool_)
        if self._length > 1:
            path = self._index.follow(ids, self._length)
            over = self._index.ends(path[:, :-1]).any(axis=1)
            if over.any():
                self._hopeless.append(ids[over])
            fits &= (path >= 0).all(axis=1) & ~over
        if self._n_step is not None:
            path = self._index.follow(ids, self._n_step.steps + 1)
            _, bootstrap = self._windows(path)
            fits &= bootstrap >= 0
        return fits

    def _windows(self, path: Ids) -> tuple[Ids, Ids]:
        """For each n-step path: the step with which the episode ends (``steps``: behind it), and the transition whose
        state stands behind the window, or which ended it.
        """
        steps = path.shape[1] - 1
        ends = self._index.ends(path[:, :steps])
        last = np.where(ends.any(axis=1), ends.argmax(axis=1), steps)
        return last, np.take_along_axis(path, last[:, None], axis=1)[:, 0]

    # --- receiving -------------------------------------------------------------------------------------------------------

    def _allocate(self) -> Arrays:
        out = {name: self._array(name, name, self._batch * self._length) for name in self._columns}
        if self._length > 1:
            out = {name: array.reshape(self._batch, self._length, *array.shape[1:]) for name, array in out.items()}
        if self._n_step is not None:
            out |= {f"next_{name}": self._array(f"next_{name}", name, self._batch) for name in self._n_step.columns}
            out["return"] = np.zeros(self._batch, np.float32)
            out["discount"] = np.zeros(self._batch, np.float32)
        return out

    def _array(self, key: str, name: str, rows: int) -> NDArray[Any]:
        dtype, shape = self._schema[name]
        size = rows * dtype.itemsize * math.prod(shape)
        recycler = self._recyclers.setdefault((key, size), Recycler(size, self._empty))
        return recycler.take().view(dtype).reshape(rows, *shape) if size else np.empty((rows, *shape), dtype)

    async def _receive(self, ids: Ids, out: Arrays, rows: Ids) -> NDArray[np.bool_]:
        """Fetch what belongs to these transitions into those rows of the batch; ``False`` where something is gone."""
        path = self._index.follow(ids, self._length)
        found = await self._fetch(path.reshape(-1), {name: out[name] for name in self._columns}, rows)
        complete: NDArray[np.bool_] = np.logical_and.reduce(found.reshape(len(ids), self._length), axis=1)
        if self._n_step is not None:
            complete &= await self._receive_n_step(self._n_step, ids, out, rows)
        return complete

    async def _fetch(self, ids: Ids, columns: Arrays, rows: Ids) -> NDArray[np.bool_]:
        """Into all rows in place; into some of them by way of a copy."""
        if len(rows) == self._batch:
            flat = {name: array.reshape(len(ids), *self._schema[name][1]) for name, array in columns.items()}
            return await self._fetcher.fetch(ids, flat)
        part = {name: np.empty((len(ids), *self._schema[name][1]), self._schema[name][0]) for name in columns}
        found = await self._fetcher.fetch(ids, part)
        for name, array in part.items():
            columns[name][rows] = array.reshape(len(rows), *columns[name].shape[1:])
        return found

    async def _receive_n_step(self, n_step: NStep, ids: Ids, out: Arrays, rows: Ids) -> NDArray[np.bool_]:
        steps = n_step.steps
        path = self._index.follow(ids, steps + 1)
        last, bootstrap = self._windows(path)
        columns = {name: out[f"next_{name}"] for name in n_step.columns}
        found = await self._fetch(bootstrap, columns, rows)
        inside = (np.arange(steps) <= last[:, None]) & (path[:, :steps] >= 0)
        flat = path[:, :steps][inside]
        small = {n_step.reward: np.zeros(len(flat), self._schema[n_step.reward][0])}
        if "terminated" in self._schema.episode_ends:
            small["terminated"] = np.zeros(len(flat), np.bool_)
        there = np.ones((len(ids), steps), np.bool_)
        there[inside] = await self._fetcher.fetch(flat, small)
        rewards = np.zeros((len(ids), steps))
        rewards[inside] = small[n_step.reward]
        terminated = np.zeros((len(ids), steps), np.bool_)
        if "terminated" in small:
            terminated[inside] = small["terminated"]
        over = terminated.any(axis=1)
        truncated = (last < steps) & ~over
        hopeless = truncated & (last == 0) & there.all(axis=1)
        self._bar(ids[hopeless])
        rewards[truncated, last[truncated]] = 0.0
        powers = n_step.discount ** np.arange(steps + 1)
        out["return"][rows] = rewards @ powers[:steps]  # 0 behind the end
        out["discount"][rows] = np.where(over, 0.0, powers[last])
        complete: NDArray[np.bool_] = found & there.all(axis=1) & ~hopeless
        return complete


def _columns(schema: Schema, columns: Sequence[str] | None) -> tuple[str, ...]:
    if isinstance(columns, str):
        raise UsageError(f"columns= are names, not {columns!r}")
    chosen = tuple(schema if columns is None else columns)
    for name in chosen:
        if name not in schema:
            raise UsageError(f"columns= names {name!r}; there are {', '.join(schema)}")
    if not chosen:
        raise UsageError("columns= names no column")
    return chosen


def _check_n_step(n_step: NStep, schema: Schema, columns: Sequence[str]) -> None:
    for name in (n_step.reward, *n_step.columns):
        if name not in schema:
            raise UsageError(f"n_step= wants column {name!r}; there are {', '.join(schema)}")
    shape = schema[n_step.reward][1]
    if math.prod(shape) != 1:  # (1,) is a scalar to TorchRL
        raise UsageError(f"n_step= wants rewards that are scalars, and column {n_step.reward!r} has shape {shape}")
    for name in ("discount", *(f"next_{name}" for name in n_step.columns)):  # "return" is no column's name: a keyword
        if name in columns:
            raise UsageError(f"n_step= adds {name!r}, and there is such a column: leave that out by columns=")


def _counts(ids: Ids) -> dict[int, int]:
    numbers, counts = np.unique(ids, return_counts=True)
    return dict(zip(numbers.tolist(), counts.tolist(), strict=True))
