"""The tables of both sides: what is legal, what is ignored, what is a defect and how it is told."""

import ast
import dataclasses
from pathlib import Path

import pytest

from pdserve.kvtransfer.handoff import events as ev
from pdserve.kvtransfer.handoff import instructions as do
from pdserve.kvtransfer.handoff import table as table_module
from pdserve.kvtransfer.handoff.decode_side import DECODE_TABLE, DecodeHandoff
from pdserve.kvtransfer.handoff.prefill_side import PREFILL_TABLE, PrefillHandoff
from pdserve.kvtransfer.handoff.states import DecodeState, Outcome, PrefillState, ReleaseStatus
from pdserve.kvtransfer.handoff.table import IllegalTransition, Transcript

FROM_P = (
    ev.Opened(),
    ev.Rejected(),
    ev.ChunkReady(0, 0, 1),
    ev.Filled(1, 16),
    ev.Released(ReleaseStatus.OK),
    ev.Released(ReleaseStatus.EXPIRED),
    ev.SourceFailed(0),
    ev.PeerAborted(),
    ev.StreamClosed(),
    ev.Violation(),
)
FROM_D = (ev.GrantAsked(0), ev.ReleaseAsked(), ev.PeerAborted(), ev.StreamClosed(), ev.Violation())
LIVE_D = (DecodeState.OPEN, DecodeState.RESERVED, DecodeState.FETCHING, DecodeState.VERIFIED)
LIVE_P = (PrefillState.OPEN, PrefillState.FILLING, PrefillState.FILLED)


def decode_story(*events: object, tokens: int = 16, ranks: int = 1) -> Transcript[DecodeHandoff]:
    transcript = Transcript(DECODE_TABLE, DecodeHandoff(tokens, ranks))
    for event in events:
        transcript.feed(event)
    return transcript


def prefill_story(*events: object) -> Transcript[PrefillHandoff]:
    transcript = Transcript(PREFILL_TABLE, PrefillHandoff())
    for event in events:
        transcript.feed(event)
    return transcript


FETCHING = (ev.Started(), ev.Opened(), ev.Connected(), ev.ChunkReady(0, 0, 1), ev.BlocksReserved(0))
VERIFIED = (*FETCHING, ev.Filled(1, 16), ev.ChunkLanded(0, 0), ev.ChunkVerified(0, 0))
FILLED = (ev.Accepted(), ev.Admitted(), ev.ChunkComputed(), ev.PartFilled(0, 0))


def test_the_straight_way_of_d() -> None:
    transcript = decode_story()
    assert transcript.feed(ev.Started()) == (do.SendOpen(),)
    assert transcript.feed(ev.Opened()) == (do.Connect(),)
    assert transcript.feed(ev.ChunkReady(0, 0, 1)) == (do.Reserve(),)
    assert transcript.feed(ev.BlocksReserved(0)) == ()
    assert transcript.machine.state is DecodeState.RESERVED
    assert transcript.feed(ev.Connected()) == (do.SendGrant(0), do.Fetch(0, 0))
    assert transcript.feed(ev.ChunkLanded(0, 0)) == (do.Verify(0, 0),)
    assert transcript.feed(ev.ChunkVerified(0, 0)) == ()
    assert transcript.machine.state is DecodeState.FETCHING
    assert transcript.feed(ev.Filled(1, 16)) == (do.SendRelease(),)
    assert transcript.feed(ev.Released(ReleaseStatus.OK)) == (do.Commit(),)
    assert transcript.machine.state is DecodeState.COMMITTED


def test_the_straight_way_of_p() -> None:
    transcript = prefill_story()
    assert transcript.feed(ev.Accepted()) == (do.SendOpened(),)
    assert transcript.feed(ev.Admitted()) == (do.StartFill(),)
    assert transcript.feed(ev.ChunkComputed()) == (do.SendChunk(0),)
    assert transcript.feed(ev.GrantAsked(0)) == (do.Serve(0, 0),)
    assert transcript.feed(ev.PartFilled(0, 0)) == (do.SendFilled(1),)
    assert transcript.feed(ev.ReleaseAsked()) == ()  # a transport still reads
    assert transcript.feed(ev.ServeDone(0, 0)) == (do.SendReleased(ReleaseStatus.OK), do.Unpin())
    assert transcript.machine.state is PrefillState.RELEASED


def test_machines_are_values() -> None:
    machine = decode_story(*FETCHING).machine
    assert hash(machine) == hash(dataclasses.replace(machine))
    after, _ = DECODE_TABLE.advance(machine, ev.ChunkLanded(0, 0))
    assert machine.writing == {(0, 0)}
    assert after.writing == frozenset()
    with pytest.raises(dataclasses.FrozenInstanceError):
        machine.state = DecodeState.OPEN  # type: ignore[misc]


def test_a_defect_is_told_with_the_handoffs_story() -> None:
    transcript = decode_story(ev.Started(), ev.Opened())
    with pytest.raises(IllegalTransition) as caught:
        transcript.feed(ev.ChunkLanded(0, 0))
    assert caught.value.story == (("open", "Started"), ("open", "Opened"), ("open", "ChunkLanded"))
    assert "Started in open > Opened in open > ChunkLanded in open" in caught.value.message
    assert transcript.machine.state is DecodeState.OPEN


@pytest.mark.parametrize("event", FROM_P, ids=lambda event: type(event).__name__)
@pytest.mark.parametrize("state", LIVE_D)
def test_d_has_an_answer_to_every_message_in_every_state(state: DecodeState, event: object) -> None:
    machine = dataclasses.replace(decode_story(*FETCHING).machine, state=state)
    DECODE_TABLE.advance(machine, event)


@pytest.mark.parametrize("event", FROM_D, ids=lambda event: type(event).__name__)
@pytest.mark.parametrize("state", LIVE_P)
def test_p_has_an_answer_to_every_message_in_every_state(state: PrefillState, event: object) -> None:
    machine = dataclasses.replace(prefill_story(*FILLED).machine, state=state)
    PREFILL_TABLE.advance(machine, event)


def test_who_gave_up_ignores_the_peer() -> None:
    """What the exploration takes for granted when it forgets the inbox of such a side."""
    decode = decode_story(*FETCHING, ev.Cancelled()).machine
    assert decode.state is DecodeState.ABORTED
    for event in (
        *FROM_P,
        ev.Cancelled(),
        ev.DeadlinePassed(),
        ev.StateExpired(),
        ev.Connected(),
        ev.ConnectFailed(),
    ):
        assert DECODE_TABLE.advance(decode, event) == (decode, ())
    prefill = prefill_story(ev.Accepted(), ev.Admitted(), ev.Cancelled()).machine
    assert prefill.state is PrefillState.ABORTED
    for event in (*FROM_D, ev.Cancelled(), ev.DeadlinePassed(), ev.StateExpired(), ev.ChunkComputed()):
        assert PREFILL_TABLE.advance(prefill, event) == (prefill, ())


@pytest.mark.parametrize(
    "last_words",
    [ev.Rejected(), ev.Released(ReleaseStatus.CACHED), ev.PeerAborted(), ev.SourceFailed(0)],
    ids=lambda event: type(event).__name__,
)
@pytest.mark.parametrize("state", LIVE_D)
def test_last_words_end_every_live_state(state: DecodeState, last_words: object) -> None:
    """What the exploration takes for granted when it forgets what comes behind them."""
    machine = dataclasses.replace(decode_story(*FETCHING).machine, state=state)
    after, _ = DECODE_TABLE.advance(machine, last_words)
    assert after.state in (DecodeState.ABORTED, DecodeState.DRAINED)


def test_terminal_states_take_no_event() -> None:
    committed = decode_story(*VERIFIED, ev.Released(ReleaseStatus.OK))
    with pytest.raises(IllegalTransition):
        committed.feed(ev.Cancelled())
    released = prefill_story(*FILLED, ev.ReleaseAsked())
    with pytest.raises(IllegalTransition):
        released.feed(ev.StreamClosed())


@pytest.mark.parametrize("status", [ReleaseStatus.EXPIRED, ReleaseStatus.CACHED])
def test_only_ok_commits_even_after_verified(status: ReleaseStatus) -> None:
    transcript = decode_story(*VERIFIED)
    instructions = transcript.feed(ev.Released(status))
    assert do.FreeBlocks() in instructions
    assert do.Commit() not in instructions
    assert transcript.machine.state is DecodeState.DRAINED


@pytest.mark.parametrize(
    "chunk",
    [ev.ChunkReady(1, 0, 1), ev.ChunkReady(0, 1, 2), ev.ChunkReady(0, 0, 0), ev.ChunkReady(0, 0, 3)],
    ids=["seq", "first", "empty", "too long"],
)
def test_chunks_come_in_order_and_within_the_prompt(chunk: ev.ChunkReady) -> None:
    transcript = decode_story(ev.Started(), ev.Opened(), tokens=32)
    assert any(
        isinstance(item, do.Finish) and item.outcome is Outcome.PROTOCOL for item in transcript.feed(chunk)
    )


@pytest.mark.parametrize("filled", [ev.Filled(2, 16), ev.Filled(1, 15), ev.Filled(0, 16)])
def test_counts_that_differ_abort(filled: ev.Filled) -> None:
    transcript = decode_story(*FETCHING)
    assert do.Quarantine() in transcript.feed(filled)
    assert transcript.machine.state is DecodeState.ABORTED


def test_a_chunk_that_d_holds_is_not_fetched() -> None:
    events = (ev.Started(), ev.Opened(), ev.Connected(), ev.ChunkReady(0, 0, 1))
    transcript = decode_story(*events, tokens=40)
    assert transcript.feed(ev.BlocksReserved(1)) == ()
    assert transcript.feed(ev.ChunkReady(1, 1, 3)) == (do.SendGrant(1), do.Fetch(1, 0))


def test_a_refused_reservation_is_asked_again_when_memory_is_free() -> None:
    transcript = decode_story(ev.Started(), ev.Opened(), ev.ChunkReady(0, 0, 1))
    assert transcript.feed(ev.ReserveRefused()) == ()
    assert transcript.machine.wants_memory
    assert transcript.feed(ev.MemoryFreed()) == (do.Reserve(),)
    assert transcript.feed(ev.BlocksReserved(0)) == ()
    assert not transcript.machine.wants_memory


def test_a_cancel_in_reserved_frees_at_once() -> None:
    transcript = decode_story(ev.Started(), ev.Opened(), ev.ChunkReady(0, 0, 1), ev.BlocksReserved(0))
    instructions = transcript.feed(ev.Cancelled("enough"))
    assert instructions == (
        do.SendAbort("enough"),
        do.Finish(Outcome.CANCELLED, "enough (while reserved)"),
        do.FreeBlocks(),
    )


def test_a_cancel_in_fetching_waits_for_every_rank() -> None:
    transcript = decode_story(*FETCHING, ranks=2)
    assert do.Quarantine() in transcript.feed(ev.Cancelled())
    assert transcript.feed(ev.ChunkLanded(0, 1)) == ()
    assert transcript.feed(ev.ChunkFailed(0, 0)) == (do.FreeBlocks(),)
    transcript.feed(ev.BlocksFreed())
    assert transcript.machine.state is DecodeState.RELEASED


def test_filled_needs_every_part() -> None:
    parts = frozenset({(0, 0), (1, 0)})
    transcript = Transcript(PREFILL_TABLE, PrefillHandoff(parts=parts))
    for event in (ev.Accepted(), ev.Admitted(), ev.ChunkComputed()):
        transcript.feed(event)
    assert transcript.feed(ev.PartFilled(1, 0)) == ()
    assert transcript.feed(ev.PartFilled(0, 0)) == (do.SendFilled(1),)


def test_pressure_answers_cached_and_later_grants_fail() -> None:
    transcript = prefill_story(*FILLED, ev.GrantAsked(0))
    assert transcript.feed(ev.MemoryPressure()) == ()
    assert transcript.feed(ev.GrantAsked(0)) == (do.SendSourceFailed(0, "released as cached"),)
    assert transcript.feed(ev.ReleaseAsked()) == ()
    assert transcript.feed(ev.ServeDone(0, 0)) == (do.SendReleased(ReleaseStatus.CACHED), do.Unpin())


def test_the_machines_are_pure() -> None:
    folder = Path(table_module.__file__).parent
    banned = {"asyncio", "grpc", "torch", "ray", "redis", "time", "threading", "random", "numpy"}
    for name in ("states", "events", "instructions", "table", "decode_side", "prefill_side"):
        tree = ast.parse((folder / f"{name}.py").read_text())
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert banned.isdisjoint(part.split(".")[0] for part in names), f"{name} imports {names}"
