"""Between protobuf messages and the router's own values: the only file that knows both."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from pdserve.core.text.chat_template import ChatMessage
from pdserve.core.types import BlockName, RequestId, SamplingParams
from pdserve.core.worker_record import WorkerLoad, WorkerRecord
from pdserve.kvtransfer.index.metered import IndexStats
from pdserve.kvtransfer.names import pack_chain, pack_tokens
from pdserve.proto import handoff_pb2, inference_pb2, worker_pb2
from pdserve.proto.sampling import encode
from pdserve.router.policies.base import Placement, PrefillCost
from pdserve.router.prompt import Chat, Prompt, TokenIds


@dataclass(frozen=True, slots=True)
class Timings:
    """The router's parts of the ledger, in seconds."""

    queue: float
    locate: float
    place: float


def prompt_of(request: inference_pb2.GenerateRequest | inference_pb2.TokenizeRequest) -> Prompt | None:
    """The prompt in the form in which it came; None when there is none."""
    match request.WhichOneof("prompt"):
        case "text":
            return request.text
        case "chat":
            return Chat(tuple(map(_chat_message, request.chat.messages)), request.chat.tools_json)
        case "token_ids":
            assert isinstance(request, inference_pb2.GenerateRequest)
            return TokenIds(tuple(request.token_ids.ids))
        case _:
            return None


def open_request(
    request: RequestId,
    tokens: tuple[int, ...],
    chain: Iterable[BlockName],
    sampling: SamplingParams,
    namespace: bytes,
) -> worker_pb2.OpenRequest:
    """An Open with every sampling field set; candidates and time are filled in when it is sent."""
    return worker_pb2.OpenRequest(
        request_id=request,
        prompt_token_ids=pack_tokens(tokens),
        chain=pack_chain(chain),
        sampling=encode(sampling),
        namespace=namespace,
    )


def candidate(record: WorkerRecord) -> worker_pb2.Candidate:
    return worker_pb2.Candidate(
        worker=record.worker, incarnation=record.incarnation, endpoint=record.endpoint
    )


def prefix(record: WorkerRecord, blocks: int) -> handoff_pb2.PrefixHolder:
    return handoff_pb2.PrefixHolder(
        worker=record.worker, incarnation=record.incarnation, endpoint=record.endpoint, blocks=blocks
    )


def chunk(
    item: worker_pb2.FrameItem, timings: Timings | None, placement: Placement
) -> inference_pb2.GenerateChunk:
    """What the client gets for one item. `timings` go into the first chunk's ledger, and what `placement`
    expected into its route; None for the others."""
    out = inference_pb2.GenerateChunk(
        request_id=item.request_id,
        choice=item.choice,
        first_index=item.first_index,
        token_ids=item.token_ids,
        text=item.text,
        finish_reason=item.finish_reason,
        logprobs=item.logprobs,
    )
    if timings is not None:
        out.ledger.CopyFrom(item.ledger)
        out.ledger.queue = timings.queue
        out.ledger.locate = timings.locate
        out.ledger.place = timings.place
        out.route.CopyFrom(item.route)
        _expect(out.route, placement)
    if item.HasField("usage"):
        out.usage.CopyFrom(item.usage)
    return out


def _expect(route: inference_pb2.Route, placement: Placement) -> None:
    if placement.local is not None:
        route.predicted_local.CopyFrom(_cost(placement.local))
    if placement.handoff is not None:
        route.predicted_handoff.CopyFrom(_cost(placement.handoff))


def _cost(cost: PrefillCost) -> inference_pb2.PrefillCost:
    return inference_pb2.PrefillCost(seconds=cost.seconds, harm_s=cost.harm_s)


def load_of(heartbeat: worker_pb2.WorkerHeartbeat) -> WorkerLoad:
    load = heartbeat.load
    return WorkerLoad(
        queued_prefill_tokens=load.queued_prefill_tokens,
        queued_prefills=load.queued_prefills,
        prefills=load.prefills,
        prefill_busy_s=load.prefill_busy_s,
        running=load.running,
        waiting=load.waiting,
        context_tokens=load.context_tokens,
        free_blocks=load.blocks.free,
        cached_blocks=load.blocks.cached,
        promised_blocks=load.blocks.promised,
        total_blocks=load.blocks.total,
        progress=heartbeat.progress,
        perf_model=dict(load.perf_model),
        ways=dict(load.ways),
    )


def worker_status(
    record: WorkerRecord, load: worker_pb2.WorkerLoad, state: str
) -> inference_pb2.WorkerStatus:
    """`state`: ready | draining | suspect."""
    return inference_pb2.WorkerStatus(
        worker=record.worker,
        incarnation=record.incarnation,
        role=record.role,
        model=record.model,
        endpoint=record.endpoint,
        pid=record.pid,
        draining=record.draining,
        role_weight=record.role_weight,
        blocks=load.blocks,
        running=load.running,
        waiting=load.waiting,
        handoffs=load.handoffs,
        in_flight=load.in_flight,
        state=state,
        uptime_s=load.uptime_s,
        preemptions=load.preemptions,
        transports=load.transports,
    )


def index_use(stats: IndexStats | None) -> inference_pb2.IndexUse | None:
    """None where nobody meters the index."""
    if stats is None:
        return None
    return inference_pb2.IndexUse(
        lookups=stats.locate.answered + stats.locate.unavailable,
        unanswered=stats.locate.unavailable,
        seconds=stats.locate.seconds,
        asked_blocks=stats.asked_blocks,
        found_blocks=stats.found_blocks,
    )


def models(records: Mapping[str, WorkerRecord]) -> inference_pb2.ListModelsResponse:
    """One entry per model, in order of name, as any of its workers describes it."""
    listed = [
        inference_pb2.Model(
            name=name, context_tokens=record.context_tokens, vocab_size=record.vocab_size, dtype=record.dtype
        )
        for name, record in sorted(records.items())
    ]
    return inference_pb2.ListModelsResponse(models=listed)


def _chat_message(message: inference_pb2.ChatMessage) -> ChatMessage:
    return ChatMessage(
        role=message.role,
        content=message.content,
        name=message.name,
        tool_call_id=message.tool_call_id,
        tool_calls_json=message.tool_calls_json,
    )
