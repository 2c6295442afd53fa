"""Locate → place → stream: the way of an admitted request."""

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass

from pdserve.core.clock import Clock
from pdserve.core.errors import DeadlineExceeded, Overloaded, Unavailable
from pdserve.core.types import BlockName, RequestId, SamplingParams, WorkerId, blocks_for, hit_limit
from pdserve.core.worker_record import WorkerRecord
from pdserve.kvtransfer.index.base import Holder, IndexUnavailable, LocationIndex
from pdserve.kvtransfer.names import chain, namespace
from pdserve.proto import inference_pb2, worker_pb2
from pdserve.router import wire
from pdserve.router.bookings import Booking, Bookings
from pdserve.router.policies.base import Placement, PlacementRequest, Policy
from pdserve.router.policies.prefix_holder import prefix_holder
from pdserve.router.session_pool import SessionPool
from pdserve.router.sessions import WorkerSession
from pdserve.router.status import from_failure
from pdserve.router.token_stream import TokenStream
from pdserve.router.universal import UniversalPrefix
from pdserve.router.view import ClusterView

PLACEMENTS = 3
"""Times that a request is placed: once, and twice more when its decode workers answer Replace."""

LONG_PROMPT_TOKENS = 16_384
"""Blocks of longer prompts are named in a thread, so that the streams of others go on (7 ms for 128k)."""

RETRY_AFTER_S = 1.0
"""What a refused client is told when the worker that refused did not say."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Job:
    """A validated request. Times are on the router's clock."""

    request: RequestId
    tokens: tuple[int, ...]
    sampling: SamplingParams
    promise_blocks: int
    workers: tuple[WorkerRecord, ...]
    """Its pool: one model, one schema."""
    arrived: float
    deadline: float | None

    @property
    def longest_blocks(self) -> int:
        """Blocks of a choice that comes to its max_tokens, whose last token needs no room."""
        return blocks_for(len(self.tokens) + self.sampling.max_tokens - 1)


class Course:
    """What one request holds in this router: a slot, a booking, a place at its worker.

    Whoever notices its end first calls `close`; more calls change nothing.
    """

    def __init__(self, request: RequestId, bookings: Bookings, release: Callable[[], None]) -> None:
        self._request = request
        self._bookings = bookings
        self._release = release
        self._session: WorkerSession | None = None
        self._closed = False

    def runs_on(self, session: WorkerSession) -> None:
        self._session = session

    def close(self) -> None:
        """Give everything back; tell the worker, should it still be at work."""
        if self._closed:
            return
        self._closed = True
        self._bookings.settle(self._request)
        if self._session is not None:
            self._session.cancel(self._request)
        self._release()


class Dispatcher:
    """Places requests and streams their tokens. One per router."""

    def __init__(
        self,
        pool: SessionPool,
        policy: Policy,
        bookings: Bookings,
        universal: UniversalPrefix,
        index: LocationIndex,
        *,
        index_timeout_s: float,
        buffer_tokens: int,
        clock: Clock,
    ) -> None:
        self._pool = pool
        self._policy = policy
        self._bookings = bookings
        self._universal = universal
        self._index = index
        self._index_timeout_s = index_timeout_s
        self._buffer_tokens = buffer_tokens
        self._clock = clock

    def course(self, request: RequestId, release: Callable[[], None]) -> Course:
        """For `run`; `release` gives the request's slot back."""
        return Course(request, self._bookings, release)

    async def run(self, job: Job, course: Course) -> AsyncGenerator[inference_pb2.GenerateChunk, None]:
        """The chunks of one request. The caller closes `course`.

        Raises:
            Overloaded: no decode worker promises its blocks, or the client reads too slowly.
            Unavailable, WorkerLost: nobody can serve it now, or its worker died.
            DeadlineExceeded: its time is over.
        """
        admitted = self._clock.now()
        root = namespace(bytes.fromhex(job.workers[0].schema))
        names = await self._names(root, job.tokens)
        self._universal.observe(names)
        key = self._universal.ring_key(names, job.tokens)
        depths = await self.locate(names[: hit_limit(len(job.tokens))], job.workers)
        located = self._clock.now()
        message = wire.open_request(job.request, job.tokens, names, job.sampling, root)
        refused: dict[WorkerId, worker_pb2.Replace] = {}
        while len(refused) < PLACEMENTS:
            asked = PlacementRequest(
                len(job.tokens), job.promise_blocks, key, depths, frozenset(refused), job.longest_blocks
            )
            view = self._pool.view(job.workers)
            placement = self._policy.place(view, asked, self._clock.now())
            if placement is None:
                break
            self._name_holder(view, placement, depths, message)
            stream = self._open(job, course, placement, message)
            placed = self._clock.now()
            timings = wire.Timings(admitted - job.arrived, located - admitted, placed - located)
            first = await self._next(job, stream)
            if isinstance(first, worker_pb2.Replace):
                refused[placement.decode] = first
                continue
            async for chunk in self._chunks(job, stream, first, timings, placement):
                yield chunk
            return
        raise self._nobody(job, refused)

    async def _names(self, root: bytes, tokens: tuple[int, ...]) -> tuple[BlockName, ...]:
        if len(tokens) <= LONG_PROMPT_TOKENS:
            return chain(root, tokens)
        return await asyncio.to_thread(chain, root, tokens)

    async def locate(
        self, names: Sequence[BlockName], workers: Sequence[WorkerRecord]
    ) -> Mapping[WorkerId, int]:
        """Leading blocks that each worker holds; nothing when the index gives no answer in its time."""
        if not names:
            return {}
        holders = [Holder(record.worker, record.incarnation) for record in workers]
        try:
            async with asyncio.timeout(self._index_timeout_s):
                found = await self._index.locate(names, holders)
        except (TimeoutError, IndexUnavailable) as error:
            log.debug("the ring alone places: %s", error)
            return {}
        return {worker: location.depth for worker, location in found.items()}

    def _open(
        self, job: Job, course: Course, placement: Placement, message: worker_pb2.OpenRequest
    ) -> TokenStream:
        """The one place where a decision is charged: together with its Open."""
        session = self._pool.session(placement.decode)
        del message.candidates[:]
        for worker in placement.prefill:
            message.candidates.append(wire.candidate(self._pool.session(worker).record))
        stream = TokenStream(self._buffer_tokens, job.sampling.n)
        booking = Booking(
            decode=placement.decode,
            blocks=job.promise_blocks,
            prefill=placement.prefill[0],
            prefill_tokens=placement.prefill_tokens,
            prefill_s=placement.prefill_s,
            at=self._clock.now(),
        )
        session.open(message, stream, job.deadline, course.close)
        self._bookings.charge(job.request, booking)
        course.runs_on(session)
        return stream

    def _name_holder(
        self,
        view: ClusterView,
        placement: Placement,
        depths: Mapping[WorkerId, int],
        message: worker_pb2.OpenRequest,
    ) -> None:
        """Who has what the chosen ones lack; they decide whether to fetch it."""
        message.ClearField("prefix")
        held = prefix_holder(view, depths, placement.prefill)
        if held is not None:
            message.prefix.CopyFrom(wire.prefix(self._pool.session(held.worker).record, held.blocks))

    async def _chunks(
        self,
        job: Job,
        stream: TokenStream,
        first: worker_pb2.FrameItem,
        timings: wire.Timings,
        placement: Placement,
    ) -> AsyncGenerator[inference_pb2.GenerateChunk, None]:
        item = first
        parts: wire.Timings | None = timings
        running = job.sampling.n
        while True:
            if item.HasField("failure"):
                raise from_failure(item.failure)
            self._bookings.settle_prefill(job.request)
            yield wire.chunk(item, parts, placement)
            running -= bool(item.finish_reason)
            if not running:
                return
            parts = None
            following = await self._next(job, stream)
            if isinstance(following, worker_pb2.Replace):
                raise Unavailable(f"request {job.request} was refused by a worker that had begun it: retry")
            item = following

    async def _next(self, job: Job, stream: TokenStream) -> worker_pb2.FrameItem | worker_pb2.Replace:
        if job.deadline is None:
            return await stream.get()
        try:
            async with asyncio.timeout(job.deadline - self._clock.now()):
                return await stream.get()
        except TimeoutError as error:
            allowed = job.deadline - job.arrived
            raise DeadlineExceeded(f"request {job.request} did not end within its {allowed:.3f} s") from error

    def _nobody(self, job: Job, refused: Mapping[WorkerId, worker_pb2.Replace]) -> Exception:
        if not refused:
            listed = ", ".join(record.worker for record in job.workers if record.decodes)
            return Unavailable(
                f"no decode worker can take request {job.request} now, {listed} do not answer or do not fit: "
                "retry",
                retry_after_s=RETRY_AFTER_S,
            )
        reasons = "; ".join(f"{worker}: {replace.reason}" for worker, replace in refused.items())
        waits = [replace.retry_after_s for replace in refused.values() if replace.HasField("retry_after_s")]
        return Overloaded(
            f"request {job.request} needs {job.promise_blocks} blocks, and no decode worker can promise them "
            f"({reasons}): retry later or add decode workers",
            retry_after_s=min(waits, default=RETRY_AFTER_S),
        )
