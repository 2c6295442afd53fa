"""One handoff's waits at D, to reserve and for P: what it knows of fill, way and pool."""

import math

from pdserve.core.perfmodel import Prediction
from pdserve.core.types import blocks_for
from pdserve.kvtransfer.handoff.ask import HandoffAsk
from pdserve.kvtransfer.handoff.decode_side import DecodeHandoff
from pdserve.kvtransfer.handoff.decode_site import DecodeSite
from pdserve.kvtransfer.handoff.late_reservation import FillForecast, may_wait_s
from pdserve.kvtransfer.handoff.reservations import Waiter
from pdserve.kvtransfer.handoff.state_deadlines import (
    AT_ONCE,
    Budget,
    Outlook,
    StateBound,
    decode_bound,
    slow,
)


class Patience:
    """Tells late_reservation.py and state_deadlines.py what this handoff sees. `waiter` is woken by the
    site's reservations.
    """

    def __init__(self, site: DecodeSite, ask: HandoffAsk, waiter: Waiter) -> None:
        self._site = site
        self._ask = ask
        self._waiter = waiter
        now, own_s = site.clock.now(), ask.remaining_s
        remaining_s = site.config.request_deadline_s if own_s is None else max(0.0, own_s)
        self._budget = Budget(now, now + remaining_s, site.config.silence_s, ask.further)
        self._heard_at = now
        # Once: bounds are made with every event, and a long prompt has thousands of names.
        self._missing = blocks_for(ask.positions) - site.pool.match(ask.names)
        self._fill: FillForecast | None = None
        self._filled = False
        self._asked = False
        self._counted = False

    def opened(self, now: float, estimate_s: float, cached: int) -> None:
        """P said how long it will take, and how many leading blocks it has."""
        self._heard_at = now
        self._fill = FillForecast(now, estimate_s, blocks_for(self._ask.positions), cached)

    def announced(self, now: float, end: int) -> None:
        """Blocks up to `end` are final at P."""
        self._heard_at = now
        if self._fill is not None:
            self._fill = self._fill.announced(now, end)

    def filled(self, now: float) -> None:
        """P is done: nothing is left to wait for, and its estimate is judged."""
        self._filled = True
        self._heard_at = now
        if self._site.perf is not None and self._fill is not None and not self._ask.held_only:
            self._site.perf.observe_fill(self._fill.estimate_s, now - self._fill.opened_at)

    def bound(self, machine: DecodeHandoff, entered_at: float, transport: str | None) -> StateBound:
        """The latest moment in the machine's state, which began at `entered_at`."""
        outlook = Outlook(self._fill_rest(), self._transfer(transport), self._elsewhere())
        return decode_bound(machine, max(entered_at, self._heard_at), self._budget, outlook)

    def longest_s(self) -> float:
        """Seconds from now for which P may be of use at all."""
        elsewhere = self._elsewhere()
        last_call = self._budget.last_call(math.inf if elsewhere is None else slow(elsewhere))
        return max(0.0, last_call - self._site.clock.now())

    def holds_back(self, transport: str | None) -> bool:
        """Whether to reserve later, and be woken then. `transport` is None while there is none.

        Once the answer is no, it stays no: whoever has asked the pool keeps its place in line.
        """
        wait_s = 0.0 if self._asked else self._wait_s(transport)
        if wait_s <= 0.0:
            self._asked = True
            return False
        if not self._counted:
            self._counted = True
            self._site.counters["reservations_deferred"] += 1
        self._site.reservations.defer(self._waiter, wait_s)
        return True

    def _wait_s(self, transport: str | None) -> float:
        site = self._site
        if site.perf is None or self._fill is None or transport is None:
            return 0.0
        demand = site.reservations.demand(self._waiter)
        if not demand.tight:
            return 0.0
        now, error, transfer = site.clock.now(), site.perf.fill_error, self._transfer(transport)
        return may_wait_s(now, self._fill, error, transfer, demand, filled=self._filled)

    def _fill_rest(self) -> Prediction:
        """Of P's estimate, the part of the blocks that it has not announced."""
        fill, perf = self._fill, self._site.perf
        if fill is None:
            return AT_ONCE
        done = fill.cached if fill.latest is None else fill.latest.end
        rest = max(0, fill.blocks - done) / max(1, fill.blocks - fill.cached)
        return Prediction(fill.estimate_s * min(1.0, rest), None if perf is None else perf.fill_error)

    def _transfer(self, transport: str | None) -> Prediction:
        """Of all bytes that D did not hold at the start."""
        site = self._site
        if site.perf is None or transport is None:
            return AT_ONCE
        return site.perf.transfer_seconds(self._missing * site.storage.layout.block_bytes, transport)

    def _elsewhere(self) -> Prediction | None:
        """Prefilling as fast as this worker would, in one step."""
        perf, positions = self._site.perf, self._ask.positions
        return None if perf is None else perf.prefill_seconds(positions, 0, positions)
