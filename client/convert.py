"""From the server's messages to the client's values."""

from pdserve.client.values import (
    BlockCounts,
    Chunk,
    ClusterStatus,
    IndexUse,
    ModelInfo,
    PrefillCost,
    Route,
    TransportUse,
    WorkerStatus,
)
from pdserve.core.errors import InternalError
from pdserve.core.lifecycle import Ledger
from pdserve.core.types import FinishReason, RequestId, Usage
from pdserve.proto import inference_pb2 as pb
from pdserve.proto.sampling import decode_logprobs


def chunk(message: pb.GenerateChunk) -> Chunk:
    return Chunk(
        request_id=RequestId(message.request_id),
        choice=message.choice,
        text=message.text,
        token_ids=tuple(message.token_ids),
        first_index=message.first_index,
        logprobs=decode_logprobs(message.logprobs),
        finish_reason=_finish_reason(message.finish_reason),
    )


def usage(message: pb.Usage) -> Usage:
    return Usage(message.prompt_tokens, message.completion_tokens, message.cached_tokens)


def ledger(message: pb.Ledger) -> Ledger:
    """The server's parts, in seconds; `network` is still 0, see Ledger.close."""
    return Ledger(
        queue=message.queue,
        locate=message.locate,
        place=message.place,
        retry=message.retry,
        prefill_queue=message.prefill_queue,
        prefill=message.prefill,
        exposed_transfer=message.exposed_transfer,
        first_step=message.first_step,
    )


def route(message: pb.Route) -> Route:
    return Route(
        prefill_worker=message.prefill_worker,
        decode_worker=message.decode_worker,
        prefill_incarnation=message.prefill_incarnation,
        decode_incarnation=message.decode_incarnation,
        prefill_pid=message.prefill_pid or None,
        decode_pid=message.decode_pid or None,
        transport=message.transport,
        blocks_moved=message.blocks_moved,
        bytes_moved=message.bytes_moved,
        blocks_reused=message.blocks_reused,
        candidates_tried=message.candidates_tried,
        predicted_local=_cost(message.predicted_local) if message.HasField("predicted_local") else None,
        predicted_handoff=_cost(message.predicted_handoff) if message.HasField("predicted_handoff") else None,
        measured_s=message.measured_s,
        prefix_blocks_fetched=message.prefix_blocks_fetched,
        prefix_worker=message.prefix_worker,
    )


def _cost(message: pb.PrefillCost) -> PrefillCost:
    return PrefillCost(message.seconds, message.harm_s)


def models(message: pb.ListModelsResponse) -> tuple[ModelInfo, ...]:
    return tuple(ModelInfo(m.name, m.context_tokens, m.vocab_size, m.dtype) for m in message.models)


def status(message: pb.GetStatusResponse) -> ClusterStatus:
    return ClusterStatus(
        workers=tuple(_worker(worker) for worker in message.workers),
        index=message.index,
        index_available=message.index_available,
        requests_in_flight=message.requests_in_flight,
        admin=message.admin,
        index_use=_index_use(message.index_use) if message.HasField("index_use") else None,
    )


def _worker(message: pb.WorkerStatus) -> WorkerStatus:
    return WorkerStatus(
        worker=message.worker,
        incarnation=message.incarnation,
        role=message.role,
        model=message.model,
        endpoint=message.endpoint,
        pid=message.pid,
        draining=message.draining,
        role_weight=message.role_weight,
        blocks=_blocks(message.blocks),
        running=message.running,
        waiting=message.waiting,
        handoffs=message.handoffs,
        in_flight=message.in_flight,
        state=message.state,
        uptime_s=message.uptime_s,
        preemptions=message.preemptions,
        transports=tuple(
            TransportUse(use.transport, use.chunks, use.bytes, use.seconds, use.pairs, use.falls)
            for use in message.transports
        ),
    )


def _index_use(message: pb.IndexUse) -> IndexUse:
    return IndexUse(
        lookups=message.lookups,
        unanswered=message.unanswered,
        seconds=message.seconds,
        asked_blocks=message.asked_blocks,
        found_blocks=message.found_blocks,
    )


def _blocks(message: pb.BlockCounts) -> BlockCounts:
    return BlockCounts(
        total=message.total,
        free=message.free,
        held=message.held,
        reserved=message.reserved,
        cached=message.cached,
        loading=message.loading,
        quarantined=message.quarantined,
        promised=message.promised,
    )


def _finish_reason(name: str) -> FinishReason | None:
    if not name:
        return None
    try:
        return FinishReason(name)
    except ValueError as error:
        known = ", ".join(FinishReason)
        raise InternalError(
            f"the server ended with reason {name!r}, this client knows {known}: update it"
        ) from error
