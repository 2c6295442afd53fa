"""An EngineClient that does what a test says."""

import asyncio
from collections.abc import AsyncIterator

from pdserve.core.types import FinishReason, SequenceId
from pdserve.workers.engine.messages import EngineStats, SequenceOutput, SequenceSpec, StepOutputs


def output(
    sequence: str,
    *,
    tokens: tuple[int, ...] = (),
    first: int = 0,
    reason: FinishReason | None = None,
    computed: int = 0,
) -> SequenceOutput:
    return SequenceOutput(
        sequence_id=SequenceId(sequence),
        num_computed=computed,
        first_index=first,
        new_token_ids=tokens,
        text="".join(f"<{token}>" for token in tokens),
        finish_reason=reason,
        error=None,
        cached_tokens=0,
        started_at=0.0,
        prefill_ended_at=0.0,
        first_token_at=0.0,
    )


class FakeEngine:
    """Aborts are noted and answered only when the test says so."""

    def __init__(self) -> None:
        self.submitted: list[SequenceSpec] = []
        self.aborted: list[SequenceId] = []
        self._steps: asyncio.Queue[StepOutputs | BaseException | None] = asyncio.Queue()

    async def start(self) -> None: ...

    async def stop(self) -> None:
        self._steps.put_nowait(None)

    def submit(self, spec: SequenceSpec) -> None:
        self.submitted.append(spec)

    def abort(self, sequence_id: SequenceId) -> None:
        self.aborted.append(sequence_id)

    async def outputs(self) -> AsyncIterator[StepOutputs]:
        while (step := await self._steps.get()) is not None:
            if isinstance(step, BaseException):
                raise step
            yield step

    def stats(self) -> EngineStats:
        return EngineStats(0, 0, 0, 0, 0, 0, 0.0, 0, 0, 0, {})

    def set_role_weight(self, weight: float) -> None: ...

    def check_integrity(self) -> None: ...

    def step(self, *items: SequenceOutput) -> None:
        """One step's outputs."""
        self._steps.put_nowait(StepOutputs(0, items))

    def die(self, error: BaseException) -> None:
        """The engine ends by itself, without a word about its sequences."""
        self._steps.put_nowait(error)


async def settle() -> None:
    """Let everything run that can: no timer is involved."""
    for _ in range(20):
        await asyncio.sleep(0)
