"""Conditional disaggregation: hand a prompt off only where that delays everybody less, by prediction.

    cost at D  =  D's queue + service at D                   + harm at D
    cost at P  =  P's queue + service at P + handoff + entry + harm at P

    service    =  the prefill in steps that carry the worker's running streams, too
    handoff    =  messages, and the part of the transfer that P's prefill does not hide
    entry      =  the step at D in which the prompt's last position meets the running streams
    harm       =  streams · STREAM_WEIGHT · (seconds that the prefill adds to their steps)
               +  what the prefill makes all later ones at that worker wait

All in seconds, and the objective is their expected sum over everybody: the request's own time to its first
token, and what others lose by it. Later prefills wait at an idle worker next to nothing, at a busy one much:
a constant in their place would call a slow link worth its price on an idle cluster.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Final

from pdserve.core.exploration import PrefillPath
from pdserve.core.handoff_overhead import movement
from pdserve.core.types import Disaggregation
from pdserve.router.policies.base import PlacementRequest, PrefillChoice, PrefillCost
from pdserve.router.view import WorkerView

STREAM_WEIGHT: Final = 1.0
"""A stream's second of stall against a request's second of waiting. Both come to an end one second later, so
they count alike; more than 1 buys calmer streams with later first tokens."""


def choose(
    disaggregation: Disaggregation,
    owner: WorkerView,
    others: Sequence[WorkerView],
    request: PlacementRequest,
) -> PrefillChoice:
    """Whom `owner` asks, in what order: of `others`, at least one and best first, those that cost less than
    itself, then itself, who serves in any case. What was predicted is told in every mode."""
    local = local_cost(owner, request)
    costs = [(worker, handoff_cost(worker, owner, request)) for worker in others]
    cheaper = [(worker, cost) for worker, cost in costs if cost.total_s < local.total_s]
    best, handoff = cheaper[0] if cheaper else min(costs, key=lambda entry: entry[1].total_s)
    match disaggregation:
        case Disaggregation.ALWAYS:
            best, handoff = costs[0]
            asked = list(others)
        case Disaggregation.NEVER:
            asked = []
        case Disaggregation.COST:
            asked = [worker for worker, _ in cheaper]
            loss = abs(handoff.total_s - local.total_s)
            if explores(PrefillPath.LOCAL if asked else PrefillPath.HANDOFF, owner, best, loss):
                asked = [] if asked else [best]
    return PrefillChoice((*(worker.worker for worker in asked), owner.worker), local, handoff)


def local_cost(owner: WorkerView, request: PlacementRequest) -> PrefillCost:
    """Of `owner` computing what it lacks in its own pool."""
    cached = request.cached_tokens(owner.worker)
    new = request.prompt_tokens - cached
    service = owner.service_s(new, cached)
    return PrefillCost(owner.delay_s(new) + _step_left_s(owner) + service, _harm_s(owner, new, cached))


def handoff_cost(worker: WorkerView, owner: WorkerView, request: PlacementRequest) -> PrefillCost:
    """Of `worker` computing what it lacks and `owner` fetching what that one lacks."""
    positions = request.prompt_tokens - 1
    cached = request.cached_tokens(worker.worker)
    new = max(0, positions - cached)
    service = worker.service_s(new, cached)
    moved = movement(
        positions=positions,
        cached=cached,
        held_blocks=request.held_blocks(owner.worker),
        chunk_tokens=worker.step_tokens,
        block_bytes=owner.record.block_bytes,
        prefill_s=service,
    )
    overhead = owner.perf.handoff_seconds(moved, _transport(worker, owner)).seconds
    context = owner.load.context_tokens + request.prompt_tokens
    entry = _step_left_s(owner) + owner.decode_step_s(joining=1, context=context)
    return PrefillCost(worker.delay_s(new) + service + overhead + entry, _harm_s(worker, new, cached))


def explores(path: PrefillPath, owner: WorkerView, prefill: WorkerView, loss_s: float) -> bool:
    """Whether to take `path`, which seems to cost `loss_s` more, in order to measure it. One at a time."""
    measured = owner if path is PrefillPath.LOCAL else prefill
    return not measured.charged.prefills and 0.0 < loss_s <= owner.perf.credit_seconds(path)


def _harm_s(worker: WorkerView, new: int, cached: int) -> float:
    stalls = STREAM_WEIGHT * worker.streams * worker.compute_s(new, cached)
    return stalls + worker.queue_harm_s(new, cached)


def _step_left_s(worker: WorkerView) -> float:
    """Of the step that runs when a request comes: half of one, on average."""
    return 0.5 * worker.decode_step_s() if worker.streams else 0.0


def _transport(worker: WorkerView, owner: WorkerView) -> str:
    """How blocks come to `owner`: as they did, or, from one it never met, as from most others."""
    ways = owner.load.ways
    if worker.worker in ways or not ways:
        return ways.get(worker.worker, "")
    return min(Counter(ways.values()).items(), key=lambda entry: (-entry[1], entry[0]))[0]
