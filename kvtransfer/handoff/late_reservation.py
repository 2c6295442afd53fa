"""When D should take blocks for a handoff whose chunks are coming: as late as the transfer allows.

A handoff that reserves at its first chunk keeps the whole prompt's blocks idle until the fill ends. One that
reserves at `end of the fill - time to transfer` ends no later, and until then others may use them.

Waiting pays only where somebody else could use the blocks, so D waits only while the pool is tight: what is
available does not hold all handoffs that are promised and have not reserved. Counted are their prompts, not
the pool's promises: those also cover headroom, blocks that are taken already, and shared prefixes once per
request, so they would call a pool tight that is not. In a tight pool blocks go to who can start its transfer
first.

A prediction whose error nobody knows is no reason to wait.
"""

import math
from dataclasses import dataclass, replace

from pdserve.core.perfmodel import Prediction

_CAUTION = 2.0
"""Predictions count as wrong by so many times their mean error."""

LEAST_WAIT_S = 0.01
"""Less is not worth a timer, and within what a grant takes to travel."""


@dataclass(frozen=True, slots=True)
class Demand:
    """Blocks of D's pool, in view of one handoff that has reserved none."""

    available: int
    own: int
    others: int
    """What other handoffs want that are promised and have not reserved either."""

    @property
    def tight(self) -> bool:
        """Not everybody can have blocks now."""
        return self.others > 0 and self.available < self.own + self.others


@dataclass(frozen=True, slots=True)
class Announcement:
    """Blocks up to `end` (exclusive) were said to be final at `at`, seconds on D's clock."""

    at: float
    end: int


@dataclass(frozen=True, slots=True)
class FillForecast:
    """When P will have filled: its own estimate, corrected by what it has announced."""

    opened_at: float
    """When D read P's estimate, seconds on D's clock."""
    estimate_s: float
    blocks: int
    """Blocks of the prompt that P announces."""
    cached: int = 0
    """Leading blocks that took P no time."""
    first: Announcement | None = None
    latest: Announcement | None = None

    def announced(self, at: float, end: int) -> "FillForecast":
        """With one more chunk."""
        heard = Announcement(at, end)
        return replace(self, first=self.first or heard, latest=heard)

    def earliest_end(self, relative_error: float) -> float:
        """When P may be done if the prediction is too long by `relative_error`; seconds on D's clock.

        Between two announcements P's pace shows, without the queue before them; attention makes later chunks
        slower, so the pace errs to the early side. One announcement shows the pace with the queue in it: an
        upper bound on what P said.
        """
        first, latest = self.first, self.latest
        if first is not None and latest is not None and latest.end > first.end:
            pace = (latest.at - first.at) / (latest.end - first.end)
            return latest.at + max(0, self.blocks - latest.end) * pace / (1.0 + relative_error)
        total = self.estimate_s
        if first is not None and first.end > self.cached:
            fraction = (first.end - self.cached) / max(1, self.blocks - self.cached)
            total = min(total, (first.at - self.opened_at) / fraction)
        return self.opened_at + total / (1.0 + relative_error)


def may_wait_s(
    now: float,
    fill: FillForecast,
    fill_error: float | None,
    transfer: Prediction,
    demand: Demand,
    *,
    filled: bool,
) -> float:
    """Seconds for which D may go on without blocks; 0 means reserve now.

    `transfer` is for all bytes that D does not hold: were they all sent after the wait, the last one would
    come when the fill ends. `fill_error` is the mean relative error of earlier estimates. Where an error is
    unknown, after the fill's end, and with room for everybody there is no wait.
    """
    if filled or not demand.tight or fill_error is None or transfer.relative_error is None:
        return 0.0
    end = fill.earliest_end(_CAUTION * fill_error)
    wait = end - now - transfer.seconds * (1.0 + _CAUTION * transfer.relative_error)
    # P's estimate is a number off the wire.
    return wait if math.isfinite(wait) and wait >= LEAST_WAIT_S else 0.0
