"""What a worker tells redis: that it lives, how busy it is, which blocks it holds."""

import contextlib
from collections.abc import Awaitable, Callable, Sequence

from pdserve.core.clock import Clock
from pdserve.core.config import IndexConfig
from pdserve.core.types import BlockName
from pdserve.core.worker_record import WorkerLoad, WorkerRecord
from pdserve.kvtransfer.index.announcer import CacheAnnouncer
from pdserve.kvtransfer.index.base import IndexUnavailable, LocationIndex
from pdserve.kvtransfer.index.link import RedisLink
from pdserve.kvtransfer.index.membership import Membership, Standing
from pdserve.kvtransfer.index.membership_view import MembershipView
from pdserve.kvtransfer.index.memory import MemoryIndex
from pdserve.kvtransfer.index.memory_membership import MemoryMembership
from pdserve.kvtransfer.index.redis_index import RedisIndex
from pdserve.kvtransfer.index.redis_membership import RedisMembership
from pdserve.kvtransfer.pool.prefix_cache import CacheListener
from pdserve.workers.heartbeat import Heartbeat


class Announcements:
    """The worker's side of index and membership. Without a redis URL both live in memory, for one worker."""

    def __init__(
        self,
        *,
        config: IndexConfig,
        record: Callable[[], WorkerRecord],
        load: Callable[[], WorkerLoad],
        snapshot: Callable[[], Sequence[BlockName]],
        fence: Callable[[str], Awaitable[None]],
        fence_after_s: float,
        clock: Clock,
    ) -> None:
        self._record = record
        self._load = load
        self._link = None if config.redis_url is None else RedisLink(config.redis_url, config.cluster)
        self._index: LocationIndex
        self._membership: Membership
        if self._link is None:
            memory = MemoryIndex()
            self._index, self._membership = memory, MemoryMembership(memory, clock, config.ttl_s)
        else:
            self._index = RedisIndex(self._link, config.timeout_s)
            self._membership = RedisMembership(self._link, config.ttl_s)
        self.view = MembershipView(self._membership, config.heartbeat_s, config.ttl_s, clock, sweeps=False)
        """Who else is there. Whoever starts it stops it, before `stop`."""
        self._announced: WorkerRecord | None = None
        first = record()
        self._announcer = CacheAnnouncer(self._index, first.worker, first.incarnation, first.dtype, snapshot)
        self._heartbeat = Heartbeat(
            beat=self._beat,
            load=load,
            fence=fence,
            period_s=config.heartbeat_s,
            bound_s=fence_after_s,
            clock=clock,
        )

    @property
    def listener(self) -> CacheListener:
        """What the pool reports its cache to."""
        return self._announcer

    async def start(self) -> None:
        """List the worker, then keep it listed. Raises IndexUnavailable where redis does not answer."""
        await self.announce()
        self._announcer.start()
        self._heartbeat.start()

    async def announce(self) -> None:
        """List the record as it is now. Raises IndexUnavailable; the next heartbeat tries again then."""
        record = self._record()
        await self._membership.announce(record, self._load())
        self._announced = record

    async def renew(self) -> None:
        """Speak for the record's new incarnation: the old one's entries are void.

        The cache first: once the new incarnation is listed, nothing may be said for the old one any more.
        """
        await self._announcer.renew(self._record().incarnation)
        with contextlib.suppress(IndexUnavailable):
            await self.announce()

    async def stop(self) -> None:
        """Leave the cluster. A redis that is away lets the entries expire instead."""
        await self._heartbeat.stop()
        await self._announcer.stop()
        record = self._record()
        with contextlib.suppress(IndexUnavailable):
            await self._membership.withdraw(record.worker, record.incarnation)
        if self._link is not None:
            await self._link.close()

    async def _beat(self, load: WorkerLoad) -> bool:
        record = self._record()
        standing = Standing.UNKNOWN
        if record == self._announced:
            standing = await self._membership.heartbeat(record.worker, record.incarnation, load)
        if standing is Standing.UNKNOWN:
            standing = await self._membership.announce(record, load)
            self._announced = record
        return standing is not Standing.FENCED
