"""Epochs of the nccl transport: what ends one, that all of it ends, and that the next one works.

Communicators are the stand-in's: they notice nothing of a dead or stopped peer, as NCCL may not.
"""

import asyncio
import contextlib
import re
import socket
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import host_gpu
import host_nccl
import pytest

from pdserve.core.clock import MonotonicClock
from pdserve.core.config import SecurityConfig
from pdserve.core.errors import Unavailable
from pdserve.core.types import BlockId, HandoffId, OwnerId
from pdserve.kvtransfer.gpu.base import CommunicatorFailed, GpuStream
from pdserve.kvtransfer.pool.layout import KvLayout
from pdserve.kvtransfer.pool.pool import KvPool
from pdserve.kvtransfer.pool.storage import KvStorage
from pdserve.kvtransfer.transports.base import Failed, Grant, Landed, Offer, Segment, SourceDone
from pdserve.kvtransfer.transports.ladder import make_exporters, make_importer
from pdserve.kvtransfer.transports.nccl import NcclExporter, NcclImporter
from pdserve.kvtransfer.transports.nccl import epoch as module
from pdserve.kvtransfer.transports.nccl.stream import ControlStream
from pdserve.kvtransfer.transports.nccl.wire import (
    Claim,
    Hello,
    Join,
    Post,
    Ready,
    Welcome,
    receive_hello,
    receive_join,
    receive_ready,
    receive_request,
    receive_welcome,
)

LAYOUT = KvLayout(num_layers=1, num_kv_heads=1, head_dim=8, dtype="bfloat16")
BLOCKS = 6
TIMEOUT_S = 20.0
SHORT_S = 0.3


def grant(seq: int, blocks: int = 1, at: int = 0, generation: int = 1) -> Grant:
    segments = (Segment(BlockId(n), generation, BlockId(at + n), 16) for n in range(blocks))
    return Grant(HandoffId("h"), 1, seq, tuple(segments))


@dataclass
class Worker:
    """A GPU with a pool and an NCCL of its own."""

    nccl: host_nccl.HostCommunicators
    storage: KvStorage

    @classmethod
    def make(cls) -> "Worker":
        library = host_nccl.HostCommunicators()
        return cls(library, KvStorage(LAYOUT, BLOCKS, gpu=host_gpu.HostGpu(library)))

    def touched(self) -> list[int]:
        return [block for block in range(BLOCKS) if self.storage.tensor[block].any()]

    def all_ended(self) -> bool:
        return all(made.aborted.is_set() for made in self.nccl.made)


@dataclass
class Pair:
    p: Worker
    d: Worker
    exporter: NcclExporter
    importer: NcclImporter

    async def carry_out(self, granted: Grant) -> tuple[Landed | Failed, SourceDone | Failed]:
        return await asyncio.gather(self.importer.fetch(granted), self.exporter.serve(granted))

    async def works(self, seq: int) -> None:
        fetched, served = await self.carry_out(grant(seq))
        assert isinstance(fetched, Landed), fetched
        assert isinstance(served, SourceDone), served


@contextlib.asynccontextmanager
async def pair_of(
    timeout_s: float = TIMEOUT_S, idle_s: float = 60.0, max_pairs: int = 16
) -> AsyncIterator[Pair]:
    p, d = Worker.make(), Worker.make()
    pool = KvPool(LAYOUT, BLOCKS, p.storage.generations)
    assert pool.allocate(OwnerId("p"), BLOCKS) is not None
    p.storage.tensor.fill_(3)
    exporter = NcclExporter(p.storage, timeout_s=timeout_s, max_pairs=max_pairs)
    await exporter.start()
    importer = NcclImporter(d.storage, exporter.offer(), timeout_s=timeout_s, idle_s=idle_s)
    try:
        yield Pair(p, d, exporter, importer)
    finally:
        await importer.close()
        await exporter.close()
        assert p.all_ended()
        assert d.all_ended()
        for worker in (p, d):
            worker.storage.close()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(TIMEOUT_S):
        while not condition():
            await asyncio.sleep(0.005)


async def test_a_pair_has_one_communicator_and_both_ends_post_in_ds_order() -> None:
    async with pair_of() as pair:
        grants = [grant(seq, blocks=1 + seq % 3) for seq in range(9)]
        serves = [pair.exporter.serve(one) for one in reversed(grants)]
        reports = await asyncio.gather(*(pair.importer.fetch(one) for one in grants), *serves)
        assert all(isinstance(report, Landed | SourceDone) for report in reports), reports
        (at_p,), (at_d,) = pair.p.nccl.made, pair.d.nccl.made
        assert [size for _, size in at_p.posted] == [size for _, size in at_d.posted]
        assert {what for what, _ in at_p.posted} == {"send"}
        assert {what for what, _ in at_d.posted} == {"receive"}
        assert len(at_d.posted) == 9
        assert pair.importer.epochs == 1


async def test_warming_up_asks_p_and_makes_no_communicator_and_the_first_fetch_does() -> None:
    async with pair_of() as pair:
        for _ in range(3):
            await pair.importer.warm_up()
        assert not pair.d.nccl.made
        await until(lambda: len(pair.exporter._tasks) == 1)  # it listens, and keeps nothing of a visit
        await pair.works(0)
        assert len(pair.d.nccl.made) == len(pair.p.nccl.made) == pair.importer.epochs == 1


@pytest.mark.parametrize("who", ["p", "d"])
async def test_a_peer_that_does_not_join_fails_the_fetch_in_time_and_nothing_is_left(who: str) -> None:
    async with pair_of(SHORT_S) as pair:
        library = pair.p.nccl if who == "p" else pair.d.nccl
        library.deaf = True
        await pair.importer.warm_up()
        fetched, served = await pair.carry_out(grant(0))
        assert isinstance(fetched, Failed)
        assert isinstance(served, Failed)
        library.deaf = False
        await until(lambda: pair.p.all_ended() and pair.d.all_ended())
        await pair.works(1)
        assert pair.importer.epochs == 2


@pytest.mark.parametrize("who", ["p", "d"])
async def test_a_transfer_that_hangs_ends_the_epoch_by_the_watchdog(
    who: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hang(self: host_nccl.HostCommunicator, pointer: int, num_bytes: int, stream: GpuStream) -> None:
        host_gpu.HostStream.STREAMS[stream.handle].enqueue(self.aborted.wait)

    async with pair_of(SHORT_S) as pair:
        await pair.works(0)
        first = pair.d.nccl.made[0]
        with monkeypatch.context() as patch:
            patch.setattr(host_nccl.HostCommunicator, "send" if who == "p" else "receive", hang)
            fetched, served = await pair.carry_out(grant(1, at=3))
        assert isinstance(fetched, Failed)
        assert who == "d" or isinstance(served, Failed), "what waits in a buffer has left P"
        await until(lambda: pair.p.all_ended() and pair.d.all_ended())
        assert pair.d.touched() == [0]
        await pair.works(2)
        assert pair.importer.epochs == 2
        assert pair.d.nccl.made[1] is not first
        assert len(pair.p.nccl.made) == 2


@pytest.mark.parametrize("who", ["p", "d"])
async def test_an_error_that_the_library_finds_ends_the_epoch_at_once(
    who: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: host_nccl.HostCommunicator, pointer: int, num_bytes: int, stream: GpuStream) -> None:
        self.error = "remote process exited or there was a network error"

    async with pair_of() as pair:
        await pair.works(0)
        with monkeypatch.context() as patch:
            patch.setattr(host_nccl.HostCommunicator, "send" if who == "p" else "receive", broken)
            fetched, served = await pair.carry_out(grant(1, at=3))
        assert isinstance(fetched, Failed)
        told = served if who == "p" else fetched
        assert isinstance(told, Failed)
        assert "network error" in told.reason
        await pair.works(2)
        assert pair.importer.epochs == 2
        assert pair.d.touched() == [0]


async def test_an_end_that_goes_away_in_mid_transfer_frees_the_other_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    started = threading.Event()

    def hang(self: host_nccl.HostCommunicator, pointer: int, num_bytes: int, stream: GpuStream) -> None:
        started.set()
        host_gpu.HostStream.STREAMS[stream.handle].enqueue(self.aborted.wait)

    async with pair_of() as pair:
        await pair.works(0)
        for what in ("send", "receive"):
            monkeypatch.setattr(host_nccl.HostCommunicator, what, hang)
        serve = asyncio.ensure_future(pair.exporter.serve(grant(1, at=3)))
        fetch = asyncio.ensure_future(pair.importer.fetch(grant(1, at=3)))
        await asyncio.to_thread(started.wait)
        await pair.importer.close()
        assert isinstance(await fetch, Failed)
        report = await serve
        assert isinstance(report, Failed)
        assert "lost" in report.reason
        await until(pair.p.all_ended)
        assert pair.d.touched() == [0]


async def test_a_fetch_given_up_while_blocks_come_writes_nothing_and_the_epoch_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    receive, posted, go_on = host_nccl.HostCommunicator.receive, threading.Event(), threading.Event()

    def held(self: host_nccl.HostCommunicator, pointer: int, num_bytes: int, stream: GpuStream) -> None:
        posted.set()
        host_gpu.HostStream.STREAMS[stream.handle].enqueue(go_on.wait)
        receive(self, pointer, num_bytes, stream)

    async with pair_of() as pair:
        await pair.works(0)
        with monkeypatch.context() as patch:
            patch.setattr(host_nccl.HostCommunicator, "receive", held)
            serve = asyncio.ensure_future(pair.exporter.serve(grant(1, at=3)))
            fetch = asyncio.ensure_future(pair.importer.fetch(grant(1, at=3)))
            await asyncio.to_thread(posted.wait)
            fetch.cancel()
            with pytest.raises(asyncio.CancelledError):
                await fetch
            go_on.set()
            assert isinstance(await serve, SourceDone)
        await pair.works(2)
        assert pair.importer.epochs == 1
        assert pair.d.touched() == [0]


async def test_blocks_that_are_not_wanted_any_more_are_not_sent() -> None:
    async with pair_of() as pair:
        await pair.works(0)
        fetch = asyncio.ensure_future(pair.importer.fetch(grant(1, at=3)))
        await asyncio.sleep(0)
        fetch.cancel()
        with pytest.raises(asyncio.CancelledError):
            await fetch
        report = await pair.exporter.serve(grant(1, at=3))
        assert isinstance(report, Failed)
        await pair.works(2)
        assert pair.importer.epochs <= 2
        assert pair.d.touched() == [0]
        sent = [size for made in pair.p.nccl.made for _, size in made.posted]
        assert len(sent) == 2


async def test_an_idle_communicator_is_closed_at_both_ends_and_made_again_when_needed() -> None:
    async with pair_of(idle_s=0.05) as pair:
        await pair.works(0)
        await until(lambda: pair.p.all_ended() and pair.d.all_ended())
        await pair.works(1)
        assert pair.importer.epochs == 2


async def test_a_communicator_whose_first_fetch_was_given_up_is_closed_when_idle_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with pair_of(idle_s=0.05) as pair:
        named, go_on = threading.Event(), threading.Event()
        unique_id = pair.d.nccl.unique_id

        def held() -> bytes:
            named.set()
            go_on.wait(TIMEOUT_S)
            return unique_id()

        monkeypatch.setattr(pair.d.nccl, "unique_id", held)
        fetch = asyncio.ensure_future(pair.importer.fetch(grant(0)))
        await asyncio.to_thread(named.wait)
        fetch.cancel()
        with pytest.raises(asyncio.CancelledError):
            await fetch
        go_on.set()
        await until(lambda: bool(pair.d.nccl.made) and pair.d.all_ended() and pair.p.all_ended())


async def test_p_keeps_so_many_communicators_and_closes_the_longest_unused_one() -> None:
    async with pair_of(max_pairs=1) as pair:
        await pair.works(0)
        other = Worker.make()
        second = NcclImporter(other.storage, pair.exporter.offer(), timeout_s=TIMEOUT_S)
        fetched, _ = await asyncio.gather(second.fetch(grant(1)), pair.exporter.serve(grant(1)))
        assert isinstance(fetched, Landed)
        await until(pair.d.all_ended)
        await pair.works(2)
        assert pair.importer.epochs == 2
        await until(other.all_ended)
        await second.close()
        other.storage.close()


async def test_a_stale_source_is_refused_and_the_epoch_goes_on() -> None:
    async with pair_of() as pair:
        fetched, served = await pair.carry_out(grant(0, generation=7))
        assert isinstance(fetched, Failed)
        assert isinstance(served, Failed)
        assert "generation" in fetched.reason
        await pair.works(1)
        assert pair.importer.epochs == 1


@pytest.mark.parametrize("change", ["token", "version"])
async def test_who_has_no_token_or_another_nccl_is_refused_before_anything_is_joined(change: str) -> None:
    async with pair_of() as pair:
        offer = pair.exporter.offer()
        stranger = Worker.make()
        if change == "token":
            offer = Offer("nccl", {**offer.parameters, "token": "00" * 16})
        else:
            stranger.nccl.version += 1
        importer = NcclImporter(stranger.storage, offer, timeout_s=TIMEOUT_S)
        with pytest.raises(ConnectionError, match=r"token|NCCL is"):
            await importer.warm_up()
        assert not pair.p.nccl.made
        assert not stranger.nccl.made
        await importer.close()
        stranger.storage.close()
        await pair.works(0)


@contextlib.asynccontextmanager
async def lying_source(
    answer: Callable[[ControlStream, Claim], Awaitable[None]],
) -> AsyncIterator[tuple[Worker, NcclImporter]]:
    """An importer whose peer joins, reads one claim and then does as `answer` says."""
    d, p = Worker.make(), host_nccl.HostCommunicators()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        parameters = {
            "host": "127.0.0.1",
            "port": str(listener.getsockname()[1]),
            "token": "00" * 16,
            "layout": LAYOUT.fingerprint().hex(),
        }

        async def attend() -> None:
            sock, _ = await asyncio.get_running_loop().sock_accept(listener)
            with sock:
                stream = ControlStream(sock)
                await receive_hello(stream)
                await stream.send(Welcome("").pack())
                p.join((await receive_join(stream)).unique_id, 1)
                claim = await receive_request(stream)
                assert isinstance(claim, Claim)
                await answer(stream, claim)

        peer = asyncio.ensure_future(attend())
        importer = NcclImporter(d.storage, Offer("nccl", parameters), timeout_s=SHORT_S)
        try:
            yield d, importer
        finally:
            await importer.close()
            await asyncio.wait_for(peer, TIMEOUT_S)
            assert d.all_ended()
            d.storage.close()


@pytest.mark.parametrize(
    ("lie", "said"),
    [
        (lambda claim: Ready(claim.tag + 1, LAYOUT.block_bytes).pack(), "no claim"),
        (lambda claim: Ready(claim.tag, LAYOUT.block_bytes + 1).pack(), "are packed"),
        (lambda claim: Ready(claim.tag, 0, "no such block").pack(), "no such block"),
        (lambda claim: b"GET / HTTP/1.1\r\n" * 8, "expected an answer"),
        (lambda claim: Ready(claim.tag, LAYOUT.block_bytes).pack()[:7], "closed the connection"),
        (lambda claim: b"", "closed the connection"),
        (lambda claim: Ready(claim.tag, LAYOUT.block_bytes).pack(), "lost|within"),
    ],
    ids=["tag", "size", "refused", "http", "cut", "silent end", "nothing sent"],
)
async def test_a_source_that_lies_or_leaves_fails_the_fetch_and_writes_nothing(
    lie: Callable[[Claim], bytes], said: str
) -> None:
    async def answer(stream: ControlStream, claim: Claim) -> None:
        await stream.send(lie(claim))

    async with lying_source(answer) as (d, importer):
        fetched = await importer.fetch(grant(0))
        assert isinstance(fetched, Failed)
        assert re.search(said, fetched.reason), fetched.reason
        assert not d.touched()


@pytest.mark.parametrize(
    "lie",
    [
        lambda tag: Post(tag, 2).pack(),
        lambda tag: Post(tag + 1, 1).pack(),
        lambda tag: Post(tag, 0).pack() + Post(tag, 1).pack(),
        lambda tag: b"\x00" * 20,
    ],
    ids=["order", "tag", "twice", "no record"],
)
async def test_a_reader_that_lies_loses_its_epoch_and_gets_nothing(lie: Callable[[int], bytes]) -> None:
    async with pair_of() as pair:
        offer, library = pair.exporter.offer().parameters, host_nccl.HostCommunicators()
        with socket.socket() as sock:
            sock.setblocking(False)
            await asyncio.get_running_loop().sock_connect(sock, (offer["host"], int(offer["port"])))
            stream, name = ControlStream(sock), library.unique_id()
            await stream.send(Hello(bytes.fromhex(offer["token"]), 1, library.version).pack())
            assert not (await receive_welcome(stream)).refused
            await stream.send(Join(name).pack())
            library.join(name, 0)
            await stream.send(Claim(9, HandoffId("h"), 1, 0).pack())
            serve = asyncio.ensure_future(pair.exporter.serve(grant(0)))
            assert await receive_ready(stream) == Ready(9, LAYOUT.block_bytes)
            await stream.send(lie(9))
            assert isinstance(await serve, Failed)
            await until(pair.p.all_ended)
            assert not pair.p.nccl.made[0].posted
        await pair.works(1)


async def test_nccl_is_neither_offered_nor_taken_where_workers_encrypt(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("cryptography", reason="no certificates without it")
    from pdserve.core.security.cluster_tls import WorkerTls
    from pdserve.core.security.dev_certs import make_certificates

    make_certificates(tmp_path)
    tls = WorkerTls.load(SecurityConfig(tls_dir=str(tmp_path)))
    assert tls is not None
    async with pair_of() as pair:
        offered = make_exporters(pair.p.storage, ["nccl", "tcp"], tls=tls.sockets)
        assert [exporter.transport for exporter in offered] == ["tcp"]
        assert "does not encrypt" in caplog.text
        with pytest.raises(Unavailable, match="does not encrypt"):
            make_importer(pair.exporter.offer(), pair.d.storage, tls=tls.sockets)


async def test_pools_on_the_host_and_machines_without_nccl_have_no_such_rung() -> None:
    on_host, without = KvStorage(LAYOUT, 2), KvStorage(LAYOUT, 2, gpu=host_gpu.HostGpu())
    offer = Offer(
        "nccl", {"host": "h", "port": "1", "token": "00" * 16, "layout": LAYOUT.fingerprint().hex()}
    )
    with pytest.raises(Unavailable, match="on cpu"):
        NcclExporter(on_host)
    with pytest.raises(Unavailable, match="on cpu"):
        NcclImporter(on_host, offer)
    for make in (lambda: NcclExporter(without), lambda: NcclImporter(without, offer)):
        with pytest.raises(Unavailable, match="no communicators"):
            make()
    with pytest.raises(Unavailable, match="not understood"):
        NcclImporter(without, Offer("nccl", {}))


async def test_a_communicator_whose_work_does_not_end_costs_its_memory_and_no_more(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "_LET_GO_S", 0.05)
    library = host_nccl.HostCommunicators()
    gpu, never = host_gpu.HostGpu(library), threading.Event()
    epoch = module.Epoch(gpu, library, MonotonicClock(), 1.0, threading.Event())
    library.deaf = True
    stop = threading.Event()
    stop.set()
    with pytest.raises(CommunicatorFailed):
        epoch.join(library.unique_id(), 0)
    rows = epoch.staged(1, 64)
    assert isinstance(epoch.stream, host_gpu.HostStream)
    epoch.stream.enqueue(never.wait)
    await asyncio.to_thread(epoch.end)
    assert "memory is lost" in caplog.text
    assert host_gpu.host_view(rows.pointer, 64).size == 64
    with pytest.raises(CommunicatorFailed, match="no longer"):
        epoch.staged(1, 64)
    never.set()
