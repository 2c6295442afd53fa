"""The copy kernel: its own source run thread by thread on the CPU, and compiled for GPUs."""

import mmap
import re
import shutil
import subprocess
from pathlib import Path

import host_gpu
import numpy as np
import pytest

from pdserve.kvtransfer.gpu.base import THREADS, WORDS_PER_THREAD, GpuRows, Launch, check_rows
from pdserve.kvtransfer.gpu.cuda import COMPILE_OPTIONS, SOURCE
from pdserve.kvtransfer.native.build import NativeUnavailable

TILE_BYTES = 16 * THREADS * WORDS_PER_THREAD
UNTOUCHED = 0xA5


@pytest.fixture(autouse=True, scope="module")
def _compiler() -> None:
    try:
        host_gpu.compiled_kernel()
    except NativeUnavailable as error:
        pytest.skip(f"the kernel's source cannot be compiled here: {error}")


def rows_of(memory: "np.ndarray[tuple[int], np.dtype[np.uint8]]", count: int, size: int) -> GpuRows:
    assert memory.nbytes >= count * size
    return GpuRows(memory.ctypes.data, count, size)


def memory(size: int, skew: int) -> "np.ndarray[tuple[int], np.dtype[np.uint8]]":
    """`size` bytes, `skew` bytes off a multiple of 16."""
    whole = np.full(size + 32, UNTOUCHED, np.uint8)
    start = -whole.ctypes.data % 16 + skew
    return whole[start : start + size]


@pytest.mark.parametrize("skews", [(0, 0), (1, 0), (0, 8)], ids=str)
@pytest.mark.parametrize("size", [1, 16, 48, 4096, 4097, TILE_BYTES, TILE_BYTES + 16, 3 * TILE_BYTES - 8])
def test_chosen_rows_land_in_their_places_and_nowhere_else(size: int, skews: tuple[int, int]) -> None:
    random = np.random.default_rng(size)
    source, target = memory(7 * size, skews[0]), memory(9 * size, skews[1])
    source[:] = random.integers(0, 255, 7 * size)
    chosen, places = np.array([6, 0, 3, 3]), np.array([1, 8, 0, 5])
    expected = target.copy().reshape(9, size)
    expected[places] = source.reshape(7, size)[chosen]
    given, got = rows_of(source, 7, size), rows_of(target, 9, size)
    how = Launch.of(given, got, len(chosen))
    assert how.kernel.endswith("_16" if skews == (0, 0) and size % 16 == 0 else "_1")
    numbers = check_rows(given, chosen), check_rows(got, places)
    host_gpu.launch(
        how.kernel, how.grid, given.pointer, numbers[0], got.pointer, numbers[1], size, how.tiles_per_row
    )
    assert np.array_equal(target.reshape(9, size), expected)


def test_rows_beyond_four_gigabytes_are_found() -> None:
    """Row numbers times row bytes do not fit 32 bits. The mapping is sparse: one row's pages are touched."""
    size, far = 1 << 20, 4100
    sparse = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE, which Python 3.11 does not name
    whole = np.frombuffer(mmap.mmap(-1, (far + 1) * size, flags=sparse), np.uint8)
    whole[far * size :] = 7
    target = memory(size, 0)
    given, got = GpuRows(whole.ctypes.data, far + 1, size), rows_of(target, 1, size)
    how = Launch.of(given, got, 1)
    numbers = check_rows(given, [far]), check_rows(got, [0])
    host_gpu.launch(
        how.kernel, how.grid, given.pointer, numbers[0], got.pointer, numbers[1], size, how.tiles_per_row
    )
    assert (target == 7).all()


def test_rows_that_are_not_there_are_refused_before_a_launch() -> None:
    rows = GpuRows(0, 3, 16)
    assert check_rows(rows, [2, 0]).tolist() == [2, 0]
    for wrong in ([3], [-1], [0, 7]):
        with pytest.raises(IndexError, match="of 3"):
            check_rows(rows, wrong)
    with pytest.raises(ValueError, match="do not fit"):
        Launch.of(rows, GpuRows(0, 3, 32), 1)


def test_the_launch_covers_what_the_source_says_a_thread_block_copies() -> None:
    said = dict(re.findall(r"constexpr int k(\w+) = (\d+);", SOURCE.read_text()))
    assert said == {"Threads": str(THREADS), "WordsPerThread": str(WORDS_PER_THREAD)}


def test_nvcc_compiles_it(tmp_path: Path) -> None:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc on the PATH")
    made = tmp_path / "blocks.ptx"
    command = [nvcc, "--ptx", "-arch=compute_80", "-std=c++17", "-Werror", "all-warnings"]
    subprocess.run([*command, "-o", str(made), str(SOURCE)], check=True, timeout=100)
    text = made.read_text()
    assert ".visible .entry pdserve_copy_rows_16(" in text
    assert len(re.findall(r"ld\.global\.v4\.", text)) == len(re.findall(r"st\.global\.v4\.", text)) == 4


def test_nvrtc_compiles_it_as_cupy_will() -> None:
    nvrtc = pytest.importorskip("cupy_backends.cuda.libs.nvrtc", reason="CuPy is not installed")
    try:
        program = nvrtc.createProgram(SOURCE.read_text(), SOURCE.name, (), ())
    except (RuntimeError, ImportError) as error:
        pytest.skip(f"there is no NVRTC library: {error}")
    nvrtc.compileProgram(program, (*COMPILE_OPTIONS, "-arch=compute_80"))
    assert b"pdserve_copy_rows_1" in nvrtc.getPTX(program)
    nvrtc.destroyProgram(program)
