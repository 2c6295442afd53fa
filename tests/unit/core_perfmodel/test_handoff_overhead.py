"""What a handoff takes beside queue and prefill: what is hidden, what shows, and how that is learnt."""

import random

import pytest

from pdserve.core.handoff_overhead import Movement, movement
from pdserve.core.perfmodel import PerfModel, TransferRecord

MEGABYTE = 1_000_000


def moved(
    positions: int = 1000, *, cached: int = 0, held: int = 0, chunk: int = 256, prefill_s: float = 0.0
) -> Movement:
    return movement(
        positions=positions,
        cached=cached,
        held_blocks=held,
        chunk_tokens=chunk,
        block_bytes=MEGABYTE,
        prefill_s=prefill_s,
    )


@pytest.mark.parametrize(
    ("asked", "blocks", "last"),
    [
        (moved(1000), 63, 15),  # 232 tokens in the last of 4 chunks
        (moved(1024), 64, 16),
        (moved(1025), 65, 1),
        (moved(1000, held=60), 3, 3),  # no more than moves at all
        (moved(1000, cached=992), 63, 1),
        (moved(1000, cached=1000), 63, 1),
        (moved(1000, held=63), 0, 0),
    ],
)
def test_the_last_chunk_is_what_the_prefill_cannot_hide(asked: Movement, blocks: int, last: int) -> None:
    assert (asked.num_bytes, asked.last_bytes) == (blocks * MEGABYTE, last * MEGABYTE)


def taught(bytes_per_s: float, transport: str = "tcp") -> PerfModel:
    """A model that has seen single transfers, and no handoff."""
    perf, rng = PerfModel(), random.Random(0)
    for _ in range(60):
        size = rng.randint(MEGABYTE, 40 * MEGABYTE)
        perf.observe_transfer(TransferRecord(1e-3 + size / bytes_per_s, size, transport))
    return perf


def test_a_way_faster_than_the_prefill_shows_its_last_chunk_only() -> None:
    perf = taught(1e9)
    fast = perf.handoff_seconds(moved(1000, prefill_s=10.0), "tcp").seconds
    assert fast == pytest.approx(3e-3 + 1e-3 + 0.015, rel=0.1)
    assert perf.handoff_seconds(moved(8168, prefill_s=80.0), "tcp").seconds == pytest.approx(fast)


def test_a_way_slower_than_the_prefill_shows_what_is_left_after_it() -> None:
    perf = taught(1e8)
    slow = perf.handoff_seconds(moved(1600, prefill_s=0.4), "tcp").seconds
    assert slow == pytest.approx(1.0 - 0.4, rel=0.1)


def test_messages_and_copies_that_wait_for_each_other_are_learnt() -> None:
    perf, rng = taught(1e8), random.Random(1)
    shapes = [moved(rng.randint(17, 4000), prefill_s=rng.uniform(0.0, 2.0)) for _ in range(80)]
    for shape in shapes:
        unhidden = max(shape.last_bytes / 1e8, shape.num_bytes / 1e8 - shape.prefill_s) + 1e-3
        perf.observe_handoff(shape, "tcp", (0.02 + 1.4 * unhidden) * rng.lognormvariate(0.0, 0.03))
    for shape in shapes[:20]:
        unhidden = max(shape.last_bytes / 1e8, shape.num_bytes / 1e8 - shape.prefill_s) + 1e-3
        assert perf.handoff_seconds(shape, "tcp").seconds == pytest.approx(0.02 + 1.4 * unhidden, rel=0.15)
    error = perf.handoff_seconds(shapes[0], "tcp").relative_error
    assert error is not None
    assert error < 0.3


def test_a_way_that_nobody_took_is_expected_to_do_well() -> None:
    """So that it is taken, and measured."""
    assert PerfModel().handoff_seconds(moved(1000, prefill_s=1.0), "nccl").seconds < 0.03


def test_ways_do_not_disturb_each_other_and_travel_in_a_snapshot() -> None:
    perf = taught(1e8)
    for _ in range(20):
        perf.observe_handoff(moved(), "tcp", 1.5)
    assert perf.handoff_seconds(moved(), "shm").seconds == PerfModel().handoff_seconds(moved(), "shm").seconds
    again = PerfModel()
    again.restore(perf.snapshot())
    assert again.handoff_seconds(moved(), "tcp") == perf.handoff_seconds(moved(), "tcp")


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan"), float("inf")])
def test_what_is_no_duration_teaches_nothing(seconds: float) -> None:
    perf = PerfModel()
    perf.observe_handoff(moved(), "tcp", seconds)
    assert "handoff/tcp/fixed_seconds" not in perf.snapshot()
