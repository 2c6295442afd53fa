"""Which rung a pair gets."""

import pytest

from pdserve.core.errors import ConfigError, Unavailable
from pdserve.kvtransfer.pool.layout import KvLayout
from pdserve.kvtransfer.pool.storage import KvStorage
from pdserve.kvtransfer.transports.base import TRANSPORT_LADDER, Offer, accepted
from pdserve.kvtransfer.transports.ladder import (
    choose,
    make_importer,
    ordered,
    survey,
)

BOTH = ("shm", "tcp")


def changed(offer: Offer, **parameters: str) -> Offer:
    return Offer(offer.transport, {**offer.parameters, **parameters})


def test_rungs_come_best_first_whatever_the_order_of_the_flags() -> None:
    best_first = ("inproc", "cuda_ipc", "nccl", "shm", "tcp")
    assert ordered(sorted(TRANSPORT_LADDER)) == TRANSPORT_LADDER == best_first
    assert accepted("auto") == TRANSPORT_LADDER
    assert accepted("tcp") == ("tcp",)
    with pytest.raises(ConfigError, match="pigeon"):
        ordered(["tcp", "pigeon"])


async def test_the_best_reachable_offer_is_chosen(offers: dict[str, Offer], storage: KvStorage) -> None:
    assert choose(list(offers.values()), TRANSPORT_LADDER, storage) == offers["inproc"]
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
    with pytest.raises(Unavailable, match="pigeon"):
        make_importer(Offer("pigeon", {}), storage)


async def test_what_was_never_meant_to_work_is_no_fall(offers: dict[str, Offer], storage: KvStorage) -> None:
    elsewhere = [
        changed(offers["inproc"], token="00" * 16),
        changed(offers["shm"], boot_id="another host"),
        offers["tcp"],
    ]
    rungs = {rung.transport: rung for rung in survey(elsewhere, TRANSPORT_LADDER, storage)}
    assert rungs["inproc"].obstacle == ("the offered pool is in another process", True)
    for rung in ("cuda_ipc", "nccl"):
        assert rungs[rung].obstacle == ("this worker's pool is on cpu", True)
    assert rungs["shm"].obstacle == ("the offered pool is on another host", True)
    assert rungs["tcp"].obstacle is None
    (near,) = survey([changed(offers["shm"], uid="another user")], ["shm"], storage)
    assert near.obstacle is not None
    assert not near.obstacle.expected
