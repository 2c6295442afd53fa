"""The choice between handoff and owner, on a scripted sweep of prompts, loads, caches and links.

Virtual time, noisy machines, models that learnt from records: see disaggregation_sim.py.
"""

import itertools

import pytest
from disaggregation_sim import (
    CPU,
    GPU,
    Machine,
    Point,
    Run,
    fresh_models,
    others_alone_s,
    regret,
    trained_models,
)

from pdserve.core.handoff_overhead import Movement
from pdserve.core.perfmodel import PerfModel, Prediction, StepRecord
from pdserve.core.types import Disaggregation
from pdserve.router.policies import conditional
from pdserve.router.policies.hybrid import HybridPolicy
from pdserve.router.view import WorkerView

WITHIN = 1.10

TOKENS = (24, 128, 512, 2048, 8192)
STREAMS = (0, 4, 16)
OTHERS = (0.0, 0.4, 0.7)
HELD = ((0.0, 0.0), (0.75, 0.0), (0.0, 0.75), (0.9, 0.5))
"""Shares of the prompt that P and D hold."""
SPEEDS: dict[Machine, tuple[float, ...]] = {CPU: (2e9, 2e8, 2e7), GPU: (2e10, 2e9, 2e8)}
"""Bytes per second: faster than the prefill, about as fast, slower."""

SWEEP = tuple(
    Point(machine, tokens, streams, others, *held, speed)
    for machine in (CPU, GPU)
    for tokens, streams, others, held, speed in itertools.product(
        TOKENS, STREAMS, OTHERS, HELD, SPEEDS[machine]
    )
)
SAMPLE = SWEEP[5::53]
"""53 and the number of values of each axis have no common factor: every value of each is there."""


def name(point: Point) -> str:
    machine = "cpu" if point.machine is CPU else "gpu"
    held = f"{point.held_p:g}-{point.held_d:g}"
    return (
        f"{machine}-{point.tokens}tokens-{point.streams}streams-{point.others:g}busy-{held}held-"
        f"{point.bytes_per_s:.0e}"
    )


def test_the_sample_has_every_value_of_every_axis() -> None:
    for axis in ("machine", "tokens", "streams", "others", "held_p", "bytes_per_s"):
        assert {getattr(p, axis) for p in SAMPLE} == {getattr(p, axis) for p in SWEEP}


@pytest.mark.parametrize("point", SAMPLE, ids=name)
def test_its_choice_is_within_a_tenth_of_the_better_of_always_and_never(point: Point) -> None:
    assert regret(point, seeds=1 if point.tokens > 2048 else 3) <= WITHIN


BLIND: dict[str, tuple[object, str, object, Point]] = {
    "running streams": (conditional, "STREAM_WEIGHT", 0.0, Point(GPU, 128, 16, 0.7, 0.0, 0.75, 2e8)),
    "queues": (WorkerView, "delay_s", lambda view, new: 0.0, Point(CPU, 128, 0, 0.4, 0.75, 0.0, 2e9)),
    "who comes later": (
        WorkerView,
        "queue_harm_s",
        lambda view, new, cached: 0.0,
        Point(CPU, 512, 4, 0.7, 0.0, 0.75, 2e8),
    ),
    "the transfer": (
        PerfModel,
        "handoff_seconds",
        lambda model, moved, transport: Prediction(1e-3, None),
        Point(CPU, 128, 0, 0.0, 0.75, 0.0, 2e7),
    ),
}
"""Each term of the inequality, what leaves it out, and a point where that is a mistake."""


@pytest.mark.parametrize("term", BLIND)
def test_no_term_can_be_left_out(term: str, monkeypatch: pytest.MonkeyPatch) -> None:
    target, attribute, blind, point = BLIND[term]
    assert regret(point) <= WITHIN
    monkeypatch.setattr(target, attribute, blind)
    assert regret(point) > WITHIN


def test_without_others_in_the_way_the_predicted_time_is_the_time() -> None:
    """The error that is exported: of the way that was taken, as the model knew it before."""
    for mode in (Disaggregation.ALWAYS, Disaggregation.NEVER):
        for tokens, streams in ((128, 4), (2048, 0), (2048, 16)):
            point = Point(CPU, tokens, streams, 0.0, 0.0, 0.5, 2e8, load=0.01)
            run = Run(point, HybridPolicy(mode), trained_models(CPU, 2e8), 40, 0).play()
            assert run.predicted_within(0.25) >= 0.9, (mode, tokens, streams, run.errors)


@pytest.mark.parametrize(
    "point",
    [
        Point(GPU, 512, 0, 0.0, 0.0, 0.0, 2e8, load=0.1),
        Point(CPU, 512, 4, 0.4, 0.0, 0.5, 2e9),
        Point(GPU, 2048, 4, 0.4, 0.75, 0.0, 2e10),
        Point(CPU, 128, 0, 0.0, 0.75, 0.0, 2e7),
    ],
    ids=name,
)
def test_novices_learn_their_speeds_and_ways(point: Point) -> None:
    """From priors that are wrong by orders of magnitude, in one run, its mistakes included."""
    count = 150
    alone = others_alone_s(point, count, 0)
    cost = (
        Run(point, HybridPolicy(), fresh_models(), count, 0, met=False, learns=True).play().cost_s() - alone
    )
    modes = (Disaggregation.ALWAYS, Disaggregation.NEVER)
    trained = [
        Run(point, HybridPolicy(mode), trained_models(point.machine, point.bytes_per_s), count, 0).play()
        for mode in modes
    ]
    assert cost <= 1.15 * min(run.cost_s() - alone for run in trained)


def lose_faith_in_handoffs(perf_d: PerfModel) -> None:
    for _ in range(20):
        perf_d.observe_handoff(Movement(0, 0, 0.0), "way", 0.4)


@pytest.mark.parametrize("wrong", ["handoffs", "owner"])
def test_a_way_that_was_once_slow_is_tried_again_and_found_to_be_good(wrong: str) -> None:
    """Nobody takes it for what it seems to cost, so nothing but exploring could correct that."""
    perf_p, perf_d = trained_models(CPU, 2e9)
    if wrong == "handoffs":
        point, good = Point(CPU, 512, 0, 0.0, 0.75, 0.0, 2e9, load=0.1), True
        lose_faith_in_handoffs(perf_d)
    else:
        point, good = Point(CPU, 128, 0, 0.0, 0.0, 0.0, 2e8, load=0.1), False
        for _ in range(60):
            perf_d.observe_step(StepRecord(0.2, 128, 128**2))
    run = Run(point, HybridPolicy(), (perf_p, perf_d), 1000, 0, learns=True).play()
    ways = [way is good for way in run.handed_off]
    assert not any(ways[:10]), "the way was not shunned: nothing is shown"
    assert sum(ways[-50:]) >= 45


def test_exploring_costs_little_where_it_finds_nothing() -> None:
    point = Point(CPU, 512, 0, 0.0, 0.0, 0.0, 2e7, load=0.1)
    models = trained_models(CPU, 2e7)
    explorer = Run(point, HybridPolicy(), models, 400, 0).play()
    never = Run(point, HybridPolicy(Disaggregation.NEVER), trained_models(CPU, 2e7), 400, 0).play()
    assert any(explorer.handed_off), "nothing was tried"
    assert explorer.cost_s() <= 1.03 * never.cost_s()


@pytest.mark.full
@pytest.mark.timeout(3000)
def test_its_choice_is_within_a_tenth_on_the_whole_sweep() -> None:
    ratios = {name(point): regret(point) for point in SWEEP}
    assert not {point: ratio for point, ratio in ratios.items() if ratio > WITHIN}
