"""Tensor- and pipeline-parallel workers without a model: a dense KV cache, cut into ranks' blocks."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pdserve.kvtransfer.pool.layout import KvLayout
from pdserve.kvtransfer.reshard.plan import ByteRuns
from pdserve.kvtransfer.reshard.sharding import Sharding

Bytes = NDArray[np.uint8]
POISON = 0xA5


def model_layout(sharding: Sharding, *, head_dim: int = 2, block_tokens: int = 16) -> KvLayout:
    """A block of the whole model, before anybody divides it."""
    return KvLayout(sharding.num_layers, sharding.num_kv_heads, head_dim, "float32", block_tokens)


def dense_blocks(layout: KvLayout, count: int, seed: int = 0) -> Bytes:
    """The reference: random bytes [count, block_bytes] of the whole model."""
    return np.random.default_rng(seed).integers(0, 256, (count, layout.block_bytes), np.uint8)


def grid(blocks: Bytes, layout: KvLayout) -> NDArray[Any]:
    """The same bytes as [block, layer, K|V, kv head, token, bytes of a token]; a view."""
    return blocks.reshape(
        len(blocks), layout.num_layers, 2, layout.num_kv_heads, layout.block_tokens, layout.token_bytes
    )


def cut(dense: Bytes, model: KvLayout, sharding: Sharding, rank: int) -> Bytes:
    """What a rank keeps of dense blocks: [count, block_bytes of the rank]. Says nothing of plans."""
    kept = sharding.kept_by(rank)
    part = grid(dense, model)[:, kept.layers.first : kept.layers.end, :, kept.heads.first : kept.heads.end]
    return np.ascontiguousarray(part).reshape(len(dense), -1)


def pieces(block: Bytes, runs: ByteRuns) -> Bytes:
    """The runs of one block, [count, length]; a view."""
    assert runs.offset + (runs.count - 1) * runs.stride + runs.length <= block.size
    return np.lib.stride_tricks.as_strided(
        block[runs.offset :], (runs.count, runs.length), (runs.stride, 1), writeable=True
    )


def move(source: Bytes, source_runs: ByteRuns, destination: Bytes, destination_runs: ByteRuns) -> None:
    """Carry out one transfer for one block: gather in the order of travel, then scatter."""
    wire = pieces(source, source_runs).reshape(-1)
    assert wire.size == destination_runs.count * destination_runs.length
    pieces(destination, destination_runs)[:] = wire.reshape(destination_runs.count, -1)
