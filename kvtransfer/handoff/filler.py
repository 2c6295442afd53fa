"""What P's side of a handoff needs of an engine."""

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from pdserve.core.types import BlockName, OwnerId


@dataclass(frozen=True, slots=True)
class FillEstimate:
    """Predicted seconds until a prompt asked for now is computed, and how many are ahead of it."""

    seconds: float
    queue_position: int
    relative_error: float | None = None
    """Recent mean of |predicted - measured| / measured; None where nothing was measured so far."""


@dataclass(frozen=True, slots=True)
class FillProgress:
    """How far a fill is. Times are readings of P's clock in seconds, None where it has not happened yet."""

    num_computed: int
    """Leading positions whose KV in the owner's table is final."""
    queued_at: float | None = None
    started_at: float | None = None
    ended_at: float | None = None
    cached_tokens: int = 0
    """Leading positions that the engine found in its cache."""


class Filler(Protocol):
    """Computes KV into a pool's blocks."""

    def estimate(self, new_tokens: int, cached_tokens: int) -> FillEstimate:
        """When `new_tokens` positions behind `cached_tokens` cached ones would be done."""
        ...

    def fill(
        self, owner: OwnerId, token_ids: Sequence[int], chain: Sequence[BlockName]
    ) -> AsyncIterator[FillProgress]:
        """Compute all positions of `token_ids` into `owner`'s table, which the engine fills with blocks.

        Cancelling the iterator's next step or closing it (`aclose`) aborts the fill and returns only when the
        engine does not touch the table any more. However it ends, the table is the caller's from then on.
        """
        ...
