"""One long-lived Session stream per (worker, incarnation), whatever the number of requests on it."""

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum

import grpc

from pdserve.core.channel_options import CHANNEL_OPTIONS
from pdserve.core.clock import Clock
from pdserve.core.config import SessionConfig
from pdserve.core.errors import InternalError, Overloaded, WorkerLost, from_foreign
from pdserve.core.security.tls import ClientTls
from pdserve.core.tasks import end_task
from pdserve.core.types import RequestId
from pdserve.core.worker_record import WorkerRecord
from pdserve.proto import worker_pb2
from pdserve.proto.connections import connect
from pdserve.proto.worker_pb2_grpc import WorkerStub
from pdserve.router.liveness import Liveness
from pdserve.router.token_stream import TokenStream
from pdserve.router.worker_report import WorkerReport

FIRST_BACKOFF_S = 0.05
LONGEST_BACKOFF_S = 1.0
FAREWELL_S = 0.5
"""Time to hand the last messages to a worker that may not read any more."""

_RECONNECT_OPTIONS = (
    # Each attempt opens a connection of its own: a shared one would impose its own, longer back-off.
    ("grpc.use_local_subchannel_pool", 1),
)

SessionCall = grpc.aio.StreamStreamCall[worker_pb2.SessionRequest, worker_pb2.SessionResponse]

log = logging.getLogger(__name__)


class SessionState(Enum):
    """CONNECTING ⇄ UP, then REPLACED or CLOSED for good."""

    CONNECTING = "connecting"
    UP = "up"
    REPLACED = "replaced"
    """Another incarnation answered at this endpoint."""
    CLOSED = "closed"


@dataclass(slots=True)
class _Live:
    """A request that the worker owns. `deadline` is on the router's clock."""

    message: worker_pb2.OpenRequest
    stream: TokenStream
    deadline: float | None
    on_overflow: Callable[[], None]


class WorkerSession:
    """Producer of the token streams of all requests at one start of one worker.

    One task reads and never waits for a consumer; one task writes; one watches the time. When the stream
    breaks, requests live on for `reattach_s`: the same incarnation is asked to go on where reading stopped.
    """

    def __init__(
        self,
        record: WorkerRecord,
        router: str,
        config: SessionConfig,
        clock: Clock,
        tls: ClientTls | None = None,
    ) -> None:
        self.record = record
        self.report = WorkerReport(clock.now())
        self.state = SessionState.CONNECTING
        self._router = router
        self._tls = tls
        self._problem = ""
        """Why the worker could not be reached last time; logged when it changes."""
        self._config = config
        self._clock = clock
        self._live: dict[RequestId, _Live] = {}
        self._outbox: asyncio.Queue[worker_pb2.SessionRequest] = asyncio.Queue()
        self._liveness = Liveness(config.silence_s, clock.now())
        self._down_since: float | None = clock.now()
        self._call: SessionCall | None = None
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def idle(self) -> bool:
        """No request lives on this session."""
        return not self._live

    @property
    def suspect(self) -> bool:
        """Not to be placed on: not connected, silent, or working without progress."""
        return self.state is not SessionState.UP or self._liveness.suspect_for(self._clock.now()) > 0.0

    def start(self) -> None:
        """Connect, in the background, and stay connected."""
        self._tasks = [asyncio.create_task(self._run()), asyncio.create_task(self._watch())]

    async def stop(self, reason: str) -> None:
        """End the session for good; requests still on it fail as retriable, and the worker is told."""
        self.lose(reason)
        if self.state is SessionState.UP:
            self.state = SessionState.CLOSED
            with suppress(TimeoutError):
                async with asyncio.timeout(FAREWELL_S):
                    await self._outbox.join()
        self.state = SessionState.CLOSED
        for task in self._tasks:
            # gRPC swallows a cancel that meets the end of a failing call: the next attempt would begin.
            await end_task(task)

    def open(
        self,
        message: worker_pb2.OpenRequest,
        stream: TokenStream,
        deadline: float | None,
        on_overflow: Callable[[], None],
    ) -> None:
        """Hand a request to the worker; its tokens arrive in `stream`.

        `on_overflow` is called when the request was aborted because its consumer left too much unread.
        Raises WorkerLost when the session is not up.
        """
        if self.state is not SessionState.UP:
            raise WorkerLost(f"worker {self.record.worker} is not connected: retry")
        live = _Live(message, stream, deadline, on_overflow)
        self._live[RequestId(message.request_id)] = live
        self._send_open(live)

    def cancel(self, request: RequestId) -> None:
        """The client left: the worker is told, and whatever it still sends is dropped."""
        if self._live.pop(request, None) is not None:
            self._send(worker_pb2.SessionRequest(cancel=worker_pb2.CancelRequest(request_id=request)))

    def lose(self, reason: str) -> None:
        """Fail every request on this session; what was received is still read."""
        lost, self._live = self._live, {}
        for request, live in lost.items():
            live.stream.fail(
                WorkerLost(f"request {request} was lost with worker {self.record.worker}: {reason}; retry")
            )
            self._send(worker_pb2.SessionRequest(cancel=worker_pb2.CancelRequest(request_id=request)))

    # --- the stream ---

    async def _run(self) -> None:
        backoff = FIRST_BACKOFF_S
        while self.state is not SessionState.REPLACED:
            try:
                await self._converse()
                problem = "the worker ended it"
            except grpc.aio.AioRpcError as error:
                problem = f"{error.code().name}: {error.details()}"
            except Exception as error:  # whatever it was, the next attempt starts from nothing
                problem = from_foreign(error).message
            if self._down_since is None:
                self._down_since = self._clock.now()
                backoff = FIRST_BACKOFF_S
                log.warning("session with %s broke: %s", self.record.worker, problem)
            elif problem != self._problem:
                log.warning("no session with %s: %s%s", self.record.worker, problem, self._advice())
            self._problem = problem
            if self.state is SessionState.UP:
                self.state = SessionState.CONNECTING
            await asyncio.sleep(backoff)
            backoff = min(LONGEST_BACKOFF_S, 2 * backoff)

    def _advice(self) -> str:
        """Whoever is refused for its certificate may see only that the connection was closed."""
        return "" if self._tls is None else "; with TLS, both must have certificates of the cluster's CA"

    async def _converse(self) -> None:
        """One stream, from hello to its end."""
        self._outbox = asyncio.Queue()
        self._liveness = Liveness(self._config.silence_s, self._clock.now())
        hello = worker_pb2.SessionHello(router=self._router)
        self._send(worker_pb2.SessionRequest(hello=hello))
        options = [*CHANNEL_OPTIONS, *_RECONNECT_OPTIONS]
        async with connect(self.record.endpoint, options, self._tls) as channel:
            call = WorkerStub(channel).Session()
            self._call = call
            writer = asyncio.create_task(_write(call, self._outbox))
            try:
                async for response in call:
                    self._receive(response)
            except asyncio.CancelledError:
                task = asyncio.current_task()
                if task is not None and task.cancelling():
                    raise
                raise WorkerLost("it was silent, so the router hung up") from None
            finally:
                self._call = None
                call.cancel()
                writer.cancel()
                await asyncio.gather(writer, return_exceptions=True)

    def _receive(self, response: worker_pb2.SessionResponse) -> None:
        now = self._clock.now()
        self._liveness.hear(now)
        if self.state is SessionState.CLOSED:
            return  # `stop` only waits for its cancels to be written
        kind = response.WhichOneof("message")
        if kind == "hello":
            self._greet(response.hello)
        elif self.state is not SessionState.UP:
            raise InternalError(f"worker {self.record.worker} sent {kind!r} before its hello")
        elif kind == "frame":
            for item in response.frame.items:
                self._deliver(item)
        elif kind == "replace":
            live = self._live.pop(RequestId(response.replace.request_id), None)
            if live is not None:
                live.stream.refuse(response.replace)
        elif kind == "heartbeat":
            self._beat(response.heartbeat, now)

    def _greet(self, hello: worker_pb2.WorkerHello) -> None:
        """Check who answered; claim the requests that were running when the last stream broke."""
        if (hello.worker, hello.incarnation) != (self.record.worker, self.record.incarnation):
            self.state = SessionState.REPLACED
            self.lose(f"it is {hello.worker} in incarnation {hello.incarnation} now")
            raise WorkerLost(f"worker {self.record.worker} {self.record.incarnation} is gone")
        self.state = SessionState.UP
        self._down_since = None
        for request, live in self._live.items():
            if not live.stream.heard:
                self._send_open(live)  # it may never have arrived; a known id is an Attach
                continue
            attach = worker_pb2.AttachRequest(
                request_id=request, incarnation=hello.incarnation, next_index=live.stream.next_index
            )
            self._send(worker_pb2.SessionRequest(attach=attach))

    def _deliver(self, item: worker_pb2.FrameItem) -> None:
        request = RequestId(item.request_id)
        last = bool(item.finish_reason) or item.HasField("failure")  # of a choice, or of the request
        live = self._live.get(request)
        if live is not None:
            try:
                taken = live.stream.put(item)
            except InternalError as error:
                live.stream.fail(error)
                self.cancel(request)
                return
            if not taken:
                self._overflow(request, live)
            elif live.stream.ended:
                del self._live[request]
                self.report.ended += 1
        if last and request not in self._live:
            self._send(worker_pb2.SessionRequest(ack=worker_pb2.AckRequest(request_id=request)))

    def _overflow(self, request: RequestId, live: _Live) -> None:
        self.cancel(request)
        bound = self._config.client_buffer_tokens
        error = Overloaded(
            f"request {request} was aborted: its client left more than {bound} tokens unread; read faster"
        )
        live.stream.fail(error, discard=True)
        live.on_overflow()

    def _beat(self, heartbeat: worker_pb2.WorkerHeartbeat, now: float) -> None:
        self.record = self.report.hear(heartbeat, self.record, now)
        load = self.report.load
        self._liveness.beat(load.progress, load.running > 0 or load.queued_prefill_tokens > 0, now)

    # --- the time ---

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(self._config.heartbeat_s)
            self._check(self._clock.now())

    def _check(self, now: float) -> None:
        """Give up a stream that is silent, and requests that nobody will serve."""
        patience = self._config.reattach_s
        if self._down_since is not None:
            if now - self._down_since > patience and self._live:
                self.lose(f"it did not come back within {patience:g} s")
            if self._liveness.silent(now):
                self._hang_up()
        elif self._liveness.suspect_for(now) > patience:
            if self._live:
                self.lose(self._liveness.reason(now))
            if self._liveness.silent(now):
                self._hang_up()

    def _hang_up(self) -> None:
        if self._call is not None:
            self._call.cancel()

    # --- sending ---

    def _send_open(self, live: _Live) -> None:
        message = worker_pb2.OpenRequest()
        message.CopyFrom(live.message)
        if live.deadline is not None:
            message.remaining_s = max(0.0, live.deadline - self._clock.now())
        self._send(worker_pb2.SessionRequest(open=message))

    def _send(self, message: worker_pb2.SessionRequest) -> None:
        """Queue for the writer. What a broken stream had queued is void: the next hello starts anew."""
        self._outbox.put_nowait(message)


async def _write(call: SessionCall, outbox: asyncio.Queue[worker_pb2.SessionRequest]) -> None:
    """The only writer of a stream: concurrent writes on one call are not allowed."""
    while True:
        await call.write(await outbox.get())
        outbox.task_done()
