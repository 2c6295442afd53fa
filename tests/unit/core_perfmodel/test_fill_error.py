"""What a worker learns about other workers' estimates of a prefill."""

import pytest

from pdserve.core.perfmodel import PerfModel


def test_the_error_is_unknown_until_there_are_enough_fills() -> None:
    model = PerfModel()
    for _ in range(8):
        assert model.fill_error is None
        model.observe_fill(3.0, 2.0)
    assert model.fill_error == pytest.approx(0.5)


@pytest.mark.parametrize(
    "fill", [(float("nan"), 1.0), (float("inf"), 1.0), (1.0, 0.0), (0.0, 0.005)], ids=str
)
def test_fills_that_say_nothing_are_left_out(fill: tuple[float, float]) -> None:
    model = PerfModel()
    for _ in range(20):
        model.observe_fill(*fill)
    assert model.fill_error is None


def test_the_error_travels_in_a_snapshot() -> None:
    model, other = PerfModel(), PerfModel()
    for _ in range(10):
        model.observe_fill(1.0, 2.0)
    other.restore(model.snapshot())
    assert other.fill_error == model.fill_error == pytest.approx(0.5)
