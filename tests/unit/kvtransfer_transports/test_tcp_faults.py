"""What D's tcp half does about a peer that lies, stops in mid-frame or is out of reach."""

import asyncio
import contextlib
import dataclasses
import gc
import socket
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from pdserve.core.errors import Unavailable
from pdserve.core.types import BlockId, HandoffId
from pdserve.kvtransfer.digest import digest_block
from pdserve.kvtransfer.pool.layout import KvLayout
from pdserve.kvtransfer.pool.storage import KvStorage
from pdserve.kvtransfer.transports.base import Failed, Grant, Landed, Offer, Segment
from pdserve.kvtransfer.transports.tcp import TcpImporter
from pdserve.kvtransfer.transports.tcp.lane import Lane
from pdserve.kvtransfer.transports.tcp.wire import (
    CLAIM_BYTES,
    FRAME_BYTES,
    HELLO_BYTES,
    FrameHeader,
    Welcome,
    pack_verdict,
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
