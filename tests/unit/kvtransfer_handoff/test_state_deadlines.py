"""Every state has a bound of its own, made from the request's time: nobody waits for a peer that stalls
while it heartbeats, and enough time is left for the next candidate.
"""

import asyncio
import dataclasses
import itertools
import math
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import pytest
from handoff_rig import QUICK, HeldExporter, HeldImporter, Rig

from pdserve.core.lifecycle import Lifecycle
from pdserve.core.perfmodel import Prediction
from pdserve.core.types import OwnerId
from pdserve.kvtransfer.handoff import wire
from pdserve.kvtransfer.handoff.consumer import Committed, NotServed
from pdserve.kvtransfer.handoff.decode_side import DecodeHandoff
from pdserve.kvtransfer.handoff.events import DeadlinePassed, StateExpired
from pdserve.kvtransfer.handoff.prefill_side import PrefillHandoff
from pdserve.kvtransfer.handoff.state_deadlines import (
    Budget,
    Outlook,
    StateBound,
    decode_bound,
    prefill_bound,
    quick,
    slow,
)
from pdserve.kvtransfer.handoff.states import DecodeState, Outcome, PrefillState
from pdserve.kvtransfer.transports.base import Importer
from pdserve.proto import handoff_pb2 as pb
from pdserve.proto import handoff_pb2_grpc

PROMPT = tuple(range(100, 170))
BRIEF = dataclasses.replace(QUICK, silence_s=1.0)

WAITS = {
    "answer": DecodeHandoff(64),
    "first chunk": DecodeHandoff(64, opened=True),
    "way": DecodeHandoff(64, state=DecodeState.RESERVED, opened=True, ends=(2,)),
    "next chunk": DecodeHandoff(64, state=DecodeState.FETCHING, opened=True, connected=True, ends=(2,)),
    "transfer": DecodeHandoff(
        64, state=DecodeState.FETCHING, opened=True, connected=True, ends=(4,), filled=True
    ),
    "released": DecodeHandoff(
        64, state=DecodeState.VERIFIED, opened=True, connected=True, ends=(4,), filled=True
    ),
}
"""One machine per thing that D waits for, memory left out."""

MEMORY = DecodeHandoff(64, opened=True, ends=(2,))


def sure(seconds: float) -> Prediction:
    return Prediction(seconds, 0.0)


def outlook(fill: float = 2.0, transfer: float = 0.5, elsewhere: float | None = 3.0) -> Outlook:
    return Outlook(sure(fill), sure(transfer), None if elsewhere is None else sure(elsewhere))


def budget(deadline: float = 100.0, further: int = 1) -> Budget:
    return Budget(0.0, deadline, silence_s=1.0, further=further)


@pytest.mark.parametrize("waiting", WAITS)
def test_with_time_enough_a_state_lasts_as_long_as_its_wait_was_predicted_to(waiting: str) -> None:
    bound = decode_bound(WAITS[waiting], 10.0, budget(), outlook())
    patience_s = {"answer": 1.0, "way": 1.0, "released": 1.0, "transfer": 4.0}.get(waiting, 4.0)
    assert bound.at == 10.0 + patience_s  # what beginning anew takes where that is longer, and silence_s
    assert isinstance(bound.passed("any", 20.0), StateExpired)


@pytest.mark.parametrize("waiting", WAITS)
def test_with_little_time_enough_is_left_to_prefill_elsewhere(waiting: str) -> None:
    bound = decode_bound(WAITS[waiting], 3.0, budget(deadline=6.0), outlook(fill=50.0, transfer=50.0))
    assert bound.at == min(3.0 + 1.0 if waiting in ("answer", "way", "released") else math.inf, 3.0)
    assert "elsewhere" in bound.because


@pytest.mark.parametrize("waiting", WAITS)
def test_where_nobody_else_could_be_asked_the_deadline_is_the_bound(waiting: str) -> None:
    bound = decode_bound(WAITS[waiting], 3.0, budget(further=0), outlook())
    assert bound.at == 100.0
    assert isinstance(bound.passed("any", 100.0), DeadlinePassed)


def test_who_is_within_its_own_prediction_may_go_on_behind_the_last_call() -> None:
    promising = outlook(fill=6.0, transfer=0.5, elsewhere=5.0)
    assert decode_bound(WAITS["first chunk"], 1.0, budget(deadline=8.0), promising).at == 7.0
    hopeless = outlook(fill=6.8, transfer=0.5, elsewhere=3.0)  # its end would be behind the deadline
    assert decode_bound(WAITS["first chunk"], 1.0, budget(deadline=8.0), hopeless).at == 5.0


def test_the_others_share_of_the_time_is_the_most_that_is_kept_for_them() -> None:
    assert budget(deadline=90.0, further=2).last_call(math.inf) == 30.0
    assert budget(deadline=90.0, further=2).last_call(5.0) == 85.0


def test_memory_of_its_own_is_waited_for_as_long_as_the_copies_would_still_come_in_time() -> None:
    for further in (0, 3):
        bound = decode_bound(MEMORY, 3.0, budget(further=further), outlook(transfer=20.0))
        assert bound.at == 80.0
        assert isinstance(bound.passed("open", 80.0), DeadlinePassed), "nobody else has that memory either"


def test_a_prediction_that_nobody_compared_counts_as_far_off_and_nonsense_as_endless() -> None:
    assert slow(Prediction(2.0, 0.25)) == 3.0
    assert slow(Prediction(2.0, None)) == 6.0
    for nonsense in (math.nan, math.inf, -math.inf):
        assert slow(Prediction(nonsense, 0.1)) == math.inf
    assert slow(Prediction(-1.0, 0.0)) == 0.0


def test_a_prediction_that_nobody_compared_may_be_far_too_long() -> None:
    assert quick(Prediction(6.0, 0.25)) == 4.0
    assert quick(Prediction(6.0, None)) == 0.0
    waiting = prefill_bound(PrefillHandoff(), 0.0, 5.0, Prediction(50.0, None))
    assert waiting.at == 5.0, "the first requests of a fast worker are not given up for a guess"


def test_no_bound_is_behind_the_deadline_and_every_later_one_gives_more_time() -> None:
    seconds = (0.0, 0.3, 5.0, math.inf, math.nan, -1.0)
    for machine, fill, transfer, elsewhere in itertools.product(
        (*WAITS.values(), MEMORY), seconds, seconds, (None, *seconds)
    ):
        for further in (0, 1, 4):
            seen = [
                decode_bound(machine, 2.0, budget(at, further), outlook(fill, transfer, elsewhere)).at
                for at in (4.0, 8.0, 20.0)
            ]
            assert seen == sorted(seen)
            assert all(got <= limit for got, limit in zip(seen, (4.0, 8.0, 20.0), strict=True))


def test_p_begins_no_fill_that_cannot_end_in_time() -> None:
    waiting = prefill_bound(PrefillHandoff(), 0.0, 10.0, sure(4.0))
    assert waiting.at == 6.0
    assert isinstance(waiting.passed("open", 6.0), StateExpired)
    for state in (PrefillState.FILLING, PrefillState.FILLED):
        bound = prefill_bound(PrefillHandoff(state=state), 0.0, 10.0, sure(4.0))
        assert (bound.at, bound.final) == (10.0, True)


def test_a_bound_that_passed_is_told_with_state_limit_and_what_was_waited_for() -> None:
    bound = StateBound(10.0, 12.5, "P's first chunk", "1.00 s were predicted", False)
    told = bound.passed("open", 12.75).reason
    assert told == ("2.75 s for P's first chunk, at most 2.50 s in state open: 1.00 s were predicted")


# In the rig: a peer that stalls exactly there, and heartbeats


class MutePrefill(handoff_pb2_grpc.HandoffServicer):
    """Reads and heartbeats, its progress moves, and Open is never answered."""

    async def Handoff(  # type: ignore[override]
        self, request_iterator: AsyncIterator[pb.DecodeMessage], context: Any
    ) -> None:
        for beat in itertools.count():
            await context.write(wire.pack_prefill_heartbeat(beat))
            await asyncio.sleep(BRIEF.heartbeat_s)


async def never(*_: object) -> None:
    await asyncio.Event().wait()


async def give_up(rig: Rig, state: str, *waited_for: str, port: int | None = None) -> None:
    """One handoff, which ends in `state` of D by its own bound, named; another candidate is left."""
    ask = dataclasses.replace(rig.ask(PROMPT, remaining_s=20.0), further=1)
    async with asyncio.timeout(15):
        result = await rig.handoffs.fetch(ask, rig.peer(port=port))
    assert isinstance(result, NotServed)
    assert result.reason is Outcome.STALLED
    assert f"in state {state}" in result.message
    assert any(awaited in result.message for awaited in waited_for)
    assert rig.handoffs.counters[f"expired_in_{state}"] == 1
    assert rig.handoffs.counters[f"aborted_in_{state}"] == 1
    assert not rig.d.pool.table(ask.owner)


async def test_a_peer_that_never_answers_open_is_left() -> None:
    server = grpc.aio.server()
    handoff_pb2_grpc.add_HandoffServicer_to_server(MutePrefill(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with Rig(config=BRIEF) as rig:
        await give_up(rig, "open", "P's answer to Open", port=port)
        await rig.at_rest()
        await server.stop(None)


@pytest.mark.parametrize("step", [0, 1], ids=["first", "next"])
async def test_a_peer_whose_fill_stands_still_is_left(step: int) -> None:
    async with Rig(config=BRIEF) as rig:
        held: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        rig.filler.gate = lambda now: asyncio.shield(held) if now == step else None
        await give_up(rig, "fetching" if step else "open", "P's next chunk" if step else "P's first chunk")
        await rig.at_rest()
        assert rig.filler.ended, "P's engine was told"


async def test_a_peer_that_queues_for_ever_is_left() -> None:
    async with Rig(config=BRIEF, prefill_blocks=12) as rig:
        held: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        rig.filler.gates[500] = lambda step: asyncio.shield(held)
        first = asyncio.create_task(rig.handoffs.fetch(rig.ask(range(500, 570)), rig.peer()))
        await rig.prefill_trail.wait(Lifecycle.PREFILL_QUEUED)
        await give_up(rig, "open", "P's first chunk")
        held.set_result(None)
        assert isinstance(await first, Committed)


async def test_a_way_that_is_never_there_is_left() -> None:
    async with Rig(config=BRIEF) as rig:
        rig.importer_source.get = never  # type: ignore[assignment]
        await give_up(rig, "reserved", "a way to P's memory")
        await rig.at_rest()


async def test_a_transfer_that_does_not_end_is_left() -> None:
    rig = Rig(config=BRIEF)

    def hold(importer: HeldImporter) -> None:
        importer.gate.clear()

    rig.prepare = hold
    async with rig:
        await give_up(rig, "fetching", "the transfer's end")


async def test_a_peer_that_never_says_released_is_left() -> None:
    held: list[HeldExporter] = []
    rig = Rig(config=BRIEF)

    def hold(exporter: Any) -> HeldExporter:
        held.append(HeldExporter(exporter))
        return held[-1]

    rig.wrap_exporter = hold
    async with rig:
        await give_up(rig, "verified", "P's Released")
        for exporter in held:
            exporter.gate.set()


async def test_memory_that_does_not_come_ends_with_the_deadline() -> None:
    async with Rig(config=BRIEF, decode_blocks=6) as rig:
        squatter = OwnerId("squatter")
        assert rig.d.pool.allocate(squatter, 4) is not None
        ask = dataclasses.replace(rig.ask(PROMPT, remaining_s=0.4), further=1)
        result = await rig.handoffs.fetch(ask, rig.peer())
        assert isinstance(result, NotServed)
        assert result.reason in (Outcome.DEADLINE, Outcome.EXPIRED)  # P's is its own, at D's last call
        rig.d.pool.release(squatter)


async def test_p_tells_a_d_that_waits_in_its_queue_when_the_fill_cannot_end_in_time() -> None:
    async with Rig(config=dataclasses.replace(BRIEF, silence_s=10.0), prefill_blocks=12) as rig:
        held: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        rig.filler.gates[500] = lambda step: asyncio.shield(held)
        rig.filler.estimate_s, rig.filler.estimate_error = 59.0, 1.0
        first = asyncio.create_task(rig.handoffs.fetch(rig.ask(range(500, 570)), rig.peer()))
        await rig.prefill_trail.wait(Lifecycle.PREFILL_QUEUED)
        result = await rig.handoffs.fetch(rig.ask(PROMPT, remaining_s=20.0), rig.peer())
        assert isinstance(result, NotServed)
        assert result.reason is Outcome.FAILED
        assert "a share of P's pool" in result.message
        assert rig.servicer.counters["expired_in_open"] == 1
        held.set_result(None)
        assert isinstance(await first, Committed)


class Trickle:
    """An importer whose every fetch takes its time."""

    def __init__(self, inner: Importer, seconds: float) -> None:
        self._inner = inner
        self._seconds = seconds
        self.transport = inner.transport

    async def fetch(self, grant: Any) -> Any:
        await asyncio.sleep(self._seconds)
        return await self._inner.fetch(grant)

    async def close(self) -> None:
        await self._inner.close()


async def test_a_link_at_a_hundredth_of_its_speed_leaves_time_for_the_next_candidate(
    leap: Callable[[float], Awaitable[None]],
) -> None:
    async with Rig(config=dataclasses.replace(BRIEF, silence_s=100.0)) as rig:
        rig.filler.chunk_tokens = 16
        rig.importer_source._wrap = lambda inner: Trickle(inner, 600.0)  # type: ignore[assignment]
        loop = asyncio.get_running_loop()
        deadline = loop.time() + 60.0
        ask = dataclasses.replace(rig.ask(PROMPT, remaining_s=60.0), further=1)
        task = asyncio.create_task(rig.handoffs.fetch(ask, rig.peer()))
        await rig.trail.wait(Lifecycle.FILLED_SEEN)
        await leap(30.0)
        result = await task
        assert isinstance(result, NotServed)
        assert result.reason in (Outcome.STALLED, Outcome.EXPIRED)  # P's own bound is D's last call
        left_s = deadline - loop.time()
        await rig.importer_source.drop(rig.peer().worker, rig.peer().incarnation)
        rig.importer_source._wrap = HeldImporter
        again = rig.ask(PROMPT, remaining_s=left_s)
        assert isinstance(await rig.handoffs.fetch(again, rig.peer()), Committed)


async def test_what_p_said_while_d_itself_was_stopped_still_counts(
    leap: Callable[[float], Awaitable[None]],
) -> None:
    """D's loop stands still for longer than the bound, and P's chunks lie in the socket."""
    async with Rig(config=BRIEF) as rig:
        go: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        rig.filler.gate = lambda step: asyncio.shield(go)
        ask = dataclasses.replace(rig.ask(PROMPT, remaining_s=20.0), further=1)
        task = asyncio.create_task(rig.handoffs.fetch(ask, rig.peer()))
        await rig.prefill_trail.wait(Lifecycle.PREFILL_QUEUED)
        go.set_result(None)
        await leap(4 * BRIEF.silence_s)
        assert isinstance(await task, Committed)
