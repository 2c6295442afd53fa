"""A table says of a grant's segments what a look at each of them says."""

import pickle
import random

import numpy as np
import pytest

from pdserve.core.types import BlockId, HandoffId
from pdserve.kvtransfer.transports.base import Grant, Segment
from pdserve.kvtransfer.transports.copying import refusal
from pdserve.kvtransfer.transports.segment_table import SegmentTable

NUM_BLOCKS, BLOCK_TOKENS = 8, 16


def naively_outside(segments: list[Segment]) -> bool:
    return any(
        not (0 <= s.source < NUM_BLOCKS and 0 <= s.destination < NUM_BLOCKS)
        or not 1 <= s.valid_tokens <= BLOCK_TOKENS
        for s in segments
    )


def test_what_is_outside_or_stale_is_what_a_walk_over_the_segments_finds() -> None:
    chance = random.Random(3)
    outcomes = set()
    for _ in range(500):
        generations = np.array([chance.randrange(1, 4) for _ in range(NUM_BLOCKS)], np.uint64)
        segments = [
            Segment(
                BlockId(chance.randrange(-1 if chance.random() < 0.1 else 0, NUM_BLOCKS)),
                chance.randrange(1, 4) if chance.random() < 0.1 else -1,
                BlockId(chance.randrange(NUM_BLOCKS + (chance.random() < 0.1))),
                chance.randrange(0 if chance.random() < 0.1 else 1, BLOCK_TOKENS + 1),
            )
            for _ in range(chance.randrange(4))
        ]
        segments = [
            s._replace(generation=int(generations[s.source])) if s.generation < 0 else s for s in segments
        ]
        table = SegmentTable(segments)
        said = table.outside(sources=NUM_BLOCKS, destinations=NUM_BLOCKS, block_tokens=BLOCK_TOKENS)
        assert (said is not None) == naively_outside(segments)
        if said is not None:
            outcomes.add("outside")
            continue
        changed = [s for s in segments if generations[s.source] != s.generation]
        told = table.stale(generations)
        assert (told is not None) == bool(changed)
        if told is not None:
            assert told.startswith(f"source block {changed[0].source} is of generation ")
        outcomes.add("stale" if changed else "right")
    assert outcomes == {"outside", "stale", "right"}


def test_a_generation_past_the_signed_numbers_is_compared_as_what_it_is() -> None:
    largest = 2**63 - 1
    generations = np.array([largest, 2**63 + 1], np.uint64)
    assert SegmentTable([(0, largest, 0, 16)]).stale(generations) is None
    assert "9223372036854775809" in str(SegmentTable([(1, 1, 0, 16)]).stale(generations))


@pytest.mark.parametrize("number", [2**63, 2**64, -(2**63) - 1])
def test_a_number_of_64_bits_off_the_wire_is_refused(number: int) -> None:
    segment = Segment(BlockId(0), number, BlockId(0), 16)
    grant = Grant(HandoffId("h"), 0, 0, (segment,))
    reason = refusal(grant, sources=8, destinations=8, block_tokens=16)
    assert reason is not None
    assert "64 bits" in reason


def test_a_grant_travels_without_its_table() -> None:
    grant = Grant(HandoffId("h"), 3, 5, (Segment(BlockId(1), 1, BlockId(2), 16),), digest=True)
    before = pickle.dumps(grant)
    assert len(grant.table) == 1
    assert pickle.dumps(grant) == before
    assert pickle.loads(before) == grant
