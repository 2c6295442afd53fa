"""The payload of one claim on its way from the socket into D's own blocks."""

import threading
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from pdserve.core.errors import PdserveError
from pdserve.kvtransfer.digest import digest_blocks
from pdserve.kvtransfer.pool.storage import KvStorage
from pdserve.kvtransfer.transports.base import Segment
from pdserve.kvtransfer.transports.tcp.stream import VIEWS_AT_ONCE, Stream, after

_PIECE_BYTES = 4 << 20
"""Received, then digested or copied to a device: few calls, and the bytes are still in the caches."""
_SCRATCH = memoryview(bytearray(256 << 10))
"""Where bytes go that nobody wants any more. Never read, so all connections share it."""


class Incoming:
    """Written by its connection's thread, given up by the event loop.

    The blocks are this fetch's until it is over. Each write to them happens with the lock held, after a look
    at whether they are still wanted; a wait for the network happens without it. So `abandon` takes no longer
    than one copy out of the socket's buffer, and no write follows it, whatever the peer does.
    """

    def __init__(
        self,
        storage: KvStorage,
        segments: Sequence[Segment],
        ended: Callable[[str | None], None],
        *,
        digest: bool,
    ) -> None:
        """Digests are made only where the pool is in host memory.

        `ended` is called once, in the event loop: with None when all has landed and P says that it is what it
        granted, else with why it must not be used.
        """
        self.ended = ended
        self._segments = segments
        self._storage = storage
        self._blocks = storage.bytes_view if storage.on_host else None
        self._digests: list[bytes] | None = [] if digest and self._blocks is not None else None
        self._lock = threading.Lock()
        self._abandoned = False
        self._damage: str | None = None

    @property
    def num_bytes(self) -> int:
        return len(self._segments) * self._storage.layout.block_bytes

    @property
    def digests(self) -> bytes | None:
        """Of what was written, if they were asked for and are made here; complete when it has ended."""
        return None if self._digests is None else b"".join(self._digests)

    def abandon(self) -> None:
        """From here on nothing is written; what still comes is thrown away."""
        self._abandoned = True  # first: from here on the thread does not compete for the lock
        with self._lock:
            pass  # a write that had begun is over

    def receive(self, stream: Stream) -> str | None:
        """Take the whole payload; why it could not be kept, None if it was, or if nobody wanted it.

        Blocks, in the connection's thread. ConnectionError where the peer ends before that.
        """
        at_once = min(VIEWS_AT_ONCE, max(1, _PIECE_BYTES // self._storage.layout.block_bytes))
        left = self.num_bytes
        for start in range(0, len(self._segments), at_once):
            piece = self._segments[start : start + at_once]
            rows, places = self._memory_for(piece)
            memory, size = rows.reshape(-1).data, self._storage.layout.block_bytes
            views: Sequence[memoryview] = [memory[place * size : (place + 1) * size] for place in places]
            while views:
                received = self._take(stream, views)
                if not received:
                    stream.wait(left)
                left -= received
                views = after(views, received)
            self._keep(piece, rows)
        return self._damage

    def _memory_for(self, piece: Sequence[Segment]) -> tuple[NDArray[np.uint8], Sequence[int]]:
        """Host memory [n, block_bytes] and its rows for the piece: D's blocks, or staging for a device's."""
        if self._blocks is not None:
            return self._blocks, [segment.destination for segment in piece]
        return np.empty((len(piece), self._storage.layout.block_bytes), np.uint8), range(len(piece))

    def _take(self, stream: Stream, views: Sequence[memoryview]) -> int:
        """What is there, into `views` or thrown away; how many bytes, 0 where nothing is there."""
        try:
            received = self._receive(stream, views)
        except BlockingIOError:
            return 0
        if not received:
            raise ConnectionError("the peer closed the connection")
        return received

    def _receive(self, stream: Stream, views: Sequence[memoryview]) -> int:
        if not self._abandoned:
            with self._lock:
                if not self._abandoned:
                    return stream.receive(views)
        return stream.receive([_SCRATCH[: sum(map(len, views))]])

    def _keep(self, piece: Sequence[Segment], rows: NDArray[np.uint8]) -> None:
        """All of a piece has come: digest what was written, or write what was staged."""
        destinations = [segment.destination for segment in piece]
        try:
            if self._blocks is None:
                with self._lock:
                    if not self._abandoned:
                        self._storage.write_blocks(destinations, rows)
            elif self._digests is not None and not self._abandoned:
                valid = [segment.valid_tokens for segment in piece]
                self._digests.append(digest_blocks(rows, destinations, self._storage.layout, valid))
        except (PdserveError, RuntimeError) as error:
            self._damage = f"the blocks could not be written: {type(error).__name__}: {error}"
            self.abandon()
