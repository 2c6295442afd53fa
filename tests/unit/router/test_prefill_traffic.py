"""What comes to a worker, from totals in its heartbeats."""

import random

import pytest

from pdserve.router.prefill_traffic import PrefillTraffic, Traffic


def watched(rate: float, each_s: float, seconds: float = 300.0, beat_s: float = 0.25) -> PrefillTraffic:
    """`rate` prompts a second at random times, `each_s` each."""
    traffic, rng = PrefillTraffic(), random.Random(0)
    prefills, coming = 0, rng.expovariate(rate)
    for beat in range(int(seconds / beat_s)):
        at = beat * beat_s
        while coming < at:
            prefills += 1
            coming += rng.expovariate(rate)
        traffic.beat(at, prefills, prefills * each_s)
    return traffic


def test_rate_and_busy_time_are_those_of_the_last_minute() -> None:
    now = watched(4.0, 0.1).now
    assert now.prefills_per_s == pytest.approx(4.0, rel=0.2)
    assert now.busy == pytest.approx(0.4, rel=0.2)


def test_the_first_seconds_count_as_they_are() -> None:
    traffic = PrefillTraffic()
    traffic.beat(100.0, 50, 20.0)
    assert traffic.now == Traffic(), "totals of a time before are no news"
    traffic.beat(101.0, 54, 20.5)
    assert traffic.now == Traffic(4.0, 0.5)


def test_a_rush_is_forgotten() -> None:
    traffic = watched(4.0, 0.1)
    for second in range(300):
        traffic.beat(300.0 + second, 10**6, 10.0**6)
    assert traffic.now.prefills_per_s < 0.1 * 10**6 / 60
    traffic.beat(10_000.0, 10**6, 10.0**6)
    assert traffic.now.busy < 0.01


def test_two_beats_of_one_moment_are_one() -> None:
    traffic = PrefillTraffic()
    traffic.beat(1.0, 0, 0.0)
    traffic.beat(1.0, 5, 1.0)
    traffic.beat(2.0, 6, 1.0)
    assert traffic.now.prefills_per_s == 1.0


def test_a_queue_falls_to_what_stands_there_on_average_and_rises_to_it() -> None:
    traffic = Traffic(prefills_per_s=2.0, busy=0.5)
    assert traffic.standing_s == pytest.approx(0.125)
    assert traffic.expected_s(1.0, 0.2) == pytest.approx(0.9)
    assert traffic.expected_s(1.0, 100.0) == traffic.standing_s
    assert traffic.expected_s(0.0, 0.1) == pytest.approx(0.05)
    assert traffic.expected_s(0.0, 100.0) == traffic.standing_s


def test_where_nothing_comes_a_queue_is_worked_off() -> None:
    assert Traffic().expected_s(1.0, 0.25) == 0.75
    assert Traffic().expected_s(0.1, 5.0) == 0.0


def test_a_worker_that_is_never_idle_has_a_finite_queue() -> None:
    assert 0.0 < Traffic(1.0, 1.0).standing_s < 60.0
