"""How a pair's rung is settled, what happens when it does not work, and how long an importer lives."""

import asyncio
import logging
from collections.abc import AsyncIterator

import pytest

from pdserve.core.errors import Unavailable
from pdserve.core.types import BlockId, HandoffId, Incarnation, WorkerId
from pdserve.kvtransfer.pool.storage import KvStorage
from pdserve.kvtransfer.transports.base import (
    TRANSPORT_LADDER,
    Failed,
    Grant,
    Importer,
    Landed,
    Offer,
    Segment,
)
from pdserve.kvtransfer.transports.importers import ImporterCache, RungUse
from pdserve.kvtransfer.transports.tcp import TcpImporter
from pdserve.kvtransfer.transports.way import TRIAL_FAILURES

BOTH = ("shm", "tcp")
P = WorkerId("prefill-0")
FIRST, SECOND = Incarnation("a"), Incarnation("b")


@pytest.fixture
async def cache(storage: KvStorage) -> AsyncIterator[ImporterCache]:
    made = ImporterCache(storage, TRANSPORT_LADDER, capacity=2, timeout_s=5.0)
    yield made
    await made.close()


def changed(offer: Offer, **parameters: str) -> Offer:
    return Offer(offer.transport, {**offer.parameters, **parameters})


def grant(generation: int = 1, handoff: str = "h") -> Grant:
    return Grant(HandoffId(handoff), 1, 0, (Segment(BlockId(0), generation, BlockId(0), 16),))


async def fail(importer: Importer | None, times: int = TRIAL_FAILURES) -> None:
    """By asking for what is not there, in so many handoffs."""
    assert importer is not None
    for number in range(times):
        assert isinstance(await importer.fetch(grant(7, f"failed-{number}")), Failed)


async def rung(
    cache: ImporterCache, offers: dict[str, Offer], incarnation: Incarnation = FIRST
) -> tuple[str, Importer]:
    importer = await cache.get(P, incarnation, list(offers.values()))
    assert importer is not None
    return importer.transport, importer


async def test_a_pair_in_one_process_gets_inproc_others_shm_without_a_warning(
    cache: ImporterCache, offers: dict[str, Offer], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert (await rung(cache, offers))[0] == "inproc"
        away = {**offers, "inproc": changed(offers["inproc"], token="00" * 16)}
        assert (await rung(cache, away, SECOND))[0] == "shm"
        far = {**away, "shm": changed(offers["shm"], boot_id="another host")}
        assert (await rung(cache, far, Incarnation("c")))[0] == "tcp"
    assert not caplog.records
    assert cache.rungs() == {"tcp": RungUse(pairs=1)}


async def test_a_rung_that_should_work_and_does_not_is_told_once_per_pair_and_reason(
    cache: ImporterCache, offers: dict[str, Offer], caplog: pytest.LogCaptureFixture
) -> None:
    foreign = {"shm": changed(offers["shm"], uid="another user"), "tcp": offers["tcp"]}
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert (await rung(cache, foreign))[0] == "tcp"
            await cache.drop(P, FIRST)
        assert len(caplog.records) == 1
        assert "falls to tcp, below shm" in caplog.text
        assert "namespace" in caplog.text
        assert cache.rungs()["tcp"].falls == 1
        assert (await rung(cache, {"tcp": offers["tcp"]}))[0] == "tcp"
        assert "not offered" in caplog.text
    assert cache.rungs() == {"tcp": RungUse(pairs=1, falls=2)}


@pytest.mark.parametrize("dropped", [False, True], ids=["in use", "dropped"])
async def test_a_rung_whose_first_transfers_fail_is_left_for_the_next(
    cache: ImporterCache, offers: dict[str, Offer], caplog: pytest.LogCaptureFixture, dropped: bool
) -> None:
    name, first = await rung(cache, offers)
    await fail(first, TRIAL_FAILURES - 1)
    assert await rung(cache, offers) == (name, first), "one failure may be the handoff's fault"
    await fail(first)
    if dropped:
        await cache.drop(P, FIRST)
    with caplog.at_level(logging.WARNING):
        name, second = await rung(cache, offers)
    assert name == "shm"
    assert "falls to shm, below inproc: its first" in caplog.text
    assert cache.rungs()["shm"] == RungUse(pairs=1, falls=1)
    assert isinstance(await second.fetch(grant()), Landed)
    assert isinstance(await first.fetch(grant()), Failed if dropped else Landed)
    assert (await rung(cache, offers, SECOND))[0] == "inproc", "a new incarnation is tried anew"


async def test_one_handoff_that_fails_condemns_no_rung_however_many_chunks_it_has(
    cache: ImporterCache, offers: dict[str, Offer]
) -> None:
    name, importer = await rung(cache, offers)
    for _ in range(3 * TRIAL_FAILURES):
        assert isinstance(await importer.fetch(grant(generation=7)), Failed)
    assert await rung(cache, offers) == (name, importer)


async def test_a_rung_that_has_worked_is_kept_whatever_fails_later(
    cache: ImporterCache, offers: dict[str, Offer]
) -> None:
    name, importer = await rung(cache, offers)
    assert isinstance(await importer.fetch(grant()), Landed)
    await fail(importer, 3 * TRIAL_FAILURES)
    assert await rung(cache, offers) == (name, importer)


async def test_the_last_rung_is_better_than_none(cache: ImporterCache, offers: dict[str, Offer]) -> None:
    only = {"shm": offers["shm"]}
    name, importer = await rung(cache, only)
    await fail(importer)
    assert await rung(cache, only) == (name, importer), "and nobody's fetch over it is ended"
    assert isinstance(await importer.fetch(grant()), Landed)


async def test_a_fetch_that_close_ended_condemns_nothing(
    cache: ImporterCache, offers: dict[str, Offer]
) -> None:
    _, importer = await rung(cache, offers)
    await cache.drop(P, FIRST)
    await fail(importer)
    assert (await rung(cache, offers))[0] == "inproc"


async def test_tcp_is_connected_when_the_pair_meets(
    storage: KvStorage, offers: dict[str, Offer], monkeypatch: pytest.MonkeyPatch
) -> None:
    warmed: list[bool] = []
    connect = TcpImporter.warm_up

    async def warm_up(importer: TcpImporter) -> None:
        await connect(importer)
        warmed.append(True)

    monkeypatch.setattr(TcpImporter, "warm_up", warm_up)
    cache = ImporterCache(storage, ["tcp"])
    assert await cache.get(P, FIRST, [offers["tcp"]]) is not None
    assert warmed == [True]
    await cache.close()


async def test_where_nobody_listens_is_said_when_the_pair_meets(
    cache: ImporterCache, offers: dict[str, Offer]
) -> None:
    refused = changed(offers["tcp"], port="1")
    with pytest.raises(Unavailable, match="tcp: ConnectionRefusedError"):
        await cache.get(P, FIRST, [refused])
    assert cache.rungs() == {}
    assert (await rung(cache, {"tcp": offers["tcp"]}))[0] == "tcp"


async def test_who_meets_at_once_gets_one_importer(cache: ImporterCache, offers: dict[str, Offer]) -> None:
    found = await asyncio.gather(*(cache.get(P, FIRST, [offers["tcp"]]) for _ in range(5)))
    assert found[0] is not None
    assert all(importer is found[0] for importer in found)


async def test_a_meeting_that_is_called_off_leaves_the_next_one_free(
    cache: ImporterCache, offers: dict[str, Offer], monkeypatch: pytest.MonkeyPatch
) -> None:
    entered, ended = asyncio.Event(), asyncio.Event()

    async def never(importer: TcpImporter) -> None:
        entered.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    with monkeypatch.context() as patched:
        patched.setattr(TcpImporter, "warm_up", never)
        first = asyncio.ensure_future(cache.get(P, FIRST, [offers["tcp"]]))
        await entered.wait()
        second = asyncio.ensure_future(cache.get(P, FIRST, [offers["tcp"]]))
        await asyncio.sleep(0)
    first.cancel()
    importer = await second
    assert ended.is_set()
    assert importer is not None
    assert cache.rungs()["tcp"].pairs == 1


async def test_one_importer_serves_a_pair_until_its_incarnation_changes(
    cache: ImporterCache, offers: dict[str, Offer]
) -> None:
    _, first = await rung(cache, offers)
    assert (await rung(cache, offers))[1] is first
    assert isinstance(await first.fetch(grant()), Landed)
    _, second = await rung(cache, offers, SECOND)
    assert second is not first
    assert isinstance(await first.fetch(grant()), Failed)
    await cache.drop(P, FIRST)  # old news: the second one stays
    assert isinstance(await second.fetch(grant()), Landed)
    await cache.drop(P, SECOND)
    assert isinstance(await second.fetch(grant()), Failed)


async def test_beyond_the_capacity_the_least_recently_used_is_closed(
    cache: ImporterCache, offers: dict[str, Offer]
) -> None:
    one, two, three = (WorkerId(f"prefill-{n}") for n in range(3))
    kept = await cache.get(one, FIRST, list(offers.values()))
    evicted = await cache.get(two, FIRST, list(offers.values()))
    assert await cache.get(one, FIRST, list(offers.values())) is kept
    await cache.get(three, FIRST, list(offers.values()))
    assert await cache.get(one, FIRST, list(offers.values())) is kept
    assert await cache.get(two, FIRST, list(offers.values())) is not evicted


async def test_nothing_reachable_is_no_importer(offers: dict[str, Offer], storage: KvStorage) -> None:
    cache = ImporterCache(storage, ["shm"])
    assert await cache.get(P, FIRST, [changed(offers["shm"], uid="no"), offers["tcp"]]) is None
