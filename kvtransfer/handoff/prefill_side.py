"""P's side of a handoff, as a table. No I/O and no clock: the shell is producer.py.

    OPEN ──► FILLING ──► FILLED ──► RELEASED
      └─────────┴───────────┴──► ABORTED ──► DRAINED ──► RELEASED

RELEASED(ok) is the commit point of the transaction. It is said only in FILLED, with the blocks still pinned
and nobody reading them any more.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from pdserve.kvtransfer.handoff import events as ev
from pdserve.kvtransfer.handoff import instructions as do
from pdserve.kvtransfer.handoff.states import PrefillState as S
from pdserve.kvtransfer.handoff.states import ReleaseStatus
from pdserve.kvtransfer.handoff.table import Row, Table

Instructions = tuple[do.Instruction, ...]
Maker = Callable[[Any, Any], Instructions]

ONE_PART = frozenset({(0, 0)})


@dataclass(frozen=True, slots=True)
class PrefillHandoff:
    """One handoff at P. `parts` are the (rank, stage) that fill; each chunk serves `num_ranks` readers."""

    parts: frozenset[ev.Part] = ONE_PART
    num_ranks: int = 1
    state: S = S.OPEN
    accepted: bool = False
    chunks: int = 0
    """Chunks announced so far."""
    running: frozenset[ev.Part] = frozenset()
    """(rank, stage) whose engine may still write."""
    serving: frozenset[ev.Part] = frozenset()
    """(chunk, consumer rank) that a transport may still read."""
    closing: ReleaseStatus | None = None
    """How it will be released once no transport reads."""

    @property
    def terminal(self) -> bool:
        return self.state is S.RELEASED


# Guards


def is_new(machine: PrefillHandoff, event: object) -> bool:
    return not machine.accepted


def is_accepted(machine: PrefillHandoff, event: object) -> bool:
    return machine.accepted


def is_running(machine: PrefillHandoff, event: ev.PartFilled | ev.PartFailed | ev.PartStopped) -> bool:
    return (event.rank, event.stage) in machine.running


def is_fill_over(machine: PrefillHandoff, event: object) -> bool:
    return not machine.running


def is_servable(machine: PrefillHandoff, event: ev.GrantAsked) -> bool:
    """The chunk is announced, still pinned for this reader, and not being read for it already."""
    busy = {seq for seq, _ in machine.serving}
    return machine.closing is None and event.seq < machine.chunks and event.seq not in busy


def is_closing(machine: PrefillHandoff, event: object) -> bool:
    return machine.closing is not None


def is_serving(machine: PrefillHandoff, event: ev.ServeDone | ev.ServeFailed) -> bool:
    return (event.seq, event.rank) in machine.serving


def may_release(machine: PrefillHandoff, event: object) -> bool:
    return machine.closing is not None and not machine.serving


def is_quiet(machine: PrefillHandoff, event: object) -> bool:
    """No engine can write, no transport can read."""
    return not machine.running and not machine.serving


# Updates


def note_accepted(machine: PrefillHandoff, event: object) -> PrefillHandoff:
    return replace(machine, accepted=True)


def note_fill_started(machine: PrefillHandoff, event: object) -> PrefillHandoff:
    return replace(machine, running=machine.parts)


def note_chunk(machine: PrefillHandoff, event: object) -> PrefillHandoff:
    return replace(machine, chunks=machine.chunks + 1)


def note_part_over(
    machine: PrefillHandoff, event: ev.PartFilled | ev.PartFailed | ev.PartStopped
) -> PrefillHandoff:
    return replace(machine, running=machine.running - {(event.rank, event.stage)})


def note_serving(machine: PrefillHandoff, event: ev.GrantAsked) -> PrefillHandoff:
    readers = frozenset((event.seq, rank) for rank in range(machine.num_ranks))
    return replace(machine, serving=machine.serving | readers)


def note_served(machine: PrefillHandoff, event: ev.ServeDone | ev.ServeFailed) -> PrefillHandoff:
    return replace(machine, serving=machine.serving - {(event.seq, event.rank)})


def note_release(machine: PrefillHandoff, event: object) -> PrefillHandoff:
    return replace(machine, closing=machine.closing or ReleaseStatus.OK)


def note_downgrade(machine: PrefillHandoff, event: object) -> PrefillHandoff:
    return replace(machine, closing=machine.closing or ReleaseStatus.CACHED)


def forget(machine: PrefillHandoff, event: object) -> PrefillHandoff:
    """What was announced does not matter any more; who may still touch the blocks does."""
    return replace(machine, chunks=0, closing=None)


def forget_failed_part(machine: PrefillHandoff, event: ev.PartFailed) -> PrefillHandoff:
    return forget(note_part_over(machine, event), event)


# Makers


def send_opened(machine: PrefillHandoff, event: object) -> Instructions:
    return (do.SendOpened(),)


def send_rejected(machine: PrefillHandoff, event: ev.Refused) -> Instructions:
    return (do.SendRejected(event.reason),)


def start_fill(machine: PrefillHandoff, event: object) -> Instructions:
    return (do.StartFill(),)


def send_chunk(machine: PrefillHandoff, event: object) -> Instructions:
    return (do.SendChunk(machine.chunks),)


def send_filled(machine: PrefillHandoff, event: object) -> Instructions:
    return (do.SendFilled(machine.chunks),)


def serve(machine: PrefillHandoff, event: ev.GrantAsked) -> Instructions:
    return tuple(do.Serve(event.seq, rank) for rank in range(machine.num_ranks))


def send_source_failed(machine: PrefillHandoff, event: ev.ServeFailed | ev.GrantAsked) -> Instructions:
    reason = getattr(event, "reason", "") or f"released as {machine.closing}"
    return (do.SendSourceFailed(event.seq, reason),)


def cancel_fill(machine: PrefillHandoff, event: object) -> Instructions:
    return (do.CancelFill(),)


def send_abort(machine: PrefillHandoff, event: object) -> Instructions:
    reason = getattr(event, "reason", "") or f"{type(event).__name__} in {machine.state}"
    return (do.SendAbort(reason),)


def send_expired(machine: PrefillHandoff, event: object) -> Instructions:
    return (do.SendReleased(ReleaseStatus.EXPIRED),)


def send_released(machine: PrefillHandoff, event: object) -> Instructions:
    return () if machine.closing is None else (do.SendReleased(machine.closing),)


def unpin(machine: PrefillHandoff, event: object) -> Instructions:
    return (do.Unpin(),)


def _endings(state: S) -> tuple[Row, ...]:
    """How a live state is left early. Only FILLING has an engine to stop."""
    stop = (cancel_fill,) if state is S.FILLING else ()

    def ending(event: type, *say: Maker) -> Row:
        return Row(state, event, S.ABORTED, (*stop, *say), update=forget)

    return (
        ending(ev.PeerAborted),
        ending(ev.StreamClosed),
        ending(ev.DeadlinePassed, send_expired),
        ending(ev.StateExpired, send_abort),
        ending(ev.Cancelled, send_abort),
        ending(ev.Violation, send_abort),
        # In a state without a row of its own above these, such a message is out of order.
        ending(ev.GrantAsked, send_abort),
        ending(ev.ReleaseAsked, send_abort),
    )


def _reading(state: S) -> tuple[Row, ...]:
    """Transports read while P fills and after."""
    return (
        Row(state, ev.GrantAsked, state, (serve,), is_servable, note_serving),
        Row(state, ev.ServeDone, state, (), is_serving, note_served),
        Row(state, ev.ServeFailed, state, (send_source_failed,), is_serving, note_served),
    )


def _ignored(state: S, *events: type) -> tuple[Row, ...]:
    return tuple(Row(state, event, state) for event in events)


OPEN_ROWS = (
    Row(S.OPEN, ev.Accepted, S.OPEN, (send_opened,), is_new, note_accepted),
    Row(S.OPEN, ev.Refused, S.ABORTED, (send_rejected,), is_new),
    Row(S.OPEN, ev.Admitted, S.FILLING, (start_fill,), is_accepted, note_fill_started),
    *_endings(S.OPEN),
)

FILLING_ROWS = (
    Row(S.FILLING, ev.ChunkComputed, S.FILLING, (send_chunk,), update=note_chunk),
    Row(S.FILLING, ev.PartFilled, S.FILLING, (), is_running, note_part_over),
    Row(S.FILLING, ev.PartFailed, S.ABORTED, (cancel_fill, send_abort), is_running, forget_failed_part),
    Row(S.FILLING, ev.Settle, S.FILLED, (send_filled,), is_fill_over),
    *_reading(S.FILLING),
    *_endings(S.FILLING),
)

FILLED_ROWS = (
    *_reading(S.FILLED),
    Row(S.FILLED, ev.GrantAsked, S.FILLED, (send_source_failed,), is_closing),
    Row(S.FILLED, ev.ReleaseAsked, S.FILLED, update=note_release),
    Row(S.FILLED, ev.MemoryPressure, S.FILLED, update=note_downgrade),
    Row(S.FILLED, ev.Settle, S.RELEASED, (send_released, unpin), may_release),
    *_endings(S.FILLED),
)

ABORTED_ROWS = (
    Row(S.ABORTED, ev.PartFilled, S.ABORTED, (), is_running, note_part_over),
    Row(S.ABORTED, ev.PartFailed, S.ABORTED, (), is_running, note_part_over),
    Row(S.ABORTED, ev.PartStopped, S.ABORTED, (), is_running, note_part_over),
    Row(S.ABORTED, ev.ServeDone, S.ABORTED, (), is_serving, note_served),
    Row(S.ABORTED, ev.ServeFailed, S.ABORTED, (), is_serving, note_served),
    Row(S.ABORTED, ev.Settle, S.DRAINED, (unpin,), is_quiet),
    *_ignored(S.ABORTED, ev.ChunkComputed, ev.GrantAsked, ev.ReleaseAsked),
    *_ignored(S.ABORTED, ev.PeerAborted, ev.StreamClosed, ev.Cancelled, ev.Violation),
    *_ignored(S.ABORTED, ev.DeadlinePassed, ev.StateExpired),
    Row(S.DRAINED, ev.Unpinned, S.RELEASED),
)

PREFILL_TABLE: Table[PrefillHandoff] = Table(OPEN_ROWS + FILLING_ROWS + FILLED_ROWS + ABORTED_ROWS)
