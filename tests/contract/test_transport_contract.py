"""What every transport owes, run on each: both halves in one process, and P's in a real child process."""

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import numpy as np
import pytest
from transport_rig import (
    DESTINATION_BLOCKS,
    HANDOFF,
    ON_GPU,
    SHORT_S,
    SOURCE_BLOCKS,
    TIMEOUT_S,
    Pair,
    Remote,
    Source,
    content,
    meet,
    why_not_here,
)

from pdserve.core.types import BlockId, HandoffId, OwnerId
from pdserve.kvtransfer.transports.base import TRANSPORT_LADDER, Failed, Grant, Landed, Segment, SourceDone
from pdserve.kvtransfer.transports.tcp.stream import PlainStream

WAYS = ("inproc", "cuda_ipc", "cuda_ipc+host", "nccl", "nccl+host", "shm", "tcp", "tcp+tls")
"""Rungs, and what they run on: "+tls" with certificates, "+host" on a stand-in for a GPU."""
TWO_SIDED = frozenset({"nccl", "tcp"})
WHY_NOT = {way: why_not_here(way) for way in WAYS}
HERE = tuple(way for way in WAYS if WHY_NOT[way] is None)
INSIDE = tuple(way for way in HERE if way not in ON_GPU)
"""P may be in the tests' own process; CUDA maps other processes' memory only."""
CHILD = tuple(way for way in HERE if way != "inproc")
"""P may be in another process."""
TWO_SIDED_INSIDE = [way for way in INSIDE if way in ("nccl+host", "tcp")]
TWO_SIDED_CHILD = [way for way in CHILD if way in ("nccl", "nccl+host", "tcp")]
MEETINGS = [(way, "inside") for way in INSIDE]
MEETINGS += [(way, "child") for way in CHILD if not way.endswith("+host")]
"""What a stand-in does between processes is seen where one is killed or stopped."""


@pytest.fixture(params=MEETINGS, ids=lambda meeting: "-".join(meeting))
def meeting(request: pytest.FixtureRequest) -> tuple[str, str]:
    """(way, place)"""
    return request.param  # type: ignore[no-any-return]


@pytest.fixture
async def pair(meeting: tuple[str, str]) -> AsyncIterator[Pair]:
    async with meet(*meeting, "float32", TIMEOUT_S) as met:
        yield met


def test_every_rung_of_the_ladder_is_in_this_suite() -> None:
    assert {way.partition("+")[0] for way in WAYS} == set(TRANSPORT_LADDER)


@pytest.mark.parametrize("way", WAYS)
def test_a_rung_that_is_not_run_here_says_why(way: str) -> None:
    if WHY_NOT[way] is not None:
        pytest.skip(f"{way} is not run: {WHY_NOT[way]}")
    assert way in INSIDE + CHILD


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
async def test_bytes_land_in_their_destinations_and_nowhere_else(
    meeting: tuple[str, str], dtype: str
) -> None:
    async with meet(*meeting, dtype, TIMEOUT_S) as pair:
        moves = {5: 0, 6: 1, 7: 2, 30: 9, 2: 23, 39: 4, 0: 22}
        fetched, served = await pair.carry_out(pair.grant(list(moves.values()), list(moves)))
        assert isinstance(fetched, Landed), fetched
        assert (fetched.handoff, fetched.epoch, fetched.seq) == (HANDOFF, 1, 0)
        assert fetched.num_bytes == len(moves) * pair.storage.layout.block_bytes
        assert fetched.seconds >= 0
        assert isinstance(served, SourceDone)
        pair.assert_exactly(moves)


async def test_chunks_of_one_handoff_follow_each_other_and_a_partial_block_is_among_them(pair: Pair) -> None:
    first = await pair.carry_out(pair.grant([3, 4], [10, 11], seq=0))
    last = await pair.carry_out(pair.grant([5], [12], seq=1, valid=7))
    assert [type(report) for report in (*first, *last)] == [Landed, SourceDone, Landed, SourceDone]
    layout = pair.storage.layout
    shape = (layout.segments_per_block, layout.segment_bytes)
    valid = slice(0, 7 * layout.token_bytes)
    blocks = pair.blocks()
    landed = blocks[12].reshape(shape)[:, valid]
    assert np.array_equal(landed, content(5, layout).reshape(shape)[:, valid])
    for destination, source in ((10, 3), (11, 4)):
        assert np.array_equal(blocks[destination], content(source, layout))


async def test_a_grant_without_segments_lands(pair: Pair) -> None:
    fetched, served = await pair.carry_out(pair.grant([], []))
    assert isinstance(fetched, Landed)
    assert fetched.num_bytes == 0
    assert isinstance(served, SourceDone)
    pair.assert_exactly({})


async def test_a_reused_source_block_fails_the_fetch(pair: Pair) -> None:
    grant = pair.grant([1, 2], [1, 2])
    await pair.source.call("reuse")
    fetched, _ = await pair.carry_out(grant)
    assert isinstance(fetched, Failed)
    assert "generation" in fetched.reason


async def test_one_stale_block_among_good_ones_fails_the_whole_grant(pair: Pair) -> None:
    grant = pair.grant(range(20), range(20))
    wrong = grant.segments[-1]._replace(generation=grant.segments[-1].generation - 1)
    fetched, _ = await pair.carry_out(Grant(HANDOFF, 1, 0, (*grant.segments[:-1], wrong)))
    assert isinstance(fetched, Failed)
    landed, _ = await pair.carry_out(pair.grant([7], [33], seq=1))
    assert isinstance(landed, Landed), "a failed grant must not spoil the next one"


@pytest.mark.parametrize("way", INSIDE)
async def test_a_source_block_reused_during_the_copy_fails_the_fetch(
    way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with meet(way, "inside", "float32", TIMEOUT_S) as pair:
        assert isinstance(pair.source, Source)
        pool = pair.source.pool
        copying, method = {
            "inproc": (pair.storage, "write_blocks"),
            "cuda_ipc": (pair.storage.blocks_on_gpu, "scatter"),
            "nccl": (pair.source.storage.blocks_on_gpu, "gather"),
            "shm": (pair.storage, "write_blocks"),
            "tcp": (PlainStream, "send_at_once"),
        }[pair.transport]
        copy = getattr(copying, method)

        def copy_while_reused(*arguments: Any) -> Any:
            copied = copy(*arguments)
            # A stream sends more than payloads, and says how much it was.
            if not isinstance(copied, int) or copied >= pair.storage.layout.block_bytes:
                pool.release(OwnerId("p"))
            return copied

        monkeypatch.setattr(copying, method, copy_while_reused)
        fetched, _ = await pair.carry_out(pair.grant([1], [1]))
        assert isinstance(fetched, Failed)
        assert "generation" in fetched.reason


@pytest.mark.parametrize("way", INSIDE)
@pytest.mark.parametrize(
    ("source", "destination"), [(SOURCE_BLOCKS, 0), (-1, 0), (0, DESTINATION_BLOCKS), (0, -1)]
)
async def test_blocks_outside_either_pool_are_refused(way: str, source: int, destination: int) -> None:
    async with meet(way, "inside", "float32", SHORT_S) as pair:
        segment = Segment(BlockId(source), 1, BlockId(destination), 16)
        fetched, _ = await pair.carry_out(Grant(HANDOFF, 1, 0, (segment,)))
        assert isinstance(fetched, Failed)
        pair.assert_exactly({})


async def test_concurrent_handoffs_do_not_mix(pair: Pair) -> None:
    grants = [
        pair.grant([n, n + 12], [3 * n, 3 * n + 1], handoff=HandoffId(f"h{n}"), epoch=n % 2, seq=n % 3)
        for n in range(12)
    ]
    serves = [pair.source.call("serve", grant) for grant in reversed(grants)]
    reports = await asyncio.gather(*(pair.importer.fetch(grant) for grant in grants), *serves)
    assert all(isinstance(report, Landed | SourceDone) for report in reports), reports
    pair.assert_exactly({3 * n + k: n + 12 * k for n in range(12) for k in range(2)})


async def test_a_closed_exporter_fails_every_later_fetch(pair: Pair) -> None:
    assert isinstance((await pair.carry_out(pair.grant([0], [0])))[0], Landed)
    await pair.source.call("close")
    fetched, served = await pair.carry_out(pair.grant([1], [1], seq=1))
    assert isinstance(fetched, Failed)
    assert isinstance(served, Failed)
    pair.assert_exactly({0: 0})


@pytest.mark.parametrize("way", INSIDE)
async def test_memory_that_was_given_back_is_never_trusted(way: str) -> None:
    async with meet(way, "inside", "float32", TIMEOUT_S) as pair:
        await pair.source.call("end")
        fetched = await pair.importer.fetch(pair.grant([1], [1]))
        assert isinstance(fetched, Failed)
        pair.assert_exactly({})


@pytest.mark.parametrize("way", CHILD)
async def test_a_killed_source_fails_later_fetches(way: str) -> None:
    async with meet(way, "child", "float32", TIMEOUT_S) as pair:
        assert isinstance(pair.source, Remote)
        assert isinstance((await pair.carry_out(pair.grant([0], [0])))[0], Landed)
        pair.source.signal(signal.SIGKILL)
        pair.source.process.join()
        fetched = await pair.importer.fetch(pair.grant([1], [1], seq=1))
        assert isinstance(fetched, Failed)
        pair.assert_exactly({0: 0})


async def test_after_close_every_fetch_fails(pair: Pair) -> None:
    await pair.importer.close()
    fetched = await pair.importer.fetch(pair.grant([1], [1]))
    assert isinstance(fetched, Failed)
    pair.assert_exactly({})


async def test_close_ends_outstanding_fetches(pair: Pair) -> None:
    fetches = [
        asyncio.ensure_future(pair.importer.fetch(pair.grant([n], [n], handoff=HandoffId(f"h{n}"))))
        for n in range(8)
    ]
    await asyncio.sleep(0)
    await pair.importer.close()
    reports = await asyncio.gather(*fetches)
    landed = [n for n, report in enumerate(reports) if isinstance(report, Landed)]
    assert all(isinstance(report, Landed | Failed) for report in reports)
    blocks = pair.blocks()
    for block in landed:
        assert np.array_equal(blocks[block], content(block, pair.storage.layout))
    if pair.transport in TWO_SIDED:
        assert not landed, "nobody served these grants"


async def test_a_cancelled_fetch_writes_nothing_afterwards(pair: Pair) -> None:
    grant = pair.grant(range(20), range(20))
    fetch = asyncio.ensure_future(pair.importer.fetch(grant))
    serve = asyncio.ensure_future(pair.source.call("serve", grant))
    await asyncio.sleep(0)
    fetch.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await fetch
    before = pair.blocks()
    other, _ = await pair.carry_out(pair.grant([23], [39], seq=1))
    assert isinstance(other, Landed), other
    await pair.source.call("forget", HANDOFF)
    assert isinstance(await serve, SourceDone | Failed)
    assert np.array_equal(pair.blocks()[:39], before[:39])


@pytest.mark.parametrize("way", TWO_SIDED_INSIDE)
async def test_a_claim_without_a_grant_gets_nothing(way: str) -> None:
    async with meet(way, "inside", "float32", SHORT_S) as pair:
        wrong, served = await asyncio.gather(
            pair.importer.fetch(pair.grant([1], [1], handoff=HandoffId("someone-else"))),
            pair.source.call("serve", pair.grant([1], [1])),
        )
        assert isinstance(wrong, Failed)
        assert isinstance(served, Failed)
        pair.assert_exactly({})


@pytest.mark.parametrize("way", TWO_SIDED_INSIDE)
async def test_a_claim_of_another_epoch_or_chunk_gets_nothing(way: str) -> None:
    async with meet(way, "inside", "float32", SHORT_S) as pair:
        reports = await asyncio.gather(
            pair.importer.fetch(pair.grant([1], [1], epoch=2)),
            pair.importer.fetch(pair.grant([1], [1], seq=1)),
            pair.source.call("serve", pair.grant([1], [1])),
        )
        assert all(isinstance(report, Failed) for report in reports)
        pair.assert_exactly({})


@pytest.mark.parametrize("way", TWO_SIDED_INSIDE)
async def test_closing_the_exporter_ends_serves_and_fetches_that_wait(way: str) -> None:
    async with meet(way, "inside", "float32", TIMEOUT_S) as pair:
        assert isinstance((await pair.carry_out(pair.grant([0], [0])))[0], Landed)
        serve = asyncio.ensure_future(pair.source.call("serve", pair.grant([1], [1], seq=1)))
        fetch = asyncio.ensure_future(pair.importer.fetch(pair.grant([2], [2], seq=2)))
        await asyncio.sleep(0)
        await pair.source.call("close")
        assert isinstance(await serve, Failed)
        assert isinstance(await fetch, Failed)
        pair.assert_exactly({0: 0})


@pytest.mark.parametrize("way", TWO_SIDED_INSIDE)
async def test_an_ended_handoff_fails_both_halves_at_once(way: str) -> None:
    async with meet(way, "inside", "float32", TIMEOUT_S) as pair:
        serve = asyncio.ensure_future(pair.source.call("serve", pair.grant([1], [1])))
        await asyncio.sleep(0)
        await pair.source.call("forget", HANDOFF)
        assert isinstance(await serve, Failed)


@pytest.mark.parametrize("way", TWO_SIDED_CHILD)
async def test_a_stopped_source_fails_the_fetch_within_its_deadline(
    way: str, leap: Callable[[float], Awaitable[None]]
) -> None:
    async with meet(way, "child", "float32", TIMEOUT_S) as pair:
        assert isinstance(pair.source, Remote)
        assert isinstance((await pair.carry_out(pair.grant([0], [0])))[0], Landed)
        pair.source.signal(signal.SIGSTOP)
        fetch = asyncio.ensure_future(pair.importer.fetch(pair.grant([1], [1], seq=1)))
        await asyncio.sleep(0)
        await leap(TIMEOUT_S)
        fetched = await fetch
        assert isinstance(fetched, Failed)
        assert f"{TIMEOUT_S} s" in fetched.reason


@pytest.mark.parametrize("way", TWO_SIDED_CHILD)
async def test_a_source_killed_while_it_owes_bytes_fails_the_fetch_at_once(way: str) -> None:
    async with meet(way, "child", "float32", TIMEOUT_S) as pair:
        assert isinstance(pair.source, Remote)
        assert isinstance((await pair.carry_out(pair.grant([0], [0])))[0], Landed)
        fetches = [
            asyncio.ensure_future(pair.importer.fetch(pair.grant([1], [1], seq=seq))) for seq in range(1, 4)
        ]
        await asyncio.sleep(0)
        pair.source.signal(signal.SIGKILL)
        reports = await asyncio.gather(*fetches)
        assert all(isinstance(report, Failed) and "lost" in report.reason for report in reports), reports
        pair.assert_exactly({0: 0})
