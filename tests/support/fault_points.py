"""Named fault points of a worker: what a test arms happens at the n-th passing of a point, and nowhere else.

Points that a worker passes, in the order of a handoff:

    to-p/<message>   D sends a message of the handoff stream: open, grant, release, abort
    to-d/<message>   D is about to read one: opened, chunk, filled, released, …
    connect          D wants the importer for its peer; its handoff is OPEN, or RESERVED while this is held
    fetch            D's transport is told to copy a chunk; its handoff is FETCHING
    fill             P's engine has made a step; its handoff is FILLING
    <event>          a lifecycle event (core/lifecycle.py)
"""

import asyncio
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pdserve.core.lifecycle import Lifecycle


@dataclass(frozen=True, slots=True)
class Fault:
    """What to do at the `nth` passing of `point` since it was armed. Crosses processes as a JSON object.

    Actions: `signal` sends `signal` to `pid` (its own process: within the passing), `drop` keeps a message of
    the stream from ever arriving, `hold` waits there until the points are released, `flip` has one byte of
    `pid`'s pool wrong while that chunk is copied, `slow` gives the link `share` of its speed from here on,
    `wire` changes the byte `offset` bytes into what P's socket sends from here on.
    """

    point: str
    action: str
    nth: int = 1
    pid: int = 0
    signal: int = 0
    share: float = 1.0
    offset: int = 0


@dataclass(slots=True)
class LinkState:
    """The way between D and P: full speed until a fault slows it down."""

    share: float | None = None
    """Of the measured speed; None: not limited."""
    flip_at: int | None = None
    """Bytes until the one that is changed on its way to D."""
    copied: list[tuple[int, float]] = field(default_factory=list)
    """(bytes, seconds) of chunks that were copied at full speed."""
    free_at: float = 0.0

    @property
    def bytes_per_s(self) -> float:
        """What the pair did at full speed: the median of its chunks."""
        rates = sorted(num_bytes / max(seconds, 1e-6) for num_bytes, seconds in self.copied)
        return rates[len(rates) // 2] if rates else 0.0

    async def take(self, num_bytes: int) -> None:
        """Wait for as long as `num_bytes` take on a slow link."""
        if self.share is None or not self.bytes_per_s:
            return
        now = asyncio.get_running_loop().time()
        self.free_at = max(now, self.free_at) + num_bytes / (self.share * self.bytes_per_s)
        await asyncio.sleep(self.free_at - now)


class FaultPoints:
    """One worker's points. Armed and released on the worker's event loop, or before it runs."""

    def __init__(self) -> None:
        self.link = LinkState()
        self.fired: list[str] = []
        self._armed: list[Fault] = []
        self._passed: Counter[str] = Counter()
        self._held: list[asyncio.Event] = []

    def arm(self, faults: Iterable[Fault]) -> None:
        """Replace what is armed; counting begins anew."""
        self.release()
        self._armed = list(faults)
        self._passed.clear()
        self.fired.clear()

    def release(self) -> None:
        """Disarm: whoever is held goes on, the link has its speed again."""
        self._armed = []
        self.link.share = self.link.flip_at = None
        held, self._held = self._held, []
        for event in held:
            event.set()

    @property
    def tampers_with_the_link(self) -> bool:
        return any(fault.action in ("slow", "wire") for fault in self._armed)

    def observe(self, event: Lifecycle, facts: Mapping[str, object]) -> None:
        """A worker's observer."""
        self.passing(event.value)

    def passing(self, point: str) -> Fault | None:
        """Do what is armed here and can be done at once; returns the fault that the caller has to act out."""
        self._passed[point] += 1
        due = [f for f in self._armed if f.point == point and f.nth == self._passed[point]]
        left: Fault | None = None
        for fault in due:
            self.fired.append(f"{fault.action} at {point}")
            match fault.action:
                case "signal":
                    os.kill(fault.pid, fault.signal)
                case "slow":
                    self.link.share = fault.share
                case "wire":
                    self.link.flip_at = fault.offset
                case _:
                    left = fault
        return left

    async def hold_at(self, point: str) -> Fault | None:
        """As `passing`, and waits here if that is armed."""
        fault = self.passing(point)
        if fault is None or fault.action != "hold":
            return fault
        event = asyncio.Event()
        self._held.append(event)
        await event.wait()
        return None

    def report(self) -> dict[str, Any]:
        return {"fired": self.fired, "bytes_per_s": self.link.bytes_per_s}
