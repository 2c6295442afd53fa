"""Handoffs that end well: what arrives is what was computed, whatever the transport, length and cache."""

import asyncio
import dataclasses

import pytest
from handoff_rig import PATIENT, Rig, content

from pdserve.core.errors import InvalidRequest
from pdserve.core.lifecycle import Lifecycle
from pdserve.core.types import BLOCK_TOKENS, OwnerId, blocks_for, hit_limit
from pdserve.kvtransfer.handoff.consumer import Committed

TRANSPORTS = ("inproc", "shm", "tcp")


def prompt(length: int, first: int = 100) -> range:
    return range(first, first + length)


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("length", [2, 9, 16, 17, 18, 31, 32, 33, 34, 48, 49, 50, 70])
async def test_every_prompt_length_arrives_whole(transport: str, length: int) -> None:
    async with Rig(transport) as rig:
        ask = rig.ask(prompt(length))
        done = await rig.handoffs.fetch(ask, rig.peer())
        assert isinstance(done, Committed)
        assert (done.owner, done.num_computed, done.transport) == (ask.owner, length - 1, transport)
        assert done.blocks_moved == blocks_for(length - 1)
        assert done.blocks_reused == 0
        rig.assert_content(ask)
        assert rig.d.pool.match(ask.chain) == hit_limit(length)  # the last position's block stays private
        assert rig.d.pool.counts().held == blocks_for(length)
        await rig.at_rest()
        assert rig.p.pool.counts().cached == (length - 1) // BLOCK_TOKENS


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_d_fetches_only_what_it_does_not_hold(transport: str) -> None:
    async with Rig(transport) as rig:
        first, second = rig.ask(prompt(49)), rig.ask([*prompt(40), *prompt(30, 500)])
        assert isinstance(await rig.handoffs.fetch(first, rig.peer()), Committed)
        done = await rig.handoffs.fetch(second, rig.peer())
        assert isinstance(done, Committed)
        assert done.blocks_reused == 2
        assert done.blocks_moved == blocks_for(69) - 2
        rig.assert_content(second)
        shared = rig.d.pool.table(first.owner)[:2]
        assert rig.d.pool.table(second.owner)[:2] == shared


async def test_a_prompt_that_d_holds_but_for_its_tail_moves_the_tail_alone() -> None:
    async with Rig() as rig:
        tokens = prompt(40)
        for name in ("first", "second"):
            ask = rig.ask(tokens)
            done = await rig.handoffs.fetch(ask, rig.peer())
            assert isinstance(done, Committed)
            assert (done.blocks_moved, done.blocks_reused) == ((3, 0) if name == "first" else (1, 2))
            rig.assert_content(ask)


async def test_what_p_has_cached_is_served_without_computing_it() -> None:
    async with Rig() as rig:
        tokens = prompt(65)
        first = rig.ask(tokens)
        await rig.handoffs.fetch(first, rig.peer())
        rig.d.pool.release(first.owner)
        rig.d.pool.clear_cache()
        second = rig.ask(tokens)
        done = await rig.handoffs.fetch(second, rig.peer())
        assert isinstance(done, Committed)
        assert done.prefill_cached_tokens == 64
        rig.assert_content(second)


async def test_chunks_travel_while_p_still_computes() -> None:
    async with Rig() as rig:
        held: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        rig.filler.gate = lambda step: held if step == 1 else None
        ask = rig.ask(prompt(80))
        task = asyncio.create_task(rig.handoffs.fetch(ask, rig.peer()))
        assert (await rig.trail.wait(Lifecycle.CHUNK_LANDED))["seq"] == 0
        assert Lifecycle.PREFILL_ENDED not in rig.prefill_trail.names()
        held.set_result(None)
        assert isinstance(await task, Committed)
        rig.assert_content(ask)


async def test_nothing_is_reserved_before_the_first_chunk() -> None:
    async with Rig() as rig:
        held: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        rig.filler.gate = lambda step: held
        task = asyncio.create_task(rig.handoffs.fetch(rig.ask(prompt(80)), rig.peer()))
        await rig.prefill_trail.wait(Lifecycle.PREFILL_QUEUED)
        assert rig.d.pool.counts().free == rig.d.num_blocks
        held.set_result(None)
        assert isinstance(await task, Committed)


async def test_events_come_in_the_order_of_the_lifecycle() -> None:
    async with Rig() as rig:
        done = await rig.handoffs.fetch(rig.ask(prompt(30)), rig.peer())
        assert isinstance(done, Committed)
        names = rig.trail.names()
        assert names.index(Lifecycle.RESERVED) < names.index(Lifecycle.CHUNK_LANDED)
        assert names[-2:] == [Lifecycle.VERIFIED, Lifecycle.COMMITTED]
        assert rig.prefill_trail.names() == [
            Lifecycle.PREFILL_QUEUED,
            Lifecycle.PREFILL_STARTED,
            Lifecycle.CHUNK_READY,
            Lifecycle.PREFILL_ENDED,
        ]
        assert done.prefill_queue_s >= 0
        assert done.prefill_s >= 0
        assert done.filled_seen_at <= done.committed_at


async def test_without_digests_bytes_are_taken_as_they_come() -> None:
    async with Rig(config=dataclasses.replace(PATIENT, digest=False)) as rig:
        ask = rig.ask(prompt(70))
        assert isinstance(await rig.handoffs.fetch(ask, rig.peer()), Committed)
        rig.assert_content(ask)


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_handoffs_run_beside_each_other(transport: str) -> None:
    async with Rig(transport, decode_blocks=64, prefill_blocks=64) as rig:
        asks = [rig.ask(prompt(30 + 7 * i, 1000 * i)) for i in range(6)]
        results = await asyncio.gather(*(rig.handoffs.fetch(ask, rig.peer()) for ask in asks))
        assert all(isinstance(result, Committed) for result in results)
        for ask in asks:
            rig.assert_content(ask)
        assert rig.handoffs.counters["handoffs_committed"] == 6


async def test_a_share_of_the_pool_is_lent_one_prompt_after_the_other() -> None:
    async with Rig(prefill_blocks=16, decode_blocks=64) as rig:  # 8 blocks may wait to be fetched
        asks = [rig.ask(prompt(80, 1000 * i)) for i in range(3)]  # 5 blocks each
        lent: list[int] = []
        rig.prefill_trail.hooks[Lifecycle.PREFILL_STARTED] = lambda facts: lent.append(
            rig.p.pool.counts().held
        )
        results = await asyncio.gather(*(rig.handoffs.fetch(ask, rig.peer()) for ask in asks))
        assert all(isinstance(result, Committed) for result in results)
        assert len(lent) == 3
        assert max(lent) == 5


async def test_a_full_pool_at_d_delays_the_handoff_until_memory_is_free() -> None:
    async with Rig(decode_blocks=8) as rig:
        squatter = OwnerId("squatter")
        assert rig.d.pool.allocate(squatter, 6) is not None
        ask = rig.ask(prompt(64))
        task = asyncio.create_task(rig.handoffs.fetch(ask, rig.peer()))
        await rig.trail.wait(Lifecycle.FILLED_SEEN)
        assert rig.d.pool.counts().reserved == 0
        rig.d.pool.release(squatter)
        assert isinstance(await task, Committed)
        rig.assert_content(ask)


async def test_nobody_overtakes_who_waits_for_memory() -> None:
    async with Rig(decode_blocks=8, prefill_blocks=64) as rig:
        squatter = OwnerId("squatter")
        assert rig.d.pool.allocate(squatter, 6) is not None
        large, small = rig.ask(prompt(80)), rig.ask(prompt(20, 900))
        first = asyncio.create_task(rig.handoffs.fetch(large, rig.peer()))
        await rig.trail.wait(Lifecycle.FILLED_SEEN)
        rig.trail.events.clear()
        second = asyncio.create_task(rig.handoffs.fetch(small, rig.peer()))
        await rig.trail.wait(Lifecycle.FILLED_SEEN)
        assert rig.d.pool.counts().reserved == 0  # 2 blocks are free, and the small one would fit
        rig.d.pool.release(squatter)
        assert isinstance(await first, Committed)
        assert isinstance(await second, Committed)


async def test_relieve_is_told_what_somebody_waits_for() -> None:
    async with Rig(decode_blocks=8) as rig:
        squatter = OwnerId("squatter")
        rig.relieve = lambda blocks: rig.d.pool.release(squatter) if blocks == 4 else None
        assert rig.d.pool.allocate(squatter, 6) is not None
        ask = rig.ask(prompt(64))
        assert isinstance(await rig.handoffs.fetch(ask, rig.peer()), Committed)
        rig.assert_content(ask)


async def test_waiting_for_memory_is_no_busy_loop() -> None:
    """A failed try gives its prefix back, and that is not news."""
    # No heartbeat: each lets who waits try again.
    async with Rig(decode_blocks=8, config=dataclasses.replace(PATIENT, heartbeat_s=15.0)) as rig:
        first = rig.ask(prompt(40))
        assert isinstance(await rig.handoffs.fetch(first, rig.peer()), Committed)
        rig.d.pool.release(first.owner)  # its two full blocks are cached now
        squatter = OwnerId("squatter")
        assert rig.d.pool.allocate(squatter, 5) is not None
        rig.trail.events.clear()
        task = asyncio.create_task(rig.handoffs.fetch(rig.ask(prompt(80)), rig.peer()))
        await rig.trail.wait(Lifecycle.FILLED_SEEN)
        for _ in range(100):
            await asyncio.sleep(0)
        assert rig.handoffs.counters["reservations_refused"] == 1
        rig.d.pool.release(squatter)
        done = await task
        assert isinstance(done, Committed)
        assert done.blocks_reused == 2


async def test_one_token_is_nothing_to_hand_off() -> None:
    async with Rig() as rig:
        with pytest.raises(InvalidRequest, match="1 tokens"):
            await rig.handoffs.fetch(rig.ask([7]), rig.peer())


async def test_transfers_are_reported_with_their_transport() -> None:
    async with Rig("tcp") as rig:
        done = await rig.handoffs.fetch(rig.ask(prompt(70)), rig.peer())
        assert isinstance(done, Committed)
        assert sum(num_bytes for num_bytes, _, _ in rig.transfers) == done.bytes_moved
        assert {transport for _, _, transport in rig.transfers} == {"tcp"}


async def test_known_content_depends_on_every_token() -> None:
    """The oracle of these tests can tell blocks apart."""
    one, other = content(1, prompt(40)), content(1, [*prompt(20), 7, *prompt(19, 300)])
    assert (one != other).any()
