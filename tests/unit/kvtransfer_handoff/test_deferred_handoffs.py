"""Late reservation, driven: under pressure blocks are taken as late as the transfer allows, else at once."""

import asyncio
import contextlib
import dataclasses
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass

import pytest
from handoff_rig import PATIENT, Rig

from pdserve.core.clock import Clock, ManualClock
from pdserve.core.lifecycle import Lifecycle
from pdserve.core.perfmodel import PerfModel, TransferRecord
from pdserve.kvtransfer.handoff.consumer import Committed, HandoffAsk, NotServed
from pdserve.kvtransfer.handoff.states import Outcome

PROMPT, OTHER = tuple(range(100, 180)), tuple(range(500, 580))
"""Five blocks each; the pool has eight."""


def taught() -> PerfModel:
    """Has seen fills that took as long as was said, and fast transfers."""
    model = PerfModel()
    for _ in range(16):
        model.observe_fill(1.0, 1.0)
        for num_bytes in (1_000, 50_000):
            model.observe_transfer(TransferRecord(1e-4 + num_bytes * 1e-9, num_bytes, "shm"))
    return model


class StartedClock(ManualClock):
    """Moves only when told to, until it is started."""

    _started_at: float | None = None

    def start(self) -> None:
        self._started_at = time.monotonic()

    def now(self) -> float:
        ran = 0.0 if self._started_at is None else time.monotonic() - self._started_at
        return super().now() + ran


@dataclass
class Pressed:
    """A handoff whose fill takes one block per step, beside another that has not got a chunk yet."""

    rig: Rig
    ask: HandoffAsk
    task: "asyncio.Task[Committed | NotServed]"
    other: "asyncio.Task[Committed | NotServed]"
    steps: "defaultdict[int, asyncio.Future[None]]"
    """Of the first one's fill; done: the step goes on."""

    def step(self, *numbers: int) -> None:
        for number in numbers:
            self.steps[number].set_result(None)

    @property
    def deferred(self) -> int:
        return self.rig.handoffs.counters.get("reservations_deferred", 0)

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(20):
            while not condition():
                await asyncio.sleep(0.001)


@contextlib.asynccontextmanager
async def pressed(
    *,
    blocks: int = 8,
    perf: PerfModel | None = None,
    clock: Clock | None = None,
    estimate_s: float = 1000.0,
    remaining_s: float | None = None,
) -> AsyncIterator[Pressed]:
    loop = asyncio.get_running_loop()
    # Fills take minutes of the clock's time.
    config = dataclasses.replace(PATIENT, request_deadline_s=5000.0)
    rig = Rig(config=config, decode_blocks=blocks, perf=perf, decode_clock=clock)
    rig.filler.chunk_tokens, rig.filler.estimate_s = 16, estimate_s
    steps: defaultdict[int, asyncio.Future[None]] = defaultdict(loop.create_future)
    held: asyncio.Future[None] = loop.create_future()
    rig.filler.gates = {PROMPT[0]: lambda step: steps[step], OTHER[0]: lambda step: held}
    async with rig:
        ask = rig.ask(PROMPT, remaining_s=remaining_s)
        other = asyncio.create_task(rig.handoffs.fetch(rig.ask(OTHER), rig.peer()))
        task = asyncio.create_task(rig.handoffs.fetch(ask, rig.peer()))
        at = Pressed(rig, ask, task, other, steps)
        try:
            # Both know their transport, and the other one waits for its turn at P.
            await at.until(lambda: rig.importer_source.given == 2)
            yield at
        finally:
            for work in (task, other):
                work.cancel()
            await asyncio.gather(task, other, return_exceptions=True)
            await rig.at_rest()


async def test_under_pressure_blocks_are_taken_when_the_fill_nears_its_end() -> None:
    clock = ManualClock()
    async with pressed(perf=taught(), clock=clock) as at:
        clock.advance(200.0)
        at.step(0)
        await at.until(lambda: at.deferred == 1)
        assert at.rig.d.pool.counts().free == 8
        clock.advance(0.01)
        at.step(1, 2, 3)  # three blocks in no time: P is faster than it said
        async with asyncio.timeout(20):
            await at.rig.trail.wait(Lifecycle.RESERVED)
        assert Lifecycle.FILLED_SEEN not in at.rig.trail.names()
        at.step(4)
        assert isinstance(await at.task, Committed)
        at.rig.assert_content(at.ask)
        assert at.deferred == 1


async def test_with_right_predictions_only_the_last_chunk_is_left_when_the_fill_ends() -> None:
    """The last step waits for D, which has to come by itself: a timer, no word of P's."""
    clock = StartedClock()
    async with pressed(perf=taught(), clock=clock, estimate_s=0.3) as at:
        landed_at_the_end: list[int] = []
        trail = at.rig.trail
        trail.hooks[Lifecycle.FILLED_SEEN] = lambda facts: landed_at_the_end.append(
            trail.names().count(Lifecycle.CHUNK_LANDED)
        )
        clock.advance(0.06)  # a fifth of the fill
        at.step(0)
        await at.until(lambda: at.deferred == 1)
        clock.start()
        async with asyncio.timeout(20):
            await trail.wait(Lifecycle.RESERVED)
        assert trail.names().count(Lifecycle.FILLED_SEEN) == 0
        at.step(1, 2, 3)
        await at.until(lambda: trail.names().count(Lifecycle.CHUNK_LANDED) == 4)
        at.step(4)
        done = await at.task
        assert isinstance(done, Committed)
        assert done.blocks_moved == 5
        assert landed_at_the_end[0] >= 4  # the last one, too, where it was quicker than the word of the end


@pytest.mark.parametrize("why", ["room for both", "no error known", "no model"])
async def test_without_a_reason_to_wait_blocks_are_taken_at_the_first_chunk(why: str) -> None:
    perf = {"room for both": taught(), "no error known": PerfModel(), "no model": None}[why]
    blocks = 10 if why == "room for both" else 8
    clock = ManualClock()
    async with pressed(perf=perf, blocks=blocks, clock=clock) as at:
        clock.advance(200.0)
        at.step(0)
        async with asyncio.timeout(20):
            await at.rig.trail.wait(Lifecycle.RESERVED)
        assert at.deferred == 0
        assert at.rig.d.pool.counts().free == blocks - 5


async def test_who_waits_lets_another_one_through() -> None:
    """Had the first one reserved at its first chunk, the second would have found three blocks."""
    clock = ManualClock()
    async with pressed(perf=taught(), clock=clock) as at:
        clock.advance(200.0)
        at.step(0)
        await at.until(lambda: at.deferred == 1)
        at.rig.filler.gates[900] = lambda step: None
        quick = at.rig.ask(range(900, 980))
        assert isinstance(await at.rig.handoffs.fetch(quick, at.rig.peer()), Committed)
        assert Lifecycle.RESERVED in at.rig.trail.names()
        at.step(1, 2, 3, 4)
        await at.until(lambda: at.rig.handoffs.counters.get("reservations_refused", 0) == 1)
        at.rig.d.pool.release(quick.owner)
        assert isinstance(await at.task, Committed)
        at.rig.assert_content(at.ask)


async def test_a_wait_ends_when_there_is_room_for_all() -> None:
    clock = ManualClock()
    async with pressed(perf=taught(), clock=clock) as at:
        clock.advance(200.0)
        at.step(0)
        await at.until(lambda: at.deferred == 1)
        at.other.cancel()
        async with asyncio.timeout(20):
            await at.rig.trail.wait(Lifecycle.RESERVED)
        assert not at.steps[1].done()  # no word of P's, no time


@pytest.mark.parametrize("end", ["cancel", "the fill breaks", "close", "deadline"])
async def test_who_gives_up_while_it_waits_leaves_nothing(
    end: str, leap: Callable[[float], Awaitable[None]]
) -> None:
    clock = ManualClock()
    remaining_s = 500.0 if end == "deadline" else None
    async with pressed(perf=taught(), clock=clock, remaining_s=remaining_s) as at:
        clock.advance(200.0)
        at.step(0)
        await at.until(lambda: at.deferred == 1)
        if end == "cancel":
            at.task.cancel()
        elif end == "the fill breaks":
            at.rig.filler.fail_at = 1
            at.step(1)
        elif end == "close":
            await at.rig.handoffs.close()
        else:
            clock.advance(300.0)
            await leap(500.0)
        (result,) = await asyncio.gather(at.task, return_exceptions=True)
        if end == "cancel":
            assert isinstance(result, asyncio.CancelledError)
        else:
            assert isinstance(result, NotServed)
            outcomes = {
                "the fill breaks": Outcome.FAILED,
                "close": Outcome.CANCELLED,
                "deadline": Outcome.DEADLINE,
            }
            assert result.reason is outcomes[end]
        at.other.cancel()
        await at.rig.at_rest()
        at.rig.check()
        counts = at.rig.d.pool.counts()
        assert (counts.free, counts.held, counts.reserved) == (8, 0, 0)
        assert Lifecycle.RESERVED not in at.rig.trail.names()


async def test_estimates_are_judged_by_what_came_of_them() -> None:
    perf, clock = PerfModel(), ManualClock()
    async with pressed(perf=perf, clock=clock, blocks=128, estimate_s=2.0) as at:
        for _ in range(8):
            assert perf.fill_error is None
            at.steps.clear()
            ask = at.rig.ask(PROMPT)
            task = asyncio.create_task(at.rig.handoffs.fetch(ask, at.rig.peer()))
            given = at.rig.importer_source.given
            await at.until(lambda given=given: at.rig.importer_source.given > given)
            clock.advance(4.0)
            at.step(0, 1, 2, 3, 4)
            assert isinstance(await task, Committed)
            at.rig.d.pool.release(ask.owner)
        assert perf.fill_error == pytest.approx(0.5)
