"""Admission with waiting: the asyncio shell around the pure `Admission`."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from pdserve.core.clock import Clock
from pdserve.core.errors import DeadlineExceeded
from pdserve.core.types import RequestId
from pdserve.router.admission import Admission, Admitted


class Slot:
    """One request's right to run; released exactly once, by whoever notices first that it ended."""

    def __init__(self, gate: "AdmissionGate", request: RequestId) -> None:
        self._gate = gate
        self._request = request
        self._held = True

    def release(self) -> None:
        if self._held:
            self._held = False
            self._gate.leave(self._request)


class AdmissionGate:
    """Requests enter in order of arrival, or are turned away at once."""

    def __init__(self, admission: Admission, clock: Clock) -> None:
        self.admission = admission
        self._clock = clock
        self._waiting: dict[RequestId, asyncio.Future[None]] = {}

    @asynccontextmanager
    async def enter(self, request: RequestId, deadline: float | None) -> AsyncIterator[Slot]:
        """Hold a slot. Raises Overloaded at once, DeadlineExceeded when the wait outlasts `deadline`."""
        slot = Slot(self, request)
        if self.admission.arrive(request, deadline, self._clock.now()) is Admitted.QUEUED:
            try:
                await self._turn(request, deadline)
            except BaseException:
                slot.release()
                raise
        try:
            yield slot
        finally:
            slot.release()

    def knows(self, request: RequestId) -> bool:
        """Whether a request of that name runs or waits."""
        return self.admission.knows(request)

    def leave(self, request: RequestId) -> None:
        """Free a slot or a place in the queue, and wake whom that admits."""
        for admitted in self.admission.leave(request, self._clock.now()):
            waiter = self._waiting[admitted]
            if not waiter.done():
                waiter.set_result(None)

    async def _turn(self, request: RequestId, deadline: float | None) -> None:
        waiter = asyncio.get_running_loop().create_future()
        self._waiting[request] = waiter
        began = self._clock.now()
        try:
            async with asyncio.timeout(None if deadline is None else deadline - began):
                await waiter
        except TimeoutError as error:
            waited = self._clock.now() - began
            raise DeadlineExceeded(
                f"request {request} waited {waited:.3f} s for a slot, then its deadline passed"
            ) from error
        finally:
            del self._waiting[request]
