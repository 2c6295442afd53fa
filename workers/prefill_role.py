"""The prefill role: fills an owner's blocks with the KV of given positions, and says how far it is."""

import asyncio
import itertools
from collections.abc import AsyncIterator, Sequence

from pdserve.core.clock import Clock
from pdserve.core.errors import InternalError
from pdserve.core.perfmodel import PerfModel
from pdserve.core.types import BlockName, FinishReason, OwnerId, SequenceId
from pdserve.kvtransfer.handoff.filler import FillEstimate, FillProgress
from pdserve.workers.dispatch import OutputDispatcher
from pdserve.workers.engine.messages import EngineClient, SequenceOutput, SequenceSpec


class EngineFiller:
    """The engine as the handoff's Filler. Samples nothing: D runs the last position itself."""

    def __init__(
        self, engine: EngineClient, dispatcher: OutputDispatcher, chunk_tokens: int, clock: Clock
    ) -> None:
        self._engine = engine
        self._dispatcher = dispatcher
        self._chunk_tokens = chunk_tokens
        self._clock = clock
        self._numbers = itertools.count()

    def estimate(self, new_tokens: int, cached_tokens: int) -> FillEstimate:
        """Seconds until `new_tokens` positions would be computed behind what is queued now."""
        stats = self._engine.stats()
        model = PerfModel()
        model.restore(stats.perf)
        own = model.prefill_seconds(new_tokens, cached_tokens, self._chunk_tokens)
        queued = stats.queued_prefill_tokens
        wait = model.prefill_seconds(queued, 0, self._chunk_tokens).seconds if queued else 0.0
        return FillEstimate(wait + own.seconds, stats.waiting, own.relative_error)

    async def fill(
        self, owner: OwnerId, token_ids: Sequence[int], chain: Sequence[BlockName]
    ) -> AsyncIterator[FillProgress]:
        """Compute every position of `token_ids` into `owner`'s table.

        Yields after each step. Closing the iterator aborts, and returns only when the engine has let go of
        the table; the table then belongs to the caller.
        """
        sequence = SequenceId(f"fill/{next(self._numbers)}/{owner}")
        outputs: asyncio.Queue[SequenceOutput] = asyncio.Queue()
        spec = SequenceSpec(
            sequence_id=sequence,
            owner=owner,
            token_ids=tuple(token_ids),
            chain=tuple(chain),
            namespace=b"",
            sampling=None,
        )
        queued_at = self._clock.now()
        self._dispatcher.submit(spec, outputs.put_nowait)
        ended = False
        try:
            while not ended:
                output = await outputs.get()
                ended = output.finish_reason is not None or output.error is not None
                if output.error is not None:
                    raise output.error
                if output.finish_reason is FinishReason.ABORT:
                    raise InternalError(f"the engine aborted the fill of {owner}")
                yield FillProgress(
                    num_computed=output.num_computed,
                    queued_at=queued_at,
                    started_at=output.started_at,
                    ended_at=output.prefill_ended_at,
                    cached_tokens=output.cached_tokens,
                )
        finally:
            if not ended:
                self._dispatcher.abort(sequence)
                await _let_go(asyncio.ensure_future(_until_ended(outputs)))


async def _let_go(ending: "asyncio.Future[None]") -> None:
    """Wait for `ending` through any number of cancels, for the engine writes until then; pass them on."""
    cancelled = False
    while not ending.done():
        try:
            await asyncio.shield(ending)
        except asyncio.CancelledError:
            cancelled = True
    if cancelled:
        raise asyncio.CancelledError


async def _until_ended(outputs: "asyncio.Queue[SequenceOutput]") -> None:
    while True:
        output = await outputs.get()
        if output.finish_reason is not None or output.error is not None:
            return
