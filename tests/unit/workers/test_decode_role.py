"""D owns a request: promise first, candidates in order, and nothing left at any end (invariants 2 and 4)."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from decode_rig import HEADROOM, POOL_BLOCKS, ROOT, Rig

from pdserve.core.clock import MonotonicClock
from pdserve.core.config import SessionConfig
from pdserve.core.errors import GrpcCode, WorkerLost
from pdserve.core.types import FinishReason, OwnerId, RequestId, blocks_for, hit_limit
from pdserve.kvtransfer.handoff.states import Outcome
from pdserve.kvtransfer.names import chain
from pdserve.workers.session_link import SessionLink


@pytest.mark.parametrize(
    ("max_tokens", "covered"),
    [(8, 7), (HEADROOM, HEADROOM - 1), (1000, HEADROOM)],
    ids=["short", "equal", "long"],
)
async def test_a_promise_is_the_prompt_and_the_headroom_before_anybody_is_asked(
    max_tokens: int, covered: int
) -> None:
    """The last token of a completion needs no room. 73 + 7 tokens fill their blocks to the brim."""
    rig = Rig(None)
    assert rig.open(tokens=73, max_tokens=max_tokens) is None
    assert rig.pool.counts().promised == blocks_for(73 + covered)
    assert rig.handoffs.asked == []  # the promise came first
    await rig.handoffs.begun.wait()
    rig.role.cancel(RequestId("r"))
    await rig.until_ended()
    rig.assert_nothing_left()


async def test_what_cannot_be_promised_is_refused_at_once_and_queues_nothing() -> None:
    rig = Rig(*[None] * 5)
    opened = 0
    while (replace := rig.open(f"r{opened}")) is None:
        opened += 1
    assert opened == POOL_BLOCKS // blocks_for(70 + HEADROOM)
    assert replace.request_id == f"r{opened}"
    assert str(blocks_for(70 + HEADROOM)) in replace.reason
    assert str(POOL_BLOCKS) in replace.reason
    assert replace.retry_after_s > 0
    assert rig.role.in_flight() == opened
    async with asyncio.timeout(5):
        while len(rig.handoffs.asked) < opened:
            await asyncio.sleep(0)
    # Memory that comes back serves who asks then, not who was refused.
    rig.role.cancel(RequestId("r0"))
    async with asyncio.timeout(5):
        while rig.role.unfinished() == opened:
            await asyncio.sleep(0)
    assert rig.open("later") is None
    async with asyncio.timeout(5):
        while len(rig.handoffs.asked) <= opened:
            await asyncio.sleep(0)
    rig.role.fail_all(WorkerLost("over"))
    await rig.until_ended()
    rig.assert_nothing_left()


async def test_what_a_preempted_sequence_needs_comes_before_new_promises() -> None:
    rig = Rig("ok", None, "ok")
    rig.open("old", 70, max_tokens=400)
    spec = await rig.until_submitted()
    sampled = 200
    rig.engine.emit(spec.sequence_id, 0, tuple(range(sampled)))
    said = len(rig.items())
    rig.open("young", 70)
    assert rig.pool.counts().promised == 2 * blocks_for(70 + HEADROOM) < POOL_BLOCKS // 2

    rig.engine.preempt(spec.sequence_id, sampled)
    owed = blocks_for(70 + sampled + HEADROOM)
    assert rig.pool.counts().promised == owed + blocks_for(70 + HEADROOM)
    assert len(rig.items()) == said  # its router hears nothing of it
    rig.engine.preempt(spec.sequence_id, sampled)
    assert rig.pool.counts().promised == owed + blocks_for(70 + HEADROOM)  # owed once
    assert (replace := rig.open("new")) is not None
    assert str(POOL_BLOCKS) in replace.reason

    rig.engine.emit(spec.sequence_id, sampled, (5,), FinishReason.LENGTH)
    assert rig.open("new") is None
    rig.role.fail_all(WorkerLost("over"))
    await rig.until_ended()
    rig.assert_nothing_left()


@pytest.mark.parametrize(
    ("max_tokens", "sampled"), [(HEADROOM, 30), (90, 80)], ids=["inside its headroom", "near its end"]
)
async def test_a_preempted_sequence_is_owed_no_more_than_it_may_ever_need(
    max_tokens: int, sampled: int
) -> None:
    rig = Rig("ok")
    rig.open(tokens=70, max_tokens=max_tokens)
    spec = await rig.until_submitted()
    rig.engine.emit(spec.sequence_id, 0, tuple(range(sampled)))
    rig.engine.preempt(spec.sequence_id, sampled)
    assert rig.pool.counts().promised == blocks_for(70 + max_tokens - 1)
    rig.engine.emit(spec.sequence_id, sampled, (5,), FinishReason.LENGTH)
    rig.assert_nothing_left()


async def test_candidates_are_asked_in_order_until_one_serves() -> None:
    """EXPIRED is P's last word after VERIFIED, too: discard, go on."""
    rig = Rig(Outcome.EXPIRED, Outcome.CORRUPT, "ok")
    rig.open(candidates=("prefill-2", "prefill-0", "prefill-1", "decode-0"))
    spec = await rig.until_submitted()
    assert rig.handoffs.asked == ["prefill-2", "prefill-0", "prefill-1"]
    assert spec.num_computed == 69
    rig.engine.emit(spec.sequence_id, 0, (5,), FinishReason.LENGTH)
    route = rig.items()[-1].route
    assert (route.prefill_worker, route.candidates_tried) == ("prefill-1", 2)
    rig.assert_nothing_left()


async def test_when_all_others_failed_the_worker_computes_by_itself() -> None:
    rig = Rig(Outcome.LOST, Outcome.FAILED)
    rig.open()
    spec = await rig.until_submitted()
    assert rig.handoffs.asked == ["prefill-0", "prefill-1"]
    assert spec.num_computed == 0
    rig.engine.emit(spec.sequence_id, 0, (5,), FinishReason.LENGTH)
    assert rig.items()[-1].route.prefill_worker == "decode-0"
    assert not rig.items()[-1].route.transport
    rig.assert_nothing_left()


async def test_a_prompt_that_is_held_or_has_no_block_is_not_handed_off() -> None:
    rig = Rig()
    prompt = tuple(range(70))
    blocks = rig.pool.allocate(OwnerId("earlier"), hit_limit(70))
    assert blocks is not None
    for block, name in zip(blocks, chain(ROOT, prompt), strict=True):
        rig.pool.name(OwnerId("earlier"), block, name)
    rig.pool.release(OwnerId("earlier"))
    for name, tokens in (("held", 70), ("short", 16)):
        rig.engine.submitted.clear()
        rig.open(name, tokens)
        spec = await rig.until_submitted()
        rig.engine.emit(spec.sequence_id, 0, (5,), FinishReason.LENGTH)
    assert rig.handoffs.asked == []
    rig.assert_nothing_left()


@pytest.mark.parametrize(
    ("reasons", "code"),
    [
        ((Outcome.REJECTED, Outcome.REJECTED), GrpcCode.RESOURCE_EXHAUSTED),
        ((Outcome.REJECTED, Outcome.LOST), GrpcCode.UNAVAILABLE),
        ((Outcome.DEADLINE, Outcome.LOST), GrpcCode.DEADLINE_EXCEEDED),
    ],
    ids=["all full", "one lost", "too late"],
)
async def test_when_nobody_serves_the_reason_decides_the_status(
    reasons: tuple[Outcome, ...], code: GrpcCode
) -> None:
    rig = Rig(*reasons)
    rig.open(candidates=("prefill-0", "prefill-1"))
    await rig.until_ended()
    failure = rig.items()[-1].failure
    assert failure.code == int(code)
    last = "prefill-0" if Outcome.DEADLINE in reasons else "prefill-1"  # whom time was left to ask
    assert last in failure.message
    rig.assert_nothing_left()


@pytest.mark.parametrize("where", ["in the handoff", "in the engine"])
@pytest.mark.parametrize("how", ["cancel", "deadline", "drain"])
async def test_every_early_end_gives_the_promise_back(
    where: str, how: str, leap: Callable[[float], Awaitable[None]]
) -> None:
    rig = Rig(None if where == "in the handoff" else "ok")
    deadline = MonotonicClock().now() + 60.0 if how == "deadline" else None
    rig.open(deadline=deadline)
    if where == "in the handoff":
        await rig.handoffs.begun.wait()
    else:
        spec = await rig.until_submitted()
        rig.engine.emit(spec.sequence_id, 0, (5,))
    assert rig.pool.counts().promised > 0
    if how == "cancel":
        rig.role.cancel(RequestId("r"))
    elif how == "drain":
        assert await rig.role.drain(0.0) == 1
        assert rig.open("new") is not None  # a draining worker takes nothing new
    else:
        await leap(60.0)
    await rig.until_ended()
    codes = {"cancel": GrpcCode.CANCELLED, "deadline": GrpcCode.DEADLINE_EXCEEDED}
    failure = rig.items()[-1].failure
    assert failure.code == int(codes.get(how, GrpcCode.UNAVAILABLE))
    assert failure.retriable is (how == "drain")
    rig.assert_nothing_left()


async def test_an_open_of_a_known_request_is_an_attach() -> None:
    rig = Rig("ok")
    rig.open()
    spec = await rig.until_submitted()
    rig.engine.emit(spec.sequence_id, 0, (5,))
    promised = rig.pool.counts().promised
    rig.link = SessionLink("router")
    assert rig.open() is None
    assert rig.pool.counts().promised == promised
    assert rig.role.in_flight() == 1
    assert [list(item.token_ids) for item in rig.items()] == [[5]]  # told again, from the beginning
    rig.engine.emit(spec.sequence_id, 1, (6,), FinishReason.LENGTH)
    assert [list(item.token_ids) for item in rig.items()] == [[5], [6]]
    rig.role.acknowledge(RequestId("r"))
    assert rig.role.in_flight() == 0
    rig.assert_nothing_left()


@pytest.mark.parametrize("seen", range(6))
async def test_an_attach_sends_what_was_not_seen_and_nothing_twice(seen: int) -> None:
    """Tokens that come while nobody listens are kept; those that were forwarded are not sent again."""
    rig = Rig("ok")
    rig.open()
    spec = await rig.until_submitted()
    for index in range(5):
        if index == 2:
            rig.role.detach(rig.link)
        reason = FinishReason.LENGTH if index == 4 else None
        rig.engine.emit(spec.sequence_id, index, (10 + index,), reason)
    rig.link = SessionLink("router")
    rig.role.attach(rig.link, RequestId("r"), [seen])
    items = rig.items()
    tokens = [token for item in items for token in item.token_ids if item.first_index >= seen]
    assert tokens == [10 + index for index in range(seen, 5)]
    assert items[-1].finish_reason == "length"  # the end is told always: it may be what was lost
    rig.role.acknowledge(RequestId("r"))
    assert rig.role.in_flight() == 0
    rig.assert_nothing_left()


async def test_an_attach_to_a_request_that_is_not_here_is_a_retriable_loss() -> None:
    rig = Rig()
    rig.role.attach(rig.link, RequestId("gone"), [3])
    (item,) = rig.items()
    assert item.failure.code == int(GrpcCode.UNAVAILABLE)
    assert item.failure.retriable


async def test_a_request_that_nobody_claims_ends_after_its_grace() -> None:
    rig = Rig("ok", reattach_s=0.02)
    rig.open()
    spec = await rig.until_submitted()
    rig.engine.emit(spec.sequence_id, 0, (5,))
    rig.role.detach(rig.link)
    assert rig.role.unfinished() == 1  # it goes on until then
    async with asyncio.timeout(5):
        while rig.role.in_flight():
            await asyncio.sleep(0.005)
    rig.assert_nothing_left()


async def test_tokens_without_a_router_are_bounded() -> None:
    rig = Rig("ok")
    rig.open()
    spec = await rig.until_submitted()
    rig.role.detach(rig.link)
    bound = SessionConfig().unacknowledged_tokens
    for index in range(bound):
        rig.engine.emit(spec.sequence_id, index, (5,))
    assert rig.role.unfinished() == 1
    rig.engine.emit(spec.sequence_id, bound, (5,))
    assert rig.role.unfinished() == 0
    rig.assert_nothing_left()


@pytest.mark.parametrize("how", ["cancel", "deadline", "drain"])
async def test_an_end_in_the_moment_of_the_open_gives_the_promise_back(how: str) -> None:
    """Before the request's task has made its first step."""
    rig = Rig(None)
    rig.open(deadline=MonotonicClock().now() - 1.0 if how == "deadline" else None)
    if how == "cancel":
        rig.role.cancel(RequestId("r"))
    elif how == "drain":
        rig.role.fail_all(WorkerLost("over"))
    await rig.until_ended()
    assert rig.items()[-1].HasField("failure")
    rig.assert_nothing_left()


async def test_every_break_of_a_session_has_its_own_grace(leap: Callable[[float], Awaitable[None]]) -> None:
    rig = Rig("ok", reattach_s=40.0)
    rig.open()
    spec = await rig.until_submitted()
    rig.role.detach(rig.link)
    await leap(30.0)  # 10 s are left of the first grace
    rig.link = SessionLink("router")
    rig.role.attach(rig.link, RequestId("r"), [0])
    rig.role.detach(rig.link)
    await leap(20.0)  # past the end of the first, within the second
    assert rig.role.unfinished() == 1
    rig.link = SessionLink("router")
    rig.role.attach(rig.link, RequestId("r"), [0])
    rig.engine.emit(spec.sequence_id, 0, (5,), FinishReason.LENGTH)
    assert rig.items()[-1].finish_reason == "length"
