"""Policies: f(ClusterView, PlacementRequest, now) → Placement, by filter → score in [0, 1] → pick."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

from pdserve.core.types import BLOCK_TOKENS, WorkerId, hit_limit
from pdserve.router.view import ClusterView, WorkerView


@dataclass(frozen=True, slots=True)
class PlacementRequest:
    """What a policy knows about a request."""

    prompt_tokens: int
    promise_blocks: int
    """Blocks that its decode worker promises: prompt and headroom."""
    ring_key: bytes
    depths: Mapping[WorkerId, int]
    """Leading prompt blocks that each worker holds, as far as the index knows. A hint."""
    refused: frozenset[WorkerId] = frozenset()
    """Decode workers that answered Replace to this request."""
    longest_blocks: int = 0
    """Blocks of one choice that comes to its max_tokens: a smaller pool refuses the request for good."""

    def held_blocks(self, worker: WorkerId) -> int:
        """Leading blocks that `worker` need not compute."""
        return min(self.depths.get(worker, 0), hit_limit(self.prompt_tokens))

    def cached_tokens(self, worker: WorkerId) -> int:
        """Those blocks in tokens."""
        return self.held_blocks(worker) * BLOCK_TOKENS


@dataclass(frozen=True, slots=True)
class PrefillCost:
    """What computing the prompt in one place is expected to cost, in seconds."""

    seconds: float
    """Until the first token, once the owner has the request."""
    harm_s: float
    """What others lose by it, summed over them."""

    @property
    def total_s(self) -> float:
        return self.seconds + self.harm_s


@dataclass(frozen=True, slots=True)
class PrefillChoice:
    """Who computes the prompt, and what spoke for it."""

    candidates: tuple[WorkerId, ...]
    """Best first; ends with the owner."""
    local: PrefillCost | None = None
    """None, as is `handoff`, where there was nothing to choose."""
    handoff: PrefillCost | None = None
    """Of the best candidate that is not the owner."""


@dataclass(frozen=True, slots=True)
class Placement:
    """Who owns the request, and whom the owner asks for the prompt's KV, best first."""

    decode: WorkerId
    prefill: tuple[WorkerId, ...]
    prefill_tokens: int
    """Tokens that the first of `prefill` is expected to compute."""
    prefill_s: float
    """Predicted seconds for them."""
    local: PrefillCost | None = None
    """What was expected of the owner's own pool; None where there was no choice."""
    handoff: PrefillCost | None = None
    """What was expected of the best prefill worker."""


class Policy(Protocol):
    """Deterministic: equal arguments give equal placements. Reads no clock, does no I/O."""

    def place(self, view: ClusterView, request: PlacementRequest, now: float) -> Placement | None:
        """None when no worker can own the request now. `now` is the router's clock in seconds."""
        ...


class Profile(Protocol):
    """One way of looking at workers: prefill and decode are two profiles of one mechanism."""

    def accepts(self, worker: WorkerView) -> bool:
        """The filter."""
        ...

    def score(self, worker: WorkerView) -> float:
        """In [0, 1]; more is better."""
        ...

    def tie(self, worker: WorkerId) -> bytes:
        """Orders equal scores, differently for different requests."""
        ...


@dataclass(frozen=True, slots=True)
class Ranked:
    """A worker with its score in one profile."""

    worker: WorkerId
    score: float


def rank(profile: Profile, workers: Iterable[WorkerView]) -> tuple[Ranked, ...]:
    """The accepted workers, best first."""
    ranked = [Ranked(view.worker, profile.score(view)) for view in workers if profile.accepts(view)]
    return tuple(sorted(ranked, key=lambda entry: (-entry.score, profile.tie(entry.worker))))
