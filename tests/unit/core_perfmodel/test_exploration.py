"""Exploring is a budget: earned by the way that is taken, spent by the other, never more than a share."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdserve.core.exploration import Exploration, PrefillPath

LOCAL, HANDOFF = PrefillPath.LOCAL, PrefillPath.HANDOFF


def test_a_way_earns_credit_while_the_other_is_taken_and_spends_it_whole() -> None:
    book = Exploration()
    for _ in range(50):
        book.took(LOCAL, 2.0)
    assert book.credit_s(HANDOFF) == pytest.approx(1.0)
    assert book.credit_s(LOCAL) == 0.0
    book.took(HANDOFF, 0.1)
    assert book.credit_s(HANDOFF) == 0.0
    assert book.credit_s(LOCAL) == pytest.approx(0.001)


@given(st.lists(st.tuples(st.floats(0.001, 5.0), st.floats(0.0, 50.0)), min_size=1, max_size=300))
def test_what_is_lost_by_exploring_is_a_small_share_of_all_time(requests: list[tuple[float, float]]) -> None:
    """Each request: what the better way takes, and how much more the other one."""
    book, spent, lost = Exploration(), 0.0, 0.0
    for seconds, loss in requests:
        if 0.0 < loss <= book.credit_s(HANDOFF):
            book.took(HANDOFF, seconds + loss)
            lost += loss
        else:
            book.took(LOCAL, seconds)
        spent += seconds
    assert lost <= 0.01 * spent + 1e-9


def test_no_single_request_pays_for_hours() -> None:
    book = Exploration()
    book.took(LOCAL, 1e9)
    assert book.credit_s(HANDOFF) == 10.0


def test_credits_travel_in_a_snapshot_among_other_things() -> None:
    book = Exploration()
    book.took(HANDOFF, 3.0)
    again = Exploration({**book.snapshot(), "prefill/step_seconds": 1.0})
    assert [again.credit_s(path) for path in PrefillPath] == [book.credit_s(path) for path in PrefillPath]
