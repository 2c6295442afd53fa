"""Any sharding to any other: every cell written once, from a rank that has it, fairly, in few transfers."""

import hashlib
import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from simulated_ranks import POISON, cut, dense_blocks, model_layout, move, pieces

from pdserve.core.errors import ConfigError
from pdserve.kvtransfer.digest import digest_block, verify
from pdserve.kvtransfer.pool.layout import KvLayout
from pdserve.kvtransfer.reshard.plan import ByteRuns, TransferPlan, byte_runs, plan_transfer
from pdserve.kvtransfer.reshard.replicas import assign_heads
from pdserve.kvtransfer.reshard.sharding import Rectangle, Sharding, Span

HEADS = (1, 2, 3, 8)


@st.composite
def splits(draw: st.DrawFn, num_layers: int) -> tuple[int, ...]:
    """Any division of the layers into stages, uneven ones too."""
    borders = draw(st.sets(st.integers(1, num_layers - 1), max_size=3)) if num_layers > 1 else set()
    edges = [0, *sorted(borders), num_layers]
    return tuple(end - first for first, end in itertools.pairwise(edges))


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Sharding, Sharding]:
    """P and D of one model."""
    heads, layers = draw(st.sampled_from(HEADS)), draw(st.integers(1, 7))
    return (
        Sharding(heads, draw(st.integers(1, 8)), draw(splits(layers))),
        Sharding(heads, draw(st.integers(1, 8)), draw(splits(layers))),
    )


def cells(part: Rectangle) -> set[tuple[int, int]]:
    layers, heads = part.layers, part.heads
    return set(itertools.product(range(layers.first, layers.end), range(heads.first, heads.end)))


def holders(sharding: Sharding, head: int) -> list[int]:
    """Tensor ranks that keep a head."""
    spans = [sharding.heads_of(rank) for rank in range(sharding.tp)]
    return [rank for rank, span in enumerate(spans) if span.first <= head < span.end]


def loads(source: Sharding, destination: Sharding) -> list[int]:
    """Heads that each tensor rank of P sends, of one layer."""
    sent = Counter(dict.fromkeys(range(source.tp), 0))
    for run in assign_heads(source, destination):
        sent[run.source] += run.heads.size
    return [sent[rank] for rank in range(source.tp)]


@settings(max_examples=200, deadline=None)
@given(pair=pairs(), valid=st.integers(1, 16), seed=st.integers(0, 99))
@example(pair=(Sharding(3, 7, (1, 4, 2)), Sharding(3, 5, (3, 3, 1))), valid=5, seed=0)
def test_executed_it_gives_each_rank_what_the_dense_cache_has(
    pair: tuple[Sharding, Sharding], valid: int, seed: int
) -> None:
    """Three blocks, the last one partial, between pools in which they have other ids."""
    source, destination = pair
    plan, model = plan_transfer(source, destination), model_layout(source)
    dense = dense_blocks(model, 3, seed)
    random = np.random.default_rng(seed)
    came_from, goes_to = random.permutation(5)[:3], random.permutation(7)[:3]
    have = [
        np.full((5, source.layout_of(r, model).block_bytes), 1, np.uint8) for r in range(source.num_ranks)
    ]
    for rank, pool in enumerate(have):
        pool[came_from] = cut(dense, model, source, rank)
    got = [
        np.full((7, destination.layout_of(r, model).block_bytes), POISON, np.uint8)
        for r in range(destination.num_ranks)
    ]
    writes = [np.zeros_like(pool) for pool in got]
    for transfer in plan.transfers:
        reads_at = byte_runs(transfer.source_part, source.layout_of(transfer.source, model))
        writes_at = byte_runs(transfer.destination_part, destination.layout_of(transfer.destination, model))
        for block, target in zip(came_from, goes_to, strict=True):
            move(have[transfer.source][block], reads_at, got[transfer.destination][target], writes_at)
            pieces(writes[transfer.destination][target], writes_at)[:] += 1
    digests = [
        digest_block(block, model, tokens) for block, tokens in zip(dense, (16, 16, valid), strict=True)
    ]
    for rank in range(destination.num_ranks):
        assert np.array_equal(got[rank][goes_to], cut(dense, model, destination, rank))
        assert (writes[rank][goes_to] == 1).all()
        others = np.setdiff1d(np.arange(7), goes_to)
        assert (got[rank][others] == POISON).all()
    # What P computed before the split is what D puts together behind it, by the same digests.
    whole = np.full_like(dense, POISON)
    for rank in range(destination.num_ranks):
        at = byte_runs(destination.kept_by(rank), model)
        for block, target in enumerate(goes_to):
            pieces(whole[block], at)[:] = got[rank][target].reshape(at.count, at.length)
    for block, tokens, expected in zip(whole, (16, 16, valid), digests, strict=True):
        assert verify(block, model, tokens, expected) is None


@settings(max_examples=300, deadline=None)
@given(pair=pairs())
def test_every_cell_of_every_rank_is_written_once_by_a_rank_that_keeps_it(
    pair: tuple[Sharding, Sharding],
) -> None:
    source, destination = pair
    plan = plan_transfer(source, destination)
    for rank in range(destination.num_ranks):
        written = Counter(cell for transfer in plan.into(rank) for cell in cells(transfer.part))
        assert written == Counter(cells(destination.kept_by(rank)))
    for transfer in plan.transfers:
        sender, receiver = source.kept_by(transfer.source), destination.kept_by(transfer.destination)
        assert cells(transfer.part) <= cells(sender)
        assert transfer.source_part == transfer.part.within(sender)
        assert transfer.destination_part == transfer.part.within(receiver)
    assert Counter(t for rank in range(source.num_ranks) for t in plan.out_of(rank)) == Counter(
        plan.transfers
    )


@settings(max_examples=300, deadline=None)
@given(pair=pairs())
def test_a_plan_is_bounded_by_ranks_and_stages_and_has_one_transfer_per_pair_of_ranks(
    pair: tuple[Sharding, Sharding],
) -> None:
    source, destination = pair
    plan = plan_transfer(source, destination)
    stages = len(source.stage_layers) + len(destination.stage_layers) - 1
    assert len(plan.transfers) <= (source.tp + destination.tp - 1) * stages
    assert max(Counter((t.source, t.destination) for t in plan.transfers).values()) == 1
    order = [(t.part.layers.first, t.source, t.destination) for t in plan.transfers]
    assert order == sorted(order)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("tp", range(1, 9))
@pytest.mark.parametrize("stages", [(5,), (1, 3, 1)])
def test_equal_shardings_send_whole_blocks_from_rank_to_rank(
    heads: int, tp: int, stages: tuple[int, ...]
) -> None:
    sharding = Sharding(heads, tp, stages)
    plan, model = plan_transfer(sharding, sharding), model_layout(sharding)
    assert [(t.source, t.destination) for t in plan.transfers] == [(r, r) for r in range(sharding.num_ranks)]
    for transfer in plan.transfers:
        layout = sharding.layout_of(transfer.source, model)
        size = layout.block_bytes
        assert transfer.source_part == transfer.destination_part
        assert byte_runs(transfer.source_part, layout) == ByteRuns(0, size, size, 1)


@pytest.mark.parametrize(
    ("heads", "source", "destination"),
    [(k, p, d) for k in (1, 2, 3) for p in range(1, 6) for d in range(1, 5)],
)
def test_loads_are_the_fairest_of_all_choices_and_the_partners_the_nearest_of_these(
    heads: int, source: int, destination: int
) -> None:
    """Against every choice of replicas there is."""
    giver, taker = Sharding(heads, source, (1,)), Sharding(heads, destination, (1,))
    needs = [(d, h) for d in range(destination) for h in range(heads) if d in holders(taker, h)]

    def cost(choice: tuple[int, ...]) -> tuple[list[int], int]:
        sent = Counter(choice)
        gaps = [
            abs((2 * p + 1) * destination - (2 * d + 1) * source)
            for p, (d, _) in zip(choice, needs, strict=True)
        ]
        return sorted((sent[p] for p in range(source)), reverse=True), sum(gaps)

    made = {
        (run.destination, head): run.source
        for run in assign_heads(giver, taker)
        for head in range(run.heads.first, run.heads.end)
    }
    best = min(cost(choice) for choice in itertools.product(*(holders(giver, h) for _, h in needs)))
    assert cost(tuple(made[need] for need in needs)) == best


@settings(max_examples=300, deadline=None)
@given(heads=st.integers(1, 40), source=st.integers(1, 24), destination=st.integers(1, 24))
def test_no_head_can_move_to_a_rank_that_sends_two_less(heads: int, source: int, destination: int) -> None:
    """At any size: neither at once nor by a chain of moves, which is what the fairest loads are."""
    giver, taker = Sharding(heads, source, (1,)), Sharding(heads, destination, (1,))
    sent = loads(giver, taker)
    assert sum(sent) == sum(taker.heads_of(rank).size for rank in range(destination))
    moves: dict[int, set[int]] = {rank: set() for rank in range(source)}
    for run in assign_heads(giver, taker):
        for head in range(run.heads.first, run.heads.end):
            moves[run.source] |= set(holders(giver, head))
    for start in range(source):
        reached, edge = {start}, [start]
        while edge:
            for rank in moves[edge.pop()] - reached:
                reached.add(rank)
                edge.append(rank)
        assert sent[start] <= min(sent[rank] for rank in reached) + 1


@pytest.mark.parametrize("sharding", [Sharding(k, tp, (2,)) for k in HEADS for tp in range(1, 9)])
def test_ranks_keep_the_heads_that_their_query_heads_attend_to(sharding: Sharding) -> None:
    """With as many query heads as both divide, counted one by one."""
    per_head = sharding.tp
    per_rank = sharding.num_kv_heads * per_head // sharding.tp
    for rank in range(sharding.tp):
        kept = {query // per_head for query in range(rank * per_rank, (rank + 1) * per_rank)}
        span = sharding.heads_of(rank)
        assert kept == set(range(span.first, span.end))


def numbers(part: Rectangle) -> tuple[int, int, int, int]:
    return part.layers.first, part.layers.end, part.heads.first, part.heads.end


def fingerprint(plans: list[TransferPlan]) -> str:
    """Of everything that two sides have to agree on."""
    agreed = [
        [
            (t.source, t.destination, numbers(t.source_part), numbers(t.destination_part))
            for t in plan.transfers
        ]
        for plan in plans
    ]
    return hashlib.sha256(repr(agreed).encode()).hexdigest()[:16]


def test_a_plan_never_changes_between_versions() -> None:
    """Both sides compute it for themselves: a change needs a new protocol number."""
    ways = itertools.product(HEADS, range(1, 9), range(1, 9), [(4,), (1, 3)], [(4,), (3, 1)])
    plans = [plan_transfer(Sharding(k, p, a), Sharding(k, d, b)) for k, p, d, a, b in ways]
    assert fingerprint(plans) == "1ad3287e44748520"


def test_four_ranks_to_one_and_back() -> None:
    """The case in the design: TP4 serves a TP1 reader."""
    four, one = Sharding(8, 4, (30,)), Sharding(8, 1, (30,))
    layers = Span(0, 30)
    gather = [(t.source, t.source_part, t.destination_part) for t in plan_transfer(four, one).transfers]
    scatter = [(t.destination, t.destination_part, t.source_part) for t in plan_transfer(one, four).transfers]
    expected = [
        (rank, Rectangle(layers, Span(0, 2)), Rectangle(layers, Span(2 * rank, 2 * rank + 2)))
        for rank in range(4)
    ]
    assert gather == scatter == expected


@pytest.mark.parametrize(
    ("heads", "tp", "stages", "said"),
    [
        (0, 1, (2,), "at least 1 kv head"),
        (2, 0, (2,), "tensor parallel size 0"),
        (2, -2, (2,), "tensor parallel size -2"),
        (2, 65, (2,), "use 1 to 64"),
        (2, 1, (), "at least 1 stage"),
        (2, 1, (2, 0), r"\[2, 0\] layers"),
    ],
)
def test_a_descriptor_that_describes_nothing_is_refused(
    heads: int, tp: int, stages: tuple[int, ...], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        Sharding(heads, tp, stages)


@pytest.mark.parametrize("other", [Sharding(4, 2, (3, 2)), Sharding(8, 2, (3, 3))])
def test_two_models_have_no_plan(other: Sharding) -> None:
    with pytest.raises(ConfigError, match=r"P divides 5 layers and 8 kv heads, D [56] and [48]"):
        plan_transfer(Sharding(8, 2, (3, 2)), other)


@pytest.mark.parametrize("rank", [-1, 4])
def test_a_rank_that_does_not_exist_is_named(rank: int) -> None:
    with pytest.raises(ConfigError, match=f"rank {rank} does not exist; this sharding has ranks 0 to 3"):
        Sharding(8, 2, (3, 2)).kept_by(rank)


def test_a_layout_of_another_model_or_rank_is_refused() -> None:
    sharding = Sharding(8, 2, (3, 2))
    with pytest.raises(ConfigError, match="the layout has 6 layers and 8 kv heads"):
        sharding.layout_of(0, KvLayout(6, 8, 2, "float32"))
    rank = sharding.layout_of(0, KvLayout(5, 8, 2, "float32"))
    for part in (Rectangle(Span(0, 4), Span(0, 4)), Rectangle(Span(0, 3), Span(1, 5))):
        with pytest.raises(ConfigError, match="not within a block of 3 layers and 4 kv heads"):
            byte_runs(part, rank)
