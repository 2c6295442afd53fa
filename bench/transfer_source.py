"""P's side of the transfer benchmark: a process of its own that owns the pool which is read."""

import asyncio
import multiprocessing
from multiprocessing.connection import Connection
from types import TracebackType

import numpy as np
import torch
from numpy.typing import NDArray

from pdserve.kvtransfer.native import load_kernel
from pdserve.kvtransfer.pool.layout import KvLayout
from pdserve.kvtransfer.pool.storage import KvStorage
from pdserve.kvtransfer.transports.base import Grant, Offer
from pdserve.kvtransfer.transports.ladder import make_exporters

GENERATION = 1
TIMEOUT_S = 60.0


def fill(blocks: NDArray[np.uint8]) -> None:
    """The bytes of a source pool, [n, block_bytes]: no two words are equal."""
    words = blocks.reshape(-1).view(np.uint32)
    words[:] = np.arange(words.size, dtype=np.uint32)


class TransferSource:
    """The process, from the benchmark's side. A context manager: its end ends the process."""

    def __init__(self, layout: KvLayout, num_blocks: int, transports: tuple[str, ...]) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=_main, args=(theirs, layout, num_blocks, transports), daemon=True
        )
        self._process.start()
        theirs.close()
        self.offers: tuple[Offer, ...] = self._pipe.recv()

    def serve(self, transport: str, grant: Grant) -> None:
        """Have the grant carried out; returns at once."""
        self._pipe.send((transport, grant))

    def join_gloo(self, port: int, num_bytes: int) -> None:
        """Be the other side of a GlooAsker; returns at once."""
        self._pipe.send(("gloo", (port, num_bytes)))

    def __enter__(self) -> "TransferSource":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pipe.close()
        self._process.join(5.0)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


def _main(pipe: Connection, layout: KvLayout, num_blocks: int, transports: tuple[str, ...]) -> None:
    torch.set_num_threads(1)
    load_kernel()
    asyncio.run(_serve(pipe, layout, num_blocks, transports))


async def _serve(pipe: Connection, layout: KvLayout, num_blocks: int, transports: tuple[str, ...]) -> None:
    """Until the other end of the pipe is closed."""
    storage = KvStorage(layout, num_blocks)
    fill(storage.bytes_view)
    storage.generations[:] = GENERATION
    exporters = {
        exporter.transport: exporter for exporter in make_exporters(storage, transports, timeout_s=TIMEOUT_S)
    }
    for exporter in exporters.values():
        await exporter.start()
    pipe.send(tuple(exporter.offer() for exporter in exporters.values()))
    answering: list[asyncio.Future[None]] = []
    while True:
        try:
            name, work = await asyncio.to_thread(pipe.recv)
        except EOFError:
            break
        if name == "gloo":
            from pdserve.bench.gloo_pair import answer

            answering.append(asyncio.ensure_future(asyncio.to_thread(answer, *work)))
        else:
            await exporters[name].serve(work)
    for exporter in exporters.values():
        await exporter.close()
    storage.close()
