"""One socket of the tcp transport, plain or encrypted: large transfers block a thread, never the event loop.

The descriptor is non-blocking, as event loops want it; who blocks, polls. One call takes megabytes out of, or
into, scattered blocks, and one wait outlasts many packets. `sever`, from any thread, wakes whoever waits.
"""

import contextlib
import os
import select
import socket
import ssl
import threading
from collections.abc import Sequence
from typing import Protocol

from pdserve.core.security.tls import WORKER_NAME

VIEWS_AT_ONCE = os.sysconf("SC_IOV_MAX")
"""Pieces of memory that one call may name; 1,024 on Linux."""

_RECORD_BYTES = 64 << 10
"""A wait for less ends with the first byte."""
_LOW_WATER_BYTES = 2 << 20
"""A wait for this much or more ends when this much has come: fewer wake-ups, and a sender that runs on."""
RECORDS_BYTES = 256 * 1024
"""Encrypted bytes taken from, or given to, the socket at once."""


class Stream(Protocol):
    """One thread receives; sends are serialised by their callers. Errors are OSError, those of TLS too."""

    def handshake(self) -> None:
        """Before anything else; blocks."""
        ...

    def wait(self, num_bytes: int) -> None:
        """Block until `receive` has something, a good part of `num_bytes` where that helps, or the end."""
        ...

    def receive(self, views: Sequence[memoryview]) -> int:
        """Fill `views`, which are not empty, with what is there; how many bytes, 0 where the peer ended.

        Never blocks: raises BlockingIOError where nothing is there.
        """
        ...

    def send(self, views: Sequence[memoryview]) -> None:
        """All of them; blocks. After an error the stream is of no more use."""
        ...

    def send_at_once(self, views: Sequence[memoryview]) -> int:
        """What can be sent of them without blocking; how many bytes. 0 where a stream cannot do that."""
        ...

    def send_now(self, record: bytes) -> None:
        """A small record, without blocking. After an error the stream is of no more use."""
        ...

    def sever(self) -> None:
        """End both directions: whoever waits on it wakes with an error."""
        ...

    def close(self) -> None:
        """Give the descriptor back; nobody may use it any more."""
        ...


class PlainStream:
    """The socket itself, non-blocking."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._readable, self._writable = select.poll(), select.poll()
        self._readable.register(sock, select.POLLIN)
        self._writable.register(sock, select.POLLOUT)
        self._low_water = 1

    def handshake(self) -> None:
        """There is none."""

    def wait(self, num_bytes: int) -> None:
        low_water = (
            1 if num_bytes < _RECORD_BYTES else max(_RECORD_BYTES, min(num_bytes // 4, _LOW_WATER_BYTES))
        )
        if low_water != self._low_water:
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, low_water)
            self._low_water = low_water
        self._readable.poll()

    def receive(self, views: Sequence[memoryview]) -> int:
        return self._sock.recvmsg_into(views)[0]

    def send(self, views: Sequence[memoryview]) -> None:
        left = views
        while left := after(left, self.send_at_once(left)):
            self._writable.poll()

    def send_at_once(self, views: Sequence[memoryview]) -> int:
        try:
            return self._sock.sendmsg(views[:VIEWS_AT_ONCE])
        except BlockingIOError:
            return 0

    def send_now(self, record: bytes) -> None:
        if self.send_at_once([memoryview(record)]) < len(record):
            raise ConnectionError("the peer does not read what is sent to it")

    def sever(self) -> None:
        with contextlib.suppress(OSError):  # never connected, or the peer was faster
            self._sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._sock.close()


class TlsStream:
    """TLS 1.3 over a socket. Bytes are decrypted into the caller's views.

    OpenSSL's state is not for two threads at once, so a lock guards it, and only it: nobody waits for the
    network with the lock held, and a receiver never waits for a sender whose peer does not read.
    """

    def __init__(self, sock: socket.socket, context: ssl.SSLContext, *, is_server: bool) -> None:
        self._plain = PlainStream(sock)
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        name = None if is_server else WORKER_NAME
        self._tls = context.wrap_bio(
            self._incoming, self._outgoing, server_side=is_server, server_hostname=name
        )
        self._lock = threading.Lock()
        self._encrypted = memoryview(bytearray(RECORDS_BYTES))
        self._starved = True

    def handshake(self) -> None:
        """Raises ssl.SSLError where the peer shows no certificate of the cluster's CA; it is told why."""
        while True:
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                self._flush()
                self._feed()
            except ssl.SSLError:
                with contextlib.suppress(OSError):
                    self._flush()
                raise
            else:
                self._flush()
                return

    def wait(self, num_bytes: int) -> None:
        if self._starved:
            self._feed()

    def receive(self, views: Sequence[memoryview]) -> int:
        received = 0
        with self._lock:
            try:
                for view in views:
                    left = view
                    while left:
                        decrypted = self._decrypt(left)
                        if not decrypted:
                            return received
                        received += decrypted
                        left = left[decrypted:]
            except ssl.SSLWantReadError:
                self._starved = True
                if not received:
                    raise BlockingIOError("nothing has arrived") from None
        return received

    def send(self, views: Sequence[memoryview]) -> None:
        for view in views:
            for start in range(0, len(view), RECORDS_BYTES):
                self._encrypt(view[start : start + RECORDS_BYTES])
                if self._outgoing.pending >= RECORDS_BYTES:
                    self._flush()
        self._flush()

    def send_at_once(self, views: Sequence[memoryview]) -> int:
        return 0  # what is encrypted has to be sent whole, so this would block

    def send_now(self, record: bytes) -> None:
        self._encrypt(memoryview(record))
        self._plain.send_now(self._take_encrypted())

    def sever(self) -> None:
        self._plain.sever()

    def close(self) -> None:
        self._plain.close()

    def _feed(self) -> None:
        """Take what the socket has, to be decrypted, once there is something."""
        self._plain.wait(1)
        received = self._plain.receive([self._encrypted])
        with self._lock:
            if received:
                self._incoming.write(self._encrypted[:received])
            else:
                self._incoming.write_eof()
        self._starved = False

    def _flush(self) -> None:
        """Send what is encrypted, to the end."""
        self._plain.send([memoryview(self._take_encrypted())])

    def _take_encrypted(self) -> bytes:
        with self._lock:  # who decrypts may add to it: an alert, an answer to new keys
            return self._outgoing.read()

    def _decrypt(self, view: memoryview) -> int:
        """How many bytes; 0 at the end. A cut in the middle is none either: callers treat both as a loss."""
        try:
            decrypted: object = self._tls.read(len(view), view)
        except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
            return 0
        assert isinstance(decrypted, int)  # bytes only where there is no buffer to read into
        return decrypted

    def _encrypt(self, view: memoryview) -> None:
        with self._lock:
            while view:
                view = view[self._tls.write(view) :]


def server_stream(sock: socket.socket, tls: ssl.SSLContext | None) -> Stream:
    """Of an accepted socket, which belongs to the stream from here on."""
    return PlainStream(sock) if tls is None else TlsStream(sock, tls, is_server=True)


def client_stream(sock: socket.socket, tls: ssl.SSLContext | None) -> Stream:
    """Of a connected socket, which belongs to the stream from here on."""
    return PlainStream(sock) if tls is None else TlsStream(sock, tls, is_server=False)


def after(views: Sequence[memoryview], num_bytes: int) -> Sequence[memoryview]:
    """What is left of `views` behind their first `num_bytes`."""
    for at, view in enumerate(views):
        if num_bytes < len(view):
            return [view[num_bytes:], *views[at + 1 :]]
        num_bytes -= len(view)
    return ()


def receive_exactly(stream: Stream, num_bytes: int) -> bytearray:
    """Block for a record of this size; ConnectionError where the peer ends before that."""
    record = bytearray(num_bytes)
    left = memoryview(record)
    while left:
        try:
            received = stream.receive([left])
        except BlockingIOError:
            stream.wait(len(left))
            continue
        if not received:
            raise ConnectionError("the peer closed the connection")
        left = left[received:]
    return record
