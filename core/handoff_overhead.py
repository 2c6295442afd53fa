"""What a handoff takes beside the queue and the prefill at P: round trips, and the transfer that shows.

    overhead = fixed + factor · unhidden,   unhidden = max(last chunk's transfer, whole transfer - prefill)

Chunks travel while P computes the next, so that all but the last may be free; where the way is slower than P,
what is left after the prefill shows. The transfers themselves are PerfModel's own fits. `factor` is 1 where
these say it all; it learns what they do not know (copies that wait for each other, digests).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from pdserve.core.linearfit import LinearFit
from pdserve.core.running_error import RunningError
from pdserve.core.types import BLOCK_TOKENS, blocks_for

_TERMS: Final = ("fixed_seconds", "unhidden_factor")
_PRIOR: Final = (3e-3, 1.0)
"""A few messages and no surprise: who never met is expected to do well, and so is tried."""

_PREFIX: Final = "handoff"


@dataclass(frozen=True, slots=True)
class Movement:
    """The KV that a handoff brings to D, and the time in which it can hide."""

    num_bytes: int
    last_bytes: int
    """Of them, those of P's last chunk: they cannot travel before the prefill ends."""
    prefill_s: float


def movement(
    *, positions: int, cached: int, held_blocks: int, chunk_tokens: int, block_bytes: int, prefill_s: float
) -> Movement:
    """What `positions` tokens need whose first `cached` P has computed before, and whose first `held_blocks`
    blocks D has; P computes `chunk_tokens` at once."""
    moved = max(0, blocks_for(positions) - held_blocks)
    new = max(1, positions - cached)
    last = min(moved, 1 + (new - 1) % chunk_tokens // BLOCK_TOKENS)
    return Movement(moved * block_bytes, last * block_bytes, prefill_s)


class HandoffOverhead:
    """One fit per transport."""

    def __init__(self, values: Mapping[str, float] | None = None) -> None:
        """`values`: an earlier `snapshot`, perhaps among other things."""
        self._fits: dict[str, tuple[LinearFit, RunningError]] = {}
        found = values or {}
        names = [name.removeprefix(f"{_PREFIX}/") for name in found if name.startswith(f"{_PREFIX}/")]
        for transport in dict.fromkeys(name.rpartition("/")[0] for name in names):
            terms = zip(_TERMS, _PRIOR, strict=True)
            start = [found.get(_key(transport, term), prior) for term, prior in terms]
            error = RunningError(found.get(_key(transport, "relative_error")))
            self._fits[transport] = (LinearFit(_PRIOR, start), error)

    def observe(self, transport: str, unhidden_s: float, seconds: float) -> None:
        """Learn that a handoff over `transport` took `seconds` > 0 beside queue and prefill."""
        if transport not in self._fits:
            self._fits[transport] = (LinearFit(_PRIOR), RunningError())
        fit, running = self._fits[transport]
        running.add(fit.observe((1.0, unhidden_s), seconds))

    def predict(self, transport: str, unhidden_s: float) -> tuple[float, float | None]:
        """Seconds, and their recent mean relative error; the prior where that transport was never seen."""
        fit, running = self._fits.get(transport) or (LinearFit(_PRIOR), RunningError())
        return fit.predict((1.0, unhidden_s)), running.mean

    def snapshot(self) -> dict[str, float]:
        values: dict[str, float] = {}
        for transport, (fit, running) in list(self._fits.items()):
            for term, value in zip(_TERMS, fit.coefficients, strict=True):
                values[_key(transport, term)] = value
            if running.mean is not None:
                values[_key(transport, "relative_error")] = running.mean
        return values


def _key(transport: str, term: str) -> str:
    return f"{_PREFIX}/{transport}/{term}"
