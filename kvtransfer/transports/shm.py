"""P's CPU pool is a memfd that D maps read-only: a fetch is one gather copy, P's half does nothing.

The mapping outlives P, and so do its bytes; a P that died is noticed through a pidfd and its content is not
trusted from then on, as with every other transport.
"""

import asyncio
import fcntl
import mmap
import os
import select
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pdserve.core.clock import Clock, MonotonicClock
from pdserve.core.errors import Unavailable
from pdserve.core.types import HandoffId
from pdserve.kvtransfer.native import load_kernel
from pdserve.kvtransfer.pool.header import EXPORTED_OFFSET, PAGE_BYTES, PoolHeader
from pdserve.kvtransfer.pool.storage import KvStorage
from pdserve.kvtransfer.transports.base import Failed, Grant, Landed, Offer, Segment, SourceDone
from pdserve.kvtransfer.transports.copying import Copied, CopyThread, copy_segments, stale

_AT_ONCE_BYTES = 128 << 10
"""Up to this size the copy takes less of the event loop's time than handing it to a thread and back."""


@dataclass(frozen=True, slots=True)
class HostIdentity:
    """Who can open another process's /proc/PID/fd: the same kernel, pid namespace and user."""

    boot_id: str
    pid_namespace: str
    uid: str

    @classmethod
    def mine(cls) -> "HostIdentity":
        return cls(
            boot_id=Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
            pid_namespace=str(os.stat("/proc/self/ns/pid").st_ino),
            uid=str(os.getuid()),
        )


class ShmExporter:
    """Lets processes of this host and user map the pool."""

    transport = "shm"

    def __init__(self, storage: KvStorage) -> None:
        if storage.fd is None:
            raise Unavailable(
                f"shm exports a CPU pool that is open, this one is on {storage.device} or closed"
            )
        self._storage = storage
        self._closed = False

    async def start(self) -> None:
        self._storage.set_exported(True)

    def offer(self) -> Offer:
        storage, identity = self._storage, HostIdentity.mine()
        return Offer(
            self.transport,
            {
                "pid": str(os.getpid()),
                "fd": str(storage.fd),
                "boot_id": identity.boot_id,
                "pid_namespace": identity.pid_namespace,
                "uid": identity.uid,
                "num_blocks": str(storage.num_blocks),
                "layout": storage.layout.fingerprint().hex(),
                "token": storage.token.hex(),
            },
        )

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


def reachable(offer: Offer) -> bool:
    """Whether this process could map the offered pool now."""
    try:
        os.close(_open(offer.parameters))
    except (Unavailable, OSError, KeyError, ValueError):
        return False
    return True


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
        try:
            self._mapped = _MappedPool(offer.parameters)
        except (OSError, KeyError, ValueError) as error:
            raise Unavailable(f"cannot map the offered pool: {type(error).__name__}: {error}") from error
        if self._mapped.header.fingerprint != storage.layout.fingerprint():
            self._mapped.close()
            raise Unavailable("the offered pool has another block layout; use a transport that converts")
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
            self._mapped.blocks,
            self._storage,
            lambda: self._mapped.distrust(grant.segments),
            stop.is_set,
        )


class _MappedPool:
    """A peer's pool in this process's address space, read-only. Owns the mapping and the pidfd."""

    def __init__(self, parameters: Mapping[str, str]) -> None:
        fd = _open(parameters)
        try:
            self._map = mmap.mmap(fd, os.fstat(fd).st_size, prot=mmap.PROT_READ)
        finally:
            os.close(fd)
        self.header = PoolHeader.unpack(self._map[:PAGE_BYTES])
        self._header_bytes = self.header.pack()
        num_blocks, block_bytes = self.header.num_blocks, self.header.block_bytes
        self._generations = np.frombuffer(self._map, np.uint64, num_blocks, self.header.generations_offset)
        flat = np.frombuffer(self._map, np.uint8, num_blocks * block_bytes, self.header.blocks_offset)
        self.blocks = flat.reshape(num_blocks, block_bytes)
        self._process = os.pidfd_open(int(parameters["pid"]))
        self._poll = select.poll()
        self._poll.register(self._process, select.POLLIN)

    def distrust(self, segments: tuple[Segment, ...]) -> str | None:
        """Why bytes read from `segments` now would not be the granted ones; None if they are."""
        if self._poll.poll(0):
            return "the pool's process has ended"
        if self._map[: len(self._header_bytes)] != self._header_bytes or not self._map[EXPORTED_OFFSET]:
            return "the pool is no longer exported"
        return stale(segments, self._generations)

    def close(self) -> None:
        """The address range goes with the views, which nobody else holds."""
        os.close(self._process)
        del self.blocks, self._generations, self._map


def _open(parameters: Mapping[str, str]) -> int:
    """A read-only descriptor of the offered memory, checked to be that pool; the caller closes it."""
    identity = HostIdentity.mine()
    theirs = HostIdentity(parameters["boot_id"], parameters["pid_namespace"], parameters["uid"])
    if theirs != identity:
        raise Unavailable(f"the pool is of {theirs}, this process is {identity}: it cannot be mapped here")
    fd = os.open(f"/proc/{int(parameters['pid'])}/fd/{int(parameters['fd'])}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        header = PoolHeader.unpack(os.pread(fd, PAGE_BYTES, 0).ljust(PAGE_BYTES, b"\0"))
        expected = (parameters["token"], int(parameters["num_blocks"]), parameters["layout"])
        if (header.token.hex(), header.num_blocks, header.fingerprint.hex()) != expected:
            raise Unavailable("the offered memory is another pool's: its process was replaced")
        if os.fstat(fd).st_size != header.total_bytes:
            raise Unavailable(f"the pool should have {header.total_bytes} bytes, not {os.fstat(fd).st_size}")
        if not fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK:
            raise Unavailable("the offered memory may shrink under its readers; it must be sealed")
    except BaseException:
        os.close(fd)
        raise
    return fd
