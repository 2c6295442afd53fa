"""One handoff's wait for the right moment to reserve: what it knows of fill, way and pool."""

from pdserve.core.types import blocks_for
from pdserve.kvtransfer.handoff.ask import HandoffAsk
from pdserve.kvtransfer.handoff.decode_site import DecodeSite
from pdserve.kvtransfer.handoff.late_reservation import FillForecast, may_wait_s
from pdserve.kvtransfer.handoff.reservations import Waiter


class Patience:
    """Tells late_reservation.py what this handoff sees. `waiter` is woken by the site's reservations."""

    def __init__(self, site: DecodeSite, ask: HandoffAsk, waiter: Waiter) -> None:
        self._site = site
        self._ask = ask
        self._waiter = waiter
        self._fill: FillForecast | None = None
        self._filled = False
        self._asked = False
        self._counted = False

    def opened(self, now: float, estimate_s: float, cached: int) -> None:
        """P said how long it will take, and how many leading blocks it has."""
        self._fill = FillForecast(now, estimate_s, blocks_for(self._ask.positions), cached)

    def announced(self, now: float, end: int) -> None:
        """Blocks up to `end` are final at P."""
        if self._fill is not None:
            self._fill = self._fill.announced(now, end)

    def filled(self, now: float) -> None:
        """P is done: nothing is left to wait for, and its estimate is judged."""
        self._filled = True
        if self._site.perf is not None and self._fill is not None:
            self._site.perf.observe_fill(self._fill.estimate_s, now - self._fill.opened_at)

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
        site, ask = self._site, self._ask
        if site.perf is None or self._fill is None or transport is None:
            return 0.0
        demand = site.reservations.demand(self._waiter)
        if not demand.tight:
            return 0.0
        missing = blocks_for(ask.positions) - site.pool.match(ask.names)
        transfer = site.perf.transfer_seconds(missing * site.storage.layout.block_bytes, transport)
        now, error = site.clock.now(), site.perf.fill_error
        return may_wait_s(now, self._fill, error, transfer, demand, filled=self._filled)
