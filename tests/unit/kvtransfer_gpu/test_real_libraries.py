"""CuPy and NCCL themselves, where they are installed: what of them needs no device."""

import contextlib
import ctypes
import inspect
import shutil
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

from pdserve.core.errors import ConfigError, Unavailable
from pdserve.kvtransfer.gpu.base import CommunicatorFailed
from pdserve.kvtransfer.gpu.cuda import import_cupy, open_gpu
from pdserve.kvtransfer.gpu.nccl import (
    LIBRARY,
    OLDEST,
    UNIQUE_ID_BYTES,
    Config,
    NcclCommunicators,
    NcclLibrary,
    load_nccl,
)


@pytest.fixture
def cupy() -> ModuleType:
    try:
        return import_cupy()
    except ConfigError as error:
        pytest.skip(error.message)


@pytest.fixture
def nccl() -> NcclLibrary:
    try:
        return load_nccl()
    except Unavailable as error:
        pytest.skip(error.message)


def test_cupy_has_what_cuda_py_calls(cupy: ModuleType) -> None:
    cuda, runtime = cupy.cuda, cupy.cuda.runtime
    said = {
        "ipcGetMemHandle": "devPtr",
        "ipcOpenMemHandle": "bytes handle, unsigned int flags=cudaIpcMemLazyEnablePeerAccess",
        "ipcCloseMemHandle": "devPtr",
        "malloc": "size_t size",
        "free": "ptr",
        "memcpyAsync": "dst, intptr_t src, size_t size, int kind, intptr_t stream",
        "deviceGetPCIBusId": "int device",
    }
    for name, arguments in said.items():
        assert arguments in (getattr(runtime, name).__doc__ or ""), name
    assert (runtime.memcpyHostToDevice, runtime.memcpyDeviceToHost) == (1, 2)
    assert issubclass(runtime.CUDARuntimeError, RuntimeError)
    assert {"block", "disable_timing"} <= set(inspect.signature(cuda.Event).parameters) or (
        "block (bool)" in cuda.Event.__doc__ and "disable_timing (bool)" in cuda.Event.__doc__
    )
    for name in ("record", "synchronize", "done"):
        assert hasattr(cuda.Event, name)
    for name in ("wait_event", "null"):
        assert hasattr(cuda.Stream, name)
    assert "UnownedMemory(intptr_t ptr, size_t size, owner, int device_id" in cuda.UnownedMemory.__doc__
    assert "backend" in cupy.RawModule.__doc__


def test_a_machine_without_a_device_is_said_so(cupy: ModuleType) -> None:
    if cupy.cuda.is_available():
        pytest.skip("there is a device")
    with pytest.raises(ConfigError, match="no usable CUDA device"):
        open_gpu(0)


def test_nccl_is_new_enough_and_names_meetings(nccl: NcclLibrary) -> None:
    assert nccl.version >= OLDEST
    communicators = NcclCommunicators(nccl, contextlib.nullcontext)
    names = {communicators.unique_id() for _ in range(3)}
    assert len(names) == 3
    assert {len(name) for name in names} == {UNIQUE_ID_BYTES}


def test_nccl_refuses_with_a_reason_where_it_cannot_join(nccl: NcclLibrary) -> None:
    communicators = NcclCommunicators(nccl, contextlib.nullcontext)
    with pytest.raises(CommunicatorFailed, match="128 bytes"):
        communicators.join(b"short", 0)
    if shutil.which("nvidia-smi") is not None:
        pytest.skip("there is a device, so it can")
    with pytest.raises(CommunicatorFailed, match="ncclCommInitRankConfig"):
        communicators.join(communicators.unique_id(), 0)


def test_the_config_is_laid_out_as_nccls(nccl: NcclLibrary, tmp_path: Path) -> None:
    nvcc, header = shutil.which("nvcc"), _header_of(nccl)
    if nvcc is None or header is None:
        pytest.skip("needs nvcc and nccl.h")
    fields = ["size", "magic", "version", "blocking", "cgaClusterSize", "minCTAs", "maxCTAs", "netName"]
    fields += ["splitShare", "trafficClass"]
    source = tmp_path / "layout.cpp"
    offsets = "".join(f'printf("%zu ", offsetof(ncclConfig_t, {name}));' for name in fields)
    source.write_text(
        "#include <cstddef>\n#include <cstdio>\n#include <nccl.h>\nint main() {"
        f'{offsets} printf("%zu %u %d", offsetof(ncclConfig_t, commName), NCCL_API_MAGIC,'
        " NCCL_CONFIG_UNDEF_INT);"
        "}"
    )
    made = tmp_path / "layout"
    subprocess.run([nvcc, f"-I{header.parent}", "-o", str(made), str(source)], check=True, timeout=100)
    told = [int(word) for word in subprocess.check_output([str(made)], text=True).split()]
    mine = Config.of_a_pair()
    assert told[: len(fields)] == [getattr(Config, name).offset for name, _ in Config._fields_]
    assert told[len(fields) :] == [ctypes.sizeof(Config), mine.magic, mine.traffic_class]


def _header_of(nccl: NcclLibrary) -> Path | None:
    loaded = next((line for line in Path("/proc/self/maps").read_text().splitlines() if LIBRARY in line), "")
    header = Path(loaded.split()[-1]).parent.parent / "include" / "nccl.h" if loaded else Path()
    return header if header.is_file() else None
