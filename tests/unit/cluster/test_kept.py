"""A kept process is started again until it is stopped, and never after."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from fake_hosted import FakeHosted, until

from pdserve.cluster.kept import FIRST_BACKOFF_S, LAST_BACKOFF_S, Kept
from pdserve.core.clock import ManualClock
from pdserve.core.errors import ConfigError, Unavailable


class Bench:
    """A Kept over processes given in order, whose pauses are recorded and end when told to."""

    def __init__(self, *processes: FakeHosted) -> None:
        self.processes = list(processes)
        self.launched: list[FakeHosted] = []
        self.said: list[dict[str, Any]] = []
        self.losses = 0
        self.pauses: list[float] = []
        self.clock = ManualClock()
        self.kept = Kept(
            "worker", self._launch, self._started, self._lost, clock=self.clock, pause=self._pause
        )

    def _launch(self) -> FakeHosted:
        self.launched.append(self.processes.pop(0))
        return self.launched[-1]

    async def _started(self, said: dict[str, Any]) -> None:
        self.said.append(said)

    def _lost(self) -> None:
        self.losses += 1

    async def _pause(self, seconds: float) -> None:
        self.pauses.append(seconds)
        await asyncio.sleep(0)


async def test_a_dead_process_is_killed_reported_and_followed_by_the_next() -> None:
    bench = Bench(FakeHosted({"number": 1}), FakeHosted({"number": 2}))
    await bench.kept.start()
    bench.launched[0].dead.set()
    await until(lambda: len(bench.said) == 2)
    assert [said["number"] for said in bench.said] == [1, 2]
    assert bench.losses == 1
    assert bench.launched[0].killed
    assert not bench.launched[1].killed
    await bench.kept.stop()
    assert bench.launched[1].stopped
    assert bench.launched[1].killed


async def test_a_first_start_that_fails_raises_its_error_and_is_not_tried_again() -> None:
    bench = Bench(FakeHosted(failure=ConfigError("no such model")), FakeHosted())
    with pytest.raises(ConfigError, match="no such model"):
        await bench.kept.start()
    await bench.kept.stop()
    assert len(bench.launched) == 1
    assert bench.launched[0].killed


async def test_restarts_that_fail_wait_twice_as_long_each_time_up_to_a_bound() -> None:
    failures = [FakeHosted(failure=Unavailable("not yet")) for _ in range(9)]
    bench = Bench(FakeHosted(), *failures, FakeHosted({"number": 11}))
    await bench.kept.start()
    bench.launched[0].dead.set()
    await until(lambda: len(bench.said) == 2)
    expected = [min(FIRST_BACKOFF_S * 2**n, LAST_BACKOFF_S) for n in range(10)]
    assert bench.pauses == pytest.approx(expected)
    assert bench.losses == 1
    assert all(process.killed for process in failures)
    await bench.kept.stop()


async def test_one_that_keeps_dying_is_slowed_down_and_one_that_lived_long_is_not() -> None:
    bench = Bench(*(FakeHosted() for _ in range(4)))
    await bench.kept.start()
    for number in range(2):
        bench.launched[number].dead.set()
        await until(lambda number=number: len(bench.said) == number + 2)
    await asyncio.sleep(0)
    bench.clock.advance(LAST_BACKOFF_S + 1)
    bench.launched[2].dead.set()
    await until(lambda: len(bench.said) == 4)
    assert bench.pauses == pytest.approx([FIRST_BACKOFF_S, 2 * FIRST_BACKOFF_S, FIRST_BACKOFF_S])
    await bench.kept.stop()


async def test_a_stop_during_the_first_start_ends_the_process_and_tells_who_waits() -> None:
    bench = Bench(FakeHosted(held=True))
    starting = asyncio.create_task(bench.kept.start())
    await until(lambda: bench.launched)
    await bench.launched[0].starting.wait()
    await bench.kept.stop()
    with pytest.raises(Unavailable, match="stopped while it started"):
        await starting
    assert bench.launched[0].killed
    assert bench.said == []


async def test_a_start_that_is_cancelled_leaves_nothing_running() -> None:
    bench = Bench(FakeHosted(held=True))
    starting = asyncio.create_task(bench.kept.start())
    await until(lambda: bench.launched)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert bench.launched[0].killed


@pytest.mark.parametrize("moment", ["pause", "start"])
async def test_a_stop_during_a_restart_starts_nothing_more(moment: str) -> None:
    bench = Bench(FakeHosted(), FakeHosted(held=True), FakeHosted())
    await bench.kept.start()
    bench.launched[0].dead.set()
    reached: dict[str, Callable[[], bool]] = {
        "pause": lambda: bool(bench.pauses),
        "start": lambda: len(bench.launched) == 2,
    }
    await until(reached[moment])
    launched = len(bench.launched)
    await bench.kept.stop()
    await asyncio.sleep(0)
    assert len(bench.launched) == launched
    assert all(process.killed for process in bench.launched)


async def test_a_process_that_cannot_be_stopped_in_order_is_killed() -> None:
    class Broken(FakeHosted):
        async def stop(self) -> None:
            raise Unavailable("no answer")

    bench = Bench(Broken())
    await bench.kept.start()
    await bench.kept.stop()
    assert bench.launched[0].killed
