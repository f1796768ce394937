"""Memory for what is received: aligned, or what somebody else makes, and used again."""

from __future__ import annotations

import sys
from collections.abc import Callable
from ctypes import addressof, c_char

import numpy as np
from numpy.typing import NDArray

from .errors import UsageError

__all__ = ["ALIGNMENT", "Empty", "Recycler", "aligned_empty"]

Empty = Callable[[int], NDArray[np.uint8]]
"""Makes memory, as :func:`aligned_empty` does."""

ALIGNMENT = 64
"""Bytes: a cache line, the widest vector register, and what ``.npy`` pads its header to."""


def aligned_empty(nbytes: int) -> NDArray[np.uint8]:
    """Uninitialised, writable memory: shape ``(nbytes,)``, dtype ``uint8``, first byte at a multiple of 64."""
    block = np.empty(nbytes + ALIGNMENT, np.uint8)
    # block.ctypes.data takes twice as long
    skip = -addressof(c_char.from_buffer(block)) % ALIGNMENT  # type: ignore[arg-type]
    return block[skip : skip + nbytes]


class Recycler:
    """Hands out memory of ``empty``'s, and the same again once nobody refers to it any more.

    An array, a view of it, a tensor that shares it: while any of them lives, its memory is not handed out. New memory
    costs page faults, 12% of reading an epoch. ``most``: pieces that are kept.
    """

    def __init__(self, nbytes: int, empty: Empty = aligned_empty, *, most: int = 6) -> None:
        self._nbytes = nbytes
        self._empty = empty
        self._most = most
        self._kept: list[NDArray[np.uint8]] = []
        self._unused = 0

    def take(self) -> NDArray[np.uint8]:
        """Writable memory of ``nbytes`` bytes; of arbitrary content.

        Raises:
            UsageError: what ``empty`` makes is something else.
        """
        for memory in self._kept:
            if sys.getrefcount(memory.base) == self._unused:
                return memory[:]
        memory = _checked(self._empty(self._nbytes), self._nbytes)
        # Every view, and every view of a view, refers to the base: NumPy sees to that.
        self._unused = sys.getrefcount(memory.base)
        if len(self._kept) < self._most and REFERENCES_ARE_COUNTED:
            self._kept.append(memory)
        return memory[:]


def _checked(made: NDArray[np.uint8], nbytes: int) -> NDArray[np.uint8]:
    """A view on an array of its own: NumPy counts references at the array that a slice was taken from, which ``empty`` may have
    taken more of. Whatever it lies in lives as long.
    """
    if not isinstance(made, np.ndarray) or (made.shape, made.dtype) != ((nbytes,), np.dtype(np.uint8)):
        raise UsageError(f"empty({nbytes}) makes uint8 of shape ({nbytes},), not {made!r:.100}")
    if not made.flags.writeable or not made.flags.c_contiguous or (made.ctypes.data % 16 and nbytes):
        raise UsageError(f"empty({nbytes}) makes writable, contiguous memory that begins at a multiple of 16")
    return np.frombuffer(made.data, np.uint8)[:] if nbytes else made[:]


REFERENCES_ARE_COUNTED = sys.implementation.name == "cpython" and getattr(sys, "_is_gil_enabled", lambda: True)()
"""Whether ``sys.getrefcount`` is exact; otherwise :class:`Recycler` keeps nothing."""
