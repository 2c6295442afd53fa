"""How many prompts come to a worker, and how busy they keep it. Pure: fed with heartbeats and the time."""

import math
from dataclasses import dataclass

WINDOW_S = 60.0
"""What is older counts little. Much longer than one prefill, or a worker would count as busy all the time
whenever a long one runs."""

_BUSIEST = 0.95
"""A queue that never empties is no state to plan by: what is measured as busier counts as this."""


@dataclass(frozen=True, slots=True)
class Traffic:
    """Lately, whoever sent them."""

    prefills_per_s: float = 0.0
    busy: float = 0.0
    """Share of the time, in [0, 1], in which a prompt was computed."""

    @property
    def quiet(self) -> float:
        """The rest of the time; never so little that a queue would last for ever."""
        return 1.0 - min(_BUSIEST, self.busy)

    @property
    def standing_s(self) -> float:
        """Work that such traffic finds in the queue on average, were all prompts alike."""
        if not self.prefills_per_s:
            return 0.0
        return self.busy**2 / (2.0 * self.prefills_per_s * self.quiet)

    def expected_s(self, queued_s: float, age_s: float) -> float:
        """Work in the queue now, which held `queued_s` so long ago: that is worked off, and more comes."""
        standing = self.standing_s
        if queued_s > standing:
            return max(standing, queued_s - self.quiet * age_s)
        return min(standing, queued_s + self.busy * age_s)


class PrefillTraffic:
    """From the totals that one start of a worker reports."""

    def __init__(self) -> None:
        self.now = Traffic()
        self._first: float | None = None
        self._last = (0.0, 0, 0.0)

    def beat(self, at: float, prefills: int, busy_s: float) -> None:
        """At `at`, on the router's clock, the worker had begun so many prefills since its start, and spent
        `busy_s` in their steps."""
        last, self._last = self._last, (at, prefills, busy_s)
        if self._first is None:
            self._first = at
            return
        passed = at - last[0]
        if passed <= 0.0:
            return
        # At first the mean of all there is, later of the window.
        weight = max(1.0 - math.exp(-passed / WINDOW_S), passed / (at - self._first))
        rate = max(0, prefills - last[1]) / passed
        busy = min(1.0, max(0.0, busy_s - last[2]) / passed)
        self.now = Traffic(
            self.now.prefills_per_s + weight * (rate - self.now.prefills_per_s),
            self.now.busy + weight * (busy - self.now.busy),
        )
