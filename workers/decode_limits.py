"""What a worker can never run, refused at the door: a prompt that gets further costs a prefill first, and
inside the engine a bad value could fail the whole step that it shares with others."""

from dataclasses import dataclass

from pdserve.core.errors import ContextTooLong
from pdserve.core.request_limits import check_sampling, check_sampling_tokens, check_tokens
from pdserve.core.types import BLOCK_TOKENS, blocks_for
from pdserve.core.worker_record import WorkerRecord
from pdserve.workers.decode_request import DecodeAsk


@dataclass(frozen=True, slots=True)
class DecodeLimits:
    """Bounds that no waiting can change."""

    vocab_size: int
    context_tokens: int
    pool_blocks: int

    @classmethod
    def of(cls, record: WorkerRecord) -> "DecodeLimits":
        return cls(record.vocab_size, record.context_tokens, record.pool_blocks)

    def check(self, ask: DecodeAsk) -> None:
        """Raises InvalidRequest, or ContextTooLong with what was asked and what there is."""
        check_sampling(ask.sampling)
        check_sampling_tokens(ask.sampling, self.vocab_size)
        check_tokens(ask.token_ids, self.vocab_size)
        tokens, completion = len(ask.token_ids), ask.sampling.max_tokens
        positions = tokens + completion - 1  # the last token's KV is never needed
        asked = f"{tokens} prompt tokens and up to {completion} more"
        if positions > self.context_tokens:
            raise ContextTooLong(
                f"{asked} need {positions} positions, the model has {self.context_tokens}: shorten the "
                f"prompt or lower max_tokens"
            )
        if blocks_for(positions) > self.pool_blocks:
            raise ContextTooLong(
                f"{asked} need {blocks_for(positions)} KV blocks, this worker's pool has {self.pool_blocks} "
                f"of {BLOCK_TOKENS} tokens: shorten the prompt, lower max_tokens or raise engine.pool_blocks"
            )
