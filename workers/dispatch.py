"""Hands each step's outputs to whoever submitted the sequence.

producer: the engine, one StepOutputs per step. consumers: the decode role (tokens) and the prefill role
(progress), one sink per sequence, plus `after_step`, called once when a step's items are all handed out.
"""

import asyncio
from collections.abc import Callable

from pdserve.core.tasks import end_task
from pdserve.core.types import SequenceId
from pdserve.workers.engine.messages import EngineClient, SequenceOutput, SequenceSpec

Sink = Callable[[SequenceOutput], None]


class OutputDispatcher:
    """One task that reads the engine's outputs; sinks run on the event loop and must not block."""

    def __init__(self, engine: EngineClient) -> None:
        self._engine = engine
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
        """Start a sequence; `sink` gets its outputs up to the one with a finish reason."""
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
        async for step in self._engine.outputs():
            for item in step.items:
                sink = self._sinks.get(item.sequence_id)
                if sink is None:
                    continue
                if item.finish_reason is not None or item.error is not None:
                    del self._sinks[item.sequence_id]
                sink(item)
            for callback in self._after_step:
                callback()
