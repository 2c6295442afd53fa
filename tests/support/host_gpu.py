"""A GPU without one: memory files for device memory, threads for streams, and the kernel's own source for the
CPU. Other processes map its memory as they would a GPU's.
"""

import ctypes
import functools
import mmap
import os
import queue
import struct
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from pdserve.core.errors import Unavailable
from pdserve.kvtransfer.gpu.base import (
    THREADS,
    Communicators,
    GpuEvent,
    GpuMemory,
    GpuRows,
    Launch,
    check_rows,
)
from pdserve.kvtransfer.gpu.cuda import SOURCE
from pdserve.kvtransfer.native.build import build, user_cache

_HANDLE = struct.Struct("<QQQ40x")
"""pid, fd, size: as long as CUDA's handles are."""

_BEFORE = """
#define __global__
#define __device__
struct Dim { unsigned x; };
static thread_local Dim blockIdx, threadIdx;
struct alignas(16) uint4 { unsigned x, y, z, w; };
"""
_AFTER = """
#define LAUNCHER(name)                                                                                     \\
  extern "C" void launch_##name(const char* source, const long long* chosen, char* target,                \\
                                const long long* places, long long row_bytes, unsigned tiles,             \\
                                unsigned grid, unsigned threads) {                                        \\
    for (blockIdx.x = 0; blockIdx.x < grid; ++blockIdx.x)                                                  \\
      for (threadIdx.x = 0; threadIdx.x < threads; ++threadIdx.x)                                          \\
        name(source, chosen, target, places, row_bytes, tiles);                                           \\
  }
LAUNCHER(pdserve_copy_rows_16)
LAUNCHER(pdserve_copy_rows_1)
"""


@functools.cache
def compiled_kernel() -> ctypes.CDLL:
    """blocks.cu as C++. Raises NativeUnavailable where there is no compiler."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "blocks_cu_on_host.cpp"
        source.write_text(_BEFORE + SOURCE.read_text() + _AFTER)
        loaded = ctypes.CDLL(str(build(source, user_cache())))
    pointer, number, count = ctypes.c_void_p, ctypes.c_longlong, ctypes.c_uint
    for function in (loaded.launch_pdserve_copy_rows_16, loaded.launch_pdserve_copy_rows_1):
        function.argtypes = (pointer, pointer, pointer, pointer, number, count, count, count)
        function.restype = None
    return loaded


def launch(kernel: str, grid: int, *arguments: int | NDArray[np.int64]) -> None:
    """Run the whole grid, thread after thread."""
    source, chosen, target, places, row_bytes, tiles = arguments
    assert isinstance(chosen, np.ndarray)
    assert isinstance(places, np.ndarray)
    function = getattr(compiled_kernel(), f"launch_{kernel}")
    function(source, chosen.ctypes.data, target, places.ctypes.data, row_bytes, tiles, grid, THREADS)


def host_view(pointer: int, size: int) -> NDArray[np.uint8]:
    """Memory of this process."""
    return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(pointer))


_LIBC = ctypes.CDLL(None, use_errno=True)
_FREED: list[mmap.mmap] = []


class HostMemory:
    """A memory file, mapped."""

    def __init__(self, size: int) -> None:
        self.num_bytes = size
        self.fd = os.memfd_create("host-gpu", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, size)
        self._map = mmap.mmap(self.fd, size)
        self.pointer = np.frombuffer(self._map, np.uint8).ctypes.data
        self.freed = False

    def tensor(self) -> torch.Tensor:
        return torch.frombuffer(self._map, dtype=torch.uint8)

    def free(self) -> None:
        """The bytes are gone and the addresses are never used again: who touches them later crashes."""
        if not self.freed:
            self.freed = True
            self._map.madvise(mmap.MADV_REMOVE)
            os.close(self.fd)
            size = -(-self.num_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
            assert _LIBC.mprotect(ctypes.c_void_p(self.pointer), ctypes.c_size_t(size), 0) == 0
            _FREED.append(self._map)


class HostEvent:
    def __init__(self) -> None:
        self._reached = threading.Event()

    def done(self) -> bool:
        return self._reached.is_set()

    def wait(self) -> None:
        self._reached.wait()

    def reach(self) -> None:
        self._reached.set()


class HostStream:
    """Work in order, in a thread. `STREAMS` finds it by handle, as a library finds CUDA's."""

    STREAMS: "dict[int, HostStream]" = {}  # noqa: RUF012

    def __init__(self, engine: "HostStream | None") -> None:
        self.handle = id(self)
        self.STREAMS[self.handle] = self
        self._engine = engine
        self._work: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()
        threading.Thread(target=self._run, daemon=True).start()

    def enqueue(self, work: Callable[[], object]) -> None:
        self._work.put(work)

    def copy_rows(
        self, source: GpuRows, chosen: Sequence[int], target: GpuRows, places: Sequence[int]
    ) -> None:
        rows, at = check_rows(source, chosen), check_rows(target, places)
        how = Launch.of(source, target, len(rows))
        arguments = (source.pointer, rows, target.pointer, at, source.row_bytes, how.tiles_per_row)
        self.enqueue(lambda: launch(how.kernel, how.grid, *arguments))

    def download(self, pointer: int, out: NDArray[np.uint8]) -> None:
        assert out.flags.c_contiguous
        self.enqueue(lambda: np.copyto(out.reshape(-1), host_view(pointer, out.nbytes)))

    def upload(self, data: NDArray[np.uint8], pointer: int) -> None:
        assert data.flags.c_contiguous
        self.enqueue(lambda: np.copyto(host_view(pointer, data.nbytes), data.reshape(-1)))

    def follow_engine(self) -> None:
        assert self._engine is not None
        self.enqueue(self._engine.record().wait)

    def record(self) -> GpuEvent:
        event = HostEvent()
        self.enqueue(event.reach)
        return event

    def _run(self) -> None:
        while True:
            self._work.get()()


class HostGpu:
    """Implements Gpu. `engine` is where a test does what an engine's kernels would."""

    def __init__(self, communicators: Communicators | None = None) -> None:
        self._communicators = communicators
        self.device = torch.device("cpu")
        self.bus_id = "host"
        self.engine = HostStream(None)
        self.mapped: dict[int, mmap.mmap] = {}

    def allocate(self, num_bytes: int) -> HostMemory:
        return HostMemory(num_bytes)

    def stream(self) -> HostStream:
        return HostStream(self.engine)

    def engine_event(self) -> GpuEvent:
        return self.engine.record()

    def share(self, memory: GpuMemory) -> bytes:
        assert isinstance(memory, HostMemory)
        return _HANDLE.pack(os.getpid(), memory.fd, memory.num_bytes)

    def map(self, handle: bytes) -> int:
        pid, fd, size = _HANDLE.unpack(handle)
        try:
            opened = os.open(f"/proc/{pid}/fd/{fd}", os.O_RDWR)
        except OSError as error:
            raise RuntimeError(f"no such memory: {error}") from error
        view = mmap.mmap(opened, size)
        os.close(opened)
        pointer = np.frombuffer(view, np.uint8).ctypes.data
        self.mapped[pointer] = view
        return int(pointer)

    def unmap(self, pointer: int) -> None:
        del self.mapped[pointer]

    def communicators(self) -> Communicators:
        if self._communicators is None:
            raise Unavailable("this stand-in has no communicators")
        return self._communicators
