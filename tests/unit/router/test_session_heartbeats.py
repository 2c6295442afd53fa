"""What a session makes of the numbers in a worker's heartbeats, and of what it hears between two of them."""

import dataclasses
import math

import pytest
from router_views import record, request, view, worker

from pdserve.core.clock import ManualClock
from pdserve.core.config import SessionConfig
from pdserve.core.exploration import PrefillPath
from pdserve.core.types import Role
from pdserve.core.worker_record import WorkerLoad
from pdserve.proto import worker_pb2
from pdserve.router.policies.hybrid import HybridPolicy
from pdserve.router.sessions import WorkerSession
from pdserve.router.token_stream import TokenStream
from pdserve.router.view import WorkerView


def greeted() -> WorkerSession:
    """A session with decode-0 that is up, without a connection."""
    member = record("decode-0", Role.DECODE)
    session = WorkerSession(member, "router", SessionConfig(), ManualClock())
    hello = worker_pb2.WorkerHello(worker=member.worker, incarnation=member.incarnation)
    session._receive(worker_pb2.SessionResponse(hello=hello))
    return session


def beat(session: WorkerSession, load: worker_pb2.WorkerLoad) -> WorkerView:
    """The worker as placements see it after such a heartbeat."""
    session._receive(worker_pb2.SessionResponse(heartbeat=worker_pb2.WorkerHeartbeat(load=load)))
    plain = worker("decode-0", Role.DECODE)
    return dataclasses.replace(
        plain,
        record=session.record,
        load=session.report.load,
        perf=session.report.perf,
        traffic=session.report.traffic.now,
        ended=session.report.ended,
    )


NAMES = (
    "prefill/step_seconds",
    "prefill/attention_seconds",
    "decode/context_token_seconds",
    "transfer/shm/byte_seconds",
    "handoff/shm/unhidden_factor",
    "exploration/handoff/credit_seconds",
)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -1.0, 1e308, 1e15])
def test_no_number_in_a_heartbeat_breaks_a_placement(value: float) -> None:
    load = worker_pb2.WorkerLoad(
        role_weight=value,
        queued_prefill_tokens=2**64 - 1,
        queued_prefills=1,
        running=2**32 - 1,
        context_tokens=2**64 - 1,
        prefills=2**64 - 1,
        prefill_busy_s=value,
        perf_model=dict.fromkeys(NAMES, value),
        ways={"prefill-0": "shm"},
    )
    load.blocks.promised = 2**32 - 1
    owner = beat(greeted(), load)
    placement = HybridPolicy().place(view(worker("prefill-0", Role.PREFILL), owner), request(800), 0.0)
    assert placement is not None
    assert placement.local is not None
    assert placement.handoff is not None
    for cost in (placement.local, placement.handoff):
        assert math.isfinite(cost.total_s)
        assert cost.total_s > 0.0
    assert math.isfinite(placement.prefill_s)


def test_no_worker_asks_for_more_exploring_than_one_request_may_pay() -> None:
    load = worker_pb2.WorkerLoad(perf_model={"exploration/handoff/credit_seconds": 1e9})
    assert beat(greeted(), load).perf.credit_seconds(PrefillPath.HANDOFF) <= 10.0


def test_a_stream_that_ended_since_the_heartbeat_delays_nobody() -> None:
    """Or who asks again at once finds its own last request in the way."""
    session = greeted()
    assert beat(session, worker_pb2.WorkerLoad(running=2)).streams == 2
    session.open(worker_pb2.OpenRequest(request_id="r"), TokenStream(16, 1), None, lambda: None)
    for first, finish in ((0, ""), (1, "stop")):
        item = worker_pb2.FrameItem(request_id="r", first_index=first, token_ids=[7], finish_reason=finish)
        assert session.report.ended == 0
        session._receive(worker_pb2.SessionResponse(frame=worker_pb2.Frame(items=[item])))
    assert session.report.ended == 1
    assert beat(session, worker_pb2.WorkerLoad(running=1)).streams == 1, "the next heartbeat knows"
    seen = dataclasses.replace(worker("decode-0", Role.DECODE), load=WorkerLoad(running=2), ended=1)
    assert seen.streams == 1
    assert dataclasses.replace(seen, ended=5).streams == 0
