"""D's half of the tcp transport: claims of granted blocks, on one connection or, over long ways, several."""

import asyncio
import secrets
import ssl
from collections.abc import Callable

from pdserve.core.clock import Clock, MonotonicClock
from pdserve.core.errors import Unavailable
from pdserve.kvtransfer.pool.storage import KvStorage
from pdserve.kvtransfer.transports.base import Failed, Grant, Landed, Offer
from pdserve.kvtransfer.transports.copying import refusal
from pdserve.kvtransfer.transports.tcp.incoming import Incoming
from pdserve.kvtransfer.transports.tcp.lane import Lane
from pdserve.kvtransfer.transports.tcp.wire import MAX_PARTS, TOKEN_BYTES, Hello

_LONG_ROUND_TRIP_S = 1e-3
"""From here on a connection waits for its window, a few megabytes by default, more than for its copies."""
_PART_BYTES = 2 << 20
"""A connection of its own is worth it for this much."""


def parts_for(num_bytes: int, round_trip_s: Callable[[], float]) -> int:
    """Into how many parts a transfer is cut, each to travel on a connection of its own."""
    parts = min(MAX_PARTS, num_bytes // _PART_BYTES)
    return parts if parts > 1 and round_trip_s() >= _LONG_ROUND_TRIP_S else 1


class TcpImporter:
    """Fetches from one exporter. Connects to warm up or to fetch, and again after a connection was lost."""

    transport = "tcp"

    def __init__(
        self,
        storage: KvStorage,
        offer: Offer,
        *,
        timeout_s: float = 10.0,
        clock: Clock | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        """`timeout_s` bounds a whole fetch. With `tls`, the exporter must show a certificate that it accepts.

        Raises Unavailable for an offer that cannot be understood.
        """
        parameters = offer.parameters
        try:
            address = (parameters["host"], int(parameters["port"]))
            token = bytes.fromhex(parameters["token"])
            layout = bytes.fromhex(parameters["layout"])
        except (KeyError, ValueError) as error:
            raise Unavailable(f"a tcp offer is not understood: {type(error).__name__}: {error}") from error
        if len(token) != TOKEN_BYTES or layout != storage.layout.fingerprint():
            raise Unavailable("the offered pool has another block layout; use a transport that converts")
        self._storage = storage
        self._timeout_s = timeout_s
        self._clock = clock or MonotonicClock()
        hello = Hello(token, secrets.token_bytes(TOKEN_BYTES))
        self._lanes = tuple(Lane(address, hello, storage, timeout_s, tls) for _ in range(MAX_PARTS))

    async def warm_up(self) -> None:
        """Connect. Raises OSError (a timeout is one) where that fails."""
        await self._lanes[0].connection()

    async def fetch(self, grant: Grant) -> Landed | Failed:
        started = self._clock.now()
        digests: bytes | None = None
        reason = refusal(
            grant,
            sources=None,
            destinations=self._storage.num_blocks,
            block_tokens=self._storage.layout.block_tokens,
        )
        if reason is None:
            try:
                async with asyncio.timeout(self._timeout_s):
                    reason, digests = await self._fetch(grant)
            except TimeoutError:
                reason = f"nothing complete arrived within {self._timeout_s} s"
            except OSError as error:
                reason = f"the source was lost: {error}"
        if reason is not None:
            return Failed(grant.handoff, grant.epoch, grant.seq, reason)
        num_bytes = len(grant.segments) * self._storage.layout.block_bytes
        seconds = self._clock.now() - started
        return Landed(grant.handoff, grant.epoch, grant.seq, num_bytes, seconds, digests)

    async def close(self) -> None:
        """Idempotent. Outstanding fetches report Failed."""
        await asyncio.gather(*(lane.close() for lane in self._lanes))

    async def _fetch(self, grant: Grant) -> tuple[str | None, bytes | None]:
        """Why the bytes must not be used, None if they landed; and their digests."""
        first = await self._lanes[0].connection()
        num_bytes = len(grant.segments) * self._storage.layout.block_bytes
        parts = parts_for(num_bytes, first.round_trip_s)
        others = [await lane.connection() for lane in self._lanes[1:parts]]
        landing = _Landing(parts)
        incoming: list[Incoming] = []
        try:
            for part, connection in enumerate((first, *others)):
                incoming.append(connection.claim(grant, part, parts, landing.part_ended))
            reason = await landing.outcome
        finally:
            for each in incoming:
                each.abandon()
        return reason, b"".join(each.digests or b"" for each in incoming) or None


class _Landing:
    """What has become of a fetch. The first part that fails decides, else the last that lands."""

    def __init__(self, parts: int) -> None:
        self._missing = parts
        self.outcome: asyncio.Future[str | None] = asyncio.get_running_loop().create_future()

    def part_ended(self, reason: str | None) -> None:
        self._missing -= 1
        if not self.outcome.done() and (reason is not None or not self._missing):
            self.outcome.set_result(reason)
