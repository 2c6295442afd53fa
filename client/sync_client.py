"""Client: AsyncClient for callers without an event loop."""

from collections.abc import Iterator
from types import TracebackType
from typing import Literal, Self, Unpack, overload

from pdserve.client.async_client import AsyncClient
from pdserve.client.async_stream import AsyncChunkStream
from pdserve.client.loop_thread import LoopThread
from pdserve.client.request import Messages, RequestOptions
from pdserve.client.retry import RetryPolicy
from pdserve.client.security import Tls
from pdserve.client.values import Chunk, ClusterStatus, ModelInfo, Partial, Result
from pdserve.core.clock import Clock, MonotonicClock


class ChunkStream:
    """Chunks of one completion, in order; each is read once. See AsyncChunkStream."""

    def __init__(self, chunks: AsyncChunkStream, thread: LoopThread) -> None:
        self._chunks = chunks
        self._thread = thread

    def __iter__(self) -> Iterator[Chunk]:
        # A generator and not `return self`: only a generator is told when its loop is left early.
        try:
            while (chunk := self.read()) is not None:
                yield chunk
        finally:
            self.cancel()

    def __next__(self) -> Chunk:
        chunk = self.read()
        if chunk is None:
            raise StopIteration
        return chunk

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()

    def read(self) -> Chunk | None:
        """The next chunk; None after the last one and after `cancel`. Raises as AsyncChunkStream.read."""
        return self._thread.run(self._chunks.read())

    def result(self) -> Result:
        """The whole completion, once the stream has ended. Raises as AsyncChunkStream.result."""
        return self._chunks.result()

    @property
    def partial(self) -> Partial:
        """What has arrived so far."""
        return self._chunks.partial

    def cancel(self) -> None:
        """End the call at the server; from any thread. Does nothing once the last chunk has arrived."""
        self._thread.call_soon(self._chunks.cancel)


class Client:
    """A client of one cluster. May be shared by threads; close it, or use it as a context manager.

    Args:
        target: host:port of a router's gRPC port.
        timeout: seconds for a whole call, retries included, where the call gives none; None waits for ever.
        retry: how calls that nobody took are tried again.
        clock: what times to first token are read on.
        tls, token: as AsyncClient's.
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
        self._clock = clock or MonotonicClock()
        self._client = AsyncClient(
            target, timeout=timeout, retry=retry, clock=self._clock, tls=tls, token=token
        )
        self._thread = LoopThread(f"pdserve-client {target}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End every call, the connection and the thread. Closing twice is fine."""
        self._thread.close(self._client.close)

    @overload
    def generate(
        self,
        prompt: str | None = None,
        *,
        stream: Literal[False] = False,
        timeout: float | None = None,
        **options: Unpack[RequestOptions],
    ) -> Result: ...

    @overload
    def generate(
        self,
        prompt: str | None = None,
        *,
        stream: Literal[True],
        timeout: float | None = None,
        **options: Unpack[RequestOptions],
    ) -> ChunkStream: ...

    def generate(
        self,
        prompt: str | None = None,
        *,
        stream: bool = False,
        timeout: float | None = None,
        **options: Unpack[RequestOptions],
    ) -> Result | ChunkStream:
        """Complete a prompt. Arguments and errors: AsyncClient.generate."""
        called_at = self._clock.now()

        async def open_stream() -> AsyncChunkStream:
            return self._client.open_stream(prompt, called_at, timeout, options)

        async def collect() -> Result:
            return await (await open_stream()).collect()

        if stream:
            return ChunkStream(self._thread.run(open_stream()), self._thread)
        return self._thread.run(collect())

    def tokenize(
        self,
        prompt: str | None = None,
        *,
        messages: Messages | None = None,
        model: str = "",
        timeout: float | None = None,
    ) -> tuple[int, ...]:
        """The token ids of a text, or of a chat after the model's template."""
        return self._thread.run(
            self._client.tokenize(prompt, messages=messages, model=model, timeout=timeout)
        )

    def models(self, *, timeout: float | None = None) -> tuple[ModelInfo, ...]:
        """The models that the cluster serves."""
        return self._thread.run(self._client.models(timeout=timeout))

    def status(self, *, timeout: float | None = None) -> ClusterStatus:
        """The cluster as its router sees it."""
        return self._thread.run(self._client.status(timeout=timeout))
