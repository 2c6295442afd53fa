"""P's side of the transfer benchmark: a process of its own that owns the pool which is read."""

import asyncio
import multiprocessing
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

import numpy as np
import torch
import uvloop

from pdserve.bench.child_process import follow_parent
from pdserve.bench.nixl_pair import NixlPeer, NixlPool
from pdserve.core.errors import Unavailable
from pdserve.core.types import BlockId
from pdserve.kvtransfer.native import load_kernel
from pdserve.kvtransfer.pool.layout import KvLayout
from pdserve.kvtransfer.pool.storage import KvStorage
from pdserve.kvtransfer.transports.base import Exporter, Grant, Offer
from pdserve.kvtransfer.transports.ladder import make_exporters

GENERATION = 1
TIMEOUT_S = 60.0
_FILLED_AT_ONCE = 256


def fill(storage: KvStorage) -> None:
    """The bytes of a source pool: no two words are equal, and equal pools have equal bytes."""
    words = storage.layout.block_bytes // np.dtype(np.uint32).itemsize
    for start in range(0, storage.num_blocks, _FILLED_AT_ONCE):
        end = min(start + _FILLED_AT_ONCE, storage.num_blocks)
        content = np.arange(start * words, end * words, dtype=np.uint32)
        storage.write_blocks(
            [BlockId(block) for block in range(start, end)], content.view(np.uint8).reshape(end - start, -1)
        )
    storage.settle()
    storage.generations[:] = GENERATION


class TransferSource:
    """The process, from the benchmark's side. A context manager: its end ends the process."""

    def __init__(self, layout: KvLayout, num_blocks: int, transports: tuple[str, ...], device: str) -> None:
        """Raises Unavailable where it ends at once."""
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=_main, args=(theirs, layout, num_blocks, transports, device), daemon=True
        )
        self._process.start()
        theirs.close()
        self.offers: tuple[Offer, ...] = self._ask("offers")

    def serve(self, transport: str, grant: Grant) -> None:
        """Have the grant carried out; returns when P knows it."""
        self._ask("serve", transport, grant)

    def join_gloo(self, port: int, num_bytes: int) -> None:
        """Be the other side of a GlooAsker; returns at once."""
        self._ask("gloo", port, num_bytes)

    def join_nixl(self, reader: NixlPeer) -> NixlPeer:
        """Be the other side of a NixlPool. Raises Unavailable where NIXL does not work there."""
        answer = self._ask("nixl", reader)
        if not isinstance(answer, NixlPeer):
            raise Unavailable(str(answer))
        return answer

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

    def _ask(self, kind: str, *work: Any) -> Any:
        try:
            self._pipe.send((kind, work))
            return self._pipe.recv()
        except (EOFError, OSError) as error:
            raise Unavailable(
                "the other process of the benchmark has ended: see what it wrote to stderr"
            ) from error


def _main(
    pipe: Connection, layout: KvLayout, num_blocks: int, transports: tuple[str, ...], device: str
) -> None:
    follow_parent()
    torch.set_num_threads(1)
    load_kernel()
    uvloop.run(_serve(pipe, KvStorage(layout, num_blocks, device), transports))


async def _serve(pipe: Connection, storage: KvStorage, transports: tuple[str, ...]) -> None:
    """Until the other end of the pipe is closed."""
    fill(storage)
    exporters = {
        exporter.transport: exporter for exporter in make_exporters(storage, transports, timeout_s=TIMEOUT_S)
    }
    for exporter in exporters.values():
        await exporter.start()
    answers = _Answers(storage, exporters)
    while True:
        try:
            kind, work = await asyncio.to_thread(pipe.recv)
        except EOFError:
            break
        pipe.send(await answers.to(kind, *work))
        await answers.settle()
    for exporter in exporters.values():
        await exporter.close()
    storage.close()


class _Answers:
    """What P does when it is asked."""

    def __init__(self, storage: KvStorage, exporters: dict[str, Exporter]) -> None:
        self._storage = storage
        self._exporters = exporters
        self._serving: asyncio.Future[Any] | None = None
        self._gloo: list[asyncio.Future[None]] = []
        self._nixl: NixlPool | None = None

    async def to(self, kind: str, *work: Any) -> Any:
        """Begin it; the answer for the other side."""
        match kind:
            case "offers":
                return tuple(exporter.offer() for exporter in self._exporters.values())
            case "serve":
                transport, grant = work
                self._serving = asyncio.ensure_future(self._exporters[transport].serve(grant))
                await asyncio.sleep(0)
            case "gloo":
                from pdserve.bench.gloo_pair import answer

                self._gloo.append(asyncio.ensure_future(asyncio.to_thread(answer, *work)))
            case "nixl":
                return self._join_nixl(*work)
        return None

    async def settle(self) -> None:
        """End what was begun for one answer."""
        if self._serving is not None:
            await self._serving
            self._serving = None

    def _join_nixl(self, reader: NixlPeer) -> NixlPeer | str:
        try:
            self._nixl = NixlPool("P", self._storage.bytes_view)
            self._nixl.know(reader)
        except Unavailable as error:
            return error.message
        return self._nixl.peer
