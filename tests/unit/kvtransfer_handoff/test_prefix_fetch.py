"""A prefix that another worker holds: fetched where that pays, computed where anything goes wrong."""

import asyncio
import dataclasses
from collections.abc import Awaitable, Callable

import pytest
from handoff_rig import PATIENT, QUICK, ROOT, HeldImporter, Wire, content
from prefix_rig import CHEAP, SLOW_WAY, Mate, mates

from pdserve.core.lifecycle import Lifecycle
from pdserve.core.types import BLOCK_TOKENS, HandoffId, OwnerId
from pdserve.kvtransfer.handoff.ask import FetchedPrefix
from pdserve.kvtransfer.handoff.consumer import Committed, NotServed
from pdserve.kvtransfer.handoff.states import Outcome
from pdserve.kvtransfer.names import chain

PROMPT = tuple(range(100, 170))
"""70 tokens: 4 full blocks that a hit may cover."""


def cut(importer: HeldImporter) -> None:
    importer.gate.clear()


@pytest.mark.parametrize("transport", ["inproc", "shm", "tcp"])
async def test_what_another_worker_holds_arrives_as_plain_cache(transport: str) -> None:
    holder, here = Mate("holder", transport=transport), Mate("here", transport=transport)
    async with mates(holder, here):
        holder.hold(PROMPT)
        fetched = await here.prefixes.fetch(here.prefix_ask(PROMPT, holder.holder(4)))
        assert fetched == FetchedPrefix(holder.peer().worker, 4)
        here.assert_held(PROMPT, 4)
        assert here.pool.counts().cached == 4
        assert here.prefixes.counters == {"asked": 1, "fetched": 1, "blocks": 4}
    assert holder.pool.counts().cached == 4
    assert not holder.filler.ended  # it computed nothing


async def test_blocks_that_are_here_already_do_not_move() -> None:
    holder, here = Mate("holder"), Mate("here")
    async with mates(holder, here):
        holder.hold(PROMPT)
        here.hold(PROMPT, 3)
        assert await here.prefixes.fetch(here.prefix_ask(PROMPT, holder.holder(4))) == FetchedPrefix(
            holder.peer().worker, 1
        )
        here.assert_held(PROMPT, 4)
        assert here.pool.counts().cached == 4


async def test_a_long_prefix_comes_in_chunks() -> None:
    prompt = tuple(range(1, 16 * 130 + 2))
    holder, here = Mate("holder", blocks=300), Mate("here", blocks=300)
    async with mates(holder, here):
        holder.hold(prompt)
        fetched = await here.prefixes.fetch(here.prefix_ask(prompt, holder.holder(130)))
        assert fetched == FetchedPrefix(holder.peer().worker, 130)
        here.assert_held(prompt, 130)
    assert here.trail.names().count(Lifecycle.CHUNK_LANDED) == 3


async def test_a_hint_counts_no_further_than_a_hit_may_cover() -> None:
    prompt = PROMPT[:64]
    holder, here = Mate("holder"), Mate("here")
    async with mates(holder, here):
        holder.hold(prompt)
        fetched = await here.prefixes.fetch(here.prefix_ask(prompt, holder.holder(4)))
        assert fetched == FetchedPrefix(holder.peer().worker, 3)


async def test_a_holder_of_less_is_asked_once_more_for_what_it_has() -> None:
    holder, here = Mate("holder"), Mate("here")
    async with mates(holder, here):
        holder.hold(PROMPT, 3)
        fetched = await here.prefixes.fetch(here.prefix_ask(PROMPT, holder.holder(4)))
        assert fetched == FetchedPrefix(holder.peer().worker, 3)
        here.assert_held(PROMPT, 3)
        assert here.prefixes.counters == {
            "asked": 1,
            "failed_rejected": 1,
            "asked_again": 1,
            "fetched": 1,
            "blocks": 3,
        }


@pytest.mark.parametrize("held", [0, 2], ids=["nothing", "no more than is here"])
async def test_a_holder_of_nothing_better_is_left_alone(held: int) -> None:
    holder, here = Mate("holder"), Mate("here")
    async with mates(holder, here):
        holder.hold(PROMPT, held)
        here.hold(PROMPT, 2)
        assert await here.prefixes.fetch(here.prefix_ask(PROMPT, holder.holder(4))) is None
        assert here.prefixes.counters == {"asked": 1, "failed_rejected": 1}
        here.assert_held(PROMPT, 2)


async def test_nobody_is_asked_for_what_is_not_better_or_too_dear() -> None:
    holder, here, quick = Mate("holder"), Mate("here"), Mate("quick", perf=CHEAP)
    async with mates(holder, here, quick):
        for worker in (holder, here):
            worker.hold(PROMPT)
        assert await here.prefixes.fetch(here.prefix_ask(PROMPT, holder.holder(4))) is None
        assert await here.prefixes.fetch(here.prefix_ask(PROMPT, None)) is None
        assert await holder.prefixes.fetch(holder.prefix_ask(PROMPT, holder.holder(9))) is None
        assert (here.prefixes.counters, holder.prefixes.counters) == ({}, {})
        assert await quick.prefixes.fetch(quick.prefix_ask(PROMPT, holder.holder(4))) is None
        assert quick.prefixes.counters == {"too_dear": 1}
    assert not holder.servicer.counters


def drains(holder: Mate) -> None:
    holder.draining = True


def restarts(holder: Mate) -> None:
    holder.incarnation = "holder-second"


def changes_schema(holder: Mate) -> None:
    holder.schema = b"\x02" * 16


def lends_its_share(holder: Mate) -> None:
    assert holder.servicer._site.queue.enter_now(HandoffId("another"), 13)


@pytest.mark.parametrize("excuse", [drains, restarts, changes_schema, lends_its_share])
async def test_a_holder_that_refuses_is_asked_once(excuse: Callable[[Mate], None]) -> None:
    holder, here = Mate("holder"), Mate("here")
    async with mates(holder, here):
        holder.hold(PROMPT)
        excuse(holder)
        assert await here.prefixes.fetch(here.prefix_ask(PROMPT, holder.holder(4))) is None
        assert here.prefixes.counters["asked"] == 1
        assert "asked_again" not in here.prefixes.counters
        assert len(holder.servicer._site.queue) == 0  # it did not stand in line
        holder.servicer._site.queue.leave(HandoffId("another"))
    assert here.pool.counts().free == here.side.num_blocks


async def test_without_room_nobody_waits_and_nobody_is_evicted_who_is_in_use() -> None:
    holder, here = Mate("holder"), Mate("here", blocks=8)
    async with mates(holder, here):
        holder.hold(PROMPT)
        busy = OwnerId("busy")
        here.pool.allocate(busy, 5)
        assert await here.prefixes.fetch(here.prefix_ask(PROMPT, holder.holder(4))) is None
        assert here.handoffs.counters["reservations_refused"] == 1
        assert here.pool.counts().held == 5
        here.pool.release(busy)


async def test_a_prefix_overtakes_nobody_who_waits_for_memory() -> None:
    holder, here = Mate("holder"), Mate("here", blocks=8)
    async with mates(holder, here):
        holder.hold(PROMPT)
        busy = OwnerId("busy")
        here.pool.allocate(busy, 4)
        older = here.ask([*PROMPT[:16], *range(500, 554)], None)
        waiting = asyncio.create_task(here.handoffs.fetch(older, holder.peer()))
        while not len(here.handoffs._site.reservations):  # until it stands in line for 5 blocks
            await asyncio.sleep(0.001)
        assert await here.prefixes.fetch(here.prefix_ask(PROMPT, holder.holder(4))) is None
        here.pool.release(busy)
        assert isinstance(await waiting, Committed)
        here.pool.release(older.owner)


async def test_what_preempted_sequences_wait_for_is_not_taken_not_even_to_pin_it() -> None:
    holder, here = Mate("holder"), Mate("here", blocks=8)
    async with mates(holder, here):
        holder.hold(PROMPT)
        here.hold(PROMPT, 3)
        for owed, fetched in ((5, None), (4, FetchedPrefix(holder.peer().worker, 1))):
            here.handoffs._site.reservations._preempted = lambda owed=owed: owed
            assert await here.prefixes.fetch(here.prefix_ask(PROMPT, holder.holder(4))) == fetched
        assert here.handoffs.counters["reservations_refused"] == 1


async def test_bytes_that_changed_at_the_holder_are_never_named_here() -> None:
    holder, here = Mate("holder"), Mate("here", perf=SLOW_WAY)
    async with mates(holder, here):
        holder.hold(PROMPT)
        here.prepare = cut
        task = asyncio.create_task(here.prefixes.fetch(here.prefix_ask(PROMPT, holder.holder(4))))
        await here.trail.wait(Lifecycle.RESERVED)
        await here.met.wait()
        await here.importers[0].entered.wait()
        (first,) = holder.pool.acquire_prefix(OwnerId("spoil"), chain(ROOT, PROMPT)[:1])
        holder.side.write(first, content(0, PROMPT) + 1)
        here.importers[0].gate.set()
        assert await task is None
        assert here.prefixes.counters == {"asked": 1, "failed_corrupt": 1}
        assert here.pool.match(chain(ROOT, PROMPT)) == 0
        holder.pool.release(OwnerId("spoil"))
    assert here.pool.counts().free == here.side.num_blocks


async def test_a_holder_lost_in_mid_fetch_leaves_nothing_behind() -> None:
    holder, here, wire = Mate("holder"), Mate("here", perf=SLOW_WAY), Wire()
    async with mates(holder, here):
        port = await wire.start(holder.port)
        holder.hold(PROMPT)
        here.prepare = cut
        asked = here.prefix_ask(PROMPT, holder.holder(4, port=port))
        task = asyncio.create_task(here.prefixes.fetch(asked))
        await here.met.wait()
        await here.importers[0].entered.wait()
        wire.cut()
        assert await task is None
        assert here.prefixes.counters == {"asked": 1, "failed_lost": 1}
        here.importers[0].gate.set()
        await here.handoffs.until_idle(20)
        await holder.servicer.until_idle(20)
        await wire.close()
    assert here.pool.counts().free == here.side.num_blocks
    assert holder.pool.counts().held == 0


async def test_a_holder_that_is_silent_is_given_up_within_the_fetchs_own_time(
    leap: Callable[[float], Awaitable[None]],
) -> None:
    """By its model the fetch takes a minute: the stream's watch, with its hours, is not waited for."""
    config = dataclasses.replace(PATIENT, silence_s=3600.0, request_deadline_s=7200.0)
    holder, here, wire = Mate("holder", config=config), Mate("here", config=config), Wire()
    async with mates(holder, here):
        port = await wire.start(holder.port)
        holder.hold(PROMPT)
        here.prepare = cut
        asked = here.prefix_ask(PROMPT, holder.holder(4, port=port))
        task = asyncio.create_task(here.prefixes.fetch(asked))
        await here.met.wait()
        await here.importers[0].entered.wait()
        wire.silence()
        here.importers[0].gate.set()
        await leap(100.0)
        assert await task is None
        assert here.prefixes.counters == {"asked": 1, "failed_deadline": 1}
        directly = here.prefix_ask(PROMPT, holder.holder(4))
        assert await here.prefixes.fetch(directly) is None, "it is left alone for a while"
        assert here.prefixes.counters == {"asked": 1, "failed_deadline": 1}
        await leap(10.0)
        assert await here.prefixes.fetch(directly) == FetchedPrefix(holder.peer().worker, 4)
        await wire.close()


async def test_prompts_that_come_together_move_what_they_share_once() -> None:
    """Each in blocks of its own, they would also evict what others have cached."""
    holder, here = Mate("holder"), Mate("here", blocks=8)
    async with mates(holder, here):
        holder.hold(PROMPT)
        other = tuple(range(900, 970))
        here.hold(other)
        here.prepare = cut
        prompts = [(*PROMPT[:64], *range(200 + n, 220 + n)) for n in range(64)]
        asks = [here.prefix_ask(prompt, holder.holder(4)) for prompt in prompts]
        tasks = [asyncio.create_task(here.prefixes.fetch(ask)) for ask in asks]
        await here.met.wait()
        await here.importers[0].entered.wait()
        here.importers[0].gate.set()
        fetched = await asyncio.gather(*tasks)
        assert fetched == [FetchedPrefix(holder.peer().worker, 4)] + [None] * 63
        assert here.prefixes.counters == {"asked": 1, "joined": 63, "fetched": 1, "blocks": 4}
        here.assert_held(PROMPT, 4)
        here.assert_held(other, 4)
    assert holder.servicer.counters["accepted"] == 1


async def test_when_the_prompt_that_fetches_is_cancelled_another_one_fetches() -> None:
    holder, here = Mate("holder"), Mate("here")
    async with mates(holder, here):
        holder.hold(PROMPT)
        here.prepare = cut
        ask = here.prefix_ask(PROMPT, holder.holder(4))
        first, *rest = [asyncio.create_task(here.prefixes.fetch(ask)) for _ in range(3)]
        await here.met.wait()
        await here.importers[0].entered.wait()
        rest[1].cancel()  # one that only joined takes nobody along
        first.cancel()
        here.importers[0].gate.set()
        assert await rest[0] == FetchedPrefix(holder.peer().worker, 4)
        await asyncio.wait({first, rest[1]})
        assert first.cancelled()
        assert rest[1].cancelled()
        assert here.prefixes.counters == {"asked": 2, "joined": 2, "fetched": 1, "blocks": 4}
        here.assert_held(PROMPT, 4)


STAGES = (Lifecycle.RESERVED, Lifecycle.CHUNK_LANDED, Lifecycle.VERIFIED, Lifecycle.COMMITTED)


@pytest.mark.parametrize("stage", [None, *STAGES])
async def test_a_cancel_at_any_moment_leaves_both_pools_balanced(stage: Lifecycle | None) -> None:
    holder, here = Mate("holder"), Mate("here", perf=SLOW_WAY)
    async with mates(holder, here):
        holder.hold(PROMPT)
        task = asyncio.create_task(here.prefixes.fetch(here.prefix_ask(PROMPT, holder.holder(4))))
        if stage is None:
            await asyncio.sleep(0)
            task.cancel()
        else:
            here.trail.hooks[stage] = lambda facts: task.cancel() and None
        with pytest.raises(asyncio.CancelledError):
            await task
        await here.handoffs.until_idle(20)
        await holder.servicer.until_idle(20)
        assert here.pool.counts().held == holder.pool.counts().held == 0
        assert here.pool.owners() == holder.pool.owners() == ()


async def test_the_model_learns_what_fetches_take_and_nothing_of_how_a_pair_met() -> None:
    holder, here = Mate("holder"), Mate("here")
    async with mates(holder, here):
        holder.hold(PROMPT)
        for learnt in (False, True):
            assert await here.prefixes.fetch(here.prefix_ask(PROMPT, holder.holder(4))) is not None
            assert ("handoff/shm/fixed_seconds" in here.perf.snapshot()) is learnt
            here.pool.clear_cache()


# On the way of a handoff: D asks P, which fetches from a holder before it computes.


async def test_p_fetches_what_d_says_somebody_holds_and_computes_the_rest() -> None:
    d, p, holder = Mate("d"), Mate("p"), Mate("holder")
    async with mates(d, p, holder):
        holder.hold(PROMPT)
        ask = d.ask(PROMPT, holder.holder(4))
        done = await d.handoffs.fetch(ask, p.peer())
        assert isinstance(done, Committed)
        assert done.prefix == FetchedPrefix(holder.peer().worker, 4)
        assert done.prefill_cached_tokens == 4 * BLOCK_TOKENS
        d.assert_content(ask)
        d.pool.release(ask.owner)
    assert p.pool.counts().held == holder.pool.counts().held == 0


async def test_the_reader_itself_may_be_the_holder() -> None:
    """Turn 2 of a chat: D has the answer's blocks and P has not. D takes only what it lacks."""
    d, p = Mate("d"), Mate("p")
    async with mates(d, p):
        d.hold(PROMPT, 3)
        p.hold(PROMPT, 1)
        ask = d.ask(PROMPT, d.holder(3))
        done = await d.handoffs.fetch(ask, p.peer())
        assert isinstance(done, Committed)
        assert done.prefix == FetchedPrefix(d.peer().worker, 2)
        assert (done.blocks_reused, done.blocks_moved) == (3, 2)
        d.assert_content(ask)
        d.pool.release(ask.owner)


async def test_when_the_holder_fails_p_computes_as_if_nobody_had_been_named() -> None:
    d, p, holder = Mate("d"), Mate("p"), Mate("holder")
    async with mates(d, p, holder):
        ask = d.ask(PROMPT, holder.holder(4))
        done = await d.handoffs.fetch(ask, p.peer())
        assert isinstance(done, Committed)
        assert (done.prefix, done.prefill_cached_tokens) == (None, 0)
        d.assert_content(ask)
        d.pool.release(ask.owner)


async def test_a_prefix_that_was_evicted_again_is_computed() -> None:
    d, p, holder = Mate("d"), Mate("p"), Mate("holder")
    async with mates(d, p, holder):
        holder.hold(PROMPT)
        p.trail.hooks[Lifecycle.COMMITTED] = lambda facts: asyncio.get_running_loop().call_soon(evict, p)
        ask = d.ask(PROMPT, holder.holder(4))
        done = await d.handoffs.fetch(ask, p.peer())
        assert isinstance(done, Committed)
        d.assert_content(ask)
        d.pool.release(ask.owner)


def evict(worker: Mate) -> None:
    worker.pool.clear_cache()


async def test_opened_is_not_held_up_by_the_fetch_and_d_does_not_suspect_p_meanwhile() -> None:
    """P's engine stands still: it has nothing to do yet."""
    d, p, holder = Mate("d", config=QUICK), Mate("p", perf=SLOW_WAY), Mate("holder")
    async with mates(d, p, holder):
        holder.hold(PROMPT)
        p.prepare, p.progress = cut, lambda: 7
        ask = d.ask(PROMPT, holder.holder(4))
        task = asyncio.create_task(d.handoffs.fetch(ask, p.peer()))
        await p.met.wait()
        await p.importers[0].entered.wait()
        (attempt,) = d.handoffs._attempts.values()
        assert attempt.machine.opened
        until = attempt.beats + 14  # 0.7 s: silence_s is 0.5 s
        while attempt.beats < until and not task.done():
            await asyncio.sleep(0.01)
        assert not task.done()
        p.importers[0].gate.set()
        assert isinstance(await task, Committed)
        assert "silent_peers" not in d.handoffs.counters
        d.pool.release(ask.owner)


async def test_the_estimate_is_of_the_fetch_and_the_rest() -> None:
    d, p, holder = Mate("d"), Mate("p", perf=SLOW_WAY), Mate("holder")
    async with mates(d, p, holder):
        holder.hold(PROMPT)
        plan = p.prefixes.plan(p.prefix_ask(PROMPT, holder.holder(4)))
        assert plan is not None
        p.prepare = cut
        task = asyncio.create_task(d.handoffs.fetch(d.ask(PROMPT, holder.holder(4)), p.peer()))
        await p.met.wait()
        (attempt,) = d.handoffs._attempts.values()
        assert attempt._heard.opened is not None
        rest = p.filler.estimate(5, 64).seconds  # 69 positions travel
        assert attempt._heard.opened.estimate_s == pytest.approx(plan.fetch_s + rest)
        task.cancel()
        await asyncio.wait({task})
        p.importers[0].gate.set()


@pytest.mark.parametrize("end", ["D leaves", "P is stopped", "the holder is stopped"])
async def test_whoever_leaves_in_mid_fetch_nothing_is_left(end: str) -> None:
    d, p, holder = Mate("d"), Mate("p", perf=SLOW_WAY), Mate("holder")
    async with mates(d, p, holder):
        holder.hold(PROMPT)
        p.prepare = cut
        ask = d.ask(PROMPT, holder.holder(4))
        task = asyncio.create_task(d.handoffs.fetch(ask, p.peer()))
        await p.met.wait()
        await p.importers[0].entered.wait()
        if end == "D leaves":
            task.cancel()
        elif end == "P is stopped":
            p.servicer.abort_all("this worker is stopping")
        else:
            holder.servicer.abort_all("this worker is stopping")
        await asyncio.wait({task})
        p.importers[0].gate.set()
        if end == "the holder is stopped":
            done = task.result()
            assert isinstance(done, Committed)
            assert done.prefix is None
            d.assert_content(ask)
            d.pool.release(ask.owner)
        for worker in (d, p, holder):
            await worker.handoffs.until_idle(20)
            await worker.servicer.until_idle(20)
            assert worker.pool.owners() == (), worker.name
            assert worker.pool.counts().held == 0


async def test_who_is_asked_for_what_it_holds_asks_nobody_else() -> None:
    """A says that B holds the prefix, B was told that C does: B answers for itself."""
    a, b, c = Mate("a"), Mate("b"), Mate("c")
    async with mates(a, b, c):
        c.hold(PROMPT)
        held_only = a.prefix_ask(PROMPT, b.holder(4))
        plan = a.prefixes.plan(held_only)
        assert plan is not None
        ask = dataclasses.replace(
            a.prefixes._handoff_ask(held_only, plan, OwnerId("loop")), prefix=c.holder(4)
        )
        refused = await a.handoffs.fetch(ask, b.peer())
        assert isinstance(refused, NotServed)
        assert (refused.reason, refused.held_blocks) == (Outcome.REJECTED, 0)
    assert not c.servicer.counters
    assert not b.prefixes.counters


async def test_a_held_prefix_is_whole_blocks() -> None:
    a, b = Mate("a"), Mate("b")
    async with mates(a, b):
        b.hold(PROMPT)
        ask = dataclasses.replace(a.ask(PROMPT, None), held_only=True)
        refused = await a.handoffs.fetch(ask, b.peer())
        assert isinstance(refused, NotServed)
        assert refused.reason is Outcome.SCHEMA
