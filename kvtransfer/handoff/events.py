"""What can happen to a handoff, as values. Messages of the peer, reports of transports, acts of the shell."""

from dataclasses import dataclass

from pdserve.kvtransfer.handoff.states import Outcome, ReleaseStatus

Part = tuple[int, int]
"""(chunk, consumer rank) of a copy, or (rank, stage) of a fill."""


@dataclass(frozen=True, slots=True)
class Settle:
    """Nothing new came in: fires the rows whose condition the last event made true."""


# Both sides


@dataclass(frozen=True, slots=True)
class StreamClosed:
    """The lease is over: the peer left, or was silent for too long."""

    reason: str = ""


@dataclass(frozen=True, slots=True)
class DeadlinePassed:
    """The request's time is over: nobody else could serve it either."""

    reason: str = ""


@dataclass(frozen=True, slots=True)
class StateExpired:
    """The present state's time is over: what it waits for does not come, or not in time."""

    reason: str = ""


@dataclass(frozen=True, slots=True)
class Cancelled:
    """This side's worker gives the handoff up."""

    reason: str = ""


@dataclass(frozen=True, slots=True)
class PeerAborted:
    """The peer gave the handoff up and said so."""

    reason: str = ""


@dataclass(frozen=True, slots=True)
class Violation:
    """The shell read a message that no honest peer sends."""

    reason: str = ""


# D: from the shell


@dataclass(frozen=True, slots=True)
class Started:
    """The promise is taken; the stream is there."""


@dataclass(frozen=True, slots=True)
class Connected:
    """The importer for this P is ready."""


@dataclass(frozen=True, slots=True)
class ConnectFailed:
    """No transport reaches this P."""

    reason: str = ""


@dataclass(frozen=True, slots=True)
class BlocksReserved:
    """All blocks are taken, of which the first `reused` already hold the prompt's KV."""

    reused: int = 0


@dataclass(frozen=True, slots=True)
class ReserveRefused:
    """The pool cannot deliver them now; nothing was taken."""


@dataclass(frozen=True, slots=True)
class MemoryFreed:
    """Asking again may succeed."""


@dataclass(frozen=True, slots=True)
class ChunkLanded:
    """The transport will not touch the chunk's blocks again; they hold what it read."""

    seq: int
    rank: int


@dataclass(frozen=True, slots=True)
class ChunkFailed:
    """The transport will not touch the chunk's blocks again; their bytes are worthless."""

    seq: int
    rank: int
    reason: str = ""


@dataclass(frozen=True, slots=True)
class ChunkVerified:
    """The digests agree."""

    seq: int
    rank: int


@dataclass(frozen=True, slots=True)
class ChunkMismatched:
    """The digests differ."""

    seq: int
    rank: int
    reason: str = ""


@dataclass(frozen=True, slots=True)
class BlocksFreed:
    """The pool has all blocks of this handoff back."""


# D: from P


@dataclass(frozen=True, slots=True)
class Opened:
    """P took the request on."""


@dataclass(frozen=True, slots=True)
class Rejected:
    """P did not take the request on."""

    outcome: Outcome = Outcome.REJECTED
    reason: str = ""
    retry_after_s: float | None = None


@dataclass(frozen=True, slots=True)
class ChunkReady:
    """Blocks `first` to `end` (exclusive) of the prompt are final at P. `seq` counts from 0."""

    seq: int
    first: int
    end: int


@dataclass(frozen=True, slots=True)
class Filled:
    """P has computed `tokens` positions and announced `chunks` chunks."""

    chunks: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Released:
    """P's last word."""

    status: ReleaseStatus


@dataclass(frozen=True, slots=True)
class SourceFailed:
    """P's half of a transport could not serve a chunk."""

    seq: int
    reason: str = ""


# P: from the shell


@dataclass(frozen=True, slots=True)
class Accepted:
    """The request can be served here, now or when its turn comes."""


@dataclass(frozen=True, slots=True)
class Refused:
    """The request cannot be served here."""

    reason: str = ""


@dataclass(frozen=True, slots=True)
class Admitted:
    """Its share of the pool is there."""


@dataclass(frozen=True, slots=True)
class ChunkComputed:
    """The next chunk is final on every rank."""


@dataclass(frozen=True, slots=True)
class PartFilled:
    """One (rank, stage) has computed all its positions and will not write again."""

    rank: int
    stage: int


@dataclass(frozen=True, slots=True)
class PartFailed:
    """One (rank, stage) cannot go on and will not write again."""

    rank: int
    stage: int
    reason: str = ""


@dataclass(frozen=True, slots=True)
class PartStopped:
    """One (rank, stage) was told to stop and will not write again."""

    rank: int
    stage: int


@dataclass(frozen=True, slots=True)
class ServeDone:
    """A transport has read the chunk for the last time."""

    seq: int
    rank: int


@dataclass(frozen=True, slots=True)
class ServeFailed:
    """A transport gave the chunk up and will not read it again."""

    seq: int
    rank: int
    reason: str = ""


@dataclass(frozen=True, slots=True)
class MemoryPressure:
    """Others need these blocks more; a reader that comes for them late loses them."""


@dataclass(frozen=True, slots=True)
class Unpinned:
    """The pool has all pins of this handoff back."""


# P: from D


@dataclass(frozen=True, slots=True)
class GrantAsked:
    """D's leader wants one chunk, for each of its ranks."""

    seq: int


@dataclass(frozen=True, slots=True)
class ReleaseAsked:
    """D has everything, checked."""
