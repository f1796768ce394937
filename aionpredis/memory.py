"""Aligned memory for what is received."""

from __future__ import annotations

from ctypes import addressof, c_char

import numpy as np
from numpy.typing import NDArray

__all__ = ["ALIGNMENT", "aligned_empty"]

ALIGNMENT = 64
"""Bytes: a cache line, the widest vector register, and what ``.npy`` pads its header to."""


def aligned_empty(nbytes: int) -> NDArray[np.uint8]:
    """Uninitialised, writable memory: shape ``(nbytes,)``, dtype ``uint8``, first byte at a multiple of 64."""
    block = np.empty(nbytes + ALIGNMENT, np.uint8)
    # block.ctypes.data takes twice as long
    skip = -addressof(c_char.from_buffer(block)) % ALIGNMENT  # type: ignore[arg-type]
    return block[skip : skip + nbytes]
