"""Decode workers meet who prefills before a request needs it, in small numbers, and let go of who left."""

import asyncio
import dataclasses
from collections.abc import AsyncIterator

import pytest

from pdserve.core.clock import ManualClock
from pdserve.core.errors import Unavailable
from pdserve.core.types import Incarnation, Role, WorkerId
from pdserve.core.worker_record import WorkerLoad, WorkerRecord
from pdserve.kvtransfer.handoff.ask import HandoffPeer
from pdserve.kvtransfer.index.membership_view import MembershipView
from pdserve.kvtransfer.index.memory import MemoryIndex
from pdserve.kvtransfer.index.memory_membership import MemoryMembership
from pdserve.workers.peers import AT_ONCE, PeerMeetings

TTL_S = 3.0


def record(name: str, role: Role = Role.PREFILL, **changes: object) -> WorkerRecord:
    made = WorkerRecord(
        worker=WorkerId(name),
        incarnation=Incarnation(f"{name}-first"),
        role=role,
        model="m",
        schema="00",
        endpoint=f"{name}:1",
        pid=1,
        context_tokens=64,
        vocab_size=8,
        dtype="float32",
        pool_blocks=8,
        role_weight={Role.PREFILL: 1.0, Role.MIXED: 0.5, Role.DECODE: 0.0}[role],
    )
    return dataclasses.replace(made, **changes)  # type: ignore[arg-type]


class Town:
    """A membership, one D's meetings, and who was met and left. `closed`: doors that do not open;
    `mute`: those behind which nobody says so."""

    def __init__(self, me: WorkerRecord | None = None, most: int = 64) -> None:
        self.me = me or record("decode-0", Role.DECODE)
        self.clock = ManualClock()
        self.membership = MemoryMembership(MemoryIndex(), self.clock, TTL_S)
        self.view = MembershipView(self.membership, 3600.0, TTL_S, self.clock, sweeps=False)
        self.open = asyncio.Event()
        self.open.set()
        self.met: list[WorkerId] = []
        self.left: list[tuple[WorkerId, Incarnation]] = []
        self.closed: set[WorkerId] = set()
        self.mute: set[WorkerId] = set()
        self.parted = asyncio.Event()
        self.parted.set()
        self.under_way = self.most_at_once = 0
        self.meetings = PeerMeetings(
            record=lambda: self.me, view=self.view, meet=self.meet, part=self.part, most=most
        )

    async def meet(self, peer: HandoffPeer, timeout_s: float) -> str:
        self.under_way += 1
        self.most_at_once = max(self.most_at_once, self.under_way)
        try:
            await self.open.wait()
            if peer.worker in self.mute:
                await asyncio.Event().wait()
            if peer.worker in self.closed:
                raise Unavailable("nobody opens")
            self.met.append(peer.worker)
            return "shm"
        finally:
            self.under_way -= 1

    async def part(self, worker: WorkerId, incarnation: Incarnation) -> None:
        await self.parted.wait()
        self.left.append((worker, incarnation))

    async def list(self, *records: WorkerRecord) -> None:
        for listed in records:
            await self.membership.announce(listed, WorkerLoad())
        await self.view.refresh()

    async def settle(self) -> None:
        """Until nothing that could go on has not."""
        for _ in range(400):
            await asyncio.sleep(0)


@pytest.fixture
async def town() -> AsyncIterator[Town]:
    made = Town()
    yield made
    made.open.set()
    await made.meetings.stop()


async def test_who_prefills_with_its_schema_is_met_before_it_is_ready(town: Town) -> None:
    town.closed.add(WorkerId("prefill-1"))
    await town.list(
        town.me,
        record("prefill-0"),
        record("prefill-1"),
        record("mixed-0", Role.MIXED),
        record("decode-1", Role.DECODE),
        record("other", schema="11"),
        record("leaving", draining=True),
    )
    await town.meetings.start()
    assert sorted(town.met) == ["mixed-0", "prefill-0"]


async def test_peers_that_come_later_are_met_then_and_each_start_once(town: Town) -> None:
    await town.meetings.start()
    assert town.met == []
    await town.list(record("prefill-0"))
    await town.list(record("prefill-1"))
    await town.settle()
    assert town.met == ["prefill-0", "prefill-1"]
    await town.list(record("prefill-0", incarnation=Incarnation("second")))
    await town.settle()
    assert town.met == ["prefill-0", "prefill-1", "prefill-0"]
    assert town.left == [("prefill-0", "prefill-0-first")]


async def test_a_peer_that_the_membership_lost_is_let_go_of(town: Town) -> None:
    await town.list(town.me, record("prefill-0"))
    await town.meetings.start()
    town.clock.advance(2 * TTL_S)
    await town.membership.announce(town.me, WorkerLoad())
    await town.view.refresh()
    await town.settle()
    assert town.left == [("prefill-0", "prefill-0-first")]


async def test_a_peer_that_flaps_is_met_again_behind_the_parting_from_it(town: Town) -> None:
    await town.list(town.me, record("prefill-0"))
    await town.meetings.start()
    town.parted.clear()
    for _ in range(2):
        town.clock.advance(2 * TTL_S)
        await town.list(town.me)
        await town.settle()
        await town.list(record("prefill-0"))
        await town.settle()
    assert town.met == ["prefill-0"], "what is met now would be let go of"
    town.parted.set()
    await town.settle()
    assert town.met == ["prefill-0", "prefill-0"]
    assert town.left == [("prefill-0", "prefill-0-first")]


async def test_one_peer_that_answers_nobody_holds_up_no_other(town: Town) -> None:
    town.mute.add(WorkerId("prefill-7"))
    await town.list(*(record(f"prefill-{n}") for n in range(64)))
    await town.meetings.start(within_s=0.0)
    await town.settle()
    assert len(town.met) == 63


async def test_a_cluster_that_starts_as_a_whole_makes_no_storm(town: Town) -> None:
    town.open.clear()
    await town.list(*(record(f"prefill-{n}") for n in range(64)))
    await town.meetings.start(within_s=0.0)
    await town.settle()
    assert town.under_way == AT_ONCE
    town.open.set()
    await town.settle()
    assert len(town.met) == 64
    assert town.most_at_once == AT_ONCE


async def test_each_worker_begins_with_other_peers() -> None:
    firsts = set()
    for n in range(8):
        town = Town(record(f"decode-{n}", Role.DECODE))
        await town.list(*(record(f"prefill-{n}") for n in range(64)))
        await town.meetings.start()
        firsts.add(town.met[0])
        await town.meetings.stop()
    assert len(firsts) > 4


async def test_peers_that_do_not_answer_delay_the_start_by_no_more_than_its_bound(town: Town) -> None:
    town.open.clear()
    await town.list(record("prefill-0"))
    await town.meetings.start(within_s=0.01)
    assert town.met == []
    town.open.set()
    await town.settle()
    assert town.met == ["prefill-0"], "it is met behind READY"


async def test_no_more_are_met_than_can_be_kept() -> None:
    town = Town(most=3)
    await town.list(*(record(f"prefill-{n}") for n in range(9)))
    await town.meetings.start()
    assert len(town.met) == 3
    await town.meetings.stop()


async def test_a_worker_that_only_prefills_meets_nobody_until_it_decodes() -> None:
    town = Town(record("prefill-0"))
    await town.list(record("prefill-1"))
    await town.meetings.start()
    assert town.met == []
    town.me = dataclasses.replace(town.me, role_weight=0.5)
    town.meetings.look()
    await town.settle()
    assert town.met == ["prefill-1"]
    await town.meetings.stop()


async def test_stopping_ends_meetings_that_are_under_way(town: Town) -> None:
    town.open.clear()
    await town.list(record("prefill-0"))
    await town.meetings.start(within_s=0.0)
    await town.settle()
    await town.meetings.stop()
    assert (town.under_way, town.met) == (0, [])
    await town.meetings.stop()
