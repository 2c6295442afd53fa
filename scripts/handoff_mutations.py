"""Break the handoff's tables on purpose, one row at a time, and ask whether the exploration notices.

    PYTHONPATH=src python scripts/handoff_mutations.py [NAME ...]

Prints one line per mutation with the violation that caught it; exits with 1 when one survives.
"""

import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "model"))

from handoff_explorer import Violation, explore
from handoff_instances import small

from pdserve.kvtransfer.handoff import decode_side as d
from pdserve.kvtransfer.handoff import events as ev
from pdserve.kvtransfer.handoff import prefill_side as p
from pdserve.kvtransfer.handoff.states import DecodeState, PrefillState
from pdserve.kvtransfer.handoff.table import Row, Table, always, unchanged

D, P = DecodeState, PrefillState
Rows = tuple[Row, ...]


@dataclass(frozen=True)
class Mutation:
    """One defect: which side's table it is in, how the rows change, and the smallest world that shows it."""

    name: str
    side: str
    change: Callable[[Rows], Rows]
    instance: str = "one handoff"


def at(rows: Rows, state: object, event: type, guard: object | None = None) -> int:
    """The first row of (state, event), with that guard if one is given."""
    for index, row in enumerate(rows):
        if row.state is state and row.event is event and guard in (None, row.guard):
            return index
    raise LookupError(f"no row for {event.__name__} in {state}")


def edit(state: object, event: type, which: object | None = None, /, **fields: Any) -> Callable[[Rows], Rows]:
    """Replace fields of one row; `which` is its guard where (state, event) has several."""

    def change(rows: Rows) -> Rows:
        index = at(rows, state, event, which)
        return (*rows[:index], replace(rows[index], **fields), *rows[index + 1 :])

    return change


def swap(state: object, event: type, first: object, second: object) -> Callable[[Rows], Rows]:
    """Exchange the order of two rows."""

    def change(rows: Rows) -> Rows:
        edited = list(rows)
        one, other = at(rows, state, event, first), at(rows, state, event, second)
        edited[one], edited[other] = edited[other], edited[one]
        return tuple(edited)

    return change


def drop(state: object, event: type, guard: object | None = None) -> Callable[[Rows], Rows]:
    """Leave one row out."""

    def change(rows: Rows) -> Rows:
        index = at(rows, state, event, guard)
        return rows[:index] + rows[index + 1 :]

    return change


def every(*changes: Callable[[Rows], Rows]) -> Callable[[Rows], Rows]:
    def change(rows: Rows) -> Rows:
        for one in changes:
            rows = one(rows)
        return rows

    return change


def free_at_once(rows: Rows) -> Rows:
    """Wherever blocks go to quarantine, free them."""
    return tuple(
        replace(row, do=tuple(d.free_blocks if make is d.quarantine else make for make in row.do))
        for row in rows
    )


def landed_is_enough(machine: d.DecodeHandoff, event: object) -> bool:
    return machine.filled and not machine.writing


def checked_is_enough(machine: d.DecodeHandoff, event: object) -> bool:
    return machine.filled and not machine.checking


def announced_is_enough(machine: d.DecodeHandoff, event: object) -> bool:
    return bool(machine.ends) and not machine.writing and not machine.checking


def readers_are_enough(machine: p.PrefillHandoff, event: object) -> bool:
    return not machine.serving


def engine_is_enough(machine: p.PrefillHandoff, event: object) -> bool:
    return not machine.running


def forget_writers(machine: d.DecodeHandoff, event: object) -> d.DecodeHandoff:
    return replace(d.forget(machine, event), writing=frozenset(), checking=frozenset())


def one_rank_is_enough(machine: d.DecodeHandoff, event: ev.ChunkLanded) -> d.DecodeHandoff:
    landed = d.note_landed(machine, event)
    return replace(landed, writing=frozenset(part for part in landed.writing if part[0] != event.seq))


def one_part_is_enough(machine: p.PrefillHandoff, event: ev.PartFilled) -> p.PrefillHandoff:
    return replace(machine, running=frozenset())


RELEASE_FROM_FILLING = (
    Row(P.FILLING, ev.ReleaseAsked, P.RELEASED, (p.send_released, p.unpin), always, p.note_release),
)

MUTATIONS = (
    Mutation("D commits on any last word", "D", edit(D.VERIFIED, ev.Released, d.is_ok, guard=always)),
    Mutation(
        "D commits without asking for the release",
        "D",
        edit(D.FETCHING, ev.Settle, next=D.COMMITTED, do=(d.commit,)),
    ),
    Mutation(
        "D commits as soon as the stream closes",
        "D",
        edit(D.VERIFIED, ev.StreamClosed, next=D.COMMITTED, do=(d.commit,)),
    ),
    Mutation("D does not wait for digests", "D", edit(D.FETCHING, ev.Settle, guard=landed_is_enough)),
    Mutation("D does not wait for landing", "D", edit(D.FETCHING, ev.Settle, guard=checked_is_enough)),
    Mutation("D does not wait for Filled", "D", edit(D.FETCHING, ev.Settle, guard=announced_is_enough)),
    Mutation(
        "D takes a mismatch for a match",
        "D",
        edit(D.FETCHING, ev.ChunkMismatched, next=D.FETCHING, do=(), update=d.note_checked),
    ),
    Mutation(
        "D takes a failed copy for a good one",
        "D",
        edit(D.FETCHING, ev.ChunkFailed, next=D.FETCHING, do=(), update=d.note_written),
    ),
    Mutation(
        "D does not compare P's counts",
        "D",
        every(
            *(edit(state, ev.Filled, d.agrees, guard=always) for state in (D.OPEN, D.RESERVED, D.FETCHING))
        ),
        "three chunks",
    ),
    Mutation("D frees instead of quarantining", "D", free_at_once),
    Mutation("D does not wait for the drain", "D", edit(D.ABORTED, ev.Settle, guard=always)),
    Mutation(
        "D forgets its writers on a cancel",
        "D",
        edit(D.FETCHING, ev.Cancelled, update=forget_writers),
    ),
    Mutation("D skips the release of its blocks", "D", edit(D.ABORTED, ev.Settle, next=D.RELEASED, do=())),
    Mutation(
        "D reserves but for later chunks only",
        "D",
        swap(D.OPEN, ev.ChunkReady, d.is_first_chunk, d.is_next_chunk),
    ),
    Mutation("D never asks for memory again", "D", edit(D.OPEN, ev.MemoryFreed, do=()), "one pool"),
    Mutation(
        "D fetches before it has reserved",
        "D",
        edit(
            D.OPEN,
            ev.ChunkReady,
            d.is_first_chunk,
            next=D.FETCHING,
            do=(d.grant_chunk,),
            update=d.note_chunk_granted,
        ),
    ),
    Mutation(
        "D counts a chunk as landed after one rank",
        "D",
        edit(D.FETCHING, ev.ChunkLanded, update=one_rank_is_enough),
        "two ranks",
    ),
    Mutation("D does not notice a closed stream", "D", drop(D.RESERVED, ev.StreamClosed)),
    Mutation(
        "D waits on in OPEN when its time is over",
        "D",
        edit(D.OPEN, ev.StateExpired, next=D.OPEN, do=(), update=unchanged),
        "a stall",
    ),
    Mutation(
        "D waits on for Released when its time is over",
        "D",
        edit(D.VERIFIED, ev.StateExpired, next=D.VERIFIED, do=(), update=unchanged),
        "a stall",
    ),
    Mutation(
        "D forgets its writers when FETCHING expires",
        "D",
        edit(D.FETCHING, ev.StateExpired, update=forget_writers),
    ),
    Mutation(
        "D commits when nobody says Released",
        "D",
        edit(D.VERIFIED, ev.StateExpired, next=D.COMMITTED, do=(d.commit,)),
    ),
    Mutation("P unpins when FILLING expires", "P", edit(P.FILLING, ev.StateExpired, do=(p.unpin,))),
    Mutation("P answers ok while it fills", "P", lambda rows: RELEASE_FROM_FILLING + rows, "early release"),
    Mutation(
        "P releases under a reader",
        "P",
        edit(P.FILLED, ev.Settle, guard=p.is_closing),
    ),
    Mutation("P drains without its readers", "P", edit(P.ABORTED, ev.Settle, guard=engine_is_enough)),
    Mutation("P drains without its engine", "P", edit(P.ABORTED, ev.Settle, guard=readers_are_enough)),
    Mutation("P keeps its pins after ok", "P", edit(P.FILLED, ev.Settle, do=(p.send_released,))),
    Mutation("P keeps its pins after an abort", "P", edit(P.ABORTED, ev.Settle, next=P.RELEASED, do=())),
    Mutation("P never says Released", "P", edit(P.FILLED, ev.Settle, do=(p.unpin,)), "one handoff"),
    Mutation(
        "P is filled when its first rank is",
        "P",
        edit(P.FILLING, ev.PartFilled, update=one_part_is_enough),
        "two ranks",
    ),
    Mutation("P unpins when it cancels", "P", edit(P.FILLING, ev.Cancelled, do=(p.unpin,))),
    Mutation("P refuses every grant", "P", drop(P.FILLED, ev.GrantAsked, p.is_servable)),
    Mutation(
        "P does not give way under pressure",
        "P",
        edit(P.FILLED, ev.MemoryPressure, update=unchanged),
        "hold and wait",
    ),
    Mutation(
        "P stays when the stream closes",
        "P",
        edit(P.FILLED, ev.StreamClosed, next=P.FILLED, do=(), update=unchanged),
    ),
)


def caught(mutation: Mutation) -> str | None:
    """The violation that the exploration found, None where the mutation survived."""
    rows = d.DECODE_TABLE.rows if mutation.side == "D" else p.PREFILL_TABLE.rows
    table: Table[Any] = Table(mutation.change(rows))
    tables = {"decode_table" if mutation.side == "D" else "prefill_table": table}
    try:
        explore(small(**tables)[mutation.instance])
    except Violation as violation:
        return str(violation)
    return None


def main(names: Iterable[str]) -> int:
    wanted = set(names)
    survivors = 0
    for mutation in MUTATIONS:
        if wanted and mutation.name not in wanted:
            continue
        began = time.perf_counter()
        violation = caught(mutation)
        survivors += violation is None
        told = "SURVIVED" if violation is None else violation.splitlines()[0]
        print(f"{mutation.name:46} {mutation.instance:15} {time.perf_counter() - began:5.1f} s  {told[:140]}")
    print(f"{survivors} of {len(wanted) or len(MUTATIONS)} mutations survived")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
