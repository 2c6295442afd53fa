"""The copies that are the ceiling move all bytes, wherever the pools are."""

import random

import pytest
from host_gpu import HostGpu

from pdserve.bench.plain_copy import plain_copies
from pdserve.bench.transfer_source import fill
from pdserve.core.types import BlockId
from pdserve.kvtransfer.pool.layout import KvLayout
from pdserve.kvtransfer.pool.storage import KvStorage

LAYOUT = KvLayout(num_layers=2, num_kv_heads=1, head_dim=8, dtype="bfloat16")
BLOCKS = [BlockId(block) for block in range(300)]
"""More than are filled at once."""


@pytest.mark.parametrize(("on_gpu", "names"), [(False, ["memcpy", "streaming"]), (True, ["device copy"])])
def test_each_copies_what_it_is_timed_for(on_gpu: bool, names: list[str]) -> None:
    gpu = HostGpu() if on_gpu else None
    source, target = (KvStorage(LAYOUT, len(BLOCKS), gpu=gpu) for _ in range(2))
    fill(source)
    expected = source.read_blocks(BLOCKS)
    assert len({row.tobytes() for row in expected}) == len(BLOCKS), "a block that is in the wrong place shows"
    copies = plain_copies(source, target, random.Random(0))
    assert [name for name, _ in copies] == names
    for name, copy in copies:
        target.tensor.zero_()
        assert copy(len(BLOCKS)) > 0
        assert (target.read_blocks(BLOCKS) == expected).all(), name
        target.tensor.zero_()
        copy(10)
        assert sum(row.any() for row in target.read_blocks(BLOCKS)) == 10, "so many, and no more"
    source.close()
    target.close()
