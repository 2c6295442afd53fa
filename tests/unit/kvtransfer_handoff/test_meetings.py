"""A pair that has met: its first handoff makes no connection. The same checks as for an Open."""

import asyncio

import pytest
from handoff_rig import QUICK, SCHEMA, Rig

from pdserve.core.errors import Unavailable
from pdserve.core.lifecycle import Lifecycle
from pdserve.core.types import Incarnation, WorkerId
from pdserve.kvtransfer.handoff.consumer import Committed
from pdserve.kvtransfer.transports import importers

PROMPT = tuple(range(100, 170))
PREFILL = WorkerId("prefill-0"), Incarnation("prefill-first")


@pytest.mark.parametrize("transport", ["inproc", "shm", "tcp"])
async def test_the_first_handoff_of_a_pair_that_met_makes_no_connection(
    transport: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Rig(transport) as rig:
        assert await rig.handoffs.meet(rig.peer(), 5.0) == transport

        def unexpected(*_: object, **__: object) -> None:
            raise AssertionError("an importer was made for a pair that had met")

        monkeypatch.setattr(importers, "make_importer", unexpected)
        ask = rig.ask(PROMPT)
        result = await rig.handoffs.fetch(ask, rig.peer())
        assert isinstance(result, Committed)
        assert result.transport == transport
        rig.assert_content(ask)


@pytest.mark.parametrize(
    ("schema", "incarnation", "said"),
    [
        (SCHEMA, "prefill-second", "is incarnation prefill-first now"),
        (b"\x02" * 16, "prefill-first", "schema"),
    ],
    ids=["another incarnation", "another schema"],
)
async def test_who_could_not_open_is_offered_nothing(schema: bytes, incarnation: str, said: str) -> None:
    async with Rig(schema=schema) as rig:
        with pytest.raises(Unavailable, match=said):
            await rig.handoffs.meet(rig.peer(incarnation=incarnation), 5.0)
        assert rig.importer_source.given == 0
        assert rig.servicer.in_flight() == 0


async def test_who_is_not_there_cannot_be_met() -> None:
    async with Rig() as rig:
        with pytest.raises(Unavailable, match="cannot be met"):
            await rig.handoffs.meet(rig.peer(port=1), 5.0)


async def test_a_meeting_has_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    async def never(*_: object) -> None:
        await asyncio.Event().wait()

    async with Rig() as rig:
        monkeypatch.setattr(rig.importer_source, "get", never)
        with pytest.raises(Unavailable, match=r"within 0\.05 s"):
            await rig.handoffs.meet(rig.peer(), 0.05)


async def test_a_peer_that_left_while_idle_is_let_go_of_at_once() -> None:
    async with Rig("shm") as rig:
        await rig.handoffs.meet(rig.peer(), 5.0)
        await rig.handoffs.part(*PREFILL)
        assert rig.importer_source.dropped == [PREFILL]


async def test_a_peer_that_left_in_mid_handoff_is_let_go_of_behind_it() -> None:
    async with Rig("shm", config=QUICK) as rig:
        go: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        rig.filler.gate = lambda step: asyncio.shield(go) if step else None
        task = asyncio.create_task(rig.handoffs.fetch(rig.ask(PROMPT), rig.peer()))
        await rig.trail.wait(Lifecycle.RESERVED)
        await rig.handoffs.part(*PREFILL)
        assert rig.importer_source.dropped == []
        go.set_result(None)
        assert isinstance(await task, Committed), "a membership that is wrong costs nobody a handoff"
        await rig.at_rest()
        assert rig.importer_source.dropped == [PREFILL]
