"""One process that is started again whenever it dies."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from pdserve.cluster.hosted import Hosted
from pdserve.core.clock import Clock, MonotonicClock
from pdserve.core.errors import PdserveError, Unavailable, from_foreign
from pdserve.core.tasks import end_task

log = logging.getLogger(__name__)

START_TIMEOUT_S = 300.0
STOP_TIMEOUT_S = 5.0
FIRST_BACKOFF_S = 0.1
LAST_BACKOFF_S = 10.0
"""Longest pause before another try; one that lived longer than this begins with the first pause again."""


class Kept:
    """Keeps one process alive from `start` to `stop`, as a new incarnation each time.

    `launch` makes the next process, `on_start` is given what it says of itself, `on_loss` hears of its death.
    """

    def __init__(
        self,
        name: str,
        launch: Callable[[], Hosted],
        on_start: Callable[[dict[str, Any]], Awaitable[None]],
        on_loss: Callable[[], None],
        *,
        clock: Clock | None = None,
        pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self.name = name
        self._launch = launch
        self._on_start = on_start
        self._on_loss = on_loss
        self._clock = clock or MonotonicClock()
        self._pause = pause
        self._hosted: Hosted | None = None
        self._task: asyncio.Task[None] | None = None
        self._first: asyncio.Future[None] | None = None

    async def start(self) -> None:
        """Start it; returns when it serves. Raises what its start raised; then nothing is left of it."""
        self._first = asyncio.get_running_loop().create_future()
        self._task = asyncio.create_task(self._run(self._first), name=f"keep-{self.name}")
        try:
            await asyncio.wait({self._first})
        except BaseException:
            await self.stop()
            raise
        if self._first.cancelled():
            raise Unavailable(f"{self.name} was stopped while it started")
        self._first.result()

    async def stop(self) -> None:
        """End it, in order if it takes less than STOP_TIMEOUT_S. Idempotent, also during a start."""
        await end_task(self._task)  # first, so that nobody starts it again
        if self._first is not None:
            self._first.cancel()
        hosted, self._hosted = self._hosted, None
        if hosted is None:
            return
        try:
            async with asyncio.timeout(STOP_TIMEOUT_S):
                await hosted.stop()
        except (PdserveError, TimeoutError) as error:
            log.info("%s is killed, it did not end in order: %s", self.name, error)
        finally:
            hosted.kill()

    async def _run(self, first: "asyncio.Future[None]") -> None:
        try:
            await self._begin()
        except Exception as error:
            first.set_exception(from_foreign(error))
            return
        first.set_result(None)
        backoff = FIRST_BACKOFF_S
        while True:
            since = self._clock.now()
            await self._until_death()
            if self._clock.now() - since > LAST_BACKOFF_S:
                backoff = FIRST_BACKOFF_S
            while self._hosted is None:
                await self._pause(backoff)
                backoff = min(2 * backoff, LAST_BACKOFF_S)
                await self._begin_again(backoff)

    async def _begin(self) -> None:
        hosted = self._hosted = self._launch()
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                said = await hosted.start()
            await self._on_start(said)
        except TimeoutError:
            self._discard()
            raise Unavailable(f"{self.name} did not start within {START_TIMEOUT_S:.0f} s") from None
        except Exception:
            self._discard()
            raise

    async def _begin_again(self, backoff: float) -> None:
        try:
            await self._begin()
        except Exception as error:
            ours = from_foreign(error)
            log.warning("%s did not start, next try in %.1f s: %s", self.name, backoff, ours.message)

    async def _until_death(self) -> None:
        assert self._hosted is not None
        reason = "it serves no more"
        try:
            await self._hosted.wait()
        except PdserveError as error:
            reason = error.message
        log.warning("%s is started again: %s", self.name, reason)
        self._discard()
        self._on_loss()

    def _discard(self) -> None:
        hosted, self._hosted = self._hosted, None
        if hosted is not None:
            hosted.kill()
