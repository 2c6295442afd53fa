"""How long D may do without blocks: pure properties of the decision."""

import random
from dataclasses import replace

import pytest

from pdserve.core.perfmodel import Prediction
from pdserve.kvtransfer.handoff.late_reservation import LEAST_WAIT_S, Demand, FillForecast, may_wait_s

TIGHT = Demand(available=10, own=8, others=8)
ROOMY = Demand(available=16, own=8, others=8)
FILL = FillForecast(opened_at=100.0, estimate_s=10.0, blocks=40).announced(101.0, 4)
SURE = Prediction(1.0, 0.0)


def wait(
    now: float = 101.0,
    fill: FillForecast = FILL,
    fill_error: float | None = 0.0,
    transfer: Prediction = SURE,
    demand: Demand = TIGHT,
    filled: bool = False,
) -> float:
    return may_wait_s(now, fill, fill_error, transfer, demand, filled=filled)


def test_a_sure_wait_ends_where_the_transfer_just_fits() -> None:
    assert wait() == pytest.approx(100.0 + 10.0 - 1.0 - 101.0)


@pytest.mark.parametrize(
    "reason",
    [
        {"fill_error": None},
        {"transfer": Prediction(1.0, None)},
        {"demand": ROOMY},
        {"demand": replace(TIGHT, others=0)},
        {"filled": True},
        {"now": 109.5},
        {"transfer": Prediction(60.0, 0.0)},
        {"fill": replace(FILL, estimate_s=float("nan"), first=None, latest=None)},
        {"fill": replace(FILL, estimate_s=float("inf"), first=None, latest=None)},
    ],
    ids=[
        "fill error unknown",
        "transfer error unknown",
        "room for all",
        "nobody else",
        "filled",
        "late",
        "slow link",
        "nan",
        "infinite",
    ],
)
def test_there_is_no_wait_without_a_reason(reason: dict[str, object]) -> None:
    assert wait() > 0
    assert wait(**reason) == 0.0  # type: ignore[arg-type]


def test_a_longer_fill_waits_longer() -> None:
    waits = [wait(fill=replace(FILL, estimate_s=s, first=None, latest=None)) for s in (4.0, 8.0, 16.0, 64.0)]
    assert waits == sorted(set(waits))


def test_more_bytes_and_larger_errors_wait_less() -> None:
    for tries in (
        [wait(transfer=Prediction(s, 0.0)) for s in (0.1, 1.0, 4.0)],
        [wait(transfer=Prediction(1.0, error)) for error in (0.0, 0.2, 0.9)],
        [wait(fill_error=error) for error in (0.0, 0.1, 0.3)],
    ):
        assert tries == sorted(set(tries), reverse=True)


def test_no_wait_is_too_short_to_be_worth_it() -> None:
    assert wait(now=109.0 - LEAST_WAIT_S / 2) == 0.0


def test_one_announcement_bounds_what_p_said() -> None:
    """P said 10 s, most of it queue; the queue vanished."""
    early = FillForecast(100.0, 10.0, 40).announced(100.2, 10)
    assert early.earliest_end(0.0) == pytest.approx(100.8)
    late = FillForecast(100.0, 10.0, 40).announced(109.0, 10)
    assert late.earliest_end(0.0) == pytest.approx(110.0)


def test_what_p_had_cached_shows_no_pace() -> None:
    fill = FillForecast(100.0, 10.0, 40, cached=20)
    assert fill.announced(100.1, 20).earliest_end(0.0) == pytest.approx(110.0)
    assert fill.announced(100.1, 22).earliest_end(0.0) == pytest.approx(101.0)


def test_two_announcements_correct_p_in_both_directions() -> None:
    slow = FILL.announced(105.0, 8)
    fast = FILL.announced(101.4, 8)
    assert slow.earliest_end(0.0) == pytest.approx(105.0 + 32.0)
    assert fast.earliest_end(0.0) == pytest.approx(101.4 + 3.2)


def test_the_last_announcement_ends_every_wait() -> None:
    for error in (0.0, 0.5):
        done = FILL.announced(130.0, 40)
        assert done.earliest_end(error) == 130.0
        assert wait(now=130.0, fill=done) == 0.0


def test_with_errors_inside_their_bounds_no_transfer_outlasts_the_fill() -> None:
    """Random fills at an even pace behind a queue, predictions wrong by up to twice the stated mean error."""
    draw = random.Random(7)
    waited = 0
    for _ in range(300):
        error, blocks = draw.uniform(0.0, 0.4), draw.randint(2, 60)
        queue, step = draw.uniform(0.0, 3.0), draw.uniform(0.01, 0.2)
        end = queue + blocks * step
        said = end * (1 + draw.uniform(0.0, 2 * error))
        true_s = draw.uniform(0.01, end)
        transfer = Prediction(true_s / (1 + draw.uniform(0.0, 2 * error)), error)
        fill = FillForecast(0.0, said, blocks)
        due = None
        for block in range(1, blocks + 1):
            now = queue + block * step
            if due is not None and now >= due:
                break
            fill = fill.announced(now, block)
            patience = wait(now, fill, error, transfer)
            due = now + patience
            if patience == 0.0:
                break
            waited += 1
            assert due + true_s <= end + 1e-9
    assert waited > 300
