"""How fast KV blocks move from one process to another, beside what this machine's memory can do.

For each size: plain copies within this process (the ceiling, see bench/plain_copy.py), peers (gloo with
contiguous buffers, NIXL with scattered blocks), and each transport's `fetch` of scattered blocks, without and
with a digest over what landed. They take turns, round by round, so that what disturbs one disturbs all;
figures are medians over the rounds. All memory is touched before: a worker's pool is, after its first
minutes. `inproc` alone reads a pool of the same process, as it always does.
"""

import asyncio
import statistics
from collections.abc import Sequence

from pdserve.bench.figures import Figure, TransferReport
from pdserve.bench.transactions import measure_transactions
from pdserve.bench.transfer_source import TransferSource
from pdserve.bench.transfer_target import TransferTarget
from pdserve.kvtransfer.native import load_kernel
from pdserve.kvtransfer.pool.layout import KvLayout
from pdserve.kvtransfer.pool.storage import KvStorage
from pdserve.kvtransfer.transports.base import TRANSPORT_LADDER

LAYOUT = KvLayout(num_layers=8, num_kv_heads=2, head_dim=64, dtype="bfloat16")
"""64 KiB a block in segments of 2 KiB, so that the smallest size is one block."""
SIZES = tuple(size << 10 for size in (64, 256, 1024, 4096, 16384, 65536, 262144))
"""64 KB to 256 MB."""
_POOL_BYTES = 128 << 20
"""Of each pool, at least: more than caches hold."""
_WARM_UP_ROUNDS = 2


async def measure_transfers(
    sizes: Sequence[int] = SIZES,
    rounds: int = 15,
    *,
    layout: KvLayout = LAYOUT,
    transports: tuple[str, ...] = TRANSPORT_LADDER,
    device: str = "cpu",
) -> TransferReport:
    """Measure between pools on `device`. `sizes` are rounded up to whole blocks.

    Raises Unavailable where a transport fails, ConfigError where there is no such device.
    """
    counts = sorted({-(-size // layout.block_bytes) for size in sizes})
    num_blocks = max(2 * counts[-1], -(-_POOL_BYTES // layout.block_bytes))
    KvStorage(layout, 1, device).close()  # where there is no such device it says so, before processes start
    report = TransferReport(device, (await asyncio.to_thread(load_kernel)).name, rounds)
    between = tuple(name for name in transports if name != "inproc")
    with TransferSource(layout, num_blocks, between, device) as source:
        target = TransferTarget(layout, num_blocks, source, device)
        try:
            await target.start(transports)
            report.skipped.extend(target.skipped)
            for count in counts:
                await _take_turns(target, count, count * layout.block_bytes, report)
        finally:
            await target.close()
    connected = tuple(name for name in target.transports if name != "inproc")
    report.transactions.extend(await measure_transactions(layout, connected, counts[0], rounds, device))
    return report


async def _take_turns(target: TransferTarget, count: int, num_bytes: int, report: TransferReport) -> None:
    """All ways of moving `count` blocks, round by round."""
    with target.ways(count) as ways:
        times: list[list[float]] = [[] for _ in ways]
        for number in range(_WARM_UP_ROUNDS + report.rounds):
            for way, taken in zip(ways, times, strict=True):
                seconds = await way.move()
                if number >= _WARM_UP_ROUNDS:
                    taken.append(seconds)
    medians = [statistics.median(taken) for taken in times]
    ceiling = min(seconds for way, seconds in zip(ways, medians, strict=True) if way.group == "ceiling")
    for way, seconds in zip(ways, medians, strict=True):
        figures: list[Figure] = getattr(report, way.group)
        speed, ratio = num_bytes / seconds / 1e9, ceiling / seconds
        figures.append(Figure(way.name, num_bytes, way.digest, speed, seconds * 1e3, ratio))
