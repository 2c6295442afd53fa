"""Tells the membership that the worker lives, and notices when the worker itself was away.

A process that was stopped, or starved, for longer than a session lives has been given up by its peers:
what it remembers is void. It must not go on under the old incarnation as if nothing had happened.
The wait for redis is bounded below that time, so a redis that hangs is never taken for such a gap.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable

from pdserve.core.clock import Clock
from pdserve.core.tasks import end_task
from pdserve.core.worker_record import WorkerLoad
from pdserve.kvtransfer.index.base import IndexUnavailable

log = logging.getLogger(__name__)


class Heartbeat:
    """One loop. `beat` tells the membership and answers whether this incarnation still counts.

    A redis that is away fences nobody: only the worker's own clock and the membership's word do.
    """

    def __init__(
        self,
        *,
        beat: Callable[[WorkerLoad], Awaitable[bool]],
        load: Callable[[], WorkerLoad],
        fence: Callable[[str], Awaitable[None]],
        period_s: float,
        bound_s: float,
        clock: Clock,
    ) -> None:
        self._beat = beat
        self._load = load
        self._fence = fence
        self._period_s = period_s
        self._bound_s = bound_s
        self._clock = clock
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._run(), name="heartbeat")

    async def stop(self) -> None:
        await end_task(self._task)

    async def _run(self) -> None:
        last = self._clock.now()
        while True:
            await asyncio.sleep(self._period_s)
            now = self._clock.now()
            away_s, last = now - last, now
            try:
                if away_s > self._bound_s:
                    await self._fence(
                        f"no heartbeat of its own for {away_s:.1f} s; the bound is {self._bound_s} s"
                    )
                    last = self._clock.now()  # a fence takes its time, too
                async with asyncio.timeout(self._bound_s / 2):
                    counts = await self._beat(self._load())
                if not counts:
                    await self._fence("a newer incarnation has taken its place")
                    last = self._clock.now()
            except (IndexUnavailable, TimeoutError) as error:
                log.warning("heartbeat not delivered: %s", error)
            except Exception:
                log.exception("a heartbeat failed")
