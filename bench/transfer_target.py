"""D's side of the transfer benchmark: the pool that is written, and every way of writing it."""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch.distributed import is_gloo_available

from pdserve.bench.figures import Skipped
from pdserve.bench.nixl_pair import NixlPool
from pdserve.bench.plain_copy import plain_copies
from pdserve.bench.transfer_source import GENERATION, TIMEOUT_S, TransferSource, fill
from pdserve.core.errors import Unavailable
from pdserve.core.types import BLOCK_TOKENS, BlockId, HandoffId
from pdserve.kvtransfer.digest import digest_blocks
from pdserve.kvtransfer.pool.layout import KvLayout
from pdserve.kvtransfer.pool.storage import KvStorage
from pdserve.kvtransfer.transports.base import TRANSPORT_LADDER, Exporter, Failed, Grant, Importer, Segment
from pdserve.kvtransfer.transports.ladder import make_exporters, make_importer

Move = Callable[[], Awaitable[float]]
"""Move once; the seconds that it took."""


class Way(NamedTuple):
    """One way of moving so many blocks."""

    group: str
    """Where its figure belongs: ceiling, peers or results."""
    name: str
    digest: bool
    move: Move


class TransferTarget:
    """Ready after `start`. `skipped` says why what is not among the ways is not."""

    def __init__(self, layout: KvLayout, num_blocks: int, source: TransferSource, device: str) -> None:
        self._layout = layout
        self._source = source
        self._storage = KvStorage(layout, num_blocks, device)
        self._twin = KvStorage(layout, num_blocks, device)
        """In this process and with P's bytes: what inproc reads, plain copies copy, and landed blocks are
        compared with."""
        fill(self._twin)
        self._chance = random.Random(0)
        self._copies = plain_copies(self._twin, self._storage, self._chance)
        self._importers: dict[str, Importer] = {}
        self._inproc: Exporter | None = None
        self._nixl: NixlPool | None = None
        self._seq = 0
        self._owned = AsyncExitStack()
        self.skipped: list[Skipped] = []

    async def start(self, transports: tuple[str, ...]) -> None:
        """Connect, and have every page of all pools mapped before anything is timed."""
        self._owned.callback(self._twin.close)
        self._owned.callback(self._storage.close)
        offers = list(self._source.offers)
        for exporter in make_exporters(self._twin, ("inproc",) if "inproc" in transports else ()):
            await exporter.start()
            self._owned.push_async_callback(exporter.close)
            offers.append(exporter.offer())
            self._inproc = exporter
        for offer in offers:
            importer = make_importer(offer, self._storage, timeout_s=TIMEOUT_S)
            self._importers[offer.transport] = importer
            self._owned.push_async_callback(importer.close)
        for name in self._importers:
            await self._fetch(name, self._storage.num_blocks, False)
        self._skip(transports)
        self._join_nixl()

    @property
    def transports(self) -> tuple[str, ...]:
        """Those that are measured, best first."""
        return tuple(name for name in TRANSPORT_LADDER if name in self._importers)

    async def close(self) -> None:
        await self._owned.aclose()

    @contextmanager
    def ways(self, count: int) -> Iterator[list[Way]]:
        """All ways of moving `count` blocks."""
        with self._gloo(count * self._layout.block_bytes) as gloo:
            ways = [
                Way("ceiling", name, False, partial(_at_once, copy, count)) for name, copy in self._copies
            ]
            ways += gloo
            if self._nixl is not None:
                ways.append(Way("peers", "nixl", False, partial(_at_once, self._read_nixl, count)))
            for name in self.transports:
                for digest in (False, True):
                    ways.append(Way("results", name, digest, partial(self._fetch, name, count, digest)))
            yield ways

    async def _fetch(self, transport: str, count: int, digest: bool) -> float:
        """One grant. P knows of it before the clock starts; what landed is compared after it stopped."""
        sources, places = self._blocks(count), self._blocks(count)
        segments = (
            Segment(source, GENERATION, place, BLOCK_TOKENS)
            for source, place in zip(sources, places, strict=True)
        )
        self._seq += 1
        grant = Grant(HandoffId("bench"), 0, self._seq, tuple(segments), digest)
        if transport != "inproc":
            self._source.serve(transport, grant)
        elif self._inproc is not None:
            await self._inproc.serve(grant)
        began = time.perf_counter()
        landed = await self._importers[transport].fetch(grant)
        if isinstance(landed, Failed):
            raise Unavailable(f"{transport} failed in the benchmark: {landed.reason}")
        if digest and landed.digests is None:
            await asyncio.to_thread(self._digest, places)
        taken = time.perf_counter() - began
        self._compare(sources[-1], places[-1])
        return taken

    def _digest(self, places: Sequence[BlockId]) -> None:
        """As a handoff does where the transport has no digests."""
        valid = [BLOCK_TOKENS] * len(places)
        digest_blocks(*self._storage.readable(places), self._layout, valid)

    def _read_nixl(self, count: int) -> float:
        if self._nixl is None:
            raise RuntimeError("join NIXL first")
        sources, places = self._blocks(count), self._blocks(count)
        taken = self._nixl.read(sources, places)
        self._compare(sources[-1], places[-1])
        return taken

    def _blocks(self, count: int) -> list[BlockId]:
        """So many blocks of a pool, scattered."""
        return [BlockId(block) for block in self._chance.sample(range(self._storage.num_blocks), count)]

    def _compare(self, source: BlockId, place: BlockId) -> None:
        if not np.array_equal(self._storage.read_blocks([place]), self._twin.read_blocks([source])):
            raise Unavailable(f"block {source} did not land in {place}: these figures would mean nothing")

    @contextmanager
    def _gloo(self, num_bytes: int) -> Iterator[list[Way]]:
        """gloo between the same two processes; nothing where torch has none, or for a GPU's memory."""
        if not (is_gloo_available() and self._storage.on_host):
            yield []
            return
        from pdserve.bench.gloo_pair import GlooAsker

        asker = GlooAsker(num_bytes)
        self._source.join_gloo(asker.port, num_bytes)
        asker.meet()
        yield [Way("peers", "gloo", False, asker.move)]
        asker.end()  # after an error the process is ended anyway

    def _join_nixl(self) -> None:
        if not self._storage.on_host:
            self.skipped += [
                Skipped(name, "it is measured between host memories") for name in ("gloo", "nixl")
            ]
            return
        try:
            pool = NixlPool("D", self._storage.bytes_view)
            pool.connect(self._source.join_nixl(pool.peer))
        except Unavailable as error:
            self.skipped.append(Skipped("nixl", error.message))
            return
        self._nixl = pool

    def _skip(self, transports: tuple[str, ...]) -> None:
        missing = [name for name in transports if name not in self._importers]
        self.skipped += [Skipped(name, self._why_missing(name)) for name in missing]
        if not is_gloo_available():
            self.skipped.append(Skipped("gloo", "this torch has no gloo"))

    def _why_missing(self, transport: str) -> str:
        if not self._storage.on_host:
            return f"it does not serve pools on {self._storage.device}"
        if torch.cuda.is_available():
            return "it needs pools on the NVIDIA GPU: measure with --device cuda"
        return "it needs an NVIDIA GPU: this machine has none"


async def _at_once(work: Callable[[int], float], count: int) -> float:
    """For what blocks: no thread in between is counted."""
    return work(count)
