"""An epoch at P: one reader, and what is packed for it."""

import asyncio

from pdserve.kvtransfer.transports.nccl.link import Link
from pdserve.kvtransfer.transports.nccl.wire import Post, Ready, WireError


class Reader:
    """An epoch at P. What is packed and not sent yet belongs to who holds `lock`."""

    def __init__(self, link: Link) -> None:
        self.link = link
        self.lock = asyncio.Lock()
        self._order = 0
        self._awaited: tuple[int, asyncio.Future[bool]] | None = None

    def posted(self, post: Post) -> None:
        """D's word on what is packed. Raises WireError where it is not what both count on."""
        if self._awaited is None or self._awaited[0] != post.tag or self._awaited[1].done():
            raise WireError(f"a post for nothing that is packed: {post}")
        if post.order:
            self._order += 1
            if post.order != self._order:
                raise WireError(f"post {post.order} came where {self._order} was due")
        self._awaited[1].set_result(post.order > 0)

    async def offer(self, ready: Ready) -> bool:
        """Tell D that this is packed; whether D posts for it. Cancelled, the link has ended."""
        wanted: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._awaited = (ready.tag, wanted)
        try:
            await self.link.send(ready.pack())
            return await wanted
        except asyncio.CancelledError:
            self.link.end("a post did not come in time")
            raise
        finally:
            self._awaited = None

    def ended(self, reason: str) -> None:
        if self._awaited is not None and not self._awaited[1].done():
            self._awaited[1].set_exception(ConnectionError(reason))
