"""Members leave when they stop beating, never because redis is away."""

import asyncio
from dataclasses import replace

import pytest

from pdserve.core.clock import ManualClock
from pdserve.core.errors import Unavailable
from pdserve.core.types import Incarnation, Role, WorkerId
from pdserve.core.worker_record import WorkerLoad, WorkerRecord
from pdserve.kvtransfer.index.base import Holder, IndexUnavailable
from pdserve.kvtransfer.index.membership import Listing, Standing
from pdserve.kvtransfer.index.membership_view import Members, MembershipView
from pdserve.kvtransfer.index.memory import MemoryIndex
from pdserve.kvtransfer.index.memory_membership import MemoryMembership

TTL_S = 3.0


class Remote(MemoryMembership):
    """A MemoryMembership that can be away, and come back without its data."""

    away = False
    run = "first"

    async def listing(self) -> Listing:
        if self.away:
            raise IndexUnavailable("no answer")
        return replace(await super().listing(), run_id=self.run)

    def restart(self) -> None:
        self._seats.clear()
        self.run = "second"


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def index() -> MemoryIndex:
    return MemoryIndex()


@pytest.fixture
def remote(index: MemoryIndex, clock: ManualClock) -> Remote:
    return Remote(index, clock, ttl_s=TTL_S)


@pytest.fixture
def view(remote: Remote, clock: ManualClock) -> MembershipView:
    return MembershipView(remote, poll_s=0.001, ttl_s=TTL_S, clock=clock)


def record(name: str, incarnation: str = "x") -> WorkerRecord:
    return WorkerRecord(
        worker=WorkerId(name),
        incarnation=Incarnation(incarnation),
        role=Role.MIXED,
        model="tiny",
        schema="00",
        endpoint="127.0.0.1:1",
        pid=1,
        context_tokens=128,
        vocab_size=16,
        dtype="float32",
        pool_blocks=8,
        role_weight=0.5,
    )


def workers(members: Members) -> list[str]:
    return [member.record.worker for member in members]


async def test_shows_members_and_their_loads(view: MembershipView, remote: Remote) -> None:
    assert (view.current(), view.available) == ((), False)
    await remote.announce(record("b"), WorkerLoad(running=1))
    await remote.announce(record("a"), WorkerLoad(running=2))
    assert await view.refresh()
    assert view.available
    assert [(m.record.worker, m.load.running) for m in view.current()] == [("a", 2), ("b", 1)]


async def test_a_member_that_stops_beating_leaves(
    view: MembershipView, remote: Remote, clock: ManualClock
) -> None:
    await remote.announce(record("a"), WorkerLoad())
    await view.refresh()
    clock.advance(TTL_S)
    await view.refresh()
    assert view.current() == ()


async def test_nobody_leaves_while_the_server_is_away(
    view: MembershipView, remote: Remote, clock: ManualClock
) -> None:
    await remote.announce(record("a"), WorkerLoad())
    await view.refresh()
    remote.away = True
    for _ in range(10):
        clock.advance(TTL_S)
        assert not await view.refresh()
    assert workers(view.current()) == ["a"]
    assert not view.available


async def test_after_an_outage_members_get_one_time_to_live_to_return(
    view: MembershipView, remote: Remote, clock: ManualClock
) -> None:
    for name in ("back", "dead"):
        await remote.announce(record(name), WorkerLoad())
    await view.refresh()
    remote.away = True
    clock.advance(10 * TTL_S)
    await view.refresh()
    remote.away = False
    await view.refresh()
    assert workers(view.current()) == ["back", "dead"]
    assert await remote.heartbeat(WorkerId("back"), Incarnation("x"), WorkerLoad()) is Standing.UNKNOWN
    clock.advance(TTL_S / 2)
    await remote.announce(record("back"), WorkerLoad())
    await view.refresh()
    assert workers(view.current()) == ["back", "dead"]
    clock.advance(TTL_S / 2)
    await view.refresh()
    assert workers(view.current()) == ["back"]


async def test_a_quick_restart_between_two_polls_removes_nobody(
    view: MembershipView, remote: Remote, clock: ManualClock
) -> None:
    await remote.announce(record("a"), WorkerLoad())
    await view.refresh()
    clock.advance(10 * TTL_S)  # past the patience of the first answer
    await remote.announce(record("a"), WorkerLoad())
    await view.refresh()
    remote.restart()
    await view.refresh()
    assert workers(view.current()) == ["a"]
    clock.advance(TTL_S)
    await view.refresh()
    assert view.current() == ()


async def test_a_new_incarnation_replaces_the_old_one_at_once(view: MembershipView, remote: Remote) -> None:
    await remote.announce(record("a", "old"), WorkerLoad())
    await view.refresh()
    await remote.announce(record("a", "new"), WorkerLoad())
    await view.refresh()
    assert [member.record.incarnation for member in view.current()] == ["new"]


async def test_listeners_hear_of_records_not_of_loads(view: MembershipView, remote: Remote) -> None:
    heard: list[list[str]] = []
    unsubscribe = view.subscribe(lambda members: heard.append(workers(members)))
    await remote.announce(record("a"), WorkerLoad())
    await view.refresh()
    await remote.heartbeat(WorkerId("a"), Incarnation("x"), WorkerLoad(running=5))
    await view.refresh()
    assert heard == [["a"]]
    assert view.current()[0].load.running == 5
    await remote.announce(replace(record("a"), draining=True), WorkerLoad())
    await view.refresh()
    assert heard == [["a"], ["a"]]
    unsubscribe()
    unsubscribe()
    await remote.announce(record("b"), WorkerLoad())
    await view.refresh()
    assert heard == [["a"], ["a"]]


async def test_ghosts_are_swept_but_not_right_after_an_outage(
    view: MembershipView, remote: Remote, index: MemoryIndex, clock: ManualClock
) -> None:
    ghost = Holder(WorkerId("ghost"), Incarnation("g"))
    await index.add(ghost.worker, ghost.incarnation, 1, (), "float32")
    clock.advance(10 * TTL_S)
    await view.refresh()
    assert ghost in await index.dump()
    clock.advance(TTL_S)
    await view.refresh()
    assert await index.dump() == {}


async def test_waits_until_the_cluster_is_as_wanted(view: MembershipView, remote: Remote) -> None:
    view.start()
    waiting = asyncio.create_task(view.wait_until(lambda members: len(members) == 2, timeout_s=10))
    await remote.announce(record("a"), WorkerLoad())
    await remote.announce(record("b"), WorkerLoad())
    assert workers(await waiting) == ["a", "b"]
    await view.stop()
    await view.stop()


async def test_waiting_in_vain_says_who_is_there(view: MembershipView, remote: Remote) -> None:
    await remote.announce(record("a"), WorkerLoad())
    await view.refresh()
    with pytest.raises(Unavailable, match="redis answers, members: a"):
        await view.wait_until(lambda members: len(members) == 2, timeout_s=0.01)


async def test_the_watch_goes_on_after_a_listener_that_raises(view: MembershipView, remote: Remote) -> None:
    def broken(_: Members) -> None:
        raise RuntimeError("a defect of the listener")

    view.subscribe(broken)
    await remote.announce(record("a"), WorkerLoad())
    view.start()
    await view.wait_until(lambda members: workers(members) == ["a"], timeout_s=10)
    await remote.announce(record("b"), WorkerLoad())
    await view.wait_until(lambda members: workers(members) == ["a", "b"], timeout_s=10)
    await view.stop()
