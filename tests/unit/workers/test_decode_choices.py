"""Several choices of a request: one prompt, shared blocks, and all of them end together or one by one."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from decode_rig import HEADROOM, POOL_BLOCKS, SEED, Rig

from pdserve.core.clock import MonotonicClock
from pdserve.core.config import SessionConfig
from pdserve.core.errors import GrpcCode, InternalError, WorkerLost
from pdserve.core.seed import derive_seed
from pdserve.core.types import (
    Constraint,
    ConstraintKind,
    FinishReason,
    OwnerId,
    RequestId,
    SequenceId,
    blocks_for,
)
from pdserve.workers.engine.messages import SequenceSpec
from pdserve.workers.session_link import SessionLink


def sequence(choice: int | str) -> SequenceId:
    return SequenceId(f"r/{choice}")


async def forked(rig: Rig, n: int = 3, tokens: int = 70) -> list[SequenceSpec]:
    """A request whose choices are with the engine, by a handoff."""
    assert rig.open(n=n, tokens=tokens) is None
    await rig.until_submitted()
    assert len(rig.engine.specs) == n
    return rig.engine.specs


@pytest.mark.parametrize("tokens", [70, 65, 64, 17, 1])
@pytest.mark.parametrize("n", [1, 2, 8])
async def test_the_promise_is_what_the_choices_hold_when_all_are_at_their_headroom(
    n: int, tokens: int
) -> None:
    rig = Rig("ok", pool_blocks=128)
    rig.open(n=n, tokens=tokens)
    await rig.until_submitted()
    if rig.engine.specs[0].sampling is None:
        await rig.prefill_prompt()
    promised = rig.pool.counts().promised
    assert len(rig.engine.live()) == n
    for spec in rig.engine.specs:
        if spec.sampling is not None:
            if not rig.pool.table(spec.owner):  # the engine's own admission
                rig.pool.allocate(spec.owner, 1)
            more = blocks_for(tokens + HEADROOM) - len(rig.pool.table(spec.owner))
            rig.pool.allocate(spec.owner, more)
    assert rig.pool.counts().held == promised
    rig.role.fail_all(WorkerLost("over"))
    await rig.until_ended()
    rig.assert_nothing_left()


async def test_choices_share_full_blocks_and_copy_the_partial_one_before_any_of_them_runs() -> None:
    rig = Rig("ok")
    specs = await forked(rig, n=4)
    tables = [rig.pool.table(spec.owner) for spec in specs]
    assert all(table[:4] == tables[0][:4] for table in tables)  # 69 positions: 4 full blocks
    private = [table[4] for table in tables]
    assert len(set(private)) == 4
    assert rig.copies == [(private[0], block) for block in private[1:]]
    assert rig.pool.counts().held == 4 + 4
    assert [spec.num_computed for spec in specs] == [69] * 4
    assert [spec.sampling.seed for spec in specs if spec.sampling] == [derive_seed(SEED, i) for i in range(4)]
    for choice in range(4):
        rig.engine.emit(sequence(choice), 0, (5,), FinishReason.LENGTH)
    rig.assert_nothing_left()


async def test_a_prompt_that_ends_with_a_block_has_nothing_to_copy() -> None:
    """17 tokens: 16 positions are there, position 16 begins a block of each choice's own."""
    rig = Rig()
    rig.open(n=3, tokens=17, candidates=("decode-0",))
    await rig.until_submitted()
    (prompt,) = rig.engine.specs
    assert (prompt.sampling, len(prompt.token_ids), len(prompt.chain)) == (None, 16, 1)
    await rig.prefill_prompt()
    tables = [rig.pool.table(spec.owner) for spec in rig.engine.specs[1:]]
    assert [len(table) for table in tables] == [2, 2, 2]
    assert rig.copies == []
    assert rig.pool.counts().held == 1 + 3
    rig.role.fail_all(WorkerLost("over"))
    await rig.until_ended()
    rig.assert_nothing_left()


async def test_a_choice_without_room_for_its_block_leaves_it_to_the_engine() -> None:
    rig = Rig("ok")
    other = OwnerId("other")
    rig.pool.allocate(other, POOL_BLOCKS - 5 - 1)  # 5 blocks for the prompt, one for the second choice
    specs = await forked(rig)
    assert [spec.num_computed for spec in specs] == [69, 69, 0]
    assert rig.pool.table(specs[2].owner) == ()
    for choice in range(3):
        rig.engine.emit(sequence(choice), 0, (5,), FinishReason.LENGTH)
    rig.pool.release(other)
    rig.assert_nothing_left()


async def test_a_request_ends_with_its_last_choice_and_every_choice_has_its_own_usage() -> None:
    rig = Rig("ok")
    await forked(rig)
    rig.engine.emit(sequence(1), 0, (5,))
    rig.engine.emit(sequence(0), 0, (6, 7), FinishReason.STOP)
    rig.engine.emit(sequence(2), 0, (8,), FinishReason.LENGTH)
    assert rig.role.unfinished() == 1
    rig.role.acknowledge(RequestId("r"))
    assert rig.role.in_flight() == 1  # it has not ended
    rig.engine.emit(sequence(1), 1, (9, 10), FinishReason.LENGTH)
    assert rig.role.unfinished() == 0
    items = rig.items()
    assert [item.HasField("ledger") for item in items] == [True, False, False, False]
    ends = {item.choice: item.usage.completion_tokens for item in items if item.finish_reason}
    assert ends == {0: 2, 2: 1, 1: 3}
    rig.role.acknowledge(RequestId("r"))
    assert rig.role.in_flight() == 0
    rig.assert_nothing_left()


async def test_an_attach_sends_each_choice_from_where_it_was_left() -> None:
    rig = Rig("ok")
    await forked(rig)
    for index in range(3):
        for choice in range(3):
            if (choice, index) != (1, 2):
                reason = FinishReason.LENGTH if (choice, index) == (0, 2) else None
                rig.engine.emit(sequence(choice), index, (10 * choice + index,), reason)
    rig.role.detach(rig.link)
    rig.engine.emit(sequence(1), 2, (12,))
    rig.link = SessionLink("router")
    rig.role.attach(rig.link, RequestId("r"), [3, 1])  # of the third choice nothing was seen
    told = [(item.choice, list(item.token_ids)) for item in rig.items()]
    assert told == [(2, [20]), (1, [11]), (2, [21]), (0, [2]), (2, [22]), (1, [12])]
    rig.role.fail_all(WorkerLost("over"))
    await rig.until_ended()
    rig.assert_nothing_left()


@pytest.mark.parametrize("where", ["prompt", "choices", "one is over"])
@pytest.mark.parametrize("how", ["cancel", "deadline", "drain"])
async def test_every_early_end_stops_all_choices(
    where: str, how: str, leap: Callable[[float], Awaitable[None]]
) -> None:
    rig = Rig("ok")
    deadline = MonotonicClock().now() + 60.0 if how == "deadline" else None
    rig.open(n=3, deadline=deadline, candidates=("decode-0",) if where == "prompt" else ("prefill-0",))
    await rig.until_submitted()
    if where == "one is over":
        rig.engine.emit(sequence(1), 0, (5,), FinishReason.STOP)
    if where == "prompt":
        rig.pool.allocate(rig.engine.specs[0].owner, 5)
    if how == "cancel":
        rig.role.cancel(RequestId("r"))
    elif how == "drain":
        assert await rig.role.drain(0.0) == 1
    else:
        await leap(60.0)
    await rig.until_ended()
    assert not rig.engine.live()
    failures = [item for item in rig.items() if item.HasField("failure")]
    assert len(failures) == 1
    rig.assert_nothing_left()


async def test_one_choice_that_fails_ends_the_request_with_its_error() -> None:
    rig = Rig("ok")
    specs = await forked(rig)
    rig.engine.emit(sequence(1), 0, (), error=InternalError("its runner broke"))
    await rig.until_ended()
    assert rig.engine.ended == {spec.sequence_id for spec in specs}
    failures = [item.failure for item in rig.items() if item.HasField("failure")]
    assert [failure.message for failure in failures] == ["its runner broke"]
    rig.assert_nothing_left()


async def test_a_choice_that_ends_well_while_the_others_are_aborted_does_not_hide_the_abort() -> None:
    rig = Rig("ok")
    await forked(rig, n=2)
    rig.engine.deaf.add(sequence(1))
    rig.role.cancel(RequestId("r"))
    assert rig.role.unfinished() == 1
    rig.engine.emit(sequence(1), 0, (5,), FinishReason.LENGTH)
    assert rig.items()[-1].failure.code == int(GrpcCode.CANCELLED)
    assert rig.role.unfinished() == 0
    rig.assert_nothing_left()


async def test_an_engine_that_takes_only_the_first_choice_leaves_nothing() -> None:
    rig = Rig("ok")
    rig.engine.takes = 1
    rig.open(n=3)
    await rig.until_ended()
    assert "full" in rig.items()[-1].failure.message
    rig.assert_nothing_left()


async def test_tokens_without_a_router_are_bounded_for_each_choice() -> None:
    rig = Rig("ok")
    await forked(rig, n=2)
    rig.role.detach(rig.link)
    bound = SessionConfig().unacknowledged_tokens
    for index in range(bound):
        for choice in range(2):
            rig.engine.emit(sequence(choice), index, (5,))
    assert rig.role.unfinished() == 1
    rig.engine.emit(sequence(0), bound, (5,))
    assert rig.role.unfinished() == 0
    rig.assert_nothing_left()


async def test_a_cancel_in_the_middle_of_a_fork_leaves_nothing() -> None:
    rig = Rig("ok")
    rig.open(n=6)
    async with asyncio.timeout(5):
        while len(rig.copies) < 3:
            await asyncio.sleep(0)
    assert not rig.engine.specs
    rig.role.cancel(RequestId("r"))
    await rig.until_ended()
    assert len(rig.copies) < 5
    assert not rig.engine.specs
    assert [item.failure.code for item in rig.items()] == [int(GrpcCode.CANCELLED)]
    rig.assert_nothing_left()


async def test_a_cancel_between_the_prompt_and_the_fork_leaves_nothing() -> None:
    rig = Rig()
    rig.open(n=3, candidates=("decode-0",))
    (prompt,) = [await rig.until_submitted()]
    rig.pool.allocate(prompt.owner, blocks_for(len(prompt.token_ids)))
    rig.engine.emit(prompt.sequence_id, 0, (), FinishReason.LENGTH)
    rig.role.cancel(RequestId("r"))  # before the request's task hears of the prompt's end
    await rig.until_ended()
    assert rig.engine.specs == [prompt]
    rig.assert_nothing_left()


async def test_a_constraint_that_does_not_compile_ends_the_request_before_anybody_prefills() -> None:
    rig = Rig("ok")
    rig.open(n=3, constraint=Constraint(ConstraintKind.REGEX, "wrong"))
    await rig.until_ended()
    assert (rig.handoffs.asked, rig.engine.specs) == ([], [])
    assert [item.failure.code for item in rig.items()] == [int(GrpcCode.INVALID_ARGUMENT)]
    rig.assert_nothing_left()
