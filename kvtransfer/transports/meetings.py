"""Where served grants and the claims for them wait for each other, in whatever order they come."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, TypeVar

from pdserve.core.types import HandoffId

Arrival = TypeVar("Arrival")


GIVEN_UP = "the serve of this grant was given up"


class Key(NamedTuple):
    """One grant, or one part of it where it travels in several."""

    handoff: HandoffId
    epoch: int
    seq: int
    part: int = 0


@dataclass(slots=True)
class _Meeting(Generic[Arrival]):
    """A None arrival: it was called off."""

    arrival: "asyncio.Future[Arrival | None]" = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )
    served: bool = False
    expiry: asyncio.TimerHandle | None = None
    """Of a claim that waits; a handle that is left behind would keep its reader in memory."""

    def stop_waiting(self) -> None:
        if self.expiry is not None:
            self.expiry.cancel()


class Meetings(Generic[Arrival]):
    """Each grant meets one claim at most. A claim that meets none is refused after `timeout_s`."""

    def __init__(self, timeout_s: float, refuse: Callable[[Arrival, str], None]) -> None:
        self._timeout_s = timeout_s
        self._refuse = refuse
        self._open: dict[Key, _Meeting[Arrival]] = {}

    async def serve(self, key: Key) -> Arrival | str:
        """Whose claim it is, or why there will be none. The caller bounds the wait."""
        meeting = self._open.setdefault(key, _Meeting())
        if meeting.served:
            return "this grant is being served already"
        meeting.served = True
        meeting.stop_waiting()
        try:
            return await meeting.arrival or "the handoff was called off"
        except asyncio.CancelledError:
            if not meeting.arrival.cancelled() and (arrival := meeting.arrival.result()) is not None:
                self._refuse(arrival, GIVEN_UP)  # it came in the very turn of the loop that ended the wait
            raise
        finally:
            if self._open.get(key) is meeting:
                del self._open[key]

    def claimed(self, key: Key, arrival: Arrival) -> None:
        meeting = self._open.setdefault(key, _Meeting())
        if meeting.arrival.done():
            self._refuse(arrival, "this grant has been claimed already")
            return
        meeting.arrival.set_result(arrival)
        if not meeting.served:
            loop = asyncio.get_running_loop()
            meeting.expiry = loop.call_later(self._timeout_s, self._expire, key)

    def call_off(self, reason: str, handoff: HandoffId | None = None) -> None:
        """Of one handoff, or all: serves end, claims are refused."""
        for key in [key for key in self._open if handoff in (None, key.handoff)]:
            self._end(key, reason)

    def _expire(self, key: Key) -> None:
        self._end(key, f"no such grant was served within {self._timeout_s} s")

    def _end(self, key: Key, reason: str) -> None:
        meeting = self._open.pop(key)
        meeting.stop_waiting()
        if not meeting.arrival.done():
            meeting.arrival.set_result(None)
        elif not meeting.served and (arrival := meeting.arrival.result()) is not None:
            self._refuse(arrival, reason)
