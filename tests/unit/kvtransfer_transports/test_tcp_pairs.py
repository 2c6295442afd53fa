"""Both tcp halves for real: over several connections, out of a GPU, readers beside each other."""

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

import host_gpu
import numpy as np
import pytest

from pdserve.core.types import BlockId, HandoffId, OwnerId
from pdserve.kvtransfer.digest import digest_blocks
from pdserve.kvtransfer.pool.layout import KvLayout
from pdserve.kvtransfer.pool.pool import KvPool
from pdserve.kvtransfer.pool.storage import KvStorage
from pdserve.kvtransfer.transports.base import Failed, Grant, Landed, Segment, SourceDone
from pdserve.kvtransfer.transports.meetings import GIVEN_UP
from pdserve.kvtransfer.transports.tcp import TcpExporter, TcpImporter
from pdserve.kvtransfer.transports.tcp.connection import Connection
from pdserve.kvtransfer.transports.tcp.importer import parts_for
from pdserve.kvtransfer.transports.tcp.outgoing import Outgoing
from pdserve.kvtransfer.transports.tcp.reader import Reader
from pdserve.kvtransfer.transports.tcp.stream import Stream
from pdserve.kvtransfer.transports.tcp.wire import MAX_PARTS, Claim, part_of

LAYOUT = KvLayout(num_layers=4, num_kv_heads=4, head_dim=64, dtype="float32")
"""Blocks of 128 KiB: several connections for a few dozen of them."""
BLOCKS = 72
TIMEOUT_S = 20.0
FAR_S = 0.02


def pool_of(device: str = "cpu") -> KvStorage:
    gpu = None if device == "cpu" else host_gpu.HostGpu()
    return KvStorage(LAYOUT, BLOCKS, device, gpu=gpu)


class Pair:
    """A filled P, an empty D."""

    def __init__(self, source: KvStorage, target: KvStorage, timeout_s: float) -> None:
        self.source, self.target = source, target
        self.blocks = [BlockId(block) for block in range(BLOCKS)]
        self.content = np.random.default_rng(0).integers(0, 256, (BLOCKS, LAYOUT.block_bytes), np.uint8)
        source.write_blocks(self.blocks, self.content)
        source.settle()
        self.pool = KvPool(LAYOUT, BLOCKS, source.generations)
        assert self.pool.allocate(OwnerId("p"), BLOCKS) is not None
        self.exporter = TcpExporter(source, timeout_s=timeout_s)
        self.timeout_s = timeout_s
        self.importers: list[TcpImporter] = []

    def importer(self) -> TcpImporter:
        importer = TcpImporter(self.target, self.exporter.offer(), timeout_s=self.timeout_s)
        self.importers.append(importer)
        return importer

    def grant(self, count: int, *, handoff: str = "h", first: int = 0, digest: bool = False) -> Grant:
        """Blocks `first`… of P to the same places of D, backwards."""
        moved = reversed(range(first, first + count))
        segments = (Segment(BlockId(b), self.pool.generation(BlockId(b)), BlockId(b), 16) for b in moved)
        return Grant(HandoffId(handoff), 1, 0, tuple(segments), digest)

    async def carry_out(self, grant: Grant, importer: TcpImporter) -> tuple[Any, Any]:
        return tuple(await asyncio.gather(importer.fetch(grant), self.exporter.serve(grant)))  # type: ignore[return-value]

    def landed(self, first: int = 0, count: int = BLOCKS) -> bool:
        found = self.target.read_blocks(self.blocks[first : first + count])
        return np.array_equal(found, self.content[first : first + count])


@contextlib.asynccontextmanager
async def pair_of(
    source: str = "cpu", target: str = "cpu", timeout_s: float = TIMEOUT_S
) -> AsyncIterator[Pair]:
    pair = Pair(pool_of(source), pool_of(target), timeout_s)
    await pair.exporter.start()
    try:
        yield pair
    finally:
        for importer in pair.importers:
            await importer.close()
        await pair.exporter.close()
        pair.pool.release(OwnerId("p"))
        pair.pool.check_integrity()
        pair.source.close()
        pair.target.close()
        assert not [thread for thread in threading.enumerate() if thread.name == "kv-tcp-in"]


@pytest.fixture
def far(monkeypatch: pytest.MonkeyPatch) -> list[Claim]:
    """P is a long way off, as D measures; the claims that D makes."""
    claims: list[Claim] = []
    pack = Claim.pack

    def noted(claim: Claim) -> bytes:
        claims.append(claim)
        return pack(claim)

    monkeypatch.setattr(Connection, "round_trip_s", lambda self: FAR_S)
    monkeypatch.setattr(Claim, "pack", noted)
    return claims


def test_only_large_transfers_over_long_ways_take_several_connections() -> None:
    assert parts_for(64 << 20, lambda: 50e-6) == 1
    assert parts_for(1 << 20, lambda: FAR_S) == 1
    assert parts_for(4 << 20, lambda: FAR_S) == 2
    assert parts_for(1 << 30, lambda: FAR_S) == MAX_PARTS


def test_parts_cover_everything_once_in_order() -> None:
    for count in range(12):
        for parts in range(1, MAX_PARTS + 1):
            cut = [part_of(range(count), part, parts) for part in range(parts)]
            assert [item for part in cut for item in part] == list(range(count))


async def test_a_large_transfer_over_a_long_way_lands_whole_over_several_connections(
    far: list[Claim],
) -> None:
    async with pair_of() as pair:
        grant = pair.grant(BLOCKS, digest=True)
        fetched, served = await pair.carry_out(grant, pair.importer())
        assert isinstance(fetched, Landed), fetched
        assert isinstance(served, SourceDone), served
        assert pair.landed()
        assert sorted((claim.part, claim.parts) for claim in far) == [(part, 4) for part in range(4)]
        places = [segment.destination for segment in grant.segments]
        assert fetched.digests == digest_blocks(pair.content, places, LAYOUT, [16] * BLOCKS)


async def test_one_stale_block_fails_all_parts_and_the_connections_go_on(far: list[Claim]) -> None:
    async with pair_of() as pair:
        importer = pair.importer()
        grant = pair.grant(BLOCKS)
        last = grant.segments[-1]
        wrong = (*grant.segments[:-1], last._replace(generation=last.generation + 2))
        fetched, served = await pair.carry_out(Grant(grant.handoff, 1, 0, wrong), importer)
        assert isinstance(fetched, Failed)
        assert "generation" in fetched.reason
        assert isinstance(served, Failed)
        assert "generation" in served.reason
        fetched, _ = await pair.carry_out(pair.grant(BLOCKS, handoff="next"), importer)
        assert isinstance(fetched, Landed), fetched
        assert pair.landed()


async def test_a_lost_connection_among_several_fails_the_fetch_at_once(
    far: list[Claim], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with pair_of() as pair:
        finish = Outgoing.finish

        def cut_one(outgoing: Outgoing, stream: Stream) -> None:
            if outgoing.claim.part == 2:
                stream.sever()
            finish(outgoing, stream)

        with monkeypatch.context() as cut:
            cut.setattr(Outgoing, "finish", cut_one)
            fetched, served = await pair.carry_out(pair.grant(BLOCKS), pair.importer())
        assert isinstance(fetched, Failed)
        assert "lost" in fetched.reason
        assert isinstance(served, Failed)
        assert "lost" in served.reason


@pytest.mark.parametrize(("source", "target"), [("cuda", "cpu"), ("cpu", "cuda"), ("cuda", "cuda")])
async def test_a_gpus_blocks_go_through_host_memory(source: str, target: str) -> None:
    async with pair_of(source, target) as pair:
        fetched, served = await pair.carry_out(pair.grant(BLOCKS), pair.importer())
        assert isinstance(fetched, Landed), fetched
        assert isinstance(served, SourceDone), served
        assert pair.landed()


async def test_a_reader_that_does_not_read_keeps_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """D's thread of one connection sleeps on a payload that it does not take; another reader's lands."""
    async with pair_of() as pair:
        stopped, go_on = asyncio.Event(), threading.Event()
        loop = asyncio.get_running_loop()
        slow, quick = pair.importer(), pair.importer()
        take = Connection._take_frame

        def stuck(connection: Connection) -> None:
            loop.call_soon_threadsafe(stopped.set)
            go_on.wait()
            take(connection)

        with monkeypatch.context() as patched:
            patched.setattr(Connection, "_take_frame", stuck)
            await slow.warm_up()
            await stopped.wait()
        try:
            large = pair.grant(BLOCKS - 2, handoff="slow", first=2)
            fetch = asyncio.ensure_future(slow.fetch(large))
            serve = asyncio.ensure_future(pair.exporter.serve(large))
            fetched, _ = await pair.carry_out(pair.grant(2, handoff="quick"), quick)
            assert isinstance(fetched, Landed), fetched
            assert pair.landed(0, 2)
            assert not serve.done()
            assert not fetch.done()
        finally:
            go_on.set()
        assert isinstance(await fetch, Landed)
        assert isinstance(await serve, SourceDone)
        assert pair.landed()


@contextlib.contextmanager
def sender_stuck(monkeypatch: pytest.MonkeyPatch) -> Iterator[asyncio.Event]:
    """P's threads send nothing until the block ends; set when the first of them would."""
    reached, go_on = asyncio.Event(), threading.Event()
    loop, finish = asyncio.get_running_loop(), Outgoing.finish

    def stuck(outgoing: Outgoing, stream: Stream) -> None:
        loop.call_soon_threadsafe(reached.set)
        go_on.wait()
        finish(outgoing, stream)

    with monkeypatch.context() as patched:
        patched.setattr(Outgoing, "finish", stuck)
        try:
            yield reached
        finally:
            go_on.set()


async def test_a_serve_given_up_before_its_turn_is_told_to_its_reader(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nothing of it was sent, so the connection lives on: its reader must not wait for its own deadline."""
    async with pair_of() as pair:
        importer = pair.importer()
        queued, answer = asyncio.Event(), Reader.answer

        async def noted(reader: Reader, claim: Claim, segments: Sequence[Segment]) -> str | None:
            if claim.handoff == "small":
                queued.set()
            return await answer(reader, claim, segments)

        monkeypatch.setattr(Reader, "answer", noted)
        with sender_stuck(monkeypatch) as sending:
            large = asyncio.ensure_future(
                pair.carry_out(pair.grant(BLOCKS - 1, handoff="large", first=1), importer)
            )
            await sending.wait()
            small = pair.grant(1, handoff="small")
            fetch = asyncio.ensure_future(importer.fetch(small))
            serve = asyncio.ensure_future(pair.exporter.serve(small))
            await queued.wait()
            serve.cancel()
            await asyncio.wait({serve})
            assert serve.cancelled()
        fetched = await fetch
        assert isinstance(fetched, Failed)
        assert fetched.reason == GIVEN_UP
        assert [type(report) for report in await large] == [Landed, SourceDone]
        assert pair.landed(1, BLOCKS - 1)
        assert not pair.target.bytes_view[0].any()


async def test_an_exporter_is_closed_only_when_nobody_reads_its_blocks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also where its close meets a reader that is just being let go."""
    async with pair_of() as pair:
        importer, leaving, close = pair.importer(), asyncio.Event(), Reader.close

        async def noted(reader: Reader) -> None:
            leaving.set()
            await close(reader)

        monkeypatch.setattr(Reader, "close", noted)
        with sender_stuck(monkeypatch) as sending:
            moved = asyncio.ensure_future(pair.carry_out(pair.grant(BLOCKS), importer))
            await sending.wait()
            await importer.close()
            await leaving.wait()
            closing = asyncio.ensure_future(pair.exporter.close())
            for _ in range(5):
                await asyncio.sleep(0)
            assert not closing.done()
        await closing
        assert [type(report) for report in await moved] == [Failed, Failed]
