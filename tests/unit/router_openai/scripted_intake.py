"""The HTTP API over an intake that says what a test wants."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Sequence
from typing import Any

from pdserve.core.clock import MonotonicClock
from pdserve.core.config import RouterConfig
from pdserve.core.errors import InvalidRequest
from pdserve.proto import inference_pb2 as pb
from pdserve.router.metered_intake import MeteredIntake
from pdserve.router.openai.http_server import HttpServer
from pdserve.router.openai.serving import openai_server

MODEL = "m"


class Letters:
    """A tokenizer with one token per character."""

    def encode(self, text: str) -> list[int]:
        return [ord(character) for character in text]

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        numbers = list(ids)
        if any(number >= 0x110000 for number in numbers):
            raise InvalidRequest("no such token")
        return "".join(map(chr, numbers))


class ScriptedIntake:
    """Each choice gets the texts in `script`, a token per character; errors in it are raised."""

    def __init__(self) -> None:
        self.script: Sequence[str | Exception] = ("Hel", "lo")
        self.finish_reason = "stop"
        self.requests: list[pb.GenerateRequest] = []
        self.remaining: list[float | None] = []
        self.hold: asyncio.Event | None = None
        """Set: every stream waits for it after its first chunk."""
        self.running = 0
        self.ready = True

    async def generate(
        self,
        request: pb.GenerateRequest,
        remaining_s: float | None,
        on_end: Callable[[Callable[[], None]], object],
    ) -> AsyncGenerator[pb.GenerateChunk, None]:
        kept = pb.GenerateRequest()
        kept.CopyFrom(request)
        self.requests.append(kept)
        self.remaining.append(remaining_s)
        self.running += 1
        try:
            made = 0
            for number, text in enumerate(self.script):
                if number and self.hold is not None:
                    await self.hold.wait()
                for choice in range(max(1, request.sampling.n)):
                    if isinstance(text, Exception):
                        raise text
                    yield self._chunk(request, choice, text, made, number == len(self.script) - 1)
                made += len(text) if isinstance(text, str) else 0
        finally:
            self.running -= 1

    def models(self) -> pb.ListModelsResponse:
        return pb.ListModelsResponse(models=[pb.Model(name=MODEL, context_tokens=128, vocab_size=256)])

    def status(self) -> pb.GetStatusResponse:
        blocks = pb.BlockCounts(total=8, free=5, held=1, cached=2)
        return pb.GetStatusResponse(workers=[pb.WorkerStatus(worker="decode-0", running=3, blocks=blocks)])

    def servable(self) -> bool:
        return self.ready

    async def tokenize(self, request: pb.TokenizeRequest) -> pb.TokenizeResponse:
        raise NotImplementedError

    def _chunk(
        self, request: pb.GenerateRequest, choice: int, text: str, first: int, last: bool
    ) -> pb.GenerateChunk:
        ids = [ord(character) for character in text]
        chunk = pb.GenerateChunk(choice=choice, first_index=first, token_ids=ids, text=text)
        if request.sampling.HasField("logprobs"):
            top = [pb.TokenLogprob(token_id=97 + k, logprob=-k) for k in range(request.sampling.logprobs)]
            chunk.logprobs.extend(
                pb.PositionLogprobs(sampled=pb.TokenLogprob(token_id=i, logprob=-0.5), rank=1, top=top)
                for i in ids
            )
        if last:
            made = sum(len(piece) for piece in self.script if isinstance(piece, str))
            chunk.finish_reason = self.finish_reason
            chunk.usage.CopyFrom(pb.Usage(prompt_tokens=10, completion_tokens=made, cached_tokens=4))
        return chunk


@contextlib.asynccontextmanager
async def served(intake: ScriptedIntake, **router: Any) -> AsyncIterator[str]:
    """Yields http://host:port."""
    metered = MeteredIntake(intake, MonotonicClock())  # type: ignore[arg-type]
    config = RouterConfig(http_port=0, **router)
    server = openai_server(metered, {MODEL: Letters()}, config, grace_s=1.0)
    assert isinstance(server, HttpServer)
    await server.start()
    try:
        yield f"http://127.0.0.1:{server.port}"
    finally:
        server.close()
        await server.stopped()
