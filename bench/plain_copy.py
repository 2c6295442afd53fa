"""The ceiling: how fast this machine copies one contiguous piece of memory, with one thread, in one process.

No copy between two processes can be faster than the best of these:

- `memcpy`: the C library's own. From a share of the last cache on it writes past the caches by itself; where
  that share is large (many virtual machines), most sizes go through them and read each target line first;
- `streaming`: this project's copy loop, which writes past the caches from 4 MB on, given one row that is as
  long as the piece. Without native code it is numpy's copy.
"""

import ctypes
import random
import time

import numpy as np
from numpy.typing import NDArray

from pdserve.kvtransfer.native import load_kernel

_FIRST = np.zeros(1, np.int64)


class PlainCopies:
    """Copies `source` to `target`, both uint8 [n, block_bytes] and touched before."""

    def __init__(self, source: NDArray[np.uint8], target: NDArray[np.uint8], chance: random.Random) -> None:
        self._source, self._target = source, target
        self._chance = chance
        self._memcpy = ctypes.CDLL(None).memcpy
        self._memcpy.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
        self._memcpy.restype = ctypes.c_void_p
        self._kernel = load_kernel()

    async def memcpy(self, count: int) -> float:
        """`count` blocks from a random place to another; seconds."""
        source, target = self._pieces(count)
        to, at, size = target.ctypes.data, source.ctypes.data, source.size
        began = time.perf_counter()
        self._memcpy(to, at, size)
        return time.perf_counter() - began

    async def streaming(self, count: int) -> float:
        """As `memcpy`."""
        source, target = self._pieces(count)
        began = time.perf_counter()
        self._kernel.copy(source, _FIRST, target, _FIRST)
        return time.perf_counter() - began

    def _pieces(self, count: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """Each as one long row, [1, bytes]; cold, because their places change."""
        pieces = []
        for memory in (self._source, self._target):
            start = self._chance.randrange(len(memory) - count + 1)
            pieces.append(memory[start : start + count].reshape(1, -1))
        return pieces[0], pieces[1]
