"""The decode role: owns a request from Open to its last acknowledged token.

    Open ─ promise ─┬─ candidate is this worker, or its prefix is here ─────────► engine (prefill + decode)
                    └─ next candidate ─ handoff ─ committed ────────────────────► engine (decode)
                              ▲            └ not served ┐
                              └─────────────────────────┘

Several choices fork when the prompt's KV is there (choice_runs.py). A request is remembered until a router
has read its end (request_claims.py).
Nothing is queued here without a promise, so an Open is answered at once: it runs, or Replace.
"""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial

from pdserve.core.clock import Clock
from pdserve.core.config import EngineConfig, SessionConfig
from pdserve.core.errors import (
    Cancelled,
    ContextTooLong,
    DeadlineExceeded,
    PdserveError,
    WorkerLost,
    from_foreign,
)
from pdserve.core.lifecycle import Lifecycle
from pdserve.core.request_limits import promise_blocks
from pdserve.core.types import FinishReason, RequestId, SamplingParams
from pdserve.core.worker_record import WorkerRecord
from pdserve.kvtransfer.handoff.consumer import DecodeHandoffs
from pdserve.kvtransfer.handoff.prefix_fetch import PrefixFetch
from pdserve.kvtransfer.pool.pool import KvPool
from pdserve.proto import worker_pb2
from pdserve.proto.sampling import encode_logprobs
from pdserve.workers.candidate_walk import CandidateWalk
from pdserve.workers.choice import Choice
from pdserve.workers.choice_runs import ChoiceRuns, why_ended
from pdserve.workers.decode_request import DecodeAsk, DecodeRequest, decode_route, describe_failure
from pdserve.workers.dispatch import OutputDispatcher
from pdserve.workers.engine.messages import SequenceOutput
from pdserve.workers.prompt_fork import CopyBlocks
from pdserve.workers.request_claims import RequestClaims
from pdserve.workers.session_link import SessionLink

log = logging.getLogger(__name__)

RETRY_AFTER_S = 0.5
"""What a refused router is told: promises come and go within about this time."""

Observer = Callable[[Lifecycle, Mapping[str, object]], None]


class DecodeRole:
    """All requests of one worker. Runs on the event loop; not thread-safe."""

    def __init__(
        self,
        *,
        record: Callable[[], WorkerRecord],
        pool: KvPool,
        copy_blocks: CopyBlocks,
        prepare: Callable[[SamplingParams], Awaitable[object]],
        dispatcher: OutputDispatcher,
        handoffs: DecodeHandoffs,
        prefixes: PrefixFetch,
        engine_config: EngineConfig,
        session_config: SessionConfig,
        clock: Clock,
        observer: Observer,
        first_token: Callable[[DecodeRequest], object],
    ) -> None:
        """`prepare` compiles ahead what takes long: the engine finds it while its result is held.
        `first_token` is told of every request whose first token came.
        """
        self._record = record
        self._pool = pool
        self._dispatcher = dispatcher
        self._candidates = CandidateWalk(record, pool, handoffs, prefixes, clock, self._count)
        self._runs = ChoiceRuns(
            pool, copy_blocks, dispatcher, self._on_output, headroom_tokens=engine_config.headroom_tokens
        )
        self._prepare = prepare
        self._engine_config = engine_config
        self._session = session_config
        self._clock = clock
        self._observe = observer
        self._first_token = first_token
        self._claims = RequestClaims(session_config.reattach_s, self._abandon)
        self._ended = asyncio.Event()
        self.draining = False
        self.counters: dict[str, int] = {}
        dispatcher.after_step(self.flush)

    # -- what a session asks -------------------------------------------------------------------------

    def open(self, link: SessionLink, ask: DecodeAsk) -> worker_pb2.Replace | None:
        """Start a request, or say at once why it must be placed elsewhere. A known id is an attach.

        Raises ContextTooLong for what can never be promised here: no waiting helps.
        """
        known = self._claims.get(ask.request_id)
        if known is not None and known.disowned:
            # What it still holds, in the engine and in the pool, has the same names.
            return self._replace(ask, "an earlier request with its id is still ending here")
        if known is not None:
            self.attach(link, ask.request_id, ())
            return None
        if self.draining:
            return worker_pb2.Replace(request_id=ask.request_id, reason="draining")
        needed, total = self._promise_blocks(ask), self._pool.counts().total
        if needed > total:
            raise ContextTooLong(
                f"{len(ask.token_ids)} prompt tokens with their headroom need {needed} KV blocks, this "
                f"worker's pool has {total}: shorten the prompt or raise engine.pool_blocks"
            )
        request = DecodeRequest(ask=ask, link=None, route=decode_route(self._record()))
        if not self._pool.promise(request.promise_owner, needed):
            promised = self._pool.counts().promised
            return self._replace(
                ask, f"needs {needed} KV blocks; {promised} of {total} are promised to others"
            )
        self._count("opened")
        self._claims.add(request)
        request.listen(link)
        self._set_deadline(request)
        request.task = asyncio.create_task(self._serve(request), name=f"request-{ask.request_id}")
        # In a callback: a task that is cancelled before its first step never runs a line of its own.
        request.task.add_done_callback(partial(self._served, request))
        return None

    def attach(self, link: SessionLink, request_id: RequestId, next_index: Sequence[int]) -> None:
        """Move a request to `link` and send again what it has not seen, each choice from its `next_index`."""
        request = self._claims.get(request_id)
        if request is None or request.disowned:
            self.refuse_attach(link, request_id)
            return
        self._count("attached")
        request.listen(link)
        for item in request.missing_from(next_index):
            link.add_item(item)
        link.flush()

    def refuse_attach(self, link: SessionLink, request_id: RequestId) -> None:
        """Tell a router that its request does not live here (any more)."""
        lost = WorkerLost(f"request {request_id} is not known here: its grace is over or it never began")
        link.add_item(worker_pb2.FrameItem(request_id=request_id, failure=describe_failure(lost)))
        link.flush()

    def cancel(self, request_id: RequestId, *, tell: bool = True) -> None:
        """The client left. Unknown ids are old news.

        Without `tell` the router has forgotten the request already: it hears and acknowledges nothing, and
        the id is free as soon as the request has ended.
        """
        request = self._claims.get(request_id)
        if request is None:
            return
        if not tell:
            request.listen(None)
            self._claims.disown(request)
        self._abort(request, Cancelled(f"request {request_id} was cancelled"))

    def acknowledge(self, request_id: RequestId) -> None:
        """The router has read the end: forget the request."""
        request = self._claims.get(request_id)
        if request is not None and request.finished:
            self._claims.forget(request)

    def detach(self, link: SessionLink) -> None:
        """A session broke. Its requests go on for `reattach_s`; then those that nobody claimed end."""
        for request_id in list(link.requests):
            request = self._claims.get(request_id)
            if request is not None and request.link is link:
                request.listen(None)
                self._claims.await_claim(request)
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
        running = [request for request in self._claims if not request.finished]
        for request in running:
            self._abort(request, error)
        return len(running)

    def void(self, error: PdserveError) -> None:
        """Another incarnation begins: end every request, and let no router claim one of the old."""
        for request in self._claims:
            self._claims.disown(request)
            self._abort(request, error)

    def unfinished(self) -> int:
        """Requests that still run."""
        return sum(1 for request in self._claims if not request.finished)

    def in_flight(self) -> int:
        """Requests that are remembered, finished ones that nobody acknowledged included."""
        return len(self._claims)

    def flush(self) -> None:
        """One frame per session for everything since the last flush."""
        for link in {r.link for r in self._claims if r.link is not None}:
            link.flush()

    # -- one request ---------------------------------------------------------------------------------

    async def _serve(self, request: DecodeRequest) -> None:
        request.prepared = await self._prepare(request.ask.sampling)
        request.marks.first_open = self._clock.now()
        self._observe(Lifecycle.FIRST_OPEN, {"request": request.request_id})
        committed, attempt = await self._candidates.walk(request)
        if committed is None:
            request.served_by(self._record(), attempt, self._clock.now())
            await self._candidates.fetch_prefix(request)
        else:
            request.committed(committed, attempt)
        await self._runs.start(request, committed)

    def _served(self, request: DecodeRequest, task: "asyncio.Task[None]") -> None:
        """The walk is over: the engine has the request, or it ends here."""
        if task.cancelled():
            self._end(request, request.abort_reason or WorkerLost("the worker is stopping: try again"))
        elif (error := task.exception()) is not None:
            if request.abort_reason is None:
                known = isinstance(error, PdserveError)
                log.warning("request %s failed", request.request_id, exc_info=None if known else error)
            self._fail(request, request.abort_reason or from_foreign(error))

    def _on_output(self, request: DecodeRequest, choice: Choice, output: SequenceOutput) -> None:
        """One sequence's part of a step. A defect in here ends this request and no other."""
        try:
            self._take(request, choice, output)
        except Exception as error:
            log.exception("request %s: a step's output could not be taken", request.request_id)
            self._fail(request, from_foreign(error))

    def _take(self, request: DecodeRequest, choice: Choice, output: SequenceOutput) -> None:
        if output.error is not None or output.finish_reason is FinishReason.ABORT:
            self._fail(request, why_ended(request, output))
            return
        if not output.new_token_ids and not output.text and output.finish_reason is None:
            return
        item = worker_pb2.FrameItem(
            token_ids=output.new_token_ids, text=output.text, logprobs=encode_logprobs(output.logprobs)
        )
        if not request.items:
            request.describe_first(item, output, self._clock.now())
            self._first_token(request)
        for offset in range(len(output.new_token_ids)):
            facts = {"request": request.request_id, "choice": choice.index}
            self._observe(Lifecycle.TOKEN, {**facts, "index": output.first_index + offset})
        if output.finish_reason is None:
            request.emit(choice, item)
            bound = self._session.unacknowledged_tokens * len(request.choices)
            if request.unacknowledged_since_detach > bound:
                self._abort(request, WorkerLost(f"no router read the last {bound} tokens of this request"))
            return
        request.finish(choice, output.finish_reason, item)
        if request.finished:
            self._settle(request)
        elif not request.live:
            self._end(request, why_ended(request, output))

    # -- endings -------------------------------------------------------------------------------------

    def _abort(self, request: DecodeRequest, error: PdserveError) -> None:
        if request.finished or request.abort_reason is not None:
            return
        request.abort_reason = error
        self._count("aborted")
        if not request.live and request.task is not None:
            request.task.cancel()
        for sequence in tuple(request.live):
            self._dispatcher.abort(sequence)

    def _abandon(self, request: DecodeRequest) -> None:
        self._abort(request, WorkerLost(f"request {request.request_id}: its router did not come back"))

    def _fail(self, request: DecodeRequest, error: PdserveError) -> None:
        """It cannot go on: it ends when the engine has let go of the last of its sequences."""
        if request.live:
            self._abort(request, error)
        else:
            self._end(request, error)

    def _end(self, request: DecodeRequest, error: PdserveError) -> None:
        request.fail(error)
        self._settle(request)
        if request.link is not None:
            request.link.flush()

    def _settle(self, request: DecodeRequest) -> None:
        """The request needs no memory any more. It is remembered until its end is acknowledged."""
        if request.settled:
            return
        request.settled = True
        self._pool.unpromise(request.promise_owner)
        request.stop_deadline()
        self._count("finished")
        self._ended.set()
        self._claims.settled(request)
        self._observe(Lifecycle.FINISHED, {"request": request.request_id, "tokens": request.emitted})

    def _set_deadline(self, request: DecodeRequest) -> None:
        if request.ask.deadline is None:
            return
        remaining = max(0.0, request.ask.deadline - self._clock.now())
        error = DeadlineExceeded(f"request {request.request_id} passed its deadline at the decode worker")
        loop = asyncio.get_running_loop()
        request.deadline_timer = loop.call_later(remaining, self._abort, request, error)

    def _promise_blocks(self, ask: DecodeAsk) -> int:
        headroom = self._engine_config.headroom_tokens
        return promise_blocks(len(ask.token_ids), ask.sampling.max_tokens, headroom, ask.sampling.n)

    def _replace(self, ask: DecodeAsk, reason: str) -> worker_pb2.Replace:
        self._count("replaced")
        return worker_pb2.Replace(request_id=ask.request_id, reason=reason, retry_after_s=RETRY_AFTER_S)

    def _count(self, name: str) -> None:
        self.counters[name] = self.counters.get(name, 0) + 1
