"""The engine of one worker: sequences in, tokens out, one step at a time."""

from collections.abc import Callable, Iterable
from contextlib import suppress

from pdserve.core.clock import Clock
from pdserve.core.config import EngineConfig
from pdserve.core.errors import InternalError, PdserveError, from_foreign
from pdserve.core.perfmodel import PerfModel, StepRecord, prefill_attention
from pdserve.core.types import (
    BlockId,
    BlockName,
    FinishReason,
    OwnerId,
    SequenceId,
    blocks_for,
)
from pdserve.workers.engine.allocation import AllocationPolicy, BlockPool
from pdserve.workers.engine.engine_model import EngineModel
from pdserve.workers.engine.limits import EngineLimits
from pdserve.workers.engine.messages import EngineStats, SequenceOutput, SequenceSpec, StepOutputs
from pdserve.workers.engine.runner import BatchSpec, ChunkSpec, ModelRunner, Sampled
from pdserve.workers.engine.scheduler import ScheduledChunk, Scheduler
from pdserve.workers.engine.sequence import Sequence, SequenceState


class Engine:
    """Continuous batching over a paged KV pool. Not thread-safe: one thread calls everything but
    `add_memory_listener` and `perf_snapshot`.

    Owns the sequences and, until their last output, the tables of their owners; the pool owns the blocks.
    What `submit` and `abort` have to say comes with the next `step`.
    """

    def __init__(
        self,
        config: EngineConfig,
        model: EngineModel,
        pool: BlockPool,
        runner: ModelRunner,
        clock: Clock,
        perf: PerfModel,
        role_weight: float = 1.0,
    ) -> None:
        """`role_weight`: 1 spends the token budget on prefill, 0 on decode."""
        self._model = model
        self._limits = EngineLimits(model.max_positions, pool.counts().total)
        self._pool = pool
        self._runner = runner
        self._clock = clock
        self._perf = perf
        self._scheduler = Scheduler(config, AllocationPolicy(pool), role_weight)
        self._live: dict[SequenceId, Sequence] = {}
        self._owners: set[OwnerId] = set()
        self._released: list[OwnerId] = []  # since the last step began, for check_integrity
        self._items: list[SequenceOutput] = []
        self._arrivals = 0
        self._steps = 0
        self._preemptions = 0
        self._prefills = 0
        self._prefill_busy_s = 0.0
        self._is_stalled = True

    @property
    def has_work(self) -> bool:
        """Whether a sequence lives or an output waits for the next step."""
        return bool(self._live or self._items)

    @property
    def is_stalled(self) -> bool:
        """The last step did nothing: nor will the next, unless memory or a message arrives."""
        return self._is_stalled

    def add_memory_listener(self, listener: Callable[[], None]) -> None:
        """Call `listener`, in whatever thread, after blocks became available; it must not block."""
        self._pool.add_free_listener(listener)

    def set_role_weight(self, weight: float) -> None:
        """See `EngineClient.set_role_weight`. Raises ConfigError outside of [0, 1]."""
        self._scheduler.set_role_weight(weight)

    def submit(self, spec: SequenceSpec) -> None:
        """Queue a sequence. What is wrong with it becomes its output."""
        twin = self._live.get(spec.sequence_id)
        if twin is not None:
            twice = InternalError(f"sequence {spec.sequence_id} was submitted twice: both are ended")
            self._end(twin, twin.output(error=twice))
            self._release_unowned(spec)
            return
        try:
            self._limits.check(spec)
            sequence = self._open(spec)
        except Exception as error:
            self._release_unowned(spec)
            self._items.append(_refusal(spec, from_foreign(error)))
            return
        self._arrivals += 1
        self._live[spec.sequence_id] = sequence
        self._owners.add(spec.owner)
        self._scheduler.add(sequence)

    def abort(self, sequence_id: SequenceId) -> None:
        """End a sequence now; nothing if it is not live."""
        sequence = self._live.get(sequence_id)
        if sequence is not None:
            self._end(sequence, sequence.output(finish_reason=FinishReason.ABORT))

    def abort_all(self) -> None:
        """End every sequence as if it had been aborted."""
        for sequence_id in tuple(self._live):
            self.abort(sequence_id)

    def fail_all(self, error: PdserveError, unseen: Iterable[SequenceSpec] = ()) -> None:
        """After a defect: tell every sequence, in whatever state it is, and those of `unseen` that never got
        here. The engine must not step again."""
        self._owners.clear()
        for sequence in self._live.values():
            self._items.append(sequence.output(error=error))
            with suppress(PdserveError):  # the first error is the one to report
                self._release_unowned(sequence.spec)
        self._live.clear()
        told = {item.sequence_id for item in self._items}
        for spec in unseen:
            if spec.sequence_id not in told:
                self._items.append(_refusal(spec, error))
                with suppress(PdserveError):
                    self._release_unowned(spec)

    def step(self) -> StepOutputs:
        """Schedule → run → postprocess.

        A failing runner ends the sequences of its batch; a sequence in a bad state ends alone. Anything that
        is raised nevertheless is a defect of the engine.
        """
        started_at = self._clock.now()
        self._steps += 1
        schedule = self._scheduler.schedule()
        self._released.clear()
        self._preemptions += len(schedule.preempted)
        # First: a sequence may start again, or fail, in the step in which it yielded.
        self._is_stalled = not (schedule.chunks or schedule.completed or schedule.failed)
        for sequence, error in schedule.failed:
            self._close(sequence, sequence.output(error=error))
        for sequence in schedule.completed:
            sequence.started_at = sequence.prefill_ended_at = started_at
            self._close(sequence, sequence.output(finish_reason=FinishReason.LENGTH))
        if schedule.chunks:
            self._run(schedule.chunks, started_at)
        return self.take_outputs()

    def take_outputs(self) -> StepOutputs:
        """What happened since the last step, without a step."""
        items, self._items = tuple(self._items), []
        return StepOutputs(self._steps, items)

    def stats(self) -> EngineStats:
        """Counts as of the last step; `perf` is empty, see `perf_snapshot`."""
        running, waiting = self._scheduler.running, self._scheduler.waiting
        prefills = [s.remaining for s in (*running, *waiting) if not s.is_decoding]
        return EngineStats(
            progress=self._steps,
            running=len(running),
            waiting=len(waiting),
            queued_prefill_tokens=sum(prefills),
            queued_prefills=len(prefills),
            prefills=self._prefills,
            prefill_busy_s=self._prefill_busy_s,
            context_tokens=sum(s.num_computed for s in running),
            preemptions=self._preemptions,
            preempted_blocks=sum(
                blocks_for(len(s.tokens)) for s in waiting if s.state is SequenceState.PREEMPTED
            ),
            perf={},
        )

    def perf_snapshot(self) -> dict[str, float]:
        """What the performance model has learnt."""
        return self._perf.snapshot()

    def check_integrity(self) -> None:
        """Raise InternalError or IntegrityError where scheduler, sequences and pool differ."""
        self._pool.check_integrity()
        self._scheduler.check_integrity()
        queued = {s.sequence_id for s in (*self._scheduler.running, *self._scheduler.waiting)}
        if queued != self._live.keys():
            raise InternalError(
                f"sequences {sorted(queued ^ self._live.keys())} are live or queued, not both"
            )
        for sequence in self._live.values():
            table = self._pool.table(sequence.owner)
            if table != tuple(sequence.blocks):
                raise InternalError(f"{sequence.owner} has {table} in the pool and {sequence.blocks} here")
            if blocks_for(sequence.num_computed) > len(table):
                raise InternalError(
                    f"{sequence.owner} has {len(table)} blocks and {sequence.num_computed} computed positions"
                )
        for owner in self._released:
            if owner not in self._owners and self._pool.table(owner):
                raise InternalError(f"{owner} has ended and still has blocks {self._pool.table(owner)}")

    def _run(self, chunks: tuple[ScheduledChunk, ...], started_at: float) -> None:
        for chunk in chunks:
            if chunk.sequence.started_at is None:
                chunk.sequence.started_at = started_at
                self._prefills += not chunk.is_decode
        chunks, batch = self._batch(chunks)
        if not chunks:
            return
        try:
            sampled = self._runner.run(batch)
            samplers = [chunk.sequence.sequence_id for chunk in chunks if chunk.samples]
            tokens = dict(zip(samplers, sampled, strict=True))
        except Exception as error:
            failure = InternalError(f"the step failed: {type(error).__name__}: {error}")
            failure.__cause__ = error
            for chunk in chunks:
                self._end(chunk.sequence, chunk.sequence.output(error=failure))
            return
        ended_at = self._clock.now()
        record = _step_record(chunks, ended_at - started_at)
        self._perf.observe_step(record)
        self._prefill_busy_s += record.seconds if record.prefill_tokens else 0.0
        for chunk in chunks:
            try:
                token = tokens.get(chunk.sequence.sequence_id)
                self._postprocess(chunk, token, started_at, ended_at)
            except Exception as error:
                self._end(chunk.sequence, chunk.sequence.output(error=from_foreign(error)))

    def _batch(self, chunks: tuple[ScheduledChunk, ...]) -> tuple[tuple[ScheduledChunk, ...], BatchSpec]:
        """What runs of `chunks`. A sequence whose constraint cannot go on ends here, alone."""
        specs: dict[ScheduledChunk, ChunkSpec] = {}
        for chunk in chunks:
            try:
                specs[chunk] = _chunk_spec(chunk)
            except Exception as error:
                self._end(chunk.sequence, chunk.sequence.output(error=from_foreign(error)))
        return tuple(specs), BatchSpec(tuple(specs.values()))

    def _postprocess(
        self, chunk: ScheduledChunk, sampled: Sampled | None, started_at: float, ended_at: float
    ) -> None:
        """Count what ran, name the blocks that are full with it, take the sampled token."""
        sequence = chunk.sequence
        self._name(sequence.owner, sequence.advance(chunk.count))
        if sampled is None:
            if sequence.samples or sequence.remaining:
                self._items.append(sequence.output())
                return
            sequence.prefill_ended_at = ended_at
            self._end(sequence, sequence.output(finish_reason=FinishReason.LENGTH))
            return
        if sequence.prefill_ended_at is None:
            sequence.prefill_ended_at = started_at
        emission = sequence.append(sampled.token, sampled.logprobs, self._model.eos_ids)
        if emission.token_ids and sequence.first_token_at is None:
            sequence.first_token_at = ended_at
        output = sequence.output(emission)
        if emission.finish_reason is None:
            self._items.append(output)
        else:
            self._end(sequence, output)

    def _open(self, spec: SequenceSpec) -> Sequence:
        """Raises InternalError where the owner's table is not what the spec says."""
        if spec.owner in self._owners:
            raise InternalError(
                f"sequence {spec.sequence_id} has owner {spec.owner}, as another live one has"
            )
        table = self._pool.table(spec.owner)
        needed = blocks_for(len(spec.token_ids)) if spec.num_computed else 0
        if len(table) < needed or (table and not needed):
            raise InternalError(
                f"sequence {spec.sequence_id} comes with {spec.num_computed} computed positions and "
                f"{len(table)} blocks in the table of {spec.owner}; it needs {needed}"
            )
        sequence = Sequence(spec, self._arrivals, self._model.emitter(spec), self._model.rules(spec))
        sequence.place(list(table), 0)
        self._name(spec.owner, sequence.advance(spec.num_computed))
        return sequence

    def _name(self, owner: OwnerId, full: Iterable[tuple[BlockId, BlockName]]) -> None:
        for block, name in full:
            self._pool.name(owner, block, name)

    def _end(self, sequence: Sequence, output: SequenceOutput) -> None:
        self._scheduler.remove(sequence)
        self._close(sequence, output)

    def _close(self, sequence: Sequence, output: SequenceOutput) -> None:
        """The last output of a sequence that the scheduler no longer has; its table is not touched again."""
        sequence.move(SequenceState.FINISHED)
        del self._live[sequence.sequence_id]
        self._owners.remove(sequence.owner)
        self._items.append(output)
        self._release_unowned(sequence.spec)

    def _release_unowned(self, spec: SequenceSpec) -> None:
        """Free the table of a sampling sequence; a prefill-only one's is its submitter's."""
        if spec.sampling is not None and spec.owner not in self._owners:
            self._pool.release(spec.owner)
            self._released.append(spec.owner)


def _chunk_spec(chunk: ScheduledChunk) -> ChunkSpec:
    sequence = chunk.sequence
    return ChunkSpec(
        token_ids=tuple(sequence.tokens[chunk.start : chunk.start + chunk.count]),
        start=chunk.start,
        blocks=tuple(sequence.blocks),
        sampling=sequence.spec.sampling if chunk.samples else None,
        edits=sequence.rules.edits() if chunk.samples and sequence.rules is not None else None,
    )


def _step_record(chunks: tuple[ScheduledChunk, ...], seconds: float) -> StepRecord:
    prefills = [chunk for chunk in chunks if not chunk.is_decode]
    decodes = [chunk for chunk in chunks if chunk.is_decode]
    return StepRecord(
        seconds=seconds,
        prefill_tokens=sum(chunk.count for chunk in prefills),
        prefill_attention=sum(prefill_attention(chunk.count, chunk.start) for chunk in prefills),
        decode_sequences=len(decodes),
        decode_context=sum(chunk.start + 1 for chunk in decodes),
    )


def _refusal(spec: SequenceSpec, error: PdserveError) -> SequenceOutput:
    return SequenceOutput(
        sequence_id=spec.sequence_id,
        num_computed=0,
        first_index=spec.prior_tokens,
        new_token_ids=(),
        text="",
        finish_reason=None,
        error=error,
        cached_tokens=0,
        started_at=None,
        prefill_ended_at=None,
        first_token_at=None,
    )
