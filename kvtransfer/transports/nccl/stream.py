"""The pair's plain socket as bytes on the running event loop: small records that say what NCCL is to do."""

import asyncio
import contextlib
import socket


class ControlStream:
    """Sends are serialised by their callers; one task reads. Errors are OSError."""

    def __init__(self, sock: socket.socket) -> None:
        """`sock` belongs to the stream from here on."""
        sock.setblocking(False)
        self._sock = sock

    async def receive(self, view: memoryview) -> int:
        """Fill a part of `view`, which is not empty; returns how many bytes, 0 where the peer ended."""
        return await asyncio.get_running_loop().sock_recv_into(self._sock, view)

    async def receive_exactly(self, num_bytes: int) -> bytes:
        """A record; ConnectionError where the peer ends before that."""
        record = bytearray(num_bytes)
        left = memoryview(record)
        while left:
            received = await self.receive(left)
            if not received:
                raise ConnectionError("the peer closed the connection")
            left = left[received:]
        return bytes(record)

    async def send(self, data: bytes) -> None:
        """All of `data`. After an error or a cancellation the stream is of no more use."""
        await asyncio.get_running_loop().sock_sendall(self._sock, data)

    def sever(self) -> None:
        """End both directions: whoever waits on it wakes with an error."""
        with contextlib.suppress(OSError):  # never connected, or the peer was faster
            self._sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Give the descriptor back; nobody may wait on it any more."""
        self._sock.close()
