"""Suspicion: silence, or work without progress."""

from pdserve.router.liveness import Liveness


def test_silence_past_the_bound_is_suspect() -> None:
    alive = Liveness(3.0, 0.0)
    assert alive.suspect_for(3.0) == 0.0
    assert alive.suspect_for(4.0) == 1.0
    assert alive.silent(4.0)
    alive.beat(1, busy=False, now=4.0)
    assert alive.suspect_for(4.0) == 0.0


def test_work_without_progress_is_suspect_though_it_is_not_silent() -> None:
    alive = Liveness(3.0, 0.0)
    for now in range(1, 9):
        alive.beat(7, busy=True, now=float(now))
    assert alive.suspect_for(8.0) == 4.0
    assert not alive.silent(8.0)
    assert "no step" in alive.reason(8.0)
    alive.beat(8, busy=True, now=9.0)
    assert alive.suspect_for(9.0) == 0.0


def test_an_idle_engine_needs_no_progress() -> None:
    alive = Liveness(3.0, 0.0)
    for now in range(1, 20):
        alive.beat(7, busy=False, now=float(now))
    assert alive.suspect_for(19.0) == 0.0


def test_other_messages_break_the_silence_but_are_no_progress() -> None:
    alive = Liveness(3.0, 0.0)
    alive.beat(7, busy=True, now=1.0)
    alive.hear(5.0)
    assert not alive.silent(5.0)
    assert alive.suspect_for(5.0) == 1.0
