"""One connection of D to a P: claims go out from the event loop, a thread takes in what comes back."""

import asyncio
import contextlib
import itertools
import socket
import ssl
import struct
import threading
from collections.abc import Callable

from pdserve.kvtransfer.pool.storage import KvStorage
from pdserve.kvtransfer.transports.base import Grant
from pdserve.kvtransfer.transports.tcp.incoming import Incoming
from pdserve.kvtransfer.transports.tcp.stream import client_stream, receive_exactly
from pdserve.kvtransfer.transports.tcp.wire import (
    FRAME_BYTES,
    VERDICT_BYTES,
    WELCOME_BYTES,
    Claim,
    FrameHeader,
    Hello,
    Welcome,
    WireError,
    part_of,
    reason_bytes,
)

_MIN_RTT = struct.Struct("=148xI")
"""struct tcp_info of linux/tcp.h up to tcpi_min_rtt, in µs."""


class Connection:
    """Owns its socket and its thread, from the handshake on; both end with `close`."""

    def __init__(
        self, sock: socket.socket, tls: ssl.SSLContext | None, hello: Hello, storage: KvStorage
    ) -> None:
        """`sock` is connected. Where an event loop runs; whoever makes a connection closes it."""
        self._loop = asyncio.get_running_loop()
        self._sock = sock
        self._stream = client_stream(sock, tls)
        self._hello = hello
        self._storage = storage
        self._tags = itertools.count(1)
        self._claimed: dict[int, tuple[Claim, Incoming]] = {}
        self._welcomed: asyncio.Future[None] = self._loop.create_future()
        self._over: asyncio.Future[None] = self._loop.create_future()
        self.lost: str | None = None
        self._thread = threading.Thread(target=self._run, name="kv-tcp-in", daemon=True)
        self._thread.start()

    async def welcomed(self) -> None:
        """Wait for the end of the handshake. Raises OSError where the exporter refuses this reader."""
        await asyncio.wait({self._welcomed, self._over}, return_when=asyncio.FIRST_COMPLETED)
        if self.lost is not None:
            raise ConnectionError(self.lost)

    def round_trip_s(self) -> float:
        """The shortest that the kernel saw; 0 where it does not say."""
        info = self._sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _MIN_RTT.size)
        return float(_MIN_RTT.unpack(info)[0]) / 1e6 if len(info) == _MIN_RTT.size else 0.0

    def claim(self, grant: Grant, part: int, parts: int, ended: Callable[[str | None], None]) -> Incoming:
        """Ask for a part of a grant's bytes. The caller waits until it has `ended`, or abandons it.

        ConnectionError where the connection is lost.
        """
        if self.lost is not None:
            raise ConnectionError(self.lost)
        claim = Claim(next(self._tags), grant.handoff, grant.epoch, grant.seq, part, parts)
        record = claim.pack()
        segments = part_of(grant.segments, part, parts)
        incoming = Incoming(self._storage, segments, ended, digest=grant.digest)
        self._claimed[claim.tag] = claim, incoming
        try:
            self._stream.send_now(record)
        except OSError as error:
            # Half a claim may be out: nothing sensible can follow it on this socket.
            incoming.abandon()
            self.sever(f"a claim could not be sent: {error}")
            raise
        return incoming

    def sever(self, reason: str) -> None:
        """End the connection; its thread notices."""
        self.lost = self.lost or reason
        self._stream.sever()

    async def close(self, reason: str) -> None:
        """Outstanding claims fail with `reason`; returns when the thread has ended."""
        self.sever(reason)
        await asyncio.wait({self._over})
        self._thread.join()

    # In the thread

    def _run(self) -> None:
        reason = "the thread that receives failed"
        try:
            self._stream.handshake()
            self._stream.send([memoryview(self._hello.pack())])
            if not Welcome.unpack(receive_exactly(self._stream, WELCOME_BYTES)).accepted:
                raise ConnectionError("the source refused this reader's token")
            self._post(lambda: self._welcomed.set_result(None))
            while True:
                self._take_frame()
        except OSError as error:
            reason = f"the connection was lost: {error}"
        finally:
            self._post(lambda: self._end(reason))

    def _take_frame(self) -> None:
        header = FrameHeader.unpack(receive_exactly(self._stream, FRAME_BYTES))
        claim, incoming = self._claimed.get(header.tag, (None, None))
        if claim is None or incoming is None or (claim.epoch, claim.seq) != (header.epoch, header.seq):
            raise WireError(f"a frame answers no claim of this reader: {header}")
        if header.num_bytes not in (0, incoming.num_bytes):
            raise WireError(f"a frame has {header.num_bytes} bytes, the claim is for {incoming.num_bytes}")
        damage = incoming.receive(self._stream) if header.num_bytes else None
        size = reason_bytes(receive_exactly(self._stream, VERDICT_BYTES))
        reason = receive_exactly(self._stream, size).decode(errors="replace") if size else damage
        if reason is None and header.num_bytes < incoming.num_bytes:
            raise WireError("a frame without a payload is said to be what was granted")
        del self._claimed[header.tag]  # here, so that a frame that follows at once cannot be a second answer
        self._post(lambda: incoming.ended(reason))

    def _post(self, work: Callable[[], None]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop was closed and took everything with it
            self._loop.call_soon_threadsafe(work)

    # In the event loop again

    def _end(self, reason: str) -> None:
        """After the thread's last look at the stream."""
        self.lost = self.lost or reason
        for _, incoming in self._claimed.values():
            incoming.ended(self.lost)
        self._claimed.clear()
        self._stream.close()
        self._over.set_result(None)
