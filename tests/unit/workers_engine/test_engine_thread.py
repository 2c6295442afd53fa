"""The engine in its own thread, end to end with asyncio."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable

import pytest
import torch
from engine_harness import Harness, expected_tokens, greedy, make_spec, prompt_of

from pdserve.core.errors import ConfigError, InternalError, Unavailable
from pdserve.core.types import FinishReason, OwnerId, SequenceId
from pdserve.workers.engine.client import ThreadEngineClient
from pdserve.workers.engine.messages import EngineClient, SequenceOutput, SequenceSpec, StepOutputs
from pdserve.workers.engine.runner import BatchSpec, Sampled


class Gate:
    """A runner that stops before each step until it is let through."""

    def __init__(self, inner: Callable[[BatchSpec], list[Sampled]]) -> None:
        self.entered = threading.Semaphore(0)
        self.passes = threading.Semaphore(0)
        self.threads: list[tuple[str, int]] = []
        self._inner = inner

    def run(self, batch: BatchSpec) -> list[Sampled]:
        self.threads.append((threading.current_thread().name, torch.get_num_threads()))
        self.entered.release()
        assert self.passes.acquire(timeout=30)
        return self._inner(batch)


class Reader:
    """Collects outputs until sequences have ended."""

    def __init__(self, client: EngineClient) -> None:
        self.items: dict[str, list[SequenceOutput]] = {}
        self._steps = client.outputs()

    async def until_ended(self, *names: str) -> None:
        while not all(self._has_ended(name) for name in names):
            self.add(await anext(self._steps))

    def add(self, outputs: StepOutputs) -> None:
        for item in outputs.items:
            self.items.setdefault(item.sequence_id, []).append(item)

    def tokens(self, name: str) -> list[int]:
        return [token for item in self.items[name] for token in item.new_token_ids]

    async def rest(self) -> None:
        async for outputs in self._steps:
            self.add(outputs)

    def _has_ended(self, name: str) -> bool:
        items = self.items.get(name, [])
        return bool(items) and (items[-1].finish_reason is not None or items[-1].error is not None)


def count_steps(harness: Harness) -> threading.Semaphore:
    """Released after each step of the engine."""
    stepped, step = threading.Semaphore(0), harness.engine.step

    def counted() -> StepOutputs:
        try:
            return step()
        finally:
            stepped.release()

    harness.engine.step = counted  # type: ignore[method-assign]
    return stepped


@pytest.fixture
async def gated() -> AsyncIterator[tuple[Harness, ThreadEngineClient, Gate]]:
    """A started client whose steps wait for the test; they run freely once it is over."""
    harness = Harness()
    gate = Gate(harness.runner.run)
    harness.engine._runner = gate
    client = ThreadEngineClient(harness.engine, threads=2)
    await client.start()
    yield harness, client, gate
    gate.passes.release(1000)
    await client.stop()


async def test_end_to_end() -> None:
    harness = Harness(pool_blocks=12)
    client = ThreadEngineClient(harness.engine)
    await client.start()
    reader = Reader(client)
    names = [f"s{number}" for number in range(6)]
    for number, name in enumerate(names):
        client.submit(make_spec(name, prompt_of(10 + 9 * number, number), greedy(30, seed=number)))
    await reader.until_ended(*names)
    for number, name in enumerate(names):
        expected = expected_tokens(prompt_of(10 + 9 * number, number), greedy(30, seed=number))
        assert reader.tokens(name) == expected
    client.check_integrity()
    stats = client.stats()
    assert (stats.running, stats.waiting, stats.queued_prefill_tokens) == (0, 0, 0)
    assert stats.progress > 0
    assert stats.perf == harness.perf.snapshot()
    await client.stop()
    assert harness.pool.owners() == ()


async def test_an_idle_engine_takes_no_step() -> None:
    harness = Harness()
    client = ThreadEngineClient(harness.engine)
    await client.start()
    reader = Reader(client)
    client.submit(make_spec("a", prompt_of(5), greedy(1)))
    await reader.until_ended("a")
    progress = client.stats().progress
    harness.pool.allocate(OwnerId("other"), 5)
    harness.pool.release(OwnerId("other"))  # memory news do not interest who has nothing to run
    client.submit(make_spec("b", prompt_of(5, 1), greedy(1)))
    await reader.until_ended("b")
    await client.stop()
    assert client.stats().progress == progress + 1


async def test_steps_run_in_the_thread_with_its_own_thread_count(
    gated: tuple[Harness, ThreadEngineClient, Gate],
) -> None:
    _, client, gate = gated
    reader = Reader(client)
    client.submit(make_spec("s", prompt_of(5), greedy(1)))
    gate.passes.release()
    await reader.until_ended("s")
    assert gate.threads == [("engine", 2)]


async def test_what_waits_in_the_inbox_is_counted(gated: tuple[Harness, ThreadEngineClient, Gate]) -> None:
    _, client, gate = gated
    client.submit(make_spec("a", prompt_of(5), greedy(1)))
    await asyncio.to_thread(gate.entered.acquire)
    client.submit(make_spec("b", prompt_of(30, 1), greedy(1)))
    stats = client.stats()  # does not wait for the step
    assert stats.waiting == 2  # the one in the step that has not ended, and the one in the inbox
    assert stats.queued_prefill_tokens == 35


async def test_an_abort_acts_at_the_next_step_boundary(
    gated: tuple[Harness, ThreadEngineClient, Gate],
) -> None:
    harness, client, gate = gated
    reader = Reader(client)
    client.submit(make_spec("s", prompt_of(5), greedy(50)))
    await asyncio.to_thread(gate.entered.acquire)
    client.abort(SequenceId("s"))
    client.abort(SequenceId("nobody"))
    gate.passes.release()
    await reader.until_ended("s")
    assert [item.finish_reason for item in reader.items["s"]] == [None, FinishReason.ABORT]
    assert len(reader.tokens("s")) == 1
    assert harness.pool.table(OwnerId("s")) == ()


async def test_freed_memory_wakes_a_stalled_engine() -> None:
    harness = Harness(pool_blocks=2)
    harness.pool.allocate(OwnerId("other"), 2)
    client = ThreadEngineClient(harness.engine, stalled_step_s=3600)
    stepped = count_steps(harness)
    await client.start()
    reader = Reader(client)
    client.submit(make_spec("s", prompt_of(20), greedy(3)))
    await asyncio.to_thread(stepped.acquire)
    assert client.stats().waiting == 1
    harness.pool.release(OwnerId("other"))
    await reader.until_ended("s")
    assert reader.tokens("s") == expected_tokens(prompt_of(20), greedy(3))
    await client.stop()


async def test_a_stalled_engine_still_makes_progress_in_its_heartbeat() -> None:
    harness = Harness(pool_blocks=2)
    harness.pool.allocate(OwnerId("other"), 2)
    client = ThreadEngineClient(harness.engine, stalled_step_s=0.001)
    stepped = count_steps(harness)
    await client.start()
    client.submit(make_spec("s", prompt_of(20), greedy(3)))
    for _ in range(3):  # nothing wakes it: it steps by itself
        await asyncio.to_thread(stepped.acquire)
    await client.stop()
    assert client.stats().progress >= 3
    assert harness.runner.batches == []


async def test_stop_aborts_what_lives_and_ends_the_outputs(
    gated: tuple[Harness, ThreadEngineClient, Gate],
) -> None:
    harness, client, gate = gated
    client.submit(make_spec("s", prompt_of(5), greedy(500)))
    await asyncio.to_thread(gate.entered.acquire)
    client.submit(make_spec("late", prompt_of(5, 1), greedy(500)))
    gate.passes.release(1000)
    await client.stop()
    await client.stop()
    reader = Reader(client)
    await reader.rest()
    assert reader.items["s"][-1].finish_reason is FinishReason.ABORT
    assert reader.items["late"][-1].finish_reason is FinishReason.ABORT
    assert harness.pool.owners() == ()
    with pytest.raises(Unavailable):
        client.submit(make_spec("t", prompt_of(5), greedy(1)))


async def test_stop_without_start_ends_the_outputs() -> None:
    client = ThreadEngineClient(Harness().engine)
    await client.stop()
    assert [outputs async for outputs in client.outputs()] == []
    with pytest.raises(InternalError):
        await client.start()


async def test_a_failing_step_does_not_end_the_thread() -> None:
    harness = Harness()
    harness.runner.fail_next = RuntimeError("a broken kernel")
    client = ThreadEngineClient(harness.engine)
    await client.start()
    reader = Reader(client)
    client.submit(make_spec("a", prompt_of(5), greedy(2)))
    await reader.until_ended("a")
    assert isinstance(reader.items["a"][-1].error, InternalError)
    client.submit(make_spec("b", prompt_of(5), greedy(2)))
    await reader.until_ended("b")
    assert reader.tokens("b") == expected_tokens(prompt_of(5), greedy(2))
    await client.stop()


async def test_a_fatal_defect_is_told_to_everybody(gated: tuple[Harness, ThreadEngineClient, Gate]) -> None:
    harness, client, gate = gated
    client.submit(make_spec("running", prompt_of(5), greedy(5)))
    await asyncio.to_thread(gate.entered.acquire)
    client.submit(make_spec("queued", prompt_of(5, 1), greedy(5)))

    def broken() -> None:
        raise ZeroDivisionError("a defect of the scheduler")

    harness.engine._scheduler.schedule = broken  # type: ignore[assignment, method-assign]
    gate.passes.release(1000)
    reader = Reader(client)
    with pytest.raises(InternalError, match="a defect of the scheduler"):
        await reader.rest()
    for name in ("running", "queued"):
        assert isinstance(reader.items[name][-1].error, InternalError)
    for call in (client.stats, lambda: client.submit(make_spec("late", prompt_of(5), greedy(1)))):
        with pytest.raises(InternalError, match="a defect of the scheduler"):
            call()
    assert harness.pool.owners() == ()


async def test_the_role_weight_reaches_the_scheduler(
    gated: tuple[Harness, ThreadEngineClient, Gate],
) -> None:
    harness, client, gate = gated
    reader = Reader(client)
    client.submit(make_spec("decode", prompt_of(5), greedy(4)))
    await asyncio.to_thread(gate.entered.acquire)
    client.set_role_weight(0.0)
    client.submit(make_spec("prefill", prompt_of(60, 1), None))
    gate.passes.release(1000)
    await reader.until_ended("prefill", "decode")
    assert [item.num_computed for item in reader.items["prefill"]][:2] == [16, 32]
    with pytest.raises(ConfigError):
        client.set_role_weight(1.5)
    harness.pool.release(OwnerId("prefill"))


async def test_a_second_start_is_refused(gated: tuple[Harness, ThreadEngineClient, Gate]) -> None:
    with pytest.raises(InternalError):
        await gated[1].start()


def test_a_loop_that_was_closed_under_it_ends_the_thread() -> None:
    harness = Harness()
    gate = Gate(harness.runner.run)
    harness.engine._runner = gate
    client = ThreadEngineClient(harness.engine)
    loop = asyncio.new_event_loop()
    loop.run_until_complete(client.start())
    client.submit(make_spec("s", prompt_of(5), greedy(5)))
    assert gate.entered.acquire(timeout=30)
    loop.close()
    gate.passes.release(1000)
    client._thread.join(timeout=30)
    assert not client._thread.is_alive()
    assert harness.pool.owners() == ()


async def test_many_long_sequences_are_taken_in_over_several_steps() -> None:
    """Taking all of them at once would hold up the tokens of those that run."""
    harness = Harness()
    client = ThreadEngineClient(harness.engine, intake_tokens=40)
    taken_at: list[int] = []
    submit = harness.engine.submit

    def note(spec: SequenceSpec) -> None:
        taken_at.append(harness.engine.stats().progress)
        submit(spec)

    harness.engine.submit = note  # type: ignore[method-assign]
    names = [f"s{number}" for number in range(5)]
    for number, name in enumerate(names):
        client.submit(make_spec(name, prompt_of(50 if number == 0 else 20, number), greedy(2)))
    await client.start()
    reader = Reader(client)
    async with asyncio.timeout(30):
        await reader.until_ended(*names)
    await client.stop()
    assert taken_at == [0, 1, 1, 2, 2]
