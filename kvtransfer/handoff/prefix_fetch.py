"""Fetches leading blocks of a prompt from a worker that holds them, instead of computing them.

    plan ──pays──► handoff of what is held ──committed──► plain cache of this worker
                             └──holds fewer: once more, for what it has
                             └──anything else: computed, as if nobody had been asked

Prompts that want the same blocks at the same time move them once. The fetched blocks are named, announced
and owned by nobody from the commit on: the fill finds them by name as it finds any cached block. To keep them
pinned until then would be to hold blocks and wait for more.
"""

import asyncio
import itertools
import logging
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from pdserve.core.clock import Clock
from pdserve.core.errors import from_foreign
from pdserve.core.perfmodel import PerfModel
from pdserve.core.types import BLOCK_TOKENS, BlockName, OwnerId, RequestId, WorkerId
from pdserve.core.worker_record import WorkerRecord
from pdserve.kvtransfer.handoff.ask import FetchedPrefix, HandoffAsk, NotServed, PrefixHolder
from pdserve.kvtransfer.handoff.consumer import DecodeHandoffs
from pdserve.kvtransfer.handoff.prefix_choice import (
    LEAST_PATIENCE_S,
    PrefixPlan,
    bare_movement,
    plan_prefix,
)
from pdserve.kvtransfer.pool.pool import KvPool

_log = logging.getLogger(__name__)

_ASKS = 2
"""Once as the hint says, once more as the holder's rejection says."""

_BACKOFF_S = 10.0
"""How long nobody asks a holder that let a fetch's time pass: else every prompt would wait for it anew."""


@dataclass(frozen=True, slots=True)
class PrefixAsk:
    """A prompt that is about to be computed here."""

    request_id: RequestId
    token_ids: tuple[int, ...]
    chain: tuple[BlockName, ...]
    """Names of the full blocks that a cache hit may cover."""
    deadline: float | None
    """On this worker's clock."""
    holder: PrefixHolder | None
    """Who is said to hold some of them."""


class PrefixFetch:
    """All prefix fetches of one worker, whether it prefills for others or for itself. Runs on one event loop.

    A fetch takes blocks that the request is promised, or has its share of the pool for, already: the fill
    that follows takes the same blocks again, by name, so they count once. It never waits for memory, here or
    at the holder, and gives an answer no longer than `PrefixPlan.patience_s`. Who joins another prompt's
    fetch holds no block meanwhile.
    """

    def __init__(
        self,
        *,
        record: Callable[[], WorkerRecord],
        pool: KvPool,
        handoffs: DecodeHandoffs,
        ways: Callable[[], Mapping[WorkerId, str]],
        perf: PerfModel,
        chunk_tokens: int,
        clock: Clock,
    ) -> None:
        """`perf` predicts this worker's prefills, in steps of `chunk_tokens`, and its handoffs over what
        `ways` says of the peers that were met.
        """
        self._record = record
        self._pool = pool
        self._handoffs = handoffs
        self._ways = ways
        self._perf = perf
        self._chunk_tokens = chunk_tokens
        self._clock = clock
        self._serial = itertools.count()
        self._counters: Counter[str] = Counter()
        self._running: dict[BlockName, asyncio.Future[None]] = {}
        """Fetches under way, by the last block that they bring; cancelled with the request that made them."""
        self._backoffs: dict[WorkerId, float] = {}
        """When those may be asked again that did not answer in time."""

    @property
    def counters(self) -> dict[str, int]:
        """Totals since start: asked, asked_again, joined (another prompt's fetch of the same), fetched,
        blocks (moved), too_dear, failed_<outcome>.
        """
        return dict(self._counters)

    def plan(self, ask: PrefixAsk) -> PrefixPlan | None:
        """What there is to fetch; None where the holder has no more than this worker, is this worker, or did
        not answer in time just now.
        """
        holder = ask.holder
        if holder is None or holder.peer.worker == self._record().worker:
            return None
        if self._clock.now() < self._backoffs.get(holder.peer.worker, 0.0):
            return None
        return plan_prefix(
            self._perf,
            own=self._pool.match(ask.chain),
            held=min(holder.blocks, len(ask.chain)),
            chunk_tokens=self._chunk_tokens,
            block_bytes=self._pool.layout.block_bytes,
            transport=self._ways().get(holder.peer.worker, self._handoffs.lowest_transport),
        )

    async def fetch(self, ask: PrefixAsk) -> FetchedPrefix | None:
        """Have what `ask.holder` holds in this worker's cache, if that is cheaper than to compute it.

        None where nothing was fetched for it, for whatever reason: the caller computes what is not here now.
        A cancel leaves nothing, and whoever waited for the same blocks fetches them itself.
        """
        while (plan := self._paying(ask)) is not None:
            name = ask.chain[plan.blocks - 1]
            running = self._running.get(name)
            if running is None:
                return await self._lead(name, ask, plan)
            self._counters["joined"] += 1
            await asyncio.wait({running})
            if not running.cancelled():
                return None
        return None

    def _paying(self, ask: PrefixAsk) -> PrefixPlan | None:
        plan = self.plan(ask)
        if plan is not None and not plan.pays:
            self._counters["too_dear"] += 1
            return None
        return plan

    async def _lead(self, name: BlockName, ask: PrefixAsk, plan: PrefixPlan) -> FetchedPrefix | None:
        """Fetch on behalf of all who come for the same blocks meanwhile."""
        running = self._running[name] = asyncio.get_running_loop().create_future()
        try:
            return await self._ask_until_known(ask, plan)
        except asyncio.CancelledError:
            running.cancel()
            raise
        finally:
            del self._running[name]
            if not running.done():
                running.set_result(None)

    async def _ask_until_known(self, ask: PrefixAsk, first: PrefixPlan) -> FetchedPrefix | None:
        plan: PrefixPlan | None = first
        for attempt in range(_ASKS):
            if plan is None or ask.holder is None:
                return None
            self._counters["asked_again" if attempt else "asked"] += 1
            outcome = await self._ask(ask, ask.holder, plan)
            if isinstance(outcome, FetchedPrefix):
                self._counters["fetched"] += 1
                self._counters["blocks"] += outcome.blocks
                return outcome
            if outcome is None or outcome.held_blocks is None:
                return None
            ask = replace(ask, holder=PrefixHolder(ask.holder.peer, outcome.held_blocks))
            plan = self._paying(ask)
        return None

    async def _ask(
        self, ask: PrefixAsk, holder: PrefixHolder, plan: PrefixPlan
    ) -> FetchedPrefix | NotServed | None:
        """One handoff; None where this worker could not even ask."""
        owner = OwnerId(f"prefix/{ask.request_id}/{next(self._serial)}")
        met, started = holder.peer.worker in self._ways(), self._clock.now()
        try:
            outcome = await self._handoffs.fetch(self._handoff_ask(ask, plan, owner), holder.peer)
        except Exception as error:
            self._counters["failed_here"] += 1
            _log.warning("request %s: no prefix fetch: %s", ask.request_id, from_foreign(error))
            return None
        if isinstance(outcome, NotServed):
            self._counters[f"failed_{outcome.reason}"] += 1
            self._note_failure(holder.peer.worker, self._clock.now() - started)
            _log.info(
                "request %s: %s did not serve a prefix of %d blocks, computing it: %s",
                ask.request_id,
                holder.peer.worker,
                plan.blocks,
                outcome.message,
            )
            return outcome
        self._pool.release(owner)
        if met:  # the first one also connects, which none that is still to come does
            took_s = self._clock.now() - started
            self._perf.observe_handoff(bare_movement(outcome.bytes_moved), outcome.transport, took_s)
        return FetchedPrefix(holder.peer.worker, outcome.blocks_moved)

    def _note_failure(self, worker: WorkerId, took_s: float) -> None:
        now = self._clock.now()
        self._backoffs = {other: until for other, until in self._backoffs.items() if now < until}
        if took_s >= LEAST_PATIENCE_S:
            self._backoffs[worker] = now + _BACKOFF_S

    def _handoff_ask(self, ask: PrefixAsk, plan: PrefixPlan, owner: OwnerId) -> HandoffAsk:
        left_s = plan.patience_s
        if ask.deadline is not None:
            left_s = min(left_s, max(0.0, ask.deadline - self._clock.now()))
        return HandoffAsk(
            request_id=ask.request_id,
            token_ids=ask.token_ids[: plan.blocks * BLOCK_TOKENS],
            chain=ask.chain[: plan.blocks],
            remaining_s=left_s,
            owner=owner,
            held_only=True,
        )
