"""SIGKILL of either side while blocks of megabytes move, between processes that share one GPU.

On the stand-in it is a long run of every machine, so what a GPU is given is known to work but for the GPU.
"""

import asyncio
import itertools
import multiprocessing
import os
import signal
from collections.abc import Callable, Coroutine
from multiprocessing.connection import Connection
from typing import Any

import pytest
from transport_rig import (
    DESTINATION_BLOCKS,
    HANDOFF,
    Pair,
    Remote,
    make_storage,
    meet,
    why_not_here,
)

from pdserve.core.types import BlockId
from pdserve.kvtransfer.pool.layout import KvLayout
from pdserve.kvtransfer.transports.base import Failed, Grant, Landed, Offer, Segment, SourceDone
from pdserve.kvtransfer.transports.ladder import make_importer

WAYS = (
    "cuda_ipc",
    pytest.param("cuda_ipc+host", marks=pytest.mark.full),
    "nccl",
    pytest.param("nccl+host", marks=pytest.mark.full),
)
COUNT = 20
WAIT_S = 6.0
"""Bound of a fetch and a serve: who was killed before its claim costs P so long."""
DELAYS_S = (0.0, 0.002, 0.01)
"""From the start of a fetch to the kill: somewhere in the middle."""


def layout_of(way: str) -> KvLayout:
    """Blocks of 8 MB on a GPU, so that a fetch of 20 takes a while there; small ones on the stand-in."""
    layers = 2 if way.endswith("+host") else 64
    return KvLayout(num_layers=layers, num_kv_heads=8, head_dim=256, dtype="bfloat16")


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> str:
    if (reason := why_not_here(request.param)) is not None:
        pytest.skip(f"{request.param} is not run: {reason}")
    return str(request.param)


def run(scenario: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Without a plugin: a machine with a GPU may have bare pytest."""
    asyncio.run(asyncio.wait_for(scenario(), 110))


def test_a_source_killed_in_mid_transfer_fails_its_fetches_and_d_goes_on(way: str) -> None:
    async def scenario() -> None:
        for delay in DELAYS_S:
            async with meet(way, "child", "bfloat16", WAIT_S, layout_of(way)) as pair:
                assert isinstance(pair.source, Remote)
                first, _ = await pair.carry_out(pair.grant(range(COUNT), range(COUNT)))
                assert isinstance(first, Landed), first
                before = pair.blocks()
                fetch = asyncio.ensure_future(keep_fetching(pair))
                await asyncio.sleep(delay)
                pair.source.signal(signal.SIGKILL)
                failed = await fetch
                assert isinstance(failed, Failed), failed
                assert (pair.blocks()[COUNT + 4 :] == before[COUNT + 4 :]).all()
            await a_new_pair_works(way)

    run(scenario)


async def keep_fetching(pair: Pair) -> Failed:
    """Until a fetch fails."""
    for seq in itertools.count(1):
        grant = pair.grant(range(COUNT), range(4, COUNT + 4), seq=seq)
        serve = asyncio.ensure_future(pair.source.call("serve", grant))
        report = await pair.importer.fetch(grant)
        await asyncio.wait({serve})  # ends with P at the latest
        if isinstance(report, Failed):
            return report
    raise AssertionError


async def a_new_pair_works(way: str) -> None:
    async with meet(way, "child", "bfloat16", WAIT_S) as pair:
        fetched, _ = await pair.carry_out(pair.grant([3, 1], [0, 7]))
        assert isinstance(fetched, Landed), fetched
        pair.assert_exactly({0: 3, 7: 1})


def reader_main(pipe: Connection, way: str, layout: KvLayout, offer: Offer, generations: list[int]) -> None:
    """D in a process of its own: fetches the same blocks over and over, tells of each grant and report."""

    async def fetch_for_ever() -> None:
        storage = make_storage(way, layout, DESTINATION_BLOCKS)
        importer = make_importer(offer, storage, timeout_s=WAIT_S)
        for seq in itertools.count(1000):
            segments = (Segment(BlockId(n), generations[n], BlockId(n), 16) for n in range(COUNT))
            grant = Grant(HANDOFF, 1, seq, tuple(segments))
            pipe.send(grant)
            pipe.send(await importer.fetch(grant))

    asyncio.run(fetch_for_ever())


def test_a_reader_killed_in_mid_transfer_leaves_p_serving_the_others(way: str) -> None:
    async def scenario() -> None:
        async with meet(way, "child", "bfloat16", WAIT_S, layout_of(way)) as pair:
            for seq, delay in enumerate(DELAYS_S):
                await kill_a_reader(pair, way, delay)
                fetched, served = await pair.carry_out(pair.grant(range(COUNT), range(COUNT), seq=seq))
                assert isinstance(fetched, Landed), fetched
                assert isinstance(served, SourceDone), served
                pair.assert_exactly({n: n for n in range(COUNT)})

    run(scenario)


async def kill_a_reader(pair: Pair, way: str, delay: float) -> None:
    """In its second fetch; what P does for it ends."""
    context = multiprocessing.get_context("forkserver")
    ours, theirs = context.Pipe()
    layout = pair.storage.layout
    reader = context.Process(
        target=reader_main, args=(theirs, way, layout, pair.offer, pair.generations), daemon=True
    )
    reader.start()
    theirs.close()
    try:
        assert isinstance(await serve_next(pair, ours), Landed)
        grant = await asyncio.to_thread(ours.recv)
        serve = asyncio.ensure_future(pair.source.call("serve", grant))
        await asyncio.sleep(delay)
        assert reader.pid is not None
        os.kill(reader.pid, signal.SIGKILL)
        assert isinstance(await serve, SourceDone | Failed)
    finally:
        reader.kill()
        await asyncio.to_thread(reader.join)
        ours.close()


async def serve_next(pair: Pair, pipe: Connection) -> Landed | Failed:
    grant = await asyncio.to_thread(pipe.recv)
    assert isinstance(await pair.source.call("serve", grant), SourceDone)
    report = await asyncio.to_thread(pipe.recv)
    assert isinstance(report, Landed | Failed)
    return report
