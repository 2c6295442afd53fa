"""One request as D owns it: what it emitted, who listens, and what it cost until its first token."""

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from pdserve.core.errors import PdserveError
from pdserve.core.types import (
    BLOCK_TOKENS,
    BlockName,
    FinishReason,
    OwnerId,
    RequestId,
    SamplingParams,
    SequenceId,
)
from pdserve.core.worker_record import WorkerRecord
from pdserve.kvtransfer.handoff.ask import Committed, FetchedPrefix, PrefixHolder
from pdserve.proto import inference_pb2, worker_pb2
from pdserve.workers.choice import Choice
from pdserve.workers.engine.messages import SequenceOutput
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
    prefix: PrefixHolder | None = None
    """Who holds the most of the prompt, as the router sees it."""


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
    choices: tuple[Choice, ...] = field(init=False)
    live: set[SequenceId] = field(default_factory=set)
    """What the engine has of it: its choices, or the prompt before they fork."""
    prepared: object = None
    """What was compiled for it: held, not used, so that the engine finds it."""
    unacknowledged_since_detach: int = 0
    """Tokens of all choices."""
    cached_tokens: int = 0
    finished: bool = False
    abort_reason: PdserveError | None = None
    handoff: Committed | None = None
    """What brought the prompt's KV; None while it is not there, or where D's own engine prefilled."""
    settled: bool = False
    """It needs no memory any more: the promise is back, the engine has let go."""
    disowned: bool = False
    """No router may claim it any more; it is forgotten the moment it is settled."""
    deadline_timer: asyncio.TimerHandle | None = None
    grace_timer: asyncio.TimerHandle | None = None
    """Runs while no router listens."""

    def __post_init__(self) -> None:
        self.choices = tuple(Choice(index) for index in range(self.ask.sampling.n))

    @property
    def request_id(self) -> RequestId:
        return self.ask.request_id

    @property
    def promise_owner(self) -> OwnerId:
        """Who the promise is booked on, apart from the owners that hold blocks."""
        return OwnerId(f"promise/{self.ask.request_id}")

    @property
    def emitted(self) -> int:
        """Tokens of all choices that were passed on."""
        return sum(choice.emitted for choice in self.choices)

    def emit(self, choice: Choice, item: worker_pb2.FrameItem) -> None:
        """Pass on what is new of one choice; with its last one, the request may be finished."""
        item.choice = choice.index
        item.first_index = choice.emitted
        choice.emitted += len(item.token_ids)
        choice.finished = bool(item.finish_reason)
        self.finished = all(choice.finished for choice in self.choices)
        self._send(item)

    def _send(self, item: worker_pb2.FrameItem) -> None:
        """Record an item and pass it to the session, if there is one."""
        item.request_id = self.request_id
        self.items.append(item)
        if self.link is None:
            self.unacknowledged_since_detach += len(item.token_ids)
        else:
            self.link.add_item(item)

    def missing_from(self, next_index: Sequence[int]) -> Iterator[worker_pb2.FrameItem]:
        """Items that a router has not seen which forwarded so many tokens of each choice, 0 where absent."""
        for item in self.items:
            last = bool(item.finish_reason) or item.HasField("failure")
            seen = next_index[item.choice] if item.choice < len(next_index) else 0
            if last or item.first_index >= seen:
                yield item

    def finish(self, choice: Choice, reason: FinishReason, item: worker_pb2.FrameItem) -> None:
        """Emit a choice's last item, with its counts."""
        self._usage_into(item, choice.emitted + len(item.token_ids))
        item.finish_reason = str(reason)
        self.emit(choice, item)

    def _usage_into(self, item: worker_pb2.FrameItem, completion_tokens: int) -> None:
        item.usage.prompt_tokens = len(self.ask.token_ids)
        item.usage.completion_tokens = completion_tokens
        item.usage.cached_tokens = self.cached_tokens

    def fail(self, error: PdserveError) -> None:
        """Emit the last item of a request that cannot go on."""
        if self.finished:
            return
        item = worker_pb2.FrameItem(failure=describe_failure(error))
        self._usage_into(item, self.emitted)
        self.finished = True
        self._send(item)

    def listen(self, link: SessionLink | None) -> None:
        """Pass items to `link` from now on, and to no other."""
        if self.link is not None:
            self.link.requests.discard(self.request_id)
        self.link = link
        if link is not None:
            link.requests.add(self.request_id)
            self.unacknowledged_since_detach = 0
            self.stop_grace()

    @property
    def is_heard(self) -> bool:
        """A session is there that items can be sent on."""
        return self.link is not None and not self.link.broken

    def stop_grace(self) -> None:
        """A router is there again, or the wait for one is over."""
        if self.grace_timer is not None:
            self.grace_timer.cancel()
            self.grace_timer = None

    def stop_deadline(self) -> None:
        """It ended before its deadline."""
        if self.deadline_timer is not None:
            self.deadline_timer.cancel()
            self.deadline_timer = None

    def served_by(self, record: WorkerRecord, attempt: int, now: float) -> None:
        """D's own engine prefills: no handoff."""
        self.route.prefill_worker = record.worker
        self.route.prefill_incarnation = record.incarnation
        self.route.prefill_pid = record.pid
        self.route.candidates_tried = attempt
        self.marks.serving_open = now

    def committed(self, done: Committed, attempt: int) -> None:
        """A handoff brought the prompt's KV."""
        self.handoff = done
        route, marks = self.route, self.marks
        route.prefill_worker = done.prefill_worker
        route.prefill_incarnation = done.prefill_incarnation
        route.prefill_pid = done.prefill_pid
        route.transport = done.transport
        route.blocks_moved = done.blocks_moved
        route.bytes_moved = done.bytes_moved
        route.blocks_reused = done.blocks_reused
        route.candidates_tried = attempt
        marks.prefill_queue = done.prefill_queue_s
        marks.prefill = done.prefill_s
        marks.filled_seen = done.filled_seen_at
        marks.committed = done.committed_at
        self.prefix_fetched(done.prefix)
        self.cached_tokens = max(done.prefill_cached_tokens, done.blocks_reused * BLOCK_TOKENS)

    def prefix_fetched(self, prefix: FetchedPrefix | None) -> None:
        """Whoever prefills got so many blocks from another worker; None: it asked nobody, or in vain."""
        if prefix is not None:
            self.route.prefix_worker = prefix.worker
            self.route.prefix_blocks_fetched = prefix.blocks

    def prefilled(self, output: SequenceOutput) -> None:
        """D's own prefill is over; nothing happens where that is known, or a handoff brought the KV."""
        marks = self.marks
        if marks.committed is not None or output.started_at is None:
            return
        serving = marks.serving_open if marks.serving_open is not None else output.started_at
        ended = output.prefill_ended_at if output.prefill_ended_at is not None else output.started_at
        marks.prefill_queue = output.started_at - serving
        marks.prefill = ended - output.started_at
        marks.committed = ended
        self.cached_tokens = output.cached_tokens
        self.route.blocks_reused = output.cached_tokens // BLOCK_TOKENS

    def describe_first(self, item: worker_pb2.FrameItem, output: SequenceOutput, now: float) -> None:
        """Close D's side of the ledger on the request's first item."""
        self.prefilled(output)
        marks = self.marks
        first_token = output.first_token_at if output.first_token_at is not None else now
        item.ledger.CopyFrom(marks.ledger(first_token))
        self.route.measured_s = 0.0 if marks.first_open is None else first_token - marks.first_open
        item.route.CopyFrom(self.route)


def describe_failure(error: PdserveError) -> worker_pb2.Failure:
    """An error as a request's last item carries it."""
    return worker_pb2.Failure(
        code=int(error.grpc_code),
        message=error.message,
        retriable=error.retriable,
        retry_after_s=error.retry_after_s,
    )


def decode_route(record: WorkerRecord) -> inference_pb2.Route:
    """A route that names D; the prefill side is added when it is known."""
    return inference_pb2.Route(
        decode_worker=record.worker, decode_incarnation=record.incarnation, decode_pid=record.pid
    )
