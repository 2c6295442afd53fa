"""Hands each step's outputs to whoever submitted the sequence.

producer: the engine, one StepOutputs per step. consumers: the decode role (tokens) and the prefill role
(progress), one sink per sequence, plus `after_step`, called once when a step's items are all handed out.
"""

import asyncio
import logging
from collections.abc import Callable

from pdserve.core.errors import PdserveError, Unavailable, from_foreign
from pdserve.core.tasks import end_task
from pdserve.core.types import SequenceId
from pdserve.workers.engine.messages import EngineClient, SequenceOutput, SequenceSpec, StepOutputs

log = logging.getLogger(__name__)

Sink = Callable[[SequenceOutput], None]


class OutputDispatcher:
    """One task that reads the engine's outputs; sinks run on the event loop and must not block.

    Every sink hears of its sequence's end, whatever happens: from the engine, or, where the engine ended
    without a word about it, from here.
    """

    def __init__(self, engine: EngineClient, failed: Callable[[PdserveError], object] | None = None) -> None:
        """`failed` is called once if the engine ends by itself, after every sink has heard of it."""
        self._engine = engine
        self._failed = failed
        self._ended: PdserveError | None = None
        self._sinks: dict[SequenceId, Sink] = {}
        self._after_step: list[Callable[[], None]] = []
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._run(), name="engine-outputs")

    async def stop(self) -> None:
        await end_task(self._task)

    def after_step(self, callback: Callable[[], None]) -> None:
        """Call `callback` after the items of each step: the moment to send one frame for all of them."""
        self._after_step.append(callback)

    def submit(self, spec: SequenceSpec, sink: Sink) -> None:
        """Start a sequence; `sink` gets its outputs up to the one with a finish reason or an error.

        Raises what ended the engine.
        """
        if self._ended is not None:
            raise self._ended
        self._sinks[spec.sequence_id] = sink
        try:
            self._engine.submit(spec)
        except BaseException:
            del self._sinks[spec.sequence_id]
            raise

    def abort(self, sequence: SequenceId) -> None:
        """End a sequence at the next step boundary; its sink still gets the last output."""
        self._engine.abort(sequence)

    def __len__(self) -> int:
        return len(self._sinks)

    async def _run(self) -> None:
        failure: PdserveError | None = None
        try:
            async for step in self._engine.outputs():
                self._hand_out(step)
        except Exception as error:
            failure = from_foreign(error)
            log.error("the engine failed", exc_info=error)
        finally:
            self._ended = failure or Unavailable("the engine is stopped: ask another worker")
            for sequence in tuple(self._sinks):
                self._tell(_lost(sequence, self._ended))
            self._step_ended()
        if failure is not None and self._failed is not None:
            self._failed(failure)

    def _hand_out(self, step: StepOutputs) -> None:
        for item in step.items:
            self._tell(item)
        self._step_ended()

    def _tell(self, item: SequenceOutput) -> None:
        """A sink that raises loses its sequence and harms nobody else."""
        sink = self._sinks.get(item.sequence_id)
        if sink is None:
            return
        is_last = item.finish_reason is not None or item.error is not None
        if is_last:
            del self._sinks[item.sequence_id]
        try:
            sink(item)
        except Exception:
            log.exception("the consumer of sequence %s failed", item.sequence_id)
            if not is_last:
                self._engine.abort(item.sequence_id)

    def _step_ended(self) -> None:
        for callback in self._after_step:
            try:
                callback()
            except Exception:
                log.exception("a step's frame could not be sent")


def _lost(sequence: SequenceId, error: PdserveError) -> SequenceOutput:
    return SequenceOutput(
        sequence_id=sequence,
        num_computed=0,
        first_index=0,
        new_token_ids=(),
        text="",
        finish_reason=None,
        error=error,
        cached_tokens=0,
        started_at=None,
        prefill_ended_at=None,
        first_token_at=None,
    )
