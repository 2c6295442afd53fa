"""One-sided transports digest while they copy, if asked: what it reports is what lies in D's blocks."""

import numpy as np
import pytest

from pdserve.core.types import BlockId, HandoffId
from pdserve.kvtransfer.digest import digest_blocks
from pdserve.kvtransfer.handoff.landing import Landing
from pdserve.kvtransfer.handoff.messages import Chunk
from pdserve.kvtransfer.pool.layout import KvLayout
from pdserve.kvtransfer.pool.storage import KvStorage
from pdserve.kvtransfer.transports.base import Failed, Grant, Landed
from pdserve.kvtransfer.transports.ladder import make_exporters, make_importer

LAYOUT = KvLayout(num_layers=2, num_kv_heads=2, head_dim=12, dtype="bfloat16")
BLOCKS = 200
"""More than are copied in one go."""


async def fetched(
    transport: str, digest: bool
) -> tuple[Landed | Failed, KvStorage, Grant, str | None, str | None]:
    """One fetch of a whole prompt, with the damage that its digests and a look at the blocks show."""
    source, target = KvStorage(LAYOUT, BLOCKS), KvStorage(LAYOUT, BLOCKS)
    source.bytes_view[:] = np.random.default_rng(0).integers(0, 256, source.bytes_view.shape, np.uint8)
    source.generations[:] = 7
    table = tuple(BlockId(int(block)) for block in np.random.default_rng(1).permutation(BLOCKS))
    blocks = tuple(BlockId(block) for block in range(BLOCKS))
    valid = [16] * (BLOCKS - 1) + [5]
    digests = digest_blocks(source.bytes_view, blocks, LAYOUT, valid) if digest else None
    chunk = Chunk(0, 0, blocks, (7,) * BLOCKS, 5, digests)
    landing = Landing(HandoffId("h"), 1, 16 * (BLOCKS - 1) + 5, table, 0, target)
    (exporter,) = make_exporters(source, [transport])
    await exporter.start()
    importer = make_importer(exporter.offer(), target)
    grant = landing.grant(chunk)
    report = await importer.fetch(grant)
    await importer.close()
    await exporter.close()
    landed = report.digests if isinstance(report, Landed) else None
    right = landing.find_damage(chunk, grant, landed)
    target.bytes_view[table[3], 0] ^= 1
    return report, target, grant, right, landing.find_damage(chunk, grant)


@pytest.mark.parametrize("transport", ["inproc", "shm"])
async def test_the_digests_of_a_fetch_are_those_of_the_blocks_that_landed(transport: str) -> None:
    report, target, grant, right, damaged = await fetched(transport, digest=True)
    assert isinstance(report, Landed)
    target.bytes_view[grant.segments[3].destination, 0] ^= 1
    destinations = [segment.destination for segment in grant.segments]
    valid = [segment.valid_tokens for segment in grant.segments]
    assert report.digests == digest_blocks(target.bytes_view, destinations, LAYOUT, valid)
    assert right is None
    assert damaged == "K of layer 0, head 0, block 3 of the prompt"


@pytest.mark.parametrize("transport", ["inproc", "shm"])
async def test_nothing_is_digested_unasked(transport: str) -> None:
    report, _, grant, right, damaged = await fetched(transport, digest=False)
    assert isinstance(report, Landed)
    assert not grant.digest
    assert report.digests is None
    assert (right, damaged) == (None, None)
