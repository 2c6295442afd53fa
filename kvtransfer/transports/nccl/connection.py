"""An epoch at D: what is claimed in it, and what comes."""

import asyncio
import contextlib
import itertools
from dataclasses import dataclass

from pdserve.kvtransfer.pool.device_blocks import DeviceBlocks
from pdserve.kvtransfer.transports.base import Grant
from pdserve.kvtransfer.transports.copying import settle
from pdserve.kvtransfer.transports.nccl.link import Link
from pdserve.kvtransfer.transports.nccl.stream import ControlStream
from pdserve.kvtransfer.transports.nccl.wire import Claim, Post, WireError, receive_ready


@dataclass(slots=True)
class Pending:
    """One claim. An outcome of None is: landed; a text: why not."""

    grant: Grant
    outcome: "asyncio.Future[str | None]"
    abandoned: bool = False
    copy: "asyncio.Future[None] | None" = None

    def finish(self, reason: str | None) -> None:
        if not self.outcome.done():
            self.outcome.set_result(reason)


class Connection:
    """An epoch at D, and what is claimed in it. One payload at a time: that is P's credit."""

    def __init__(self, link: Link, blocks: DeviceBlocks, unique_id: bytes) -> None:
        self._link = link
        self._blocks = blocks
        self._tags = itertools.count(1)
        self._orders = itertools.count(1)
        self._pending: dict[int, Pending] = {}
        self._ready: asyncio.Queue[tuple[int, Pending]] = asyncio.Queue()
        self._taking = asyncio.get_running_loop().create_task(self._take_all())
        link.start(unique_id, 0, self._read, self._fail_all)

    @property
    def lost(self) -> str | None:
        return self._link.lost

    @property
    def idle(self) -> bool:
        return not self._pending

    async def joined(self) -> None:
        await self._link.joined()

    async def claim(self, grant: Grant) -> Pending:
        """Ask for a grant's blocks. The caller waits for the outcome or abandons it."""
        tag, pending = next(self._tags), Pending(grant, asyncio.get_running_loop().create_future())
        record = Claim(tag, grant.handoff, grant.epoch, grant.seq).pack()
        if self.lost is not None:
            raise ConnectionError(self.lost)
        self._pending[tag] = pending
        try:
            await self._link.send(record)
        except BaseException:
            pending.abandoned = True
            raise
        return pending

    async def abandon(self, pending: Pending) -> None:
        """No write for this claim begins from now on, and one that has begun is over when this returns."""
        pending.abandoned = True
        if pending.copy is not None:
            await settle(pending.copy)

    async def close(self, reason: str) -> None:
        await self._link.close(reason)
        await asyncio.gather(self._taking, return_exceptions=True)

    def _fail_all(self, reason: str) -> None:
        self._taking.cancel()
        for pending in self._pending.values():
            pending.finish(reason)
        self._pending.clear()

    async def _read(self, stream: ControlStream) -> None:
        while True:
            ready = await receive_ready(stream)
            pending = self._pending.get(ready.tag)
            if pending is None:
                raise WireError(f"an answer to no claim of this reader: tag {ready.tag}")
            expected = len(pending.grant.segments) * self._blocks.rows.row_bytes
            if ready.refused or not expected:
                del self._pending[ready.tag]
                pending.finish(ready.refused or None)
            elif ready.num_bytes != expected:
                raise WireError(f"{ready.num_bytes} bytes are packed, the grant has {expected}")
            else:
                self._ready.put_nowait((ready.tag, pending))

    async def _take_all(self) -> None:
        """Posts in the order in which P was ready; the link ends at the first failure."""
        with contextlib.suppress(OSError):
            await self.joined()
            while True:
                await self._take(*await self._ready.get())

    async def _take(self, tag: int, pending: Pending) -> None:
        wanted = not pending.abandoned
        await self._link.send(Post(tag, next(self._orders) if wanted else 0).pack())
        if wanted:
            await self._link.in_thread(lambda: self._receive(pending.grant))
            if not pending.abandoned:
                copy = self._link.in_thread(lambda: self._scatter(pending.grant))
                pending.copy = asyncio.ensure_future(copy)
                await settle(pending.copy)
                pending.copy.result()
        self._pending.pop(tag, None)
        pending.finish(None)

    def _receive(self, grant: Grant) -> None:
        """In the link's thread."""
        epoch = self._link.epoch
        epoch.receive(epoch.staged(len(grant.segments), self._blocks.rows.row_bytes))

    def _scatter(self, grant: Grant) -> None:
        """In the link's thread, to its end: what was received last, to the grant's destinations."""
        epoch, count = self._link.epoch, len(grant.segments)
        staged = epoch.staged(count, self._blocks.rows.row_bytes)
        destinations = [segment.destination for segment in grant.segments]
        self._blocks.scatter(epoch.stream, staged, range(count), destinations)
        epoch.stream.record().wait()
