"""The one place where the worker's protobuf messages become core types and back."""

import math

from pdserve.core.clock import Clock
from pdserve.core.errors import InvalidRequest
from pdserve.core.types import BLOCK_TOKENS, RequestId
from pdserve.core.worker_record import WorkerLoad, WorkerRecord
from pdserve.kvtransfer.handoff.wire import unpack_prefix
from pdserve.kvtransfer.names import chain, unpack_chain, unpack_tokens
from pdserve.kvtransfer.pool.pool import PoolCounts
from pdserve.proto import inference_pb2, sampling, worker_pb2
from pdserve.workers.decode_request import DecodeAsk, PrefillCandidate
from pdserve.workers.worker_use import WorkerUse


def decode_ask(message: worker_pb2.OpenRequest, clock: Clock) -> DecodeAsk:
    """Raises InvalidRequest where the message is not understood or contradicts itself."""
    try:
        tokens = unpack_tokens(message.prompt_token_ids)
        names = unpack_chain(message.chain) if message.chain else chain(message.namespace, tokens)
    except ValueError as error:
        raise InvalidRequest(f"the prompt's tokens or block names are not understood: {error}") from error
    if not message.request_id:
        raise InvalidRequest("the request has no id: every Open needs one of its own")
    if not tokens:
        raise InvalidRequest("the prompt is empty: send at least one token")
    if len(names) != len(tokens) // BLOCK_TOKENS:
        needed = len(tokens) // BLOCK_TOKENS
        raise InvalidRequest(f"{len(names)} block names for {len(tokens)} prompt tokens: it takes {needed}")
    remaining = message.remaining_s if message.HasField("remaining_s") else None
    if remaining is not None and not math.isfinite(remaining):
        raise InvalidRequest(f"remaining_s is {remaining}: leave it out where there is no deadline")
    return DecodeAsk(
        request_id=RequestId(message.request_id),
        token_ids=tokens,
        chain=names,
        namespace=message.namespace,
        sampling=sampling.decode(message.sampling),
        candidates=tuple(PrefillCandidate(c.worker, c.incarnation, c.endpoint) for c in message.candidates),
        deadline=None if remaining is None else clock.now() + remaining,
        prefix=unpack_prefix(message.prefix) if message.HasField("prefix") else None,
    )


def block_counts(counts: PoolCounts) -> inference_pb2.BlockCounts:
    return inference_pb2.BlockCounts(
        total=counts.total,
        free=counts.free,
        held=counts.held,
        reserved=counts.reserved,
        cached=counts.cached,
        loading=counts.loading,
        quarantined=counts.quarantined,
        promised=counts.promised,
    )


def worker_status(
    record: WorkerRecord, load: WorkerLoad, counts: PoolCounts, handoffs: int, in_flight: int, use: WorkerUse
) -> inference_pb2.WorkerStatus:
    return inference_pb2.WorkerStatus(
        worker=record.worker,
        incarnation=record.incarnation,
        role=str(record.role),
        model=record.model,
        endpoint=record.endpoint,
        pid=record.pid,
        draining=record.draining,
        role_weight=record.role_weight,
        blocks=block_counts(counts),
        running=load.running,
        waiting=load.waiting,
        handoffs=handoffs,
        in_flight=in_flight,
        state="draining" if record.draining else "ready",
        uptime_s=use.uptime_s,
        preemptions=use.preemptions,
        transports=transport_uses(use),
    )


def worker_load(
    record: WorkerRecord, load: WorkerLoad, counts: PoolCounts, handoffs: int, in_flight: int, use: WorkerUse
) -> worker_pb2.WorkerLoad:
    return worker_pb2.WorkerLoad(
        queued_prefill_tokens=load.queued_prefill_tokens,
        queued_prefills=load.queued_prefills,
        prefills=load.prefills,
        prefill_busy_s=load.prefill_busy_s,
        running=load.running,
        waiting=load.waiting,
        context_tokens=load.context_tokens,
        blocks=block_counts(counts),
        draining=record.draining,
        role_weight=record.role_weight,
        perf_model=load.perf_model,
        ways=load.ways,
        handoffs=handoffs,
        in_flight=in_flight,
        uptime_s=use.uptime_s,
        preemptions=use.preemptions,
        transports=transport_uses(use),
    )


def transport_uses(use: WorkerUse) -> list[inference_pb2.TransportUse]:
    return [
        inference_pb2.TransportUse(
            transport=transport,
            chunks=used.chunks,
            bytes=used.num_bytes,
            seconds=used.seconds,
            pairs=used.pairs,
            falls=used.falls,
        )
        for transport, used in sorted(use.transports.items())
    ]
