"""The decode role: owns a request from Open to its last acknowledged token.

    Open ─ promise ─┬─ candidate is this worker, or its prefix is here ─────────► engine (prefill + decode)
                    └─ next candidate ─ handoff ─ committed ────────────────────► engine (decode)
                              ▲            └ not served ┐
                              └─────────────────────────┘

Nothing is queued here without a promise, so an Open is answered at once: it runs, or Replace.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Mapping
from functools import partial

from pdserve.core.clock import Clock
from pdserve.core.config import EngineConfig, SessionConfig
from pdserve.core.errors import (
    Cancelled,
    DeadlineExceeded,
    Overloaded,
    PdserveError,
    Unavailable,
    WorkerLost,
    from_foreign,
)
from pdserve.core.lifecycle import Lifecycle
from pdserve.core.types import (
    BLOCK_TOKENS,
    FinishReason,
    Incarnation,
    OwnerId,
    RequestId,
    SequenceId,
    WorkerId,
    blocks_for,
    hit_limit,
)
from pdserve.core.worker_record import WorkerRecord
from pdserve.kvtransfer.handoff.consumer import (
    Committed,
    DecodeHandoffs,
    HandoffAsk,
    HandoffPeer,
    NotServed,
)
from pdserve.kvtransfer.pool.pool import KvPool
from pdserve.proto import worker_pb2
from pdserve.workers.decode_request import DecodeAsk, DecodeRequest, PrefillCandidate, decode_route
from pdserve.workers.dispatch import OutputDispatcher
from pdserve.workers.engine.messages import SequenceOutput, SequenceSpec
from pdserve.workers.session_link import SessionLink

log = logging.getLogger(__name__)

Observer = Callable[[Lifecycle, Mapping[str, object]], None]


class DecodeRole:
    """All requests of one worker. Runs on the event loop; not thread-safe."""

    def __init__(
        self,
        *,
        record: Callable[[], WorkerRecord],
        pool: KvPool,
        dispatcher: OutputDispatcher,
        handoffs: DecodeHandoffs,
        engine_config: EngineConfig,
        session_config: SessionConfig,
        clock: Clock,
        observer: Observer,
    ) -> None:
        self._record = record
        self._pool = pool
        self._dispatcher = dispatcher
        self._handoffs = handoffs
        self._engine_config = engine_config
        self._session = session_config
        self._clock = clock
        self._observe = observer
        self._requests: dict[RequestId, DecodeRequest] = {}
        self._timers: dict[RequestId, asyncio.TimerHandle] = {}
        self._ended = asyncio.Event()
        self.draining = False
        self.counters: dict[str, int] = {}
        dispatcher.after_step(self.flush)

    # -- what a session asks -------------------------------------------------------------------------

    def open(self, link: SessionLink, ask: DecodeAsk) -> worker_pb2.Replace | None:
        """Start a request, or say at once why it must be placed elsewhere. A known id is an attach."""
        if ask.request_id in self._requests:
            self.attach(link, ask.request_id, 0)
            return None
        if self.draining:
            return worker_pb2.Replace(request_id=ask.request_id, reason="draining")
        request = DecodeRequest(ask=ask, link=link, route=decode_route(self._record()))
        needed = self._promise_blocks(ask)
        if not self._pool.promise(request.promise_owner, needed):
            self._count("replaced")
            counts = self._pool.counts()
            reason = f"needs {needed} KV blocks; {counts.promised} of {counts.total} are promised to others"
            return worker_pb2.Replace(request_id=ask.request_id, reason=reason, retry_after_s=0.5)
        self._count("opened")
        self._requests[ask.request_id] = request
        link.requests.add(ask.request_id)
        self._set_deadline(request)
        request.task = asyncio.create_task(self._serve(request), name=f"request-{ask.request_id}")
        return None

    def attach(self, link: SessionLink, request_id: RequestId, next_index: int) -> None:
        """Move a request to `link` and send again what it has not seen."""
        request = self._requests.get(request_id)
        if request is None:
            self.refuse_attach(link, request_id)
            return
        self._count("attached")
        if request.link is not None:
            request.link.requests.discard(request_id)
        request.link = link
        request.unacknowledged_since_detach = 0
        link.requests.add(request_id)
        for item in request.missing_from(next_index):
            link.add_item(item)
        link.flush()

    def refuse_attach(self, link: SessionLink, request_id: RequestId) -> None:
        """Tell a router that its request does not live here (any more)."""
        lost = WorkerLost(f"request {request_id} is not known here: its grace is over or it never began")
        failure = worker_pb2.Failure(code=int(lost.grpc_code), message=lost.message, retriable=True)
        link.add_item(worker_pb2.FrameItem(request_id=request_id, failure=failure))
        link.flush()

    def cancel(self, request_id: RequestId) -> None:
        """The client left. Unknown ids are old news."""
        request = self._requests.get(request_id)
        if request is not None:
            self._abort(request, Cancelled(f"request {request_id} was cancelled"))

    def acknowledge(self, request_id: RequestId) -> None:
        """The router has read the end: forget the request."""
        request = self._requests.get(request_id)
        if request is not None and request.finished:
            self._forget(request)

    def detach(self, link: SessionLink) -> None:
        """A session broke. Its requests go on for `reattach_s`; then those that nobody claimed end."""
        loop = asyncio.get_running_loop()
        for request_id in list(link.requests):
            request = self._requests.get(request_id)
            if request is not None and request.link is link:
                request.link = None
                loop.call_later(self._session.reattach_s, self._reap, request)
        link.requests.clear()

    # -- draining and ending -------------------------------------------------------------------------

    async def drain(self, grace_s: float) -> int:
        """Take nothing new; wait for the streams, then fail the rest as retriable. Returns how many."""
        self.draining = True
        await self.until_idle(grace_s)
        return self.fail_all(WorkerLost(f"worker {self._record().worker} was drained: try again"))

    async def until_idle(self, grace_s: float) -> None:
        """Wait until every request has ended, or `grace_s` is over."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace_s):
                while self.unfinished():
                    self._ended.clear()
                    await self._ended.wait()

    def fail_all(self, error: PdserveError) -> int:
        """End every request that still runs."""
        running = [request for request in self._requests.values() if not request.finished]
        for request in running:
            self._abort(request, error)
        return len(running)

    def unfinished(self) -> int:
        """Requests that still run."""
        return sum(1 for request in self._requests.values() if not request.finished)

    def in_flight(self) -> int:
        """Requests that are remembered, finished ones that nobody acknowledged included."""
        return len(self._requests)

    def flush(self) -> None:
        """One frame per session for everything since the last flush."""
        for link in {r.link for r in self._requests.values() if r.link is not None}:
            link.flush()

    # -- one request ---------------------------------------------------------------------------------

    async def _serve(self, request: DecodeRequest) -> None:
        request.marks.first_open = self._clock.now()
        self._observe(Lifecycle.FIRST_OPEN, {"request": request.request_id})
        try:
            await self._walk(request)
        except asyncio.CancelledError:
            self._end(request, request.abort_reason or Cancelled("the worker is stopping"))
        except Exception as error:
            log.exception("request %s failed", request.request_id)
            self._end(request, from_foreign(error))

    async def _walk(self, request: DecodeRequest) -> None:
        """Go through the candidates until one has served."""
        me = self._record()
        refusals: list[NotServed] = []
        for attempt, candidate in enumerate(request.ask.candidates):
            if candidate.worker == me.worker or self._holds_prompt(request.ask):
                self._start_local(request, attempt)
                return
            request.marks.serving_open = self._clock.now()
            owner = OwnerId(f"handoff/{request.request_id}/{attempt}")
            try:
                outcome = await self._handoffs.fetch(self._handoff_ask(request, owner), _peer(candidate))
            except asyncio.CancelledError:
                self._pool.release(owner)  # it may have committed in the moment of the cancel
                raise
            if isinstance(outcome, Committed):
                self._start_committed(request, outcome, attempt)
                return
            refusals.append(outcome)
            self._count(f"not_served_{outcome.reason}")
            log.info(
                "request %s: %s did not serve: %s", request.request_id, candidate.worker, outcome.message
            )
        raise _all_refused(refusals)

    def _holds_prompt(self, ask: DecodeAsk) -> bool:
        """Whether a handoff would move nothing worth a transfer: D computes the rest as a short prefill."""
        limit = hit_limit(len(ask.token_ids))
        return limit == 0 or self._pool.match(ask.chain[:limit]) >= limit

    def _handoff_ask(self, request: DecodeRequest, owner: OwnerId) -> HandoffAsk:
        ask = request.ask
        remaining = None if ask.deadline is None else ask.deadline - self._clock.now()
        return HandoffAsk(
            request_id=ask.request_id,
            token_ids=ask.token_ids,
            chain=ask.chain,
            remaining_s=remaining,
            owner=owner,
        )

    def _start_local(self, request: DecodeRequest, attempt: int) -> None:
        me = self._record()
        request.route.prefill_worker = me.worker
        request.route.prefill_incarnation = me.incarnation
        request.route.prefill_pid = me.pid
        request.route.candidates_tried = attempt
        request.marks.serving_open = self._clock.now()
        self._submit(request, OwnerId(f"local/{request.request_id}"), 0)

    def _start_committed(self, request: DecodeRequest, done: Committed, attempt: int) -> None:
        route = request.route
        route.prefill_worker = done.prefill_worker
        route.prefill_incarnation = done.prefill_incarnation
        route.prefill_pid = done.prefill_pid
        route.transport = done.transport
        route.blocks_moved = done.blocks_moved
        route.bytes_moved = done.bytes_moved
        route.blocks_reused = done.blocks_reused
        route.candidates_tried = attempt
        marks = request.marks
        marks.prefill_queue = done.prefill_queue_s
        marks.prefill = done.prefill_s
        marks.filled_seen = done.filled_seen_at
        marks.committed = done.committed_at
        request.cached_tokens = max(done.prefill_cached_tokens, done.blocks_reused * BLOCK_TOKENS)
        self._submit(request, done.owner, done.num_computed)

    def _submit(self, request: DecodeRequest, owner: OwnerId, num_computed: int) -> None:
        ask = request.ask
        request.sequence = SequenceId(f"{ask.request_id}/0")
        spec = SequenceSpec(
            sequence_id=request.sequence,
            owner=owner,
            token_ids=ask.token_ids,
            chain=ask.chain,
            namespace=ask.namespace,
            sampling=ask.sampling,
            num_computed=num_computed,
        )
        try:
            self._dispatcher.submit(spec, partial(self._on_output, request))
        except BaseException:
            request.sequence = None
            self._pool.release(owner)
            raise

    def _on_output(self, request: DecodeRequest, output: SequenceOutput) -> None:
        """One sequence's part of a step."""
        if output.error is not None or output.finish_reason is FinishReason.ABORT:
            request.sequence = None
            aborted = request.abort_reason or Cancelled("aborted")
            self._end(request, output.error or aborted)
            return
        if not output.new_token_ids and not output.text and output.finish_reason is None:
            return
        item = worker_pb2.FrameItem(token_ids=output.new_token_ids, text=output.text)
        if output.first_index == 0:
            self._describe_first(request, item, output)
        for offset in range(len(output.new_token_ids)):
            index = output.first_index + offset
            self._observe(Lifecycle.TOKEN, {"request": request.request_id, "index": index})
        if output.finish_reason is None:
            request.emit(item)
            if request.unacknowledged_since_detach > self._session.unacknowledged_tokens:
                self._abort(request, Cancelled("no router reads this request"))
        else:
            request.sequence = None
            request.finish(output.finish_reason, item)
            self._settle(request)

    def _describe_first(
        self, request: DecodeRequest, item: worker_pb2.FrameItem, output: SequenceOutput
    ) -> None:
        """Close D's side of the ledger on the item that carries the first token."""
        first_token = output.first_token_at if output.first_token_at is not None else self._clock.now()
        marks = request.marks
        if marks.committed is None and output.started_at is not None:
            serving = marks.serving_open if marks.serving_open is not None else output.started_at
            ended = output.prefill_ended_at if output.prefill_ended_at is not None else output.started_at
            marks.prefill_queue = output.started_at - serving
            marks.prefill = ended - output.started_at
            marks.committed = ended
            request.cached_tokens = output.cached_tokens
            request.route.blocks_reused = output.cached_tokens // BLOCK_TOKENS
        item.ledger.CopyFrom(marks.ledger(first_token))
        item.route.CopyFrom(request.route)

    # -- endings -------------------------------------------------------------------------------------

    def _abort(self, request: DecodeRequest, error: PdserveError) -> None:
        if request.finished or request.abort_reason is not None:
            return
        request.abort_reason = error
        self._count("aborted")
        if request.sequence is not None:
            self._dispatcher.abort(request.sequence)
        elif request.task is not None:
            request.task.cancel()

    def _end(self, request: DecodeRequest, error: PdserveError) -> None:
        request.fail(error)
        self._settle(request)
        if request.link is not None:
            request.link.flush()

    def _settle(self, request: DecodeRequest) -> None:
        """The request needs no memory any more. It is remembered until its end is acknowledged."""
        self._pool.unpromise(request.promise_owner)
        timer = self._timers.pop(request.request_id, None)
        if timer is not None:
            timer.cancel()
        self._observe(Lifecycle.FINISHED, {"request": request.request_id, "tokens": request.emitted})
        self._count("finished")
        if request.link is None or request.link.broken:
            asyncio.get_running_loop().call_later(self._session.reattach_s, self._reap, request)
        self._ended.set()

    def _reap(self, request: DecodeRequest) -> None:
        """The grace of a broken session is over."""
        if request.link is not None and not request.link.broken:
            return
        if self._requests.get(request.request_id) is not request:
            return
        self._abort(request, Cancelled("its router did not come back"))
        if request.finished:
            self._forget(request)

    def _forget(self, request: DecodeRequest) -> None:
        self._requests.pop(request.request_id, None)
        if request.link is not None:
            request.link.requests.discard(request.request_id)

    def _set_deadline(self, request: DecodeRequest) -> None:
        if request.ask.deadline is None:
            return
        remaining = max(0.0, request.ask.deadline - self._clock.now())
        error = DeadlineExceeded(f"request {request.request_id} passed its deadline at the decode worker")
        loop = asyncio.get_running_loop()
        self._timers[request.request_id] = loop.call_later(remaining, self._abort, request, error)

    def _promise_blocks(self, ask: DecodeAsk) -> int:
        """Blocks of the prompt and of as many completion tokens as a promise covers."""
        headroom = min(ask.sampling.max_tokens, self._engine_config.headroom_tokens)
        return blocks_for(len(ask.token_ids) + headroom)

    def _count(self, name: str) -> None:
        self.counters[name] = self.counters.get(name, 0) + 1


def _peer(candidate: PrefillCandidate) -> HandoffPeer:
    return HandoffPeer(WorkerId(candidate.worker), Incarnation(candidate.incarnation), candidate.endpoint)


def _all_refused(refusals: list[NotServed]) -> PdserveError:
    """What a request fails with when the last candidate did not serve it either."""
    if not refusals:
        return Unavailable("no prefill candidate was named: add a prefill or a mixed worker")
    if any(refusal.reason == "deadline" for refusal in refusals):
        return DeadlineExceeded(f"the deadline passed in the handoff: {refusals[-1].message}")
    tried = "; ".join(refusal.message for refusal in refusals)
    waits = [r.retry_after_s for r in refusals if r.retry_after_s is not None]
    if all(refusal.reason == "rejected" for refusal in refusals):
        return Overloaded(f"every prefill candidate refused: {tried}", retry_after_s=min(waits, default=0.5))
    return WorkerLost(f"every prefill candidate failed: {tried}")
