"""Predictions learn the machine, say how wrong they are, and never become impossible."""

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdserve.core.linearfit import LinearFit
from pdserve.core.perfmodel import PerfModel, StepRecord, TransferRecord, prefill_attention

Truth = tuple[float, float, float, float, float, float]
TRUTH: Truth = (0.02, 1 / 12_000, 1 / (12_000 * 60_000), 0.012, 5e-4, 1e-6)


def truth_prefill(truth: Truth, new: int, cached: int, chunk: int) -> float:
    steps = -(-new // chunk)
    return truth[0] * steps + truth[1] * new + truth[2] * prefill_attention(new, cached)


def truth_decode(truth: Truth, batch: int, context: int) -> float:
    return truth[3] + truth[4] * batch + truth[5] * context


def feed(
    model: PerfModel, truth: Truth, records: int, *, noise: float = 0.1, seed: int = 0, mixed: bool = False
) -> None:
    rng = random.Random(seed)
    for _ in range(records):
        prefill = rng.random() < 0.5
        new = rng.choice([16, 64, 256, 512]) if prefill or mixed else 0
        cached = rng.choice([0, 0, 512, 2048, 6000])
        batch = rng.randint(1, 32) if not prefill or mixed else 0
        context = sum(rng.randint(100, 3000) for _ in range(batch))
        seconds = truth_prefill(truth, new, cached, 512) if new else 0.0
        seconds += truth_decode(truth, batch, context) if batch else 0.0
        model.observe_step(
            StepRecord(
                seconds * (1 + noise * rng.uniform(-1, 1)),
                prefill_tokens=new,
                prefill_attention=prefill_attention(new, cached) if new else 0,
                decode_sequences=batch,
                decode_context=context,
            )
        )


@pytest.mark.parametrize("speed", [1e-3, 1.0, 300.0])
@pytest.mark.parametrize("mixed", [False, True])
def test_known_coefficients_are_recovered_under_noise_at_any_speed(speed: float, mixed: bool) -> None:
    truth: Truth = tuple(speed * value for value in TRUTH)  # type: ignore[assignment]
    model = PerfModel()
    feed(model, truth, 400, mixed=mixed)
    for new, cached in ((512, 0), (2000, 0), (300, 4000)):
        expected = truth_prefill(truth, new, cached, 512)
        assert model.prefill_seconds(new, cached, 512).seconds == pytest.approx(expected, rel=0.2)
    for batch, context in ((1, 500), (16, 20_000), (32, 60_000)):
        expected = truth_decode(truth, batch, context)
        assert model.decode_step_seconds(batch, context).seconds == pytest.approx(expected, rel=0.35)


def test_exact_records_are_reproduced_exactly() -> None:
    model = PerfModel()
    feed(model, TRUTH, 300, noise=0.0)
    expected = truth_decode(TRUTH, 8, 9000)
    assert model.decode_step_seconds(8, 9000).seconds == pytest.approx(expected, rel=0.01)
    assert model.prefill_seconds(700, 100, 256).seconds == pytest.approx(
        truth_prefill(TRUTH, 700, 100, 256), rel=0.01
    )


def test_the_stated_error_shrinks_with_records_to_the_size_of_the_noise() -> None:
    model = PerfModel()
    feed(model, TRUTH, 24)
    early = model.decode_step_seconds(8, 8000).relative_error
    feed(model, TRUTH, 400, seed=1)
    late = model.decode_step_seconds(8, 8000).relative_error
    assert early is not None
    assert late is not None
    assert late < early
    assert late < 0.1


def test_an_empty_model_predicts_its_prior_and_claims_no_error() -> None:
    model = PerfModel()
    for prediction in (
        model.prefill_seconds(1000, 0, 256),
        model.decode_step_seconds(4, 4000),
        model.transfer_seconds(1 << 20, "tcp"),
    ):
        assert 0.0 < prediction.seconds < 60.0
        assert prediction.relative_error is None


def test_no_work_takes_no_time() -> None:
    assert PerfModel().prefill_seconds(0, 500, 256).seconds == 0.0
    assert PerfModel().decode_step_seconds(0, 0).seconds == 0.0


def test_impossible_questions_are_refused() -> None:
    model = PerfModel()
    with pytest.raises(ValueError, match="chunks of 0"):
        model.prefill_seconds(10, 0, 0)
    with pytest.raises(ValueError, match="-1 sequences"):
        model.decode_step_seconds(-1, 0)
    with pytest.raises(ValueError, match="-5 bytes"):
        model.transfer_seconds(-5, "tcp")


@pytest.mark.parametrize("factor", [0.25, 4.0])
def test_a_change_of_speed_is_followed(factor: float) -> None:
    changed: Truth = tuple(factor * value for value in TRUTH)  # type: ignore[assignment]
    model = PerfModel()
    feed(model, TRUTH, 500)
    feed(model, changed, 60, seed=3)
    assert model.decode_step_seconds(8, 9000).seconds == pytest.approx(
        truth_decode(changed, 8, 9000), rel=0.3
    )


def test_one_slow_step_does_not_move_a_settled_model() -> None:
    model = PerfModel()
    feed(model, TRUTH, 300)
    before = model.decode_step_seconds(8, 9000).seconds
    model.observe_step(StepRecord(20.0, decode_sequences=8, decode_context=9000))
    assert model.decode_step_seconds(8, 9000).seconds == pytest.approx(before, rel=0.05)


def test_slow_first_steps_are_forgotten() -> None:
    model = PerfModel()
    for seconds in (30.0, 5.0):
        model.observe_step(StepRecord(seconds, decode_sequences=4, decode_context=400))
    feed(model, TRUTH, 60)
    assert model.decode_step_seconds(8, 9000).seconds == pytest.approx(truth_decode(TRUTH, 8, 9000), rel=0.3)


def test_decoding_alone_does_not_unlearn_prefill() -> None:
    model = PerfModel()
    feed(model, TRUTH, 300)
    before = model.prefill_seconds(1000, 0, 256)
    for _ in range(500):
        model.observe_step(StepRecord(truth_decode(TRUTH, 8, 8000), decode_sequences=8, decode_context=8000))
    after = model.prefill_seconds(1000, 0, 256)
    assert after.seconds == pytest.approx(before.seconds, rel=0.02)


def test_collinear_records_do_not_explode() -> None:
    """Always the same batch and context: nothing tells the terms apart, and nothing needs to."""
    model = PerfModel()
    rng = random.Random(0)
    for _ in range(2000):
        seconds = 0.05 * (1 + 0.1 * rng.uniform(-1, 1))
        model.observe_step(StepRecord(seconds, decode_sequences=8, decode_context=8000))
    assert model.decode_step_seconds(8, 8000).seconds == pytest.approx(0.05, rel=0.05)
    assert 0.01 < model.decode_step_seconds(16, 16_000).seconds <= 0.11


records = st.builds(
    StepRecord,
    seconds=st.floats(1e-7, 1e5),
    prefill_tokens=st.integers(0, 100_000),
    prefill_attention=st.integers(0, 10**11),
    decode_sequences=st.integers(0, 5000),
    decode_context=st.integers(0, 10**8),
)


@settings(deadline=None, max_examples=60)
@given(st.lists(records, max_size=40))
def test_whatever_was_observed_coefficients_stay_non_negative_and_finite(history: list[StepRecord]) -> None:
    model = PerfModel()
    for record in history:
        model.observe_step(record)
    assert all(0.0 <= value < float("inf") for value in model.snapshot().values())
    assert 0.0 < model.prefill_seconds(100, 50, 64).seconds < float("inf")
    assert 0.0 < model.decode_step_seconds(3, 300).seconds < float("inf")


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan"), float("inf")])
def test_records_that_say_nothing_change_nothing(seconds: float) -> None:
    model = PerfModel()
    feed(model, TRUTH, 50)
    before = model.snapshot()
    model.observe_step(StepRecord(seconds, decode_sequences=4, decode_context=100))
    model.observe_step(StepRecord(1.0))
    model.observe_transfer(TransferRecord(seconds, 100, "tcp"))
    assert model.snapshot() == before


def test_bandwidth_and_latency_are_learned_per_transport() -> None:
    model = PerfModel()
    rng = random.Random(0)
    pairs = {"shm": (2e-4, 8e9), "tcp": (5e-3, 3e8)}
    for _ in range(200):
        for transport, (latency, bandwidth) in pairs.items():
            size = rng.choice([1 << 16, 1 << 20, 1 << 24])
            seconds = (latency + size / bandwidth) * rng.uniform(0.9, 1.1)
            model.observe_transfer(TransferRecord(seconds, size, transport))
    for transport, (latency, bandwidth) in pairs.items():
        for size in (1 << 16, 1 << 22):
            prediction = model.transfer_seconds(size, transport)
            assert prediction.seconds == pytest.approx(latency + size / bandwidth, rel=0.15)
            assert prediction.relative_error is not None
            assert prediction.relative_error < 0.15


def test_a_snapshot_makes_the_same_predictions_elsewhere() -> None:
    worker, router = PerfModel(), PerfModel()
    feed(worker, TRUTH, 100)
    for _ in range(20):
        worker.observe_transfer(TransferRecord(0.01, 1 << 20, "host:7001/tcp"))
    router.observe_transfer(TransferRecord(1.0, 1, "gone"))
    router.restore(json.loads(json.dumps(worker.snapshot())))
    assert router.snapshot() == worker.snapshot()
    assert router.prefill_seconds(999, 77, 128) == worker.prefill_seconds(999, 77, 128)
    assert router.decode_step_seconds(9, 999) == worker.decode_step_seconds(9, 999)
    assert router.transfer_seconds(999, "host:7001/tcp") == worker.transfer_seconds(999, "host:7001/tcp")


def test_a_restored_model_goes_on_learning() -> None:
    model = PerfModel()
    model.restore({"decode/step_seconds": 5.0})
    feed(model, TRUTH, 200)
    assert model.decode_step_seconds(8, 9000).seconds == pytest.approx(truth_decode(TRUTH, 8, 9000), rel=0.2)


def test_a_snapshot_of_another_version_is_read_as_far_as_it_is_known() -> None:
    model = PerfModel()
    model.restore({"decode/step_seconds": 0.5, "decode/moon_phase": 3.0})
    expected = PerfModel().snapshot() | {"decode/step_seconds": 0.5}
    assert model.snapshot() == expected


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_an_impossible_snapshot_is_refused_and_changes_nothing(value: float) -> None:
    model = PerfModel()
    before = model.snapshot()
    with pytest.raises(ValueError, match="prefill/step_seconds"):
        model.restore({"decode/step_seconds": 0.5, "prefill/step_seconds": value})
    assert model.snapshot() == before


@given(st.integers(1, 5000), st.integers(0, 5000), st.data())
def test_the_attention_terms_of_chunks_add_up(new: int, cached: int, data: st.DataObject) -> None:
    first = data.draw(st.integers(0, new))
    whole = prefill_attention(new, cached)
    assert prefill_attention(first, cached) + prefill_attention(new - first, cached + first) == whole


def test_a_fit_needs_a_positive_prior() -> None:
    with pytest.raises(ValueError, match="positive"):
        LinearFit((1.0, 0.0))
