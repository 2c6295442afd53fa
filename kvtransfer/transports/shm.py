"""P's CPU pool is a memfd that D maps read-only: a fetch is one gather copy, P's half does nothing."""

import asyncio
import threading

from pdserve.core.clock import Clock, MonotonicClock
from pdserve.core.errors import Unavailable
from pdserve.core.types import HandoffId
from pdserve.kvtransfer.native import load_kernel
from pdserve.kvtransfer.pool.storage import KvStorage
from pdserve.kvtransfer.transports.base import Failed, Grant, Landed, Offer, SourceDone
from pdserve.kvtransfer.transports.copying import Copied, CopyThread, copy_segments
from pdserve.kvtransfer.transports.mapped_pool import MappedPool, how_to_map

_AT_ONCE_BYTES = 128 << 10
"""Up to this size the copy takes less of the event loop's time than handing it to a thread and back."""


class ShmExporter:
    """Lets processes of this host and user map the pool."""

    transport = "shm"

    def __init__(self, storage: KvStorage) -> None:
        if not storage.on_host:
            raise Unavailable(
                f"shm exports a CPU pool that is open, this one is on {storage.device} or closed"
            )
        self._storage = storage
        self._closed = False

    async def start(self) -> None:
        self._storage.set_exported(True)

    def offer(self) -> Offer:
        return Offer(self.transport, how_to_map(self._storage))

    async def serve(self, grant: Grant) -> SourceDone | Failed:
        if self._closed:
            return Failed(grant.handoff, grant.epoch, grant.seq, "the exporter is closed")
        return SourceDone(grant.handoff, grant.epoch, grant.seq)

    def forget(self, handoff: HandoffId) -> None:
        """Nothing is kept for a handoff."""

    async def close(self) -> None:
        """Readers that are copying now will not trust what they copied."""
        self._closed = True
        self._storage.set_exported(False)


class ShmImporter:
    """Copies granted blocks out of one mapped pool; more than a few in a thread of its own."""

    transport = "shm"

    def __init__(
        self, storage: KvStorage, offer: Offer, *, timeout_s: float = 10.0, clock: Clock | None = None
    ) -> None:
        """Map the pool. Raises Unavailable where it cannot be mapped or has another layout."""
        self._storage = storage
        self._timeout_s = timeout_s
        self._clock = clock or MonotonicClock()
        self._mapped = MappedPool.of(offer, storage.layout)
        self._copier = CopyThread("kv-shm")
        self._stops: set[threading.Event] = set()
        self._idle = asyncio.Event()
        self._idle.set()
        self._closed = False

    async def warm_up(self) -> None:
        """Start the copy thread, with what it will run."""
        await self._copier.run(load_kernel)

    async def fetch(self, grant: Grant) -> Landed | Failed:
        started = self._clock.now()
        if self._closed:
            return Failed(grant.handoff, grant.epoch, grant.seq, "the importer is closed")
        stop = threading.Event()
        self._stops.add(stop)
        self._idle.clear()
        try:
            async with asyncio.timeout(self._timeout_s):
                if len(grant.segments) * self._storage.layout.block_bytes <= _AT_ONCE_BYTES:
                    copied = self._copy(grant, stop)
                else:
                    copied = await self._copier.run(lambda: self._copy(grant, stop), stop)
        except TimeoutError:
            copied = Copied(f"the copy took longer than {self._timeout_s} s")
        finally:
            self._stops.discard(stop)
            if not self._stops:
                self._idle.set()
        if copied.reason is not None:
            return Failed(grant.handoff, grant.epoch, grant.seq, copied.reason)
        num_bytes = len(grant.segments) * self._storage.layout.block_bytes
        seconds = self._clock.now() - started
        return Landed(grant.handoff, grant.epoch, grant.seq, num_bytes, seconds, copied.digests)

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        for stop in self._stops:
            stop.set()
        await self._idle.wait()
        self._copier.close()
        self._mapped.close()

    def _copy(self, grant: Grant, stop: threading.Event) -> Copied:
        """In the copy thread, or in the event loop where it is little."""
        return copy_segments(
            grant,
            self._mapped.blocks(),
            self._storage,
            lambda: self._mapped.distrust(grant.table),
            stop.is_set,
        )
