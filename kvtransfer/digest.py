"""Digests of KV content: one XXH3-64 per (layer, K|V, kv head) of a block, over its valid tokens.

The bytes digested are [token, dim] in the wire's dtype, so a digest holds whatever the page order or the
tensor-parallel split on either side. The seed is the segment's index within the block, so two segments that
changed places do not verify; blocks that changed places do not either, as digests are listed per block.
All segments of all blocks that are at hand are digested in one native call (`kvtransfer/native/`).
A digest finds damage, not malice: XXH3 (xxhash.com, XXH3_64bits_withSeed) is no cryptographic hash.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pdserve.kvtransfer.native import load_kernel
from pdserve.kvtransfer.pool.layout import KvLayout

DIGEST_BYTES = 8


class BadSegment(NamedTuple):
    """The first segment of a block whose content is not what its digest says."""

    layer: int
    is_value: bool
    head: int


def digest_block(block: NDArray[np.uint8], layout: KvLayout, valid_tokens: int) -> bytes:
    """Digests of one block's first `valid_tokens` tokens.

    `block` is uint8 [block_bytes]; the result is 8 little-endian bytes for each segment in (layer, K|V, head)
    order. Raises ValueError where the sizes do not fit the layout.
    """
    if block.shape != (layout.block_bytes,) or block.dtype != np.uint8:
        raise ValueError(f"a block is uint8 [{layout.block_bytes}], got {block.dtype} {list(block.shape)}")
    if not 0 < valid_tokens <= layout.block_tokens:
        raise ValueError(f"a block has 1 to {layout.block_tokens} valid tokens, got {valid_tokens}")
    return digest_blocks(np.ascontiguousarray(block)[None], (0,), layout, (valid_tokens,))


def digest_blocks(
    blocks: NDArray[np.uint8], chosen: Sequence[int], layout: KvLayout, valid_tokens: Sequence[int]
) -> bytes:
    """Digests of rows `chosen` of `blocks`, one after the other, each as `digest_block` gives them.

    `blocks` is host memory, uint8 [n, block_bytes]; `valid_tokens` has one number for each chosen row. Raises
    IndexError for a row that is not there, ValueError where the sizes do not fit the layout.
    """
    rows, valid = np.array(chosen, np.int64), np.array(valid_tokens, np.int64)
    return as_bytes(load_kernel().digest(blocks, rows, valid, layout))


def as_bytes(digests: NDArray[np.uint64]) -> bytes:
    """Digests as they travel: 8 little-endian bytes each."""
    return digests.astype("<u8", copy=False).tobytes()


def verify(
    block: NDArray[np.uint8], layout: KvLayout, valid_tokens: int, expected: bytes
) -> BadSegment | None:
    """The first segment that differs from `expected` (what `digest_block` gave), None where all agree.

    Digests of the wrong length verify nothing: the first segment is named.
    """
    return first_difference(digest_block(block, layout, valid_tokens), expected, layout)


def first_difference(found: bytes, expected: bytes, layout: KvLayout) -> BadSegment | None:
    """The first segment in which the digests of one block differ, None where all agree.

    Digests of the wrong length verify nothing: the first segment is named.
    """
    if found == expected:
        return None
    if len(found) != len(expected):
        return BadSegment(0, False, 0)
    for index in range(layout.segments_per_block):
        at = slice(index * DIGEST_BYTES, (index + 1) * DIGEST_BYTES)
        if found[at] != expected[at]:
            break
    pair, head = divmod(index, layout.num_kv_heads)
    return BadSegment(pair // 2, bool(pair % 2), head)
