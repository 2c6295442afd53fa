"""A pool on a real GPU: the kernel, the tensor that torch sees, and when bytes are in memory."""

import numpy as np
import pytest
import torch
from transport_rig import why_not_here

from pdserve.core.types import BlockId
from pdserve.kvtransfer.gpu.base import GpuRows
from pdserve.kvtransfer.gpu.staging import Staging
from pdserve.kvtransfer.pool.layout import KvLayout
from pdserve.kvtransfer.pool.storage import KvStorage


@pytest.fixture(autouse=True)
def _device() -> None:
    if (reason := why_not_here("cuda_ipc")) is not None:
        pytest.skip(f"no GPU: {reason}")


def ids(*numbers: int) -> list[BlockId]:
    return [BlockId(number) for number in numbers]


@pytest.mark.parametrize(("heads", "dim"), [(1, 4), (3, 64), (8, 128)])
def test_torch_and_the_kernel_see_one_memory(heads: int, dim: int) -> None:
    storage = KvStorage(KvLayout(4, heads, dim, "bfloat16"), 9, "cuda")
    values = torch.randn(storage.tensor.shape, device="cuda").to(torch.bfloat16)
    storage.tensor.copy_(values)
    read = storage.read_blocks(ids(8, 0, 5))
    expected = values[[8, 0, 5]].contiguous().cpu().view(torch.uint8).reshape(3, -1).numpy()
    assert np.array_equal(read, expected)
    storage.write_blocks(ids(1, 2), read, rows=[2, 0])
    assert torch.equal(storage.tensor[1], values[5])
    assert torch.equal(storage.tensor[2], values[8])
    assert torch.equal(storage.tensor[3:], values[3:])
    del values
    storage.close()


def test_unaligned_rows_are_copied_too() -> None:
    storage = KvStorage(KvLayout(1, 1, 4, "bfloat16"), 4, "cuda")
    blocks = storage.blocks_on_gpu
    assert blocks is not None
    staging = Staging(blocks.gpu)
    data = np.arange(7 * 33, dtype=np.uint8)
    rows = staging.rows(14, 33)
    staging.stream.upload(data, rows.pointer)
    upper = GpuRows(rows.pointer + 7 * 33, 7, 33)
    staging.stream.copy_rows(rows, [6, 0, 3], upper, [0, 2, 5])
    out = np.zeros((7, 33), np.uint8)
    staging.stream.download(upper.pointer, out)
    staging.stream.record().wait()
    assert np.array_equal(out[[0, 2, 5]], data.reshape(7, 33)[[6, 0, 3]])
    staging.close()
    storage.close()


def test_settled_blocks_are_there_and_writes_go_behind_the_engine() -> None:
    storage = KvStorage(KvLayout(4, 8, 128, "bfloat16"), 4, "cuda")
    blocks = storage.blocks_on_gpu
    assert blocks is not None
    heavy = torch.randn(4096, 4096, device="cuda")
    for _ in range(20):
        heavy = torch.tanh(heavy @ heavy)
    storage.tensor[1].fill_(1.0)  # behind some hundred milliseconds of work, as a step's writes are
    storage.settle()
    staging = Staging(blocks.gpu)
    packed = staging.rows(1, storage.layout.block_bytes)
    blocks.gather(staging.stream, ids(1), packed)
    out = np.zeros((1, storage.layout.block_bytes), np.uint8)
    staging.stream.download(packed.pointer, out)
    staging.stream.record().wait()
    assert (out.view(np.uint16) == 0x3F80).all()
    for _ in range(20):
        heavy = torch.tanh(heavy @ heavy)
    storage.tensor[2].fill_(2.0)
    blocks.scatter(staging.stream, packed, [0], ids(2))
    staging.stream.record().wait()
    assert (storage.tensor[2] == 1.0).all(), "the transfer's write was overtaken by an earlier step's"
    staging.close()
    storage.close()


def test_what_the_kernel_moves_a_second(capsys: pytest.CaptureFixture[str]) -> None:
    """Printed, not judged: scattered blocks packed by the kernel, beside one copy of as many bytes."""
    for layers, heads, dim in ((30, 3, 64), (32, 8, 128)):
        layout = KvLayout(layers, heads, dim, "bfloat16")
        count = (1 << 29) // layout.block_bytes
        storage = KvStorage(layout, 2 * count, "cuda")
        blocks = storage.blocks_on_gpu
        assert blocks is not None
        staging = Staging(blocks.gpu)
        packed = staging.rows(count, layout.block_bytes)
        chosen = [BlockId(int(n)) for n in np.random.default_rng(0).permutation(2 * count)[:count]]
        times = []
        for _ in range(5):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            stream = torch.cuda.ExternalStream(staging.stream.handle)
            start.record(stream)
            blocks.gather(staging.stream, chosen, packed)
            end.record(stream)
            end.synchronize()
            times.append(start.elapsed_time(end))
        target = torch.empty_like(storage.tensor[:count])
        plain = []
        for _ in range(5):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            target.copy_(storage.tensor[:count])
            end.record()
            end.synchronize()
            plain.append(start.elapsed_time(end))
        size = count * layout.block_bytes
        with capsys.disabled():
            print(
                f"\npacking {count} scattered blocks of {layout.block_bytes >> 10} KiB: "
                f"{size / min(times) / 1e6:.0f} GB/s; one copy of as much: {size / min(plain) / 1e6:.0f} GB/s"
            )
        staging.close()
        del target
        storage.close()
