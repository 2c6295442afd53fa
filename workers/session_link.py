"""D's end of one router's session: what is waiting to be written to it."""

import asyncio
from collections import deque

from pdserve.core.types import RequestId
from pdserve.proto import worker_pb2

MAX_BACKLOG = 20_000
"""Messages. A router that reads keeps this near 0; one that does not is cut off before memory fills."""


class SessionLink:
    """One stream. Items of a step are collected and leave as one frame."""

    def __init__(self, router: str) -> None:
        self.router = router
        self.requests: set[RequestId] = set()
        self.broken = False
        self._items: list[worker_pb2.FrameItem] = []
        self._messages: deque[worker_pb2.SessionResponse] = deque()
        self._wake = asyncio.Event()

    def add_item(self, item: worker_pb2.FrameItem) -> None:
        """Queue an item for the frame that `flush` sends."""
        self._items.append(item)

    def flush(self) -> None:
        """Close the frame. Called once after each engine step, and after anything that happens between."""
        if self._items:
            self.send(worker_pb2.SessionResponse(frame=worker_pb2.Frame(items=self._items)))
            self._items = []

    def send(self, message: worker_pb2.SessionResponse) -> None:
        """Queue a message; a link whose peer stopped reading breaks instead of growing."""
        if self.broken:
            return
        self._messages.append(message)
        if len(self._messages) > MAX_BACKLOG:
            self.cut()
        self._wake.set()

    def close(self) -> None:
        """Take no more messages; the writer ends when it has written what is queued. Idempotent."""
        self.flush()
        self.broken = True
        self._wake.set()

    def cut(self) -> None:
        """As `close`, and what is queued is lost, as it is when the peer went away."""
        self.broken = True
        self._items = []
        self._messages.clear()
        self._wake.set()

    async def next_message(self) -> worker_pb2.SessionResponse | None:
        """The next message to write; None when the link is closed and empty."""
        while not self._messages and not self.broken:
            self._wake.clear()
            await self._wake.wait()
        return self._messages.popleft() if self._messages else None
