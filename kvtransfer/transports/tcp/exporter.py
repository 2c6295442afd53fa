"""P's half of the tcp transport: a listening socket, its readers, and the grants that are being served."""

import asyncio
import contextlib
import logging
import secrets
import socket
import ssl
from collections.abc import Coroutine
from typing import Any, NamedTuple

from pdserve.core.types import HandoffId
from pdserve.kvtransfer.pool.storage import KvStorage
from pdserve.kvtransfer.transports.base import Failed, Grant, Offer, SourceDone
from pdserve.kvtransfer.transports.copying import refusal
from pdserve.kvtransfer.transports.meetings import GIVEN_UP, Key, Meetings
from pdserve.kvtransfer.transports.tcp.reader import Reader
from pdserve.kvtransfer.transports.tcp.wire import TOKEN_BYTES, Claim, part_of, peer_of, tune

_log = logging.getLogger(__name__)

_ACCEPT_PAUSE_S = 0.1
"""Wait after a failed accept (out of descriptors, as a rule) before the next."""


class _Arrival(NamedTuple):
    """A claim, and whom to answer."""

    reader: Reader
    claim: Claim


class TcpExporter:
    """Sends blocks to readers that hold the offer's token and claim a grant that is being served."""

    transport = "tcp"

    def __init__(
        self,
        storage: KvStorage,
        host: str = "127.0.0.1",
        *,
        port: int = 0,
        advertise: str | None = None,
        timeout_s: float = 10.0,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        """`host`, `port` (0: any) to listen on; `advertise`, where that is no address for readers.

        With `tls`, readers must show a certificate that it accepts.

        `timeout_s` bounds each serve, each claim's wait for its grant and each handshake.
        """
        self._storage = storage
        self._address = (host, port)
        self._advertise = advertise or host
        self._timeout_s = timeout_s
        self._tls = tls
        self._token = secrets.token_bytes(TOKEN_BYTES)
        self._listener: socket.socket | None = None
        self._meetings: Meetings[_Arrival] = Meetings(
            timeout_s, lambda arrival, reason: self._spawn(self._refuse(arrival, reason))
        )
        self._readers: set[Reader] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False

    async def start(self) -> None:
        """Listen. Raises OSError where the address cannot be had."""
        host, port = self._address
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
        self._listener = socket.create_server(found[0][4][:2], family=found[0][0], backlog=128)
        self._listener.setblocking(False)
        self._spawn(self._accept(self._listener))

    def offer(self) -> Offer:
        """Only after `start`."""
        if self._listener is None:
            raise RuntimeError("a TcpExporter has an offer only between start and close")
        return Offer(
            self.transport,
            {
                "host": self._advertise,
                "port": str(self._listener.getsockname()[1]),
                "token": self._token.hex(),
                "num_blocks": str(self._storage.num_blocks),
                "layout": self._storage.layout.fingerprint().hex(),
            },
        )

    async def serve(self, grant: Grant) -> SourceDone | Failed:
        """Wait for the claim, then send; both within the timeout."""
        reason = refusal(
            grant,
            sources=self._storage.num_blocks,
            destinations=None,
            block_tokens=self._storage.layout.block_tokens,
        )
        if self._closed:
            reason = "the exporter is closed"
        if reason is None:
            try:
                async with asyncio.timeout(self._timeout_s):
                    reason = await self._serve_part(grant, 0)
            except TimeoutError:
                reason = f"not claimed by its reader, or not drained by it, within {self._timeout_s} s"
        report = (grant.handoff, grant.epoch, grant.seq)
        return SourceDone(*report) if reason is None else Failed(*report, reason)

    def forget(self, handoff: HandoffId) -> None:
        """Serves that wait report Failed, claims that wait are answered so."""
        self._meetings.call_off("the handoff has ended", handoff)

    async def close(self) -> None:
        """Idempotent. Readers lose their connections, waiting serves report Failed."""
        if self._closed:
            return
        self._closed = True
        self._meetings.call_off("the exporter is closed")
        for reader in self._readers:
            reader.sever()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._listener is not None:
            self._listener.close()
            self._listener = None

    async def _serve_part(self, grant: Grant, part: int) -> str | None:
        """Send a part to its reader, and with the first all others; why they must not be used, if so."""
        met = await self._meetings.serve(Key(grant.handoff, grant.epoch, grant.seq, part))
        if isinstance(met, str):
            return met
        # The first claim says into how many parts the reader has cut the grant.
        others = range(1, met.claim.parts) if part == 0 else ()
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(self._serve_part(grant, other)) for other in others]
            reasons = [await self._answer(met, grant)]
        reasons += [task.result() for task in tasks]
        return next((reason for reason in reasons if reason is not None), None)

    async def _answer(self, arrival: _Arrival, grant: Grant) -> str | None:
        claim = arrival.claim
        try:
            return await arrival.reader.answer(claim, part_of(grant.segments, claim.part, claim.parts))
        except OSError as error:
            return f"the reader was lost: {error}"
        except asyncio.CancelledError:
            # Before its turn, that is, on a connection that lives on: the reader would wait for it.
            self._spawn(self._refuse(arrival, GIVEN_UP))
            raise

    async def _refuse(self, arrival: _Arrival, reason: str) -> None:
        with contextlib.suppress(OSError):
            async with asyncio.timeout(self._timeout_s):
                await arrival.reader.refuse(arrival.claim, reason)

    # Connections

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                sock, _ = await loop.sock_accept(listener)
            except OSError as error:
                _log.warning("kv transfer: cannot accept a reader: %s", error)
                await asyncio.sleep(_ACCEPT_PAUSE_S)
                continue
            self._spawn(self._attend(sock))

    async def _attend(self, sock: socket.socket) -> None:
        """One reader, from its hello to its end."""
        try:
            tune(sock, self._timeout_s)
        except OSError as error:
            _log.warning("kv transfer: a reader is gone already: %s", error)
            sock.close()
            return
        reader = Reader(sock, self._tls, self._storage)
        self._readers.add(reader)
        try:
            await self._greet(reader, peer_of(sock))
            await reader.listen(lambda claim: self._claimed(_Arrival(reader, claim)))
        except OSError as error:
            _log.info("kv transfer: a reader is gone: %s", error)
        finally:
            self._readers.discard(reader)
            await reader.close()

    def _claimed(self, arrival: _Arrival) -> None:
        claim = arrival.claim
        self._meetings.claimed(Key(claim.handoff, claim.epoch, claim.seq, claim.part), arrival)

    async def _greet(self, reader: Reader, peer: str) -> None:
        try:
            async with asyncio.timeout(self._timeout_s):
                await reader.greet(self._token)
        except OSError as error:
            _log.warning("kv transfer: a reader at %s is refused: %s", peer, error)
            raise
