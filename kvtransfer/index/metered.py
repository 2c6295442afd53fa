"""Figures of an index, taken from outside."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from pdserve.core.clock import Clock, MonotonicClock
from pdserve.core.types import BlockName, Incarnation, WorkerId
from pdserve.kvtransfer.index.base import Holder, Holding, IndexUnavailable, Location, LocationIndex, Update

BUCKETS_S = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 1.0)
"""Upper bounds of the latency buckets, seconds; one more bucket takes the rest."""


@dataclass(slots=True)
class CallStats:
    """Calls of one method. Latency counts answered calls only."""

    answered: int = 0
    unavailable: int = 0
    seconds: float = 0.0
    buckets: list[int] = field(default_factory=lambda: [0] * (len(BUCKETS_S) + 1))
    """Answered calls per latency bucket, not cumulative."""

    def record(self, seconds: float) -> None:
        self.answered += 1
        self.seconds += seconds
        self.buckets[sum(seconds > bound for bound in BUCKETS_S)] += 1


@dataclass(slots=True)
class IndexStats:
    """What has been asked of an index so far; only ever grows."""

    locate: CallStats = field(default_factory=CallStats)
    update: CallStats = field(default_factory=CallStats)
    """add, remove and replace."""
    drop: CallStats = field(default_factory=CallStats)
    dump: CallStats = field(default_factory=CallStats)
    asked_blocks: int = 0
    """Blocks of the chains given to `locate`."""
    found_blocks: int = 0
    """Of those, blocks that the best holder had."""
    gaps: int = 0


class MeteredIndex:
    """LocationIndex that counts and times another one. `stats` is live: read it on the same event loop."""

    def __init__(self, index: LocationIndex, clock: Clock | None = None) -> None:
        self._index = index
        self._clock = clock or MonotonicClock()
        self.stats = IndexStats()

    async def locate(self, names: Sequence[BlockName], holders: Sequence[Holder]) -> dict[WorkerId, Location]:
        with self._timed(self.stats.locate):
            found = await self._index.locate(names, holders)
        self.stats.asked_blocks += len(names)
        self.stats.found_blocks += max((location.depth for location in found.values()), default=0)
        return found

    async def add(
        self,
        worker: WorkerId,
        incarnation: Incarnation,
        seq: int,
        names: Sequence[BlockName],
        representation: str,
    ) -> Update:
        with self._timed(self.stats.update):
            update = await self._index.add(worker, incarnation, seq, names, representation)
        return self._counted(update)

    async def remove(
        self, worker: WorkerId, incarnation: Incarnation, seq: int, names: Sequence[BlockName]
    ) -> Update:
        with self._timed(self.stats.update):
            update = await self._index.remove(worker, incarnation, seq, names)
        return self._counted(update)

    async def replace(
        self,
        worker: WorkerId,
        incarnation: Incarnation,
        seq: int,
        names: Sequence[BlockName],
        representation: str,
    ) -> Update:
        with self._timed(self.stats.update):
            return await self._index.replace(worker, incarnation, seq, names, representation)

    async def drop(self, worker: WorkerId, incarnation: Incarnation) -> None:
        with self._timed(self.stats.drop):
            await self._index.drop(worker, incarnation)

    async def dump(self) -> dict[Holder, Holding]:
        with self._timed(self.stats.dump):
            return await self._index.dump()

    def _counted(self, update: Update) -> Update:
        self.stats.gaps += update is Update.GAP
        return update

    @contextmanager
    def _timed(self, calls: CallStats) -> Iterator[None]:
        start = self._clock.now()
        try:
            yield
        except IndexUnavailable:
            calls.unavailable += 1
            raise
        calls.record(self._clock.now() - start)
