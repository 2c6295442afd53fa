"""The default policy: ring owners, longest holders and least-loaded workers compete on predicted seconds.

The hash ring alone piles up work, the index alone scatters a cold prefix, least work alone loses the cache.
Their best candidates, judged by one cost, keep the strengths of all three.
"""

import hashlib
from dataclasses import dataclass

from pdserve.core.types import Disaggregation, WorkerId, blocks_for, hit_limit
from pdserve.router.policies.base import (
    Placement,
    PlacementRequest,
    PrefillChoice,
    Profile,
    Ranked,
    rank,
)
from pdserve.router.policies.conditional import choose
from pdserve.router.ring import WorkerRing
from pdserve.router.view import ClusterView, WorkerView

RING_OWNERS = 2
HOLDERS = 3
LEAST_WORK = 2

OWNER_BONUS_S = 0.05
"""Seconds that a ring owner is preferred by, so that a cold prefix settles where its key belongs."""

SERVICE_WEIGHT = 2.0
"""1 + β: a second of own computation costs more than a second of waiting, because it also delays whoever
comes next. β = 1 suits a lightly loaded cluster; it should grow with the mean wait."""


@dataclass(frozen=True, slots=True)
class _Prefill:
    """Predicted seconds until the prompt's KV is there, for a candidate set chosen before."""

    request: PlacementRequest
    candidates: frozenset[WorkerId]
    owners: tuple[WorkerId, ...]

    def accepts(self, worker: WorkerView) -> bool:
        return worker.worker in self.candidates

    def score(self, worker: WorkerView) -> float:
        bonus = OWNER_BONUS_S if worker.worker in self.owners else 0.0
        cost = worker.wait_s + SERVICE_WEIGHT * _service_s(worker, self.request) - bonus
        return 1.0 / (1.0 + OWNER_BONUS_S + cost)

    def tie(self, worker: WorkerId) -> bytes:
        return _tie(self.request, worker)


@dataclass(frozen=True, slots=True)
class _Decode:
    """Free promise capacity, then little context to walk through at every step, then the prefix at hand."""

    request: PlacementRequest
    most_context: int

    def accepts(self, worker: WorkerView) -> bool:
        fits = max(self.request.promise_blocks, self.request.longest_blocks) <= worker.record.pool_blocks
        return worker.decodes and fits and worker.worker not in self.request.refused

    def score(self, worker: WorkerView) -> float:
        pool = worker.record.pool_blocks
        # Above the pool's size the order still counts: an overbooked pool may promise more than it has.
        free = pool / (pool + worker.promised_blocks + self.request.promise_blocks)
        calm = 1.0 - worker.load.context_tokens / self.most_context
        held = self.request.cached_tokens(worker.worker) / max(1, self.request.prompt_tokens)
        return 0.5 * free + 0.25 * calm + 0.25 * held

    def tie(self, worker: WorkerId) -> bytes:
        return _tie(self.request, worker)


@dataclass(frozen=True, slots=True)
class _Aggregated:
    """Nobody prefills only, so the owner computes the prompt too: both profiles count alike."""

    decode: _Decode
    prefill: _Prefill

    def accepts(self, worker: WorkerView) -> bool:
        return self.decode.accepts(worker)

    def score(self, worker: WorkerView) -> float:
        return 0.5 * self.decode.score(worker) + 0.5 * self.prefill.score(worker)

    def tie(self, worker: WorkerId) -> bytes:
        return self.decode.tie(worker)


class HybridPolicy:
    """Two owners, three longest holders, two with least work; cost = wait + (1 + β) service - bonus."""

    def __init__(self, disaggregation: Disaggregation = Disaggregation.COST) -> None:
        self._disaggregation = disaggregation
        # A cache, not state: the ring is a function of the names in the view.
        self._ring = WorkerRing(())

    def place(self, view: ClusterView, request: PlacementRequest, now: float) -> Placement | None:
        """Choose the owner, then whom it asks. The owner is last: it can always compute in its own pool, and
        nobody is asked who costs more."""
        del now  # waits are durations already
        dedicated = any(worker.dedicated for worker in view)
        owner = self._owner(view, request, dedicated)
        if owner is None:
            return None
        return _placement(owner, self._candidates(view, owner, request, dedicated), view, request)

    def _owner(self, view: ClusterView, request: PlacementRequest, dedicated: bool) -> WorkerView | None:
        most_context = max([1, *(worker.load.context_tokens for worker in view if worker.decodes)])
        decode = _Decode(request, most_context)
        profile: Profile = decode
        if not dedicated:
            able = [worker for worker in view if decode.accepts(worker)]
            owners = self._owners(view, able, request)
            profile = _Aggregated(decode, _Prefill(request, frozenset(w.worker for w in able), owners))
        ranked = rank(profile, view)
        return view[ranked[0].worker] if ranked else None

    def _candidates(
        self, view: ClusterView, owner: WorkerView, request: PlacementRequest, dedicated: bool
    ) -> PrefillChoice:
        """Whom `owner` asks, best first; the last one is itself."""
        held = request.held_blocks(owner.worker) >= hit_limit(request.prompt_tokens)
        aggregated = owner.record.prefills and not dedicated
        if held or aggregated:
            return PrefillChoice((owner.worker,))
        others = [view[ranked.worker] for ranked in self._prefill(view, owner, request)]
        if not others:
            return PrefillChoice((owner.worker,))
        return choose(self._disaggregation, owner, others, request)

    def _prefill(self, view: ClusterView, owner: WorkerView, request: PlacementRequest) -> tuple[Ranked, ...]:
        needed = blocks_for(request.prompt_tokens - 1)
        able = [w for w in view if w.prefills and w.worker != owner.worker and w.lends_blocks >= needed]
        owners = self._owners(view, able, request)
        held = [w for w in able if request.depths.get(w.worker, 0) > 0]
        holders = sorted(held, key=lambda w: (-request.depths[w.worker], _tie(request, w.worker)))[:HOLDERS]
        idle = sorted(able, key=lambda w: (w.wait_s, _tie(request, w.worker)))[:LEAST_WORK]
        candidates = frozenset([*owners, *(w.worker for w in holders), *(w.worker for w in idle)])
        return rank(_Prefill(request, candidates, owners), able)

    def _owners(
        self, view: ClusterView, able: list[WorkerView], request: PlacementRequest
    ) -> tuple[WorkerId, ...]:
        # The ring holds everybody who may come back, so that a suspect worker's keys return to it.
        if self._ring.workers != view.ids:
            self._ring = WorkerRing(view.ids)
        eligible = frozenset(worker.worker for worker in able)
        return self._ring.owners(request.ring_key, RING_OWNERS, eligible.__contains__)


def _placement(
    owner: WorkerView, choice: PrefillChoice, view: ClusterView, request: PlacementRequest
) -> Placement:
    first = view[choice.candidates[0]]
    new = request.prompt_tokens - request.cached_tokens(first.worker)
    service = _service_s(first, request)
    return Placement(owner.worker, choice.candidates, new, service, choice.local, choice.handoff)


def _service_s(worker: WorkerView, request: PlacementRequest) -> float:
    cached = request.cached_tokens(worker.worker)
    return worker.service_s(request.prompt_tokens - cached, cached)


def _tie(request: PlacementRequest, worker: WorkerId) -> bytes:
    return hashlib.blake2b(request.ring_key + worker.encode(), digest_size=8).digest()
