"""A step's layout: rows, slots, padding, and refusal of what cannot be laid out."""

import pytest
import torch

from pdserve.core.errors import InternalError
from pdserve.workers.attention.batch import SequenceChunk, StepBatch


def test_rows_positions_and_slots_follow_the_block_tables() -> None:
    batch = StepBatch.build(
        [
            SequenceChunk([11, 12, 13], 15, [7, 4, 9], True),
            SequenceChunk([21], 0, [5], False),
            SequenceChunk([31], 32, [1, 2, 3], True),
        ]
    )
    assert batch.num_tokens == 5
    assert batch.token_ids.tolist() == [11, 12, 13, 21, 31]
    assert batch.positions.tolist() == [15, 16, 17, 0, 32]
    assert batch.block_ids.tolist() == [7, 4, 4, 5, 3]
    assert batch.offsets.tolist() == [15, 0, 1, 0, 0]
    assert batch.query_start == (0, 3, 4, 5)
    assert batch.context_lens == (18, 1, 33)
    assert batch.block_tables.tolist() == [[7, 4, 0], [5, 0, 0], [1, 2, 3]]
    assert batch.logit_rows.tolist() == [2, 4]
    assert all(
        t.dtype == torch.int64 for t in (batch.token_ids, batch.positions, batch.block_ids, batch.logit_rows)
    )


def test_single_tokens_are_grouped_and_longer_chunks_are_spans() -> None:
    batch = StepBatch.build(
        [
            SequenceChunk([1], 40, [0, 1, 2], True),
            SequenceChunk([2, 3], 3, [5], True),
            SequenceChunk([4], 17, [8, 9], True),
        ]
    )
    assert batch.decode is not None
    assert batch.decode.rows.tolist() == [0, 3]
    assert batch.decode.block_table.tolist() == [[0, 1, 2], [8, 9, 0]]
    assert batch.decode.valid.sum(dim=1).tolist() == [41, 18]
    assert batch.decode.shortest_full == 16
    (span,) = batch.prefills
    assert (span.first_row, span.rows, span.start, span.block_table.tolist()) == (1, 2, 3, [5])


def test_a_pure_prefill_step_has_no_decode_group() -> None:
    assert StepBatch.build([SequenceChunk([1, 2], 0, [0], False)]).decode is None


def test_a_table_may_hold_more_blocks_than_the_context_needs() -> None:
    batch = StepBatch.build([SequenceChunk([1], 0, range(50, 60), False)])
    assert batch.block_tables.tolist() == [[50]]


@pytest.mark.parametrize(
    ("chunks", "message"),
    [
        ([], "at least one sequence"),
        ([SequenceChunk([], 0, [0], True)], "runs 0 tokens"),
        ([SequenceChunk([1], -1, [0], True)], "from -1"),
        ([SequenceChunk([1], 16, [0], True)], "needs 2 blocks, its table has 1"),
    ],
)
def test_what_cannot_be_laid_out_is_a_defect(chunks: list[SequenceChunk], message: str) -> None:
    with pytest.raises(InternalError, match=message):
        StepBatch.build(chunks)
