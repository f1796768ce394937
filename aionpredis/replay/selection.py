"""Which transitions a sampler draws next."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from aionpredis.errors import UsageError
from aionpredis.names import is_count
from aionpredis.replay.index import Ids, Index
from aionpredis.replay.sumtree import SumTree

__all__ = ["Fifo", "Lifo", "Newest", "Prioritized", "Selection", "Shuffled", "Uniform"]

Eligible = Callable[[Ids], NDArray[np.bool_]]
"""For each transition whether it may be drawn: it is present, and has what follows that the sampler needs."""

TRIES = 20
"""Draws of which nothing was eligible, after which all transitions are looked at. With one in ten eligible 20 draws of 256
practically always find one."""

LEAST, MOST = 1e-290, 1e290
"""Of ``priority ** alpha``: their sums are finite, and what is positive stays so."""


class Selection(Protocol):
    """How a sampler chooses. One instance serves one sampler."""

    def add(self, ids: Ids, index: Index) -> None:
        """These transitions are new."""

    def remove(self, ids: Ids) -> None:
        """These are not drawn any more."""

    def draw(self, count: int, index: Index, eligible: Eligible, rng: np.random.Generator) -> Ids:
        """Up to ``count`` eligible transitions; fewer, at least one, if it is more convenient; none if there are none.

        A ``sample()`` that is cancelled or fails hands out none of what it drew.
        """


class _Stateless:
    def add(self, ids: Ids, index: Index) -> None:
        pass

    def remove(self, ids: Ids) -> None:
        pass


class Uniform(_Stateless):
    """Each transition with the same probability, independently, with replacement."""

    def draw(self, count: int, index: Index, eligible: Eligible, rng: np.random.Generator) -> Ids:
        low, high = index.span
        if low < high:
            for _ in range(TRIES):
                drawn = rng.integers(low, high, count)
                chosen = drawn[eligible(drawn)]
                if len(chosen):
                    return chosen
        known = index.present()
        known = known[eligible(known)]
        return rng.choice(known, count) if len(known) else known


class Newest(_Stateless):
    """Uniformly among the ``count`` newest transitions."""

    def __init__(self, count: int) -> None:
        if not is_count(count):
            raise UsageError(f"Newest() draws among at least 1 transition, not {count!r}")
        self._count = count

    def draw(self, count: int, index: Index, eligible: Eligible, rng: np.random.Generator) -> Ids:
        known = index.present()
        known = known[eligible(known)][-self._count :]
        return rng.choice(known, count) if len(known) else known


class Fifo(_Stateless):
    """The oldest transitions first. With ``max_times_sampled=1`` the replay is a queue."""

    def draw(self, count: int, index: Index, eligible: Eligible, rng: np.random.Generator) -> Ids:
        known = index.present()
        return known[eligible(known)][:count]


class Lifo(_Stateless):
    """The newest transitions first. With ``max_times_sampled=1`` the replay is a stack."""

    def draw(self, count: int, index: Index, eligible: Eligible, rng: np.random.Generator) -> Ids:
        known = index.present()
        return known[eligible(known)][::-1][:count]


class Shuffled(_Stateless):
    """Without replacement: each transition once, in random order; then all that are known by then, in a new order.

    ``passes``: how many orders were begun.
    """

    def __init__(self) -> None:
        self.passes = 0
        self._left = np.zeros(0, np.int64)

    def put_back(self, ids: Ids) -> None:
        """These were drawn and not handed out: they are next."""
        self._left = np.concatenate([ids, self._left])

    def draw(self, count: int, index: Index, eligible: Eligible, rng: np.random.Generator) -> Ids:
        for begin in (False, True):
            if begin:
                self._left = rng.permutation(index.present())
                self.passes += bool(len(self._left))
            while len(self._left):
                taken, self._left = self._left[:count], self._left[count:]
                chosen = taken[eligible(taken)]
                if len(chosen):
                    return chosen
        return self._left


class Prioritized:
    """With probability ``priority ** alpha / total``: prioritized experience replay (Schaul et al. 2015, arXiv:1511.05952).

    New transitions have the highest priority so far, so that each is seen; one outlier keeps it high for ever. ``alpha``: 0
    is uniform. ``beta``: how much of the bias the importance weights take back, 1 all of it; may be assigned anew at any
    time, as it is usually annealed.

    ``priority ** alpha`` is less than 1e290; what is positive counts as 1e-290 at least.
    """

    def __init__(self, alpha: float = 0.6, beta: float = 0.4) -> None:
        if not (0 <= alpha < math.inf and 0 <= beta <= 1):
            raise UsageError(f"alpha is finite and not negative, beta is 0 to 1, not {alpha!r} and {beta!r}")
        self.beta = beta
        self._alpha = alpha
        self._highest = 1.0
        self._tree = SumTree()
        self._size = 1024  # slots: a transition's is its number modulo this
        self._low = 0

    def add(self, ids: Ids, index: Index) -> None:
        low, high = index.span
        if high - low > self._size:
            known = index.present()
            known = known[known < ids[0]]
            values = self._tree.get(known % self._size)
            while high - low > self._size:
                self._size *= 2
            self._tree = SumTree()
            self._tree.set(known % self._size, values)
        self._low = low
        self._tree.set(ids % self._size, np.full(len(ids), self._highest**self._alpha))

    def remove(self, ids: Ids) -> None:
        self._tree.set(ids % self._size, np.zeros(len(ids)))

    def draw(self, count: int, index: Index, eligible: Eligible, rng: np.random.Generator) -> Ids:
        self._low = index.span[0]
        if self._tree.total > 0:
            for _ in range(TRIES):
                drawn = self._ids(self._tree.draw(count, rng))
                chosen = drawn[eligible(drawn)]
                if len(chosen):
                    return chosen
        known = index.present()
        known = known[eligible(known)]
        values = self._tree.get(known % self._size)
        if not values.sum() > 0:
            return known[:0]
        return rng.choice(known, count, p=values / values.sum())

    def _ids(self, slots: Ids) -> Ids:
        return self._low + (slots - self._low) % self._size

    def update(self, ids: Ids, priorities: NDArray[np.floating]) -> None:
        """Give transitions new priorities, finite and not negative; 0: never drawn. Later ones of the same number win.

        Raises:
            UsageError: one is something else, or too large for ``alpha``; nothing was changed.
        """
        values = np.asarray(priorities, np.float64)
        if values.shape != ids.shape or not (np.isfinite(values).all() and (values >= 0).all()):
            raise UsageError("priorities are finite and not negative, one for each transition")
        with np.errstate(over="ignore"):
            powers = np.where(values > 0, np.maximum(values**self._alpha, LEAST), 0.0)
        if not (powers < MOST).all():
            raise UsageError(f"a priority of {values.max()} is too large for alpha={self._alpha}")
        if len(values):
            self._tree.set(ids % self._size, powers)
            self._highest = max(self._highest, float(values.max()))

    def weights(self, ids: Ids) -> NDArray[np.float32]:
        """Importance weights, at most 1: ``(n · p) ** -beta``, divided by the largest of all transitions. For what was just
        drawn: 1 where it cannot be drawn any more.
        """
        values = self._tree.get(ids % self._size)
        ratios = np.divide(self._tree.minimum, values, out=np.ones(len(values)), where=values > 0)
        weights: NDArray[np.float32] = (ratios**self.beta).astype(np.float32)
        return weights
