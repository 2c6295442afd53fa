"""Who may run now, who waits, who is turned away. Pure: no waiting happens here, and time is an argument."""

from collections.abc import Iterator
from enum import Enum

from pdserve.core.errors import DeadlineExceeded, Overloaded
from pdserve.core.types import RequestId

SHORTEST_RETRY_S = 0.1
LONGEST_RETRY_S = 30.0
_UNMEASURED_INTERVAL_S = 1.0
"""Assumed time between two ends until two were seen."""
_WEIGHT = 0.1
"""Of the newest interval in the moving average."""


class Admitted(Enum):
    """The answer to a request that was not turned away."""

    NOW = "now"
    QUEUED = "queued"


class Admission:
    """`max_in_flight` slots and a FIFO queue of at most `max_queue` requests behind them.

    A queued request is admitted by the `leave` that frees its slot, in order of arrival.
    """

    def __init__(self, max_in_flight: int, max_queue: int) -> None:
        self._max_in_flight = max_in_flight
        self._max_queue = max_queue
        self._running: set[RequestId] = set()
        self._queue: dict[RequestId, float | None] = {}
        self._expired: set[RequestId] = set()
        self._interval_s = _UNMEASURED_INTERVAL_S
        self._last_end: float | None = None

    @property
    def in_flight(self) -> int:
        return len(self._running)

    @property
    def queued(self) -> int:
        return len(self._queue)

    def knows(self, request: RequestId) -> bool:
        """Whether a request of that name runs or waits."""
        return request in self._running or request in self._queue or request in self._expired

    def arrive(self, request: RequestId, deadline: float | None, now: float) -> Admitted:
        """Take a slot or a place in the queue. `deadline` and `now` are on one clock, in seconds.

        Raises:
            DeadlineExceeded: its time is over already.
            Overloaded: slots and queue are full; `retry_after_s` says when that may have changed.
        """
        if self.knows(request):
            raise ValueError(f"request {request} is already admitted")
        if deadline is not None and deadline <= now:
            raise DeadlineExceeded(f"request {request} arrived {now - deadline:.3f} s after its deadline")
        self._expire(now)
        if len(self._running) < self._max_in_flight and not self._queue:
            self._running.add(request)
            return Admitted.NOW
        if len(self._queue) >= self._max_queue:
            raise Overloaded(
                f"{len(self._running)} requests are in flight (limit {self._max_in_flight}) and "
                f"{len(self._queue)} wait (limit {self._max_queue}): retry later or add workers",
                retry_after_s=self.retry_after_s(),
            )
        self._queue[request] = deadline
        return Admitted.QUEUED

    def leave(self, request: RequestId, now: float) -> tuple[RequestId, ...]:
        """A request ended, or gave up waiting. Returns whom this admits.

        A waiter whose deadline has passed takes no place any more, and stays known until it leaves by itself.
        """
        if request in self._running:
            was_full = len(self._running) >= self._max_in_flight
            self._running.discard(request)
            self._measure(now, was_full)
        self._queue.pop(request, None)
        self._expired.discard(request)
        self._expire(now)
        return tuple(self._admit())

    def retry_after_s(self) -> float:
        """When a slot is likely: everybody who waits has to be served first."""
        expected = (len(self._queue) + 1) * self._interval_s
        return min(LONGEST_RETRY_S, max(SHORTEST_RETRY_S, expected))

    def check_integrity(self) -> None:
        """Raises AssertionError when a bound is broken or a request is counted twice."""
        assert len(self._running) <= self._max_in_flight, "more in flight than slots"
        assert len(self._queue) <= self._max_queue, "more waiting than places"
        assert not self._running & self._queue.keys(), "a request runs and waits"
        assert not self._expired & (self._running | self._queue.keys()), "an expired request runs or waits"
        assert not self._queue or len(self._running) == self._max_in_flight, "a slot is free and one waits"

    def _admit(self) -> Iterator[RequestId]:
        while self._queue and len(self._running) < self._max_in_flight:
            request = next(iter(self._queue))
            del self._queue[request]
            self._running.add(request)
            yield request

    def _expire(self, now: float) -> None:
        for request, deadline in list(self._queue.items()):
            if deadline is not None and deadline <= now:
                del self._queue[request]
                self._expired.add(request)

    def _measure(self, now: float, was_full: bool) -> None:
        """Learn how often a slot frees up, from ends under load only: idle time says nothing."""
        if self._last_end is not None and was_full:
            self._interval_s += _WEIGHT * (now - self._last_end - self._interval_s)
        self._last_end = now
