"""A pool's blocks in a GPU's memory: what KvStorage does with them there."""

import threading
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from pdserve.core.types import BlockId
from pdserve.kvtransfer.gpu.base import Gpu, GpuRows, GpuStream
from pdserve.kvtransfer.gpu.staging import Staging


class DeviceBlocks:
    """Owns one allocation of [num_blocks, block_bytes], zeros at first, and the way through host memory.

    The engine works in its own stream, transfers in theirs; nobody waits for the whole device. Who lets
    others read blocks calls `settle` once after they were computed. Who writes blocks (`scatter`) goes behind
    what the engine has launched, as a freed block may still be in use by a step that runs.
    """

    def __init__(self, gpu: Gpu, num_blocks: int, block_bytes: int) -> None:
        self.gpu = gpu
        self.memory = gpu.allocate(num_blocks * block_bytes)
        self.memory.tensor().zero_()
        self.rows = GpuRows(self.memory.pointer, num_blocks, block_bytes)
        self._staging = Staging(gpu)
        self._lock = threading.Lock()

    def tensor(self, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
        """The blocks, zero-copy."""
        return self.memory.tensor().view(dtype).view(shape)

    def settle(self) -> None:
        """Block until all that the engine has launched so far is in memory."""
        self.gpu.engine_event().wait()

    def gather(self, stream: GpuStream, blocks: Sequence[BlockId], target: GpuRows) -> None:
        """Enqueue: rows 0..n-1 of `target` are settled `blocks`."""
        stream.copy_rows(self.rows, blocks, target, range(len(blocks)))

    def scatter(
        self, stream: GpuStream, source: GpuRows, rows: Sequence[int], blocks: Sequence[BlockId]
    ) -> None:
        """Enqueue: `blocks`, which the caller owns, are those rows of `source`."""
        stream.follow_engine()
        stream.copy_rows(source, rows, self.rows, blocks)

    def read_into(self, blocks: Sequence[BlockId], out: NDArray[np.uint8]) -> None:
        """Copy blocks, as the engine leaves them, to host memory [len(blocks), block_bytes]."""
        if not blocks:
            return
        with self._lock:
            stream, packed = self._staging.stream, self._staging.rows(len(blocks), self.rows.row_bytes)
            stream.follow_engine()
            self.gather(stream, blocks, packed)
            stream.download(packed.pointer, out)
            stream.record().wait()

    def write(self, blocks: Sequence[BlockId], data: NDArray[np.uint8]) -> None:
        """Copy host memory [len(blocks), block_bytes] to blocks that the caller owns."""
        if not blocks:
            return
        data = np.ascontiguousarray(data)
        with self._lock:
            stream, packed = self._staging.stream, self._staging.rows(len(blocks), self.rows.row_bytes)
            stream.upload(data, packed.pointer)
            try:
                self.scatter(stream, packed, range(len(blocks)), blocks)
            finally:
                stream.record().wait()  # nothing reads `data` from now on, also where a block is not there

    def close(self) -> None:
        """Free everything. Nobody may use the tensor, here or in a process that mapped it. Idempotent."""
        with self._lock:
            self._staging.close()
            self.memory.free()
