"""Fetches leading blocks of a prompt from a worker that holds them, instead of computing them.

    plan ──pays──► handoff of what is held ──committed──► plain cache of this worker
                             └──holds fewer: once more, for what it has
                             └──anything else: computed, as if nobody had been asked

The fetched blocks are named, announced and owned by nobody from the commit on: the fill finds them by name as
it finds any cached block. To keep them pinned until then would be to hold blocks and wait for more.
"""

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
from pdserve.kvtransfer.handoff.prefix_choice import PrefixPlan, bare_movement, plan_prefix
from pdserve.kvtransfer.pool.pool import KvPool

_log = logging.getLogger(__name__)

_ASKS = 2
"""Once as the hint says, once more as the holder's rejection says."""


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
    at the holder, and never lasts longer than `PrefixPlan.patience_s`.
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

    @property
    def counters(self) -> dict[str, int]:
        """Totals since start: asked, asked_again, fetched, blocks (moved), too_dear, failed_<outcome>."""
        return dict(self._counters)

    def plan(self, ask: PrefixAsk) -> PrefixPlan | None:
        """What there is to fetch; None where the holder has no more than this worker, or is this worker."""
        holder = ask.holder
        if holder is None or holder.peer.worker == self._record().worker:
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

        None where nothing was fetched, for whatever reason: the caller computes. A cancel leaves nothing.
        """
        for attempt in range(_ASKS):
            plan = self.plan(ask)
            if plan is None or ask.holder is None:
                return None
            if not plan.pays:
                self._counters["too_dear"] += 1
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
