"""What leads to a peer that is gone is closed, and never under a handoff that uses it."""

import asyncio

from handoff_rig import HeldImporter, Rig, Wire

from pdserve.core.types import BlockId, HandoffId
from pdserve.kvtransfer.handoff.consumer import Committed, NotServed
from pdserve.kvtransfer.handoff.states import Outcome
from pdserve.kvtransfer.transports.base import Failed, Grant, Landed, Segment

FIRST, SECOND = tuple(range(100, 170)), tuple(range(200, 270))


async def still_leads(rig: Rig, importer: HeldImporter) -> bool:
    """Whether an importer can fetch: P's blocks 0 into D's, which nobody has."""
    generation = rig.p.pool.generation(BlockId(0))
    segment = Segment(BlockId(0), generation, BlockId(rig.d.num_blocks - 1), 16)
    report = await importer.fetch(Grant(HandoffId("probe"), 1, 0, (segment,)))
    assert isinstance(report, Landed | Failed)
    return isinstance(report, Landed)


async def test_a_peer_that_is_gone_is_let_go_of_and_found_again_when_it_is_back() -> None:
    async with Rig() as rig:
        ask = rig.ask(FIRST)
        assert isinstance(await rig.handoffs.fetch(ask, rig.peer()), Committed)
        await rig.at_rest()
        assert await still_leads(rig, rig.importers[0])

        nobody = rig.peer(port=1)
        lost = await rig.handoffs.fetch(rig.ask(SECOND), nobody)
        assert isinstance(lost, NotServed)
        assert lost.reason is Outcome.LOST
        await rig.at_rest()
        assert rig.importer_source.dropped == [(nobody.worker, nobody.incarnation)]
        assert not await still_leads(rig, rig.importers[0])

        again = rig.ask(SECOND)
        assert isinstance(await rig.handoffs.fetch(again, rig.peer()), Committed)
        assert len(rig.importers) == 2
        rig.assert_content(again)
        for owner in (ask.owner, again.owner):
            rig.d.pool.release(owner)


async def test_a_lost_peer_is_let_go_of_behind_the_last_handoff_that_uses_it() -> None:
    """One of two streams breaks; the other handoff fetches meanwhile, and commits."""
    wire, rig = Wire(), Rig(decode_blocks=16)
    rig.prepare = lambda importer: importer.gate.clear()
    async with rig:
        port = await wire.start(rig.port)
        cut = asyncio.create_task(rig.handoffs.fetch(rig.ask(FIRST), rig.peer(port=port)))
        ask = rig.ask(SECOND)
        kept = asyncio.create_task(rig.handoffs.fetch(ask, rig.peer()))
        async with asyncio.timeout(20):
            while rig.d.pool.counts().loading < 8:  # both fetch
                await asyncio.sleep(0.01)
            wire.cut()
            assert isinstance(lost := await cut, NotServed)
            assert lost.reason is Outcome.LOST
            while rig.handoffs.in_flight() > 1:
                await asyncio.sleep(0.01)
            assert rig.importer_source.dropped == []
            rig.importers[0].gate.set()
            assert isinstance(await kept, Committed)
        rig.assert_content(ask)
        await rig.at_rest()
        assert len(rig.importer_source.dropped) == 1
        assert not await still_leads(rig, rig.importers[0])
        rig.d.pool.release(ask.owner)
        await wire.close()


async def test_a_handoff_that_failed_at_a_live_peer_keeps_the_way_to_it() -> None:
    async with Rig() as rig:
        ask = rig.ask(FIRST)
        assert isinstance(await rig.handoffs.fetch(ask, rig.peer()), Committed)
        rig.filler.fail_at = 0
        assert isinstance(await rig.handoffs.fetch(rig.ask(SECOND), rig.peer()), NotServed)
        await rig.at_rest()
        assert rig.importer_source.dropped == []
        assert await still_leads(rig, rig.importers[0])
        rig.d.pool.release(ask.owner)
