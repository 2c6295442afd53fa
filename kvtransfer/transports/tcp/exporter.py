"""P's half of the tcp transport: a listening socket, and the meeting of grants with claims."""

import asyncio
import contextlib
import hmac
import logging
import secrets
import socket
import ssl
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from pdserve.core.errors import PdserveError
from pdserve.core.types import HandoffId
from pdserve.kvtransfer.pool.storage import KvStorage
from pdserve.kvtransfer.transports.base import Failed, Grant, Offer, SourceDone
from pdserve.kvtransfer.transports.copying import CopyThread, refusal, stale
from pdserve.kvtransfer.transports.tcp.stream import Stream, accepted
from pdserve.kvtransfer.transports.tcp.wire import (
    FRAME_BYTES,
    HELLO_BYTES,
    MAX_REASON_BYTES,
    TOKEN_BYTES,
    Claim,
    FrameHeader,
    Hello,
    Welcome,
    peer_of,
    receive_claim,
    receive_exactly,
    tune,
)

_log = logging.getLogger(__name__)

_ACCEPT_PAUSE_S = 0.1
"""Wait after a failed accept (out of descriptors, as a rule) before the next."""


class _Key(NamedTuple):
    handoff: HandoffId
    epoch: int
    seq: int


class _Reader:
    """One connected importer. Its staging memory and its sending side belong to who holds `lock`."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self.lock = asyncio.Lock()
        self.lost = False
        self._staging = np.empty(0, np.uint8)

    def staging(self, num_bytes: int) -> "np.ndarray[Any, np.dtype[np.uint8]]":
        """At least this many bytes behind room for a frame header; reused, as large as the largest chunk."""
        size = FRAME_BYTES + num_bytes
        if self._staging.size < size:
            self._staging = np.empty(size, np.uint8)
        return self._staging[FRAME_BYTES:size]

    async def send(self, header: FrameHeader) -> None:
        """Send the staged bytes behind `header`. After an error or a cancellation the connection is gone."""
        size = FRAME_BYTES + header.num_bytes
        self._staging[:FRAME_BYTES] = np.frombuffer(header.pack(), np.uint8)
        try:
            if self.lost:
                raise ConnectionError("the reader left")
            await self._stream.send(self._staging[:size].data)
        except BaseException:
            self.sever()
            raise

    async def receive(self) -> Claim:
        return await receive_claim(self._stream)

    def sever(self) -> None:
        self.lost = True
        self._stream.sever()

    async def close(self) -> None:
        self.sever()
        try:
            async with self.lock:
                pass  # a sender notices by its error that the connection is gone, and lets go
        finally:
            self._stream.close()


@dataclass(slots=True)
class _Arrival:
    """A claim, and the connection to answer on."""

    reader: _Reader
    claim: Claim


@dataclass(slots=True)
class _Meeting:
    """Where a served grant and the claim for it wait for each other. A None arrival: it was called off."""

    arrival: "asyncio.Future[_Arrival | None]" = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )
    served: bool = False


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
        self._copier = CopyThread("kv-tcp-out")
        self._meetings: dict[_Key, _Meeting] = {}
        self._readers: set[_Reader] = set()
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
        key = _Key(grant.handoff, grant.epoch, grant.seq)
        reason = refusal(
            grant,
            sources=self._storage.num_blocks,
            destinations=None,
            block_tokens=self._storage.layout.block_tokens,
        )
        if self._closed or reason is not None:
            return Failed(*key, reason or "the exporter is closed")
        meeting = self._meetings.setdefault(key, _Meeting())
        if meeting.served:
            return Failed(*key, "this grant is being served already")
        meeting.served = True
        try:
            async with asyncio.timeout(self._timeout_s):
                arrival = await meeting.arrival
                reason = "the handoff was called off" if arrival is None else await self._send(arrival, grant)
        except TimeoutError:
            claimed = "claimed, but not sent" if meeting.arrival.done() else "not claimed by its reader"
            reason = f"{claimed} within {self._timeout_s} s"
        except OSError as error:
            reason = f"the reader was lost: {error}"
        finally:
            if self._meetings.get(key) is meeting:
                del self._meetings[key]
        return SourceDone(*key) if reason is None else Failed(*key, reason)

    def forget(self, handoff: HandoffId) -> None:
        """Serves that wait report Failed, claims that wait are answered so."""
        for key in [key for key in self._meetings if key.handoff == handoff]:
            self._call_off(key, "the handoff has ended")

    async def close(self) -> None:
        """Idempotent. Readers lose their connections, waiting serves report Failed."""
        if self._closed:
            return
        self._closed = True
        for key in list(self._meetings):
            self._call_off(key, "the exporter is closed")
        for reader in self._readers:
            reader.sever()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._listener is not None:
            self._listener.close()
            self._listener = None
        self._copier.close()

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
            async with asyncio.timeout(self._timeout_s):
                stream = await accepted(sock, self._tls)
                await self._greet(stream)
        except OSError as error:
            _log.warning("kv transfer: a reader at %s is refused: %s", peer_of(sock), error)
            sock.close()
            return
        except BaseException:
            sock.close()
            raise
        reader = _Reader(stream)
        self._readers.add(reader)
        try:
            while True:
                self._claimed(_Arrival(reader, await reader.receive()))
        except OSError as error:
            _log.info("kv transfer: a reader is gone: %s", error)
        finally:
            self._readers.discard(reader)
            await reader.close()

    async def _greet(self, stream: Stream) -> None:
        data = bytearray(HELLO_BYTES)
        await receive_exactly(stream, memoryview(data))
        known = hmac.compare_digest(Hello.unpack(data).token, self._token)
        await stream.send(Welcome(known).pack())
        if not known:
            raise ConnectionError("its token is not this exporter's")

    # Grants and claims

    def _claimed(self, arrival: _Arrival) -> None:
        claim = arrival.claim
        key = _Key(claim.handoff, claim.epoch, claim.seq)
        meeting = self._meetings.setdefault(key, _Meeting())
        if meeting.arrival.done():
            self._spawn(self._refuse(arrival, "this grant has been claimed already"))
            return
        meeting.arrival.set_result(arrival)
        asyncio.get_running_loop().call_later(self._timeout_s, self._expire, key, meeting)

    def _expire(self, key: _Key, meeting: _Meeting) -> None:
        if not meeting.served and self._meetings.get(key) is meeting:
            self._call_off(key, f"no such grant was served within {self._timeout_s} s")

    def _call_off(self, key: _Key, reason: str) -> None:
        meeting = self._meetings.pop(key)
        if not meeting.arrival.done():
            meeting.arrival.set_result(None)
        elif not meeting.served and (arrival := meeting.arrival.result()) is not None:
            self._spawn(self._refuse(arrival, reason))

    async def _refuse(self, arrival: _Arrival, reason: str) -> None:
        with contextlib.suppress(OSError):
            async with asyncio.timeout(self._timeout_s), arrival.reader.lock:
                await self._send_failure(arrival, reason)

    async def _send_failure(self, arrival: _Arrival, reason: str) -> None:
        """With the reader's lock held."""
        text = reason.encode()[:MAX_REASON_BYTES]
        arrival.reader.staging(len(text))[:] = np.frombuffer(text, np.uint8)
        claim = arrival.claim
        await arrival.reader.send(FrameHeader(claim.tag, claim.epoch, claim.seq, True, len(text)))

    async def _send(self, arrival: _Arrival, grant: Grant) -> str | None:
        """Stage and send the granted blocks; why they were refused, None if they were sent."""
        reader, claim = arrival.reader, arrival.claim
        num_bytes = len(grant.segments) * self._storage.layout.block_bytes
        async with reader.lock:
            if self._closed:
                return "the exporter is closed"
            staged = reader.staging(num_bytes).reshape(len(grant.segments), -1) if num_bytes else None
            if staged is None:
                reader.staging(0)
            else:
                reason = await self._copier.run(lambda: self._gather(grant, staged))
                if reason is not None:
                    await self._send_failure(arrival, reason)
                    return reason
            await reader.send(FrameHeader(claim.tag, claim.epoch, claim.seq, False, num_bytes))
        return None

    def _gather(self, grant: Grant, staged: "np.ndarray[Any, np.dtype[np.uint8]]") -> str | None:
        """In the copy thread: the granted bytes, checked before and after, to staging memory."""
        generations = self._storage.generations
        reason = stale(grant.segments, generations)
        if reason is not None:
            return reason
        try:
            self._storage.read_blocks_into([segment.source for segment in grant.segments], staged)
        except (PdserveError, RuntimeError) as error:
            return f"the blocks could not be read: {error}"
        return stale(grant.segments, generations)
