"""A CUDA device through CuPy. CuPy has no types, so Any ends in this file."""

import functools
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.dlpack import from_dlpack

from pdserve.core.errors import ConfigError
from pdserve.kvtransfer.gpu.base import THREADS, GpuEvent, GpuMemory, GpuRows, Launch, check_rows
from pdserve.kvtransfer.gpu.nccl import NcclCommunicators, load_nccl

SOURCE = Path(__file__).with_name("blocks.cu")
COMPILE_OPTIONS = ("--std=c++17",)


def import_cupy() -> ModuleType:
    """CuPy. Raises ConfigError where it is not installed or cannot be loaded."""
    try:
        import cupy
    except ImportError as error:
        raise ConfigError(
            f"KV on a GPU needs CuPy, which cannot be loaded ({error}): pip install 'pdserve[gpu]'"
        ) from error
    module: ModuleType = cupy
    return module


@functools.cache
def open_gpu(index: int) -> "CudaGpu":
    """This process's device of that number. Raises ConfigError where it has none, or no CuPy."""
    return CudaGpu(import_cupy(), index)


class CudaGpu:
    """One CUDA device, in the primary context that torch uses too."""

    def __init__(self, cupy: Any, index: int) -> None:
        runtime = cupy.cuda.runtime
        try:
            count = runtime.getDeviceCount()
        except runtime.CUDARuntimeError as error:
            raise ConfigError(f"there is no usable CUDA device: {error}") from error
        if not 0 <= index < count:
            raise ConfigError(f"there is no device cuda:{index}; this process sees {count}")
        self._cupy = cupy
        self._runtime = runtime
        self._index = index
        self.device = torch.device("cuda", index)
        self.bus_id = str(runtime.deviceGetPCIBusId(index))
        with self.current():
            module = cupy.RawModule(code=SOURCE.read_text(), options=COMPILE_OPTIONS, backend="nvrtc")
            names = ("pdserve_copy_rows_16", "pdserve_copy_rows_1")
            self.kernels = {name: module.get_function(name) for name in names}

    def current(self) -> Any:
        """A context manager: this device is the calling thread's."""
        return self._cupy.cuda.Device(self._index)

    def allocate(self, num_bytes: int) -> "CudaMemory":
        return CudaMemory(self._cupy, self._index, num_bytes)

    def stream(self) -> "CudaStream":
        return CudaStream(self._cupy, self)

    def engine_event(self) -> "CudaEvent":
        with self.current():
            return CudaEvent(self._cupy, self._cupy.cuda.Stream.null)

    def share(self, memory: GpuMemory) -> bytes:
        with self.current():
            return bytes(self._runtime.ipcGetMemHandle(memory.pointer))

    def map(self, handle: bytes) -> int:
        with self.current():
            return int(self._runtime.ipcOpenMemHandle(handle))

    def unmap(self, pointer: int) -> None:
        with self.current():
            self._runtime.ipcCloseMemHandle(pointer)

    def communicators(self) -> "NcclCommunicators":
        return NcclCommunicators(load_nccl(), self.current)


class CudaMemory:
    """One cudaMalloc, outside both CuPy's and torch's caches: an IPC handle names a whole allocation."""

    def __init__(self, cupy: Any, index: int, num_bytes: int) -> None:
        self._cupy = cupy
        self._index = index
        self._freed = False
        self.num_bytes = num_bytes
        with cupy.cuda.Device(index):
            self.pointer = int(cupy.cuda.runtime.malloc(num_bytes))

    def tensor(self) -> torch.Tensor:
        cupy = self._cupy
        memory = cupy.cuda.UnownedMemory(self.pointer, self.num_bytes, self, self._index)
        array = cupy.ndarray((self.num_bytes,), cupy.uint8, cupy.cuda.MemoryPointer(memory, 0))
        with cupy.cuda.Device(self._index):
            return from_dlpack(array)

    def free(self) -> None:
        if not self._freed:
            self._freed = True
            with self._cupy.cuda.Device(self._index):
                self._cupy.cuda.runtime.free(self.pointer)


class CudaEvent:
    """Recorded where it is made."""

    def __init__(self, cupy: Any, stream: Any) -> None:
        self._event = cupy.cuda.Event(block=True, disable_timing=True)
        self._event.record(stream)

    @property
    def raw(self) -> Any:
        """CuPy's."""
        return self._event

    def done(self) -> bool:
        return bool(self._event.done)

    def wait(self) -> None:
        self._event.synchronize()


class CudaStream:
    """A non-blocking stream: the engine's, which is the legacy default one, does not wait for it."""

    def __init__(self, cupy: Any, gpu: CudaGpu) -> None:
        self._cupy = cupy
        self._gpu = gpu
        with gpu.current():
            self._stream = cupy.cuda.Stream(non_blocking=True)
        self.handle = int(self._stream.ptr)

    def copy_rows(
        self, source: GpuRows, chosen: Sequence[int], target: GpuRows, places: Sequence[int]
    ) -> None:
        numbers = np.stack([check_rows(source, chosen), check_rows(target, places)])
        if not numbers.size:
            return
        launch = Launch.of(source, target, numbers.shape[1])
        with self._gpu.current(), self._stream:
            # From CuPy's pool, which gives memory of this stream to work of this stream only.
            index = self._cupy.asarray(numbers)
            arguments = (
                source.pointer,
                index[0],
                target.pointer,
                index[1],
                np.int64(source.row_bytes),
                np.uint32(launch.tiles_per_row),
            )
            self._gpu.kernels[launch.kernel]((launch.grid,), (THREADS,), arguments)

    def download(self, pointer: int, out: NDArray[np.uint8]) -> None:
        runtime = self._cupy.cuda.runtime
        with self._gpu.current():
            kind = runtime.memcpyDeviceToHost
            runtime.memcpyAsync(out.ctypes.data, pointer, out.nbytes, kind, self.handle)

    def upload(self, data: NDArray[np.uint8], pointer: int) -> None:
        runtime = self._cupy.cuda.runtime
        with self._gpu.current():
            kind = runtime.memcpyHostToDevice
            runtime.memcpyAsync(pointer, data.ctypes.data, data.nbytes, kind, self.handle)

    def follow_engine(self) -> None:
        with self._gpu.current():
            self._stream.wait_event(CudaEvent(self._cupy, self._cupy.cuda.Stream.null).raw)

    def record(self) -> GpuEvent:
        with self._gpu.current():
            return CudaEvent(self._cupy, self._stream)
