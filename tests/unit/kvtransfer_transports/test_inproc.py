"""Who counts as being in one process, and what a reader trusts."""

import asyncio
import multiprocessing
import os
from collections.abc import AsyncIterator

import pytest

from pdserve.core.errors import Unavailable
from pdserve.kvtransfer.pool.layout import KvLayout
from pdserve.kvtransfer.pool.storage import KvStorage
from pdserve.kvtransfer.transports.base import Offer
from pdserve.kvtransfer.transports.inproc import InprocExporter, InprocImporter, exporter_here

LAYOUT = KvLayout(num_layers=1, num_kv_heads=1, head_dim=4, dtype="bfloat16")


@pytest.fixture
async def exporter() -> AsyncIterator[InprocExporter]:
    made = InprocExporter(KvStorage(LAYOUT, 4))
    await made.start()
    yield made
    await made.close()
    made.storage.close()


def found_in(offer: Offer) -> bool:
    """For another process."""
    return exporter_here(offer) is not None


def changed(offer: Offer, **parameters: str) -> Offer:
    return Offer(offer.transport, {**offer.parameters, **parameters})


async def test_a_token_and_a_pid_find_the_exporter_neither_does_alone(exporter: InprocExporter) -> None:
    offer = exporter.offer()
    assert exporter_here(offer) is exporter
    assert exporter_here(changed(offer, token="00" * 16)) is None
    assert exporter_here(changed(offer, pid=str(os.getppid()))) is None
    assert exporter_here(Offer("inproc", {})) is None


async def test_a_process_of_its_own_does_not_find_it_even_when_it_says_so(exporter: InprocExporter) -> None:
    offer = exporter.offer()
    with multiprocessing.get_context("forkserver").Pool(1) as pool:
        mine = pool.apply(os.getpid)
        assert not pool.apply(found_in, (offer,))
        assert not pool.apply(found_in, (changed(offer, pid=str(mine)),)), "the same pid elsewhere"


def test_a_forked_child_inherits_the_token_and_still_is_another_process() -> None:
    exporter = InprocExporter(KvStorage(LAYOUT, 4))
    asyncio.run(exporter.start())
    offer = exporter.offer()
    child = os.fork()
    if child == 0:
        os._exit(int(found_in(offer)))
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert found_in(offer)
    asyncio.run(exporter.close())


async def test_it_is_found_from_start_to_close(exporter: InprocExporter) -> None:
    other = InprocExporter(KvStorage(LAYOUT, 4))
    assert exporter_here(other.offer()) is None
    await other.start()
    assert exporter_here(other.offer()) is other
    await other.close()
    await other.close()
    with pytest.raises(Unavailable, match="process"):
        InprocImporter(KvStorage(LAYOUT, 4), other.offer())
    assert exporter_here(exporter.offer()) is exporter
    other.storage.close()


async def test_nobody_is_kept_alive_by_having_been_exported() -> None:
    forgotten = InprocExporter(KvStorage(LAYOUT, 4))
    await forgotten.start()
    offer = forgotten.offer()
    del forgotten
    assert exporter_here(offer) is None


async def test_a_closed_pool_is_not_exported() -> None:
    storage = KvStorage(LAYOUT, 4)
    storage.close()
    with pytest.raises(Unavailable, match="closed"):
        InprocExporter(storage)
