"""Whatever happens on the way, the index ends with what the pool has."""

import asyncio
import threading
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdserve.core.clock import ManualClock
from pdserve.core.types import BlockName, Incarnation, WorkerId
from pdserve.kvtransfer.index.announcer import AnnouncerLimits, CacheAnnouncer
from pdserve.kvtransfer.index.base import Holder, IndexUnavailable, Update
from pdserve.kvtransfer.index.memory import MemoryIndex
from pdserve.kvtransfer.names import chain

HOLDER = Holder(WorkerId("prefill-0"), Incarnation("a1"))
LIMITS = AnnouncerLimits(batch_s=0.001, batch_names=4, full_names=4, retry_s=0.001, probe_s=1.0)


class Pool:
    """What a KvPool is to its listener: names in storage order."""

    def __init__(self) -> None:
        self.names: dict[BlockName, None] = {}
        self.snapshots = 0

    def snapshot(self) -> Sequence[BlockName]:
        self.snapshots += 1
        return tuple(self.names)

    def store(self, announcer: CacheAnnouncer, names: Sequence[BlockName]) -> None:
        self.names.update(dict.fromkeys(names))
        announcer.stored(names)

    def evict(self, announcer: CacheAnnouncer, names: Sequence[BlockName]) -> None:
        for name in names:
            del self.names[name]
        announcer.removed(names)


class FlakyIndex(MemoryIndex):
    """Fails the calls whose turn is in `fail_before` (nothing done) or `fail_after` (done, answer lost)."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, int]] = []
        self.fail_before: set[int] = set()
        self.fail_after: set[int] = set()
        self.changed = asyncio.Condition()

    async def told(self, wanted: Sequence[BlockName]) -> None:
        """Wait until exactly `wanted` is what the index knows of HOLDER."""
        async with asyncio.timeout(30), self.changed:
            while HOLDER not in await self.dump() or await held(self) != set(wanted):
                await self.changed.wait()

    async def add(self, worker: Any, incarnation: Any, seq: int, names: Any, representation: str) -> Update:
        self._enter("add", names)
        return await self._leave(await super().add(worker, incarnation, seq, names, representation))

    async def remove(self, worker: Any, incarnation: Any, seq: int, names: Any) -> Update:
        self._enter("remove", names)
        return await self._leave(await super().remove(worker, incarnation, seq, names))

    async def replace(
        self, worker: Any, incarnation: Any, seq: int, names: Any, representation: str
    ) -> Update:
        self._enter("replace", names)
        return await self._leave(await super().replace(worker, incarnation, seq, names, representation))

    def _enter(self, kind: str, names: Sequence[BlockName]) -> None:
        self.calls.append((kind, len(names)))
        if len(self.calls) in self.fail_before:
            raise IndexUnavailable("no answer")

    async def _leave(self, update: Update) -> Update:
        async with self.changed:
            self.changed.notify_all()
        if len(self.calls) in self.fail_after:
            raise IndexUnavailable("answer lost")
        return update


@pytest.fixture
def pool() -> Pool:
    return Pool()


@pytest.fixture
def index() -> FlakyIndex:
    return FlakyIndex()


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def announcer(pool: Pool, index: FlakyIndex, clock: ManualClock) -> CacheAnnouncer:
    return CacheAnnouncer(
        index, HOLDER.worker, HOLDER.incarnation, "float32", pool.snapshot, limits=LIMITS, clock=clock
    )


def names(blocks: int, root: bytes = b"root") -> tuple[BlockName, ...]:
    return chain(root, [1] * 16 * blocks)


async def held(index: MemoryIndex, holder: Holder = HOLDER) -> set[BlockName]:
    return set((await index.dump())[holder].names)


async def test_the_first_announcement_is_the_snapshot_in_bounded_parts(
    announcer: CacheAnnouncer, pool: Pool, index: FlakyIndex
) -> None:
    pool.store(announcer, names(10))
    await announcer.flush()
    assert await held(index) == set(names(10))
    assert index.calls == [("replace", 4), ("add", 4), ("add", 2)]
    assert announcer.in_sync


async def test_news_after_that_is_announced_as_it_comes(
    announcer: CacheAnnouncer, pool: Pool, index: FlakyIndex
) -> None:
    await announcer.flush()
    pool.store(announcer, names(6))
    pool.evict(announcer, names(6)[:3:-1])
    pool.store(announcer, names(2, b"other"))
    await announcer.flush()
    assert await held(index) == set(pool.names)
    assert announcer.full_announcements == 1


async def test_a_large_eviction_is_announced_whole_in_bounded_parts(
    announcer: CacheAnnouncer, pool: Pool, index: FlakyIndex
) -> None:
    pool.store(announcer, names(10))
    await announcer.flush()
    index.calls.clear()
    pool.evict(announcer, names(10)[:0:-1])
    await announcer.flush()
    assert await held(index) == set(names(1))
    assert index.calls == [("remove", 4), ("remove", 4), ("remove", 1)]


async def test_a_name_that_came_and_went_is_told_once(
    announcer: CacheAnnouncer, pool: Pool, index: FlakyIndex
) -> None:
    await announcer.flush()
    index.calls.clear()
    for _ in range(5):
        pool.store(announcer, names(1))
        pool.evict(announcer, names(1))
    await announcer.flush()
    assert index.calls == [("remove", 1)]
    pool.store(announcer, names(1))
    await announcer.flush()
    assert await held(index) == set(names(1))


async def test_parents_stay_in_front_of_children_across_calls(
    announcer: CacheAnnouncer, pool: Pool, index: FlakyIndex
) -> None:
    await announcer.flush()
    path = names(9)
    pool.store(announcer, path)
    pool.evict(announcer, path[:0:-1])
    pool.store(announcer, path[1:])
    index.fail_before = {len(index.calls) + 2}  # after the first of three calls
    with pytest.raises(IndexUnavailable):
        await announcer.flush()
    assert (await index.locate(path, [HOLDER]))[HOLDER.worker].depth == len(await held(index)) == 4


@pytest.mark.parametrize("lost", ["fail_before", "fail_after"])
async def test_after_a_failure_everything_is_announced_again(
    announcer: CacheAnnouncer, pool: Pool, index: FlakyIndex, lost: str
) -> None:
    pool.store(announcer, names(3))
    await announcer.flush()
    setattr(index, lost, {len(index.calls) + 1})
    pool.store(announcer, names(5, b"other"))
    with pytest.raises(IndexUnavailable):
        await announcer.flush()
    assert not announcer.in_sync
    await announcer.flush()
    assert await held(index) == set(pool.names)
    assert announcer.full_announcements == 2


async def test_a_gap_is_healed_within_the_same_flush(
    announcer: CacheAnnouncer, pool: Pool, index: FlakyIndex
) -> None:
    pool.store(announcer, names(3))
    await announcer.flush()
    await index.drop(HOLDER.worker, HOLDER.incarnation)
    pool.store(announcer, names(4)[3:])
    await announcer.flush()
    assert await held(index) == set(names(4))


async def test_an_idle_announcer_finds_out_that_the_index_forgot(
    announcer: CacheAnnouncer, pool: Pool, index: FlakyIndex, clock: ManualClock
) -> None:
    pool.store(announcer, names(3))
    await announcer.flush()
    await index.drop(HOLDER.worker, HOLDER.incarnation)
    clock.advance(LIMITS.probe_s / 2)
    await announcer.flush()
    assert await index.dump() == {}
    clock.advance(LIMITS.probe_s / 2)
    await announcer.flush()
    assert await held(index) == set(names(3))


async def test_memory_stays_bounded_while_the_index_is_away(pool: Pool, index: FlakyIndex) -> None:
    limits = AnnouncerLimits(queue_events=8)
    announcer = CacheAnnouncer(index, HOLDER.worker, HOLDER.incarnation, "float32", pool.snapshot, limits)
    await announcer.flush()
    path = names(50)
    for name in path:
        pool.store(announcer, [name])
    assert len(announcer._events) == limits.queue_events
    await announcer.flush()
    assert await held(index) == set(path)
    assert announcer.full_announcements == 2


async def test_a_new_incarnation_begins_again(
    announcer: CacheAnnouncer, pool: Pool, index: FlakyIndex
) -> None:
    pool.store(announcer, names(3))
    await announcer.flush()
    await announcer.renew(Incarnation("a2"))
    await announcer.flush()
    pool.store(announcer, names(4)[3:])
    await announcer.flush()
    assert await held(index, Holder(HOLDER.worker, Incarnation("a2"))) == set(names(4))
    assert await held(index) == set(names(3))


async def test_a_cancelled_flush_loses_nothing(
    announcer: CacheAnnouncer, pool: Pool, index: FlakyIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    await announcer.flush()
    entered = asyncio.Event()

    async def hang(*_: Any) -> Update:
        entered.set()
        return await asyncio.get_running_loop().create_future()

    with monkeypatch.context() as patch:
        patch.setattr(index, "add", hang)
        pool.store(announcer, names(2))
        flush = asyncio.create_task(announcer.flush())
        await entered.wait()
        flush.cancel()
        with pytest.raises(asyncio.CancelledError):
            await flush
    await announcer.flush()
    assert await held(index) == set(names(2))


async def test_the_task_announces_what_another_thread_reports(
    announcer: CacheAnnouncer, pool: Pool, index: FlakyIndex
) -> None:
    announcer.start()
    await index.told(())
    path = names(200)

    def report() -> None:
        for name in path:
            pool.store(announcer, [name])

    thread = threading.Thread(target=report)
    thread.start()
    await asyncio.to_thread(thread.join)
    await index.told(path)
    await announcer.stop()
    await announcer.stop()


async def test_the_task_survives_failures_of_any_kind(
    announcer: CacheAnnouncer, pool: Pool, index: FlakyIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    index.fail_before = {1, 2}
    failures = iter([RuntimeError("a defect"), None])

    def snapshot() -> Sequence[BlockName]:
        failure = next(failures, None)
        if failure is not None:
            raise failure
        return pool.snapshot()

    monkeypatch.setattr(announcer, "_snapshot", snapshot)
    pool.store(announcer, names(3))
    announcer.start()
    await index.told(names(3))
    await announcer.stop()
    assert len(index.calls) == 3


async def test_an_index_that_always_forgets_is_an_error_not_a_loop(
    announcer: CacheAnnouncer, index: FlakyIndex, pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def gap(*_: Any) -> Update:
        return Update.GAP

    monkeypatch.setattr(index, "replace", gap)
    with pytest.raises(IndexUnavailable, match="prefill-0"):
        await announcer.flush()


PATHS = [chain(b"root", [fork] * 16 + [7] * 32) for fork in range(4)]
step = st.tuples(st.sampled_from(["store", "evict", "flush", "forget", "fail"]), st.integers(0, 3))


@settings(max_examples=80, deadline=None)
@given(steps=st.lists(step, max_size=40))
def test_the_index_always_converges_to_the_pool(steps: list[tuple[str, int]]) -> None:
    asyncio.run(converge(steps))


async def converge(steps: list[tuple[str, int]]) -> None:
    pool, index, clock = Pool(), FlakyIndex(), ManualClock()
    limits = AnnouncerLimits(batch_names=2, full_names=3, queue_events=6)
    announcer = CacheAnnouncer(index, HOLDER.worker, HOLDER.incarnation, "f", pool.snapshot, limits, clock)
    for kind, which in steps:
        path = PATHS[which]
        there = [name for name in path if name in pool.names]
        if kind == "store" and len(there) < len(path):
            pool.store(announcer, path[len(there) : len(there) + 2])
        elif kind == "evict" and there:
            pool.evict(announcer, there[:-2:-1])
        elif kind == "forget":
            await index.drop(HOLDER.worker, HOLDER.incarnation)
        elif kind == "fail":
            index.fail_after = {len(index.calls) + which}
        elif kind == "flush":
            try:
                await announcer.flush()
            except IndexUnavailable:
                continue
    index.fail_after = set()
    clock.advance(limits.probe_s)
    await announcer.flush()
    await announcer.flush()
    clock.advance(limits.probe_s)
    await announcer.flush()
    assert await held(index) == set(pool.names)
