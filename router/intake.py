"""From a client's message to a job, whatever it came over: checked, admitted, tokenized, dispatched."""

import asyncio
import secrets
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from pdserve.core.clock import Clock
from pdserve.core.constraint_check import check_constraint
from pdserve.core.errors import InvalidRequest, Unavailable
from pdserve.core.request_limits import (
    check_sampling,
    check_sampling_tokens,
    check_tokens,
    promise_blocks,
)
from pdserve.core.text.chat_template import ChatMessage
from pdserve.core.types import RequestId, SamplingParams
from pdserve.core.worker_record import WorkerRecord
from pdserve.kvtransfer.index.metered import IndexStats
from pdserve.proto import inference_pb2
from pdserve.proto.sampling import decode
from pdserve.router import validation, wire
from pdserve.router.constraint_checks import ConstraintChecks
from pdserve.router.dispatch import LONG_PROMPT_TOKENS, Dispatcher, Job
from pdserve.router.gate import AdmissionGate
from pdserve.router.pools import any_per_model, pool_of
from pdserve.router.prompt import Chat, Prompt, TokenIds, prompt_bytes
from pdserve.router.session_pool import SessionPool

LONG_PROMPT_BYTES = 4096
"""Longer prompts are tokenized in a thread, so that the streams of others go on. So are all chats: what a
template does with a short one is the model's author's choice."""

OnEnd = Callable[[Callable[[], None]], object]
"""Registers what is to be called when the client's call is over, however it ends."""


class Tokenizer(Protocol):
    """The part of core's Tokenizer that the router needs; safe to share between threads."""

    def encode(self, text: str) -> list[int]: ...

    def encode_chat(self, messages: Sequence[ChatMessage], tools_json: str = "") -> list[int]: ...

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str: ...


@dataclass(frozen=True, slots=True)
class Door:
    """What is known about requests before they are admitted."""

    tokenizers: Mapping[str, Tokenizer]
    max_prompt_bytes: int
    headroom_tokens: int


class Intake:
    """One per router, under every API. Admission, dispatch and sessions do the work."""

    def __init__(
        self,
        door: Door,
        gate: AdmissionGate,
        dispatcher: Dispatcher,
        pool: SessionPool,
        *,
        index_stats: IndexStats | None,
        admin_endpoint: str,
        clock: Clock,
    ) -> None:
        self._door = door
        self._gate = gate
        self._dispatcher = dispatcher
        self._pool = pool
        self._index_stats = index_stats
        self._admin_endpoint = admin_endpoint
        self._clock = clock
        self._constraints = ConstraintChecks(check_constraint)

    async def generate(
        self,
        request: inference_pb2.GenerateRequest,
        remaining_s: float | None,
        on_end: OnEnd,
    ) -> AsyncGenerator[inference_pb2.GenerateChunk, None]:
        """The chunks of one request; closing the generator cancels it. Raises PdserveError.

        `remaining_s` is the time that the client gives it. A client that left, or reads nothing, can leave
        this generator suspended in its yield: `on_end` ends the request then.
        """
        arrived = self._clock.now()
        deadline = None if remaining_s is None else arrived + remaining_s
        validation.check_request_id(request.request_id)
        request_id = RequestId(request.request_id or secrets.token_hex(8))
        if self._gate.knows(request_id):
            raise InvalidRequest(f"request_id {request_id!r} is in use: choose another, or none")
        model = validation.check_model(request.model, self._known_models())
        self._check_length(model, len(request.token_ids.ids))
        prompt = validation.check_prompt(wire.prompt_of(request), self._door.max_prompt_bytes)
        sampling, asked = decode(request.sampling), request.sampling.HasField("max_tokens")
        if not asked:
            sampling = validation.default_completion(sampling, prompt)
        check_sampling(sampling)
        async with self._gate.enter(request_id, deadline) as slot:
            if sampling.constraint is not None:
                await self._constraints.check(sampling.constraint)
            tokens = await self._tokenize(model, prompt)
            workers, bounded, promise = self._fit(model, tokens, sampling, asked)
            job = Job(request_id, tuple(tokens), bounded, promise, workers, arrived, deadline)
            course = self._dispatcher.course(request_id, slot.release)
            on_end(course.close)
            try:
                async with aclosing(self._dispatcher.run(job, course)) as chunks:
                    async for chunk in chunks:
                        yield chunk
            finally:
                course.close()

    async def tokenize(self, request: inference_pb2.TokenizeRequest) -> inference_pb2.TokenizeResponse:
        """The ids that `generate` would use for the same prompt. Raises PdserveError."""
        model = validation.check_model(request.model, self._known_models())
        prompt = validation.check_prompt(wire.prompt_of(request), self._door.max_prompt_bytes)
        return inference_pb2.TokenizeResponse(token_ids=await self._tokenize(model, prompt))

    def models(self) -> inference_pb2.ListModelsResponse:
        """The models of the workers that are members now."""
        return wire.models(any_per_model(self._pool.records()))

    def status(self) -> inference_pb2.GetStatusResponse:
        """The cluster as this router sees it."""
        return inference_pb2.GetStatusResponse(
            workers=self._pool.statuses(),
            index="redis",
            index_use=wire.index_use(self._index_stats),
            index_available=self._pool.membership_available,
            requests_in_flight=self._gate.admission.in_flight,
            admin=self._admin_endpoint,
        )

    def servable(self) -> bool:
        """At least one model has a worker that can own requests now."""
        return any(worker.decodes for worker in self._pool.view(self._pool.records()))

    def _check_length(self, model: str, token_ids: int) -> None:
        """Refuse a long list of ids before time is spent on each of them."""
        if token_ids > LONG_PROMPT_TOKENS:
            validation.check_length(token_ids, validation.Limits.of(pool_of(self._pool.records(), model)))

    def _fit(
        self, model: str, tokens: Sequence[int], sampling: SamplingParams, asked: bool
    ) -> tuple[tuple[WorkerRecord, ...], SamplingParams, int]:
        """What can be checked once the tokens are known: (pool, bounded sampling, blocks to promise).

        `asked`: max_tokens came from the client.
        """
        workers = pool_of(self._pool.records(), model)
        limits = validation.Limits.of(workers)
        check_tokens(tokens, limits.vocab_size)
        check_sampling_tokens(sampling, limits.vocab_size)
        bounded = validation.bound_completion(sampling, asked, len(tokens), limits)
        promise = promise_blocks(len(tokens), bounded.max_tokens, self._door.headroom_tokens, bounded.n)
        validation.check_promise(promise, bounded.n, limits)
        validation.check_prefill(len(tokens), limits)
        return workers, bounded, promise

    def _known_models(self) -> set[str]:
        """Names that mean something here, whether or not a worker is there for them now."""
        records: Sequence[WorkerRecord] = self._pool.records()
        known = {record.model for record in records} | set(self._door.tokenizers)
        if not known:
            raise Unavailable("no worker has joined yet: retry when one is ready")
        return known

    async def _tokenize(self, model: str, prompt: Prompt) -> Sequence[int]:
        """Token ids of the prompt; ids stay as they are. Raises InvalidRequest."""
        if isinstance(prompt, TokenIds):
            return prompt.ids
        tokenizer = self._door.tokenizers.get(model)
        if tokenizer is None:
            raise InvalidRequest(f"this router has no tokenizer for model {model!r}: send token ids")
        if isinstance(prompt, Chat):
            encode = partial(tokenizer.encode_chat, prompt.messages, prompt.tools_json)
        else:
            encode = partial(tokenizer.encode, prompt)
        if isinstance(prompt, Chat) or prompt_bytes(prompt) > LONG_PROMPT_BYTES:
            return await asyncio.to_thread(encode)
        return encode()
