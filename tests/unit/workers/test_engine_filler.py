"""A fill that is given up returns only when the engine has let go of the table."""

import asyncio
import dataclasses
from collections.abc import AsyncGenerator
from typing import cast

import pytest
from fake_engine import FakeEngine, output, settle

from pdserve.core.clock import ManualClock
from pdserve.core.errors import InternalError
from pdserve.core.perfmodel import PerfModel, StepRecord
from pdserve.core.types import FinishReason, OwnerId
from pdserve.kvtransfer.handoff.filler import FillProgress
from pdserve.workers.dispatch import OutputDispatcher
from pdserve.workers.prefill_role import EngineFiller


class Fill:
    """One fill of 40 tokens over a fake engine."""

    def __init__(self) -> None:
        self.engine = FakeEngine()
        self.dispatcher = OutputDispatcher(self.engine)
        self.dispatcher.start()
        self.filler = EngineFiller(self.engine, self.dispatcher, 16, ManualClock())
        progress = self.filler.fill(OwnerId("export/h"), range(40), ())
        self.progress = cast("AsyncGenerator[FillProgress, None]", progress)

    async def begin(self) -> str:
        """Run it up to its first chunk; returns the name of its sequence."""
        first = asyncio.create_task(anext(self.progress))
        await settle()
        (spec,) = self.engine.submitted
        assert spec.sampling is None  # D samples everything
        self.engine.step(output(spec.sequence_id, computed=16))
        assert (await first).num_computed == 16
        return spec.sequence_id


async def test_an_estimate_says_whether_anything_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    fill, perf = Fill(), PerfModel()
    stats = fill.engine.stats()
    monkeypatch.setattr(fill.engine, "stats", lambda: dataclasses.replace(stats, perf=perf.snapshot()))
    guessed = fill.filler.estimate(32, 0)
    for _ in range(10):
        perf.observe_step(StepRecord(0.5, prefill_tokens=16, prefill_attention=256))
    measured = fill.filler.estimate(32, 0)
    assert guessed.relative_error is None
    assert measured.relative_error is not None
    assert measured.seconds > guessed.seconds > 0.0


async def test_closing_a_fill_waits_for_the_engine() -> None:
    fill = Fill()
    sequence = await fill.begin()
    closing = asyncio.create_task(fill.progress.aclose())
    await settle()
    assert fill.engine.aborted == [sequence]
    assert not closing.done()
    fill.engine.step(output(sequence, computed=32))  # the step that was running; not yet the end
    await settle()
    assert not closing.done()
    fill.engine.step(output(sequence, computed=32, reason=FinishReason.ABORT))
    await settle()
    assert closing.done()
    assert len(fill.dispatcher) == 0


async def test_no_number_of_cancels_makes_it_return_earlier() -> None:
    fill = Fill()
    sequence = await fill.begin()
    upcoming = asyncio.create_task(anext(fill.progress))
    await settle()
    for _ in range(3):
        upcoming.cancel()
        await settle()
        assert not upcoming.done()
    assert fill.engine.aborted == [sequence]
    fill.engine.step(output(sequence, reason=FinishReason.ABORT))
    await settle()
    assert upcoming.cancelled()


async def test_a_fill_that_ended_is_not_aborted() -> None:
    fill = Fill()
    sequence = await fill.begin()
    fill.engine.step(output(sequence, computed=40, reason=FinishReason.LENGTH))
    assert (await anext(fill.progress)).num_computed == 40
    assert await anext(fill.progress, None) is None
    assert fill.engine.aborted == []


async def test_an_abort_by_the_engine_and_its_death_are_errors() -> None:
    fill = Fill()
    sequence = await fill.begin()
    fill.engine.step(output(sequence, reason=FinishReason.ABORT))
    with pytest.raises(InternalError, match="aborted the fill"):
        await anext(fill.progress)
    fill = Fill()
    await fill.begin()
    fill.engine.die(OSError("the device is gone"))
    with pytest.raises(InternalError, match="the device is gone"):
        await anext(fill.progress)
    assert fill.engine.aborted == []
