"""A small pool with an exporter for every rung that the machine can offer, and another to fetch into."""

from collections.abc import AsyncIterator

import pytest

from pdserve.core.types import OwnerId
from pdserve.kvtransfer.pool.layout import KvLayout
from pdserve.kvtransfer.pool.pool import KvPool
from pdserve.kvtransfer.pool.storage import KvStorage
from pdserve.kvtransfer.transports.base import TRANSPORT_LADDER, Offer
from pdserve.kvtransfer.transports.ladder import make_exporters

LAYOUT = KvLayout(num_layers=1, num_kv_heads=1, head_dim=4, dtype="bfloat16")


@pytest.fixture
async def offers() -> AsyncIterator[dict[str, Offer]]:
    """By transport; all of the source's blocks are taken."""
    storage = KvStorage(LAYOUT, 4)
    pool = KvPool(LAYOUT, 4, storage.generations)
    assert pool.allocate(OwnerId("p"), 4) is not None
    exporters = make_exporters(storage, TRANSPORT_LADDER)
    for exporter in exporters:
        await exporter.start()
    yield {exporter.transport: exporter.offer() for exporter in exporters}
    for exporter in exporters:
        await exporter.close()
    storage.close()


@pytest.fixture
def storage() -> KvStorage:
    """The reader's."""
    return KvStorage(LAYOUT, 4)
