"""What the tcp halves do about a peer that lies, stops in mid-frame or comes uninvited."""

import asyncio
import contextlib
import dataclasses
import gc
import socket
from collections.abc import AsyncIterator, Awaitable, Callable

import numpy as np
import pytest

from pdserve.core.errors import Unavailable
from pdserve.core.types import BlockId, HandoffId, OwnerId
from pdserve.kvtransfer.digest import digest_block
from pdserve.kvtransfer.pool.layout import KvLayout
from pdserve.kvtransfer.pool.pool import KvPool
from pdserve.kvtransfer.pool.storage import KvStorage
from pdserve.kvtransfer.transports.base import Failed, Grant, Landed, Offer, Segment, SourceDone
from pdserve.kvtransfer.transports.tcp import TcpExporter, TcpImporter
from pdserve.kvtransfer.transports.tcp.lane import Lane
from pdserve.kvtransfer.transports.tcp.outgoing import Outgoing
from pdserve.kvtransfer.transports.tcp.stream import Stream
from pdserve.kvtransfer.transports.tcp.wire import (
    CLAIM_BYTES,
    FRAME_BYTES,
    HELLO_BYTES,
    VERDICT_BYTES,
    WELCOME_BYTES,
    Claim,
    FrameHeader,
    Hello,
    Welcome,
    pack_verdict,
    reason_bytes,
)

LAYOUT = KvLayout(num_layers=1, num_kv_heads=2, head_dim=4, dtype="float32")
HANDOFF = HandoffId("handoff")
GRANT = Grant(HANDOFF, 3, 5, (Segment(BlockId(0), 1, BlockId(2), 16),))
TIMEOUT_S = 20.0

Answer = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
Leap = Callable[[float], Awaitable[None]]


@contextlib.asynccontextmanager
async def importer_of(answer: Answer) -> AsyncIterator[tuple[TcpImporter, KvStorage]]:
    """An importer whose peer welcomes it, reads one claim and then does as `answer` says."""

    async def attend(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.closing(writer), contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            await reader.readexactly(HELLO_BYTES)
            writer.write(Welcome(True).pack())
            await reader.readexactly(CLAIM_BYTES + len(HANDOFF))
            await answer(reader, writer)
            await writer.drain()

    server = await asyncio.start_server(attend, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    parameters = {
        "host": "127.0.0.1",
        "port": str(port),
        "token": "00" * 16,
        "layout": LAYOUT.fingerprint().hex(),
    }
    storage = KvStorage(LAYOUT, 4)
    importer = TcpImporter(storage, Offer("tcp", parameters), timeout_s=TIMEOUT_S)
    try:
        yield importer, storage
    finally:
        await importer.close()
        server.close()
        await server.wait_closed()
        storage.close()


def frame(**changes: int) -> bytes:
    header = FrameHeader(tag=1, epoch=3, seq=5, num_bytes=LAYOUT.block_bytes)
    return header._replace(**changes).pack()


GOOD = pack_verdict(None)


WRONG = {
    "http": b"GET / HTTP/1.1\r\nHost: localhost\r\nAccept: text/html\r\n\r\n",
    "tag": frame(tag=2) + bytes(LAYOUT.block_bytes) + GOOD,
    "epoch": frame(epoch=4) + bytes(LAYOUT.block_bytes) + GOOD,
    "seq": frame(seq=6) + bytes(LAYOUT.block_bytes) + GOOD,
    "size": frame(num_bytes=LAYOUT.block_bytes * 2) + bytes(LAYOUT.block_bytes * 2) + GOOD,
    "huge": frame(num_bytes=1 << 60),
    "good without a payload": frame(num_bytes=0) + GOOD,
    "cut header": frame()[: FRAME_BYTES - 1],
    "silent end": b"",
}


@pytest.mark.parametrize("answer", WRONG.values(), ids=WRONG.keys())
async def test_a_frame_that_answers_no_claim_fails_the_fetch_and_writes_nothing(answer: bytes) -> None:
    async def send(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(answer)

    async with importer_of(send) as (importer, storage):
        report = await importer.fetch(GRANT)
        assert isinstance(report, Failed)
        assert not storage.bytes_view.any()


WHOLE = frame() + b"x" * LAYOUT.block_bytes
UNCONFIRMED = {
    "cut payload": WHOLE[:-1],
    "no verdict": WHOLE,
    "cut verdict": WHOLE + GOOD[:-1],
    "no verdict but a frame": WHOLE + WHOLE,
    "a bad verdict": WHOLE + pack_verdict("stale"),
    "a cut reason": WHOLE + pack_verdict("stale")[:-1],
    "a huge reason": WHOLE + GOOD[:-2] + b"\xff\xff" + bytes(70_000),
}


@pytest.mark.parametrize("answer", UNCONFIRMED.values(), ids=UNCONFIRMED.keys())
async def test_a_payload_without_a_good_verdict_fails_the_fetch_and_touches_no_other_block(
    answer: bytes,
) -> None:
    async def send(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(answer)

    async with importer_of(send) as (importer, storage):
        report = await importer.fetch(GRANT)
        assert isinstance(report, Failed)
        assert not storage.bytes_view[[0, 1, 3]].any()


async def test_a_second_answer_to_one_claim_is_not_written() -> None:
    async def send_twice(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(WHOLE + GOOD + frame() + b"y" * LAYOUT.block_bytes + GOOD)

    async with importer_of(send_twice) as (importer, storage):
        assert isinstance(await importer.fetch(GRANT), Landed)
        await importer.close()
        assert (storage.bytes_view[2] == ord("x")).all()


@pytest.mark.parametrize("head", [b"", frame(), frame() + b"x" * 100], ids=["no frame", "no byte", "a part"])
async def test_what_comes_after_a_fetch_ran_out_of_time_is_not_written(head: bytes, leap: Leap) -> None:
    """The block is somebody else's by then. The connection goes on: what follows on it lands."""
    stalled, go_on = asyncio.Event(), asyncio.Event()

    async def stall(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(head)
        await writer.drain()
        stalled.set()
        await go_on.wait()
        writer.write(WHOLE[len(head) :] + GOOD)
        await reader.readexactly(CLAIM_BYTES + len(HANDOFF))
        writer.write(frame(tag=2, seq=6) + b"y" * LAYOUT.block_bytes + GOOD)

    async with importer_of(stall) as (importer, storage):
        fetch = asyncio.ensure_future(importer.fetch(GRANT))
        await stalled.wait()
        while head[FRAME_BYTES:] and not storage.bytes_view[2].any():
            await asyncio.sleep(0.001)
        await leap(TIMEOUT_S)
        report = await fetch
        assert isinstance(report, Failed)
        assert f"{TIMEOUT_S} s" in report.reason
        storage.bytes_view[2] = 7
        go_on.set()
        following = Grant(HANDOFF, 3, 6, (Segment(BlockId(0), 1, BlockId(1), 16),))
        assert isinstance(await importer.fetch(following), Landed)
        assert (storage.bytes_view[2] == 7).all()
        assert (storage.bytes_view[1] == ord("y")).all()


async def test_the_sources_reason_reaches_the_report() -> None:
    async def send(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(frame(num_bytes=0) + pack_verdict("stale"))

    async with importer_of(send) as (importer, storage):
        assert await importer.fetch(GRANT) == Failed(HANDOFF, 3, 5, "stale")
        assert not storage.bytes_view.any()


async def test_digests_are_of_what_landed() -> None:
    async def send(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(WHOLE + GOOD)

    async with importer_of(send) as (importer, storage):
        report = await importer.fetch(dataclasses.replace(GRANT, digest=True))
        assert isinstance(report, Landed)
        assert report.digests == digest_block(storage.bytes_view[2], LAYOUT, 16)


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


async def test_an_importer_connects_again_after_its_connection_was_lost() -> None:
    connections = 0

    async def answer_second(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        if connections == 2:
            writer.write(frame() + b"z" * LAYOUT.block_bytes + GOOD)

    async with importer_of(answer_second) as (importer, storage):
        assert isinstance(await importer.fetch(GRANT), Failed)
        assert isinstance(await importer.fetch(GRANT), Landed)
        assert (storage.bytes_view[2] == ord("z")).all()


async def test_a_source_out_of_reach_is_told_in_the_report_alone(
    leap: Leap, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The fetch runs out of time first; the connection that it waited for fails a moment later."""
    gc.collect()
    caplog.clear()  # what other tests left behind
    connecting = asyncio.Event()

    async def never(_: Lane) -> socket.socket:
        connecting.set()
        await asyncio.get_running_loop().create_future()
        raise AssertionError("nobody answers")

    monkeypatch.setattr(Lane, "_connect", never)
    parameters = {"host": "h", "port": "1", "token": "00" * 16, "layout": LAYOUT.fingerprint().hex()}
    storage = KvStorage(LAYOUT, 4)
    importer = TcpImporter(storage, Offer("tcp", parameters), timeout_s=TIMEOUT_S)
    fetch = asyncio.ensure_future(importer.fetch(GRANT))
    await connecting.wait()
    await leap(TIMEOUT_S)
    assert isinstance(await fetch, Failed)
    await importer.close()
    gc.collect()
    assert not caplog.records
    storage.close()


@pytest.mark.parametrize("change", [{"layout": "00" * 16}, {"port": "many"}, {"token": "00"}])
def test_an_offer_that_does_not_fit_is_refused(change: dict[str, str]) -> None:
    parameters = {"host": "h", "port": "1", "token": "00" * 16, "layout": LAYOUT.fingerprint().hex()}
    storage = KvStorage(LAYOUT, 1)
    with pytest.raises(Unavailable):
        TcpImporter(storage, Offer("tcp", parameters | change))
    storage.close()
