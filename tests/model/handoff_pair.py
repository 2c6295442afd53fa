"""One handoff as a closed world: both machines, the stream between them, transports, engine and pool entries.

The machines and tables are the real ones. Everything around them is as hostile as its contract allows: the
stream closes at any step and may lose what is still in it, a copy may fail or land damaged, the engine may
fail or stop short, and either side may give up or run out of time whenever it likes.

A pair's state is a tuple, its steps are computed once. What a step needs from the pools is a condition on it,
so pairs that share a pool are explored as a product (handoff_explorer.py).
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from pdserve.core.types import BLOCK_TOKENS
from pdserve.kvtransfer.handoff import events as ev
from pdserve.kvtransfer.handoff import instructions as do
from pdserve.kvtransfer.handoff.decode_side import DECODE_TABLE, DecodeHandoff
from pdserve.kvtransfer.handoff.prefill_side import PREFILL_TABLE, PrefillHandoff
from pdserve.kvtransfer.handoff.states import DecodeState, PrefillState, ReleaseStatus
from pdserve.kvtransfer.handoff.table import IllegalTransition, Table

NOTHING, RESERVED, LOADING, QUARANTINED, HELD, PREFIX = range(6)
"""D's entry for one block in the pool's books; PREFIX is a block of D's cache that this handoff pinned."""

EMPTY, GOOD, BAD = range(3)
"""What one rank's copy of a chunk really holds."""

FAIR, SQUEEZE, FAULT = range(3)
"""Steps that happen if one waits; a downgrade under pressure; steps that nobody can count on."""


LAST_WORDS = (ev.Rejected, ev.Released, ev.PeerAborted, ev.SourceFailed)
"""Whoever reads one of these ends or gives up: what comes behind it in the stream does not matter."""


class Violation(AssertionError):
    """A property does not hold; the message ends with the way there where the explorer knows it."""


class Pair(NamedTuple):
    decode: DecodeHandoff
    prefill: PrefillHandoff | None
    """None: P has not read Open."""
    to_prefill: tuple[object, ...] | None
    """None: this side reads nothing more."""
    to_decode: tuple[object, ...] | None
    open: bool
    """Whether the stream takes new messages."""
    connecting: bool
    refused: bool
    """The pool owes D a word when it has more room."""
    blocks: tuple[int, ...]
    """D's entry per chunk: a chunk is one block here."""
    content: tuple[int, ...]
    """Per (chunk, rank), row by row."""
    writers: frozenset[ev.Part]
    """Copies that may write D's blocks, whatever the machine believes."""
    checks: frozenset[ev.Part]
    pinned: bool
    """Whether P's blocks are this handoff's in the books of P's pool."""
    computed: int
    running: frozenset[ev.Part]
    """Engine parts that may write P's blocks, whatever the machine believes."""
    stopping: bool
    serves: frozenset[ev.Part]
    stalled: bool
    """P lives and reads, and nothing that it does or that is copied from it gets on, until it gives up."""
    stray: int
    """Releases that a broken D may still send whenever it likes."""


class Step(NamedTuple):
    label: object
    """What happens, for whoever reads the way to a violation."""
    kind: int
    after: Pair
    decode_needs: int = 0
    """Least free blocks of D's pool."""
    decode_lacks: int | None = None
    """Enabled only with fewer free blocks than that."""
    prefill_needs: int = 0


@dataclass(frozen=True)
class Bounds:
    """How large the world is, and which tables rule it."""

    chunks: int = 1
    ranks: int = 1
    reuse: tuple[int, ...] = (0,)
    """How many leading chunks D may turn out to hold when it reserves."""
    stray_releases: int = 0
    stalls: bool = False
    """Whether P may stop to get on, at any moment."""
    decode_table: Table[DecodeHandoff] = DECODE_TABLE
    prefill_table: Table[PrefillHandoff] = PREFILL_TABLE
    known: dict[tuple[object, object], Any] = field(default_factory=dict, compare=False, repr=False)
    """Transitions of the machines that were asked for before."""

    def initial(self) -> Pair:
        decode = DecodeHandoff(self.chunks * BLOCK_TOKENS, self.ranks)
        copies = self.chunks * self.ranks
        nobody: frozenset[ev.Part] = frozenset()
        pair = Pair(
            decode, None, (), (), True, False, False, (NOTHING,) * self.chunks, (EMPTY,) * copies,
            nobody, nobody, False, 0, nobody, False, nobody, False, self.stray_releases,
        )  # fmt: skip
        (started,) = self._decode(pair, ev.Started())
        return started.after

    # Steps

    def steps(self, pair: Pair) -> Iterator[Step]:
        """Everything that can happen next."""
        yield from self._stream(pair)
        if not pair.decode.terminal:
            yield from self._decode_steps(pair)
        elif any(pair.blocks) and pair.decode.state is DecodeState.COMMITTED:
            yield Step("the sequence ends", FAIR, _tidy(pair._replace(blocks=(NOTHING,) * self.chunks)))
        if pair.prefill is not None and not pair.prefill.terminal:
            yield from self._prefill_steps(pair, pair.prefill)
            if self.stalls and not pair.stalled:
                yield Step("P stalls", FAULT, _tidy(pair._replace(stalled=True)))

    def _stream(self, pair: Pair) -> Iterator[Step]:
        if pair.to_prefill:
            rest = pair._replace(to_prefill=pair.to_prefill[1:])
            message = pair.to_prefill[0]
            if isinstance(message, do.SendOpen):
                born = rest._replace(prefill=PrefillHandoff(_parts(self.ranks), self.ranks))
                yield from self._prefill(born, ev.Accepted())
                yield from self._prefill(born, ev.Refused(), FAULT)
            else:
                yield from self._prefill(rest, message)
        if pair.to_decode:
            yield from self._decode(pair._replace(to_decode=pair.to_decode[1:]), pair.to_decode[0])
        if pair.open:
            yield Step("the stream closes", FAULT, _tidy(pair._replace(open=False)))
            return
        if pair.to_prefill is not None:
            kind = FAULT if pair.to_prefill else FAIR
            gone = pair._replace(to_prefill=None)
            if pair.prefill is None:
                yield Step("P never hears of it", kind, _tidy(gone))
            else:
                yield from self._prefill(gone, ev.StreamClosed(), kind)
        if pair.to_decode is not None:
            kind = FAULT if pair.to_decode else FAIR
            yield from self._decode(pair._replace(to_decode=None), ev.StreamClosed(), kind)

    def _decode_steps(self, pair: Pair) -> Iterator[Step]:
        if pair.decode.state not in (DecodeState.ABORTED, DecodeState.DRAINED):
            yield from self._decode(pair, ev.Cancelled(), FAULT)
            yield from self._decode(pair, ev.DeadlinePassed(), FAULT)
            yield from self._decode(pair, ev.StateExpired(), FAIR if pair.stalled else FAULT)
        if pair.connecting:
            done = pair._replace(connecting=False)
            yield from self._decode(done, ev.Connected())
            yield from self._decode(done, ev.ConnectFailed(), FAULT)
        if pair.refused and pair.decode.wants_memory:
            for step in self._decode(pair._replace(refused=False), ev.MemoryFreed()):
                if step.decode_lacks is None:
                    yield step._replace(decode_needs=self.chunks)
        for part in pair.writers:
            gone = pair._replace(writers=pair.writers - {part})
            if pair.pinned and not pair.stalled:
                yield from self._decode(self._copied(gone, part, GOOD), ev.ChunkLanded(*part))
            # A stale source is either noticed by its generation or lands as damage.
            yield from self._decode(self._copied(gone, part, BAD), ev.ChunkLanded(*part), FAULT)
            hopeless = not pair.pinned or not pair.open
            yield from self._decode(gone, ev.ChunkFailed(*part), FAIR if hopeless else FAULT)
        for part in pair.checks:
            good = pair.content[part[0] * self.ranks + part[1]] == GOOD
            checked = pair._replace(checks=pair.checks - {part})
            if good and not any(seq == part[0] for seq, _ in checked.checks | checked.writers):
                checked = checked._replace(blocks=_swap(checked.blocks, {LOADING: RESERVED}, part[0]))
            event = ev.ChunkVerified(*part) if good else ev.ChunkMismatched(*part)
            yield from self._decode(checked, event)

    def _prefill_steps(self, pair: Pair, prefill: PrefillHandoff) -> Iterator[Step]:
        if prefill.state not in (PrefillState.ABORTED, PrefillState.DRAINED):
            yield from self._prefill(pair, ev.Cancelled(), FAULT)
            yield from self._prefill(pair, ev.DeadlinePassed(), FAULT)
            yield from self._prefill(pair, ev.StateExpired(), FAULT)
        if pair.stalled:
            return
        if pair.stray and prefill.state is not PrefillState.OPEN:
            yield from self._prefill(pair._replace(stray=pair.stray - 1), ev.ReleaseAsked(), FAULT)
        if prefill.state is PrefillState.OPEN:
            for step in self._prefill(pair, ev.Admitted()):
                yield step._replace(prefill_needs=self.chunks)
        if prefill.state is PrefillState.FILLED and prefill.closing is None:
            yield from self._prefill(pair, ev.MemoryPressure(), SQUEEZE)
        if pair.running and not pair.stopping and pair.computed < self.chunks:
            yield from self._prefill(pair._replace(computed=pair.computed + 1), ev.ChunkComputed())
        for part in pair.running:
            over = pair._replace(running=pair.running - {part})
            whole = pair.computed == self.chunks
            if pair.stopping:
                yield from self._prefill(over, ev.PartStopped(*part))
            else:
                # A fill that ends short and says so is a defect that D has to notice.
                yield from self._prefill(over, ev.PartFilled(*part), FAIR if whole else FAULT)
            yield from self._prefill(over, ev.PartFailed(*part), FAULT)
        for part in pair.serves:
            served = pair._replace(serves=pair.serves - {part})
            yield from self._prefill(served, ev.ServeDone(*part))
            yield from self._prefill(served, ev.ServeFailed(*part), FAULT)

    # The shells

    def _decode(self, pair: Pair, event: object, kind: int = FAIR) -> Iterator[Step]:
        """Feed D and carry out what it says, as consumer.py does."""
        label = ("D", event)
        if pair.decode.terminal:
            yield Step(label, kind, _tidy(pair))
            return
        machine, instructions = self._advance(self.decode_table, pair.decode, event)
        pair = pair._replace(decode=machine)
        if do.Reserve() in instructions:
            yield from self._reserve(pair, label, kind)
            return
        for item in instructions:
            pair = self._do_decode(pair, item)
        if do.FreeBlocks() in instructions:
            yield from (step._replace(label=label) for step in self._decode(pair, ev.BlocksFreed(), kind))
            return
        yield Step(label, kind, _tidy(pair))

    def _reserve(self, pair: Pair, label: object, kind: int) -> Iterator[Step]:
        for refused in self._decode(pair._replace(refused=True), ev.ReserveRefused(), kind):
            yield refused._replace(label=label, decode_lacks=self.chunks)
        for reused in self.reuse:
            taken = (PREFIX,) * reused + (RESERVED,) * (self.chunks - reused)
            for step in self._decode(pair._replace(blocks=taken), ev.BlocksReserved(reused), kind):
                yield step._replace(label=label, decode_needs=self.chunks)

    def _prefill(self, pair: Pair, event: object, kind: int = FAIR) -> Iterator[Step]:
        """Feed P and carry out what it says, as producer.py does."""
        label = ("P", event)
        if pair.prefill is None or pair.prefill.terminal:
            yield Step(label, kind, _tidy(pair))
            return
        machine, instructions = self._advance(self.prefill_table, pair.prefill, event)
        pair = pair._replace(prefill=machine)
        for item in instructions:
            pair = self._do_prefill(pair, item)
        if do.Unpin() in instructions and not machine.terminal:
            yield from (step._replace(label=label) for step in self._prefill(pair, ev.Unpinned(), kind))
            return
        yield Step(label, kind, _tidy(pair))

    def _advance(self, table: Table[Any], machine: Any, event: object) -> Any:
        found = self.known.get((machine, event))
        if found is None:
            try:
                found = self.known[machine, event] = table.advance(machine, event)
            except IllegalTransition as error:
                raise Violation(str(error)) from error
        return found

    def _do_decode(self, pair: Pair, item: object) -> Pair:
        match item:
            case do.Connect():
                return pair._replace(connecting=True)
            case do.Fetch(seq, rank):
                loading = _swap(pair.blocks, {RESERVED: LOADING}, seq)
                return pair._replace(blocks=loading, writers=pair.writers | {(seq, rank)})
            case do.Verify(seq, rank):
                return pair._replace(checks=pair.checks | {(seq, rank)})
            case do.Commit():
                return pair._replace(blocks=_swap(pair.blocks, {RESERVED: HELD}))
            case do.Quarantine():
                return pair._replace(
                    blocks=_swap(pair.blocks, {LOADING: QUARANTINED, RESERVED: NOTHING, PREFIX: NOTHING})
                )
            case do.FreeBlocks():
                return pair._replace(blocks=(NOTHING,) * self.chunks)
            case do.SendOpen():
                return _send(pair, "to_prefill", item)
            case do.SendGrant(seq):
                return _send(pair, "to_prefill", ev.GrantAsked(seq))
            case do.SendRelease():
                return _send(pair, "to_prefill", ev.ReleaseAsked())
            case do.SendAbort():
                return _send(pair, "to_prefill", ev.PeerAborted())
            case do.Finish():
                return pair
        raise Violation(f"D's shell does not know {item}")

    def _do_prefill(self, pair: Pair, item: object) -> Pair:
        match item:
            case do.StartFill():
                return pair._replace(pinned=True, running=_parts(self.ranks))
            case do.CancelFill():
                return pair._replace(stopping=True)
            case do.Serve(seq, rank):
                return pair._replace(serves=pair.serves | {(seq, rank)})
            case do.Unpin():
                return pair._replace(pinned=False)
            case do.SendOpened():
                return _send(pair, "to_decode", ev.Opened())
            case do.SendRejected():
                return _send(pair, "to_decode", ev.Rejected())
            case do.SendChunk(seq):
                return _send(pair, "to_decode", ev.ChunkReady(seq, seq, seq + 1))
            case do.SendFilled(chunks):
                return _send(pair, "to_decode", ev.Filled(chunks, chunks * BLOCK_TOKENS))
            case do.SendReleased(status):
                return _send(pair, "to_decode", ev.Released(status))
            case do.SendSourceFailed():
                return _send(pair, "to_decode", ev.SourceFailed(0))
            case do.SendAbort():
                return _send(pair, "to_decode", ev.PeerAborted())
        raise Violation(f"P's shell does not know {item}")

    def _copied(self, pair: Pair, part: ev.Part, what: int) -> Pair:
        content = list(pair.content)
        content[part[0] * self.ranks + part[1]] = what
        return pair._replace(content=tuple(content))

    # Properties of every state

    def check(self, pair: Pair) -> None:
        """Raise Violation where the pair is in a state that must not be."""
        for seq, rank in pair.writers | pair.checks:
            if pair.blocks[seq] not in (LOADING, QUARANTINED):
                raise Violation(f"block {seq} is {pair.blocks[seq]} while rank {rank}'s copy is not over")
        if pair.running and not pair.pinned:
            raise Violation("P's blocks are not this handoff's while its engine may write them")
        if pair.serves and not pair.pinned:
            raise Violation("P's blocks are not this handoff's while a transport reads them")
        if pair.decode.terminal:
            self._check_decode_end(pair)
        if pair.prefill is not None and pair.prefill.terminal:
            self._check_prefill_end(pair, pair.prefill)

    def _check_decode_end(self, pair: Pair) -> None:
        if pair.writers or pair.checks:
            raise Violation("D ended while copies were not over")
        if pair.decode.state is DecodeState.RELEASED:
            if any(pair.blocks):
                raise Violation(f"D ended without the KV and kept blocks {pair.blocks}")
            return
        if any(pair.blocks) and not set(pair.blocks) <= {HELD, PREFIX}:
            raise Violation(f"D committed blocks in states {pair.blocks}")
        for seq in range(pair.decode.reused, self.chunks):
            if set(pair.content[seq * self.ranks : (seq + 1) * self.ranks]) != {GOOD}:
                raise Violation(f"D committed chunk {seq} with content {pair.content}")
        p = pair.prefill
        if p is None or p.state is not PrefillState.RELEASED or p.closing is not ReleaseStatus.OK:
            raise Violation(f"D committed, but P's last word is not ok: {p}")
        if pair.computed != self.chunks:
            raise Violation(f"D committed {pair.computed} of {self.chunks} chunks")

    def _check_prefill_end(self, pair: Pair, prefill: PrefillHandoff) -> None:
        if pair.pinned or pair.running or pair.serves:
            raise Violation("P ended and left a pin, an engine or a reader behind")
        if prefill.closing is ReleaseStatus.OK and prefill.chunks != pair.computed:
            raise Violation("P answered ok before it was filled")


def ended(pair: Pair) -> bool:
    """Nothing of the handoff is left on either side."""
    silent = pair.prefill is None and pair.to_prefill is None
    return pair.decode.terminal and not any(pair.blocks) and (silent or _over(pair.prefill))


def committed(pair: Pair) -> bool:
    return pair.decode.state is DecodeState.COMMITTED


def _over(prefill: PrefillHandoff | None) -> bool:
    return prefill is not None and prefill.terminal


def _parts(ranks: int) -> frozenset[ev.Part]:
    return frozenset((rank, 0) for rank in range(ranks))


def _swap(blocks: tuple[int, ...], moves: dict[int, int], only: int | None = None) -> tuple[int, ...]:
    return tuple(
        moves.get(state, state) if only is None or only == seq else state for seq, state in enumerate(blocks)
    )


def _send(pair: Pair, inbox: str, message: object) -> Pair:
    queue = getattr(pair, inbox)
    if not pair.open or queue is None or (queue and isinstance(queue[-1], LAST_WORDS)):
        return pair
    return pair._replace(**{inbox: (*queue, message)})


def _tidy(pair: Pair) -> Pair:
    """One state for all that behave alike from here on.

    A side that ended reads nothing and ends the stream. A side that gave up ignores its peer (a test of its
    own says so), so its inbox does not matter, and its chunks are just a number of copies to wait for.
    """
    changes: dict[str, object] = {}
    if pair.decode.state is DecodeState.ABORTED:
        pair = _renumber_decode(pair)
        changes |= {"to_decode": None, "refused": False}
    if pair.prefill is not None and pair.prefill.state is PrefillState.ABORTED:
        pair = _renumber_prefill(pair, pair.prefill)
        changes |= {"to_prefill": None, "stalled": False}
    if pair.decode.terminal:
        changes |= {"to_decode": None, "connecting": False, "refused": False, "open": False}
    if pair.decode.state in (DecodeState.ABORTED, DecodeState.RELEASED):
        changes["content"] = (EMPTY,) * len(pair.content)
    if pair.prefill is None:
        return pair._replace(**changes) if changes else pair
    if pair.prefill.terminal:
        changes |= {"to_prefill": None, "open": False, "stray": 0, "stalled": False}
    if pair.prefill.state is PrefillState.ABORTED or (
        pair.prefill.terminal and pair.prefill.closing is not ReleaseStatus.OK
    ):
        changes["computed"] = 0
    if pair.prefill.terminal:
        changes["stopping"] = False
        if pair.decode.terminal and not committed(pair):
            changes["prefill"] = replace(pair.prefill, chunks=0, closing=None, accepted=True)
            changes["computed"] = 0
    return pair._replace(**changes) if changes else pair


def _renumber_decode(pair: Pair) -> Pair:
    machine = pair.decode
    if len(pair.blocks) == 1 or not any(pair.blocks):
        return pair
    sets = (machine.writing, machine.checking, pair.writers, pair.checks)
    key = {seq: (pair.blocks[seq], *_ranks(sets, seq)) for seq in range(len(pair.blocks))}
    order = sorted(key, key=key.__getitem__)
    if order == sorted(order):
        return pair
    writing, checking, writers, checks = _renamed(sets, order)
    return pair._replace(
        decode=replace(machine, writing=writing, checking=checking),
        blocks=tuple(pair.blocks[seq] for seq in order),
        writers=writers,
        checks=checks,
    )


def _renumber_prefill(pair: Pair, machine: PrefillHandoff) -> Pair:
    sets = (machine.serving, pair.serves)
    seqs = range(len(pair.blocks))
    order = sorted(seqs, key=lambda seq: _ranks(sets, seq))
    if order == list(seqs):
        return pair
    serving, serves = _renamed(sets, order)
    return pair._replace(prefill=replace(machine, serving=serving), serves=serves)


def _ranks(sets: tuple[frozenset[ev.Part], ...], seq: int) -> list[list[int]]:
    """For each set, which ranks of the chunk are in it."""
    return [sorted(rank for chunk, rank in parts if chunk == seq) for parts in sets]


def _renamed(sets: tuple[frozenset[ev.Part], ...], order: list[int]) -> list[frozenset[ev.Part]]:
    """The sets with chunk order[i] called i."""
    name = {seq: index for index, seq in enumerate(order)}
    return [frozenset((name[seq], rank) for seq, rank in parts) for parts in sets]
