"""A plan carried out by real exporters and importers, one of each per rank, through staging at D."""

import asyncio

import numpy as np
import pytest
from simulated_ranks import POISON, cut, dense_blocks, model_layout, move
from transport_rig import make_storage, why_not_here

from pdserve.core.types import BlockId, HandoffId, OwnerId
from pdserve.kvtransfer.pool.pool import KvPool
from pdserve.kvtransfer.pool.storage import KvStorage
from pdserve.kvtransfer.reshard.plan import ByteRuns, Transfer, byte_runs, plan_transfer
from pdserve.kvtransfer.reshard.sharding import Sharding
from pdserve.kvtransfer.transports.base import TRANSPORT_LADDER, Grant, Landed, Segment, SourceDone
from pdserve.kvtransfer.transports.ladder import make_exporters, make_importer

HANDOFF = HandoffId("h1")
BLOCKS = 6
LANDS = {4: 2, 0: 3, 1: 5}
"""Destination block to source block, on every rank alike."""
LAST_VALID = 7
WAYS = ("inproc", "cuda_ipc+host", "nccl+host", "shm", "tcp")
"""Every rung, those of GPUs on a stand-in for one."""
ALL = [BlockId(block) for block in range(BLOCKS)]


class SimulatedP:
    """The ranks of P: one pool each, filled from the dense cache, behind one exporter each."""

    def __init__(self, sharding: Sharding, way: str) -> None:
        self.sharding = sharding
        self.model = model_layout(sharding)
        self.dense = dense_blocks(self.model, BLOCKS)
        self.storages = []
        self.pools = []
        for rank in range(sharding.num_ranks):
            layout = sharding.layout_of(rank, self.model)
            storage = make_storage(way, layout, BLOCKS)
            storage.write_blocks(ALL, cut(self.dense, self.model, sharding, rank))
            storage.settle()
            pool = KvPool(layout, BLOCKS, storage.generations)
            assert pool.allocate(OwnerId("p"), BLOCKS) is not None
            self.storages.append(storage)
            self.pools.append(pool)
        transport = way.partition("+")[0]
        self.exporters = [make_exporters(s, [transport], timeout_s=20.0)[0] for s in self.storages]

    def grant(self, rank: int, epoch: int) -> Grant:
        """Block ids are the same on all ranks; generations too, as one leader hands blocks out."""
        segments = [
            Segment(
                BlockId(source),
                self.pools[rank].generation(BlockId(source)),
                BlockId(target),
                LAST_VALID if at == len(LANDS) - 1 else 16,
            )
            for at, (target, source) in enumerate(LANDS.items())
        ]
        return Grant(HANDOFF, epoch, 0, tuple(segments))

    async def close(self) -> None:
        for exporter in self.exporters:
            await exporter.close()
        for pool in self.pools:
            pool.release(OwnerId("p"))
            pool.check_integrity()
        for storage in self.storages:
            storage.close()


async def carry_out(transfer: Transfer, epoch: int, giver: SimulatedP, way: str, storage: KvStorage) -> None:
    """Fetch whole blocks of P's rank, to D's own where they are the same, else to staging and from there."""
    layout = giver.storages[transfer.source].layout
    reads_at = byte_runs(transfer.source_part, layout)
    writes_at = byte_runs(transfer.destination_part, storage.layout)
    same = reads_at == writes_at == ByteRuns(0, layout.block_bytes, layout.block_bytes, 1)
    landing = storage if same else make_storage(way, layout, BLOCKS)
    exporter = giver.exporters[transfer.source]
    importer = make_importer(exporter.offer(), landing, timeout_s=20.0)
    try:
        grant = giver.grant(transfer.source, epoch)
        fetched, served = await asyncio.gather(importer.fetch(grant), exporter.serve(grant))
        assert isinstance(fetched, Landed), fetched
        assert isinstance(served, SourceDone), served
        if not same:
            blocks = [BlockId(block) for block in LANDS]
            landed, kept = landing.read_blocks(blocks), storage.read_blocks(blocks)
            for row in range(len(blocks)):
                move(landed[row], reads_at, kept[row], writes_at)
            storage.write_blocks(blocks, kept)
    finally:
        await importer.close()
        if not same:
            landing.close()


def test_every_rung_carries_out_plans_here() -> None:
    assert {way.partition("+")[0] for way in WAYS} == set(TRANSPORT_LADDER)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("giver", "taker"),
    [
        (Sharding(3, 2, (2, 3)), Sharding(3, 2, (2, 3))),
        (Sharding(8, 4, (3, 2)), Sharding(8, 2, (5,))),
        (Sharding(3, 2, (1, 4)), Sharding(3, 6, (3, 2))),
    ],
    ids=["equal", "to fewer ranks", "to replicas and other stages"],
)
async def test_every_rank_gets_its_part_of_the_dense_cache(
    way: str, giver: Sharding, taker: Sharding
) -> None:
    if (why_not := why_not_here(way)) is not None:
        pytest.skip(f"{way} is not run: {why_not}")
    source, plan = SimulatedP(giver, way), plan_transfer(giver, taker)
    for exporter in source.exporters:
        await exporter.start()
    storages = [make_storage(way, taker.layout_of(r, source.model), BLOCKS) for r in range(taker.num_ranks)]
    try:
        for storage in storages:
            storage.write_blocks(ALL, np.full((BLOCKS, storage.layout.block_bytes), POISON, np.uint8))
        transfers = enumerate(plan.transfers)
        await asyncio.gather(*(carry_out(t, at, source, way, storages[t.destination]) for at, t in transfers))
        for rank, storage in enumerate(storages):
            expected = np.full((BLOCKS, storage.layout.block_bytes), POISON, np.uint8)
            expected[list(LANDS)] = cut(source.dense[list(LANDS.values())], source.model, taker, rank)
            assert np.array_equal(storage.read_blocks(ALL), expected), f"rank {rank}"
    finally:
        for storage in storages:
            storage.close()
        await source.close()
