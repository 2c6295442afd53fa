"""One connected reader, at P: claims come in on the event loop, a thread sends what they ask for."""

import asyncio
import contextlib
import hmac
import socket
import ssl
from collections.abc import Callable, Sequence

from pdserve.kvtransfer.pool.storage import KvStorage
from pdserve.kvtransfer.transports.base import Segment
from pdserve.kvtransfer.transports.copying import CopyThread, settle
from pdserve.kvtransfer.transports.tcp.outgoing import Outgoing
from pdserve.kvtransfer.transports.tcp.stream import RECORDS_BYTES, receive_exactly, server_stream
from pdserve.kvtransfer.transports.tcp.wire import (
    HELLO_BYTES,
    Claim,
    FrameHeader,
    Hello,
    Welcome,
    pack_verdict,
)

_STAGED_BYTES = 4 << 20
"""Of a device's blocks, copied to the host at once."""


class Reader:
    """Owns its socket and its thread; both end with `close`.

    A reader that does not drain what it asked for keeps its own thread waiting, and nobody else.
    """

    def __init__(self, sock: socket.socket, tls: ssl.SSLContext | None, storage: KvStorage) -> None:
        self._sock = sock
        self._stream = server_stream(sock, tls)
        self._storage = storage
        self._thread = CopyThread("kv-tcp-out")
        self._sending = asyncio.Lock()
        self._buffer = memoryview(bytearray(RECORDS_BYTES))
        self._received = bytearray()
        self._lost = False

    async def greet(self, token: bytes) -> None:
        """The handshake. Raises OSError for a reader without the token."""
        await self._run(lambda: self._greet(token))

    async def listen(self, claimed: Callable[[Claim], None]) -> None:
        """Pass on claims until the reader is gone; then raises OSError, which says why."""
        loop = asyncio.get_running_loop()
        gone: asyncio.Future[None] = loop.create_future()

        def on_readable() -> None:
            try:
                self._take_claims(claimed)
            except OSError as error:
                loop.remove_reader(self._sock)
                if not gone.done():  # cancelled in this very turn of the loop
                    gone.set_exception(error)

        loop.add_reader(self._sock, on_readable)
        try:
            await gone
        finally:
            loop.remove_reader(self._sock)

    async def answer(self, claim: Claim, segments: Sequence[Segment]) -> str | None:
        """Send the claimed blocks; why they must not be used, None if they are what was granted.

        Raises OSError where the reader is lost. After a cancellation it is, too: half a frame may be out. In
        any case the pool is not read any more.
        """
        outgoing = Outgoing(self._storage, claim, segments)
        async with self._sending:
            if not self._push(outgoing):
                await self._run(lambda: outgoing.finish(self._stream))
        return outgoing.reason

    async def refuse(self, claim: Claim, reason: str) -> None:
        """Tell the reader that it gets nothing. Raises OSError as `answer` does."""
        record = FrameHeader(claim.tag, claim.epoch, claim.seq, 0).pack() + pack_verdict(reason)
        async with self._sending:
            await self._run(lambda: self._stream.send([memoryview(record)]))

    def sever(self) -> None:
        self._lost = True
        self._stream.sever()

    async def close(self) -> None:
        """Idempotent. Returns when nothing is sent any more, also when cancelled."""
        self.sever()
        try:
            await settle(asyncio.ensure_future(self._idle()))
        finally:
            self._thread.close()
            self._stream.close()

    async def _idle(self) -> None:
        async with self._sending:
            pass  # once severed, the sender notices by its error, and lets go

    def _push(self, outgoing: Outgoing) -> bool:
        if self._lost:
            raise ConnectionError("the reader left")
        try:
            return outgoing.push(self._stream)
        except OSError:
            self.sever()
            raise

    async def _run(self, work: Callable[[], None]) -> None:
        """In the thread, to its end."""
        if self._lost:
            raise ConnectionError("the reader left")
        running = self._thread.submit(work)
        try:
            await asyncio.shield(running)
        except BaseException:
            self.sever()
            await settle(running)
            raise

    def _take_claims(self, claimed: Callable[[Claim], None]) -> None:
        """Once the socket is readable."""
        with contextlib.suppress(BlockingIOError):
            self._stream.wait(1)  # nothing to wait for, but encrypted bytes are taken in by that
            received = self._stream.receive([self._buffer])
            if not received:
                raise ConnectionError("the reader closed the connection")
            self._received += self._buffer[:received]
            while (claim := Claim.take(self._received)) is not None:
                claimed(claim)

    # In the thread

    def _greet(self, token: bytes) -> None:
        self._stream.handshake()
        known = hmac.compare_digest(Hello.unpack(receive_exactly(self._stream, HELLO_BYTES)).token, token)
        self._stream.send([memoryview(Welcome(known).pack())])
        if not known:
            raise ConnectionError("its token is not this exporter's")
