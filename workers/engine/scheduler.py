"""What runs in the next step. Pure: no tensors, no clock, no I/O."""

from bisect import insort
from collections import deque
from dataclasses import dataclass

from pdserve.core.config import EngineConfig
from pdserve.core.errors import ConfigError, InternalError, PdserveError
from pdserve.core.types import BLOCK_TOKENS
from pdserve.workers.engine.allocation import AllocationPolicy
from pdserve.workers.engine.sequence import Sequence, SequenceState


@dataclass(frozen=True, slots=True)
class ScheduledChunk:
    """`count` tokens of a sequence, from position `start`."""

    sequence: Sequence
    start: int
    count: int
    samples: bool
    """It ends at the sequence's last token and the next one is to be sampled."""
    is_decode: bool


@dataclass(frozen=True, slots=True)
class Schedule:
    """One step. The scheduler has forgotten the sequences in `completed` and `failed`."""

    chunks: tuple[ScheduledChunk, ...]
    preempted: tuple[Sequence, ...]
    completed: tuple[Sequence, ...]
    """Prefill-only sequences that the cache covered: they have their blocks and nothing to run."""
    failed: tuple[tuple[Sequence, PdserveError], ...]


class Scheduler:
    """Decodes first, then running prefills, then admission in the order of arrival.

    Producer of `waiting`: `add` and preemption; consumer: admission. A preempted sequence is older than all
    that never ran and stands before them. Whoever waits for memory lets nobody pass who needs memory too, so
    nobody starves; one that already holds its blocks (a committed handoff) passes, because it only gives
    memory back by running.
    """

    def __init__(self, config: EngineConfig, allocation: AllocationPolicy, role_weight: float = 1.0) -> None:
        self._config = config
        self._allocation = allocation
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []  # by arrival
        self.set_role_weight(role_weight)

    @property
    def waiting(self) -> tuple[Sequence, ...]:
        return tuple(self._waiting)

    @property
    def running(self) -> tuple[Sequence, ...]:
        """By arrival, the oldest first."""
        return tuple(self._running)

    def set_role_weight(self, weight: float) -> None:
        """Share of the budget, in [0, 1], that prefill may take from running decodes; what runs stays."""
        if not 0.0 <= weight <= 1.0:
            raise ConfigError(f"role weight is {weight!r}: it must be between 0 (decode) and 1 (prefill)")
        self._prefill_share = max(BLOCK_TOKENS, round(self._config.token_budget * weight))

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence; one that holds blocks is admitted without allocating."""
        self._waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence, wherever it stands."""
        (self._running if sequence.state is SequenceState.RUNNING else self._waiting).remove(sequence)

    def schedule(self) -> Schedule:
        """Choose the next step's tokens and give blocks for all of them; may preempt."""
        plan = _Plan(self._config)
        self._schedule_decodes(plan)
        if plan.chunks:
            plan.prefill_left = min(plan.prefill_left, self._prefill_share)
        for sequence in self._running:
            if not sequence.is_decoding:
                plan.take(sequence)
        self._admit(plan)
        return plan.freeze()

    def _schedule_decodes(self, plan: "_Plan") -> None:
        for sequence in self.running:
            if not sequence.is_decoding or sequence.state is not SequenceState.RUNNING:
                continue  # the second: it yielded to an older one in this loop
            if not plan.tokens_left:
                return
            try:
                has_room = self._make_room(sequence, plan)
            except PdserveError as error:
                self._drop(sequence, error, plan)
                continue
            if has_room:
                plan.take(sequence)

    def _make_room(self, sequence: Sequence, plan: "_Plan") -> bool:
        """Room for the last token of a running sequence; the youngest yield until there is, even itself."""
        while True:
            if self._allocation.can_grow(sequence):
                block = self._allocation.grow(sequence)
                if block is not None:
                    sequence.blocks.extend(block)
                    return True
            victim = next(s for s in reversed(self._running) if self._allocation.can_preempt(s))
            self._preempt(victim, plan)
            if victim is sequence:
                return False

    def _preempt(self, victim: Sequence, plan: "_Plan") -> None:
        self._allocation.preempt(victim)
        victim.displace()
        self._running.remove(victim)
        victim.move(SequenceState.PREEMPTED)
        older = sum(
            1 for s in self._waiting if s.state is SequenceState.PREEMPTED and s.arrival < victim.arrival
        )
        self._waiting.insert(older, victim)
        plan.preempted.append(victim)

    def _admit(self, plan: "_Plan") -> None:
        is_blocked = False
        for sequence in self.waiting:
            if len(self._running) >= self._config.max_sequences or not plan.tokens_left:
                return
            if sequence.blocks:
                if plan.has_budget(sequence):
                    self._start(sequence, plan)
            elif not is_blocked:
                is_blocked = not (plan.prefill_left and self._place(sequence, plan))

    def _place(self, sequence: Sequence, plan: "_Plan") -> bool:
        """Give blocks to a waiting sequence and start it; False when it must wait for memory."""
        try:
            admission = self._allocation.admit(sequence)
        except PdserveError as error:
            self._drop(sequence, error, plan)
            return True
        if admission is None:
            return False
        sequence.place(list(admission.blocks), admission.computed)
        self._start(sequence, plan)
        return True

    def _start(self, sequence: Sequence, plan: "_Plan") -> None:
        self._waiting.remove(sequence)
        if not sequence.remaining:
            plan.completed.append(sequence)
            return
        sequence.move(SequenceState.RUNNING)
        insort(self._running, sequence, key=lambda s: s.arrival)
        plan.take(sequence)

    def _drop(self, sequence: Sequence, error: PdserveError, plan: "_Plan") -> None:
        self.remove(sequence)
        plan.failed.append((sequence, error))

    def check_integrity(self) -> None:
        """Raise InternalError where a sequence stands in two places or in the wrong one."""
        places = [id(s) for s in (*self._waiting, *self._running)]
        if len(places) != len(set(places)):
            raise InternalError("a sequence stands twice in the scheduler's queues")
        for sequence in self._running:
            if sequence.state is not SequenceState.RUNNING or sequence.remaining < 1:
                raise InternalError(
                    f"sequence {sequence.sequence_id} is {sequence.state} with {sequence.remaining} tokens "
                    f"to run and stands among the running ones"
                )
        for sequence in self._waiting:
            if sequence.state not in (SequenceState.WAITING, SequenceState.PREEMPTED):
                raise InternalError(
                    f"sequence {sequence.sequence_id} is {sequence.state} and stands in the queue"
                )
        arrivals = [s.arrival for s in self._running]
        if arrivals != sorted(arrivals):
            raise InternalError(f"the running sequences are not in the order of arrival: {arrivals}")


class _Plan:
    """A step in the making."""

    def __init__(self, config: EngineConfig) -> None:
        self.tokens_left = config.token_budget
        self.prefill_left = config.token_budget
        self.chunks: list[ScheduledChunk] = []
        self.preempted: list[Sequence] = []
        self.completed: list[Sequence] = []
        self.failed: list[tuple[Sequence, PdserveError]] = []
        self._chunk_tokens = config.chunk_tokens

    def has_budget(self, sequence: Sequence) -> bool:
        return bool(self.tokens_left and (sequence.is_decoding or self.prefill_left))

    def take(self, sequence: Sequence) -> None:
        """As many of the sequence's tokens as the budget allows; may be none."""
        if not self.has_budget(sequence):
            return
        if is_decode := sequence.is_decoding:
            count = 1
        else:
            count = min(sequence.remaining, self._chunk_tokens, self.tokens_left, self.prefill_left)
            self.prefill_left -= count
        self.tokens_left -= count
        samples = sequence.samples and count == sequence.remaining
        self.chunks.append(ScheduledChunk(sequence, sequence.num_computed, count, samples, is_decode))

    def freeze(self) -> Schedule:
        return Schedule(tuple(self.chunks), tuple(self.preempted), tuple(self.completed), tuple(self.failed))
