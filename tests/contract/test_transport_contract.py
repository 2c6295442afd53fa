"""What every transport owes, run on each: both halves in one process, and P's in a real child process."""

import asyncio
import atexit
import contextlib
import functools
import multiprocessing
import os
import shutil
import signal
import tempfile
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import host_gpu
import host_nccl
import nccl_on_one_gpu
import numpy as np
import pytest
import torch

from pdserve.core.config import SecurityConfig
from pdserve.core.errors import ConfigError, Unavailable
from pdserve.core.security.cluster_tls import WorkerTls
from pdserve.core.security.dev_certs import make_certificates
from pdserve.core.security.tls import SocketTls
from pdserve.core.types import BlockId, HandoffId, OwnerId
from pdserve.kvtransfer.gpu.cuda import open_gpu
from pdserve.kvtransfer.native.build import NativeUnavailable
from pdserve.kvtransfer.pool.layout import KvLayout
from pdserve.kvtransfer.pool.pool import KvPool
from pdserve.kvtransfer.pool.storage import KvStorage
from pdserve.kvtransfer.transports.base import (
    TRANSPORT_LADDER,
    Failed,
    Grant,
    Importer,
    Landed,
    Offer,
    Segment,
    SourceDone,
)
from pdserve.kvtransfer.transports.ladder import make_exporters, make_importer

SOURCE_BLOCKS = 24
DESTINATION_BLOCKS = 40
TIMEOUT_S = 20.0
SHORT_S = 0.3
HANDOFF = HandoffId("h1")
UNTOUCHED = 0xA5
WAYS = ("inproc", "cuda_ipc", "cuda_ipc+host", "nccl", "nccl+host", "shm", "tcp", "tcp+tls")
"""Rungs, and what they run on: "+tls" with certificates, "+host" on a stand-in for a GPU."""
ON_GPU = frozenset({"cuda_ipc", "nccl"})
TWO_SIDED = frozenset({"nccl", "tcp"})


def content(block: int, layout: KvLayout) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The bytes that P's block has: different for every block and position."""
    return np.random.default_rng(block).integers(0, 256, layout.block_bytes, np.uint8)


@functools.cache
def certificates_of_workers() -> Path:
    """A folder of `pdserve certs`, for "tcp+tls"."""
    folder = Path(tempfile.mkdtemp(prefix="pdserve-certs-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    make_certificates(folder)
    return folder


def sockets_of(certificates: Path | None) -> SocketTls | None:
    """Each end, and each process, loads them for itself."""
    if certificates is None:
        return None
    tls = WorkerTls.load(SecurityConfig(tls_dir=str(certificates)))
    return None if tls is None else tls.sockets


def fill(storage: KvStorage) -> None:
    """P's blocks, as its engine leaves them."""
    blocks = [BlockId(block) for block in range(storage.num_blocks)]
    storage.write_blocks(blocks, np.stack([content(block, storage.layout) for block in blocks]))
    storage.settle()


def make_storage(way: str, layout: KvLayout, num_blocks: int) -> KvStorage:
    """A pool where `way` moves blocks."""
    transport, _, on = way.partition("+")
    if transport not in ON_GPU:
        return KvStorage(layout, num_blocks)
    if way == "nccl":
        nccl_on_one_gpu.allow()
    gpu = host_gpu.HostGpu(host_nccl.HostCommunicators()) if on == "host" else None
    return KvStorage(layout, num_blocks, "cuda", gpu=gpu)


class Source:
    """P as the tests drive it: a filled pool behind one exporter."""

    def __init__(self, way: str, layout: KvLayout, timeout_s: float, certificates: Path | None) -> None:
        transport = way.partition("+")[0]
        self.storage = make_storage(way, layout, SOURCE_BLOCKS)
        self.pool = KvPool(layout, SOURCE_BLOCKS, self.storage.generations)
        fill(self.storage)
        (self.exporter,) = make_exporters(
            self.storage, [transport], timeout_s=timeout_s, tls=sockets_of(certificates)
        )

    async def call(self, action: str, argument: Any = None) -> Any:
        if action == "offer":
            await self.exporter.start()
            taken = self.pool.allocate(OwnerId("p"), SOURCE_BLOCKS)
            assert taken is not None
            offer = self.exporter.offer()
            return offer.transport, dict(offer.parameters), [self.pool.generation(block) for block in taken]
        if action == "serve":
            return await self.exporter.serve(argument)
        if action == "reuse":
            self.pool.release(OwnerId("p"))
            return None
        if action == "forget":
            self.exporter.forget(argument)
            return None
        await self.exporter.close()
        if action == "close":
            return None
        self.storage.close()
        return None


def child_main(
    pipe: Connection, way: str, layout: KvLayout, timeout_s: float, certificates: Path | None
) -> None:
    """P in a process of its own: (id, action, argument) in, (id, result) out."""

    async def run() -> None:
        source = Source(way, layout, timeout_s, certificates)
        loop = asyncio.get_running_loop()
        tasks: set[asyncio.Task[None]] = set()

        async def answer(number: int, action: str, argument: Any) -> None:
            pipe.send((number, await source.call(action, argument)))

        while True:
            try:
                number, action, argument = await loop.run_in_executor(None, pipe.recv)
            except EOFError:
                return
            tasks.add(loop.create_task(answer(number, action, argument)))

    asyncio.run(run())


@dataclass
class Remote:
    """P in a child process."""

    process: Any
    pipe: Connection
    waiting: dict[int, asyncio.Future[Any]] = field(default_factory=dict)
    number: int = 0

    async def call(self, action: str, argument: Any = None) -> Any:
        loop = asyncio.get_running_loop()
        if not self.waiting:
            loop.add_reader(self.pipe.fileno(), self.receive)
        self.number += 1
        self.waiting[self.number] = loop.create_future()
        self.pipe.send((self.number, action, argument))
        return await self.waiting[self.number]

    def receive(self) -> None:
        try:
            number, result = self.pipe.recv()
        except (EOFError, OSError):
            asyncio.get_running_loop().remove_reader(self.pipe.fileno())
            for future in self.waiting.values():
                future.cancel()
            return
        self.waiting[number].set_result(result)

    def signal(self, number: int) -> None:
        os.kill(self.process.pid, number)


@dataclass
class Pair:
    """A D and a P that met."""

    transport: str
    source: Source | Remote
    storage: KvStorage
    importer: Importer
    offer: Offer
    generations: list[int]

    def grant(
        self,
        sources: Sequence[int],
        destinations: Sequence[int],
        *,
        handoff: HandoffId = HANDOFF,
        epoch: int = 1,
        seq: int = 0,
        valid: int = 16,
    ) -> Grant:
        segments = tuple(
            Segment(BlockId(source), self.generations[source], BlockId(destination), valid)
            for source, destination in zip(sources, destinations, strict=True)
        )
        return Grant(handoff, epoch, seq, segments)

    async def carry_out(self, grant: Grant) -> tuple[Landed | Failed, SourceDone | Failed]:
        """Both halves of a grant."""
        fetched, served = await asyncio.gather(self.importer.fetch(grant), self.source.call("serve", grant))
        return fetched, served

    def assert_exactly(self, landed: dict[int, int]) -> None:
        """Destination -> source; every other block is as it was."""
        for block, found in enumerate(self.blocks()):
            if block in landed:
                expected = content(landed[block], self.storage.layout)
                assert np.array_equal(found, expected), f"block {block}"
            else:
                assert (found == UNTOUCHED).all(), f"block {block} was written"

    def blocks(self) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """What is in D's pool now; a copy."""
        return self.storage.read_blocks([BlockId(block) for block in range(DESTINATION_BLOCKS)])


@contextlib.asynccontextmanager
async def meet(way: str, place: str, dtype: str, timeout_s: float) -> AsyncIterator[Pair]:
    transport, _, on = way.partition("+")
    certificates = certificates_of_workers() if on == "tls" else None
    layout = KvLayout(num_layers=2, num_kv_heads=3, head_dim=8, dtype=dtype)
    source: Source | Remote
    if place == "child":
        # The fork server imports once what every child needs.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["pdserve.kvtransfer.transports.ladder"])
        ours, theirs = context.Pipe()
        process = context.Process(
            target=child_main, args=(theirs, way, layout, timeout_s, certificates), daemon=True
        )
        process.start()
        theirs.close()
        source = Remote(process, ours)
    else:
        source = Source(way, layout, timeout_s, certificates)
    name, parameters, generations = await source.call("offer")
    offer = Offer(name, parameters)
    storage = make_storage(way, layout, DESTINATION_BLOCKS)
    storage.tensor.view(torch.uint8).fill_(UNTOUCHED)
    importer = make_importer(offer, storage, timeout_s=timeout_s, tls=sockets_of(certificates))
    try:
        yield Pair(transport, source, storage, importer, offer, generations)
    finally:
        await importer.close()
        if isinstance(source, Remote):
            asyncio.get_running_loop().remove_reader(source.pipe.fileno())
            source.process.kill()
            source.process.join()
            source.pipe.close()
        else:
            await source.call("end")
        storage.close()


def why_not_here(way: str) -> str | None:
    """What this machine lacks for `way`; None if nothing."""
    if way.partition("+")[0] not in ON_GPU:
        return None
    if way.endswith("+host"):
        try:
            host_gpu.compiled_kernel()
        except NativeUnavailable as error:
            return f"the stand-in for a GPU needs a compiler: {error}"
        return None
    try:
        gpu = open_gpu(0)
        if way == "nccl":
            gpu.communicators()
    except (ConfigError, Unavailable) as error:
        return error.message
    return None


WHY_NOT = {way: why_not_here(way) for way in WAYS}
HERE = tuple(way for way in WAYS if WHY_NOT[way] is None)
INSIDE = tuple(way for way in HERE if way not in ON_GPU)
"""P may be in the tests' own process; CUDA maps other processes' memory only."""
CHILD = tuple(way for way in HERE if way != "inproc")
"""P may be in another process."""
TWO_SIDED_INSIDE = [way for way in INSIDE if way in ("nccl+host", "tcp")]
TWO_SIDED_CHILD = [way for way in CHILD if way in ("nccl", "nccl+host", "tcp")]
MEETINGS = [(way, "inside") for way in INSIDE] + [(way, "child") for way in CHILD]


@pytest.fixture(params=MEETINGS, ids=lambda meeting: "-".join(meeting))
def meeting(request: pytest.FixtureRequest) -> tuple[str, str]:
    """(way, place)"""
    return request.param  # type: ignore[no-any-return]


@pytest.fixture
async def pair(meeting: tuple[str, str]) -> AsyncIterator[Pair]:
    async with meet(*meeting, "float32", TIMEOUT_S) as met:
        yield met


def test_every_rung_of_the_ladder_is_in_this_suite() -> None:
    assert {way.partition("+")[0] for way in WAYS} == set(TRANSPORT_LADDER)


@pytest.mark.parametrize("way", WAYS)
def test_a_rung_that_is_not_run_here_says_why(way: str) -> None:
    if WHY_NOT[way] is not None:
        pytest.skip(f"{way} is not run: {WHY_NOT[way]}")
    assert way in INSIDE + CHILD


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
async def test_bytes_land_in_their_destinations_and_nowhere_else(
    meeting: tuple[str, str], dtype: str
) -> None:
    async with meet(*meeting, dtype, TIMEOUT_S) as pair:
        moves = {5: 0, 6: 1, 7: 2, 30: 9, 2: 23, 39: 4, 0: 22}
        fetched, served = await pair.carry_out(pair.grant(list(moves.values()), list(moves)))
        assert isinstance(fetched, Landed), fetched
        assert (fetched.handoff, fetched.epoch, fetched.seq) == (HANDOFF, 1, 0)
        assert fetched.num_bytes == len(moves) * pair.storage.layout.block_bytes
        assert fetched.seconds >= 0
        assert isinstance(served, SourceDone)
        pair.assert_exactly(moves)


async def test_chunks_of_one_handoff_follow_each_other_and_a_partial_block_is_among_them(pair: Pair) -> None:
    first = await pair.carry_out(pair.grant([3, 4], [10, 11], seq=0))
    last = await pair.carry_out(pair.grant([5], [12], seq=1, valid=7))
    assert [type(report) for report in (*first, *last)] == [Landed, SourceDone, Landed, SourceDone]
    layout = pair.storage.layout
    shape = (layout.segments_per_block, layout.segment_bytes)
    valid = slice(0, 7 * layout.token_bytes)
    blocks = pair.blocks()
    landed = blocks[12].reshape(shape)[:, valid]
    assert np.array_equal(landed, content(5, layout).reshape(shape)[:, valid])
    for destination, source in ((10, 3), (11, 4)):
        assert np.array_equal(blocks[destination], content(source, layout))


async def test_a_grant_without_segments_lands(pair: Pair) -> None:
    fetched, served = await pair.carry_out(pair.grant([], []))
    assert isinstance(fetched, Landed)
    assert fetched.num_bytes == 0
    assert isinstance(served, SourceDone)
    pair.assert_exactly({})


async def test_a_reused_source_block_fails_the_fetch(pair: Pair) -> None:
    grant = pair.grant([1, 2], [1, 2])
    await pair.source.call("reuse")
    fetched, _ = await pair.carry_out(grant)
    assert isinstance(fetched, Failed)
    assert "generation" in fetched.reason


async def test_one_stale_block_among_good_ones_fails_the_whole_grant(pair: Pair) -> None:
    grant = pair.grant(range(20), range(20))
    wrong = grant.segments[-1]._replace(generation=grant.segments[-1].generation - 1)
    fetched, _ = await pair.carry_out(Grant(HANDOFF, 1, 0, (*grant.segments[:-1], wrong)))
    assert isinstance(fetched, Failed)
    landed, _ = await pair.carry_out(pair.grant([7], [33], seq=1))
    assert isinstance(landed, Landed), "a failed grant must not spoil the next one"


@pytest.mark.parametrize("way", INSIDE)
async def test_a_source_block_reused_during_the_copy_fails_the_fetch(
    way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with meet(way, "inside", "float32", TIMEOUT_S) as pair:
        assert isinstance(pair.source, Source)
        pool = pair.source.pool
        copying, method = {
            "inproc": (pair.storage, "write_blocks"),
            "cuda_ipc": (pair.storage.blocks_on_gpu, "scatter"),
            "nccl": (pair.source.storage.blocks_on_gpu, "gather"),
            "shm": (pair.storage, "write_blocks"),
            "tcp": (pair.source.storage, "read_blocks_into"),
        }[pair.transport]
        copy = getattr(copying, method)

        def copy_while_reused(*arguments: Any) -> None:
            copy(*arguments)
            pool.release(OwnerId("p"))

        monkeypatch.setattr(copying, method, copy_while_reused)
        fetched, _ = await pair.carry_out(pair.grant([1], [1]))
        assert isinstance(fetched, Failed)
        assert "generation" in fetched.reason


@pytest.mark.parametrize("way", INSIDE)
@pytest.mark.parametrize(
    ("source", "destination"), [(SOURCE_BLOCKS, 0), (-1, 0), (0, DESTINATION_BLOCKS), (0, -1)]
)
async def test_blocks_outside_either_pool_are_refused(way: str, source: int, destination: int) -> None:
    async with meet(way, "inside", "float32", SHORT_S) as pair:
        segment = Segment(BlockId(source), 1, BlockId(destination), 16)
        fetched, _ = await pair.carry_out(Grant(HANDOFF, 1, 0, (segment,)))
        assert isinstance(fetched, Failed)
        pair.assert_exactly({})


async def test_concurrent_handoffs_do_not_mix(pair: Pair) -> None:
    grants = [
        pair.grant([n, n + 12], [3 * n, 3 * n + 1], handoff=HandoffId(f"h{n}"), epoch=n % 2, seq=n % 3)
        for n in range(12)
    ]
    serves = [pair.source.call("serve", grant) for grant in reversed(grants)]
    reports = await asyncio.gather(*(pair.importer.fetch(grant) for grant in grants), *serves)
    assert all(isinstance(report, Landed | SourceDone) for report in reports), reports
    pair.assert_exactly({3 * n + k: n + 12 * k for n in range(12) for k in range(2)})


async def test_a_closed_exporter_fails_every_later_fetch(pair: Pair) -> None:
    assert isinstance((await pair.carry_out(pair.grant([0], [0])))[0], Landed)
    await pair.source.call("close")
    fetched, served = await pair.carry_out(pair.grant([1], [1], seq=1))
    assert isinstance(fetched, Failed)
    assert isinstance(served, Failed)
    pair.assert_exactly({0: 0})


@pytest.mark.parametrize("way", INSIDE)
async def test_memory_that_was_given_back_is_never_trusted(way: str) -> None:
    async with meet(way, "inside", "float32", TIMEOUT_S) as pair:
        await pair.source.call("end")
        fetched = await pair.importer.fetch(pair.grant([1], [1]))
        assert isinstance(fetched, Failed)
        pair.assert_exactly({})


@pytest.mark.parametrize("way", CHILD)
async def test_a_killed_source_fails_later_fetches(way: str) -> None:
    async with meet(way, "child", "float32", TIMEOUT_S) as pair:
        assert isinstance(pair.source, Remote)
        assert isinstance((await pair.carry_out(pair.grant([0], [0])))[0], Landed)
        pair.source.signal(signal.SIGKILL)
        pair.source.process.join()
        fetched = await pair.importer.fetch(pair.grant([1], [1], seq=1))
        assert isinstance(fetched, Failed)
        pair.assert_exactly({0: 0})


async def test_after_close_every_fetch_fails(pair: Pair) -> None:
    await pair.importer.close()
    fetched = await pair.importer.fetch(pair.grant([1], [1]))
    assert isinstance(fetched, Failed)
    pair.assert_exactly({})


async def test_close_ends_outstanding_fetches(pair: Pair) -> None:
    fetches = [
        asyncio.ensure_future(pair.importer.fetch(pair.grant([n], [n], handoff=HandoffId(f"h{n}"))))
        for n in range(8)
    ]
    await asyncio.sleep(0)
    await pair.importer.close()
    reports = await asyncio.gather(*fetches)
    landed = [n for n, report in enumerate(reports) if isinstance(report, Landed)]
    assert all(isinstance(report, Landed | Failed) for report in reports)
    blocks = pair.blocks()
    for block in landed:
        assert np.array_equal(blocks[block], content(block, pair.storage.layout))
    if pair.transport in TWO_SIDED:
        assert not landed, "nobody served these grants"


async def test_a_cancelled_fetch_writes_nothing_afterwards(pair: Pair) -> None:
    grant = pair.grant(range(20), range(20))
    fetch = asyncio.ensure_future(pair.importer.fetch(grant))
    serve = asyncio.ensure_future(pair.source.call("serve", grant))
    await asyncio.sleep(0)
    fetch.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await fetch
    before = pair.blocks()
    other, _ = await pair.carry_out(pair.grant([23], [39], seq=1))
    assert isinstance(other, Landed), other
    await pair.source.call("forget", HANDOFF)
    assert isinstance(await serve, SourceDone | Failed)
    assert np.array_equal(pair.blocks()[:39], before[:39])


@pytest.mark.parametrize("way", TWO_SIDED_INSIDE)
async def test_a_claim_without_a_grant_gets_nothing(way: str) -> None:
    async with meet(way, "inside", "float32", SHORT_S) as pair:
        wrong, served = await asyncio.gather(
            pair.importer.fetch(pair.grant([1], [1], handoff=HandoffId("someone-else"))),
            pair.source.call("serve", pair.grant([1], [1])),
        )
        assert isinstance(wrong, Failed)
        assert isinstance(served, Failed)
        pair.assert_exactly({})


@pytest.mark.parametrize("way", TWO_SIDED_INSIDE)
async def test_a_claim_of_another_epoch_or_chunk_gets_nothing(way: str) -> None:
    async with meet(way, "inside", "float32", SHORT_S) as pair:
        reports = await asyncio.gather(
            pair.importer.fetch(pair.grant([1], [1], epoch=2)),
            pair.importer.fetch(pair.grant([1], [1], seq=1)),
            pair.source.call("serve", pair.grant([1], [1])),
        )
        assert all(isinstance(report, Failed) for report in reports)
        pair.assert_exactly({})


@pytest.mark.parametrize("way", TWO_SIDED_INSIDE)
async def test_closing_the_exporter_ends_serves_and_fetches_that_wait(way: str) -> None:
    async with meet(way, "inside", "float32", TIMEOUT_S) as pair:
        assert isinstance((await pair.carry_out(pair.grant([0], [0])))[0], Landed)
        serve = asyncio.ensure_future(pair.source.call("serve", pair.grant([1], [1], seq=1)))
        fetch = asyncio.ensure_future(pair.importer.fetch(pair.grant([2], [2], seq=2)))
        await asyncio.sleep(0)
        await pair.source.call("close")
        assert isinstance(await serve, Failed)
        assert isinstance(await fetch, Failed)
        pair.assert_exactly({0: 0})


@pytest.mark.parametrize("way", TWO_SIDED_INSIDE)
async def test_an_ended_handoff_fails_both_halves_at_once(way: str) -> None:
    async with meet(way, "inside", "float32", TIMEOUT_S) as pair:
        serve = asyncio.ensure_future(pair.source.call("serve", pair.grant([1], [1])))
        await asyncio.sleep(0)
        await pair.source.call("forget", HANDOFF)
        assert isinstance(await serve, Failed)


@pytest.mark.parametrize("way", TWO_SIDED_CHILD)
async def test_a_stopped_source_fails_the_fetch_within_its_deadline(way: str) -> None:
    async with meet(way, "child", "float32", 1.0) as pair:
        assert isinstance(pair.source, Remote)
        assert isinstance((await pair.carry_out(pair.grant([0], [0])))[0], Landed)
        pair.source.signal(signal.SIGSTOP)
        fetched = await pair.importer.fetch(pair.grant([1], [1], seq=1))
        assert isinstance(fetched, Failed)
        assert "1.0 s" in fetched.reason


@pytest.mark.parametrize("way", TWO_SIDED_CHILD)
async def test_a_source_killed_while_it_owes_bytes_fails_the_fetch_at_once(way: str) -> None:
    async with meet(way, "child", "float32", TIMEOUT_S) as pair:
        assert isinstance(pair.source, Remote)
        assert isinstance((await pair.carry_out(pair.grant([0], [0])))[0], Landed)
        fetches = [
            asyncio.ensure_future(pair.importer.fetch(pair.grant([1], [1], seq=seq))) for seq in range(1, 4)
        ]
        await asyncio.sleep(0)
        pair.source.signal(signal.SIGKILL)
        reports = await asyncio.gather(*fetches)
        assert all(isinstance(report, Failed) and "lost" in report.reason for report in reports), reports
        pair.assert_exactly({0: 0})
