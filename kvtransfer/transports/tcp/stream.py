"""One socket of the tcp transport, plain or encrypted, as bytes on the running event loop."""

import asyncio
import socket
import ssl
from typing import Protocol

from pdserve.core.security.tls import WORKER_NAME

_RECORDS_BYTES = 256 * 1024
"""Read from the socket, or encrypted, at once: small enough not to hold the event loop for milliseconds."""


class Stream(Protocol):
    """Sends are serialised by their callers; one task reads. Errors are OSError, those of TLS too."""

    async def receive(self, view: memoryview) -> int:
        """Fill a part of `view`, which is not empty; returns how many bytes, 0 where the peer ended."""
        ...

    async def send(self, data: bytes | memoryview) -> None:
        """All of `data`. After an error or a cancellation the stream is of no more use."""
        ...

    def sever(self) -> None:
        """End both directions: whoever waits on it wakes with an error."""
        ...

    def close(self) -> None:
        """Give the descriptor back; nobody may wait on it any more."""
        ...


class PlainStream:
    """The socket itself."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    async def receive(self, view: memoryview) -> int:
        return await asyncio.get_running_loop().sock_recv_into(self._sock, view)

    async def send(self, data: bytes | memoryview) -> None:
        await asyncio.get_running_loop().sock_sendall(self._sock, data)

    def sever(self) -> None:
        try:
            self._sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            return  # never connected, or the peer was faster

    def close(self) -> None:
        self._sock.close()


class TlsStream:
    """TLS 1.3 over a socket. Bytes are decrypted into the caller's view, as the plain stream reads them.

    asyncio's own TLS would hold received data in buffers of its own, beyond the reach of back-pressure.
    """

    def __init__(self, sock: socket.socket, context: ssl.SSLContext, *, is_server: bool) -> None:
        self._plain = PlainStream(sock)
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        name = None if is_server else WORKER_NAME
        self._tls = context.wrap_bio(
            self._incoming, self._outgoing, server_side=is_server, server_hostname=name
        )
        self._encrypted = memoryview(bytearray(_RECORDS_BYTES))
        self._flushing = asyncio.Lock()

    async def handshake(self) -> None:
        """Raises ssl.SSLError where the peer shows no certificate of the cluster's CA; it is told why."""
        while True:
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                await self._flush()
                if not await self._feed():
                    raise ConnectionError("the peer closed the connection in the TLS handshake") from None
            except ssl.SSLError:
                await self._flush()
                raise
            else:
                await self._flush()
                return

    async def receive(self, view: memoryview) -> int:
        while True:
            try:
                received: object = self._tls.read(len(view), view)
                assert isinstance(received, int)  # bytes only where there is no buffer to read into
                return received
            except ssl.SSLWantReadError:
                if not await self._feed():
                    # A cut in the middle must not look like an end; callers treat both as a lost peer.
                    return 0
            except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
                return 0

    async def send(self, data: bytes | memoryview) -> None:
        view = memoryview(data).cast("B")
        for start in range(0, len(view), _RECORDS_BYTES):
            part = view[start : start + _RECORDS_BYTES]
            while part:
                part = part[self._tls.write(part) :]
            await self._flush()

    def sever(self) -> None:
        self._plain.sever()

    def close(self) -> None:
        self._plain.close()

    async def _feed(self) -> int:
        """What the socket has, to be decrypted; what TLS itself has to answer is sent."""
        received = await self._plain.receive(self._encrypted)
        self._incoming.write(self._encrypted[:received])
        return received

    async def _flush(self) -> None:
        """Records leave in the order in which they were made."""
        async with self._flushing:
            if self._outgoing.pending:
                await self._plain.send(self._outgoing.read())


async def accepted(sock: socket.socket, tls: ssl.SSLContext | None) -> Stream:
    """The server's stream of an accepted, non-blocking socket; the socket stays the caller's on errors."""
    return await _open(sock, tls, is_server=True)


async def connected(sock: socket.socket, tls: ssl.SSLContext | None) -> Stream:
    """The client's stream of a connected, non-blocking socket; the socket stays the caller's on errors."""
    return await _open(sock, tls, is_server=False)


async def _open(sock: socket.socket, context: ssl.SSLContext | None, *, is_server: bool) -> Stream:
    if context is None:
        return PlainStream(sock)
    stream = TlsStream(sock, context, is_server=is_server)
    await stream.handshake()
    return stream
