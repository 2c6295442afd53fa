"""The generation requests of one HTTP request, run together: one per prompt, each with its choices."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from typing import Any, Protocol

from pdserve.core.errors import DeadlineExceeded
from pdserve.proto import inference_pb2 as pb

BATCH_WIDTH = 32
"""Prompts of one request that run at a time: a batch is no way past those who wait."""

Sink = Callable[[int, pb.GenerateChunk], Awaitable[None]]
"""Takes a prompt's number and a chunk of it. Chunks of one prompt come in order, those of several mixed."""


class Generates(Protocol):
    """The part of the intake that generates."""

    def generate(
        self,
        request: pb.GenerateRequest,
        remaining_s: float | None,
        on_end: Callable[[Callable[[], None]], object],
    ) -> AsyncGenerator[pb.GenerateChunk, None]: ...


class Generation:
    """Used once. When `run` ends, however, nothing of it runs any more."""

    def __init__(
        self, intake: Generates, requests: Sequence[pb.GenerateRequest], timeout_s: float | None
    ) -> None:
        self._intake = intake
        self._requests = requests
        self._timeout_s = timeout_s
        self._prompt_tokens = [0] * len(requests)
        self._cached_tokens = [0] * len(requests)
        self._completion_tokens = 0

    async def run(self, sink: Sink) -> None:
        """Every chunk into `sink`. Raises PdserveError, the first one where several prompts fail."""
        deadline = None if self._timeout_s is None else asyncio.get_running_loop().time() + self._timeout_s
        if len(self._requests) == 1:
            await self._one(0, deadline, sink)
            return
        turns = asyncio.Semaphore(BATCH_WIDTH)

        async def one(prompt: int) -> None:
            async with turns:
                await self._one(prompt, deadline, sink)

        try:
            async with asyncio.TaskGroup() as group:
                for prompt in range(len(self._requests)):
                    group.create_task(one(prompt))
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None

    def usage(self) -> dict[str, Any]:
        """OpenAI's usage object; what is known when `run` has ended."""
        prompt = sum(self._prompt_tokens)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": self._completion_tokens,
            "total_tokens": prompt + self._completion_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(self._cached_tokens)},
        }

    async def _one(self, prompt: int, deadline: float | None, sink: Sink) -> None:
        remaining_s = None if deadline is None else deadline - asyncio.get_running_loop().time()
        if remaining_s is not None and remaining_s <= 0:
            raise DeadlineExceeded(f"the time was over before prompt {prompt} of the request had its turn")
        # `on_end` is for callers that cannot end a suspended generator. Here a cancel reaches every await.
        generated = self._intake.generate(self._requests[prompt], remaining_s, lambda end: None)
        async with aclosing(generated) as chunks:
            async for chunk in chunks:
                if chunk.finish_reason:
                    self._count(prompt, chunk.usage)
                await sink(prompt, chunk)

    def _count(self, prompt: int, usage: pb.Usage) -> None:
        """The prompt is counted once, whatever the number of its choices."""
        self._prompt_tokens[prompt] = usage.prompt_tokens
        self._cached_tokens[prompt] = max(self._cached_tokens[prompt], usage.cached_tokens)
        self._completion_tokens += usage.completion_tokens
