"""AsyncClient: everything the SDK does, written once."""

import asyncio
import math
import random
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar, Unpack, overload

import grpc

from pdserve.client import convert
from pdserve.client.async_stream import AsyncChunkStream
from pdserve.client.channel import CHANNEL_OPTIONS, check_target
from pdserve.client.errors import from_rpc_error
from pdserve.client.request import Messages, Prompt, RequestOptions, generate_request, tokenize_request
from pdserve.client.retry import RetryPolicy
from pdserve.client.security import Tls, check_token, load_tls
from pdserve.client.transcript import Transcript
from pdserve.client.values import ClusterStatus, ModelInfo, Result
from pdserve.core.clock import Clock, MonotonicClock
from pdserve.core.errors import DeadlineExceeded, InvalidRequest
from pdserve.proto import inference_pb2 as pb
from pdserve.proto.connections import connect
from pdserve.proto.inference_pb2_grpc import InferenceStub

if TYPE_CHECKING:
    from grpc.aio import UnaryUnaryCall

    from pdserve.proto.inference_pb2_grpc import InferenceAsyncStub

Response = TypeVar("Response")


class AsyncClient:
    """A client of one cluster, used from one event loop.

    Args:
        target: host:port of a router's gRPC port.
        timeout: seconds for a whole call, retries included, where the call gives none; None waits for ever.
        retry: how calls that nobody took are tried again.
        clock: what times to first token are read on.
        tls: PEM files for an encrypted connection; True trusts the system's authorities, False is plain text.
        token: the bearer token that the cluster asks for. Without `tls` it travels in plain text.

    Raises ConfigError for PEM files that are missing or wrong, InvalidRequest for a target without a port.
    """

    def __init__(
        self,
        target: str,
        *,
        timeout: float | None = None,
        retry: RetryPolicy | None = None,
        clock: Clock | None = None,
        tls: Tls | bool = False,
        token: str | None = None,
    ) -> None:
        self._target = check_target(target)
        self._tls = load_tls(tls)
        self._token = check_token(token)
        self._timeout = timeout
        self._retry = retry or RetryPolicy()
        self._clock = clock or MonotonicClock()
        self._channel: grpc.aio.Channel | None = None
        self._closed = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """End every call and the connection. A closed client stays closed."""
        self._closed = True
        channel, self._channel = self._channel, None
        if channel is not None:
            await channel.close()

    @overload
    async def generate(
        self,
        prompt: str | None = None,
        *,
        stream: Literal[False] = False,
        timeout: float | None = None,
        **options: Unpack[RequestOptions],
    ) -> Result: ...

    @overload
    async def generate(
        self,
        prompt: str | None = None,
        *,
        stream: Literal[True],
        timeout: float | None = None,
        **options: Unpack[RequestOptions],
    ) -> AsyncChunkStream: ...

    async def generate(
        self,
        prompt: str | None = None,
        *,
        stream: bool = False,
        timeout: float | None = None,
        **options: Unpack[RequestOptions],
    ) -> Result | AsyncChunkStream:
        """Complete a prompt.

        Args:
            prompt: the text to go on from. Exactly one of it, `messages` and `token_ids` is given.
            stream: return the chunks as they come instead of the whole.
            timeout: seconds for the whole call, retries included; None takes the client's.
            options: what to complete instead of `prompt`, how tokens are chosen, when to stop, what the text
                must be; see RequestOptions.

        Raises:
            InvalidRequest: the request must change; UnknownModel where it names a model that nobody serves.
            Overloaded: shed at the door, `retry_after_s` says when to come back.
            Unavailable: nobody took it, however often it was tried.
            StreamLost: a WorkerLost; the server went away after the first chunk, `partial` is what arrived.
            DeadlineExceeded: `timeout` passed.
        """
        chunks = self.open_stream(prompt, self._clock.now(), timeout, options)
        return chunks if stream else await chunks.collect()

    def open_stream(
        self, prompt: str | None, called_at: float, timeout: float | None, options: RequestOptions
    ) -> AsyncChunkStream:
        """What `generate` does, with the moment of the caller's call (seconds on this client's clock)."""
        request = generate_request(prompt, **options)
        return AsyncChunkStream(
            lambda left: self._stub().Generate(request, timeout=left),
            transcript=Transcript(called_at, options.get("request_id"), options.get("n") or 1),
            deadline=self._deadline(called_at, timeout),
            policy=self._retry,
            clock=self._clock,
        )

    async def tokenize(
        self,
        prompt: str | None = None,
        *,
        messages: Messages | None = None,
        model: str = "",
        timeout: float | None = None,
    ) -> tuple[int, ...]:
        """The token ids of a text, or of a chat after the model's template."""
        request = tokenize_request(Prompt(prompt, messages, None), model)
        response = await self._unary(lambda left: self._stub().Tokenize(request, timeout=left), timeout)
        return tuple(response.token_ids)

    async def models(self, *, timeout: float | None = None) -> tuple[ModelInfo, ...]:
        """The models that the cluster serves."""
        request = pb.ListModelsRequest()
        return convert.models(
            await self._unary(lambda left: self._stub().ListModels(request, timeout=left), timeout)
        )

    async def status(self, *, timeout: float | None = None) -> ClusterStatus:
        """The cluster as its router sees it."""
        request = pb.GetStatusRequest()
        return convert.status(
            await self._unary(lambda left: self._stub().GetStatus(request, timeout=left), timeout)
        )

    def _stub(self) -> "InferenceAsyncStub":
        """Made at first use, because a grpc.aio channel belongs to the event loop that runs then."""
        if self._closed:
            raise InvalidRequest(f"this client of {self._target} is closed: make a new one")
        if self._channel is None:
            self._channel = connect(self._target, CHANNEL_OPTIONS, self._tls, self._token)
        return InferenceStub(self._channel)

    def _deadline(self, called_at: float, timeout: float | None) -> float | None:
        seconds = self._timeout if timeout is None else timeout
        if seconds is None:
            return None
        if not 0 < seconds < math.inf:
            raise InvalidRequest(f"timeout is {seconds} s: it must be above 0, or None to wait for ever")
        return called_at + seconds

    async def _unary(
        self,
        start: "Callable[[float | None], UnaryUnaryCall[Any, Response]]",
        timeout: float | None,
    ) -> Response:
        """One call that may be repeated freely, under the same retry rule as generate."""
        deadline = self._deadline(self._clock.now(), timeout)
        attempt = 0
        while True:
            left = None if deadline is None else deadline - self._clock.now()
            if left is not None and left <= 0:
                raise DeadlineExceeded(f"the time given to the call ran out after {attempt} attempts")
            attempt += 1
            try:
                return await start(left)
            except grpc.aio.AioRpcError as failed:
                error = from_rpc_error(failed)
                delay = self._retry.delay(error, attempt, left, random.random())
                if delay is None:
                    raise error from failed
            await asyncio.sleep(delay)
