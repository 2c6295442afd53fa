"""What D makes of the prefix holder that a router names: it tells P, or fetches for itself."""

import asyncio

import pytest
from decode_rig import ROOT, Rig

from pdserve.core.types import BLOCK_TOKENS, FinishReason, Incarnation, OwnerId, WorkerId
from pdserve.kvtransfer.handoff.ask import HandoffPeer, PrefixHolder
from pdserve.kvtransfer.handoff.states import Outcome
from pdserve.kvtransfer.names import chain

HOLDER = PrefixHolder(HandoffPeer(WorkerId("holder-0"), Incarnation("h1"), "127.0.0.1:3"), 3)
DEAR = {"prefill/token_seconds": 1.0}


def hold(rig: Rig, blocks: int, tokens: int = 70) -> None:
    """D has the prompt's first blocks in its cache."""
    owner = OwnerId("test/hold")
    taken = rig.pool.allocate(owner, blocks)
    assert taken is not None
    for block, name in zip(taken, chain(ROOT, range(tokens)), strict=False):
        rig.pool.name(owner, block, name)
    rig.pool.release(owner)


async def finish(rig: Rig) -> None:
    """One token, and no more."""
    spec = await rig.until_submitted()
    rig.engine.emit(spec.sequence_id, 0, (5,), FinishReason.LENGTH)
    await rig.until_ended()


async def test_p_is_told_whom_the_router_named() -> None:
    rig = Rig("served")
    rig.open(prefix=HOLDER)
    await finish(rig)
    assert [ask.prefix for ask in rig.handoffs.asks] == [HOLDER]
    rig.assert_nothing_left()


@pytest.mark.parametrize(("held", "itself"), [(2, False), (3, False), (4, True)])
async def test_d_names_itself_where_it_holds_more_than_the_index_knows_of(held: int, itself: bool) -> None:
    rig = Rig("served")
    hold(rig, held, tokens=100)
    rig.open(tokens=100, prefix=HOLDER)
    await finish(rig)
    (named,) = (ask.prefix for ask in rig.handoffs.asks)
    if itself:
        me = HandoffPeer(WorkerId("decode-0"), Incarnation("d1"), "127.0.0.1:1")
        assert named == PrefixHolder(me, held)
    else:
        assert named == HOLDER
    rig.assert_nothing_left()


async def test_d_fetches_for_itself_before_it_prefills_itself() -> None:
    rig = Rig("served")
    rig.perf.restore(DEAR)
    rig.open(candidates=("decode-0",), prefix=HOLDER)
    await finish(rig)
    (ask,) = rig.handoffs.asks
    assert rig.handoffs.asked == ["holder-0"]
    assert ask.held_only
    assert ask.token_ids == tuple(range(3 * BLOCK_TOKENS))
    assert ask.prefix is None  # who is asked asks nobody else
    route = rig.items()[0].route
    assert (route.prefix_worker, route.prefix_blocks_fetched) == ("holder-0", 3)
    assert route.prefill_worker == "decode-0"
    rig.assert_nothing_left()


async def test_a_fetch_that_fails_is_a_prefill_of_everything() -> None:
    rig = Rig(Outcome.LOST)
    rig.perf.restore(DEAR)
    rig.open(candidates=("decode-0",), prefix=HOLDER)
    await finish(rig)
    route = rig.items()[0].route
    assert (route.prefix_worker, route.prefix_blocks_fetched) == ("", 0)
    rig.assert_nothing_left()


async def test_a_cancel_in_mid_fetch_ends_the_request_with_nothing_left() -> None:
    rig = Rig(None)
    rig.perf.restore(DEAR)
    rig.open(candidates=("decode-0",), prefix=HOLDER)
    await rig.handoffs.begun.wait()
    assert rig.handoffs.asks[0].held_only
    rig.role.cancel(rig.handoffs.asks[0].request_id)
    await rig.until_ended()
    await asyncio.sleep(0)
    assert not rig.engine.specs
    rig.assert_nothing_left()
