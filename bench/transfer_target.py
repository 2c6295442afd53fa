"""D's side of the transfer benchmark: the pool that is written, and every way of writing it."""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, contextmanager
from functools import partial
from typing import NamedTuple

import numpy as np
from torch.distributed import is_gloo_available

from pdserve.bench.figures import Skipped
from pdserve.bench.nixl_pair import NixlPool
from pdserve.bench.plain_copy import PlainCopies
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
    """Made by `start`. `skipped` says of what is not among the ways why."""

    def __init__(self, layout: KvLayout, num_blocks: int, source: TransferSource) -> None:
        self._layout = layout
        self._source = source
        self._storage = KvStorage(layout, num_blocks)
        self._twin = KvStorage(layout, num_blocks)
        """In this process and with P's bytes: what inproc reads, plain copies copy, and landed blocks are
        compared with."""
        fill(self._twin)
        self._chance = random.Random(0)
        self._copies = PlainCopies(self._twin.bytes_view, self._storage.bytes_view, self._chance)
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
                Way("ceiling", "memcpy", False, partial(self._copies.memcpy, count)),
                Way("ceiling", "streaming", False, partial(self._copies.streaming, count)),
                *gloo,
            ]
            if self._nixl is not None:
                ways.append(Way("peers", "nixl", False, partial(self._read_nixl, self._nixl, count)))
            for name in self.transports:
                for digest in (False, True):
                    ways.append(Way("results", name, digest, partial(self._fetch, name, count, digest)))
            yield ways

    async def _fetch(self, transport: str, count: int, digest: bool) -> float:
        """One grant. P knows of it before the clock starts; what landed is compared after it stopped."""
        sources, places = self._blocks(count), self._blocks(count)
        segments = (
            Segment(BlockId(source), GENERATION, BlockId(place), BLOCK_TOKENS)
            for source, place in zip(sources, places, strict=True)
        )
        self._seq += 1
        grant = Grant(HandoffId("bench"), 0, self._seq, tuple(segments), digest)
        if transport != "inproc":
            self._source.serve(transport, grant)
        elif self._inproc is not None:
            await self._inproc.serve(grant)
        blocks = self._storage.bytes_view
        began = time.perf_counter()
        landed = await self._importers[transport].fetch(grant)
        if isinstance(landed, Failed):
            raise Unavailable(f"{transport} failed in the benchmark: {landed.reason}")
        if digest and landed.digests is None:
            await asyncio.to_thread(digest_blocks, blocks, places, self._layout, [BLOCK_TOKENS] * count)
        taken = time.perf_counter() - began
        self._compare(sources[-1], places[-1])
        return taken

    async def _read_nixl(self, pool: NixlPool, count: int) -> float:
        sources, places = self._blocks(count), self._blocks(count)
        taken = pool.read(sources, places)
        self._compare(sources[-1], places[-1])
        return taken

    def _blocks(self, count: int) -> list[int]:
        """So many blocks of a pool, scattered."""
        return self._chance.sample(range(self._storage.num_blocks), count)

    def _compare(self, source: int, place: int) -> None:
        if not np.array_equal(self._storage.bytes_view[place], self._twin.bytes_view[source]):
            raise Unavailable(f"block {source} did not land in {place}: these figures would mean nothing")

    @contextmanager
    def _gloo(self, num_bytes: int) -> Iterator[list[Way]]:
        """gloo between the same two processes; nothing where torch has none."""
        if not is_gloo_available():
            yield []
            return
        from pdserve.bench.gloo_pair import GlooAsker

        asker = GlooAsker(num_bytes)
        self._source.join_gloo(asker.port, num_bytes)
        asker.meet()
        yield [Way("peers", "gloo", False, asker.move)]
        asker.end()  # after an error the process is ended anyway

    def _join_nixl(self) -> None:
        try:
            pool = NixlPool("D", self._storage.bytes_view)
            pool.connect(self._source.join_nixl(pool.peer))
        except Unavailable as error:
            self.skipped.append(Skipped("nixl", error.message))
            return
        self._nixl = pool

    def _skip(self, transports: tuple[str, ...]) -> None:
        missing = [name for name in transports if name not in self._importers]
        self.skipped += [Skipped(name, "it needs an NVIDIA GPU: this machine has none") for name in missing]
        if not is_gloo_available():
            self.skipped.append(Skipped("gloo", "this torch has no gloo"))
