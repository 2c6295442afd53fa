import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdserve.client import RetryPolicy
from pdserve.core.errors import InvalidRequest, Overloaded, Unavailable, WorkerLost


def test_waits_grow_up_to_the_cap() -> None:
    policy = RetryPolicy(attempts=6, base_s=0.1, factor=3.0, cap_s=1.0)
    waits = [policy.delay(Unavailable("x"), attempt, None, jitter=1.0) for attempt in range(1, 7)]
    assert waits == [pytest.approx(0.1), pytest.approx(0.3), pytest.approx(0.9), 1.0, 1.0, None]


@given(st.floats(0, 1, exclude_max=True), st.integers(1, 2))
def test_jitter_stays_between_half_and_whole(jitter: float, attempt: int) -> None:
    policy = RetryPolicy()
    most = policy.delay(Unavailable("x"), attempt, None, jitter=1.0)
    delay = policy.delay(Unavailable("x"), attempt, None, jitter)
    assert most is not None
    assert delay is not None
    assert most / 2 <= delay <= most


def test_the_servers_wish_is_a_lower_bound() -> None:
    policy = RetryPolicy()
    assert policy.delay(Unavailable("x", retry_after_s=7.0), 1, None, 0.0) == 7.0
    assert policy.delay(Unavailable("x", retry_after_s=0.0), 1, None, 1.0) == pytest.approx(0.1)


def test_a_wait_past_the_deadline_is_not_begun() -> None:
    policy = RetryPolicy()
    assert policy.delay(Unavailable("x"), 1, 0.05, 1.0) is None
    assert policy.delay(Unavailable("x"), 1, 0.2, 1.0) is not None


def test_only_what_nobody_took_is_tried_again() -> None:
    policy = RetryPolicy()
    assert policy.delay(WorkerLost("x"), 1, None, 0.0) is not None
    assert policy.delay(Overloaded("x"), 1, None, 0.0) is None
    assert policy.delay(InvalidRequest("x"), 1, None, 0.0) is None
