"""The meter counts what passes, and changes nothing."""

import pytest

from pdserve.core.clock import ManualClock
from pdserve.core.types import BlockName, Incarnation, WorkerId
from pdserve.kvtransfer.index.base import Holder, IndexUnavailable, Location, Update
from pdserve.kvtransfer.index.memory import MemoryIndex
from pdserve.kvtransfer.index.metered import BUCKETS_S, CallStats, MeteredIndex
from pdserve.kvtransfer.names import chain

HOLDER = Holder(WorkerId("a"), Incarnation("1"))
NAMES = chain(b"root", [1] * 160)


class SlowIndex(MemoryIndex):
    """Takes `takes_s` of the clock per locate, and may be away."""

    away = False

    def __init__(self, clock: ManualClock, takes_s: float) -> None:
        super().__init__()
        self._clock = clock
        self._takes_s = takes_s

    async def locate(self, names, holders):  # type: ignore[no-untyped-def]
        self._clock.advance(self._takes_s)
        if self.away:
            raise IndexUnavailable("no answer")
        return await super().locate(names, holders)


async def test_counts_times_and_depths() -> None:
    clock = ManualClock()
    metered = MeteredIndex(SlowIndex(clock, 0.003), clock)
    await metered.add(HOLDER.worker, HOLDER.incarnation, 1, NAMES[:4], "f")
    for _ in range(2):
        assert await metered.locate(NAMES, [HOLDER]) == {HOLDER.worker: Location(4, "f")}
    stats = metered.stats
    assert (stats.locate.answered, stats.locate.unavailable, stats.update.answered) == (2, 0, 1)
    assert stats.locate.seconds == pytest.approx(0.006)
    assert stats.locate.buckets[BUCKETS_S.index(0.005)] == 2
    assert (stats.asked_blocks, stats.found_blocks) == (20, 8)


async def test_an_outage_is_counted_and_passed_on() -> None:
    clock = ManualClock()
    index = SlowIndex(clock, 0.05)
    index.away = True
    metered = MeteredIndex(index, clock)
    with pytest.raises(IndexUnavailable):
        await metered.locate(NAMES, [HOLDER])
    assert (metered.stats.locate.answered, metered.stats.locate.unavailable) == (0, 1)
    assert metered.stats.locate.seconds == 0
    assert metered.stats.asked_blocks == 0


async def test_gaps_are_counted() -> None:
    metered = MeteredIndex(MemoryIndex())
    assert await metered.add(HOLDER.worker, HOLDER.incarnation, 5, NAMES, "f") is Update.GAP
    assert await metered.remove(HOLDER.worker, HOLDER.incarnation, 5, NAMES) is Update.GAP
    assert metered.stats.gaps == 2


@pytest.mark.parametrize(("seconds", "bucket"), [(0.0, 0), (0.0005, 0), (0.0006, 1), (1.0, 9), (9.0, 10)])
def test_every_latency_falls_in_one_bucket(seconds: float, bucket: int) -> None:
    stats = CallStats()
    stats.record(seconds)
    assert [at for at, count in enumerate(stats.buckets) if count] == [bucket]


async def test_the_figures_say_how_much_was_found() -> None:
    index = MeteredIndex(MemoryIndex(), ManualClock())
    worker, incarnation = WorkerId("w"), Incarnation("one")
    names = [BlockName(bytes([n]) * 16) for n in range(4)]
    await index.replace(worker, incarnation, 1, names[:2], "float32")
    await index.locate(names, [Holder(worker, incarnation)])
    assert (index.stats.locate.answered, index.stats.asked_blocks, index.stats.found_blocks) == (1, 4, 2)
