"""How P comes by one prompt's KV: what another worker holds is fetched, the engine computes the rest."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import replace
from typing import Any, TypeVar

from pdserve.core.errors import from_foreign
from pdserve.core.lifecycle import Lifecycle
from pdserve.core.types import BLOCK_TOKENS, OwnerId
from pdserve.kvtransfer.handoff import events as ev
from pdserve.kvtransfer.handoff.ask import FetchedPrefix
from pdserve.kvtransfer.handoff.exposure import Exposure
from pdserve.kvtransfer.handoff.filler import Filler, FillEstimate, FillProgress
from pdserve.kvtransfer.handoff.held_filler import HeldFiller
from pdserve.kvtransfer.handoff.messages import FilledReply, OpenRequest
from pdserve.kvtransfer.handoff.prefill_site import PrefillSite
from pdserve.kvtransfer.handoff.prefix_choice import PrefixPlan
from pdserve.kvtransfer.handoff.prefix_fetch import PrefixAsk

_log = logging.getLogger(__name__)

T = TypeVar("T")


class Fill:
    """One fill. It may write to the owner's blocks from `run` to the event that says how it ended."""

    def __init__(
        self,
        site: PrefillSite,
        asked: OpenRequest,
        owner: OwnerId,
        deadline: float,
        exposure: Exposure,
        *,
        feed: Callable[[object], None],
        observe: Callable[..., None],
    ) -> None:
        """`exposure` grows with it, and `feed` hears of each chunk, and of the end."""
        self._site = site
        self._asked = asked
        self._owner = owner
        self._deadline = deadline
        self._exposure = exposure
        self._feed = feed
        self._observe = observe
        self._filler: Filler = HeldFiller() if asked.held_only else site.filler
        self._progress = FillProgress(0)
        self._prefix: FetchedPrefix | None = None
        self._upcoming: asyncio.Task[Any] | None = None
        self._stopping = False
        self.fetches_prefix = False
        """It waits for another worker, and not for the engine."""
        self.ended_at: float | None = None
        """When everything was computed."""

    def stop(self) -> None:
        """Let `run` come to its end soon."""
        self._stopping = True
        if self._upcoming is not None:
            self._upcoming.cancel()

    def estimate(self, cached_blocks: int) -> FillEstimate:
        """Of the prompt, of which this worker has `cached_blocks`."""
        fetch_s, plan = 0.0, self._plan_prefix()
        if plan is not None and plan.pays:
            fetch_s, cached_blocks = plan.fetch_s, plan.blocks
        cached_tokens = cached_blocks * BLOCK_TOKENS
        estimate = self._filler.estimate(len(self._asked.token_ids) - cached_tokens, cached_tokens)
        return replace(estimate, seconds=estimate.seconds + fetch_s)

    def account(self, chunks: int, accepted_at: float) -> FilledReply:
        """What it took, for the reader. Its handoff was accepted at `accepted_at`."""
        started, ended = self._progress.started_at, self._progress.ended_at
        now = self._site.clock.now()
        ended = now if ended is None else ended
        started = ended if started is None else started
        return FilledReply(
            chunks=chunks,
            tokens=self._progress.num_computed,
            prefill_queue_s=max(0.0, started - accepted_at),
            prefill_s=max(0.0, ended - started),
            cached_tokens=self._progress.cached_tokens,
            prefix=self._prefix,
        )

    async def run(self) -> None:
        """Run the engine to the end, to a stop or to an error; then say that it writes no more."""
        progress = self._filler.fill(self._owner, self._asked.token_ids, self._asked.chain)
        event: object = ev.PartStopped(0, 0)
        try:
            await self._fetch_prefix()
            while (step := await self._unless_stopped(_step(progress))) is not None:
                await self._advance(step)
            if not self._stopping:
                event = self._fill_ended()
        except Exception as error:
            event = ev.PartFailed(0, 0, f"the prefill failed: {from_foreign(error)}")
        try:
            await _close(progress)
        except Exception as error:
            _log.exception("handoff %s: the engine did not let go in order", self._asked.handoff)
            event = ev.PartFailed(0, 0, f"the prefill did not end in order: {from_foreign(error)}")
        self._feed(event)

    async def _unless_stopped(self, work: Coroutine[Any, Any, T | None]) -> T | None:
        """What `work` returns; None where the fill was told to stop, which cancels it."""
        if self._stopping:
            work.close()
            return None
        upcoming = asyncio.ensure_future(work)
        self._upcoming = upcoming
        await asyncio.wait({upcoming})
        return None if upcoming.cancelled() else upcoming.result()

    async def _advance(self, step: FillProgress) -> None:
        """Expose what this step made final: full blocks, at the end also the last partial one."""
        if step.started_at is not None and self._progress.started_at is None:
            self._observe(Lifecycle.PREFILL_STARTED, queued_at=step.queued_at, started_at=step.started_at)
        self._progress = step
        if await self._exposure.grow(step.num_computed):
            self._feed(ev.ChunkComputed())

    def _fill_ended(self) -> object:
        computed, asked = self._progress.num_computed, len(self._asked.token_ids)
        if computed != asked:
            return ev.PartFailed(0, 0, f"the engine ended after {computed} of {asked} positions")
        self.ended_at = self._site.clock.now()
        self._observe(Lifecycle.PREFILL_ENDED)
        return ev.PartFilled(0, 0)

    def _prefix_ask(self) -> PrefixAsk:
        asked = self._asked
        return PrefixAsk(asked.request, asked.token_ids, asked.chain, self._deadline, asked.prefix)

    def _plan_prefix(self) -> PrefixPlan | None:
        prefixes = self._site.prefixes
        return None if prefixes is None else prefixes.plan(self._prefix_ask())

    async def _fetch_prefix(self) -> None:
        """Before the engine sees the prompt: what another worker holds, where that is cheaper.

        Nothing where only what is held was asked for: all of it is pinned, so nobody holds more.
        """
        prefixes = self._site.prefixes
        if prefixes is None:
            return
        self.fetches_prefix = True
        try:
            self._prefix = await self._unless_stopped(prefixes.fetch(self._prefix_ask()))
        finally:
            self.fetches_prefix = False


async def _step(progress: AsyncIterator[FillProgress]) -> FillProgress | None:
    return await anext(progress, None)


async def _close(progress: AsyncIterator[FillProgress]) -> None:
    """Return when the engine does not touch the owner's table any more."""
    close: Any = getattr(progress, "aclose", None)
    if close is not None:
        await close()
