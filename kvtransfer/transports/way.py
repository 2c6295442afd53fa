"""One pair's importer on trial: the first real transfers are the self-test of its rung.

A test transfer of its own would need blocks that belong to nobody on both sides, and would compete with the
first request. So the first chunks are the test. D loses nothing by it: a handoff that fails goes to the next
candidate, and the next one over this pair takes a lower rung.
"""

import logging

from pdserve.kvtransfer.transports.base import Failed, Grant, Importer, Landed, Warmable

_log = logging.getLogger(__name__)

TRIAL_FAILURES = 2
"""Failed fetches in a row, with nothing landed ever, that condemn a rung; one may be the grant's fault."""


class Way:
    """An importer that knows whether its rung works for this pair. Owns the importer."""

    def __init__(self, inner: Importer, peer: str) -> None:
        """`peer` is for the log."""
        self.transport = inner.transport
        self._inner = inner
        self._peer = peer
        self._proven = False
        self._failures = 0
        self._closed = False
        self.condemned: str | None = None
        """Why this rung must not be used for the pair any more; None while nothing speaks against it."""

    async def warm_up(self) -> None:
        """Connect, or start threads, before a first grant waits for it. Raises OSError or Unavailable."""
        if isinstance(self._inner, Warmable):
            await self._inner.warm_up()

    async def fetch(self, grant: Grant) -> Landed | Failed:
        report = await self._inner.fetch(grant)
        if not self._proven and grant.segments:
            self._judge(report)
        return report

    async def close(self) -> None:
        self._closed = True
        await self._inner.close()

    def _judge(self, report: Landed | Failed) -> None:
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
            self._failures += 1
            if self._failures >= TRIAL_FAILURES:
                self.condemned = f"its first {self._failures} transfers failed: {report.reason}"
