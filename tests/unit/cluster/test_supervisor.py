"""Membership: what an operator asked for holds whatever dies in between."""

import asyncio

import pytest
from fake_hosted import ControlCalls, FakeHosted, record_fields, until

from pdserve.cluster.members import Member, MemberState
from pdserve.cluster.supervisor import Supervisor
from pdserve.core.errors import ConfigError, InvalidRequest, Unavailable, WorkerLost
from pdserve.core.types import Role

Control = tuple[ControlCalls, str]


class Fleet:
    """A supervisor whose processes are given in order; without any, they start at once."""

    def __init__(self, endpoint: str = "", *processes: FakeHosted) -> None:
        self._endpoint = endpoint
        self._next = list(processes)
        self.launched: list[FakeHosted] = []
        self.supervisor = Supervisor(self._launch)

    def _launch(self, member: Member) -> FakeHosted:
        process = self._next.pop(0) if self._next else FakeHosted()
        process.said = record_fields(self._endpoint, f"i{len(self.launched)}", member.worker)
        self.launched.append(process)
        return process


def incarnation(member: Member) -> str | None:
    return member.record.incarnation if member.record is not None else None


async def test_a_restart_is_a_new_incarnation_under_the_same_name() -> None:
    fleet = Fleet()
    member = await fleet.supervisor.add(Role.DECODE, "m")
    assert (member.worker, member.state, incarnation(member)) == ("decode-0", MemberState.READY, "i0")
    fleet.launched[0].dead.set()
    await until(lambda: member.state is MemberState.RESTARTING)
    assert member.record is None
    await until(lambda: member.state is MemberState.READY)
    assert incarnation(member) == "i1"
    assert member.restarts == 1
    await fleet.supervisor.stop()


async def test_a_restart_keeps_the_role_weight_and_the_drain(control: Control) -> None:
    calls, endpoint = control
    fleet = Fleet(endpoint)
    member = await fleet.supervisor.add(Role.DECODE, "m")
    await fleet.supervisor.set_role_weight("decode-0", 0.25)
    await fleet.supervisor.drain("decode-0", 3.0)
    assert calls.calls == [("weight", 0.25), ("drain", 3.0)]
    fleet.launched[0].dead.set()
    await until(lambda: incarnation(member) == "i1" and member.state is MemberState.DRAINING)
    assert calls.calls[2:] == [("weight", 0.25), ("drain", 0.0)]
    await fleet.supervisor.stop()


async def test_a_role_weight_and_a_drain_asked_for_during_a_restart_come_with_it(control: Control) -> None:
    calls, endpoint = control
    held = FakeHosted(held=True)
    fleet = Fleet(endpoint, FakeHosted(), held)
    member = await fleet.supervisor.add(Role.DECODE, "m")
    fleet.launched[0].dead.set()
    await held.starting.wait()
    await fleet.supervisor.set_role_weight("decode-0", 1.0)
    assert await fleet.supervisor.drain("decode-0", 3.0) == 0
    assert calls.calls == []
    held.release.set()
    await until(lambda: member.state is MemberState.DRAINING)
    assert calls.calls == [("weight", 1.0), ("drain", 0.0)]
    await fleet.supervisor.stop()


async def test_remove_drains_then_ends_and_forgets(control: Control) -> None:
    calls, endpoint = control
    calls.failed_requests = 2
    fleet = Fleet(endpoint)
    await fleet.supervisor.add(Role.DECODE, "m")
    assert await fleet.supervisor.remove("decode-0", 1.5) == 2
    assert calls.calls == [("drain", 1.5)]
    assert fleet.launched[0].stopped
    assert fleet.launched[0].killed
    assert fleet.supervisor.members.all() == ()


async def test_remove_during_a_restart_ends_the_restart() -> None:
    held = FakeHosted(held=True)
    fleet = Fleet("", FakeHosted(), held)
    await fleet.supervisor.add(Role.DECODE, "m")
    fleet.launched[0].dead.set()
    await held.starting.wait()
    assert await fleet.supervisor.remove("decode-0", 1.0) == 0
    assert held.killed
    assert fleet.supervisor.members.all() == ()
    assert len(fleet.launched) == 2


async def test_a_member_that_dies_under_its_drain_is_reported_and_can_still_be_removed(
    control: Control,
) -> None:
    calls, endpoint = control
    calls.lost = True
    fleet = Fleet(endpoint)
    await fleet.supervisor.add(Role.DECODE, "m")
    with pytest.raises(WorkerLost, match="decode-0"):
        await fleet.supervisor.drain("decode-0", 1.0)
    assert await fleet.supervisor.remove("decode-0", 1.0) == 0
    assert fleet.supervisor.members.all() == ()


async def test_two_removes_of_one_member_at_once_both_end(control: Control) -> None:
    _, endpoint = control
    fleet = Fleet(endpoint)
    await fleet.supervisor.add(Role.DECODE, "m")
    remove = fleet.supervisor.remove
    assert await asyncio.gather(remove("decode-0", 1.0), remove("decode-0", 1.0)) == [0, 0]
    assert fleet.supervisor.members.all() == ()


async def test_a_start_that_fails_leaves_no_member() -> None:
    fleet = Fleet("", FakeHosted(failure=ConfigError("truncated")))
    with pytest.raises(ConfigError, match="truncated"):
        await fleet.supervisor.add(Role.PREFILL, "m")
    assert fleet.supervisor.members.all() == ()
    assert fleet.launched[0].killed


async def test_stop_ends_a_member_that_is_just_starting_and_refuses_new_ones() -> None:
    held = FakeHosted(held=True)
    fleet = Fleet("", FakeHosted(), held)
    await fleet.supervisor.add(Role.PREFILL, "m")
    adding = asyncio.create_task(fleet.supervisor.add(Role.DECODE, "m"))
    await held.starting.wait()
    await fleet.supervisor.stop()
    with pytest.raises(Unavailable):
        await adding
    assert all(process.killed for process in fleet.launched)
    with pytest.raises(Unavailable, match="ending"):
        await fleet.supervisor.add(Role.DECODE, "m")


@pytest.mark.parametrize("weight", [-0.1, 1.1, float("nan")])
async def test_a_role_weight_outside_0_to_1_is_refused(weight: float) -> None:
    fleet = Fleet()
    member = await fleet.supervisor.add(Role.DECODE, "m")
    with pytest.raises(InvalidRequest, match="from 0"):
        await fleet.supervisor.set_role_weight("decode-0", weight)
    assert member.role_weight is None
    await fleet.supervisor.stop()


async def test_a_negative_grace_is_refused_and_drains_nothing() -> None:
    fleet = Fleet()
    member = await fleet.supervisor.add(Role.DECODE, "m")
    with pytest.raises(InvalidRequest, match="grace"):
        await fleet.supervisor.drain("decode-0", -1.0)
    assert not member.draining
    await fleet.supervisor.stop()
