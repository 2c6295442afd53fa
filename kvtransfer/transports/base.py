"""The contract of every transport: two halves, one grant, three reports.

A grant names blocks of one chunk. D issues it on the handoff stream; `Importer.fetch` at D and
`Exporter.serve` at P carry it out. Reports are values, returned to the handoff's state machine: a transport
never raises for a lost peer, never touches a pool's accounting and never calls the engine.

Only the owner writes its pool: D's own importer copies into blocks that D has reserved for this handoff, also
out of a socket, and looks before each write whether they are still the fetch's. Bytes that arrive by
themselves (NCCL) land in staging memory first.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol, runtime_checkable

from pdserve.core.types import BlockId, HandoffId
from pdserve.kvtransfer.transports.segment_table import SegmentTable

TRANSPORT_LADDER = ("inproc", "cuda_ipc", "nccl", "shm", "tcp")
"""Best rung first; the names are the same in flags, messages and metrics."""


def accepted(configured: str) -> tuple[str, ...]:
    """The rungs that a D accepts under `handoff.transport`, best first."""
    return TRANSPORT_LADDER if configured == "auto" else (configured,)


class Segment(NamedTuple):
    """One block to copy. `generation` is the source block's when it was exposed."""

    source: BlockId
    generation: int
    destination: BlockId
    valid_tokens: int


@dataclass(frozen=True)
class Grant:
    """What to copy for one chunk. `epoch` tells attempts over one connection apart.

    `digest` is D's alone and does not travel: an importer that can digest while it copies should.
    """

    handoff: HandoffId
    epoch: int
    seq: int
    segments: tuple[Segment, ...]
    digest: bool = False

    @cached_property
    def table(self) -> SegmentTable:
        """`segments` as columns. Raises OverflowError for a number of 64 bits."""
        return SegmentTable(self.segments)

    def __reduce__(self) -> tuple[type["Grant"], tuple[object, ...]]:
        """Without the table, which a copy thread may add at any moment."""
        return Grant, (self.handoff, self.epoch, self.seq, self.segments, self.digest)


@dataclass(frozen=True, slots=True)
class Landed:
    """Every segment is in D's blocks and every source generation was still right after the copy."""

    handoff: HandoffId
    epoch: int
    seq: int
    num_bytes: int
    seconds: float
    digests: bytes | None = None
    """Of what was written to D's blocks (see digest.py), if the grant asked and this transport makes them."""


@dataclass(frozen=True, slots=True)
class SourceDone:
    """P's half has read its blocks for the last time."""

    handoff: HandoffId
    epoch: int
    seq: int


@dataclass(frozen=True, slots=True)
class Failed:
    """This half will not touch the grant's blocks again, and the bytes must not be used."""

    handoff: HandoffId
    epoch: int
    seq: int
    reason: str


@dataclass(frozen=True, slots=True)
class Offer:
    """How P can serve: the transport's name and what D needs to connect."""

    transport: str
    parameters: Mapping[str, str]


class Importer(Protocol):
    """D's half of one pair (D, P incarnation)."""

    transport: str

    async def fetch(self, grant: Grant) -> Landed | Failed:
        """Copy the grant's segments into D's pool. Returns only when no late write can follow."""
        ...

    async def close(self) -> None:
        """Let go of the peer; outstanding fetches report Failed."""
        ...


@runtime_checkable
class Warmable(Protocol):
    """An importer with work to do before its first fetch."""

    async def warm_up(self) -> None:
        """Do it now, while P still computes. Raises OSError or Unavailable where P is out of reach."""
        ...


class Exporter(Protocol):
    """P's half for all its readers."""

    transport: str

    async def start(self) -> None: ...

    def offer(self) -> Offer:
        """What a D needs to make the matching importer."""
        ...

    async def serve(self, grant: Grant) -> SourceDone | Failed:
        """Carry out a grant. One-sided transports return SourceDone at once."""
        ...

    def forget(self, handoff: HandoffId) -> None:
        """The handoff ended: drop what is kept for it."""
        ...

    async def close(self) -> None: ...
