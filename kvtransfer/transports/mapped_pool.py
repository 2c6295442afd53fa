"""Another process's pool as this one sees it: its memfd, mapped read-only, and whether the process lives.

The mapping outlives its owner, and so do its bytes; an owner that died is noticed through a pidfd, and its
content is not trusted from then on, as with every other transport. Of a pool on a GPU only the generations
are in the memfd.
"""

import fcntl
import mmap
import os
import select
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pdserve.core.errors import Unavailable
from pdserve.kvtransfer.pool.header import EXPORTED_OFFSET, PAGE_BYTES, PoolHeader
from pdserve.kvtransfer.pool.layout import KvLayout
from pdserve.kvtransfer.pool.storage import KvStorage
from pdserve.kvtransfer.transports.base import Offer
from pdserve.kvtransfer.transports.segment_table import SegmentTable


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


def how_to_map(storage: KvStorage) -> dict[str, str]:
    """An offer's parameters, from which `MappedPool.of` finds this process's pool."""
    identity = HostIdentity.mine()
    return {
        "pid": str(os.getpid()),
        "fd": str(storage.fd),
        "boot_id": identity.boot_id,
        "pid_namespace": identity.pid_namespace,
        "uid": identity.uid,
        "num_blocks": str(storage.num_blocks),
        "layout": storage.layout.fingerprint().hex(),
        "token": storage.token.hex(),
    }


def reachable(offer: Offer) -> bool:
    """Whether this process could map the offered pool now."""
    try:
        os.close(_open(offer.parameters))
    except (Unavailable, OSError, KeyError, ValueError):
        return False
    return True


class MappedPool:
    """A peer's memfd in this process's address space. Owns the mapping and the pidfd."""

    def __init__(self, parameters: Mapping[str, str]) -> None:
        fd = _open(parameters)
        try:
            self._map = mmap.mmap(fd, os.fstat(fd).st_size, prot=mmap.PROT_READ)
        finally:
            os.close(fd)
        self.header = PoolHeader.unpack(self._map[:PAGE_BYTES])
        self._header_bytes = self.header.pack()
        num_blocks = self.header.num_blocks
        self._generations = np.frombuffer(self._map, np.uint64, num_blocks, self.header.generations_offset)
        self._process = os.pidfd_open(int(parameters["pid"]))
        self._poll = select.poll()
        self._poll.register(self._process, select.POLLIN)

    @classmethod
    def of(cls, offer: Offer, layout: KvLayout) -> "MappedPool":
        """Raises Unavailable where the offered pool cannot be mapped or has another layout."""
        try:
            mapped = cls(offer.parameters)
        except (OSError, KeyError, ValueError) as error:
            raise Unavailable(f"cannot map the offered pool: {type(error).__name__}: {error}") from error
        if mapped.header.fingerprint != layout.fingerprint():
            mapped.close()
            raise Unavailable("the offered pool has another block layout; use a transport that converts")
        return mapped

    def blocks(self) -> NDArray[np.uint8]:
        """[num_blocks, block_bytes]; only where they are on the host. Not to be kept past `close`."""
        num_blocks, block_bytes = self.header.num_blocks, self.header.block_bytes
        flat = np.frombuffer(self._map, np.uint8, num_blocks * block_bytes, self.header.blocks_offset)
        return flat.reshape(num_blocks, block_bytes)

    def distrust(self, segments: SegmentTable) -> str | None:
        """Why bytes read from `segments` now would not be the granted ones; None if they are."""
        if self._poll.poll(0):
            return "the pool's process has ended"
        if self._map[: len(self._header_bytes)] != self._header_bytes or not self._map[EXPORTED_OFFSET]:
            return "the pool is no longer exported"
        return segments.stale(self._generations)

    def close(self) -> None:
        """The address range goes with the views, which nobody else holds."""
        os.close(self._process)
        del self._generations, self._map


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
