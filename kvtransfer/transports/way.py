"""One pair's importer on trial: the first real transfers are the self-test of its rung.

A test transfer of its own would need blocks that belong to nobody on both sides, and would compete with the
first request. So the first chunks are the test. D loses nothing by it: a handoff that fails goes to the next
candidate, and the next one over this pair takes a lower rung.
"""

import logging
import math
from collections.abc import Callable

from pdserve.core.clock import Clock
from pdserve.core.types import HandoffId
from pdserve.kvtransfer.transports.base import Failed, Grant, Importer, Landed, Warmable
from pdserve.kvtransfer.transports.rung_health import UNKNOWN, Meter, Pace

_log = logging.getLogger(__name__)

TRIAL_FAILURES = 2
"""Handoffs that fail here, with nothing landed ever, and condemn the rung; one may be the handoff's fault."""


class Way:
    """An importer that knows whether its rung works for this pair, and how fast. Owns the importer."""

    def __init__(
        self, inner: Importer, peer: str, clock: Clock, measured: Callable[["Way", int, float], object]
    ) -> None:
        """`peer` is for the log. `measured(way, bytes, seconds)` is told of transfers of real size."""
        self.transport = inner.transport
        self._inner = inner
        self._peer = peer
        self._clock = clock
        self._measured = measured
        self._meter = Meter()
        self._proven = False
        self._failed: set[HandoffId] = set()
        self._closed = False
        self.condemned: str | None = None
        """Why this rung must not be used for the pair; None while nothing speaks against it."""
        self.slow_until: float | None = None
        """Condemned for being slow only, until this reading of the clock."""
        self.spared_until = -math.inf
        self.times_slow = 0
        self.pace: Pace = UNKNOWN

    async def warm_up(self) -> None:
        """Connect, or start threads, before a first grant waits for it. Raises OSError or Unavailable."""
        if isinstance(self._inner, Warmable):
            await self._inner.warm_up()

    async def fetch(self, grant: Grant) -> Landed | Failed:
        self._meter = self._meter.began(self._clock.now())
        num_bytes = 0
        try:
            report = await self._inner.fetch(grant)
            num_bytes = report.num_bytes if isinstance(report, Landed) else 0
        finally:
            self._meter, sample = self._meter.ended(self._clock.now(), num_bytes)
        if sample is not None:
            self.pace = self.pace.plus(*sample)
            self._measured(self, *sample)
        if not self._proven and grant.segments:
            self._judge(grant.handoff, report)
        return report

    def leave(self, reason: str, until: float) -> None:
        """It is slow: use it no more until then."""
        self.condemned, self.slow_until = reason, until
        self.times_slow += 1

    def reinstate(self, spared_until: float) -> None:
        """Use it again, and judge its pace anew, from then on."""
        self.condemned = self.slow_until = None
        self.spared_until = spared_until
        self.pace = UNKNOWN

    async def close(self) -> None:
        self._closed = True
        await self._inner.close()

    def _judge(self, handoff: HandoffId, report: Landed | Failed) -> None:
        if isinstance(report, Landed):
            self._proven = True
            rate = report.num_bytes / report.seconds / 1e9 if report.seconds > 0 else 0.0
            _log.info(
                "kv transfer from %s over %s: the first %d bytes came at %.2f GB/s",
                self._peer,
                self.transport,
                report.num_bytes,
                rate,
            )
        elif not self._closed:
            self._failed.add(handoff)
            if len(self._failed) >= TRIAL_FAILURES:
                self.condemned = f"its first {len(self._failed)} handoffs failed: {report.reason}"
