"""When a worker gives up its incarnation by itself (invariant 7), and when it must not."""

import asyncio
from collections.abc import Callable

from pdserve.core.clock import ManualClock
from pdserve.core.worker_record import WorkerLoad
from pdserve.kvtransfer.index.base import IndexUnavailable
from pdserve.workers.heartbeat import Heartbeat

BOUND_S = 5.0


class Cluster:
    """What a heartbeat talks to: a membership, a clock that moves by `steps` between beats, and a fence."""

    def __init__(self, steps: tuple[float, ...], answer: Callable[[int], bool]) -> None:
        self.clock = ManualClock()
        self.fenced: list[str] = []
        self.beats = 0
        self._steps = steps
        self._answer = answer
        self._over = asyncio.Event()

    async def beat(self, load: WorkerLoad) -> bool:
        number, self.beats = self.beats, self.beats + 1
        if number == len(self._steps):
            self._over.set()
        if number < len(self._steps):
            self.clock.advance(self._steps[number])
        return self._answer(number)

    async def fence(self, reason: str) -> None:
        self.fenced.append(reason)

    async def run(self) -> None:
        """Until every step has been seen by the beat that follows it."""
        heartbeat = Heartbeat(
            beat=self.beat,
            load=WorkerLoad,
            fence=self.fence,
            period_s=0.0,
            bound_s=BOUND_S,
            clock=self.clock,
        )
        heartbeat.start()
        async with asyncio.timeout(10):
            await self._over.wait()
        await heartbeat.stop()


def counts(number: int) -> bool:
    return True


async def test_a_gap_in_its_own_loop_past_the_bound_fences_once() -> None:
    cluster = Cluster((1.0, BOUND_S + 1.0, 1.0, 1.0), counts)
    await cluster.run()
    assert len(cluster.fenced) == 1
    assert "6.0 s" in cluster.fenced[0]
    assert "5.0 s" in cluster.fenced[0]


async def test_gaps_up_to_the_bound_fence_nobody() -> None:
    cluster = Cluster((BOUND_S, BOUND_S - 0.1, 0.0, BOUND_S), counts)
    await cluster.run()
    assert cluster.fenced == []


async def test_a_redis_outage_alone_never_fences() -> None:
    """However long it is, as long as the worker's own loop goes round."""

    def away(number: int) -> bool:
        if 1 <= number <= 40:
            raise IndexUnavailable("redis is away")
        return True

    cluster = Cluster((1.0,) * 45, away)
    await cluster.run()
    assert cluster.clock.now() > 8 * BOUND_S
    assert cluster.fenced == []
    assert cluster.beats > 41  # and it goes on once redis is back


async def test_a_worker_that_was_replaced_fences_itself() -> None:
    cluster = Cluster((0.1, 0.1, 0.1), lambda number: number != 1)
    await cluster.run()
    assert len(cluster.fenced) == 1
    assert "newer incarnation" in cluster.fenced[0]


async def test_a_gap_counts_also_while_redis_is_away() -> None:
    def away(number: int) -> bool:
        raise IndexUnavailable("redis is away")

    cluster = Cluster((0.1, BOUND_S + 1.0, 0.1), away)
    await cluster.run()
    assert len(cluster.fenced) == 1
