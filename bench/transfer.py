"""How fast KV blocks move from one process to another, beside what this machine's memory can do.

For each size: one plain copy within this process (the ceiling), gloo with contiguous buffers (a peer), and
each transport's `fetch` of scattered blocks, without and with a digest over what landed. They take turns,
round by round, so that what disturbs one disturbs all; figures are medians over the rounds. All memory is
touched before: a worker's pool is, after its first minutes.
"""

import asyncio
import random
import statistics
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch.distributed import is_gloo_available

from pdserve.bench.transfer_source import GENERATION, TIMEOUT_S, TransferSource, fill
from pdserve.core.errors import Unavailable
from pdserve.core.types import BLOCK_TOKENS, BlockId, HandoffId
from pdserve.kvtransfer.digest import digest_blocks
from pdserve.kvtransfer.native import load_kernel
from pdserve.kvtransfer.pool.layout import KvLayout
from pdserve.kvtransfer.pool.storage import KvStorage
from pdserve.kvtransfer.transports.base import TRANSPORT_LADDER, Failed, Grant, Importer, Offer, Segment
from pdserve.kvtransfer.transports.ladder import make_importer

LAYOUT = KvLayout(num_layers=8, num_kv_heads=2, head_dim=64, dtype="bfloat16")
"""64 KiB a block in segments of 2 KiB, so that the smallest size is one block."""
SIZES = (64 << 10, 1 << 20, 4 << 20, 16 << 20, 64 << 20)
_POOL_BYTES = 128 << 20
"""Of each pool, at least: more than caches hold."""
_WARM_UP_ROUNDS = 2


class Figure(NamedTuple):
    """One way of moving `bytes`, without or with a digest: medians."""

    transport: str
    bytes: int
    digest: bool
    gb_per_s: float
    p50_ms: float
    ratio_to_ceiling: float


class Skipped(NamedTuple):
    """What was not measured, and why."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class TransferReport:
    """All figures of one run. `ceiling` and `peers` have no digest."""

    kernel: str
    rounds: int
    ceiling: list[Figure] = field(default_factory=list)
    results: list[Figure] = field(default_factory=list)
    peers: list[Figure] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)

    def to_dict(self) -> dict[str, object]:
        """As plain values, for JSON."""
        groups = ("ceiling", "results", "peers", "skipped")
        return {"kernel": self.kernel, "rounds": self.rounds} | {
            group: [entry._asdict() for entry in getattr(self, group)] for group in groups
        }


class _Way(NamedTuple):
    name: str
    digest: bool
    move: Callable[[], Awaitable[float]]
    """Move once; the seconds that it took."""


async def measure_transfers(
    sizes: Sequence[int] = SIZES,
    rounds: int = 15,
    *,
    layout: KvLayout = LAYOUT,
    transports: Sequence[str] = TRANSPORT_LADDER,
) -> TransferReport:
    """Measure. `sizes` are rounded up to whole blocks. Raises Unavailable where a transport fails."""
    counts = sorted({-(-size // layout.block_bytes) for size in sizes})
    num_blocks = max(2 * counts[-1], -(-_POOL_BYTES // layout.block_bytes))
    report = TransferReport((await asyncio.to_thread(load_kernel)).name, rounds)
    between = tuple(name for name in transports if name != "inproc")
    if "inproc" in transports:
        report.skipped.append(Skipped("inproc", "it serves workers of one process; this is about two"))
    if not is_gloo_available():
        report.skipped.append(Skipped("gloo", "this torch has no gloo"))
    with TransferSource(layout, num_blocks, between) as source:
        target = _Target(layout, num_blocks, source)
        try:
            await target.touch()
            for count in counts:
                await target.measure(count, report)
        finally:
            await target.close()
    return report


class _Target:
    """D's side: the pool that is written, an importer for each transport, and what P's pool holds."""

    def __init__(self, layout: KvLayout, num_blocks: int, source: TransferSource) -> None:
        self._layout = layout
        self._source = source
        self._storage = KvStorage(layout, num_blocks)
        self._expected = np.empty((num_blocks, layout.block_bytes), np.uint8)
        fill(self._expected)
        self._importers = {offer.transport: self._importer(offer) for offer in source.offers}
        self._random = random.Random(0)
        self._seq = 0

    async def touch(self) -> None:
        """Have every page of both pools mapped, over every transport, before anything is timed."""
        for name in self._importers:
            await self._fetch(name, self._storage.num_blocks, False)

    async def measure(self, count: int, report: TransferReport) -> None:
        """All ways of moving `count` blocks, taking turns."""
        size = count * self._layout.block_bytes
        with _gloo_way(self._source, size) as peers:
            ways = [_Way("memcpy", False, lambda: self._copy(count)), *peers]
            for name in self._importers:
                for digest in (False, True):
                    ways.append(_Way(name, digest, self._fetching(name, count, digest)))
            times: list[list[float]] = [[] for _ in ways]
            for number in range(_WARM_UP_ROUNDS + report.rounds):
                for way, taken in zip(ways, times, strict=True):
                    seconds = await way.move()
                    if number >= _WARM_UP_ROUNDS:
                        taken.append(seconds)
        ceiling = statistics.median(times[0])
        for way, taken in zip(ways, times, strict=True):
            seconds = statistics.median(taken)
            figure = Figure(
                way.name, size, way.digest, size / seconds / 1e9, seconds * 1e3, ceiling / seconds
            )
            group = {"memcpy": report.ceiling, "gloo": report.peers}.get(way.name, report.results)
            group.append(figure)

    async def close(self) -> None:
        for importer in self._importers.values():
            await importer.close()
        self._storage.close()

    def _importer(self, offer: Offer) -> Importer:
        return make_importer(offer, self._storage, timeout_s=TIMEOUT_S)

    async def _copy(self, count: int) -> float:
        """The ceiling: as many bytes in one piece, cold as the blocks are."""
        total = self._storage.num_blocks
        start, end = self._random.randrange(total - count + 1), self._random.randrange(total - count + 1)
        source, target = self._expected[start : start + count], self._storage.bytes_view[end : end + count]
        began = time.perf_counter()
        np.copyto(target, source)
        return time.perf_counter() - began

    def _fetching(self, transport: str, count: int, digest: bool) -> Callable[[], Awaitable[float]]:
        return lambda: self._fetch(transport, count, digest)

    async def _fetch(self, transport: str, count: int, digest: bool) -> float:
        """One grant. P hears of it before the clock starts; what landed is compared after it stopped."""
        total = self._storage.num_blocks
        sources, places = self._random.sample(range(total), count), self._random.sample(range(total), count)
        segments = (
            Segment(BlockId(source), GENERATION, BlockId(place), BLOCK_TOKENS)
            for source, place in zip(sources, places, strict=True)
        )
        self._seq += 1
        grant = Grant(HandoffId("bench"), 0, self._seq, tuple(segments), digest)
        self._source.serve(transport, grant)
        blocks = self._storage.bytes_view
        began = time.perf_counter()
        landed = await self._importers[transport].fetch(grant)
        if isinstance(landed, Failed):
            raise Unavailable(f"{transport} failed in the benchmark: {landed.reason}")
        if digest and landed.digests is None:
            await asyncio.to_thread(digest_blocks, blocks, places, self._layout, [BLOCK_TOKENS] * count)
        taken = time.perf_counter() - began
        self._compare(blocks, sources[-1], places[-1])
        return taken

    def _compare(self, blocks: NDArray[np.uint8], source: int, place: int) -> None:
        if not np.array_equal(blocks[place], self._expected[source]):
            raise Unavailable(f"block {source} did not land in {place}: these figures would mean nothing")


@contextmanager
def _gloo_way(source: TransferSource, num_bytes: int) -> Iterator[list[_Way]]:
    """gloo between the same two processes; nothing where torch has none."""
    if not is_gloo_available():
        yield []
        return
    from pdserve.bench.gloo_pair import GlooAsker

    asker = GlooAsker(num_bytes)
    source.join_gloo(asker.port, num_bytes)
    asker.meet()
    yield [_Way("gloo", False, asker.move)]
    asker.end()  # after an error the process is ended anyway
