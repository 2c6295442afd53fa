"""Handoffs of one decode worker that want memory: oldest first, none overtakes who has asked for it."""

import asyncio
from collections.abc import Callable
from typing import Protocol

from pdserve.core.errors import InternalError
from pdserve.kvtransfer.handoff.events import MemoryFreed
from pdserve.kvtransfer.handoff.late_reservation import Demand
from pdserve.kvtransfer.pool.pool import KvPool


class Waiter(Protocol):
    """Asks again when it is fed MemoryFreed."""

    def feed(self, event: object) -> None: ...


class Reservations:
    """The order in which handoffs get blocks. They hold none while they wait.

        expect ──► may_try ──► (reserved) leave
           │          └──► wait: in line, until the pool has room
           └──► defer: by choice, while others can use the blocks better

    `preempted()` says how many blocks sequences wait for that had to yield: those are not given to handoffs,
    which came later.

    `relieve`, if given, is told at every heartbeat how many blocks somebody waits for, so that a worker that
    also prefills can give up exports that nobody fetches: two such workers could hold blocks for each other.
    """

    def __init__(
        self,
        pool: KvPool,
        relieve: Callable[[int], object] | None = None,
        preempted: Callable[[], int] | None = None,
    ) -> None:
        self._pool = pool
        self._preempted = preempted or (lambda: 0)
        self._expected: dict[Waiter, int] = {}
        self._waiting: dict[Waiter, int] = {}
        self._deferred: dict[Waiter, asyncio.TimerHandle] = {}
        self._relieve = relieve
        self._scheduled = False
        self._loop: asyncio.AbstractEventLoop | None = None
        pool.add_free_listener(self._freed)

    def __len__(self) -> int:
        """How many wait because the pool refused them, or somebody older."""
        return len(self._waiting)

    def expect(self, waiter: Waiter, blocks: int) -> None:
        """It is promised, and will ask for `blocks` sooner or later; `leave` ends that."""
        self._loop = asyncio.get_running_loop()
        self._expected[waiter] = blocks

    def demand(self, waiter: Waiter) -> Demand:
        """The pool as `waiter` sees it. Prefixes that D holds in use count as wanted: an upper bound."""
        own = self._expected.get(waiter, 0)
        others = sum(self._expected.values()) - own
        return Demand(self._pool.available(), own, others)

    def may_try(self, waiter: Waiter) -> bool:
        """Whether nobody older waits, a preempted sequence included; joins the queue otherwise."""
        self._undefer(waiter)
        first = next(iter(self._waiting), waiter)
        owed = self._preempted()
        yields = owed > 0 and self._pool.available() < owed + self._expected.get(waiter, 0)
        if first is not waiter or yields:
            self._waiting.setdefault(waiter, 0)
        return first is waiter and not yields

    def may_take(self, blocks: int) -> bool:
        """Whether nobody waits who would miss `blocks`: for who takes them at once or not at all.

        Those that it has cached are among them: to pin one takes it from the others, too.
        """
        owed = self._preempted()
        return not self._waiting and (owed == 0 or self._pool.available() >= owed + blocks)

    def wait(self, waiter: Waiter, blocks: int) -> None:
        """The pool could not deliver `blocks`: feed MemoryFreed when it may."""
        self._waiting[waiter] = blocks
        if self._pool.available() >= blocks:
            self._schedule()  # freed in another thread after the refusal, when nobody was in line yet

    def defer(self, waiter: Waiter, wait_s: float) -> None:
        """It chose to ask later: feed MemoryFreed in `wait_s` seconds, or when the pool is tight no more."""
        self._undefer(waiter)
        self._deferred[waiter] = asyncio.get_running_loop().call_later(wait_s, self._due, waiter)

    def is_deferred(self, waiter: Waiter) -> bool:
        """Whether it waits by choice."""
        return waiter in self._deferred

    def press(self) -> None:
        """Somebody still waits: let the oldest one try, and say how many blocks it wants."""
        self._schedule()  # what a preempted sequence was owed may have been paid without a gain for the pool
        wanted = next(iter(self._waiting.values()), 0)
        if self._relieve is not None and wanted:
            self._relieve(wanted)

    def leave(self, waiter: Waiter) -> None:
        """It has its blocks, or wants them no more. Idempotent."""
        known = self._expected.pop(waiter, None) is not None
        self._undefer(waiter)
        waited = self._waiting.pop(waiter, None) is not None
        if (waited and self._waiting) or (known and self._deferred):
            self._schedule()

    def check_idle(self) -> None:
        """Raise InternalError where somebody is expected who does not exist."""
        left = len({*self._expected, *self._waiting, *self._deferred})
        if left:
            raise InternalError(f"no handoff is in flight, but {left} are expected to reserve blocks")

    def _undefer(self, waiter: Waiter) -> None:
        timer = self._deferred.pop(waiter, None)
        if timer is not None:
            timer.cancel()

    def _due(self, waiter: Waiter) -> None:
        del self._deferred[waiter]
        waiter.feed(MemoryFreed())

    def _freed(self) -> None:
        """In any thread: the pool has more than before."""
        loop = self._loop
        if loop is not None and (self._waiting or self._deferred) and not loop.is_closed():
            loop.call_soon_threadsafe(self._schedule)

    def _schedule(self) -> None:
        if not self._scheduled:
            self._scheduled = True
            asyncio.get_running_loop().call_soon(self._offer)

    def _offer(self) -> None:
        self._scheduled = False
        if self._waiting:
            # Whoever gets its blocks leaves, and with that the next one is asked.
            next(iter(self._waiting)).feed(MemoryFreed())
        for waiter in tuple(self._deferred):
            if waiter in self._deferred and not self.demand(waiter).tight:
                waiter.feed(MemoryFreed())
