"""What a sequence must be for the engine to be able to run it, ever."""

from dataclasses import dataclass

from pdserve.core.errors import ContextTooLong, InternalError, InvalidRequest
from pdserve.core.types import BLOCK_TOKENS, blocks_for
from pdserve.workers.engine.messages import SequenceSpec


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """Bounds that no waiting can change."""

    max_positions: int
    """Longest context of the model, in tokens."""
    pool_blocks: int

    def check(self, spec: SequenceSpec) -> None:
        """Return if `spec` can run in an otherwise empty engine.

        Raises:
            InvalidRequest: no token, or nothing left to sample.
            ContextTooLong: prompt and completion exceed the model's context or the pool.
            InternalError: fields that contradict each other.
        """
        tokens = len(spec.token_ids)
        if not tokens:
            raise InvalidRequest(f"sequence {spec.sequence_id} has no token; send at least one")
        if len(spec.chain) != tokens // BLOCK_TOKENS:
            raise InternalError(
                f"sequence {spec.sequence_id} has {len(spec.chain)} block names for {tokens} tokens; it "
                f"needs {tokens // BLOCK_TOKENS}"
            )
        for what, value in (("num_computed", spec.num_computed), ("prior_tokens", spec.prior_tokens)):
            if not 0 <= value < tokens:
                raise InternalError(f"sequence {spec.sequence_id} has {what} {value} of {tokens} tokens")
        self._check_room(spec)

    def _check_room(self, spec: SequenceSpec) -> None:
        tokens = len(spec.token_ids)
        positions, asked = tokens, f"{tokens} tokens"
        if spec.sampling is not None:
            left = spec.sampling.max_tokens - spec.prior_tokens
            if left < 1:
                raise InvalidRequest(
                    f"sequence {spec.sequence_id} has {spec.prior_tokens} completion tokens and may have "
                    f"{spec.sampling.max_tokens}: nothing is left to sample, raise max_tokens"
                )
            positions += left - 1  # the last token's KV is never needed
            asked += f" and up to {left} more"
        if positions > self.max_positions:
            raise ContextTooLong(
                f"{asked} need {positions} positions, the model has {self.max_positions}: shorten the prompt "
                f"or lower max_tokens"
            )
        if blocks_for(positions) > self.pool_blocks:
            raise ContextTooLong(
                f"{asked} need {blocks_for(positions)} blocks of KV, the pool has {self.pool_blocks}: "
                f"shorten the prompt, lower max_tokens or raise engine.pool_blocks"
            )
