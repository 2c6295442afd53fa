"""Waiting for a slot: in order, within the deadline, and never leaking one."""

import asyncio
from contextlib import AsyncExitStack

import pytest

from pdserve.core.clock import MonotonicClock
from pdserve.core.errors import DeadlineExceeded, Overloaded
from pdserve.core.types import RequestId
from pdserve.router.admission import Admission
from pdserve.router.gate import AdmissionGate


def gate(slots: int = 1, queue: int = 2) -> AdmissionGate:
    return AdmissionGate(Admission(slots, queue), MonotonicClock())


def idle(entered: AdmissionGate) -> bool:
    entered.admission.check_integrity()
    return entered.admission.in_flight == 0 and entered.admission.queued == 0


async def enter(entered: AdmissionGate, name: str, order: list[str]) -> None:
    async with entered.enter(RequestId(name), None):
        order.append(name)


async def test_waiters_run_in_order_of_arrival() -> None:
    entered, order = gate(), list[str]()
    async with entered.enter(RequestId("first"), None), asyncio.TaskGroup() as group:
        for name in ("second", "third"):
            group.create_task(enter(entered, name, order))
            await asyncio.sleep(0)
        assert order == []
        assert entered.admission.queued == 2
        entered.leave(RequestId("first"))
    assert order == ["second", "third"]
    assert idle(entered)


async def test_a_wait_past_the_deadline_ends_with_it() -> None:
    entered = gate()
    async with entered.enter(RequestId("first"), None):
        with pytest.raises(DeadlineExceeded, match="waited"):
            async with entered.enter(RequestId("late"), MonotonicClock().now() + 0.01):
                pytest.fail("it must not be admitted")
        assert entered.admission.queued == 0
    assert idle(entered)


async def test_a_cancelled_waiter_leaves_nothing_behind() -> None:
    entered, order = gate(), list[str]()
    async with entered.enter(RequestId("first"), None):
        waiting = asyncio.create_task(enter(entered, "second", order))
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
    assert order == []
    assert idle(entered)


async def test_a_waiter_cancelled_at_the_moment_of_its_turn_gives_the_slot_on() -> None:
    entered, order = gate(), list[str]()
    async with AsyncExitStack() as stack:
        slot = await stack.enter_async_context(entered.enter(RequestId("first"), None))
        second = asyncio.create_task(enter(entered, "second", order))
        third = asyncio.create_task(enter(entered, "third", order))
        await asyncio.sleep(0)
        slot.release()
        second.cancel()
        await asyncio.gather(second, third, return_exceptions=True)
    assert order == ["third"]
    assert idle(entered)


async def test_a_slot_is_released_once() -> None:
    entered = gate(slots=2)
    async with entered.enter(RequestId("other"), None):
        async with entered.enter(RequestId("a"), None) as slot:
            slot.release()
            slot.release()
            assert entered.admission.in_flight == 1
        assert entered.admission.in_flight == 1
    assert idle(entered)


async def test_a_full_queue_refuses_at_once() -> None:
    entered = gate(slots=1, queue=0)
    async with entered.enter(RequestId("first"), None):
        with pytest.raises(Overloaded):
            async with entered.enter(RequestId("second"), None):
                pytest.fail("it must not be admitted")
    assert idle(entered)
