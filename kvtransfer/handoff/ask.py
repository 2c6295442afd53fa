"""What D's engine side asks of a handoff, and what it gets."""

from dataclasses import dataclass

from pdserve.core.types import (
    BLOCK_TOKENS,
    BlockName,
    Incarnation,
    OwnerId,
    RequestId,
    WorkerId,
    blocks_for,
)
from pdserve.kvtransfer.handoff.states import Outcome


@dataclass(frozen=True, slots=True)
class HandoffPeer:
    """One start of a prefill worker, and the host:port of its gRPC server."""

    worker: WorkerId
    incarnation: Incarnation
    endpoint: str


@dataclass(frozen=True, slots=True)
class PrefixHolder:
    """Who holds so many leading blocks of a prompt: a hint, which only its pin makes true."""

    peer: HandoffPeer
    blocks: int


@dataclass(frozen=True, slots=True)
class HandoffAsk:
    """The KV of a prompt's positions 0 to n-2, wanted in blocks of `owner`.

    With `held_only` that of a prefix of whole blocks, all positions of it, which the peer has or rejects.
    Otherwise the promise for the whole request is taken already. `owner` is fresh for this attempt: what an
    earlier attempt left in quarantine stays with the earlier one's owner.
    """

    request_id: RequestId
    token_ids: tuple[int, ...]
    """The whole prompt, n tokens, of which the last one does not travel; or the whole prefix."""
    chain: tuple[BlockName, ...]
    """Names of its full blocks."""
    remaining_s: float | None
    """The request's time, None where it has no deadline."""
    owner: OwnerId
    prefix: PrefixHolder | None = None
    """Whom the peer may fetch leading blocks from."""
    held_only: bool = False
    further: int = 0
    """Ways to the same KV that are left behind this one: time is kept for them, see state_deadlines.py."""

    @property
    def positions(self) -> int:
        """How many positions travel."""
        return len(self.token_ids) - (0 if self.held_only else 1)

    @property
    def names(self) -> tuple[BlockName, ...]:
        """Names of the full blocks that travel."""
        return self.chain[: self.positions // BLOCK_TOKENS]

    @property
    def blocks(self) -> int:
        """Blocks to take: of the whole prompt, the private one of its last position included."""
        return blocks_for(len(self.token_ids))


@dataclass(frozen=True, slots=True)
class Committed:
    """The KV is in `owner`'s table, checked; the caller owns it now. Times are readings of D's clock."""

    owner: OwnerId
    num_computed: int
    """Leading positions whose KV is there: n-1."""
    transport: str
    blocks_moved: int
    bytes_moved: int
    blocks_reused: int
    """Leading blocks that D had already."""
    prefill_queue_s: float
    """Measured on P's clock, as is `prefill_s`."""
    prefill_s: float
    prefill_cached_tokens: int
    filled_seen_at: float
    committed_at: float
    prefill_worker: WorkerId
    prefill_incarnation: Incarnation
    prefill_pid: int
    prefix: "FetchedPrefix | None" = None
    """What P fetched before it computed the rest."""


@dataclass(frozen=True, slots=True)
class FetchedPrefix:
    """Leading blocks of a prompt that `worker` had and this worker has now, as plain cache."""

    worker: WorkerId
    blocks: int
    """Those that moved; what was here already is not among them."""


@dataclass(frozen=True, slots=True)
class NotServed:
    """This candidate did not serve; nothing is left in the owner's table."""

    reason: Outcome
    message: str
    retry_after_s: float | None = None
    held_blocks: int | None = None
    """To `held_only`, where it was too few: leading blocks that the peer has."""
