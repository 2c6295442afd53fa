"""What P has said on one handoff's stream, as D understands it. No I/O; the caller brings the time."""

from pdserve.core.types import BLOCK_TOKENS
from pdserve.kvtransfer.handoff import events as ev
from pdserve.kvtransfer.handoff import wire
from pdserve.kvtransfer.handoff.ask import HandoffPeer
from pdserve.kvtransfer.handoff.messages import Chunk, FilledReply, OpenedReply, Rejection
from pdserve.proto import handoff_pb2 as pb


class Heard:
    """Turns P's messages into events and keeps their content. Their order is for the table to judge."""

    def __init__(self, peer: HandoffPeer, positions: int, digest_bytes: int | None) -> None:
        """`positions` travel; `digest_bytes` per block are expected, None where none were asked for."""
        self._peer = peer
        self._positions = positions
        self._digest_bytes = digest_bytes
        self.opened: OpenedReply | None = None
        self.rejection: Rejection | None = None
        self.filled: FilledReply | None = None
        self.filled_at = 0.0
        """When D read FILLED, seconds on D's clock."""
        self.chunks: list[Chunk] = []

    @property
    def working(self) -> bool:
        """Whether P has taken the prompt on and is not done with it."""
        return self.opened is not None and self.filled is None

    def hear(self, message: pb.PrefillMessage, now: float) -> object:
        """The event that a message is; heartbeats are none. Raises ValueError for what no P of ours sends."""
        match message.WhichOneof("message"):
            case "opened":
                return self._hear_opened(wire.unpack_opened(message.opened))
            case "rejected":
                said = self.rejection = wire.unpack_rejected(message.rejected)
                return ev.Rejected(said.outcome, said.reason, said.retry_after_s)
            case "chunk":
                return self._hear_chunk(wire.unpack_chunk(message.chunk, self._digest_bytes))
            case "filled":
                self.filled, self.filled_at = wire.unpack_filled(message.filled), now
                return ev.Filled(self.filled.chunks, self.filled.tokens)
            case "released":
                return ev.Released(wire.unpack_released(message.released))
            case "aborted":
                return ev.PeerAborted(message.aborted.reason)
            case "source_failed":
                return ev.SourceFailed(message.source_failed.seq, message.source_failed.reason)
            case other:
                raise ValueError(f"{other or 'a message without content'} is no event")

    def _hear_opened(self, reply: OpenedReply) -> object:
        if reply.incarnation != self._peer.incarnation:
            return ev.Violation(f"P is {reply.incarnation}, asked was {self._peer.incarnation}")
        self.opened = reply
        return ev.Opened()

    def _hear_chunk(self, chunk: Chunk) -> object:
        valid = min(BLOCK_TOKENS, self._positions - BLOCK_TOKENS * (chunk.end - 1))
        if chunk.last_valid_tokens != valid:
            return ev.Violation(f"chunk {chunk.seq} ends in {chunk.last_valid_tokens} tokens, not in {valid}")
        self.chunks.append(chunk)
        return ev.ChunkReady(chunk.seq, chunk.first, chunk.end)
