"""One request's way from the session's reader to its Generate call."""

import asyncio
from collections import deque

from pdserve.core.errors import InternalError, PdserveError
from pdserve.proto import worker_pb2


class TokenStream:
    """A bounded buffer with one producer that never waits and one consumer that may.

    Producer: the session's reader. Consumer: the request's Generate call. Both live on one event loop.
    """

    def __init__(self, capacity_tokens: int, choices: int = 1) -> None:
        """`capacity_tokens` is each choice's share of what may be unread."""
        self._capacity = capacity_tokens * choices
        self._items: deque[worker_pb2.FrameItem | worker_pb2.Replace] = deque()
        self._buffered = 0
        self._error: PdserveError | None = None
        self._ready = asyncio.Event()
        self._next_index = [0] * choices
        self._ended = [False] * choices
        self.heard = False
        """Whether anything of the request was received from its present worker."""

    @property
    def next_index(self) -> tuple[int, ...]:
        """Of each choice, the first completion token that has not been received."""
        return tuple(self._next_index)

    @property
    def ended(self) -> bool:
        """The last item was taken: every choice's end, or a failure."""
        return all(self._ended)

    def put(self, item: worker_pb2.FrameItem) -> bool:
        """Take one item; what a re-attached session sends twice is dropped.

        Returns False when the consumer has left more than the capacity unread; the item is not taken then.
        Raises InternalError when tokens are missing, an item overlaps others by a part of its text, or its
        choice was not asked for.
        """
        self.heard = True
        if item.HasField("failure"):
            self._ended = [True] * len(self._ended)
            self._append(item)
            return True
        choice, count = item.choice, len(item.token_ids)
        if choice >= len(self._ended):
            raise InternalError(
                f"request {item.request_id} has {len(self._ended)} choices, the worker sent choice {choice}"
            )
        expected = self._next_index[choice]
        if self._ended[choice] or (count and item.first_index + count <= expected):
            return True
        if item.first_index != expected:
            raise InternalError(
                f"request {item.request_id}: token {expected} of choice {choice} was expected, "
                f"but the worker sent {count} tokens from {item.first_index} on"
            )
        if self._buffered + count > self._capacity:
            return False
        self._next_index[choice] += count
        self._ended[choice] = bool(item.finish_reason)
        self._buffered += count
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
