"""What a worker says of itself arrives in the end, and nothing that it does not say fences it."""

import asyncio
import dataclasses
from collections.abc import Callable

import pytest

from pdserve.core.clock import ManualClock
from pdserve.core.config import IndexConfig
from pdserve.core.types import Incarnation, Role, WorkerId
from pdserve.core.worker_record import WorkerLoad, WorkerRecord
from pdserve.kvtransfer.index.base import IndexUnavailable
from pdserve.kvtransfer.index.membership import Standing
from pdserve.kvtransfer.index.memory import MemoryIndex
from pdserve.kvtransfer.index.memory_membership import MemoryMembership
from pdserve.workers.announcements import Announcements
from pdserve.workers.heartbeat import Heartbeat

RECORD = WorkerRecord(
    worker=WorkerId("decode-0"),
    incarnation=Incarnation("one"),
    role=Role.DECODE,
    model="m",
    schema="00",
    endpoint="127.0.0.1:1",
    pid=7,
    context_tokens=64,
    vocab_size=100,
    dtype="float32",
    pool_blocks=4,
    role_weight=0.0,
)


class Flaky(MemoryMembership):
    """A membership that can be away."""

    def __init__(self, clock: ManualClock) -> None:
        super().__init__(MemoryIndex(), clock)
        self.away = False

    async def announce(self, record: WorkerRecord, load: WorkerLoad) -> Standing:
        if self.away:
            raise IndexUnavailable("away")
        return await super().announce(record, load)

    async def heartbeat(self, worker: WorkerId, incarnation: Incarnation, load: WorkerLoad) -> Standing:
        if self.away:
            raise IndexUnavailable("away")
        return await super().heartbeat(worker, incarnation, load)


class Rig:
    """Announcements with a heart that beats as fast as the event loop."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.clock = ManualClock()
        self.membership = Flaky(self.clock)
        monkeypatch.setattr(
            "pdserve.workers.announcements.MemoryMembership", lambda *arguments: self.membership
        )
        self.record = RECORD
        self.fenced: list[str] = []
        self.announcements = Announcements(
            config=IndexConfig(heartbeat_s=1e-4),
            record=lambda: self.record,
            load=WorkerLoad,
            snapshot=tuple,
            fence=self.fence,
            fence_after_s=5.0,
            clock=self.clock,
        )

    async def fence(self, reason: str) -> None:
        self.fenced.append(reason)
        self.record = dataclasses.replace(self.record, incarnation=Incarnation(f"after {len(self.fenced)}"))
        await self.announcements.renew()

    async def until_listed(self, holds: Callable[[WorkerRecord], bool]) -> None:
        async with asyncio.timeout(5):
            while not any(holds(m.record) for m in await self.membership.members()):
                await asyncio.sleep(0)


async def test_a_change_that_redis_missed_is_announced_by_a_later_heartbeat(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rig = Rig(monkeypatch)
    await rig.announcements.start()
    rig.membership.away = True
    rig.record = dataclasses.replace(rig.record, draining=True)
    with pytest.raises(IndexUnavailable):
        await rig.announcements.announce()
    rig.membership.away = False
    await rig.until_listed(lambda record: record.draining)
    assert rig.fenced == []
    await rig.announcements.stop()
    assert await rig.membership.members() == ()


async def test_a_fence_while_redis_is_away_is_one_fence(monkeypatch: pytest.MonkeyPatch) -> None:
    """The membership still lists the old incarnation when it comes back; that is no newer one."""
    rig = Rig(monkeypatch)
    await rig.announcements.start()
    await rig.until_listed(lambda record: True)
    rig.membership.away = True
    await rig.fence("a gap")
    rig.membership.away = False
    await rig.until_listed(lambda record: record.incarnation == "after 1")
    assert rig.fenced == ["a gap"]
    await rig.announcements.stop()


async def test_a_redis_that_hangs_is_never_taken_for_a_gap_of_its_own() -> None:
    """Each beat is given up after half of the bound, whatever the membership's own time-out is."""
    given_up = asyncio.Event()
    fenced: list[str] = []

    async def hang(load: WorkerLoad) -> bool:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            given_up.set()
            raise
        return True

    async def fence(reason: str) -> None:
        fenced.append(reason)

    heartbeat = Heartbeat(
        beat=hang, load=WorkerLoad, fence=fence, period_s=0.0, bound_s=0.02, clock=ManualClock()
    )
    heartbeat.start()
    async with asyncio.timeout(5):
        for _ in range(3):
            await given_up.wait()
            given_up.clear()
    await heartbeat.stop()
    assert fenced == []


async def test_a_beat_that_fails_for_another_reason_does_not_end_the_heart() -> None:
    beats = 0
    enough = asyncio.Event()

    async def beat(load: WorkerLoad) -> bool:
        nonlocal beats
        beats += 1
        if beats == 3:
            enough.set()
        raise RuntimeError("a defect")

    async def fence(reason: str) -> None:
        raise AssertionError(reason)

    heartbeat = Heartbeat(
        beat=beat, load=WorkerLoad, fence=fence, period_s=0.0, bound_s=5.0, clock=ManualClock()
    )
    heartbeat.start()
    async with asyncio.timeout(5):
        await enough.wait()
    await heartbeat.stop()
