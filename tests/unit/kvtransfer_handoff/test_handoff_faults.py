"""Handoffs that end badly: whatever breaks, whenever, nobody commits it and both pools are whole again."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass

import pytest
from handoff_rig import PATIENT, QUICK, HeldExporter, HeldImporter, Rig, Wire

from pdserve.core.clock import ManualClock
from pdserve.core.lifecycle import Lifecycle
from pdserve.core.types import BlockId, OwnerId
from pdserve.kvtransfer.handoff.consumer import Committed, HandoffAsk, NotServed
from pdserve.kvtransfer.handoff.states import Outcome
from pdserve.kvtransfer.transports.base import Exporter

PROMPT = tuple(range(100, 170))
STATES = ("open", "reserving", "fetching", "verified")


@dataclass
class Paused:
    """A rig whose one handoff rests in a given state of D."""

    rig: Rig
    wire: Wire
    ask: HandoffAsk
    task: "asyncio.Task[Committed | NotServed]"
    go: "asyncio.Future[None]"
    """Done: whatever holds the handoff lets go."""

    async def give_up(self) -> Committed | NotServed:
        async with asyncio.timeout(20):
            return await self.task


@contextlib.asynccontextmanager
async def paused(
    state: str, transport: str = "shm", *, stubborn: bool = False, remaining_s: float | None = None
) -> AsyncIterator[Paused]:
    rig = Rig(transport, config=PATIENT, decode_blocks=16)
    loop = asyncio.get_running_loop()
    go: asyncio.Future[None] = loop.create_future()
    exporters: list[HeldExporter] = []

    def hold_importer(importer: HeldImporter) -> None:
        importer.gate.clear()
        importer.stubborn = stubborn
        go.add_done_callback(lambda _: importer.gate.set())

    def hold_exporter(exporter: Exporter) -> Exporter:
        held = HeldExporter(exporter)
        go.add_done_callback(lambda _: held.gate.set())
        exporters.append(held)
        return held

    if state == "open":
        rig.filler.gate = lambda step: asyncio.shield(go)
    elif state == "fetching":
        rig.prepare = hold_importer
    elif state == "verified":
        rig.wrap_exporter = hold_exporter
    wire = Wire()
    async with rig:
        squatter = OwnerId("squatter")
        if state == "reserving":
            assert rig.d.pool.allocate(squatter, 15) is not None
        port = await wire.start(rig.port)
        ask = rig.ask(PROMPT, remaining_s=remaining_s)
        task = asyncio.create_task(rig.handoffs.fetch(ask, rig.peer(port=port)))
        try:
            await _reached(rig, state)
            yield Paused(rig, wire, ask, task, go)
        finally:
            if not go.done():
                go.set_result(None)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            rig.d.pool.release(squatter)
            await rig.at_rest()
            await wire.close()


async def _reached(rig: Rig, state: str) -> None:
    async with asyncio.timeout(20):
        if state == "open":
            await rig.filler.begun.wait()
        elif state == "reserving":
            await rig.trail.wait(Lifecycle.FILLED_SEEN)
        elif state == "fetching":
            await rig.trail.wait(Lifecycle.RESERVED)
            await rig.trail.wait(Lifecycle.FILLED_SEEN)
            await rig.met.wait()
            await rig.importers[0].entered.wait()
        else:
            await rig.trail.wait(Lifecycle.VERIFIED)


def empty(rig: Rig, ask: HandoffAsk) -> bool:
    """Nothing of the handoff is left at D."""
    counts = rig.d.pool.counts()
    squatted = len(rig.d.pool.table(OwnerId("squatter")))
    return not rig.d.pool.table(ask.owner) and counts.held == squatted and counts.quarantined == 0


@pytest.mark.parametrize("state", STATES)
async def test_a_cut_stream_ends_the_handoff_in_every_state(state: str) -> None:
    async with paused(state) as at:
        at.wire.cut()
        result = await at.give_up()
        assert isinstance(result, NotServed)
        assert result.reason is Outcome.LOST
        at.go.set_result(None)
        await at.rig.at_rest()
        assert empty(at.rig, at.ask)
        at.rig.check()


@pytest.mark.parametrize("transport", ["inproc", "shm", "tcp"])
@pytest.mark.parametrize("state", STATES)
async def test_a_cancel_leaves_both_pools_balanced_in_every_state(state: str, transport: str) -> None:
    if (state, transport) == ("verified", "tcp"):
        state = "fetching"  # a held tcp serve sends nothing, so D does not get further
    async with paused(state, transport) as at:
        at.task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await at.task
        at.go.set_result(None)
        await at.rig.at_rest()
        assert empty(at.rig, at.ask)
        assert at.rig.handoffs.counters["cancelled"] == 1
        at.rig.check()


@pytest.mark.parametrize("state", STATES)
async def test_p_giving_up_ends_the_handoff_in_every_state(state: str) -> None:
    async with paused(state) as at:
        at.rig.servicer.abort_all("the worker is stopping")
        result = await at.give_up()
        assert isinstance(result, NotServed)
        assert result.reason is Outcome.FAILED
        assert "stopping" in result.message
        at.go.set_result(None)
        await at.rig.at_rest()
        assert empty(at.rig, at.ask)


@pytest.mark.parametrize("state", STATES)
async def test_closing_d_waits_for_every_copy(state: str) -> None:
    async with paused(state, stubborn=True) as at:
        closing = asyncio.create_task(at.rig.handoffs.close())
        result = await at.give_up()
        assert isinstance(result, NotServed)
        assert result.reason is Outcome.CANCELLED
        assert closing.done() == (at.rig.handoffs.in_flight() == 0)
        at.go.set_result(None)
        await closing
        assert at.rig.handoffs.in_flight() == 0
        assert empty(at.rig, at.ask)


async def test_blocks_stay_in_quarantine_while_a_copy_may_still_write() -> None:
    async with paused("fetching", stubborn=True) as at:
        at.task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await at.task
        counts = at.rig.d.pool.counts()
        assert counts.quarantined == 5  # every granted block
        assert counts.free == 16 - 5
        assert at.rig.handoffs.in_flight() == 1
        at.go.set_result(None)
        await at.rig.at_rest()
        assert at.rig.d.pool.counts().free == 16


async def test_a_cancel_in_the_moment_of_the_commit_leaves_nothing_behind() -> None:
    async with Rig() as rig:
        ask = rig.ask(PROMPT)
        task = asyncio.create_task(rig.handoffs.fetch(ask, rig.peer()))
        rig.trail.hooks[Lifecycle.COMMITTED] = lambda facts: task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert rig.d.pool.table(ask.owner) == ()
        assert rig.handoffs.counters["handoffs_committed"] == 1
        assert rig.d.pool.counts().held == 0


@pytest.mark.parametrize("transport", ["inproc", "shm", "tcp"])
async def test_bytes_that_change_after_exposure_are_never_committed(transport: str) -> None:
    async with Rig(transport) as rig:

        def corrupt(facts: object) -> None:
            block = rig.prefill_trail.events[-1][1]["blocks"][-1]  # type: ignore[index]
            rig.p.storage.bytes_view[block, 5] ^= 0x40

        rig.prefill_trail.hooks[Lifecycle.CHUNK_READY] = corrupt
        ask = rig.ask(PROMPT)
        result = await rig.handoffs.fetch(ask, rig.peer())
        assert isinstance(result, NotServed)
        assert result.reason is Outcome.CORRUPT
        assert "K of layer 0, head 0" in result.message
        await rig.at_rest()
        assert empty(rig, ask)
        assert rig.handoffs.counters["digest_mismatches"] >= 1
        assert "handoffs_committed" not in rig.handoffs.counters
        assert Lifecycle.COMMITTED not in rig.trail.names()


async def test_a_silent_peer_is_lost_on_both_sides() -> None:
    async with paused("open") as at:
        for side in (at.rig.handoffs._attempts, at.rig.servicer._sessions):
            for shell in side.values():
                shell.watch._silence_s = 0.3
        at.wire.silence()
        result = await at.give_up()
        assert isinstance(result, NotServed)
        assert result.reason is Outcome.LOST
        at.go.set_result(None)
        await at.rig.at_rest()
        assert empty(at.rig, at.ask)


async def test_a_peer_that_fills_without_progress_is_lost() -> None:
    async with Rig(config=QUICK) as rig:
        rig.servicer._site.progress = lambda: 7
        held: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        rig.filler.gate = lambda step: asyncio.shield(held)
        result = await rig.handoffs.fetch(rig.ask(PROMPT), rig.peer())
        assert isinstance(result, NotServed)
        assert result.reason is Outcome.LOST
        assert "no progress" in result.message
        await rig.at_rest()


async def test_a_deadline_ends_the_handoff(leap: Callable[[float], Awaitable[None]]) -> None:
    async with paused("open", remaining_s=25.0) as at:
        rig = at.rig
        await leap(25.0)
        result = await at.give_up()
        assert isinstance(result, NotServed)
        assert result.reason in (Outcome.DEADLINE, Outcome.EXPIRED)  # both sides keep the same deadline
        await rig.at_rest()
        assert rig.filler.ended  # the engine was stopped, not left to compute for nobody


async def test_blocks_that_p_let_expire_are_not_used(leap: Callable[[float], Awaitable[None]]) -> None:
    """Time passes at P alone: D, which has the same deadline, would be the first to end it."""
    rig = Rig(decode_clock=ManualClock())
    rig.prepare = lambda importer: importer.gate.clear()
    async with rig:
        ask = rig.ask(PROMPT)
        task = asyncio.create_task(rig.handoffs.fetch(ask, rig.peer()))
        await rig.trail.wait(Lifecycle.FILLED_SEEN)
        await leap(PATIENT.request_deadline_s)
        result = await task
        assert isinstance(result, NotServed)
        assert result.reason is Outcome.EXPIRED
        await rig.at_rest()
        assert empty(rig, ask)
        assert rig.servicer.counters["aborted_in_filled"] == 1


async def test_a_reader_that_comes_late_finds_its_prompt_downgraded_to_cache() -> None:
    async with paused("reserving") as at:
        assert at.rig.servicer.relieve(1) == 0  # it was filled just now
        assert at.rig.servicer.relieve(1, unread_s=0.0) == 5
        result = await at.give_up()
        assert isinstance(result, NotServed)
        assert result.reason is Outcome.EXPIRED
        await at.rig.servicer.until_idle(10)
        assert at.rig.servicer.counters["released_cached"] == 1
        assert at.rig.p.pool.counts().cached == 4  # the fifth block is partial and has no name
        assert at.rig.servicer.relieve(1, unread_s=0.0) == 0


async def test_prompts_that_wait_for_their_share_push_out_unread_ones() -> None:
    async with Rig(prefill_config=QUICK, prefill_blocks=12, decode_blocks=6) as rig:
        squatter = OwnerId("squatter")
        assert rig.d.pool.allocate(squatter, 6) is not None
        unread = asyncio.create_task(rig.handoffs.fetch(rig.ask(PROMPT), rig.peer()))
        await rig.trail.wait(Lifecycle.FILLED_SEEN)
        waiting = asyncio.create_task(rig.handoffs.fetch(rig.ask(range(500, 570)), rig.peer()))
        result = await unread
        assert isinstance(result, NotServed)
        assert result.reason is Outcome.EXPIRED
        rig.d.pool.release(squatter)
        assert isinstance(await waiting, Committed)


@pytest.mark.parametrize("transport", ["inproc", "shm", "tcp"])
async def test_a_transport_that_fails_ends_the_handoff(transport: str) -> None:
    rig = Rig(transport)
    rig.prepare = lambda importer: setattr(importer, "fail", True)
    async with rig:
        ask = rig.ask(PROMPT)
        result = await rig.handoffs.fetch(ask, rig.peer())
        assert isinstance(result, NotServed)
        assert (result.reason, result.message) == (Outcome.LOST, "the link is cut (while fetching)")
        await rig.at_rest()
        assert empty(rig, ask)


async def test_a_prefill_that_fails_is_told_to_d() -> None:
    async with Rig() as rig:
        rig.filler.fail_at = 1
        ask = rig.ask(PROMPT)
        result = await rig.handoffs.fetch(ask, rig.peer())
        assert isinstance(result, NotServed)
        assert result.reason is Outcome.FAILED
        assert "the engine broke" in result.message
        await rig.at_rest()
        assert empty(rig, ask)
        assert rig.servicer.counters["aborted_in_filling"] == 1


async def test_a_prefill_that_ends_short_is_a_failure() -> None:
    async with Rig() as rig:
        rig.filler.stop_at = 1
        result = await rig.handoffs.fetch(rig.ask(PROMPT), rig.peer())
        assert isinstance(result, NotServed)
        assert "after 32 of 69 positions" in result.message
        await rig.at_rest()


async def test_an_abort_stops_the_engine_and_frees_its_blocks() -> None:
    async with paused("open") as at:
        at.task.cancel()
        await asyncio.gather(at.task, return_exceptions=True)
        await at.rig.servicer.until_idle(10)
        assert at.rig.filler.ended  # although nobody let the engine's step go on
        assert at.rig.p.pool.counts().held == 0


async def test_nobody_at_the_endpoint_means_lost() -> None:
    async with Rig() as rig:
        await rig.server.stop(None)
        result = await rig.handoffs.fetch(rig.ask(PROMPT), rig.peer())
        assert isinstance(result, NotServed)
        assert result.reason is Outcome.LOST
        assert "UNAVAILABLE" in result.message


async def test_a_peer_that_accepts_and_never_answers_keeps_nobody() -> None:
    """A stopped process: its kernel still takes connections."""
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        mute.listen()
        async with Rig(config=PATIENT) as rig:
            ask = rig.ask(PROMPT, remaining_s=0.01)  # over before gRPC has given the connection up
            async with asyncio.timeout(20):
                result = await rig.handoffs.fetch(ask, rig.peer(port=mute.getsockname()[1]))
                assert isinstance(result, NotServed)
                assert result.reason is Outcome.DEADLINE
                await rig.handoffs.close()
            assert rig.handoffs.in_flight() == 0
            assert empty(rig, ask)


async def test_a_draining_worker_rejects() -> None:
    async with Rig() as rig:
        rig.draining = True
        result = await rig.handoffs.fetch(rig.ask(PROMPT), rig.peer())
        assert isinstance(result, NotServed)
        assert result.reason is Outcome.REJECTED
        assert "draining" in result.message
        await rig.at_rest()


async def test_a_prompt_that_never_fits_is_rejected_with_both_numbers() -> None:
    async with Rig(prefill_blocks=8) as rig:
        result = await rig.handoffs.fetch(rig.ask(PROMPT), rig.peer())
        assert isinstance(result, NotServed)
        assert result.reason is Outcome.REJECTED
        assert "needs 5 blocks" in result.message
        assert f"at most {rig.servicer.export_blocks}" in result.message
        assert rig.servicer.export_blocks == 4
        await rig.at_rest()


async def test_another_schema_never_pairs() -> None:
    async with Rig(schema=b"\x02" * 16) as rig:
        result = await rig.handoffs.fetch(rig.ask(PROMPT), rig.peer())
        assert isinstance(result, NotServed)
        assert result.reason is Outcome.SCHEMA
        await rig.at_rest()


async def test_a_restarted_worker_does_not_answer_for_the_old_one() -> None:
    async with Rig() as rig:
        result = await rig.handoffs.fetch(rig.ask(PROMPT), rig.peer(incarnation="prefill-old"))
        assert isinstance(result, NotServed)
        assert result.reason is Outcome.SCHEMA
        assert "prefill-old" in result.message
        await rig.at_rest()


@pytest.mark.parametrize(
    "event",
    [
        Lifecycle.FILLED_SEEN,
        Lifecycle.RESERVED,
        Lifecycle.CHUNK_LANDED,
        Lifecycle.VERIFIED,
        Lifecycle.COMMITTED,
    ],
)
async def test_a_defect_of_d_fails_its_handoff_alone(event: Lifecycle) -> None:
    async with Rig(defects=1) as rig:
        rig.trail.hooks[event] = _break
        ask = rig.ask(PROMPT)
        result = await rig.handoffs.fetch(ask, rig.peer())
        assert isinstance(result, NotServed)
        assert result.reason is Outcome.FAILED
        assert "broken on purpose" in result.message
        await rig.at_rest()
        assert empty(rig, ask)
        rig.trail.hooks.clear()
        again = rig.ask(PROMPT)
        assert isinstance(await rig.handoffs.fetch(again, rig.peer()), Committed)


async def test_a_defect_of_p_fails_its_handoff_alone() -> None:
    async with Rig(defects=1) as rig:
        rig.prefill_trail.hooks[Lifecycle.CHUNK_READY] = _break
        result = await rig.handoffs.fetch(rig.ask(PROMPT), rig.peer())
        assert isinstance(result, NotServed)
        assert result.reason is Outcome.FAILED
        await rig.at_rest()
        assert rig.p.pool.counts().held == 0
        rig.prefill_trail.hooks.clear()
        assert isinstance(await rig.handoffs.fetch(rig.ask(PROMPT), rig.peer()), Committed)


async def test_a_defect_between_two_grants_leaves_no_copy_to_wait_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of a backlog, the first copy has begun and the others never do."""
    async with Rig(defects=1) as rig:
        squatter = OwnerId("squatter")
        assert rig.d.pool.allocate(squatter, 32) is not None
        ask = rig.ask(PROMPT)
        task = asyncio.create_task(rig.handoffs.fetch(ask, rig.peer()))
        await rig.trail.wait(Lifecycle.FILLED_SEEN)
        start, started = rig.d.pool.start_loading, []

        def start_one(owner: OwnerId, blocks: Sequence[BlockId]) -> None:
            started.append(blocks)
            if len(started) == 2:
                raise RuntimeError("broken on purpose")
            start(owner, blocks)

        monkeypatch.setattr(rig.d.pool, "start_loading", start_one)
        rig.d.pool.release(squatter)
        result = await task
        assert isinstance(result, NotServed)
        assert result.reason is Outcome.FAILED
        await rig.at_rest()
        assert rig.handoffs.in_flight() == 0
        assert empty(rig, ask)


async def test_numbers_that_nobody_can_take_fail_no_handoff() -> None:
    async with Rig() as rig:
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: None)
        rig.transfers = None  # type: ignore[assignment]
        ask = rig.ask(PROMPT)
        assert isinstance(await rig.handoffs.fetch(ask, rig.peer()), Committed)
        rig.assert_content(ask)


async def test_an_abort_before_the_first_message_opens_no_stream() -> None:
    async with Rig() as rig:
        task = asyncio.create_task(rig.handoffs.fetch(rig.ask(PROMPT), rig.peer()))
        await asyncio.sleep(0)
        rig.handoffs.abort_all("fenced")
        result = await task
        assert isinstance(result, NotServed)
        assert result.reason is Outcome.CANCELLED
        await rig.at_rest()
        assert rig.prefill_trail.events == []
        assert rig.servicer.counters == {}


def _break(facts: object) -> None:
    raise RuntimeError("broken on purpose")


async def test_a_failed_attempt_does_not_disturb_the_next_one() -> None:
    async with Rig() as rig:
        rig.filler.fail_at = 1
        assert isinstance(await rig.handoffs.fetch(rig.ask(PROMPT), rig.peer()), NotServed)
        rig.filler.fail_at = None
        again = rig.ask(PROMPT)
        assert isinstance(await rig.handoffs.fetch(again, rig.peer()), Committed)
        rig.assert_content(again)
