"""NIXL as a peer: missing, it is skipped with a reason; installed, it reads what it should."""

import multiprocessing
from multiprocessing.connection import Connection

import numpy as np
import pytest

from pdserve.bench import nixl_pair
from pdserve.bench.nixl_pair import NixlPool
from pdserve.core.errors import Unavailable

SHAPE = (8, 65536)


def own(pipe: Connection) -> None:
    blocks = np.repeat(np.arange(SHAPE[0], dtype=np.uint8), SHAPE[1]).reshape(SHAPE)
    pool = NixlPool("P", blocks)
    pool.know(pipe.recv())
    pipe.send(pool.peer)
    pipe.recv()


def test_a_missing_nixl_is_told_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nixl_pair, "_PACKAGES", ("no_nixl_here",))
    with pytest.raises(Unavailable, match="pip install --no-deps nixl-cu12"):
        NixlPool("D", np.zeros(SHAPE, np.uint8))


def test_it_reads_scattered_blocks_of_another_process() -> None:
    try:
        nixl_pair.find_nixl()
    except Unavailable as error:
        pytest.skip(f"NIXL: {error.message}")
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    process = context.Process(target=own, args=(theirs,), daemon=True)
    process.start()
    blocks = np.full(SHAPE, 255, np.uint8)
    pool = NixlPool("D", blocks)
    pipe.send(pool.peer)
    pool.connect(pipe.recv())
    assert pool.read([5, 2, 7], [0, 3, 6]) > 0
    assert [int(block[0]) for block in blocks] == [5, 255, 255, 2, 255, 255, 7, 255]
    assert (blocks == blocks[:, :1]).all(), "whole blocks"
    pipe.send(None)
    process.join()
