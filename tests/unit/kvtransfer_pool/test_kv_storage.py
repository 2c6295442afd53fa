"""Views of one memory, and what a peer that maps it can rely on."""

import fcntl
import os

import numpy as np
import pytest
import torch

from pdserve.core.errors import ConfigError, Unavailable
from pdserve.core.types import BlockId
from pdserve.kvtransfer.pool.header import PAGE_BYTES, PoolHeader
from pdserve.kvtransfer.pool.layout import KvLayout
from pdserve.kvtransfer.pool.storage import KvStorage, copy_rows


def layout(dtype: str = "float32") -> KvLayout:
    return KvLayout(num_layers=2, num_kv_heads=3, head_dim=4, dtype=dtype)


def ids(*blocks: int) -> list[BlockId]:
    return [BlockId(block) for block in blocks]


def test_sizes_multiply_out() -> None:
    of = layout("bfloat16")
    assert of.block_shape == (2, 2, 3, 16, 4)
    assert of.block_bytes == int(np.prod(of.block_shape)) * of.itemsize
    assert of.segment_bytes * of.segments_per_block == of.block_bytes
    assert of.fingerprint() == layout("bfloat16").fingerprint()
    assert of.fingerprint() != layout("float16").fingerprint()


def test_a_layout_that_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match="int3"):
        layout("int3")
    with pytest.raises(ConfigError, match="at least 1"):
        KvLayout(0, 1, 1, "float32")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_tensor_and_bytes_are_one_memory(dtype: str) -> None:
    storage = KvStorage(layout(dtype), 3)
    assert storage.tensor.shape == (3, 2, 2, 3, 16, 4)
    storage.tensor[1] = torch.arange(storage.tensor[1].numel()).view(storage.tensor[1].shape)
    expected = storage.tensor[1].contiguous().view(torch.uint8).numpy().reshape(-1)
    assert np.array_equal(storage.bytes_view[1], expected)
    assert not storage.bytes_view[0].any()
    assert not storage.bytes_view[2].any()
    assert not storage.generations.any()
    storage.close()


def test_blocks_are_read_and_written_wherever_they_lie() -> None:
    storage = KvStorage(layout(), 6)
    storage.bytes_view[:] = np.arange(6, dtype=np.uint8)[:, None]
    read = storage.read_blocks(ids(4, 5, 0))
    assert read[:, 0].tolist() == [4, 5, 0]
    storage.write_blocks(ids(1, 2, 5), read)
    assert storage.bytes_view[:, 7].tolist() == [0, 4, 5, 3, 4, 0]
    storage.write_blocks(ids(3), read, rows=[1])
    assert storage.bytes_view[3, 0] == 5
    assert storage.read_blocks([]).shape == (0, storage.layout.block_bytes)
    storage.close()


@pytest.mark.parametrize(
    ("rows", "targets"),
    [([0, 1, 2], [3, 4, 5]), ([5, 4, 3], [0, 1, 2]), ([0, 1, 3, 4], [1, 2, 3, 5]), ([], [])],
)
def test_runs_are_copied_as_single_rows_would_be(rows: list[int], targets: list[int]) -> None:
    source = np.arange(6, dtype=np.uint8)[:, None].repeat(3, axis=1)
    target = np.full((6, 3), 99, np.uint8)
    expected = target.copy()
    expected[targets] = source[rows]
    copy_rows(source, rows, target, targets)
    assert np.array_equal(target, expected)


def test_a_peer_finds_header_and_content_in_a_memory_that_cannot_shrink() -> None:
    storage = KvStorage(layout(), 600)
    assert storage.fd is not None
    path = f"/proc/self/fd/{storage.fd}"
    storage.bytes_view[599] = 7
    storage.generations[2] = 5
    with open(path, "rb") as file:
        header = PoolHeader.unpack(file.read(PAGE_BYTES))
        assert header == PoolHeader(
            600, storage.layout.block_bytes, storage.layout.fingerprint(), storage.token
        )
        assert os.fstat(file.fileno()).st_size == header.total_bytes
        assert fcntl.fcntl(file, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK
        file.seek(header.generations_offset + 16)
        assert int.from_bytes(file.read(8), "little") == 5
        file.seek(header.blocks_offset + 599 * storage.layout.block_bytes)
        assert set(file.read()) == {7}
    storage.close()


def test_close_gives_the_memory_back_even_where_it_is_mapped() -> None:
    storage = KvStorage(layout(), 2)
    tensor, generations = storage.tensor, storage.generations
    tensor.fill_(1)
    generations[0] = 3
    fd = storage.fd
    storage.close()
    storage.close()
    assert not tensor.any()
    assert not generations.any()
    assert storage.fd is None
    assert fd is not None
    with pytest.raises(OSError):
        os.fstat(fd)
    with pytest.raises(Unavailable):
        _ = storage.tensor
    with pytest.raises(Unavailable):
        _ = storage.bytes_view


def test_blocks_are_copied_within_the_pool_and_no_other_one_changes() -> None:
    storage = KvStorage(layout("bfloat16"), 4)
    storage.tensor.copy_(torch.arange(storage.tensor.numel()).view(storage.tensor.shape))
    before = storage.read_blocks(ids(0, 1, 2, 3))
    storage.copy_blocks(ids(3, 1), ids(0, 2))
    assert (storage.read_blocks(ids(0, 1, 2, 3)) == before[[3, 1, 1, 3]]).all()
    storage.close()
