"""What KV transfers need of a GPU and no more: memory, streams, one copy kernel, memory of other processes.

`cuda.py` has the real one, through CuPy. All that uses this also runs on a machine without a GPU, against a
stand-in of the tests. Any call may raise RuntimeError, as CUDA reports errors of earlier work late.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

WIDE_BYTES = 16
"""The kernel's wide word; see blocks.cu."""
THREADS = 256
WORDS_PER_THREAD = 4


class GpuRows(NamedTuple):
    """Device memory [num_rows, row_bytes], row by row. It does not own it."""

    pointer: int
    num_rows: int
    row_bytes: int


class Launch(NamedTuple):
    """How the copy kernel is started: which of its two widths, and over how many thread blocks."""

    kernel: str
    grid: int
    tiles_per_row: int

    @classmethod
    def of(cls, source: GpuRows, target: GpuRows, rows: int) -> "Launch":
        """For `rows` rows. Raises ValueError where the two have other row sizes."""
        if source.row_bytes != target.row_bytes:
            raise ValueError(f"rows of {source.row_bytes} bytes do not fit rows of {target.row_bytes}")
        aligned = (source.pointer | target.pointer | source.row_bytes) % WIDE_BYTES == 0
        word = WIDE_BYTES if aligned else 1
        tiles = -(-source.row_bytes // (word * THREADS * WORDS_PER_THREAD))
        return cls(f"pdserve_copy_rows_{word}", rows * tiles, tiles)


class GpuMemory(Protocol):
    """One allocation of its own, which can be shared as a whole; whoever allocated it frees it."""

    pointer: int
    num_bytes: int

    def tensor(self) -> torch.Tensor:
        """uint8 [num_bytes] over the same memory; of no use after `free`."""
        ...

    def free(self) -> None:
        """Idempotent. Nothing may be under way in it, here or in a process that maps it."""
        ...


class GpuEvent(Protocol):
    """A point in a stream."""

    def done(self) -> bool:
        """Whether all work before it has ended."""
        ...

    def wait(self) -> None:
        """Block this thread, asleep, until it has."""
        ...


class GpuStream(Protocol):
    """Work in order, not ordered with the engine's; used by one thread at a time."""

    handle: int
    """A cudaStream_t."""

    def copy_rows(
        self, source: GpuRows, chosen: Sequence[int], target: GpuRows, places: Sequence[int]
    ) -> None:
        """target[places[i]] = source[chosen[i]] in one kernel. IndexError for a row that is not there."""
        ...

    def download(self, pointer: int, out: NDArray[np.uint8]) -> None:
        """Device memory to `out`, contiguous host memory that stays until the work has ended."""
        ...

    def upload(self, data: NDArray[np.uint8], pointer: int) -> None:
        """`data`, contiguous host memory that stays until the work has ended, to device memory."""
        ...

    def follow_engine(self) -> None:
        """What comes next waits for all that the engine has launched so far; the engine waits for nothing."""
        ...

    def record(self) -> GpuEvent:
        """The point after everything so far."""
        ...


class CommunicatorFailed(RuntimeError):
    """What was begun over a communicator will not come to an end; it is of no more use."""


class Communicator(Protocol):
    """Two GPUs of two processes that send to each other. No call blocks; used by one thread."""

    def busy(self) -> bool:
        """Whether what was begun last (joining, posting) is not through yet; nothing may be begun until then.

        Raises CommunicatorFailed. A peer that died or hangs need not be noticed: the caller has a deadline.
        """
        ...

    def send(self, pointer: int, num_bytes: int, stream: GpuStream) -> None:
        """Begin to post a send from device memory, in the order of `stream`."""
        ...

    def receive(self, pointer: int, num_bytes: int, stream: GpuStream) -> None:
        """Begin to post a receive of exactly so many bytes to device memory, in the order of `stream`."""
        ...

    def abort(self) -> None:
        """End all that is under way, so that the stream goes on, and give everything back. Idempotent."""
        ...


class Communicators(Protocol):
    """The library that makes them. Safe in any thread."""

    version: int
    """Two processes can meet only where theirs are equal."""

    def unique_id(self) -> bytes:
        """A name for a meeting of two, used once, made by rank 0's process."""
        ...

    def join(self, unique_id: bytes, rank: int) -> Communicator:
        """Begin to meet the other rank (of 0 and 1): busy until it has come. Raises CommunicatorFailed."""
        ...


class Gpu(Protocol):
    """One device of this process. Safe in any thread."""

    device: torch.device
    bus_id: str
    """Of the hardware, for messages: the same in every process, whatever number it has there."""

    def allocate(self, num_bytes: int) -> GpuMemory:
        """Its content is anything."""
        ...

    def stream(self) -> GpuStream: ...

    def engine_event(self) -> GpuEvent:
        """The point after all that the engine has launched so far."""
        ...

    def share(self, memory: GpuMemory) -> bytes:
        """A handle with which other processes of this machine can map the memory."""
        ...

    def map(self, handle: bytes) -> int:
        """Another process's memory; a pointer, of use until `unmap`. RuntimeError where that cannot be."""
        ...

    def unmap(self, pointer: int) -> None: ...

    def communicators(self) -> Communicators:
        """What connects it with GPUs of other processes. Raises Unavailable where there is nothing."""
        ...


def check_rows(rows: GpuRows, chosen: Sequence[int]) -> NDArray[np.int64]:
    """The row numbers as the kernel takes them. Raises IndexError for one that is not in `rows`."""
    numbers = np.array(chosen, np.int64)
    if numbers.size and (numbers.min() < 0 or numbers.max() >= rows.num_rows):
        raise IndexError(f"rows {numbers.min()} to {numbers.max()} of {rows.num_rows} were asked for")
    return numbers
