"""Two halves of a transport that met: P in this process or in a child, D here."""

import asyncio
import atexit
import contextlib
import functools
import importlib.util
import multiprocessing
import os
import shutil
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
import torch

from pdserve.core.config import SecurityConfig
from pdserve.core.errors import ConfigError, Unavailable
from pdserve.core.security.tls import SocketTls
from pdserve.core.types import BlockId, HandoffId, OwnerId
from pdserve.kvtransfer.gpu.cuda import open_gpu
from pdserve.kvtransfer.native.build import NativeUnavailable
from pdserve.kvtransfer.pool.layout import KvLayout
from pdserve.kvtransfer.pool.pool import KvPool
from pdserve.kvtransfer.pool.storage import KvStorage
from pdserve.kvtransfer.transports.base import Failed, Grant, Importer, Landed, Offer, Segment, SourceDone
from pdserve.kvtransfer.transports.ladder import make_exporters, make_importer

SOURCE_BLOCKS = 24
DESTINATION_BLOCKS = 40
TIMEOUT_S = 20.0
SHORT_S = 0.3
HANDOFF = HandoffId("h1")
UNTOUCHED = 0xA5
ON_GPU = frozenset({"cuda_ipc", "nccl"})


def content(block: int, layout: KvLayout) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The bytes that P's block has: different for every block and position."""
    return np.random.default_rng(block).integers(0, 256, layout.block_bytes, np.uint8)


@functools.cache
def certificates_of_workers() -> Path:
    """A folder of `pdserve certs`, for "tcp+tls"."""
    from pdserve.core.security.dev_certs import make_certificates

    folder = Path(tempfile.mkdtemp(prefix="pdserve-certs-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    make_certificates(folder)
    return folder


def sockets_of(certificates: Path | None) -> SocketTls | None:
    """Each end, and each process, loads them for itself."""
    if certificates is None:
        return None
    from pdserve.core.security.cluster_tls import WorkerTls

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
async def meet(
    way: str, place: str, dtype: str, timeout_s: float, layout: KvLayout | None = None
) -> AsyncIterator[Pair]:
    """A pair over `way`, with P "inside" this process or in a "child"."""
    transport, _, on = way.partition("+")
    certificates = certificates_of_workers() if on == "tls" else None
    layout = layout or KvLayout(num_layers=2, num_kv_heads=3, head_dim=8, dtype=dtype)
    source: Source | Remote
    if place == "child":
        # The fork server imports once what every child needs.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["pdserve.kvtransfer.transports.ladder", "host_gpu"])
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
    if way.endswith("+tls") and importlib.util.find_spec("cryptography") is None:
        return "cryptography is not installed"
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
