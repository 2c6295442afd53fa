"""Admission: bounds, order and conservation."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from pdserve.core.errors import DeadlineExceeded, Overloaded
from pdserve.core.types import RequestId
from pdserve.router.admission import Admission, Admitted


def ids(*names: str) -> tuple[RequestId, ...]:
    return tuple(RequestId(name) for name in names)


def test_slots_then_queue_then_refusal() -> None:
    admission = Admission(1, 1)
    assert admission.arrive(RequestId("a"), None, 0.0) is Admitted.NOW
    assert admission.arrive(RequestId("b"), None, 0.0) is Admitted.QUEUED
    with pytest.raises(Overloaded, match=r"limit 1.*limit 1") as refusal:
        admission.arrive(RequestId("c"), None, 0.0)
    assert refusal.value.retry_after_s is not None
    assert refusal.value.retry_after_s > 0.0


def test_a_freed_slot_goes_to_the_longest_waiting() -> None:
    admission = Admission(1, 3)
    for name in "abc":
        admission.arrive(RequestId(name), None, 0.0)
    assert admission.leave(RequestId("a"), 1.0) == ids("b")
    assert admission.leave(RequestId("b"), 2.0) == ids("c")
    assert admission.leave(RequestId("c"), 3.0) == ()
    assert (admission.in_flight, admission.queued) == (0, 0)


def test_a_newcomer_does_not_overtake_the_queue() -> None:
    admission = Admission(2, 4)
    for name in "abc":
        admission.arrive(RequestId(name), None, 0.0)
    admission.leave(RequestId("c"), 0.0)
    admission.arrive(RequestId("d"), None, 0.0)
    assert admission.arrive(RequestId("e"), None, 0.0) is Admitted.QUEUED
    assert admission.leave(RequestId("a"), 0.0) == ids("d")


def test_one_that_gives_up_waiting_frees_its_place() -> None:
    admission = Admission(1, 1)
    admission.arrive(RequestId("a"), None, 0.0)
    admission.arrive(RequestId("b"), None, 0.0)
    assert admission.leave(RequestId("b"), 0.0) == ()
    assert admission.arrive(RequestId("c"), None, 0.0) is Admitted.QUEUED


def test_an_expired_request_is_never_admitted() -> None:
    admission = Admission(1, 2)
    with pytest.raises(DeadlineExceeded):
        admission.arrive(RequestId("late"), 1.0, 1.0)
    admission.arrive(RequestId("a"), None, 0.0)
    admission.arrive(RequestId("b"), 5.0, 0.0)
    admission.arrive(RequestId("c"), None, 0.0)
    assert admission.leave(RequestId("a"), 6.0) == ids("c")
    assert admission.leave(RequestId("b"), 6.0) == ()


def test_an_expired_waiter_takes_nobodys_place() -> None:
    admission = Admission(1, 1)
    admission.arrive(RequestId("a"), None, 0.0)
    admission.arrive(RequestId("b"), 5.0, 0.0)
    assert admission.arrive(RequestId("c"), None, 6.0) is Admitted.QUEUED
    assert admission.knows(RequestId("b"))


def test_retry_after_follows_the_pace_of_endings() -> None:
    def after(interval_s: float) -> float:
        admission = Admission(1, 10)
        for number in range(60):
            admission.arrive(RequestId(str(number)), None, number * interval_s)
            admission.leave(RequestId(str(number)), number * interval_s)
        return admission.retry_after_s()

    assert after(2.0) > after(0.5) > after(0.2)


class AdmissionMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.admission = Admission(3, 4)
        self.next = 0
        self.now = 0.0
        self.known: list[RequestId] = []
        self.running: list[RequestId] = []

    @rule(wait=st.none() | st.floats(0.1, 5.0))
    def arrive(self, wait: float | None) -> None:
        request = RequestId(str(self.next))
        self.next += 1
        deadline = None if wait is None else self.now + wait
        try:
            admitted = self.admission.arrive(request, deadline, self.now)
        except Overloaded:
            assert self.admission.in_flight == 3
            assert self.admission.queued == 4
            return
        self.known.append(request)
        if admitted is Admitted.NOW:
            self.running.append(request)

    @precondition(lambda self: self.known)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(self.known))
        self.known.remove(request)
        if request in self.running:
            self.running.remove(request)
        admitted = self.admission.leave(request, self.now)
        assert set(admitted) <= set(self.known) - set(self.running)
        self.running += admitted

    @rule(seconds=st.floats(0.0, 3.0))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @invariant()
    def everybody_is_counted_once(self) -> None:
        self.admission.check_integrity()
        assert self.admission.in_flight == len(self.running)
        assert all(self.admission.knows(request) for request in self.known)
        assert self.admission.in_flight + self.admission.queued <= len(self.known)


TestAdmissionMachine = AdmissionMachine.TestCase
TestAdmissionMachine.settings = settings(max_examples=30, stateful_step_count=30, deadline=None)


def test_an_idle_hour_is_not_taken_for_slow_service() -> None:
    admission = Admission(1, 1)
    for number in range(20):
        admission.arrive(RequestId(f"a{number}"), None, float(number) / 10)
        admission.leave(RequestId(f"a{number}"), float(number) / 10)
    before = admission.retry_after_s()
    admission = Admission(2, 1)
    admission.arrive(RequestId("b"), None, 0.0)
    admission.leave(RequestId("b"), 0.0)
    admission.arrive(RequestId("c"), None, 3600.0)
    admission.leave(RequestId("c"), 3600.0)
    assert admission.retry_after_s() <= max(before, Admission(2, 1).retry_after_s())
