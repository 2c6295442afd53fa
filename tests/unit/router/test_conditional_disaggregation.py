"""Who is asked for a prompt's KV, term by term; the sum is test_disaggregation_sweep.py's."""

import dataclasses

import pytest
from router_views import decoders, mixers, prefillers, request, view, worker

from pdserve.core.exploration import PrefillPath
from pdserve.core.handoff_overhead import Movement
from pdserve.core.perfmodel import PerfModel, StepRecord, prefill_attention
from pdserve.core.types import Disaggregation, Role
from pdserve.core.worker_record import WorkerLoad
from pdserve.router.bookings import Charge
from pdserve.router.policies.base import Placement, PlacementRequest
from pdserve.router.policies.conditional import handoff_cost, local_cost
from pdserve.router.policies.hybrid import HybridPolicy
from pdserve.router.prefill_traffic import Traffic
from pdserve.router.view import ClusterView, WorkerView, informed


def place(
    cluster: ClusterView, asked: PlacementRequest, mode: Disaggregation = Disaggregation.COST
) -> Placement:
    placement = HybridPolicy(mode).place(cluster, asked, 0.0)
    assert placement is not None
    return placement


def busy_decoder(streams: int, *, role: Role = Role.DECODE) -> WorkerView:
    load = WorkerLoad(running=streams, context_tokens=500 * streams)
    return dataclasses.replace(worker("decode-0", role), load=load)


def measured(seconds_per_token: float) -> PerfModel:
    perf = PerfModel()
    for tokens in (16, 64, 256, 128, 32, 200, 100, 250, 16, 80):
        perf.observe_step(StepRecord(seconds_per_token * tokens, tokens, prefill_attention(tokens, 0)))
    return perf


IDLE = view(*prefillers(2), *decoders(1))
CROWDED = view(*prefillers(2), busy_decoder(8))


def test_an_idle_owner_computes_what_a_crowded_one_hands_off() -> None:
    assert place(IDLE, request(800)).prefill == ("decode-0",)
    crowded = place(CROWDED, request(800)).prefill
    assert crowded[-1] == "decode-0"
    assert set(crowded[:-1]) == {"prefill-0", "prefill-1"}


@pytest.mark.parametrize("cluster", [IDLE, CROWDED], ids=["idle", "crowded"])
def test_always_and_never_are_what_they_say_and_tell_what_was_expected(cluster: ClusterView) -> None:
    always = place(cluster, request(800), Disaggregation.ALWAYS)
    never = place(cluster, request(800), Disaggregation.NEVER)
    assert always.prefill[0].startswith("prefill-")
    assert never.prefill == ("decode-0",)
    chosen = place(cluster, request(800))
    for placement in (always, never, chosen):
        assert placement.local is not None
        assert placement.handoff is not None
    local, handoff = chosen.local, chosen.handoff
    assert local is not None
    assert handoff is not None
    assert (local.total_s <= handoff.total_s) == (chosen.prefill[0] == "decode-0")


def test_who_costs_more_than_the_owner_is_not_asked() -> None:
    """D never waits for one that is slower than itself, not even when another refused."""
    slow = worker("prefill-0", Role.PREFILL, queued=50_000)
    placement = place(view(slow, worker("prefill-1", Role.PREFILL), busy_decoder(8)), request(800))
    assert placement.prefill == ("prefill-1", "decode-0")


def test_what_the_owner_holds_counts_for_it_and_what_the_others_hold_for_them() -> None:
    cluster = view(*prefillers(1), busy_decoder(1))
    assert place(cluster, request(800)).prefill[0] == "prefill-0"
    assert place(cluster, request(800, depths={"decode-0": 48})).prefill == ("decode-0",)
    assert place(IDLE, request(800, depths={"prefill-1": 49})).prefill[0] == "prefill-1"


def test_a_slow_way_keeps_prompts_where_they_are() -> None:
    crowded = busy_decoder(2)
    record = dataclasses.replace(crowded.record, block_bytes=10**6)
    near = dataclasses.replace(crowded, record=record)
    perf = PerfModel()
    for _ in range(10):
        perf.observe_handoff(Movement(0, 0, 0.0), "tcp", 30.0)
    load = dataclasses.replace(crowded.load, ways={"prefill-0": "tcp"})
    far = dataclasses.replace(near, perf=perf, load=load)
    for owner, first in ((near, "prefill-0"), (far, "decode-0")):
        assert place(view(*prefillers(1), owner), request(800)).prefill[0] == first


def test_a_worker_it_never_met_is_reached_as_most_others_are() -> None:
    perf = PerfModel()
    for _ in range(10):
        perf.observe_handoff(Movement(0, 0, 0.0), "tcp", 30.0)
    load = WorkerLoad(ways={"prefill-7": "tcp", "prefill-8": "tcp", "prefill-9": "shm"})
    owner = dataclasses.replace(worker("decode-0", Role.DECODE), perf=perf, load=load)
    stranger, friend = worker("prefill-0", Role.PREFILL), worker("prefill-9", Role.PREFILL)
    asked = request(800)
    assert handoff_cost(stranger, owner, asked).seconds > 10.0
    assert handoff_cost(friend, owner, asked).seconds < 10.0


def test_a_decode_worker_gives_prompts_its_share_of_a_step_only_while_streams_run() -> None:
    asked = request(1024)
    alone, beside = local_cost(worker("decode-0", Role.DECODE), asked), local_cost(busy_decoder(1), asked)
    mixed = local_cost(busy_decoder(1, role=Role.MIXED), asked)
    assert beside.seconds > 3 * alone.seconds, "64 steps of 16 tokens are more than 4 of 256"
    assert alone.seconds < mixed.seconds < beside.seconds
    assert alone.harm_s == 0.0


def test_harm_grows_with_the_streams_and_with_what_comes_later() -> None:
    asked = request(512)
    harms = [local_cost(busy_decoder(streams), asked).harm_s for streams in (1, 4, 16)]
    assert harms[1] == pytest.approx(4 * harms[0])
    assert harms[2] == pytest.approx(16 * harms[0])
    quiet = worker("prefill-0", Role.PREFILL)
    owner = worker("decode-0", Role.DECODE)
    rushes = [dataclasses.replace(quiet, traffic=Traffic(rate, 0.5)) for rate in (1.0, 3.0)]
    harm = [handoff_cost(w, owner, asked).harm_s for w in (quiet, *rushes)]
    assert harm[0] == 0.0
    assert 0.0 < harm[1] < harm[2]


def test_one_prompt_ahead_is_passed_in_the_same_step() -> None:
    """A step has room for two chunks, so a short prompt does not wait for a long one to end."""
    long = dataclasses.replace(
        worker("prefill-0", Role.PREFILL), load=WorkerLoad(queued_prefill_tokens=8000, queued_prefills=1)
    )
    many = dataclasses.replace(long, load=WorkerLoad(queued_prefill_tokens=8000, queued_prefills=8))
    assert long.delay_s(32) < 0.1 * long.wait_s
    assert many.delay_s(32) > 0.8 * long.wait_s
    assert long.delay_s(8000) <= long.wait_s
    assert worker("prefill-0", Role.PREFILL).delay_s(0) == 0.0


def test_nobody_is_judged_by_a_guess_beside_a_measurement() -> None:
    """Measured at a hundredth of the prior, D would never ask a worker that nobody has measured yet."""
    fast = measured(5e-6)
    owner = dataclasses.replace(busy_decoder(4), perf=fast)
    novice = worker("prefill-0", Role.PREFILL)
    assert fast.knows_prefill
    assert not novice.perf.knows_prefill
    known = informed([novice, owner])["prefill-0"]  # type: ignore[index]
    assert known.service_s(800, 0) < 0.1 * novice.service_s(800, 0)
    assert informed([novice]).workers == (novice,)


def test_credit_buys_one_try_at_a_time_of_what_it_covers() -> None:
    perf = PerfModel()
    perf.observe_path(PrefillPath.LOCAL, 1000.0)
    rich = dataclasses.replace(worker("decode-0", Role.DECODE), perf=perf)
    idle = worker("prefill-0", Role.PREFILL)
    asked = request(400)
    loss = handoff_cost(idle, rich, asked).total_s - local_cost(rich, asked).total_s
    assert 0.0 < loss < perf.credit_seconds(PrefillPath.HANDOFF)
    assert place(view(idle, rich), asked).prefill == ("prefill-0", "decode-0")
    taken = worker("prefill-0", Role.PREFILL, charged=Charge(requests=1, prefills=1, prefill_s=0.01))
    assert place(view(taken, rich), asked).prefill == ("decode-0",)
    assert place(view(worker("prefill-0", Role.PREFILL, queued=500_000), rich), asked).prefill == (
        "decode-0",
    )
    assert place(view(idle, rich), asked, Disaggregation.NEVER).prefill == ("decode-0",)


@pytest.mark.parametrize("mode", Disaggregation)
def test_where_there_is_no_choice_nothing_is_expected(mode: Disaggregation) -> None:
    whole = request(400, depths={"decode-0": 24})
    for cluster, asked in (
        (view(*decoders(2)), request(400)),
        (view(*mixers(2)), request(400)),
        (IDLE, request(16)),
        (IDLE, whole),
    ):
        placement = place(cluster, asked, mode)
        assert placement.prefill == (placement.decode,)
        assert placement.local is None
        assert placement.handoff is None
