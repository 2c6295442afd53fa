"""D's side of a handoff, as a table. No I/O and no clock: the shell is consumer.py.

    OPEN ──► RESERVED ──► FETCHING ──► VERIFIED ──► COMMITTED
      └─────────┴────────────┴────────────┴──► ABORTED ──► DRAINED ──► RELEASED

The promise is taken before the first event. Blocks are taken at the first ChunkReady, all at once. Only
RELEASED(ok) from P commits; whatever else ends the conversation discards what was copied.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from pdserve.core.types import blocks_for
from pdserve.kvtransfer.handoff import events as ev
from pdserve.kvtransfer.handoff import instructions as do
from pdserve.kvtransfer.handoff.states import DecodeState as S
from pdserve.kvtransfer.handoff.states import Outcome, ReleaseStatus
from pdserve.kvtransfer.handoff.table import Row, Table, always

Instructions = tuple[do.Instruction, ...]
Maker = Callable[[Any, Any], Instructions]
Guard = Callable[[Any, Any], bool]

TERMINAL = frozenset({S.COMMITTED, S.RELEASED})


@dataclass(frozen=True, slots=True)
class DecodeHandoff:
    """One handoff at D. `tokens` positions travel; `num_ranks` consumer ranks each copy their share."""

    tokens: int
    num_ranks: int = 1
    state: S = S.OPEN
    opened: bool = False
    connected: bool = False
    ends: tuple[int, ...] = ()
    """Block index behind each announced chunk."""
    reused: int = 0
    """Leading blocks that D held already."""
    filled: bool = False
    writing: frozenset[ev.Part] = frozenset()
    """(chunk, rank) that a transport may still write."""
    checking: frozenset[ev.Part] = frozenset()
    """(chunk, rank) whose bytes are here, digests not checked yet."""

    @property
    def terminal(self) -> bool:
        return self.state in TERMINAL

    @property
    def wants_memory(self) -> bool:
        """A chunk is ready and the pool had no room for the request so far."""
        return self.state is S.OPEN and bool(self.ends)

    def parts(self, seq: int) -> frozenset[ev.Part]:
        """The copies that chunk `seq` takes; none if D holds all of it."""
        wanted = range(self.num_ranks if self.ends[seq] > self.reused else 0)
        return frozenset((seq, rank) for rank in wanted)


# Guards: may this row fire?


def is_new(machine: DecodeHandoff, event: object) -> bool:
    return not machine.opened


def is_next_chunk(machine: DecodeHandoff, event: ev.ChunkReady) -> bool:
    """It begins where the last one ended and lies inside the prompt, of which P has not said the end yet."""
    expected = machine.ends[-1] if machine.ends else 0
    in_order = event.seq == len(machine.ends) and event.first == expected < event.end
    return machine.opened and not machine.filled and in_order and event.end <= blocks_for(machine.tokens)


def is_first_chunk(machine: DecodeHandoff, event: ev.ChunkReady) -> bool:
    return not machine.ends and is_next_chunk(machine, event)


def agrees(machine: DecodeHandoff, event: ev.Filled) -> bool:
    """P's counts are D's: nothing was lost on the way, and the prompt is whole."""
    whole = bool(machine.ends) and machine.ends[-1] == blocks_for(machine.tokens)
    return event.chunks == len(machine.ends) and event.tokens == machine.tokens and whole


def wants_memory(machine: DecodeHandoff, event: object) -> bool:
    return machine.wants_memory


def is_connected(machine: DecodeHandoff, event: object) -> bool:
    return machine.connected


def is_writing(machine: DecodeHandoff, event: ev.ChunkLanded | ev.ChunkFailed) -> bool:
    return (event.seq, event.rank) in machine.writing


def is_checking(machine: DecodeHandoff, event: ev.ChunkVerified | ev.ChunkMismatched) -> bool:
    return (event.seq, event.rank) in machine.checking


def is_complete(machine: DecodeHandoff, event: object) -> bool:
    """Every chunk is announced, has landed on every rank, and is checked."""
    return machine.filled and not machine.writing and not machine.checking


def is_quiet(machine: DecodeHandoff, event: object) -> bool:
    """No transport can write, nobody reads what landed."""
    return not machine.writing and not machine.checking


def is_ok(machine: DecodeHandoff, event: ev.Released) -> bool:
    return event.status is ReleaseStatus.OK


def is_not_ok(machine: DecodeHandoff, event: ev.Released) -> bool:
    return event.status is not ReleaseStatus.OK


# Updates: what else changes?


def note_opened(machine: DecodeHandoff, event: object) -> DecodeHandoff:
    return replace(machine, opened=True)


def note_connected(machine: DecodeHandoff, event: object) -> DecodeHandoff:
    return replace(machine, connected=True)


def note_chunk(machine: DecodeHandoff, event: ev.ChunkReady) -> DecodeHandoff:
    return replace(machine, ends=(*machine.ends, event.end))


def note_chunk_granted(machine: DecodeHandoff, event: ev.ChunkReady) -> DecodeHandoff:
    machine = note_chunk(machine, event)
    return replace(machine, writing=machine.writing | machine.parts(event.seq))


def note_backlog_granted(machine: DecodeHandoff, event: object) -> DecodeHandoff:
    granted = (machine.parts(seq) for seq in range(len(machine.ends)))
    return replace(machine, writing=machine.writing.union(*granted))


def note_filled(machine: DecodeHandoff, event: object) -> DecodeHandoff:
    return replace(machine, filled=True)


def note_reserved(machine: DecodeHandoff, event: ev.BlocksReserved) -> DecodeHandoff:
    return replace(machine, reused=event.reused)


def note_landed(machine: DecodeHandoff, event: ev.ChunkLanded) -> DecodeHandoff:
    part = (event.seq, event.rank)
    return replace(machine, writing=machine.writing - {part}, checking=machine.checking | {part})


def note_written(machine: DecodeHandoff, event: ev.ChunkLanded | ev.ChunkFailed) -> DecodeHandoff:
    return replace(machine, writing=machine.writing - {(event.seq, event.rank)})


def note_checked(machine: DecodeHandoff, event: ev.ChunkVerified | ev.ChunkMismatched) -> DecodeHandoff:
    return replace(machine, checking=machine.checking - {(event.seq, event.rank)})


def forget(machine: DecodeHandoff, event: object) -> DecodeHandoff:
    """What P announced does not matter any more; who may still touch the blocks does."""
    return replace(machine, connected=False, ends=(), reused=0, filled=False)


def forget_failed(machine: DecodeHandoff, event: ev.ChunkFailed) -> DecodeHandoff:
    return forget(note_written(machine, event), event)


def forget_mismatched(machine: DecodeHandoff, event: ev.ChunkMismatched) -> DecodeHandoff:
    return forget(note_checked(machine, event), event)


# Makers: what must the shell do?


def send_open(machine: DecodeHandoff, event: object) -> Instructions:
    return (do.SendOpen(),)


def connect(machine: DecodeHandoff, event: object) -> Instructions:
    return (do.Connect(),)


def reserve(machine: DecodeHandoff, event: object) -> Instructions:
    return (do.Reserve(),)


def _grant(parts: frozenset[ev.Part]) -> Instructions:
    sends = (do.SendGrant(seq) for seq in sorted({seq for seq, _ in parts}))
    return (*sends, *(do.Fetch(seq, rank) for seq, rank in sorted(parts)))


def grant_chunk(machine: DecodeHandoff, event: ev.ChunkReady) -> Instructions:
    return _grant(note_chunk(machine, event).parts(event.seq))


def grant_backlog(machine: DecodeHandoff, event: object) -> Instructions:
    return _grant(note_backlog_granted(machine, event).writing)


def check(machine: DecodeHandoff, event: ev.ChunkLanded) -> Instructions:
    return (do.Verify(event.seq, event.rank),)


def send_release(machine: DecodeHandoff, event: object) -> Instructions:
    return (do.SendRelease(),)


def commit(machine: DecodeHandoff, event: object) -> Instructions:
    return (do.Commit(),)


def quarantine(machine: DecodeHandoff, event: object) -> Instructions:
    return (do.Quarantine(),)


def free_blocks(machine: DecodeHandoff, event: object) -> Instructions:
    return (do.FreeBlocks(),)


def send_abort(machine: DecodeHandoff, event: object) -> Instructions:
    reason = getattr(event, "reason", "") or type(event).__name__
    return (do.SendAbort(reason),)


def finish(outcome: Outcome, text: str) -> Maker:
    """Tell the caller why: the event's own reason, `text` where it has none."""

    def make(machine: DecodeHandoff, event: object) -> Instructions:
        reason = getattr(event, "reason", "") or text
        return (do.Finish(outcome, f"{reason} (while {machine.state})"),)

    return make


def finish_unexpected(machine: DecodeHandoff, event: object) -> Instructions:
    said = f"P sent {event} when it was not its turn (while {machine.state})"
    return (do.Finish(Outcome.PROTOCOL, said),)


def finish_expired(machine: DecodeHandoff, event: ev.Released) -> Instructions:
    said = f"P released the blocks as {event.status} before D had them (while {machine.state})"
    return (do.Finish(Outcome.EXPIRED, said),)


def finish_rejected(machine: DecodeHandoff, event: ev.Rejected) -> Instructions:
    return (do.Finish(event.outcome, event.reason, event.retry_after_s),)


def _endings(state: S) -> tuple[Row, ...]:
    """How a live state is left early. Only FETCHING has transports to wait for."""
    hold = (quarantine,) if state is S.FETCHING else ()

    def ending(event: type, end: Maker, *, tell: bool, guard: Guard = always) -> Row:
        said = (send_abort,) if tell else ()
        return Row(state, event, S.ABORTED, (*hold, *said, end), guard, forget)

    return (
        ending(ev.Cancelled, finish(Outcome.CANCELLED, "cancelled"), tell=True),
        ending(ev.DeadlinePassed, finish(Outcome.DEADLINE, "the deadline passed"), tell=True),
        ending(ev.StateExpired, finish(Outcome.STALLED, "P does not get on"), tell=True),
        ending(ev.Violation, finish(Outcome.PROTOCOL, "P broke the protocol"), tell=True),
        ending(ev.StreamClosed, finish(Outcome.LOST, "the stream closed"), tell=False),
        ending(ev.PeerAborted, finish(Outcome.FAILED, "P gave up"), tell=False),
        ending(ev.SourceFailed, finish(Outcome.LOST, "P could not serve a chunk"), tell=True),
        ending(ev.Released, finish_expired, tell=False, guard=is_not_ok),
        # In a state without a row of its own above these, such a message is out of order.
        ending(ev.Opened, finish_unexpected, tell=True),
        ending(ev.Rejected, finish_unexpected, tell=True),
        ending(ev.ChunkReady, finish_unexpected, tell=True),
        ending(ev.Filled, finish_unexpected, tell=True),
        ending(ev.Released, finish_unexpected, tell=True),
    )


def _ignored(state: S, *events: type) -> tuple[Row, ...]:
    return tuple(Row(state, event, state) for event in events)


LOST_WAY = finish(Outcome.LOST, "no bytes come through")
CORRUPTED = finish(Outcome.CORRUPT, "digests differ")

OPEN_ROWS = (
    Row(S.OPEN, ev.Started, S.OPEN, (send_open,)),
    Row(S.OPEN, ev.Opened, S.OPEN, (connect,), is_new, note_opened),
    Row(S.OPEN, ev.Rejected, S.ABORTED, (finish_rejected,), is_new, forget),
    Row(S.OPEN, ev.Connected, S.OPEN, update=note_connected),
    Row(S.OPEN, ev.ConnectFailed, S.ABORTED, (send_abort, LOST_WAY), update=forget),
    Row(S.OPEN, ev.ChunkReady, S.OPEN, (reserve,), is_first_chunk, note_chunk),
    Row(S.OPEN, ev.ChunkReady, S.OPEN, (), is_next_chunk, note_chunk),
    Row(S.OPEN, ev.Filled, S.OPEN, (), agrees, note_filled),
    Row(S.OPEN, ev.ReserveRefused, S.OPEN),
    Row(S.OPEN, ev.MemoryFreed, S.OPEN, (reserve,), wants_memory),
    Row(S.OPEN, ev.BlocksReserved, S.RESERVED, (), wants_memory, note_reserved),
    *_endings(S.OPEN),
)

RESERVED_ROWS = (
    Row(S.RESERVED, ev.Connected, S.RESERVED, update=note_connected),
    Row(S.RESERVED, ev.ConnectFailed, S.ABORTED, (send_abort, LOST_WAY), update=forget),
    Row(S.RESERVED, ev.ChunkReady, S.RESERVED, (), is_next_chunk, note_chunk),
    Row(S.RESERVED, ev.Filled, S.RESERVED, (), agrees, note_filled),
    Row(S.RESERVED, ev.Settle, S.FETCHING, (grant_backlog,), is_connected, note_backlog_granted),
    *_endings(S.RESERVED),
)

FETCHING_ROWS = (
    Row(S.FETCHING, ev.ChunkReady, S.FETCHING, (grant_chunk,), is_next_chunk, note_chunk_granted),
    Row(S.FETCHING, ev.Filled, S.FETCHING, (), agrees, note_filled),
    Row(S.FETCHING, ev.ChunkLanded, S.FETCHING, (check,), is_writing, note_landed),
    Row(
        S.FETCHING,
        ev.ChunkFailed,
        S.ABORTED,
        (quarantine, send_abort, LOST_WAY),
        is_writing,
        forget_failed,
    ),
    Row(S.FETCHING, ev.ChunkVerified, S.FETCHING, (), is_checking, note_checked),
    Row(
        S.FETCHING,
        ev.ChunkMismatched,
        S.ABORTED,
        (quarantine, send_abort, CORRUPTED),
        is_checking,
        forget_mismatched,
    ),
    Row(S.FETCHING, ev.Settle, S.VERIFIED, (send_release,), is_complete),
    *_endings(S.FETCHING),
)

VERIFIED_ROWS = (
    Row(S.VERIFIED, ev.Released, S.COMMITTED, (commit,), is_ok),
    *_endings(S.VERIFIED),
)

ABORTED_ROWS = (
    Row(S.ABORTED, ev.ChunkLanded, S.ABORTED, (), is_writing, note_written),
    Row(S.ABORTED, ev.ChunkFailed, S.ABORTED, (), is_writing, note_written),
    Row(S.ABORTED, ev.ChunkVerified, S.ABORTED, (), is_checking, note_checked),
    Row(S.ABORTED, ev.ChunkMismatched, S.ABORTED, (), is_checking, note_checked),
    Row(S.ABORTED, ev.Settle, S.DRAINED, (free_blocks,), is_quiet),
    *_ignored(S.ABORTED, ev.Cancelled, ev.DeadlinePassed, ev.StateExpired, ev.StreamClosed, ev.Violation),
    *_ignored(S.ABORTED, ev.Connected, ev.ConnectFailed, ev.Opened, ev.Rejected, ev.ChunkReady, ev.Filled),
    *_ignored(S.ABORTED, ev.Released, ev.PeerAborted, ev.SourceFailed),
    Row(S.DRAINED, ev.BlocksFreed, S.RELEASED),
)

DECODE_TABLE: Table[DecodeHandoff] = Table(
    OPEN_ROWS + RESERVED_ROWS + FETCHING_ROWS + VERIFIED_ROWS + ABORTED_ROWS
)
