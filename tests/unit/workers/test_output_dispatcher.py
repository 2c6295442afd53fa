"""Whoever submits a sequence hears of its end, whatever happens to the engine or to other consumers."""

import pytest
from fake_engine import FakeEngine, output, settle

from pdserve.core.errors import InternalError, PdserveError, Unavailable
from pdserve.core.types import FinishReason, OwnerId, SequenceId
from pdserve.workers.dispatch import OutputDispatcher
from pdserve.workers.engine.messages import SequenceOutput, SequenceSpec


def spec(name: str) -> SequenceSpec:
    return SequenceSpec(SequenceId(name), OwnerId(name), (1, 2), (), b"", None)


async def test_outputs_reach_their_own_sink_until_the_last_one() -> None:
    engine = FakeEngine()
    dispatcher = OutputDispatcher(engine)
    heard: dict[str, list[SequenceOutput]] = {"a": [], "b": []}
    frames: list[int] = []
    dispatcher.after_step(lambda: frames.append(len(heard["a"]) + len(heard["b"])))
    dispatcher.start()
    for name, sink in heard.items():
        dispatcher.submit(spec(name), sink.append)
    engine.step(output("a", tokens=(1,)), output("b", tokens=(2,)))
    engine.step(output("a", tokens=(3,), first=1, reason=FinishReason.LENGTH), output("unknown"))
    engine.step(output("a", tokens=(9,), first=2))  # after its end: old news
    await settle()
    assert [item.new_token_ids for item in heard["a"]] == [(1,), (3,)]
    assert [item.new_token_ids for item in heard["b"]] == [(2,)]
    assert frames == [2, 3, 3]  # once per step, behind its items
    assert len(dispatcher) == 1
    await dispatcher.stop()


async def test_an_engine_that_dies_without_a_word_is_told_to_every_consumer_and_then_to_the_worker() -> None:
    engine = FakeEngine()
    ends: list[PdserveError] = []
    told_before: list[int] = []

    def failed(error: PdserveError) -> None:
        told_before.append(len(ends))

    def note(item: SequenceOutput) -> None:
        assert item.error is not None
        ends.append(item.error)

    dispatcher = OutputDispatcher(engine, failed)
    dispatcher.start()
    for name in ("a", "b"):
        dispatcher.submit(spec(name), note)
    engine.die(OSError("the device is gone"))
    await settle()
    assert len(ends) == 2
    assert all(isinstance(error, InternalError) and "device is gone" in error.message for error in ends)
    assert told_before == [2]
    assert len(dispatcher) == 0
    with pytest.raises(InternalError):
        dispatcher.submit(spec("late"), note)
    assert [s.sequence_id for s in engine.submitted] == ["a", "b"]


async def test_an_engine_that_is_stopped_ends_its_sequences_and_is_no_failure() -> None:
    engine = FakeEngine()
    failures: list[PdserveError] = []
    ends: list[SequenceOutput] = []
    dispatcher = OutputDispatcher(engine, failures.append)
    dispatcher.start()
    dispatcher.submit(spec("a"), ends.append)
    await engine.stop()
    await settle()
    assert isinstance(ends[0].error, Unavailable)
    assert failures == []
    await dispatcher.stop()


async def test_a_consumer_that_raises_loses_its_sequence_and_harms_nobody() -> None:
    engine = FakeEngine()
    dispatcher = OutputDispatcher(engine)
    heard: list[SequenceOutput] = []

    def broken(item: SequenceOutput) -> None:
        raise RuntimeError("a defect")

    dispatcher.after_step(lambda: broken(output("x")))
    dispatcher.start()
    dispatcher.submit(spec("bad"), broken)
    dispatcher.submit(spec("good"), heard.append)
    for first in range(2):
        engine.step(output("bad", tokens=(1,), first=first), output("good", tokens=(1,), first=first))
    await settle()
    assert len(heard) == 2
    assert set(engine.aborted) == {"bad"}
    await dispatcher.stop()
