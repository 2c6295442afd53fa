"""Whether to fetch a prefix that another worker holds, or to compute it. No I/O and no clock.

    compute = prefill of the missing blocks behind the own ones
    fetch   = a handoff with nothing to compute: its messages, and the transfer of their bytes

Waiting for the engine is on both sides and left out; a fetch leaves the engine to others meanwhile, so that a
tie is no reason to compute. A fetch that takes much longer than predicted is given up: at the latest after
`patience_s` the worker computes as if it had never asked.
"""

from dataclasses import dataclass

from pdserve.core.handoff_overhead import Movement
from pdserve.core.perfmodel import PerfModel
from pdserve.core.types import BLOCK_TOKENS

_PATIENCE = 4.0
"""A fetch may take so many times what was predicted,"""

LEAST_PATIENCE_S = 0.5
"""or this long: in less, the pauses of two busy processes decide, and not the way between them."""


@dataclass(frozen=True, slots=True)
class PrefixPlan:
    """Have `blocks` leading blocks of a prompt, `own` of which are here, from their holder. Seconds."""

    blocks: int
    own: int
    compute_s: float
    """What computing the missing ones is predicted to take here."""
    fetch_s: float
    """What fetching them is predicted to take, all in all."""

    @property
    def missing(self) -> int:
        """Blocks that would move."""
        return self.blocks - self.own

    @property
    def pays(self) -> bool:
        """Whether there is something to fetch, and that is not dearer than to compute it."""
        return self.missing > 0 and self.fetch_s <= self.compute_s

    @property
    def patience_s(self) -> float:
        """How long the fetch may take."""
        return max(LEAST_PATIENCE_S, _PATIENCE * self.fetch_s)


def plan_prefix(
    perf: PerfModel, *, own: int, held: int, chunk_tokens: int, block_bytes: int, transport: str
) -> PrefixPlan | None:
    """How to come from `own` leading blocks to `held`; None where that is no more.

    `perf` is the model of the worker that would compute, in steps of `chunk_tokens`, or fetch over
    `transport`. What it has never seen it predicts from its priors.
    """
    if held <= own:
        return None
    missing = held - own
    compute = perf.prefill_seconds(missing * BLOCK_TOKENS, own * BLOCK_TOKENS, chunk_tokens)
    fetch = perf.handoff_seconds(bare_movement(missing * block_bytes), transport)
    return PrefixPlan(held, own, compute.seconds, fetch.seconds)


def bare_movement(num_bytes: int) -> Movement:
    """Bytes that are there when they are asked for: no prefill hides their transfer."""
    return Movement(num_bytes, num_bytes, prefill_s=0.0)
