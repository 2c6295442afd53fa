"""The ceiling: how fast this machine copies one contiguous piece of memory, with one thread, in one process.

No copy between two processes can be faster than the best of these. In host memory:

- `memcpy`: the C library's own. From a share of the last cache on it writes past the caches by itself; where
  that share is large (many virtual machines), most sizes go through them and read each target line first;
- `streaming`: this project's copy loop, which writes past the caches from 4 MB on, given one row that is as
  long as the piece. Without native code it is numpy's copy.

On a GPU it is the `device copy` that torch makes, from its launch until it has ended.
"""

import ctypes
import random
import time
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from pdserve.kvtransfer.native import load_kernel
from pdserve.kvtransfer.pool.storage import KvStorage

PlainCopy = tuple[str, Callable[[int], float]]
"""Its name, and what copies so many blocks from a random place of one pool to one of another; seconds."""

_FIRST = np.zeros(1, np.int64)


def plain_copies(source: KvStorage, target: KvStorage, chance: random.Random) -> Sequence[PlainCopy]:
    """Those for two pools of one size on one device, touched before; the places change, so both are cold."""
    if target.on_host:
        host = _HostCopies(source.bytes_view, target.bytes_view, chance)
        return ("memcpy", host.memcpy), ("streaming", host.streaming)
    return (("device copy", lambda count: _device_copy(source, target, chance, count)),)


class _HostCopies:
    """From `source` to `target`, both uint8 [n, block_bytes]."""

    def __init__(self, source: NDArray[np.uint8], target: NDArray[np.uint8], chance: random.Random) -> None:
        self._source, self._target = source, target
        self._chance = chance
        self._memcpy = ctypes.CDLL(None).memcpy
        self._memcpy.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
        self._memcpy.restype = ctypes.c_void_p
        self._kernel = load_kernel()

    def memcpy(self, count: int) -> float:
        source, target = self._pieces(count)
        to, at, size = target.ctypes.data, source.ctypes.data, source.size
        began = time.perf_counter()
        self._memcpy(to, at, size)
        return time.perf_counter() - began

    def streaming(self, count: int) -> float:
        source, target = self._pieces(count)
        began = time.perf_counter()
        self._kernel.copy(source, _FIRST, target, _FIRST)
        return time.perf_counter() - began

    def _pieces(self, count: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """Each as one long row, [1, bytes]."""
        start, end = _places(len(self._source), count, self._chance)
        return (
            self._source[start : start + count].reshape(1, -1),
            self._target[end : end + count].reshape(1, -1),
        )


def _device_copy(source: KvStorage, target: KvStorage, chance: random.Random, count: int) -> float:
    start, end = _places(source.num_blocks, count, chance)
    there, here = source.tensor[start : start + count], target.tensor[end : end + count]
    target.settle()
    began = time.perf_counter()
    here.copy_(there)
    target.settle()
    return time.perf_counter() - began


def _places(num_blocks: int, count: int, chance: random.Random) -> tuple[int, int]:
    """Where a piece of `count` blocks begins in the source, and where in the target."""
    most = num_blocks - count + 1
    return chance.randrange(most), chance.randrange(most)
