"""One request as D owns it: what it emitted, who listens, and what it cost until its first token."""

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass, field

from pdserve.core.errors import PdserveError
from pdserve.core.types import (
    BlockName,
    FinishReason,
    OwnerId,
    RequestId,
    SamplingParams,
    SequenceId,
    Usage,
)
from pdserve.core.worker_record import WorkerRecord
from pdserve.proto import inference_pb2, worker_pb2
from pdserve.workers.session_link import SessionLink


@dataclass(frozen=True, slots=True)
class PrefillCandidate:
    """A worker that D may ask for the prompt's KV."""

    worker: str
    incarnation: str
    endpoint: str


@dataclass(frozen=True, slots=True)
class DecodeAsk:
    """An Open, converted and checked: the prompt, its names, and where to get its KV."""

    request_id: RequestId
    token_ids: tuple[int, ...]
    chain: tuple[BlockName, ...]
    namespace: bytes
    sampling: SamplingParams
    candidates: tuple[PrefillCandidate, ...]
    deadline: float | None
    """On D's clock."""


@dataclass(slots=True)
class Marks:
    """Readings of D's clock (and differences of P's) that the ledger is made of. Seconds."""

    first_open: float | None = None
    serving_open: float | None = None
    prefill_queue: float = 0.0
    prefill: float = 0.0
    filled_seen: float | None = None
    committed: float | None = None

    def ledger(self, first_token: float) -> inference_pb2.Ledger:
        """D's parts; see core/lifecycle.py for the events."""
        first_open = self.first_open if self.first_open is not None else first_token
        serving = self.serving_open if self.serving_open is not None else first_open
        committed = self.committed if self.committed is not None else first_token
        filled = self.filled_seen if self.filled_seen is not None else committed
        return inference_pb2.Ledger(
            retry=serving - first_open,
            prefill_queue=self.prefill_queue,
            prefill=self.prefill,
            exposed_transfer=committed - filled,
            first_step=first_token - committed,
        )


@dataclass(slots=True)
class DecodeRequest:
    """State of one request at D. Tokens are kept until the router acknowledges the end."""

    ask: DecodeAsk
    link: SessionLink | None
    marks: Marks = field(default_factory=Marks)
    route: inference_pb2.Route = field(default_factory=inference_pb2.Route)
    items: list[worker_pb2.FrameItem] = field(default_factory=list)
    task: "asyncio.Task[None] | None" = None
    sequence: SequenceId | None = None
    """Set while the engine has it."""
    emitted: int = 0
    unacknowledged_since_detach: int = 0
    cached_tokens: int = 0
    finished: bool = False
    abort_reason: PdserveError | None = None

    @property
    def request_id(self) -> RequestId:
        return self.ask.request_id

    @property
    def promise_owner(self) -> OwnerId:
        """Who the promise is booked on, apart from the owners that hold blocks."""
        return OwnerId(f"promise/{self.ask.request_id}")

    def emit(self, item: worker_pb2.FrameItem) -> None:
        """Record an item and pass it to the session, if there is one."""
        item.request_id = self.request_id
        item.first_index = self.emitted
        self.emitted += len(item.token_ids)
        if item.finish_reason or item.HasField("failure"):
            self.finished = True
        self.items.append(item)
        if self.link is None:
            self.unacknowledged_since_detach += len(item.token_ids)
        else:
            self.link.add_item(item)

    def missing_from(self, next_index: int) -> Iterator[worker_pb2.FrameItem]:
        """Items that a router which forwarded `next_index` tokens has not seen."""
        for item in self.items:
            last = bool(item.finish_reason) or item.HasField("failure")
            if last or item.first_index >= next_index:
                yield item

    def usage(self) -> Usage:
        return Usage(len(self.ask.token_ids), self.emitted, self.cached_tokens)

    def finish(self, reason: FinishReason, item: worker_pb2.FrameItem) -> None:
        """Emit the last item, with the counts."""
        self.usage_into(item, len(item.token_ids))
        item.finish_reason = str(reason)
        self.emit(item)

    def usage_into(self, item: worker_pb2.FrameItem, new_tokens: int) -> None:
        item.usage.prompt_tokens = len(self.ask.token_ids)
        item.usage.completion_tokens = self.emitted + new_tokens
        item.usage.cached_tokens = self.cached_tokens

    def fail(self, error: PdserveError) -> None:
        """Emit the last item of a request that cannot go on."""
        if self.finished:
            return
        failure = worker_pb2.Failure(
            code=int(error.grpc_code),
            message=error.message,
            retriable=error.retriable,
            retry_after_s=error.retry_after_s,
        )
        item = worker_pb2.FrameItem(failure=failure)
        self.usage_into(item, 0)
        self.emit(item)


def decode_route(record: WorkerRecord) -> inference_pb2.Route:
    """A route that names D; the prefill side is added when it is known."""
    return inference_pb2.Route(
        decode_worker=record.worker, decode_incarnation=record.incarnation, decode_pid=record.pid
    )
