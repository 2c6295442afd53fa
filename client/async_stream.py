"""One streamed completion: calls, retries before the first chunk, cancel."""

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Callable
from types import TracebackType
from typing import TYPE_CHECKING, Self

import grpc

from pdserve.client.errors import StreamLost, from_rpc_error
from pdserve.client.retry import RetryPolicy
from pdserve.client.transcript import Transcript
from pdserve.client.values import Chunk, Partial, Result
from pdserve.core.clock import Clock
from pdserve.core.errors import Cancelled, DeadlineExceeded, GrpcCode, InternalError, PdserveError
from pdserve.proto import inference_pb2 as pb

if TYPE_CHECKING:
    from grpc.aio import UnaryStreamCall

    GenerateCall = UnaryStreamCall[pb.GenerateRequest, pb.GenerateChunk]
    StartCall = Callable[[float | None], GenerateCall]
    """Begins one attempt, given the seconds that are left of the caller's time."""


class AsyncChunkStream:
    """Chunks of one completion, in order; each is read once.

    The call begins when the stream is made. Leaving `async for` early, leaving the context manager and
    `cancel` all end the call at the server; the stream then has no result, only a `partial`.
    """

    def __init__(
        self,
        start: "StartCall",
        *,
        transcript: Transcript,
        deadline: float | None,
        policy: RetryPolicy,
        clock: Clock,
    ) -> None:
        self._start = start
        self._transcript = transcript
        self._deadline = deadline
        self._policy = policy
        self._clock = clock
        self._left_early = asyncio.Event()
        self._ended = True
        self._error: PdserveError | None = None
        self._loop = asyncio.get_running_loop()
        self._call = self._begin()
        self._messages = aiter(self._call)

    def __del__(self) -> None:
        # grpc.aio keeps a call alive that nobody reads. The last reference may go in any thread.
        if not self._ended:
            with contextlib.suppress(RuntimeError):  # The loop is closed, and the call with it.
                self._loop.call_soon_threadsafe(self._call.cancel)

    async def __aiter__(self) -> AsyncIterator[Chunk]:
        # A generator and not `return self`: only a generator is told when its loop is left early.
        try:
            while (chunk := await self.read()) is not None:
                yield chunk
        finally:
            self.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()

    async def read(self) -> Chunk | None:
        """The next chunk; None after the last one and after `cancel`.

        Raises:
            StreamLost: the server was lost after the first chunk; it has `partial`.
            PdserveError: whatever else the server said, or the deadline passed.
        """
        if self._error is not None:
            raise self._error
        while not (self._ended or self._cancelled):
            try:
                message = await self._receive()
                if message is None:
                    break
                chunk = self._transcript.accept(message, self._clock.now())
            except PdserveError as error:
                await self._retry_or_raise(error)
                continue
            if chunk is not None:
                return chunk
        return None

    async def collect(self) -> Result:
        """Read to the end; a caller that is itself cancelled takes the call with it."""
        try:
            while await self.read() is not None:
                pass
        finally:
            self.cancel()
        return self.result()

    def result(self) -> Result:
        """The whole completion, once the stream has ended.

        Raises:
            Cancelled: the stream was left before its end; see `partial`.
            InternalError: the stream has not been read to its end.
        """
        if self._error is not None:
            raise self._error
        if self._cancelled and not self._transcript.finished:
            raise Cancelled("the stream was left before its end, so it has no result: see its partial")
        return self._transcript.result()

    @property
    def partial(self) -> Partial:
        """What has arrived so far."""
        return self._transcript.partial()

    def cancel(self) -> None:
        """End the call at the server. Does nothing once the last chunk has arrived."""
        if not self._transcript.finished:
            self._left_early.set()
        if not self._ended:
            self._call.cancel()

    @property
    def _cancelled(self) -> bool:
        return self._left_early.is_set()

    def _begin(self) -> "GenerateCall":
        left = self._left()
        if left is not None and left <= 0:
            raise DeadlineExceeded("the time given to the request ran out before it could be sent again")
        self._transcript.attempts += 1
        call = self._start(left)
        self._ended = False
        return call

    def _left(self) -> float | None:
        return None if self._deadline is None else self._deadline - self._clock.now()

    async def _receive(self) -> pb.GenerateChunk | None:
        """One message; None at the end, and after a cancel of ours. Raises PdserveError."""
        try:
            return await anext(self._messages)
        except StopAsyncIteration:
            self._ended = True
            if self._transcript.finished:
                return None
            raise InternalError("the server ended the stream without a finish reason; report this") from None
        except grpc.aio.AioRpcError as error:
            self._ended = True
            if self._cancelled or self._transcript.finished:
                return None
            raise from_rpc_error(error) from error
        except asyncio.CancelledError:
            # grpc.aio raises this for a cancel of the call, asyncio for a cancel of the caller's task.
            task = asyncio.current_task()
            caller_left = task is not None and task.cancelling() > 0
            if self._cancelled and not caller_left:
                return None
            self.cancel()
            if caller_left:
                raise
            raise Cancelled("the client was closed during the call") from None

    async def _back_off(self, delay: float) -> None:
        """Wait so many seconds, or until `cancel`."""
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(delay):
                    await self._left_early.wait()
        except asyncio.CancelledError:
            self.cancel()
            raise

    async def _retry_or_raise(self, error: PdserveError) -> None:
        """Begin another attempt, or raise what the caller is to see."""
        if not self._transcript.started:
            delay = self._policy.delay(error, self._transcript.attempts, self._left(), random.random())
            if delay is not None:
                await self._back_off(delay)
                if not self._cancelled:
                    try:
                        self._call = self._begin()
                    except PdserveError as passed:
                        self._error = passed
                        raise
                    self._messages = aiter(self._call)
                return
        elif error.grpc_code == GrpcCode.UNAVAILABLE:
            error = StreamLost(error.message, self.partial, retry_after_s=error.retry_after_s)
        self._error = error
        self._call.cancel()
        raise error
