"""What D's model hears of a request: its way, its time, what a handoff took beside queue and prefill."""

from dataclasses import replace

import pytest
from decode_rig import Rig

from pdserve.core.exploration import PrefillPath
from pdserve.core.perfmodel import PerfModel
from pdserve.core.types import FinishReason, Incarnation, OwnerId, WorkerId
from pdserve.kvtransfer.handoff.ask import Committed, FetchedPrefix
from pdserve.kvtransfer.handoff.states import Outcome
from pdserve.workers.decode_request import DecodeRequest
from pdserve.workers.prefill_lessons import PrefillLessons

DONE = Committed(
    owner=OwnerId("handoff/r/0"),
    num_computed=999,
    transport="tcp",
    blocks_moved=63,
    bytes_moved=63_000,
    blocks_reused=0,
    prefill_queue_s=0.5,
    prefill_s=2.0,
    prefill_cached_tokens=0,
    filled_seen_at=13.0,
    committed_at=13.25,
    prefill_worker=WorkerId("prefill-0"),
    prefill_incarnation=Incarnation("one"),
    prefill_pid=1,
)


async def answered(*outcomes: Outcome | str) -> DecodeRequest:
    """A request whose first token came."""
    rig = Rig(*outcomes)
    rig.open(candidates=("prefill-0", "prefill-1", "decode-0") if outcomes else ("decode-0",))
    spec = await rig.until_submitted()
    rig.engine.emit(spec.sequence_id, 0, (5,), FinishReason.LENGTH)
    (request,) = rig.first_tokens
    rig.assert_nothing_left()
    request.route.measured_s = 2.0  # the rig's engine has a clock of its own
    return request


def taught(request: DecodeRequest) -> PerfModel:
    perf = PerfModel()
    PrefillLessons(perf, chunk_tokens=256, block_bytes=1000).first_token(request)
    return perf


async def test_a_handoff_teaches_what_it_took_beside_queue_and_prefill() -> None:
    request = await answered("ok")
    request.handoff, request.marks.serving_open = DONE, 10.0
    perf = taught(request)
    values = perf.snapshot()
    unhidden = values["handoff/tcp/unhidden_factor"] * perf.transfer_seconds(15_000, "tcp").seconds
    assert values["handoff/tcp/fixed_seconds"] + unhidden == pytest.approx(13.25 - 10.0 - 2.5, rel=0.02)
    assert perf.credit_seconds(PrefillPath.LOCAL) == pytest.approx(0.02)


async def test_a_handoff_with_a_fetched_prefix_is_no_measure_of_one_without() -> None:
    request = await answered("ok")
    request.handoff = replace(DONE, prefix=FetchedPrefix(WorkerId("decode-1"), 8))
    request.marks.serving_open = 10.0
    assert "handoff/tcp/fixed_seconds" not in taught(request).snapshot()


async def test_the_owners_own_prefill_earns_handoffs_a_credit() -> None:
    request = await answered()
    assert request.handoff is None
    perf = taught(request)
    assert perf.credit_seconds(PrefillPath.HANDOFF) == pytest.approx(0.02)
    assert perf.credit_seconds(PrefillPath.LOCAL) == 0.0


async def test_detours_teach_no_speed() -> None:
    request = await answered(Outcome.LOST, "ok")
    request.handoff, request.marks.serving_open = DONE, 10.0
    assert request.route.candidates_tried == 1
    values, untaught = taught(request).snapshot(), PerfModel().snapshot()
    assert {name for name in values if values[name] != untaught.get(name)} == {
        "exploration/local/credit_seconds"
    }


async def test_a_try_that_failed_is_used_up() -> None:
    """Or every request would try a prefill worker that never serves, for a credit that nobody spends."""
    request = await answered(Outcome.LOST, Outcome.LOST)
    assert request.route.candidates_tried == 2
    assert request.handoff is None, "D itself served"
    perf = PerfModel()
    perf.observe_path(PrefillPath.LOCAL, 100.0)
    assert perf.credit_seconds(PrefillPath.HANDOFF) > 0.0
    PrefillLessons(perf, chunk_tokens=256, block_bytes=1000).first_token(request)
    assert perf.credit_seconds(PrefillPath.HANDOFF) == 0.0
