"""P's pool is on a GPU of this machine: D maps it and gathers the granted blocks straight into its own.

P's half does nothing. Exposed blocks are in memory (`KvStorage.settle`); D's copy has a stream of its own and
ends with an event. Generations, the end of the export and the death of P are seen in P's memfd, as with shm.
A mapping keeps the memory that it names, so a P that dies under a copy leaves bytes that are not trusted.
"""

import asyncio
import logging
import threading

from pdserve.core.clock import Clock, MonotonicClock
from pdserve.core.errors import PdserveError, Unavailable
from pdserve.core.types import HandoffId
from pdserve.kvtransfer.gpu.base import GpuRows
from pdserve.kvtransfer.pool.storage import KvStorage
from pdserve.kvtransfer.transports.base import Failed, Grant, Landed, Offer, SourceDone
from pdserve.kvtransfer.transports.copying import CopyThread, refusal
from pdserve.kvtransfer.transports.mapped_pool import MappedPool, how_to_map

_log = logging.getLogger(__name__)


class CudaIpcExporter:
    """Lets processes of this host and user map a pool that is on a GPU."""

    transport = "cuda_ipc"

    def __init__(self, storage: KvStorage) -> None:
        """Raises Unavailable for a pool that is not on a GPU, or whose memory cannot be shared."""
        blocks = storage.blocks_on_gpu
        if blocks is None:
            raise Unavailable(f"cuda_ipc exports an open pool on a GPU, this one is on {storage.device}")
        try:
            self._handle = blocks.gpu.share(blocks.memory)
        except RuntimeError as error:
            raise Unavailable(f"{storage.device} does not share its memory: {error}") from error
        self._bus_id = blocks.gpu.bus_id
        self._storage = storage
        self._closed = False

    async def start(self) -> None:
        self._storage.set_exported(True)

    def offer(self) -> Offer:
        gpu = {"memory": self._handle.hex(), "gpu": self._bus_id}
        return Offer(self.transport, how_to_map(self._storage) | gpu)

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


class CudaIpcImporter:
    """Copies granted blocks out of one mapped pool, in a thread and a stream of its own."""

    transport = "cuda_ipc"

    def __init__(
        self, storage: KvStorage, offer: Offer, *, timeout_s: float = 10.0, clock: Clock | None = None
    ) -> None:
        """Map the pool. Raises Unavailable where it cannot be mapped or has another layout."""
        blocks = storage.blocks_on_gpu
        if blocks is None:
            raise Unavailable(f"cuda_ipc lands on a GPU, this pool is on {storage.device}")
        self._blocks = blocks
        self._layout = storage.layout
        self._timeout_s = timeout_s
        self._clock = clock or MonotonicClock()
        self._mapped = MappedPool.of(offer, storage.layout)
        header = self._mapped.header
        try:
            pointer = blocks.gpu.map(bytes.fromhex(offer.parameters["memory"]))
        except (RuntimeError, KeyError, ValueError) as error:
            self._mapped.close()
            theirs, ours = offer.parameters.get("gpu"), blocks.gpu.bus_id
            raise Unavailable(f"memory of GPU {theirs} cannot be mapped on {ours}: {error}") from error
        self._peer = GpuRows(pointer, header.num_blocks, header.block_bytes)
        self._stream = blocks.gpu.stream()
        self._copier = CopyThread("kv-cuda-ipc")
        self._closing = threading.Event()

    async def fetch(self, grant: Grant) -> Landed | Failed:
        started = self._clock.now()
        if self._closing.is_set():
            return Failed(grant.handoff, grant.epoch, grant.seq, "the importer is closed")
        stop = threading.Event()
        try:
            async with asyncio.timeout(self._timeout_s):
                reason = await self._copier.run(lambda: self._copy(grant, stop), stop)
        except TimeoutError:
            reason = f"the copy took longer than {self._timeout_s} s"
        if reason is not None:
            return Failed(grant.handoff, grant.epoch, grant.seq, reason)
        num_bytes = len(grant.segments) * self._layout.block_bytes
        return Landed(grant.handoff, grant.epoch, grant.seq, num_bytes, self._clock.now() - started)

    async def close(self) -> None:
        """Returns when the copies have ended, of which only finished ones land. Idempotent."""
        if self._closing.is_set():
            return
        self._closing.set()
        await self._copier.run(self._let_go)  # behind all that was submitted
        self._copier.close()

    def _copy(self, grant: Grant, stop: threading.Event) -> str | None:
        """In the copy thread, to the copy's end: why the blocks must not be used, None if they are right.

        One launch for the whole grant, which is over before a second look at `stop` would pay.
        """
        if stop.is_set() or self._closing.is_set():
            return "the fetch was given up before it copied"
        rows = self._blocks.rows
        reason = refusal(
            grant,
            sources=self._peer.num_rows,
            destinations=rows.num_rows,
            block_tokens=self._layout.block_tokens,
        )
        if (reason := reason or self._mapped.distrust(grant.table)) is not None:
            return reason
        sources = [segment.source for segment in grant.segments]
        destinations = [segment.destination for segment in grant.segments]
        try:
            self._blocks.scatter(self._stream, self._peer, sources, destinations)
            self._stream.record().wait()
        except (PdserveError, RuntimeError) as error:
            return f"the blocks could not be copied: {error}"
        return self._mapped.distrust(grant.table)

    def _let_go(self) -> None:
        """In the copy thread."""
        try:
            self._blocks.gpu.unmap(self._peer.pointer)
        except RuntimeError as error:
            _log.warning("kv transfer: a peer's GPU memory stays mapped: %s", error)
        self._mapped.close()
