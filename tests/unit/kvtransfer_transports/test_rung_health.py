"""A rung that works and is far too slow is left for the next one, and tried again later."""

import logging
from collections.abc import AsyncIterator

import pytest

from pdserve.core.clock import ManualClock
from pdserve.core.types import BlockId, HandoffId, Incarnation, WorkerId
from pdserve.kvtransfer.pool.layout import KvLayout
from pdserve.kvtransfer.pool.storage import KvStorage
from pdserve.kvtransfer.transports import importers, ladder
from pdserve.kvtransfer.transports.base import Failed, Grant, Importer, Landed, Offer, Segment
from pdserve.kvtransfer.transports.importers import ImporterCache, RungUse
from pdserve.kvtransfer.transports.rung_health import (
    CLEARLY,
    FAR,
    FIRST_RETRY_S,
    JUDGED_SAMPLES,
    REAL_BYTES,
    UNKNOWN,
    Meter,
    Pace,
    is_no_better,
    retry_s,
    why_leave,
)
from pdserve.kvtransfer.transports.way import TRIAL_FAILURES

ONE, OTHER = WorkerId("prefill-0"), WorkerId("prefill-1")
FIRST = Incarnation("a")
LAYOUT = KvLayout(num_layers=1, num_kv_heads=1, head_dim=4, dtype="bfloat16")


def pace(rate: float, samples: int = JUDGED_SAMPLES) -> Pace:
    return Pace(samples, rate)


# The decisions


def test_a_rung_is_left_only_when_it_is_clearly_slower_than_the_next() -> None:
    assert why_leave(pace(1e9), pace(CLEARLY * 1e9), UNKNOWN) is None
    told = why_leave(pace(1e9), pace(1.1 * CLEARLY * 1e9), UNKNOWN)
    assert told == "1.000 GB/s where the next rung reaches 4.400 GB/s"


def test_few_measurements_condemn_nothing_on_either_side() -> None:
    few = JUDGED_SAMPLES - 1
    assert why_leave(pace(1.0, few), pace(1e9), pace(1e9)) is None
    assert why_leave(pace(1.0), pace(1e9, few), UNKNOWN) is None


def test_where_the_next_rung_is_unknown_other_pairs_say_what_this_one_can_do() -> None:
    assert why_leave(pace(1e9), UNKNOWN, pace(FAR * 1e9)) is None
    assert why_leave(pace(1e9), UNKNOWN, pace(1.1 * FAR * 1e9)) is not None
    assert why_leave(pace(1e9), pace(1e9), pace(1e12)) is None, "what is known of the next one decides"
    assert why_leave(pace(1.0), UNKNOWN, UNKNOWN) is None, "nobody knows better"


def test_one_outlier_moves_no_pace_far() -> None:
    steady = UNKNOWN
    for _ in range(20):
        steady = steady.plus(1_000_000, 1e-3)
    assert steady.rate == pytest.approx(1e9)
    assert steady.plus(1_000_000, 10.0).rate > 1e9 / CLEARLY


def test_going_down_has_to_pay_and_each_return_takes_twice_as_long() -> None:
    assert is_no_better(pace(1e9), pace(1e9))
    assert not is_no_better(pace(2e9), pace(1e9))
    assert not is_no_better(pace(1.0, 1), pace(1e9))
    waits = [retry_s(times) for times in range(1, 20)]
    assert waits[:3] == [FIRST_RETRY_S, 2 * FIRST_RETRY_S, 4 * FIRST_RETRY_S]
    assert waits[-1] == waits[-2], "it is never given up"


def test_a_meter_measures_the_way_and_not_the_single_fetch() -> None:
    meter = Meter().began(10.0).began(10.0)
    meter, sample = meter.ended(10.5, REAL_BYTES // 2)
    assert sample is None
    meter, sample = meter.ended(11.0, REAL_BYTES // 2)
    assert sample == (REAL_BYTES, 1.0), "both together took a second"
    meter, sample = meter.began(50.0).ended(50.1, 100)
    assert sample is None, "too small to be a measurement"
    meter, sample = meter.began(60.0).ended(61.0, REAL_BYTES)
    assert sample == (REAL_BYTES, 1.0), "small ones and pauses do not count"


# In the cache


class Paced:
    """An importer that moves a given number of bytes per second of the clock; where that is 0, it fails."""

    def __init__(self, transport: str, worker: str, rates: dict[tuple[str, str], float], clock: ManualClock):
        self.transport = transport
        self._key = worker, transport
        self._rates = rates
        self._clock = clock

    async def fetch(self, grant: Grant) -> Landed | Failed:
        if not self._rates[self._key]:
            return Failed(grant.handoff, grant.epoch, grant.seq, "nothing comes through")
        seconds = REAL_BYTES / self._rates[self._key]
        self._clock.advance(seconds)
        return Landed(grant.handoff, grant.epoch, grant.seq, REAL_BYTES, seconds)

    async def close(self) -> None: ...


class Road:
    """A cache over shm and tcp whose speeds a test sets, in bytes per second by (worker, transport)."""

    def __init__(self) -> None:
        self.clock = ManualClock()
        self.rates = {(w, t): 1e9 for w in (ONE, OTHER) for t in ("shm", "tcp")}
        self.unreachable: set[str] = set()
        self.handoffs = 0
        self.cache = ImporterCache(KvStorage(LAYOUT, 4), ["shm", "tcp"], clock=self.clock)

    def make(self, offer: Offer, *_: object, **__: object) -> Importer:
        if offer.transport in self.unreachable:
            raise OSError("nobody listens")
        return Paced(offer.transport, offer.parameters["worker"], self.rates, self.clock)

    async def move(self, worker: WorkerId = ONE, times: int = JUDGED_SAMPLES) -> str:
        """Fetch so many times, meeting before each as handoffs do; the last one's transport."""
        for _ in range(times):
            transport, landed = await self.try_once(worker)
            assert landed
        return transport

    async def try_once(self, worker: WorkerId = ONE) -> tuple[str, bool]:
        """Over which rung, and whether it landed."""
        self.handoffs += 1
        offers = [Offer(rung, {"worker": worker}) for rung in ("shm", "tcp")]
        importer = await self.cache.get(worker, FIRST, offers)
        assert importer is not None
        segments = (Segment(BlockId(0), 1, BlockId(0), 16),)
        report = await importer.fetch(Grant(HandoffId(f"h-{self.handoffs}"), 1, 0, segments))
        return importer.transport, isinstance(report, Landed)


@pytest.fixture
async def road(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Road]:
    made = Road()
    monkeypatch.setattr(importers, "make_importer", made.make)
    monkeypatch.setattr(ladder, "_obstacle", _none)
    yield made
    await made.cache.close()


def _none(*_: object) -> None:
    return None


async def slow_pair(road: Road) -> None:
    """OTHER is over shm and fast; ONE is at a hundredth of that."""
    await road.move(OTHER)
    road.rates[ONE, "shm"] = 1e7


async def test_a_pair_far_slower_than_the_others_goes_down_told_and_counted(
    road: Road, caplog: pytest.LogCaptureFixture
) -> None:
    await slow_pair(road)
    with caplog.at_level(logging.WARNING):
        assert await road.move() == "shm"
        assert await road.move(times=1) == "tcp"
        assert await road.move() == "tcp"
    assert [
        record.message for record in caplog.records if "falls to tcp, below shm: 0.010 GB/s" in record.message
    ]
    assert len(caplog.records) == 1
    assert road.cache.rungs() == {"shm": RungUse(1, 0), "tcp": RungUse(1, 1)}
    assert road.cache.ways() == {OTHER: "shm", ONE: "tcp"}
    assert await road.move(OTHER) == "shm", "the other pair is none the worse"


async def test_a_rung_slower_than_what_the_next_has_achieved_goes_down(road: Road) -> None:
    await slow_pair(road)
    await road.move(times=2 * JUDGED_SAMPLES)
    road.rates[OTHER, "shm"] = 2e8  # a fifth of what tcp has brought by now, and no sixteenth of anything
    assert await road.move(OTHER, 4 * JUDGED_SAMPLES) == "tcp"


async def test_it_is_tried_again_after_a_while_and_each_time_later(road: Road) -> None:
    await slow_pair(road)
    assert await road.move(times=JUDGED_SAMPLES + 1) == "tcp"
    road.clock.advance(FIRST_RETRY_S)
    assert await road.move(times=1) == "shm"
    assert await road.move(times=JUDGED_SAMPLES) == "tcp"
    road.clock.advance(1.5 * FIRST_RETRY_S)
    assert await road.move(times=1) == "tcp"
    road.rates[ONE, "shm"] = 1e9
    road.clock.advance(FIRST_RETRY_S)
    assert await road.move(times=4 * JUDGED_SAMPLES) == "shm", "it has recovered"


async def test_a_rung_below_that_is_no_faster_is_left_again_and_that_is_remembered(road: Road) -> None:
    await slow_pair(road)
    road.rates[ONE, "tcp"] = 1e6
    seen = [await road.move(times=1) for _ in range(6 * JUDGED_SAMPLES)]
    assert seen.count("tcp") == JUDGED_SAMPLES
    assert seen[-1] == "shm"


async def test_where_the_next_rung_cannot_be_had_slow_is_better_than_nothing(road: Road) -> None:
    await slow_pair(road)
    road.unreachable.add("tcp")
    assert await road.move(times=3 * JUDGED_SAMPLES) == "shm"


async def test_a_slow_rung_is_better_than_one_below_that_brings_nothing(road: Road) -> None:
    await slow_pair(road)
    await road.move(times=JUDGED_SAMPLES)
    road.rates[ONE, "tcp"] = 0.0
    lost = [await road.try_once() for _ in range(TRIAL_FAILURES)]
    assert lost == [("tcp", False)] * TRIAL_FAILURES
    assert await road.move(times=3 * JUDGED_SAMPLES) == "shm", "no handoff waits for the next trial of shm"
    assert road.cache.ways()[ONE] == "shm"


async def test_nothing_is_left_while_all_pairs_are_as_slow(road: Road) -> None:
    for worker in (ONE, OTHER):
        road.rates[worker, "shm"] = 1e6
        assert await road.move(worker, 3 * JUDGED_SAMPLES) == "shm"
