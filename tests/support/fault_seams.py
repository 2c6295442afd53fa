"""A worker's parts with fault points around them (fault_points.py)."""

import contextlib
import dataclasses
import os
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AbstractContextManager, aclosing, nullcontext
from typing import Any, cast

import grpc
from fault_points import FaultPoints
from fault_relay import Relays

from pdserve.core.types import BlockId, BlockName, Incarnation, OwnerId, WorkerId
from pdserve.kvtransfer.handoff.filler import FillProgress
from pdserve.kvtransfer.pool.header import PAGE_BYTES, PoolHeader
from pdserve.kvtransfer.transports.base import Failed, Grant, Landed, Offer
from pdserve.workers.seams import Seams

Flip = Callable[[int, BlockId], AbstractContextManager[None]]
"""(process id of P, block) -> while it is entered, one byte of the block is wrong."""


def fault_seams(points: FaultPoints, flipped: Flip | None = None) -> Seams:
    """What Worker is made with so that it passes `points`. `flipped`: how a `flip` reaches P's pool."""
    return Seams(
        observer=points.observe,
        filler=lambda filler: _Filler(filler, points),
        importers=lambda importers: _Importers(importers, points, flipped or flipped_in_process),
        channel=lambda channel: cast(grpc.aio.Channel, _Channel(channel, points)),
    )


class _Filler:
    """P's engine, held behind a step."""

    def __init__(self, inner: Any, points: FaultPoints) -> None:
        self.estimate = inner.estimate
        self._inner = inner
        self._points = points

    async def fill(
        self, owner: OwnerId, token_ids: Sequence[int], chain: Sequence[BlockName]
    ) -> AsyncIterator[FillProgress]:
        async with aclosing(self._inner.fill(owner, token_ids, chain)) as steps:
            async for step in steps:
                await self._points.hold_at("fill")
                yield step


class _Importers:
    """D's importers. While the link is tampered with, tcp goes through a relay."""

    def __init__(self, inner: Any, points: FaultPoints, flipped: Flip) -> None:
        self._inner = inner
        self._points = points
        self._flipped = flipped
        self._relays = Relays(points.link)
        self._relayed: set[tuple[WorkerId, Incarnation]] = set()

    async def get(
        self, worker: WorkerId, incarnation: Incarnation, offers: Sequence[Offer]
    ) -> "_Importer | None":
        tampered, pair = self._points.tampers_with_the_link, (worker, incarnation)
        await self._points.hold_at("connect")
        if tampered != (pair in self._relayed):
            await self._inner.drop(*pair)  # its connections lead the other way
            (self._relayed.add if tampered else self._relayed.discard)(pair)
        if tampered:
            offers = [await self._relays.around(offer) for offer in offers]
        found = await self._inner.get(worker, incarnation, offers)
        return None if found is None else _Importer(found, self._points, self._flipped)

    async def drop(self, worker: WorkerId, incarnation: Incarnation) -> None:
        await self._inner.drop(worker, incarnation)

    async def close(self) -> None:
        await self._inner.close()
        await self._relays.close()


class _Importer:
    """One pair's transport at D."""

    def __init__(self, inner: Any, points: FaultPoints, flipped: Flip) -> None:
        self.transport: str = inner.transport
        self._inner = inner
        self._points = points
        self._flipped = flipped

    async def fetch(self, grant: Grant) -> Landed | Failed:
        fault = await self._points.hold_at("fetch")
        flip = fault is not None and fault.action == "flip"
        damage = self._flipped(fault.pid, grant.segments[0].source) if fault and flip else nullcontext()
        with damage:
            report = await self._copy(grant)
        link = self._points.link
        if isinstance(report, Landed) and link.share is None and report.num_bytes:
            link.copied.append((report.num_bytes, report.seconds))
        return report

    async def close(self) -> None:
        await self._inner.close()

    async def _copy(self, grant: Grant) -> Landed | Failed:
        """Block by block at the link's pace, where no relay sees to that."""
        if self._points.link.share is None or self.transport == "tcp" or not grant.segments:
            report: Landed | Failed = await self._inner.fetch(grant)
            return report
        num_bytes, seconds, digests = 0, 0.0, b""
        for segment in grant.segments:
            part = await self._inner.fetch(dataclasses.replace(grant, segments=(segment,)))
            if isinstance(part, Failed):
                return part
            await self._points.link.take(part.num_bytes)
            num_bytes += part.num_bytes
            seconds += part.seconds
            digests += part.digests or b""
        return Landed(grant.handoff, grant.epoch, grant.seq, num_bytes, seconds, digests or None)


class _Channel:
    """D's channel to a prefill worker."""

    def __init__(self, inner: grpc.aio.Channel, points: FaultPoints) -> None:
        self._inner: Any = inner
        self._points = points

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def stream_stream(self, *arguments: Any, **options: Any) -> Any:
        start = self._inner.stream_stream(*arguments, **options)
        return lambda *args, **kwargs: _Call(start(*args, **kwargs), self._points)


class _Call:
    """One handoff's stream at D: messages are lost or late on it, and it stays open."""

    def __init__(self, inner: Any, points: FaultPoints) -> None:
        self._inner = inner
        self._points = points

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    async def write(self, message: Any) -> None:
        if not self._lost("to-p", message):
            await self._points.link.take(message.ByteSize())
            await self._inner.write(message)

    async def __aiter__(self) -> AsyncIterator[Any]:
        async for message in self._inner:
            if not self._lost("to-d", message):
                await self._points.link.take(message.ByteSize())
                yield message

    def _lost(self, way: str, message: Any) -> bool:
        fault = self._points.passing(f"{way}/{message.WhichOneof('message')}")
        return fault is not None and fault.action == "drop"


@contextlib.contextmanager
def flipped_in_process(pid: int, block: BlockId) -> Iterator[None]:
    """One byte of a block is wrong in the only pool of process `pid`; P's digest of it was made before."""
    fd = os.open(_pool_of(pid), os.O_RDWR)
    try:
        header = PoolHeader.unpack(os.pread(fd, PAGE_BYTES, 0))
        at = header.blocks_offset + block * header.block_bytes
        right = os.pread(fd, 1, at)
        os.pwrite(fd, bytes([right[0] ^ 1]), at)
        try:
            yield
        finally:
            os.pwrite(fd, right, at)
    finally:
        os.close(fd)


def _pool_of(pid: int) -> str:
    """The descriptor of a worker process's only pool."""
    folder = f"/proc/{pid}/fd"
    for name in os.listdir(folder):
        with contextlib.suppress(FileNotFoundError):
            if "memfd:pdserve" in os.readlink(f"{folder}/{name}"):
                return f"{folder}/{name}"
    raise AssertionError(f"process {pid} has no pool")
