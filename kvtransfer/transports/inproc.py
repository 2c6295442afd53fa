"""D and P are workers of one process: D copies out of P's pool object, P's half does nothing.

That two workers share a process is proven by a token of P's which D finds in its own process's directory. A
pid alone proves nothing (other pid namespaces, other hosts, reuse), and the token alone not either: a forked
child inherits the directory, with pools that its parent goes on writing where the child cannot see it.
"""

import asyncio
import os
import secrets
import threading
from weakref import WeakValueDictionary

from pdserve.core.clock import Clock, MonotonicClock
from pdserve.core.errors import Unavailable
from pdserve.core.types import HandoffId
from pdserve.kvtransfer.native import load_kernel
from pdserve.kvtransfer.pool.storage import KvStorage
from pdserve.kvtransfer.transports.base import Failed, Grant, Landed, Offer, SourceDone
from pdserve.kvtransfer.transports.copying import Copied, CopyThread, copy_segments
from pdserve.kvtransfer.transports.segment_table import SegmentTable

_TOKEN_BYTES = 16


class InprocExporter:
    """Lets readers in this process copy from a CPU pool. Found by its token from start to close."""

    transport = "inproc"

    def __init__(self, storage: KvStorage) -> None:
        if not storage.on_host:
            raise Unavailable(
                f"inproc exports a CPU pool that is open, this one is on {storage.device} or closed"
            )
        self._storage = storage
        self._token = secrets.token_hex(_TOKEN_BYTES)

    async def start(self) -> None:
        _EXPORTED[self._token] = self

    def offer(self) -> Offer:
        return Offer(
            self.transport,
            {
                "pid": str(os.getpid()),
                "token": self._token,
                "num_blocks": str(self._storage.num_blocks),
                "layout": self._storage.layout.fingerprint().hex(),
            },
        )

    @property
    def storage(self) -> KvStorage:
        """P's pool, which readers only read."""
        return self._storage

    @property
    def exported(self) -> bool:
        """Whether readers may trust what they read now."""
        return _EXPORTED.get(self._token) is self

    async def serve(self, grant: Grant) -> SourceDone | Failed:
        if not self.exported:
            return Failed(grant.handoff, grant.epoch, grant.seq, "the exporter is closed")
        return SourceDone(grant.handoff, grant.epoch, grant.seq)

    def forget(self, handoff: HandoffId) -> None:
        """Nothing is kept for a handoff."""

    async def close(self) -> None:
        """Readers that are copying now will not trust what they copied. Idempotent."""
        _EXPORTED.pop(self._token, None)


_EXPORTED: WeakValueDictionary[str, InprocExporter] = WeakValueDictionary()
"""This process's exporters that are open, by token: the one thing that its workers share. See ADR 0016."""


def exporter_here(offer: Offer) -> InprocExporter | None:
    """Who made this offer, if that is an open exporter of this very process."""
    if offer.parameters.get("pid") != str(os.getpid()):
        return None
    return _EXPORTED.get(offer.parameters.get("token", ""))


class InprocImporter:
    """Copies granted blocks from one pool of this process to another, in a thread of its own."""

    transport = "inproc"

    def __init__(
        self, storage: KvStorage, offer: Offer, *, timeout_s: float = 10.0, clock: Clock | None = None
    ) -> None:
        """Raises Unavailable where the exporter is not in this process or has another layout."""
        source = exporter_here(offer)
        if source is None:
            raise Unavailable("the offered pool is not in this process, or no longer exported")
        if source.storage.layout != storage.layout:
            raise Unavailable("the offered pool has another block layout; use a transport that converts")
        self._source = source
        self._storage = storage
        self._timeout_s = timeout_s
        self._clock = clock or MonotonicClock()
        self._copier = CopyThread("kv-inproc")
        self._closing = threading.Event()

    async def warm_up(self) -> None:
        """Start the copy thread, with what it will run."""
        await self._copier.run(load_kernel)

    async def fetch(self, grant: Grant) -> Landed | Failed:
        started = self._clock.now()
        if self._closing.is_set():
            return Failed(grant.handoff, grant.epoch, grant.seq, "the importer is closed")
        stop = threading.Event()
        try:
            async with asyncio.timeout(self._timeout_s):
                copied = await self._copier.run(lambda: self._copy(grant, stop), stop)
        except TimeoutError:
            copied = Copied(f"the copy took longer than {self._timeout_s} s")
        if copied.reason is not None:
            return Failed(grant.handoff, grant.epoch, grant.seq, copied.reason)
        num_bytes = len(grant.segments) * self._storage.layout.block_bytes
        seconds = self._clock.now() - started
        return Landed(grant.handoff, grant.epoch, grant.seq, num_bytes, seconds, copied.digests)

    async def close(self) -> None:
        """Returns when the copies have ended, of which only finished ones land. Idempotent."""
        if self._closing.is_set():
            return
        self._closing.set()
        await self._copier.run(lambda: None)  # behind all that was submitted
        self._copier.close()

    def _copy(self, grant: Grant, stop: threading.Event) -> Copied:
        """In the copy thread."""
        try:
            source = self._source.storage.bytes_view
        except Unavailable as error:  # closed since
            return Copied(error.message)
        return copy_segments(
            grant,
            source,
            self._storage,
            lambda: self._distrust(grant.table),
            lambda: stop.is_set() or self._closing.is_set(),
        )

    def _distrust(self, segments: SegmentTable) -> str | None:
        """Why bytes read from `segments` now would not be the granted ones; None if they are."""
        if not self._source.exported:
            return "the pool is no longer exported"
        return segments.stale(self._source.storage.generations)
