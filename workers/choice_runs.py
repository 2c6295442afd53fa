"""A request's way through the engine: the prompt, where D computes it, and then the choices.

no handoff, one choice ───────────────────────────────────────► choice (prefill + decode)
no handoff, several ────► prompt (prefill only) ────► fork ───► choices (decode)
committed, one choice ────────────────────────────────────────► choice (decode)
committed, several ──────────────────────────────────► fork ──► choices (decode)
"""

import asyncio
from collections.abc import Callable, Sequence
from functools import partial

from pdserve.core.errors import PdserveError, WorkerLost
from pdserve.core.types import FinishReason, OwnerId
from pdserve.kvtransfer.handoff.consumer import Committed
from pdserve.kvtransfer.pool.pool import KvPool
from pdserve.workers.choice import Choice, ChoiceStart
from pdserve.workers.choice_specs import choice_spec, prompt_spec
from pdserve.workers.decode_request import DecodeRequest
from pdserve.workers.dispatch import OutputDispatcher, Sink
from pdserve.workers.engine.debt import Debt
from pdserve.workers.engine.messages import SequenceOutput, SequenceSpec
from pdserve.workers.prompt_fork import CopyBlocks, PromptFork

Take = Callable[[DecodeRequest, Choice, SequenceOutput], None]


class ChoiceRuns:
    """Submits what a request runs. `request.live` is what the engine has of it, and nobody else changes it.

    While nothing of it lives, the request's task may be cancelled: no block stays behind.
    """

    def __init__(
        self,
        pool: KvPool,
        copy_blocks: CopyBlocks,
        dispatcher: OutputDispatcher,
        take: Take,
        *,
        headroom_tokens: int,
    ) -> None:
        """`take` gets every output of a choice, in the order of the steps. A choice that yields is owed
        `headroom_tokens` behind its last token.
        """
        self._pool = pool
        self._headroom_tokens = headroom_tokens
        self._dispatcher = dispatcher
        self._prompt_fork = PromptFork(pool, copy_blocks)
        self._take = take

    async def start(self, request: DecodeRequest, committed: Committed | None) -> None:
        """Return when the engine has the choices. Without `committed`, D's own engine prefills.

        Raises why the prompt came to no end, or the choices cannot be submitted; some may live then.
        """
        tokens, choices = len(request.ask.token_ids), len(request.choices)
        if choices == 1 and committed is not None:
            self._submit_choices(request, [ChoiceStart(committed.owner, committed.num_computed)])
            return
        local = OwnerId(f"local/{request.request_id}")
        if committed is None and (choices == 1 or tokens == 1):
            owners = [OwnerId(f"{local}/{choice.index}") for choice in request.choices]
            self._submit_choices(request, [ChoiceStart(owner, 0) for owner in owners])
            return
        source = await self._prefill(request, local) if committed is None else committed.owner
        self._submit_choices(request, await self._prompt_fork.starts(source, tokens, choices))

    async def _prefill(self, request: DecodeRequest, owner: OwnerId) -> OwnerId:
        """Compute all positions but the last into the owner's table, which is the caller's then."""
        ended: asyncio.Future[SequenceOutput] = asyncio.get_running_loop().create_future()
        self._submit(request, prompt_spec(request.ask, owner), partial(_on_prompt, request, ended))
        try:
            output = await ended
            if output.finish_reason is not FinishReason.LENGTH or request.abort_reason is not None:
                raise why_ended(request, output)
        except BaseException:
            self._pool.release(owner)
            raise
        request.prefilled(output)
        return owner

    def _submit_choices(self, request: DecodeRequest, starts: Sequence[ChoiceStart]) -> None:
        for choice, start in zip(request.choices, starts, strict=True):
            spec = choice_spec(request.ask, choice.index, start, self._debt(request))
            try:
                self._submit(request, spec, partial(self._on_output, request, choice))
            except BaseException:
                for left in starts[choice.index + 1 :]:
                    self._pool.release(left.owner)
                raise

    def _debt(self, request: DecodeRequest) -> Debt:
        ask = request.ask
        return Debt(
            owner=request.promise_owner,
            prompt_tokens=len(ask.token_ids),
            max_tokens=ask.sampling.max_tokens,
            headroom_tokens=self._headroom_tokens,
            choices=ask.sampling.n,
        )

    def _submit(self, request: DecodeRequest, spec: SequenceSpec, sink: Sink) -> None:
        request.live.add(spec.sequence_id)
        try:
            self._dispatcher.submit(spec, sink)
        except BaseException:
            request.live.discard(spec.sequence_id)
            self._pool.release(spec.owner)
            raise

    def _on_output(self, request: DecodeRequest, choice: Choice, output: SequenceOutput) -> None:
        if _is_last(output):
            request.live.discard(output.sequence_id)
        self._take(request, choice, output)


def why_ended(request: DecodeRequest, output: SequenceOutput) -> PdserveError:
    """What a request fails with whose sequence ended before its time."""
    return output.error or request.abort_reason or WorkerLost("the engine is stopping: try again")


def _on_prompt(
    request: DecodeRequest, ended: "asyncio.Future[SequenceOutput]", output: SequenceOutput
) -> None:
    if _is_last(output):
        request.live.discard(output.sequence_id)
        if not ended.done():  # it is when the loop itself is ending and has cancelled everything
            ended.set_result(output)


def _is_last(output: SequenceOutput) -> bool:
    return output.error is not None or output.finish_reason is not None
