"""What P's tcp half does about readers that come uninvited, twice, or do not read."""

import asyncio
import contextlib
import gc
from collections.abc import AsyncIterator, Awaitable, Callable

import numpy as np
import pytest

from pdserve.core.types import BlockId, HandoffId, OwnerId
from pdserve.kvtransfer.pool.layout import KvLayout
from pdserve.kvtransfer.pool.pool import KvPool
from pdserve.kvtransfer.pool.storage import KvStorage
from pdserve.kvtransfer.transports.base import Failed, Grant, Segment, SourceDone
from pdserve.kvtransfer.transports.tcp import TcpExporter, TcpImporter
from pdserve.kvtransfer.transports.tcp.outgoing import Outgoing
from pdserve.kvtransfer.transports.tcp.stream import Stream
from pdserve.kvtransfer.transports.tcp.wire import (
    FRAME_BYTES,
    VERDICT_BYTES,
    WELCOME_BYTES,
    Claim,
    FrameHeader,
    Hello,
    Welcome,
    reason_bytes,
)

LAYOUT = KvLayout(num_layers=1, num_kv_heads=2, head_dim=4, dtype="float32")
HANDOFF = HandoffId("handoff")
GRANT = Grant(HANDOFF, 3, 5, (Segment(BlockId(0), 1, BlockId(2), 16),))
TIMEOUT_S = 20.0

Leap = Callable[[float], Awaitable[None]]


async def test_nobody_listening_is_a_failed_fetch() -> None:
    async with exporter() as (source, _pool):
        offer = source.offer()
    importer = TcpImporter(KvStorage(LAYOUT, 4), offer, timeout_s=TIMEOUT_S)
    assert isinstance(await importer.fetch(GRANT), Failed)
    await importer.close()


@contextlib.asynccontextmanager
async def exporter(timeout_s: float = TIMEOUT_S) -> AsyncIterator[tuple[TcpExporter, KvPool]]:
    storage = KvStorage(LAYOUT, 4)
    storage.bytes_view[:] = np.arange(4, dtype=np.uint8)[:, None] + 1
    pool = KvPool(LAYOUT, 4, storage.generations)
    assert pool.allocate(OwnerId("p"), 4) is not None
    source = TcpExporter(storage, timeout_s=timeout_s)
    await source.start()
    try:
        yield source, pool
    finally:
        await source.close()
        storage.close()


async def connect(source: TcpExporter, hello: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    parameters = source.offer().parameters
    reader, writer = await asyncio.open_connection(parameters["host"], int(parameters["port"]))
    writer.write(hello)
    return reader, writer


async def test_a_reader_without_the_token_is_refused() -> None:
    async with exporter() as (source, _pool):
        reader, writer = await connect(source, Hello(b"\1" * 16, b"r" * 16).pack())
        answer = await reader.read()
        assert Welcome.unpack(answer) == Welcome(False)
        writer.close()


async def test_a_reader_that_speaks_something_else_is_dropped() -> None:
    async with exporter() as (source, _pool):
        reader, writer = await connect(source, b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n" * 3)
        with contextlib.suppress(ConnectionError):
            assert await reader.read() == b""
        writer.close()


async def test_a_reader_that_says_nothing_is_dropped() -> None:
    async with exporter(timeout_s=0.1) as (source, _pool):
        reader, writer = await connect(source, b"")
        assert await reader.read() == b""
        writer.close()


async def test_a_second_claim_of_one_grant_gets_no_bytes() -> None:
    async with exporter() as (source, _pool):
        token = bytes.fromhex(source.offer().parameters["token"])
        claims = []
        for number in range(2):
            reader, writer = await connect(source, Hello(token, b"r" * 16).pack())
            assert Welcome.unpack(await reader.readexactly(WELCOME_BYTES)) == Welcome(True)
            writer.write(Claim(number, HANDOFF, 3, 5).pack())
            claims.append((reader, writer))
            if number == 1:
                header = FrameHeader.unpack(await reader.readexactly(FRAME_BYTES))
                assert (header.tag, header.num_bytes) == (1, 0)
                assert reason_bytes(await reader.readexactly(VERDICT_BYTES))
        report = await source.serve(GRANT)
        assert isinstance(report, SourceDone)
        header = FrameHeader.unpack(await claims[0][0].readexactly(FRAME_BYTES))
        assert (header.tag, header.num_bytes) == (0, LAYOUT.block_bytes)
        assert set(await claims[0][0].readexactly(header.num_bytes)) == {1}
        assert not reason_bytes(await claims[0][0].readexactly(VERDICT_BYTES))
        for _, writer in claims:
            writer.close()


async def test_a_reader_that_does_not_drain_fails_the_serve_and_loses_its_connection(
    leap: Leap, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    gc.collect()
    caplog.clear()  # what other tests left behind
    sending, loop, finish = asyncio.Event(), asyncio.get_running_loop(), Outgoing.finish

    def noted(outgoing: Outgoing, stream: Stream) -> None:
        loop.call_soon_threadsafe(sending.set)
        finish(outgoing, stream)

    monkeypatch.setattr(Outgoing, "finish", noted)
    layout = KvLayout(num_layers=8, num_kv_heads=8, head_dim=128, dtype="float32")
    storage = KvStorage(layout, 16)
    pool = KvPool(layout, 16, storage.generations)
    assert pool.allocate(OwnerId("p"), 16) is not None
    source = TcpExporter(storage, timeout_s=TIMEOUT_S)
    await source.start()
    token = bytes.fromhex(source.offer().parameters["token"])
    reader, writer = await connect(source, Hello(token, b"r" * 16).pack())
    await reader.readexactly(WELCOME_BYTES)
    writer.transport.pause_reading()  # type: ignore[attr-defined]
    writer.write(Claim(1, HANDOFF, 3, 5).pack())
    segments = tuple(Segment(BlockId(block), 1, BlockId(block), 16) for block in range(16))
    serve = asyncio.ensure_future(source.serve(Grant(HANDOFF, 3, 5, segments)))
    await sending.wait()
    await leap(TIMEOUT_S)
    report = await serve
    assert isinstance(report, Failed)
    assert f"{TIMEOUT_S} s" in report.reason
    writer.transport.resume_reading()  # type: ignore[attr-defined]
    with contextlib.suppress(ConnectionError):
        assert len(await reader.read()) < 16 * layout.block_bytes
    gc.collect()
    assert not caplog.records, "its reason is in the report, and there only"
    writer.close()
    await source.close()
    storage.close()
