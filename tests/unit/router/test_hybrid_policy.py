"""The hybrid policy as properties of its placements."""

import dataclasses
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from router_views import decoders, mixers, prefillers, request, view, worker

from pdserve.core.types import Disaggregation, Role, WorkerId
from pdserve.router.bookings import Booking, Bookings, Charge
from pdserve.router.policies.base import Placement, PlacementRequest, rank
from pdserve.router.policies.hybrid import HOLDERS, LEAST_WORK, RING_OWNERS, HybridPolicy
from pdserve.router.ring import WorkerRing
from pdserve.router.view import ClusterView, WorkerView


def place(cluster: ClusterView, asked: PlacementRequest) -> Placement:
    """In the order of the prefill profile alone; test_conditional_disaggregation.py has the owner's turn."""
    placement = HybridPolicy(Disaggregation.ALWAYS).place(cluster, asked, 0.0)
    assert placement is not None
    return placement


def keys(count: int) -> list[bytes]:
    return [number.to_bytes(16, "little") for number in range(count)]


def test_owner_is_last_candidate_and_listed_once() -> None:
    cluster = view(*prefillers(4), *decoders(2))
    for key in keys(20):
        placement = place(cluster, request(key=key))
        assert placement.prefill[-1] == placement.decode
        assert placement.prefill.count(placement.decode) == 1
        assert all(name.startswith("prefill") for name in placement.prefill[:-1])


def test_a_pool_that_could_not_hold_the_longest_answer_is_not_asked() -> None:
    small = worker("decode-0", Role.DECODE, pool_blocks=30)
    cluster = view(*prefillers(1), small, worker("decode-1", Role.DECODE, pool_blocks=300, promised=250))
    assert place(cluster, request(160)).decode == "decode-0"
    assert place(cluster, dataclasses.replace(request(160), longest_blocks=31)).decode == "decode-1"


def test_at_most_owners_holders_and_idle_are_asked() -> None:
    depths = {f"prefill-{number}": number + 1 for number in range(20)}
    placement = place(view(*prefillers(20), *decoders(1)), request(4000, depths=depths))
    assert 1 < len(placement.prefill) <= RING_OWNERS + HOLDERS + LEAST_WORK + 1


def test_the_deepest_holder_wins_on_an_idle_cluster() -> None:
    placement = place(view(*prefillers(8), *decoders(1)), request(1600, depths={"prefill-5": 90}))
    assert placement.prefill[0] == "prefill-5"
    assert placement.prefill_tokens == 1600 - 90 * 16


def test_a_deep_queue_outweighs_a_held_prefix() -> None:
    busy = worker("prefill-0", Role.PREFILL, queued=50_000)
    idle = worker("prefill-1", Role.PREFILL)
    placement = place(view(busy, idle, *decoders(1)), request(800, depths={"prefill-0": 40}))
    assert placement.prefill == ("prefill-1", "prefill-0", "decode-0")


def test_a_cold_prompt_goes_to_a_ring_owner() -> None:
    cluster = view(*prefillers(8), *decoders(1))
    ring = WorkerRing(cluster.ids)
    for key in keys(50):
        first = place(cluster, request(key=key)).prefill[0]
        assert first in ring.owners(key, RING_OWNERS, lambda name: name.startswith("prefill"))


@pytest.mark.parametrize("fault", ["suspect", "draining"])
def test_a_suspect_or_draining_worker_gets_nothing(fault: str) -> None:
    bad = [
        worker("prefill-9", Role.PREFILL, **{fault: True}),  # type: ignore[arg-type]
        worker("decode-9", Role.DECODE, **{fault: True}),  # type: ignore[arg-type]
    ]
    cluster = view(*bad, *prefillers(2, queued=90_000), *decoders(1, promised=900))
    depths = {"prefill-9": 20, "decode-9": 20}
    for key in keys(30):
        placement = place(cluster, request(key=key, depths=depths))
        assert {placement.decode, *placement.prefill}.isdisjoint({"prefill-9", "decode-9"})


def test_workers_that_refused_own_nothing() -> None:
    cluster = view(*prefillers(1), *decoders(3))
    assert place(cluster, request(refused=frozenset({"decode-0", "decode-2"}))).decode == "decode-1"
    everyone = frozenset({"decode-0", "decode-1", "decode-2"})
    assert HybridPolicy().place(cluster, request(refused=everyone), 0.0) is None


def test_nobody_to_own_means_no_placement() -> None:
    assert HybridPolicy().place(view(*prefillers(2)), request(), 0.0) is None
    assert HybridPolicy().place(view(*decoders(2, suspect=True)), request(), 0.0) is None
    assert HybridPolicy().place(view(*decoders(2, pool_blocks=4)), request(400), 0.0) is None


def test_a_prompt_without_anything_to_hand_over_stays_at_its_owner() -> None:
    for tokens in (1, 15, 16):
        placement = place(view(*prefillers(3), *decoders(2)), request(tokens))
        assert placement.prefill == (placement.decode,)


def test_an_owner_that_holds_the_whole_prompt_is_first() -> None:
    cluster = view(*prefillers(3), *decoders(1))
    assert place(cluster, request(400, depths={"decode-0": 24})).prefill[0] == "decode-0"
    assert place(cluster, request(400, depths={"decode-0": 23})).prefill[-1] == "decode-0"


def test_without_dedicated_prefill_a_mixed_owner_computes_by_itself() -> None:
    for key in keys(10):
        placement = place(view(*mixers(3)), request(key=key))
        assert placement.prefill == (placement.decode,)


def test_a_mixed_cluster_follows_the_prefix() -> None:
    assert place(view(*mixers(6)), request(1600, depths={"mixed-4": 80})).decode == "mixed-4"


def test_with_dedicated_prefill_a_mixed_owner_asks_others_first() -> None:
    placement = place(view(*prefillers(2), *mixers(1)), request())
    assert placement.decode == "mixed-0"
    assert set(placement.prefill[:-1]) == {"prefill-0", "prefill-1"}


def test_a_pool_too_small_for_the_prompt_is_not_asked() -> None:
    small = worker("prefill-0", Role.PREFILL, pool_blocks=10)
    placement = place(view(small, worker("prefill-1", Role.PREFILL), *decoders(1)), request(400))
    assert placement.prefill == ("prefill-1", "decode-0")


def test_the_owner_has_the_most_free_promises() -> None:
    full = worker("decode-0", Role.DECODE, promised=900)
    assert place(view(*prefillers(1), full, worker("decode-1", Role.DECODE)), request()).decode == "decode-1"


def test_among_equally_free_owners_less_context_wins() -> None:
    long = worker("decode-0", Role.DECODE, context=50_000)
    short = worker("decode-1", Role.DECODE, context=1_000)
    assert place(view(*prefillers(1), long, short), request()).decode == "decode-1"


def test_decisions_count_before_any_heartbeat_says_so() -> None:
    charged = worker(
        "prefill-0", Role.PREFILL, charged=Charge(requests=1, prefill_tokens=9000, prefill_s=20.0)
    )
    placement = place(view(charged, worker("prefill-1", Role.PREFILL), *decoders(1)), request())
    assert placement.prefill[0] == "prefill-1"


def test_a_shared_prefix_does_not_pile_up_on_its_holder() -> None:
    """One holder, many requests with its prefix, no heartbeat in between: the book spreads them."""
    policy, bookings = HybridPolicy(Disaggregation.ALWAYS), Bookings()
    base = [*prefillers(4), *decoders(2)]
    asked = request(1600, depths={"prefill-0": 60})
    firsts: Counter[WorkerId] = Counter()
    for number in range(40):
        cluster = view(*(charge(plain, bookings) for plain in base))
        placement = policy.place(cluster, asked, 0.0)
        assert placement is not None
        book(bookings, f"r{number}", placement, at=1.0)
        firsts[placement.prefill[0]] += 1
    assert firsts["prefill-0"] == max(firsts.values())
    work = {w.worker: bookings.charged(w.worker, 1.0).prefill_s for w in base if w.dedicated}
    assert max(work.values()) <= 2.0 * sum(work.values()) / len(work)
    owners = [bookings.charged(w.worker, 1.0).blocks for w in base if w.record.decodes]
    assert max(owners) <= 1.2 * min(owners)


def charge(plain: WorkerView, bookings: Bookings) -> WorkerView:
    open_work = bookings.charged(plain.worker, 1.0)
    return WorkerView(plain.record, plain.load, plain.perf, 256, open_work, open_work)


def book(bookings: Bookings, name: str, placement: Placement, at: float) -> None:
    bookings.charge(
        name,  # type: ignore[arg-type]
        Booking(
            placement.decode, 100, placement.prefill[0], placement.prefill_tokens, placement.prefill_s, at
        ),
    )


def test_losing_a_worker_moves_only_its_keys() -> None:
    everybody, fewer = view(*prefillers(8), *decoders(1)), view(*prefillers(8)[1:], *decoders(1))
    for key in keys(100):
        asked = request(key=key)
        before = owners_of(everybody, asked)
        after = owners_of(fewer, asked)
        kept = [name for name in before if name != "prefill-0"]
        assert after[: len(kept)] == kept


def owners_of(cluster: ClusterView, asked: PlacementRequest) -> list[WorkerId]:
    eligible = {worker.worker for worker in cluster if worker.prefills}
    return list(WorkerRing(cluster.ids).owners(asked.ring_key, RING_OWNERS, eligible.__contains__))


def test_a_suspect_workers_keys_come_back_with_it() -> None:
    policy = HybridPolicy(Disaggregation.ALWAYS)
    well = view(*prefillers(6), *decoders(1))
    ill = view(worker("prefill-0", Role.PREFILL, suspect=True), *prefillers(6)[1:], *decoders(1))
    for key in keys(40):
        before = policy.place(well, request(key=key), 0.0)
        policy.place(ill, request(key=key), 0.0)
        assert policy.place(well, request(key=key), 0.0) == before


@settings(max_examples=60, deadline=None)
@given(
    queues=st.lists(st.integers(0, 20_000), min_size=1, max_size=6),
    promises=st.lists(st.integers(0, 1200), min_size=1, max_size=4),
    depths=st.dictionaries(st.sampled_from([f"prefill-{n}" for n in range(6)]), st.integers(1, 60)),
    tokens=st.integers(1, 2000),
    key=st.binary(min_size=16, max_size=16),
)
def test_placements_are_deterministic_and_well_formed(
    queues: list[int], promises: list[int], depths: dict[str, int], tokens: int, key: bytes
) -> None:
    workers = [worker(f"prefill-{n}", Role.PREFILL, queued=queued) for n, queued in enumerate(queues)]
    workers += [worker(f"decode-{n}", Role.DECODE, promised=blocks) for n, blocks in enumerate(promises)]
    asked = request(tokens, key=key, depths=depths)
    placement = place(view(*workers), asked)
    assert placement == place(view(*reversed(workers)), asked), "order of the view matters"
    assert len(set(placement.prefill)) == len(placement.prefill)
    assert placement.decode in placement.prefill
    assert 0 <= placement.prefill_tokens <= tokens
    assert placement.prefill_s >= 0.0


def test_rank_puts_filtered_workers_nowhere_and_orders_by_score() -> None:
    class ByQueue:
        def accepts(self, candidate: WorkerView) -> bool:
            return candidate.load.queued_prefill_tokens < 100

        def score(self, candidate: WorkerView) -> float:
            return 1.0 - candidate.load.queued_prefill_tokens / 100

        def tie(self, name: WorkerId) -> bytes:
            return name.encode()

    loads = {"c": 10, "a": 50, "b": 10, "z": 100}
    ranked = rank(ByQueue(), [worker(name, Role.PREFILL, queued=load) for name, load in loads.items()])
    assert [entry.worker for entry in ranked] == ["b", "c", "a"]


@pytest.mark.parametrize(("tokens", "asked"), [(81, True), (82, False)])
def test_who_lends_too_little_of_its_pool_is_not_asked_in_vain(tokens: int, asked: bool) -> None:
    """P lends 5 of its 10 blocks, and would refuse the sixth for ever."""
    lender = dataclasses.replace(worker("prefill-0", Role.PREFILL, pool_blocks=10), export_share=0.5)
    placed = place(view(lender, *decoders(1)), request(tokens))
    assert placed.prefill == (("prefill-0", "decode-0") if asked else ("decode-0",))
