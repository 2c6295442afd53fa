"""Which rung a pair gets, and how long its importer lives."""

import logging
from collections.abc import AsyncIterator

import pytest

from pdserve.core.errors import ConfigError, Unavailable
from pdserve.core.types import BlockId, HandoffId, Incarnation, OwnerId, WorkerId
from pdserve.kvtransfer.pool.layout import KvLayout
from pdserve.kvtransfer.pool.pool import KvPool
from pdserve.kvtransfer.pool.storage import KvStorage
from pdserve.kvtransfer.transports.base import Failed, Grant, Landed, Offer, Segment
from pdserve.kvtransfer.transports.ladder import (
    ImporterCache,
    choose,
    make_exporters,
    make_importer,
    ordered,
)

LAYOUT = KvLayout(num_layers=1, num_kv_heads=1, head_dim=4, dtype="bfloat16")
BOTH = ("shm", "tcp")
P = WorkerId("prefill-0")
FIRST, SECOND = Incarnation("a"), Incarnation("b")


@pytest.fixture
async def offers() -> AsyncIterator[dict[str, Offer]]:
    storage = KvStorage(LAYOUT, 4)
    pool = KvPool(LAYOUT, 4, storage.generations)
    assert pool.allocate(OwnerId("p"), 4) is not None
    exporters = make_exporters(storage, BOTH)
    for exporter in exporters:
        await exporter.start()
    yield {exporter.transport: exporter.offer() for exporter in exporters}
    for exporter in exporters:
        await exporter.close()
    storage.close()


@pytest.fixture
def storage() -> KvStorage:
    return KvStorage(LAYOUT, 4)


def changed(offer: Offer, **parameters: str) -> Offer:
    return Offer(offer.transport, {**offer.parameters, **parameters})


def test_rungs_come_best_first_whatever_the_order_of_the_flags() -> None:
    assert ordered(["tcp", "shm"]) == BOTH
    with pytest.raises(ConfigError, match="pigeon"):
        ordered(["tcp", "pigeon"])


async def test_the_best_reachable_offer_is_chosen(offers: dict[str, Offer], storage: KvStorage) -> None:
    assert choose([offers["tcp"], offers["shm"]], BOTH, storage) == offers["shm"]
    assert choose([offers["tcp"], offers["shm"]], ["tcp"], storage) == offers["tcp"]
    assert choose([offers["shm"]], ["tcp"], storage) is None
    assert choose([], BOTH, storage) is None


@pytest.mark.parametrize(
    "change",
    [
        {"boot_id": "another host"},
        {"pid_namespace": "1"},
        {"uid": "4294967294"},
        {"token": "00" * 16},
        {"num_blocks": "5"},
        {"fd": "999999"},
        {"pid": "not a number"},
    ],
    ids=lambda change: next(iter(change)),
)
async def test_shm_that_cannot_be_mapped_falls_to_tcp(
    offers: dict[str, Offer], storage: KvStorage, change: dict[str, str]
) -> None:
    wrong = changed(offers["shm"], **change)
    assert choose([wrong, offers["tcp"]], BOTH, storage) == offers["tcp"]
    with pytest.raises(Unavailable):
        make_importer(wrong, storage)


async def test_another_layout_is_never_copied_raw(offers: dict[str, Offer]) -> None:
    other = KvStorage(KvLayout(1, 1, 4, "float16"), 4)
    assert choose(list(offers.values()), BOTH, other) is None
    for offer in offers.values():
        with pytest.raises(Unavailable, match="layout"):
            make_importer(offer, other)


async def test_a_transport_that_is_unknown_here_is_said_so(storage: KvStorage) -> None:
    with pytest.raises(Unavailable, match="nccl"):
        make_importer(Offer("nccl", {}), storage)


async def test_falling_below_the_best_rung_is_logged_once_per_pair(
    offers: dict[str, Offer], storage: KvStorage, caplog: pytest.LogCaptureFixture
) -> None:
    cache = ImporterCache(storage, BOTH)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            importer = await cache.get(P, FIRST, [offers["tcp"]])
            assert importer is not None
            assert importer.transport == "tcp"
    assert len(caplog.records) == 1
    await cache.close()


async def test_one_importer_serves_a_pair_until_its_incarnation_changes(
    offers: dict[str, Offer], storage: KvStorage
) -> None:
    cache = ImporterCache(storage, BOTH)
    first = await cache.get(P, FIRST, list(offers.values()))
    assert first is not None
    assert await cache.get(P, FIRST, list(offers.values())) is first
    grant = Grant(HandoffId("h"), 1, 0, (Segment(BlockId(0), 1, BlockId(0), 16),))
    assert isinstance(await first.fetch(grant), Landed)
    second = await cache.get(P, SECOND, list(offers.values()))
    assert second is not None
    assert second is not first
    assert isinstance(await first.fetch(grant), Failed)
    await cache.drop(P, FIRST)  # old news: the second one stays
    assert isinstance(await second.fetch(grant), Landed)
    await cache.drop(P, SECOND)
    assert isinstance(await second.fetch(grant), Failed)


async def test_beyond_the_capacity_the_least_recently_used_is_closed(
    offers: dict[str, Offer], storage: KvStorage
) -> None:
    cache = ImporterCache(storage, BOTH, capacity=2)
    one, two, three = (WorkerId(f"prefill-{n}") for n in range(3))
    kept = await cache.get(one, FIRST, list(offers.values()))
    evicted = await cache.get(two, FIRST, list(offers.values()))
    assert await cache.get(one, FIRST, list(offers.values())) is kept
    await cache.get(three, FIRST, list(offers.values()))
    assert await cache.get(one, FIRST, list(offers.values())) is kept
    assert await cache.get(two, FIRST, list(offers.values())) is not evicted
    await cache.close()


async def test_nothing_reachable_is_no_importer(offers: dict[str, Offer], storage: KvStorage) -> None:
    cache = ImporterCache(storage, ["shm"])
    assert await cache.get(P, FIRST, [changed(offers["shm"], uid="no"), offers["tcp"]]) is None
