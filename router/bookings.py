"""What this router has decided and no worker has reported yet: charged at placement, in one code path."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from pdserve.core.types import RequestId, WorkerId


@dataclass(frozen=True, slots=True)
class Charge:
    """Work that a worker got from this router."""

    requests: int = 0
    streams: int = 0
    """Requests whose first token has come."""
    prefills: int = 0
    """Prompts to compute."""
    prefill_tokens: int = 0
    prefill_s: float = 0.0
    """What is left of them now if the worker does one after the other."""
    blocks: int = 0
    """Blocks promised to whole requests: prompt and headroom."""


@dataclass(frozen=True, slots=True)
class Booking:
    """One placed request. `prefill` is None once its first token came: that work is done."""

    decode: WorkerId
    blocks: int
    prefill: WorkerId | None
    prefill_tokens: int
    prefill_s: float
    at: float
    """When it was charged, on the router's clock."""

    @property
    def workers(self) -> frozenset[WorkerId]:
        """Whom it is charged to."""
        return frozenset([self.decode] if self.prefill is None else [self.decode, self.prefill])


class Bookings:
    """The router's own decisions, by request. Pure: time is an argument."""

    def __init__(self) -> None:
        self._by_request: dict[RequestId, Booking] = {}
        self._by_worker: dict[WorkerId, dict[RequestId, None]] = {}

    def __len__(self) -> int:
        return len(self._by_request)

    def charge(self, request: RequestId, booking: Booking) -> None:
        """Count a decision. A request that is placed again gives its earlier booking back first."""
        self.settle(request)
        self._by_request[request] = booking
        for worker in booking.workers:
            self._by_worker.setdefault(worker, {})[request] = None

    def settle_prefill(self, request: RequestId) -> None:
        """The first token came, so the prefill is over. Unknown requests are already settled."""
        booking = self._by_request.get(request)
        if booking is None or booking.prefill is None:
            return
        if booking.prefill != booking.decode:
            self._forget(booking.prefill, request)
        self._by_request[request] = replace(booking, prefill=None, prefill_tokens=0, prefill_s=0.0)

    def settle(self, request: RequestId) -> None:
        """The request ended, or is placed elsewhere. Unknown requests are already settled."""
        booking = self._by_request.pop(request, None)
        if booking is None:
            return
        for worker in booking.workers:
            self._forget(worker, request)

    def charged(self, worker: WorkerId, now: float, since: float | None = None) -> Charge:
        """Everything open on `worker`; with `since`, only what was charged after that moment."""
        found = [b for b in self._of(worker) if since is None or b.at > since]
        decodes = [booking for booking in found if booking.decode == worker]
        prefills = [booking for booking in found if booking.prefill == worker]
        return Charge(
            requests=len(found),
            streams=sum(booking.prefill is None for booking in decodes),
            prefills=len(prefills),
            prefill_tokens=sum(booking.prefill_tokens for booking in prefills),
            prefill_s=_left_s(prefills, now),
            blocks=sum(booking.blocks for booking in decodes),
        )

    def check_integrity(self) -> None:
        """Raises AssertionError when the two directions of the book disagree."""
        expected: dict[WorkerId, set[RequestId]] = {}
        for request, booking in self._by_request.items():
            for worker in booking.workers:
                expected.setdefault(worker, set()).add(request)
        actual = {worker: set(requests) for worker, requests in self._by_worker.items()}
        assert actual == expected, f"bookings by worker {actual} differ from those by request {expected}"

    def _of(self, worker: WorkerId) -> Iterator[Booking]:
        for request in self._by_worker.get(worker, ()):
            yield self._by_request[request]

    def _forget(self, worker: WorkerId, request: RequestId) -> None:
        requests = self._by_worker[worker]
        del requests[request]
        if not requests:
            del self._by_worker[worker]


def _left_s(prefills: Iterable[Booking], now: float) -> float:
    """Work runs from the moment it is charged, or from the end of what was charged before."""
    end = -math.inf
    for booking in sorted(prefills, key=lambda b: b.at):
        end = max(end, booking.at) + booking.prefill_s
    return max(0.0, end - now)
