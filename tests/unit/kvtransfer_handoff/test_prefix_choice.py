"""To fetch a prefix or to compute it is decided by predictions alone."""

import pytest

from pdserve.core.perfmodel import PerfModel
from pdserve.kvtransfer.handoff.prefix_choice import PrefixPlan, bare_movement, plan_prefix

BLOCK_BYTES = 1 << 20


def plan(perf: PerfModel, own: int, held: int, transport: str = "shm") -> PrefixPlan | None:
    return plan_prefix(
        perf, own=own, held=held, chunk_tokens=256, block_bytes=BLOCK_BYTES, transport=transport
    )


def model(token_s: float, fixed_s: float, byte_s: float) -> PerfModel:
    """A worker that prefills a token in `token_s`, over shm, which takes `fixed_s` and `byte_s` per byte."""
    perf = PerfModel()
    perf.restore(
        {
            "prefill/step_seconds": 0.0,
            "prefill/token_seconds": token_s,
            "prefill/attention_seconds": 0.0,
            "transfer/shm/latency_seconds": 0.0,
            "transfer/shm/byte_seconds": byte_s,
            "handoff/shm/fixed_seconds": fixed_s,
            "handoff/shm/unhidden_factor": 1.0,
        }
    )
    return perf


@pytest.mark.parametrize(("own", "held"), [(0, 0), (3, 3), (4, 3)])
def test_who_holds_no_more_has_nothing_to_give(own: int, held: int) -> None:
    assert plan(PerfModel(), own, held) is None


@pytest.mark.parametrize(
    ("token_s", "fixed_s", "byte_s", "pays"),
    [
        (1e-3, 5e-3, 1e-9, True),  # 16 ms a block against 5 ms and 1 ms a block
        (1e-4, 5e-3, 1e-9, False),  # 1.6 ms a block: two blocks do not pay for the messages
        (1e-3, 5e-3, 1e-7, False),  # 100 ms a block on the way
        (1e-3, 40e-3, 1e-9, False),
    ],
)
def test_the_cheaper_way_is_chosen(token_s: float, fixed_s: float, byte_s: float, pays: bool) -> None:
    chosen = plan(model(token_s, fixed_s, byte_s), 1, 3)
    assert chosen is not None
    assert chosen.missing == 2
    assert chosen.compute_s == pytest.approx(32 * token_s)
    assert chosen.fetch_s == pytest.approx(fixed_s + 2 * BLOCK_BYTES * byte_s)
    assert chosen.pays is pays


def test_with_more_blocks_the_messages_pay_off() -> None:
    perf = model(1e-4, 5e-3, 1e-9)
    answers = [chosen.pays for held in range(2, 40) if (chosen := plan(perf, 1, held)) is not None]
    assert answers == sorted(answers)  # once it pays, it pays for more
    assert set(answers) == {False, True}


def test_the_same_blocks_are_dearer_to_compute_behind_a_longer_prefix() -> None:
    perf = PerfModel()
    perf.restore({"prefill/attention_seconds": 1e-6})
    short, long = plan(perf, 0, 10), plan(perf, 100, 110)
    assert short is not None
    assert long is not None
    assert long.compute_s > short.compute_s
    assert long.fetch_s == short.fetch_s


def test_who_knows_nothing_fetches_by_its_priors() -> None:
    chosen = plan(PerfModel(), 0, 8, "tcp")
    assert chosen is not None
    assert chosen.pays


def test_fetches_that_turn_out_slow_are_not_repeated() -> None:
    perf = model(1e-3, 5e-3, 1e-9)
    for _ in range(40):
        perf.observe_handoff(bare_movement(2 * BLOCK_BYTES), "shm", 0.2)
    chosen = plan(perf, 1, 3)
    assert chosen is not None
    assert not chosen.pays


@pytest.mark.parametrize(("fetch_s", "patience_s"), [(1e-3, 0.5), (0.1, 0.5), (1.0, 4.0)])
def test_patience_is_a_multiple_of_what_was_predicted(fetch_s: float, patience_s: float) -> None:
    assert PrefixPlan(4, 0, 10.0, fetch_s).patience_s == pytest.approx(patience_s)
