"""A pool on a GPU, on the stand-in for one."""

import threading
from collections.abc import Iterator

import host_gpu
import numpy as np
import pytest
import torch

from pdserve.core.errors import ConfigError, Unavailable
from pdserve.core.types import BlockId, OwnerId
from pdserve.kvtransfer.gpu.base import GpuRows
from pdserve.kvtransfer.gpu.staging import Staging
from pdserve.kvtransfer.pool.header import PAGE_BYTES, PoolHeader
from pdserve.kvtransfer.pool.layout import KvLayout
from pdserve.kvtransfer.pool.pool import KvPool
from pdserve.kvtransfer.pool.storage import KvStorage

LAYOUT = KvLayout(num_layers=2, num_kv_heads=1, head_dim=8, dtype="bfloat16")


def ids(*numbers: int) -> list[BlockId]:
    return [BlockId(number) for number in numbers]


@pytest.fixture
def gpu() -> host_gpu.HostGpu:
    return host_gpu.HostGpu()


@pytest.fixture
def storage(gpu: host_gpu.HostGpu) -> Iterator[KvStorage]:
    made = KvStorage(LAYOUT, 5, gpu=gpu)
    yield made
    made.close()


def test_the_tensor_and_the_bytes_are_one_memory(storage: KvStorage) -> None:
    assert not storage.tensor.any()
    assert storage.tensor.shape == (5, *LAYOUT.block_shape)
    values = torch.randn(storage.tensor.shape).to(torch.bfloat16)
    storage.tensor.copy_(values)
    read = storage.read_blocks(ids(3, 1))
    assert np.array_equal(read[0], values[3].contiguous().view(torch.uint8).flatten().numpy())
    storage.write_blocks(ids(0, 4), read, rows=[1, 0])
    for block, source in enumerate((1, 1, 2, 3, 3)):
        assert torch.equal(storage.tensor[block], values[source])
    assert storage.read_blocks([]).shape == (0, LAYOUT.block_bytes)
    storage.write_blocks([], read[:0])


def test_the_memfd_has_the_generations_and_no_blocks(storage: KvStorage) -> None:
    pool = KvPool(LAYOUT, 5, storage.generations)
    taken = pool.allocate(OwnerId("p"), 2)
    assert taken is not None
    assert storage.fd is not None
    path = f"/proc/self/fd/{storage.fd}"
    with open(path, "rb") as file:
        content = file.read()
    header = PoolHeader.unpack(content[:PAGE_BYTES])
    assert not header.on_host
    assert len(content) == header.total_bytes == header.blocks_offset
    found = np.frombuffer(content, np.uint64, 5, header.generations_offset)
    assert [int(found[block]) for block in taken] == [pool.generation(block) for block in taken]
    with pytest.raises(Unavailable, match="read_blocks"):
        _ = storage.bytes_view
    assert not storage.on_host
    pool.release(OwnerId("p"))
    pool.check_integrity()


def test_what_writes_the_pool_goes_behind_the_engine_and_the_engine_waits_for_nothing(
    gpu: host_gpu.HostGpu, storage: KvStorage
) -> None:
    blocks = storage.blocks_on_gpu
    assert blocks is not None
    staging = Staging(gpu)
    packed = staging.rows(1, LAYOUT.block_bytes)
    host_gpu.host_view(packed.pointer, LAYOUT.block_bytes)[:] = 9
    step_ends = threading.Event()
    gpu.engine.enqueue(step_ends.wait)
    blocks.scatter(staging.stream, packed, [0], ids(2))
    landed = staging.stream.record()
    assert not storage.tensor[2].any(), "the step that runs may still use this block"
    step_ends.set()
    landed.wait()
    assert (storage.read_blocks(ids(2)) == 9).all()
    staging.close()


def test_blocks_are_settled_when_all_that_the_engine_launched_has_ended(
    gpu: host_gpu.HostGpu, storage: KvStorage
) -> None:
    step_ends, settled = threading.Event(), threading.Event()
    gpu.engine.enqueue(step_ends.wait)

    def settle() -> None:
        storage.settle()
        settled.set()

    thread = threading.Thread(target=settle)
    thread.start()
    assert not settled.is_set()
    step_ends.set()
    thread.join()
    assert settled.is_set()


def test_blocks_outside_the_pool_are_neither_read_nor_written(storage: KvStorage) -> None:
    data = np.zeros((1, LAYOUT.block_bytes), np.uint8)
    for wrong in (5, -1):
        with pytest.raises(IndexError):
            storage.read_blocks(ids(wrong))
        with pytest.raises(IndexError):
            storage.write_blocks(ids(wrong), data)


def test_staging_grows_and_is_used_again(gpu: host_gpu.HostGpu) -> None:
    staging = Staging(gpu)
    small = staging.rows(3, 100)
    assert small == GpuRows(small.pointer, 3, 100)
    assert staging.rows(5, 100).pointer == small.pointer, "512 bytes were taken for 300"
    large = staging.rows(6, 100)
    assert staging.rows(1, 1).pointer == large.pointer
    staging.close()
    staging.close()


def test_close_gives_the_memory_back(gpu: host_gpu.HostGpu) -> None:
    storage = KvStorage(LAYOUT, 5, gpu=gpu)
    memory = storage.blocks_on_gpu.memory if storage.blocks_on_gpu is not None else None
    assert isinstance(memory, host_gpu.HostMemory)
    storage.close()
    storage.close()
    assert memory.freed
    with pytest.raises(Unavailable, match="closed"):
        storage.read_blocks(ids(0))
    with pytest.raises(Unavailable, match="closed"):
        _ = storage.tensor


def test_a_device_that_is_not_there_is_said_so() -> None:
    with pytest.raises(ConfigError, match="not on meta"):
        KvStorage(LAYOUT, 1, "meta")
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match=r"CuPy|no usable CUDA device"):
            KvStorage(LAYOUT, 1, "cuda")
