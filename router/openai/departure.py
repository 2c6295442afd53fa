"""A client that leaves ends what is done for it."""

import asyncio
from types import TracebackType

from starlette.types import Receive

from pdserve.router.openai.errors import ClientLeft


class UntilClientLeaves:
    """`async with`: the block is cancelled when the client disconnects, and ClientLeft comes out of it.

    The request's body must have been read: whatever else the client sends is dropped. As with
    `asyncio.timeout`, a cancel from outside stays a cancel.
    """

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._left = False
        self._watch: asyncio.Task[None] | None = None
        self._block: asyncio.Task[object] | None = None
        self._cancels = 0

    async def __aenter__(self) -> None:
        self._block = asyncio.current_task()
        assert self._block is not None
        self._cancels = self._block.cancelling()
        self._watch = asyncio.create_task(self._wait())

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._block is not None
        assert self._watch is not None
        # Not awaited: the watch runs only while the block waits, so its cancel arrives inside the block.
        self._watch.cancel()
        if self._left and self._block.uncancel() <= self._cancels and kind is asyncio.CancelledError:
            raise ClientLeft("the client left") from None

    async def _wait(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._left = True
        assert self._block is not None
        self._block.cancel()
