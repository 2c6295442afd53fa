"""What the shell must do, as values. Messages to send begin with Send."""

from dataclasses import dataclass

from pdserve.kvtransfer.handoff.states import Outcome, ReleaseStatus


@dataclass(frozen=True, slots=True)
class SendAbort:
    """Tell the peer that this side gives the handoff up."""

    reason: str


# D


@dataclass(frozen=True, slots=True)
class SendOpen:
    """Ask P for the prompt's KV."""


@dataclass(frozen=True, slots=True)
class Connect:
    """Get an importer for this P; answer Connected or ConnectFailed."""


@dataclass(frozen=True, slots=True)
class Reserve:
    """Pin what is here, take the rest, all or nothing; answer BlocksReserved or ReserveRefused at once."""


@dataclass(frozen=True, slots=True)
class SendGrant:
    """Ask P for the bytes of one chunk."""

    seq: int


@dataclass(frozen=True, slots=True)
class Fetch:
    """Let the transport write the chunk's blocks; it answers ChunkLanded or ChunkFailed."""

    seq: int
    rank: int


@dataclass(frozen=True, slots=True)
class Verify:
    """Check digests; answer ChunkVerified or ChunkMismatched."""

    seq: int
    rank: int


@dataclass(frozen=True, slots=True)
class SendRelease:
    """All is here: ask for the commit."""


@dataclass(frozen=True, slots=True)
class Commit:
    """The blocks are the owner's for good."""


@dataclass(frozen=True, slots=True)
class Quarantine:
    """Give back what no transport can touch; keep the rest out of use, and ask the transports to hurry."""


@dataclass(frozen=True, slots=True)
class FreeBlocks:
    """Give everything back; answer BlocksFreed."""


@dataclass(frozen=True, slots=True)
class Finish:
    """Tell the caller that it was not served."""

    outcome: Outcome
    message: str
    retry_after_s: float | None = None


# P


@dataclass(frozen=True, slots=True)
class SendOpened:
    """Answer with the estimate and the queue position."""


@dataclass(frozen=True, slots=True)
class SendRejected:
    """Answer that the request is not taken on, and why."""

    reason: str


@dataclass(frozen=True, slots=True)
class StartFill:
    """Let the engine compute. Every (rank, stage) answers PartFilled or PartFailed."""


@dataclass(frozen=True, slots=True)
class SendChunk:
    """Announce blocks that are final, with their generations and digests."""

    seq: int


@dataclass(frozen=True, slots=True)
class SendFilled:
    """Say that everything is computed, in how many chunks."""

    chunks: int


@dataclass(frozen=True, slots=True)
class Serve:
    """Let the transport read the chunk; it answers ServeDone or ServeFailed."""

    seq: int
    rank: int


@dataclass(frozen=True, slots=True)
class SendSourceFailed:
    """Say that a granted chunk cannot be read."""

    seq: int
    reason: str


@dataclass(frozen=True, slots=True)
class CancelFill:
    """Stop the engine. Every (rank, stage) that still runs answers PartStopped, or how it ended."""


@dataclass(frozen=True, slots=True)
class SendReleased:
    """The last word: ok is the commit point of the transaction."""

    status: ReleaseStatus


@dataclass(frozen=True, slots=True)
class Unpin:
    """Give the blocks back to the pool, where they stay cached; answer Unpinned unless it was the end."""


Instruction = (
    SendAbort
    | SendOpen
    | Connect
    | Reserve
    | SendGrant
    | Fetch
    | Verify
    | SendRelease
    | Commit
    | Quarantine
    | FreeBlocks
    | Finish
    | SendOpened
    | SendRejected
    | StartFill
    | SendChunk
    | SendFilled
    | Serve
    | SendSourceFailed
    | CancelFill
    | SendReleased
    | Unpin
)
