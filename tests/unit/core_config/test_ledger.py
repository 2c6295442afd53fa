"""The ledger adds up."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdserve.core.lifecycle import Ledger, Lifecycle

PARTS = (
    "queue",
    "locate",
    "place",
    "retry",
    "prefill_queue",
    "prefill",
    "exposed_transfer",
    "first_step",
    "network",
)
seconds = st.floats(min_value=0.0, max_value=1e3)


def test_parts_are_listed_in_the_order_of_time() -> None:
    assert tuple(Ledger().parts()) == PARTS


@given(st.lists(seconds, min_size=8, max_size=8), seconds)
def test_a_closed_ledger_sums_to_the_measured_time(known: list[float], rest: float) -> None:
    ttft_s = sum(known) + rest
    ledger = Ledger(*known).close(ttft_s)
    assert ledger.total() == pytest.approx(ttft_s)
    assert sum(ledger.parts().values()) == ledger.total()
    assert ledger.network == pytest.approx(rest, abs=1e-9)


def test_closing_again_corrects_the_rest_only() -> None:
    ledger = Ledger(queue=0.5, prefill=1.0).close(2.0)
    assert ledger.network == 0.5
    assert ledger.close(1.75) == Ledger(queue=0.5, prefill=1.0, network=0.25)


def test_event_names_are_unique_and_plain() -> None:
    names = [str(event) for event in Lifecycle]
    assert len(set(names)) == len(names)
    assert all(name == event.name.lower() for name, event in zip(names, Lifecycle, strict=True))
