"""One request's way from the session's reader to its Generate call."""

import asyncio
from collections import deque

from pdserve.core.errors import InternalError, PdserveError
from pdserve.proto import worker_pb2


class TokenStream:
    """A bounded buffer with one producer that never waits and one consumer that may.

    Producer: the session's reader. Consumer: the request's Generate call. Both live on one event loop.
    """

    def __init__(self, capacity_tokens: int) -> None:
        self._capacity = capacity_tokens
        self._items: deque[worker_pb2.FrameItem | worker_pb2.Replace] = deque()
        self._buffered = 0
        self._error: PdserveError | None = None
        self._ready = asyncio.Event()
        self.next_index = 0
        """First completion token that has not been received."""
        self.heard = False
        """Whether anything of the request was received from its present worker."""

    def put(self, item: worker_pb2.FrameItem) -> bool:
        """Take one item; what a re-attached session sends twice is dropped.

        Returns False when the consumer has left more than the capacity unread; the item is not taken then.
        Raises InternalError when tokens are missing, or an item overlaps others by a part of its text.
        """
        self.heard = True
        count = len(item.token_ids)
        if count and item.first_index + count <= self.next_index:
            return True
        if item.first_index != self.next_index and not item.HasField("failure"):
            raise InternalError(
                f"request {item.request_id}: token {self.next_index} was expected, "
                f"but the worker sent {count} tokens from {item.first_index} on"
            )
        if self._buffered + len(item.token_ids) > self._capacity:
            return False
        self.next_index += len(item.token_ids)
        self._buffered += len(item.token_ids)
        self._append(item)
        return True

    def refuse(self, replace: worker_pb2.Replace) -> None:
        """The worker cannot promise; the consumer places the request elsewhere."""
        self.heard = False
        self._append(replace)

    def fail(self, error: PdserveError, *, discard: bool = False) -> None:
        """End the stream. What is buffered is still read first, unless it is to be discarded."""
        if discard:
            self._items.clear()
        self._error = error
        self._ready.set()

    async def get(self) -> worker_pb2.FrameItem | worker_pb2.Replace:
        """The next item. Raises what `fail` was given once everything before it was read."""
        while not self._items:
            if self._error is not None:
                raise self._error
            self._ready.clear()
            await self._ready.wait()
        item = self._items.popleft()
        if isinstance(item, worker_pb2.FrameItem):
            self._buffered -= len(item.token_ids)
        return item

    def _append(self, item: worker_pb2.FrameItem | worker_pb2.Replace) -> None:
        self._items.append(item)
        self._ready.set()
