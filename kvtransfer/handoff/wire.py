"""Between handoff messages and core values: the only file that knows both."""

from collections.abc import Iterable, Sequence

from pdserve.core.types import BlockId, HandoffId, Incarnation, RequestId, WorkerId
from pdserve.kvtransfer.handoff.ask import FetchedPrefix, HandoffPeer, PrefixHolder
from pdserve.kvtransfer.handoff.messages import (
    Chunk,
    FilledReply,
    OffersRequest,
    OpenedReply,
    OpenRequest,
    Rejection,
)
from pdserve.kvtransfer.handoff.states import Outcome, ReleaseStatus
from pdserve.kvtransfer.names import pack_chain, pack_tokens, unpack_chain, unpack_tokens
from pdserve.kvtransfer.pool.layout import KvLayout
from pdserve.kvtransfer.transports.base import Grant, Offer, Segment
from pdserve.proto import handoff_pb2 as pb

_REJECTIONS = (Outcome.REJECTED, Outcome.SCHEMA)


# D to P


def pack_offers_request(request: OffersRequest) -> pb.OffersRequest:
    return pb.OffersRequest(
        schema=request.schema,
        representation=_pack_layout(request.layout),
        transports=request.transports,
        decode_worker=request.decode_worker,
        decode_incarnation=request.decode_incarnation,
        prefill_incarnation=request.prefill_incarnation,
    )


def unpack_offers_request(message: pb.OffersRequest) -> OffersRequest:
    """Raises ValueError or ConfigError for what no D of this protocol sends."""
    return OffersRequest(
        schema=message.schema,
        layout=_unpack_layout(message.representation),
        transports=tuple(message.transports),
        decode_worker=WorkerId(message.decode_worker),
        decode_incarnation=Incarnation(message.decode_incarnation),
        prefill_incarnation=Incarnation(message.prefill_incarnation),
    )


def pack_open(request: OpenRequest) -> pb.DecodeMessage:
    return pb.DecodeMessage(
        open=pb.HandoffOpen(
            handoff_id=request.handoff,
            request_id=request.request,
            schema=request.schema,
            representation=_pack_layout(request.layout),
            token_ids=pack_tokens(request.token_ids),
            chain=pack_chain(request.chain),
            remaining_s=request.remaining_s,
            transports=request.transports,
            digest=request.digest,
            decode_worker=request.decode_worker,
            decode_incarnation=request.decode_incarnation,
            prefill_incarnation=request.prefill_incarnation,
            prefix=None if request.prefix is None else pack_prefix(request.prefix),
            held_only=request.held_only,
        )
    )


def unpack_open(message: pb.HandoffOpen) -> OpenRequest:
    """Raises ValueError or ConfigError for what no D of this protocol sends."""
    layout = _unpack_layout(message.representation)
    if len(message.token_ids) % 4:
        raise ValueError(f"token ids take 4 bytes each, got {len(message.token_ids)} bytes")
    return OpenRequest(
        handoff=HandoffId(message.handoff_id),
        request=RequestId(message.request_id),
        schema=message.schema,
        layout=layout,
        token_ids=unpack_tokens(message.token_ids),
        chain=unpack_chain(message.chain),
        remaining_s=message.remaining_s if message.HasField("remaining_s") else None,
        transports=tuple(message.transports),
        digest=message.digest,
        decode_worker=WorkerId(message.decode_worker),
        decode_incarnation=Incarnation(message.decode_incarnation),
        prefill_incarnation=Incarnation(message.prefill_incarnation),
        prefix=unpack_prefix(message.prefix) if message.HasField("prefix") else None,
        held_only=message.held_only,
    )


def pack_prefix(holder: PrefixHolder) -> pb.PrefixHolder:
    peer = holder.peer
    return pb.PrefixHolder(
        worker=peer.worker, incarnation=peer.incarnation, endpoint=peer.endpoint, blocks=holder.blocks
    )


def unpack_prefix(message: pb.PrefixHolder) -> PrefixHolder:
    peer = HandoffPeer(WorkerId(message.worker), Incarnation(message.incarnation), message.endpoint)
    return PrefixHolder(peer, message.blocks)


def pack_grant(grant: Grant, transport: str) -> pb.DecodeMessage:
    segments = [pb.BlockSegment(**segment._asdict()) for segment in grant.segments]
    packed = pb.HandoffGrant(epoch=grant.epoch, seq=grant.seq, transport=transport, segments=segments)
    return pb.DecodeMessage(grant=packed)


def unpack_grant(message: pb.HandoffGrant, handoff: HandoffId) -> Grant:
    segments = tuple(
        Segment(BlockId(s.source), s.generation, BlockId(s.destination), s.valid_tokens)
        for s in message.segments
    )
    return Grant(handoff, message.epoch, message.seq, segments)


def pack_release() -> pb.DecodeMessage:
    return pb.DecodeMessage(release=pb.HandoffRelease())


def pack_decode_abort(reason: str) -> pb.DecodeMessage:
    return pb.DecodeMessage(abort=pb.HandoffAbort(reason=reason))


def pack_decode_heartbeat(progress: int) -> pb.DecodeMessage:
    return pb.DecodeMessage(heartbeat=pb.HandoffHeartbeat(progress=progress))


# P to D


def pack_opened(reply: OpenedReply) -> pb.PrefillMessage:
    return pb.PrefillMessage(
        opened=pb.HandoffOpened(
            estimate_s=reply.estimate_s,
            queue_position=reply.queue_position,
            offers=_pack_offers(reply.offers),
            prefill_worker=reply.worker,
            prefill_incarnation=reply.incarnation,
            prefill_pid=reply.pid,
            cached_blocks=reply.cached_blocks,
        )
    )


def unpack_opened(message: pb.HandoffOpened) -> OpenedReply:
    return OpenedReply(
        estimate_s=message.estimate_s,
        queue_position=message.queue_position,
        offers=_unpack_offers(message.offers),
        worker=WorkerId(message.prefill_worker),
        incarnation=Incarnation(message.prefill_incarnation),
        pid=message.prefill_pid,
        cached_blocks=message.cached_blocks,
    )


def pack_offers(offers: Sequence[Offer] | Rejection) -> pb.OffersReply:
    if isinstance(offers, Rejection):
        return pb.OffersReply(rejected=pack_rejected(offers).rejected)
    return pb.OffersReply(offers=_pack_offers(offers))


def unpack_offers(message: pb.OffersReply) -> tuple[Offer, ...] | Rejection:
    """Raises ValueError for an outcome that is no rejection."""
    if message.HasField("rejected"):
        return unpack_rejected(message.rejected)
    return _unpack_offers(message.offers)


def pack_rejected(rejection: Rejection) -> pb.PrefillMessage:
    return pb.PrefillMessage(
        rejected=pb.HandoffRejected(
            reason=rejection.reason,
            retry_after_s=rejection.retry_after_s,
            outcome=rejection.outcome.value,
            held_blocks=rejection.held_blocks,
        )
    )


def unpack_rejected(message: pb.HandoffRejected) -> Rejection:
    """Raises ValueError for an outcome that is no rejection."""
    outcome = Outcome(message.outcome)
    if outcome not in _REJECTIONS:
        raise ValueError(f"outcome {message.outcome!r} is not one of {[str(one) for one in _REJECTIONS]}")
    return Rejection(
        outcome,
        message.reason,
        message.retry_after_s if message.HasField("retry_after_s") else None,
        message.held_blocks if message.HasField("held_blocks") else None,
    )


def pack_chunk(chunk: Chunk) -> pb.PrefillMessage:
    return pb.PrefillMessage(
        chunk=pb.HandoffChunk(
            seq=chunk.seq,
            first_block=chunk.first,
            blocks=chunk.blocks,
            generations=chunk.generations,
            last_valid_tokens=chunk.last_valid_tokens,
            digests=chunk.digests or b"",
        )
    )


def unpack_chunk(message: pb.HandoffChunk, digest_bytes: int | None) -> Chunk:
    """`digest_bytes` per block, None where none were asked for. Raises ValueError where it is not whole."""
    blocks = tuple(BlockId(block) for block in message.blocks)
    if not blocks or len(message.generations) != len(blocks):
        raise ValueError(f"a chunk has {len(blocks)} blocks and {len(message.generations)} generations")
    if digest_bytes is not None and len(message.digests) != digest_bytes * len(blocks):
        raise ValueError(
            f"a chunk of {len(blocks)} blocks has {len(message.digests)} bytes of digests, "
            f"expected {digest_bytes} per block"
        )
    return Chunk(
        seq=message.seq,
        first=message.first_block,
        blocks=blocks,
        generations=tuple(message.generations),
        last_valid_tokens=message.last_valid_tokens,
        digests=None if digest_bytes is None else message.digests,
    )


def pack_filled(reply: FilledReply) -> pb.PrefillMessage:
    return pb.PrefillMessage(
        filled=pb.HandoffFilled(
            chunks=reply.chunks,
            tokens=reply.tokens,
            prefill_queue_s=reply.prefill_queue_s,
            prefill_s=reply.prefill_s,
            cached_tokens=reply.cached_tokens,
            prefix_blocks_fetched=0 if reply.prefix is None else reply.prefix.blocks,
            prefix_worker="" if reply.prefix is None else reply.prefix.worker,
        )
    )


def unpack_filled(message: pb.HandoffFilled) -> FilledReply:
    fetched = FetchedPrefix(WorkerId(message.prefix_worker), message.prefix_blocks_fetched)
    return FilledReply(
        chunks=message.chunks,
        tokens=message.tokens,
        prefill_queue_s=message.prefill_queue_s,
        prefill_s=message.prefill_s,
        cached_tokens=message.cached_tokens,
        prefix=fetched if fetched.blocks else None,
    )


def pack_released(status: ReleaseStatus) -> pb.PrefillMessage:
    return pb.PrefillMessage(released=pb.HandoffReleased(status=status.value))


def unpack_released(message: pb.HandoffReleased) -> ReleaseStatus:
    """Raises ValueError for a status that is none."""
    return ReleaseStatus(message.status)


def pack_source_failed(epoch: int, seq: int, reason: str) -> pb.PrefillMessage:
    return pb.PrefillMessage(source_failed=pb.HandoffSourceFailed(epoch=epoch, seq=seq, reason=reason))


def pack_prefill_abort(reason: str) -> pb.PrefillMessage:
    return pb.PrefillMessage(aborted=pb.HandoffAbort(reason=reason))


def pack_prefill_heartbeat(progress: int) -> pb.PrefillMessage:
    return pb.PrefillMessage(heartbeat=pb.HandoffHeartbeat(progress=progress))


def _pack_offers(offers: Sequence[Offer]) -> list[pb.TransportOffer]:
    return [pb.TransportOffer(transport=offer.transport, parameters=offer.parameters) for offer in offers]


def _unpack_offers(messages: Iterable[pb.TransportOffer]) -> tuple[Offer, ...]:
    return tuple(Offer(message.transport, dict(message.parameters)) for message in messages)


def _pack_layout(layout: KvLayout) -> pb.Representation:
    return pb.Representation(
        dtype=layout.dtype,
        tp=1,
        num_layers=layout.num_layers,
        num_kv_heads=layout.num_kv_heads,
        head_dim=layout.head_dim,
        block_tokens=layout.block_tokens,
    )


def _unpack_layout(kept: pb.Representation) -> KvLayout:
    """Raises ValueError or ConfigError for what no worker of this protocol keeps."""
    if kept.tp != 1:
        raise ValueError(f"tensor parallel size {kept.tp} was asked for; this worker serves 1")
    return KvLayout(
        kept.num_layers, kept.num_kv_heads, kept.head_dim, kept.dtype, block_tokens=kept.block_tokens
    )
