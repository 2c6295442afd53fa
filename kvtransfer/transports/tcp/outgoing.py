"""The answer to one claim on its way out of P's blocks into the socket."""

from collections.abc import Iterator, Sequence
from itertools import islice

from pdserve.core.errors import PdserveError
from pdserve.kvtransfer.pool.storage import KvStorage
from pdserve.kvtransfer.transports.base import Segment
from pdserve.kvtransfer.transports.segment_table import SegmentTable
from pdserve.kvtransfer.transports.tcp.stream import Stream, after
from pdserve.kvtransfer.transports.tcp.wire import Claim, FrameHeader, pack_verdict

_FIRST_BYTES = 256 << 10
"""Sent by the event loop, while the thread wakes up that sends the rest."""
_PIECE_BYTES = 4 << 20
"""Named in one call, or copied from a device at once."""


class Outgoing:
    """One frame: `push`, then `finish` unless that was all. Between the two, one thread after the other."""

    def __init__(self, storage: KvStorage, claim: Claim, segments: Sequence[Segment]) -> None:
        self.reason: str | None = None
        """Why the payload must not be used; known when the frame is sent."""
        self._storage = storage
        self.claim = claim
        self._segments = segments
        self._on_host = storage.on_host
        self._contents = self._make()
        self._left: Sequence[memoryview] = ()

    def push(self, stream: Stream) -> bool:
        """Send what the stream takes without blocking, a little at most; whether that was all."""
        num_bytes = len(self._segments) * self._storage.layout.block_bytes
        is_little = num_bytes <= _FIRST_BYTES and self._on_host
        for content in islice(self._contents, 2 if is_little else 1):
            self._left = after(content, stream.send_at_once(content))
            if self._left:
                return False
        return is_little

    def finish(self, stream: Stream) -> None:
        """Send the rest; blocks."""
        stream.send(self._left)
        for content in self._contents:
            stream.send(content)

    def _make(self) -> Iterator[Sequence[memoryview]]:
        """The frame in pieces, each made when the one before is sent; the verdict last.

        One look at the generations, after the last read, is enough: they never go back.
        """
        num_bytes = len(self._segments) * self._storage.layout.block_bytes
        header = FrameHeader(self.claim.tag, self.claim.epoch, self.claim.seq, num_bytes)
        head = memoryview(header.pack())
        try:
            yield from self._from_host(head) if self._on_host else self._from_device(head)
        except (PdserveError, RuntimeError) as error:
            raise ConnectionError(f"the blocks could not be read: {error}") from error
        self.reason = SegmentTable(self._segments).stale(self._storage.generations)
        yield [memoryview(pack_verdict(self.reason))]

    def _from_host(self, head: memoryview) -> Iterator[Sequence[memoryview]]:
        """The pool's memory itself; the header before the first of it."""
        size = self._storage.layout.block_bytes
        blocks = self._storage.bytes_view.reshape(-1).data
        views: list[memoryview] = [head]
        for piece in self._pieces(max(1, _FIRST_BYTES // size)):
            views += [blocks[segment.source * size : (segment.source + 1) * size] for segment in piece]
            yield views
            views = []
        if views:
            yield views

    def _from_device(self, head: memoryview) -> Iterator[Sequence[memoryview]]:
        """Copies in host memory."""
        yield [head]
        for piece in self._pieces(0):
            copied = self._storage.read_blocks([segment.source for segment in piece])
            yield [copied.reshape(-1).data]

    def _pieces(self, first: int) -> Iterator[Sequence[Segment]]:
        """The segments, the `first` of them apart."""
        at_once = max(1, _PIECE_BYTES // self._storage.layout.block_bytes)
        if first and self._segments:
            yield self._segments[:first]
        for start in range(first, len(self._segments), at_once):
            yield self._segments[start : start + at_once]
