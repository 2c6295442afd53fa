"""Time as a dependency: logic takes a Clock, so that tests drive it and the simulator runs it."""

import time
from typing import Protocol


class Clock(Protocol):
    """A monotonic clock in seconds. Only differences of one clock's readings mean anything."""

    def now(self) -> float: ...


class MonotonicClock:
    """The process's monotonic clock."""

    def now(self) -> float:
        return time.monotonic()


class ManualClock:
    """A clock that moves only when told to."""

    def __init__(self, start: float = 0.0) -> None:
        self._now = start

    def now(self) -> float:
        return self._now

    def advance(self, seconds: float) -> None:
        if seconds < 0:
            raise ValueError(f"a clock cannot go back: asked to advance by {seconds} s")
        self._now += seconds
