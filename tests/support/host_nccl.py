"""Communicators without NCCL, between streams of `host_gpu`: sockets that misbehave as NCCL does.

A peer that dies or stops is never noticed here: what waits for it waits until it is aborted, and so does all
behind it in the stream.
"""

import secrets
import socket
import threading
from collections.abc import Callable

from host_gpu import HostStream, host_view

from pdserve.kvtransfer.gpu.base import CommunicatorFailed, GpuStream

VERSION = 22800
_PART = 1 << 16


class HostCommunicators:
    """Implements Communicators; rendezvous on an abstract unix socket with the unique id for a name."""

    def __init__(self) -> None:
        self.version = VERSION
        self.made: list[HostCommunicator] = []
        self.deaf = False
        """Whether who joins from now on meets nobody."""
        self._listeners: dict[bytes, socket.socket] = {}

    def unique_id(self) -> bytes:
        name = secrets.token_hex(64).encode()
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(b"\0" + name[:100])
        listener.listen(1)
        self._listeners[name] = listener
        return name

    def join(self, unique_id: bytes, rank: int) -> "HostCommunicator":
        made = HostCommunicator()
        self.made.append(made)
        if self.deaf:
            return made
        if rank == 0:
            listener = self._listeners.pop(unique_id)
            made.begin(lambda: _accepted(listener))
        else:
            made.begin(lambda: _connected(unique_id))
        return made


def _accepted(listener: socket.socket) -> socket.socket:
    with listener:
        return listener.accept()[0]


def _connected(unique_id: bytes) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(b"\0" + unique_id[:100])
    return sock


class HostCommunicator:
    """Implements Communicator."""

    def __init__(self) -> None:
        self.aborted = threading.Event()
        self.posted: list[tuple[str, int]] = []
        self.error: str | None = None
        """What NCCL would find wrong at the next look."""
        self._socket: socket.socket | None = None

    def begin(self, meet: Callable[[], socket.socket]) -> None:
        def run() -> None:
            try:
                self._socket = meet()
            except OSError:
                return  # the other one is gone: nobody tells
            if self.aborted.is_set():
                self._socket.close()

        threading.Thread(target=run, daemon=True).start()

    def busy(self) -> bool:
        if self.aborted.is_set():
            raise CommunicatorFailed("this communicator was aborted")
        if self.error is not None:
            raise CommunicatorFailed(self.error)
        return self._socket is None

    def send(self, pointer: int, num_bytes: int, stream: GpuStream) -> None:
        self.posted.append(("send", num_bytes))
        view = host_view(pointer, num_bytes).data

        def run(sock: socket.socket) -> None:
            sock.sendall(view)

        self._enqueue(stream, run)

    def receive(self, pointer: int, num_bytes: int, stream: GpuStream) -> None:
        self.posted.append(("receive", num_bytes))
        view = host_view(pointer, num_bytes).data

        def run(sock: socket.socket) -> None:
            at = 0
            while at < num_bytes:
                size = sock.recv_into(view[at : at + _PART])
                if not size:
                    raise ConnectionError
                at += size

        self._enqueue(stream, run)

    def abort(self) -> None:
        self.aborted.set()
        if self._socket is not None:
            try:
                self._socket.shutdown(socket.SHUT_RDWR)
            except OSError:
                return

    def _enqueue(self, stream: GpuStream, run: Callable[[socket.socket], None]) -> None:
        sock = self._socket
        assert sock is not None, "posted before it has joined"
        assert not self.aborted.is_set(), "used after its abort"

        def work() -> None:
            try:
                run(sock)
            except OSError:
                self.aborted.wait()  # as a kernel that spins for bytes of a dead peer

        HostStream.STREAMS[stream.handle].enqueue(work)
