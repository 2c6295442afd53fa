"""Digests catch every change of the valid tokens and none of the rest."""

import numpy as np
import pytest

from pdserve.kvtransfer.digest import DIGEST_BYTES, BadSegment, digest_block, verify
from pdserve.kvtransfer.pool.layout import KvLayout

LAYOUT = KvLayout(num_layers=3, num_kv_heads=2, head_dim=4, dtype="bfloat16")


def block() -> "np.ndarray[tuple[int], np.dtype[np.uint8]]":
    return np.random.default_rng(0).integers(0, 256, LAYOUT.block_bytes, np.uint8)


def at(layer: int, pair: int, head: int, token: int) -> int:
    """Byte offset of one token in one segment."""
    segment = (layer * 2 + pair) * LAYOUT.num_kv_heads + head
    return segment * LAYOUT.segment_bytes + token * LAYOUT.token_bytes


@pytest.mark.parametrize(("layer", "pair", "head", "token"), [(0, 0, 0, 0), (2, 1, 1, 15), (1, 0, 1, 7)])
def test_one_flipped_bit_is_found_where_it_is(layer: int, pair: int, head: int, token: int) -> None:
    content = block()
    digests = digest_block(content, LAYOUT, 16)
    assert len(digests) == LAYOUT.segments_per_block * DIGEST_BYTES
    assert verify(content, LAYOUT, 16, digests) is None
    content[at(layer, pair, head, token)] ^= 1
    assert verify(content, LAYOUT, 16, digests) == BadSegment(layer, bool(pair), head)


def test_tokens_that_are_not_valid_do_not_count() -> None:
    content = block()
    digests = digest_block(content, LAYOUT, 5)
    content[at(1, 1, 1, 5)] ^= 1
    assert verify(content, LAYOUT, 5, digests) is None
    content[at(1, 1, 1, 4)] ^= 1
    assert verify(content, LAYOUT, 5, digests) == BadSegment(1, True, 1)


def test_equal_segments_have_different_digests_so_that_a_swap_shows() -> None:
    digests = digest_block(np.zeros(LAYOUT.block_bytes, np.uint8), LAYOUT, 16)
    parts = {digests[i : i + DIGEST_BYTES] for i in range(0, len(digests), DIGEST_BYTES)}
    assert len(parts) == LAYOUT.segments_per_block


def test_a_list_of_the_wrong_length_verifies_nothing() -> None:
    content = block()
    assert verify(content, LAYOUT, 16, digest_block(content, LAYOUT, 16)[:-8]) == BadSegment(0, False, 0)
    assert verify(content, LAYOUT, 16, b"") is not None


@pytest.mark.parametrize("valid", [0, 17])
def test_an_impossible_token_count_is_an_error(valid: int) -> None:
    with pytest.raises(ValueError, match="valid tokens"):
        digest_block(block(), LAYOUT, valid)


def test_a_block_of_another_size_is_an_error() -> None:
    with pytest.raises(ValueError, match="uint8"):
        digest_block(block()[:-1], LAYOUT, 16)
