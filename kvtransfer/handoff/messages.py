"""What D and P say to each other, as values; wire.py has their form on the wire."""

from collections.abc import Sequence
from dataclasses import dataclass

from pdserve.core.types import BlockId, BlockName, HandoffId, Incarnation, RequestId, WorkerId
from pdserve.kvtransfer.handoff.ask import FetchedPrefix, PrefixHolder
from pdserve.kvtransfer.handoff.states import Outcome
from pdserve.kvtransfer.pool.layout import KvLayout
from pdserve.kvtransfer.transports.base import Offer


@dataclass(frozen=True, slots=True)
class OpenRequest:
    """What D asks of P."""

    handoff: HandoffId
    request: RequestId
    schema: bytes
    layout: KvLayout
    token_ids: tuple[int, ...]
    chain: tuple[BlockName, ...]
    remaining_s: float | None
    transports: tuple[str, ...]
    digest: bool
    decode_worker: WorkerId
    decode_incarnation: Incarnation
    prefill_incarnation: Incarnation
    prefix: PrefixHolder | None = None
    held_only: bool = False


@dataclass(frozen=True, slots=True)
class Rejection:
    """P's no. `outcome` SCHEMA: this pair can never work, REJECTED: it does not now."""

    outcome: Outcome
    reason: str
    retry_after_s: float | None = None
    held_blocks: int | None = None
    """To held_only, where it was too few: leading blocks that P has."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Blocks `first` to `first + len(blocks)` of a prompt, as P exposes them. No digests: None."""

    seq: int
    first: int
    blocks: tuple[BlockId, ...]
    generations: tuple[int, ...]
    last_valid_tokens: int
    digests: bytes | None

    @property
    def end(self) -> int:
        """Index of the block behind the last one."""
        return self.first + len(self.blocks)


@dataclass(frozen=True, slots=True)
class OpenedReply:
    """P's answer to Open. Times in seconds."""

    estimate_s: float
    queue_position: int
    offers: tuple[Offer, ...]
    worker: WorkerId
    incarnation: Incarnation
    pid: int
    cached_blocks: int


@dataclass(frozen=True, slots=True)
class FilledReply:
    """P's account of a prefill; seconds on P's clock."""

    chunks: int
    tokens: int
    prefill_queue_s: float
    prefill_s: float
    cached_tokens: int
    prefix: FetchedPrefix | None = None


@dataclass(frozen=True, slots=True)
class OffersRequest:
    """Which pair D means to make, before any request."""

    schema: bytes
    layout: KvLayout
    transports: tuple[str, ...]
    decode_worker: WorkerId
    decode_incarnation: Incarnation
    prefill_incarnation: Incarnation


def offers_among(offers: Sequence[Offer], asked: Sequence[str]) -> tuple[Offer, ...]:
    """The offers that D accepts, in P's order."""
    return tuple(offer for offer in offers if offer.transport in asked)
