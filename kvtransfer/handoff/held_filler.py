"""The fill of a handoff that takes only what is held: nothing is computed."""

from collections.abc import AsyncIterator, Sequence

from pdserve.core.types import BLOCK_TOKENS, BlockName, OwnerId
from pdserve.kvtransfer.handoff.filler import FillEstimate, FillProgress

_CHUNK_BLOCKS = 64
"""Blocks per chunk: the next ones are digested while these travel."""


class HeldFiller:
    """Shows blocks that the owner's table has already; see `Filler`."""

    def estimate(self, new_tokens: int, cached_tokens: int) -> FillEstimate:
        return FillEstimate(seconds=0.0, queue_position=0)

    async def fill(
        self, owner: OwnerId, token_ids: Sequence[int], chain: Sequence[BlockName]
    ) -> AsyncIterator[FillProgress]:
        """`token_ids` are whole blocks, and `owner` has pinned all of them."""
        for first in range(0, len(chain), _CHUNK_BLOCKS):
            held = BLOCK_TOKENS * min(len(chain), first + _CHUNK_BLOCKS)
            yield FillProgress(num_computed=held, cached_tokens=held)
