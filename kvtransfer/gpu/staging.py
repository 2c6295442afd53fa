"""Device memory in which packed blocks wait between a pool and a wire."""

from pdserve.kvtransfer.gpu.base import Gpu, GpuMemory, GpuRows


class Staging:
    """A stream and a buffer that grows. Owns both; one user at a time, whose work ends before the next's."""

    def __init__(self, gpu: Gpu) -> None:
        self.stream = gpu.stream()
        self._gpu = gpu
        self._memory: GpuMemory | None = None

    def rows(self, num_rows: int, row_bytes: int) -> GpuRows:
        """Room for so many rows, their content anything. What was here before is gone."""
        needed = max(num_rows * row_bytes, 1)
        if self._memory is None or self._memory.num_bytes < needed:
            self.close()
            # Doubled sizes: freeing device memory waits for the whole device, so it must stay rare.
            self._memory = self._gpu.allocate(1 << (needed - 1).bit_length())
        return GpuRows(self._memory.pointer, num_rows, row_bytes)

    def close(self) -> None:
        """Give the memory back. Idempotent."""
        if self._memory is not None:
            self._memory.free()
            self._memory = None
