"""What a sequence gets does not depend on who shares its steps."""

from collections.abc import Iterator

import pytest
import torch
from decoder_oracle import llama, poisoned_kv, prompt, saved

from pdserve.core.types import blocks_for
from pdserve.workers.attention.batch import SequenceChunk, StepBatch
from pdserve.workers.models.decoder import Decoder

SEQUENCES = 16
NEW_TOKENS = 12
TABLE = 8  # blocks of each sequence: room for 128 tokens


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    return Decoder.load(saved(llama(), tmp_path_factory.mktemp("model")))


class Greedy:
    """A sequence that prefills in chunks of at most `chunk` tokens and then decodes greedily."""

    def __init__(self, index: int, chunk: int) -> None:
        self.tokens = prompt(3 + 7 * index, seed=index)
        self.table = [block * SEQUENCES + index for block in range(TABLE)]
        self.logits: list[torch.Tensor] = []
        self._chunk = chunk
        self._done = 0

    @property
    def finished(self) -> bool:
        return len(self.logits) == NEW_TOKENS

    def next_chunk(self) -> SequenceChunk:
        end = min(self._done + self._chunk, len(self.tokens))
        wants = end == len(self.tokens)
        return SequenceChunk(self.tokens[self._done : end], self._done, self.table[: blocks_for(end)], wants)

    def advance(self, chunk: SequenceChunk, logits: Iterator[torch.Tensor]) -> None:
        self._done += len(chunk.token_ids)
        if chunk.wants_logits:
            row = next(logits)
            self.logits.append(row)
            self.tokens.append(int(row.argmax()))


def run(decoder: Decoder, sequences: list[Greedy]) -> None:
    kv = poisoned_kv(decoder, SEQUENCES * TABLE)
    while running := [s for s in sequences if not s.finished]:
        chunks = [sequence.next_chunk() for sequence in running]
        rows = iter(decoder.forward(StepBatch.build(chunks), kv))
        for sequence, chunk in zip(running, chunks, strict=True):
            sequence.advance(chunk, rows)


@pytest.mark.parametrize("chunk", [1000, 16, 5])
def test_greedy_tokens_are_the_same_alone_and_in_a_batch_of_16(decoder: Decoder, chunk: int) -> None:
    together = [Greedy(i, chunk) for i in range(SEQUENCES)]
    run(decoder, together)
    for index, sequence in enumerate(together):
        alone = Greedy(index, chunk=1000)
        run(decoder, [alone])
        assert sequence.tokens == alone.tokens
        torch.testing.assert_close(
            torch.stack(sequence.logits), torch.stack(alone.logits), atol=1e-4, rtol=1e-4
        )


def test_nan_in_a_neighbours_blocks_stays_there(decoder: Decoder) -> None:
    kv = poisoned_kv(decoder, 16)
    long, short = prompt(100, seed=1), prompt(3, seed=2)
    decoder.forward(StepBatch.build([SequenceChunk(long[:-1], 0, range(1, 8), False)]), kv)
    decoder.forward(StepBatch.build([SequenceChunk(short[:-1], 0, [9], False)]), kv)
    alone = decoder.forward(StepBatch.build([SequenceChunk(short[-1:], 2, [9], True)]), kv)
    # In a batch the short table is padded with block 0, which is nobody's and holds NaN.
    batch = StepBatch.build(
        [SequenceChunk(short[-1:], 2, [9], True), SequenceChunk(long[-1:], 99, range(1, 8), True)]
    )
    both = decoder.forward(batch, kv)
    assert both.isfinite().all()
    torch.testing.assert_close(both[0], alone[0], atol=1e-4, rtol=1e-4)
