"""Tells the index what one worker's pool holds."""

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from pdserve.core.clock import Clock, MonotonicClock
from pdserve.core.tasks import end_task
from pdserve.core.types import BlockName, Incarnation, WorkerId
from pdserve.kvtransfer.index.base import IndexUnavailable, LocationIndex, Update

_log = logging.getLogger(__name__)

_ATTEMPTS = 3
"""Rounds of one flush: what was queued, then all again after a gap, then once more."""


@dataclass(frozen=True, slots=True)
class AnnouncerLimits:
    """Sizes and times (seconds) of the announcements."""

    batch_s: float = 0.02
    batch_names: int = 512
    """Most names of one call."""
    full_names: int = 4096
    """Most names of one call of a full announcement; bounds how long a call blocks the server."""
    queue_events: int = 16384
    """Events kept while the index is away; past it the queue is dropped, and everything announced later."""
    probe_s: float = 0.5
    """After this long without news, ask whether the index still has what it was told."""
    retry_s: float = 0.5


@dataclass(frozen=True, slots=True)
class _Event:
    """A report of the pool. Consecutive numbers show whether the bounded queue lost some."""

    number: int
    stored: bool
    names: tuple[BlockName, ...]


class CacheAnnouncer:
    """The pool's CacheListener on one side, a task that writes to the index on the other.

    Producer: the pool, from whatever thread, its lock held: `stored` and `removed` only append.
    Consumer: the task of `start` (or `flush`), on one event loop.

    Everything is announced again (`snapshot`, then `replace`) at the start, after any failure or gap, after a
    lost event and for a new incarnation. A restarted, flushed or restored server shows up as a gap, at the
    latest when an idle announcer probes. One announcer per incarnation: it owns the sequence numbers.
    """

    def __init__(
        self,
        index: LocationIndex,
        worker: WorkerId,
        incarnation: Incarnation,
        representation: str,
        snapshot: Callable[[], Sequence[BlockName]],
        limits: AnnouncerLimits | None = None,
        clock: Clock | None = None,
    ) -> None:
        """`snapshot` lists all names that the pool can serve now, parents first; called on the event loop."""
        self._index = index
        self._worker = worker
        self._incarnation = incarnation
        self._representation = representation
        self._snapshot = snapshot
        self._limits = limits or AnnouncerLimits()
        self._clock = clock or MonotonicClock()
        self._events: deque[_Event] = deque(maxlen=self._limits.queue_events)
        self._reported = 0  # number of the last event; written under the pool's lock only
        self._taken = 0  # number of the last event that left the queue
        self._seq = 0
        self._needs_full = True
        self._sent_at = self._clock.now()
        self._round_lock = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None
        self.full_announcements = 0
        """How often everything was announced, the first time included."""

    @property
    def in_sync(self) -> bool:
        """The index has confirmed everything up to the last batch."""
        return not self._needs_full

    def stored(self, names: Sequence[BlockName]) -> None:
        """CacheListener: these names can be found in the pool from now on."""
        self._report(True, names)

    def removed(self, names: Sequence[BlockName]) -> None:
        """CacheListener: these names are gone, children first."""
        self._report(False, names)

    def start(self) -> None:
        """Begin to announce, on the running event loop."""
        if self._task is None:
            self._task = asyncio.create_task(self._run(), name=f"announce {self._worker}")

    async def stop(self) -> None:
        """Announce no more. What the index has stays; `Membership.withdraw` removes it."""
        task, self._task = self._task, None
        await end_task(task)

    async def renew(self, incarnation: Incarnation) -> None:
        """Speak for a new incarnation of the worker, from the beginning."""
        async with self._round_lock:
            self._incarnation = incarnation
            self._seq = 0
            self._needs_full = True

    async def flush(self) -> None:
        """Bring the index up to everything that was reported before this call.

        Raises IndexUnavailable where the index does not answer or loses the entries again and again.
        """
        async with self._round_lock:
            for _ in range(_ATTEMPTS):
                await self._round()
                if not self._needs_full:
                    return
        raise IndexUnavailable(f"the index lost the blocks of {self._worker} {_ATTEMPTS} times in a row")

    def _report(self, stored: bool, names: Sequence[BlockName]) -> None:
        self._reported += 1
        self._events.append(_Event(self._reported, stored, tuple(names)))

    async def _run(self) -> None:
        reachable = True
        while True:
            pause_s = self._limits.batch_s
            try:
                await self.flush()
                reachable = True
            except IndexUnavailable as error:
                pause_s = self._limits.retry_s
                if reachable:
                    _log.warning("%s stops announcing its cache: %s", self._worker, error)
                reachable = False
            except Exception:
                pause_s = self._limits.retry_s
                _log.exception("%s could not announce its cache", self._worker)
            await asyncio.sleep(pause_s)

    async def _round(self) -> None:
        events, complete = self._take()
        idle_s = self._clock.now() - self._sent_at
        try:
            if self._needs_full or not complete:
                self._needs_full = True
                await self._announce_all()
            elif events:
                await self._announce(events)
            elif idle_s >= self._limits.probe_s:
                await self._add(())
        except BaseException:
            self._needs_full = True  # what left the queue may not have arrived, also after a cancel
            raise

    def _take(self) -> tuple[list[_Event], bool]:
        """Empty the queue. False: it had overflowed, so some events are missing."""
        events: list[_Event] = []
        complete = True
        while self._events:
            event = self._events.popleft()
            complete = complete and event.number == self._taken + 1
            self._taken = event.number
            events.append(event)
        return events, complete

    async def _announce(self, events: Iterable[_Event]) -> None:
        """Send the net change. Removals first: the pool is prefix-closed after the last event, so no name
        that stays has a parent among them."""
        change: dict[BlockName, bool] = {}
        for event in events:
            for name in event.names:
                if change.get(name) is not event.stored:
                    change.pop(name, None)  # a changed mind moves to the end: order of the final say
                    change[name] = event.stored
        removed = [name for name, stored in change.items() if not stored]
        added = [name for name, stored in change.items() if stored]
        for part in _parts(removed, self._limits.batch_names):
            if not await self._remove(part):
                return
        for part in _parts(added, self._limits.batch_names):
            if not await self._add(part):
                return

    async def _announce_all(self) -> None:
        """Events between `_take` and the snapshot come again afterwards; the last say of each name stands."""
        names = self._snapshot()
        parts = list(_parts(names, self._limits.full_names)) or [()]
        update = await self._index.replace(
            self._worker, self._incarnation, self._next(), parts[0], self._representation
        )
        arrived = self._arrived(update)
        for part in parts[1:]:
            arrived = arrived and await self._add(part)
        if arrived:
            self._needs_full = False
            self.full_announcements += 1

    async def _add(self, names: Sequence[BlockName]) -> bool:
        seq = self._next()
        return self._arrived(
            await self._index.add(self._worker, self._incarnation, seq, names, self._representation)
        )

    async def _remove(self, names: Sequence[BlockName]) -> bool:
        seq = self._next()
        return self._arrived(await self._index.remove(self._worker, self._incarnation, seq, names))

    def _next(self) -> int:
        self._seq += 1
        return self._seq

    def _arrived(self, update: Update) -> bool:
        self._sent_at = self._clock.now()
        if update is not Update.APPLIED:
            self._needs_full = True
        return update is Update.APPLIED


def _parts(names: Sequence[BlockName], size: int) -> Iterator[Sequence[BlockName]]:
    for start in range(0, len(names), size):
        yield names[start : start + size]
