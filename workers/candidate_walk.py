"""How D gets a prompt's KV: from the first prefill candidate that serves, or by its own engine."""

import itertools
import logging
from collections.abc import Callable, Sequence

from pdserve.core.clock import Clock
from pdserve.core.errors import DeadlineExceeded, Overloaded, PdserveError, Unavailable, WorkerLost
from pdserve.core.types import Incarnation, OwnerId, WorkerId, hit_limit
from pdserve.core.worker_record import WorkerRecord
from pdserve.kvtransfer.handoff.ask import PrefixHolder
from pdserve.kvtransfer.handoff.consumer import (
    Committed,
    DecodeHandoffs,
    HandoffAsk,
    HandoffPeer,
    NotServed,
)
from pdserve.kvtransfer.handoff.prefix_fetch import PrefixAsk, PrefixFetch
from pdserve.kvtransfer.handoff.states import Outcome
from pdserve.kvtransfer.pool.pool import KvPool
from pdserve.workers.decode_request import DecodeAsk, DecodeRequest, PrefillCandidate

log = logging.getLogger(__name__)


class CandidateWalk:
    """Asks a request's candidates one after the other. The request's promise is taken before."""

    def __init__(
        self,
        record: Callable[[], WorkerRecord],
        pool: KvPool,
        handoffs: DecodeHandoffs,
        prefixes: PrefixFetch,
        clock: Clock,
        count: Callable[[str], None],
    ) -> None:
        self._record = record
        self._pool = pool
        self._handoffs = handoffs
        self._prefixes = prefixes
        self._clock = clock
        self._count = count
        self._serial = itertools.count()

    async def walk(self, request: DecodeRequest) -> tuple[Committed | None, int]:
        """The handoff that committed, or None where D itself is to prefill; and how many were asked before.

        A cancel leaves nothing behind. Raises DeadlineExceeded, or what stands for all the refusals.
        """
        me = self._record().worker
        refusals: list[NotServed] = []
        for attempt, candidate in enumerate(request.ask.candidates):
            self._check_deadline(request.ask)
            if candidate.worker == me or self._holds_prompt(request.ask):
                return None, attempt
            request.marks.serving_open = self._clock.now()
            # Never used twice: an earlier attempt of the same request id may still drain its owner's blocks.
            owner = OwnerId(f"handoff/{request.request_id}/{next(self._serial)}")
            further = len(request.ask.candidates) - attempt - 1
            asked = self._handoff_ask(request.ask, owner, further)
            outcome = await self._handoffs.fetch(asked, _peer(candidate))
            if isinstance(outcome, Committed):
                return outcome, attempt
            refusals.append(outcome)
            self._count(f"not_served_{outcome.reason}")
            log.info(
                "request %s: %s did not serve: %s", request.request_id, candidate.worker, outcome.message
            )
            if outcome.reason is Outcome.DEADLINE:
                break
        raise _all_refused(refusals)

    async def fetch_prefix(self, request: DecodeRequest) -> None:
        """Before D itself prefills: what another worker holds, where that is cheaper than to compute it."""
        ask = request.ask
        names = ask.chain[: hit_limit(len(ask.token_ids))]
        asked = PrefixAsk(ask.request_id, ask.token_ids, names, ask.deadline, ask.prefix)
        request.prefix_fetched(await self._prefixes.fetch(asked))

    def _holder(self, ask: DecodeAsk) -> PrefixHolder | None:
        """Whom P may fetch from: D knows better than any index what it holds itself."""
        me, held = self._record(), self._pool.match(ask.chain)
        if held <= (0 if ask.prefix is None else ask.prefix.blocks):
            return ask.prefix
        return PrefixHolder(HandoffPeer(me.worker, me.incarnation, me.endpoint), held)

    def _check_deadline(self, ask: DecodeAsk) -> None:
        if ask.deadline is not None and self._clock.now() >= ask.deadline:
            raise DeadlineExceeded(f"request {ask.request_id} passed its deadline at the decode worker")

    def _holds_prompt(self, ask: DecodeAsk) -> bool:
        """Whether a handoff would move nothing worth a transfer: D computes the rest as a short prefill."""
        limit = hit_limit(len(ask.token_ids))
        return limit == 0 or self._pool.match(ask.chain[:limit]) >= limit

    def _handoff_ask(self, ask: DecodeAsk, owner: OwnerId, further: int) -> HandoffAsk:
        return HandoffAsk(
            request_id=ask.request_id,
            token_ids=ask.token_ids,
            chain=ask.chain,
            remaining_s=None if ask.deadline is None else ask.deadline - self._clock.now(),
            owner=owner,
            further=further,
            prefix=self._holder(ask),
        )


def _peer(candidate: PrefillCandidate) -> HandoffPeer:
    return HandoffPeer(WorkerId(candidate.worker), Incarnation(candidate.incarnation), candidate.endpoint)


def _all_refused(refusals: Sequence[NotServed]) -> PdserveError:
    """What a request fails with when the last candidate did not serve it either."""
    if not refusals:
        return Unavailable("no prefill candidate was named: add a prefill or a mixed worker")
    if any(refusal.reason == "deadline" for refusal in refusals):
        return DeadlineExceeded(f"the deadline passed in the handoff: {refusals[-1].message}")
    tried = "; ".join(refusal.message for refusal in refusals)
    waits = [r.retry_after_s for r in refusals if r.retry_after_s is not None]
    if all(refusal.reason == "rejected" for refusal in refusals):
        return Overloaded(f"every prefill candidate refused: {tried}", retry_after_s=min(waits, default=0.5))
    return WorkerLost(f"every prefill candidate failed: {tried}")
