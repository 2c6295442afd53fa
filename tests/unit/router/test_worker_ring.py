"""The ring: stable, fair enough, and moves only what it must."""

from collections import Counter

from pdserve.core.types import WorkerId
from pdserve.router.ring import WorkerRing

WORKERS = [WorkerId(f"prefill-{number}") for number in range(8)]
KEYS = [number.to_bytes(16, "big") for number in range(2000)]


def test_owners_are_distinct_and_in_a_fixed_order() -> None:
    ring, again = WorkerRing(WORKERS), WorkerRing(reversed(WORKERS))
    for key in KEYS[:100]:
        owners = ring.owners(key, 3)
        assert len(set(owners)) == 3
        assert owners == again.owners(key, 3)
        assert owners[:2] == ring.owners(key, 2)


def test_keys_spread_over_all_workers() -> None:
    ring = WorkerRing(WORKERS)
    shares = Counter(ring.owners(key, 1)[0] for key in KEYS)
    assert set(shares) == set(WORKERS)
    assert max(shares.values()) <= 1.5 * len(KEYS) / len(WORKERS)


def test_removing_a_worker_moves_only_its_keys() -> None:
    ring, fewer = WorkerRing(WORKERS), WorkerRing(WORKERS[1:])
    moved = [key for key in KEYS if ring.owners(key, 1) != fewer.owners(key, 1)]
    assert moved
    assert all(ring.owners(key, 1) == (WORKERS[0],) for key in moved)


def test_skipping_a_worker_equals_removing_it() -> None:
    ring, fewer = WorkerRing(WORKERS), WorkerRing(WORKERS[1:])
    for key in KEYS[:200]:
        assert ring.owners(key, 2, lambda name: name != WORKERS[0]) == fewer.owners(key, 2)


def test_fewer_workers_than_asked_for_are_all_there_is() -> None:
    assert WorkerRing(()).owners(b"k", 2) == ()
    assert WorkerRing(WORKERS[:1]).owners(b"k", 2) == (WORKERS[0],)
    assert WorkerRing(WORKERS).owners(b"k", 2, lambda name: False) == ()
