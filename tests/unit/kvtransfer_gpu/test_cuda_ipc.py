"""What cuda_ipc does about offers that lie, maps that fail and late copies, on the stand-in for a GPU."""

import asyncio
import os
import threading
from collections.abc import AsyncIterator

import host_gpu
import pytest

from pdserve.core.errors import Unavailable
from pdserve.core.types import BlockId, HandoffId, OwnerId
from pdserve.kvtransfer.pool.layout import KvLayout
from pdserve.kvtransfer.pool.pool import KvPool
from pdserve.kvtransfer.pool.storage import KvStorage
from pdserve.kvtransfer.transports.base import TRANSPORT_LADDER, Failed, Grant, Landed, Offer, Segment
from pdserve.kvtransfer.transports.cuda_ipc import CudaIpcExporter, CudaIpcImporter
from pdserve.kvtransfer.transports.ladder import make_exporters, survey

LAYOUT = KvLayout(num_layers=1, num_kv_heads=1, head_dim=8, dtype="bfloat16")
GRANT = Grant(HandoffId("h"), 1, 0, (Segment(BlockId(1), 1, BlockId(2), 16),))


@pytest.fixture
async def source() -> AsyncIterator[KvStorage]:
    storage = KvStorage(LAYOUT, 4, gpu=host_gpu.HostGpu())
    assert KvPool(LAYOUT, 4, storage.generations).allocate(OwnerId("p"), 4) is not None
    storage.tensor.fill_(3)
    yield storage
    storage.close()


@pytest.fixture
async def offer(source: KvStorage) -> Offer:
    exporter = CudaIpcExporter(source)
    await exporter.start()
    return exporter.offer()


@pytest.fixture
async def target() -> AsyncIterator[KvStorage]:
    storage = KvStorage(LAYOUT, 4, gpu=host_gpu.HostGpu())
    yield storage
    storage.close()


def changed(offer: Offer, **parameters: str) -> Offer:
    return Offer(offer.transport, {**offer.parameters, **parameters})


def test_a_pool_on_a_gpu_is_offered_over_what_reaches_it(source: KvStorage) -> None:
    offered = [exporter.transport for exporter in make_exporters(source, TRANSPORT_LADDER)]
    assert "cuda_ipc" in offered
    assert "tcp" in offered
    assert not {"inproc", "shm"} & set(offered)


def test_memory_that_is_not_shared_is_a_rung_less_and_said(
    source: KvStorage, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(self: object, memory: object) -> bytes:
        raise RuntimeError("cudaErrorNotSupported")

    monkeypatch.setattr(host_gpu.HostGpu, "share", refuse)
    assert [exporter.transport for exporter in make_exporters(source, ["cuda_ipc", "tcp"])] == ["tcp"]
    assert "cudaErrorNotSupported" in caplog.text


@pytest.mark.parametrize(
    "change",
    [
        {"memory": "00" * 64},
        {"memory": "not a handle"},
        {"token": "00" * 16},
        {"pid": "1"},
        {"uid": "4294967294"},
    ],
    ids=["no memory", "no handle", "another pool", "another process", "another user"],
)
async def test_an_offer_that_cannot_be_mapped_is_unavailable(
    offer: Offer, target: KvStorage, change: dict[str, str]
) -> None:
    with pytest.raises(Unavailable, match=r"cannot be mapped|cannot map|another pool"):
        CudaIpcImporter(target, changed(offer, **change))


async def test_neither_side_on_the_host_is_served(offer: Offer) -> None:
    on_host = KvStorage(LAYOUT, 4)
    with pytest.raises(Unavailable, match="on cpu"):
        CudaIpcExporter(on_host)
    with pytest.raises(Unavailable, match="on cpu"):
        CudaIpcImporter(on_host, offer)
    (rung,) = survey([offer], ["cuda_ipc"], on_host)
    assert rung.obstacle == ("this worker's pool is on cpu", True)


async def test_obstacles_of_two_gpu_workers(offer: Offer, target: KvStorage) -> None:
    def obstacle(offered: list[Offer]) -> tuple[str, bool] | None:
        return next(survey(offered, ["cuda_ipc"], target)).obstacle

    assert obstacle([]) == ("it is not offered", False)
    assert obstacle([offer]) == (
        "the offered pool is in this process, and CUDA maps only others' memory",
        True,
    )
    parent = changed(offer, pid=str(os.getppid()))
    assert obstacle([parent]) is not None, "the parent has no such memory"
    assert obstacle([changed(offer, boot_id="elsewhere")]) == ("the offered pool is on another host", True)
    other = KvStorage(KvLayout(1, 1, 4, "float16"), 4, gpu=host_gpu.HostGpu())
    assert next(survey([offer], ["cuda_ipc"], other)).obstacle == (
        "the offered pool has another block layout",
        False,
    )
    with pytest.raises(Unavailable, match="layout"):
        CudaIpcImporter(other, offer)
    shm, _ = survey([offer], ["shm", "tcp"], target)
    assert shm.obstacle == ("this worker's pool is on cpu", True), "the stand-in calls itself so"


async def test_an_error_of_the_device_fails_the_fetch(
    offer: Offer, target: KvStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: object) -> None:
        raise RuntimeError("cudaErrorIllegalAddress")

    importer = CudaIpcImporter(target, offer)
    with monkeypatch.context() as patch:
        patch.setattr(host_gpu.HostStream, "copy_rows", broken)
        failed = await importer.fetch(GRANT)
    assert isinstance(failed, Failed)
    assert "cudaErrorIllegalAddress" in failed.reason
    assert not target.tensor.any()
    assert isinstance(await importer.fetch(GRANT), Landed)
    await importer.close()


async def test_a_fetch_returns_only_when_its_copy_has_ended_also_when_it_is_cancelled_or_late(
    offer: Offer, target: KvStorage
) -> None:
    blocks = target.blocks_on_gpu
    assert blocks is not None
    gpu = blocks.gpu
    assert isinstance(gpu, host_gpu.HostGpu)
    importer = CudaIpcImporter(target, offer, timeout_s=0.05)
    step_ends = threading.Event()
    gpu.engine.enqueue(step_ends.wait)  # the copy is behind it
    late = asyncio.ensure_future(importer.fetch(GRANT))
    other = asyncio.ensure_future(importer.fetch(GRANT))
    done, _ = await asyncio.wait({late, other}, timeout=0.2)
    assert not done, "the copy may still write"
    other.cancel()
    step_ends.set()
    report = await late
    assert isinstance(report, Failed)
    assert "0.05 s" in report.reason
    with pytest.raises(asyncio.CancelledError):
        await other
    before = target.read_blocks([BlockId(b) for b in range(4)])
    await importer.close()
    assert (target.read_blocks([BlockId(b) for b in range(4)]) == before).all()


async def test_close_lets_go_of_the_peers_memory(offer: Offer, target: KvStorage) -> None:
    importer = CudaIpcImporter(target, offer)
    blocks = target.blocks_on_gpu
    assert blocks is not None
    assert isinstance(blocks.gpu, host_gpu.HostGpu)
    assert len(blocks.gpu.mapped) == 1
    await importer.close()
    await importer.close()
    assert not blocks.gpu.mapped
    assert isinstance(await importer.fetch(GRANT), Failed)
