"""Handoffs of one decode worker that wait for memory: oldest first, none overtakes."""

import asyncio
import threading
from collections.abc import Callable
from typing import Protocol

from pdserve.core.types import OwnerId
from pdserve.kvtransfer.handoff.events import MemoryFreed
from pdserve.kvtransfer.pool.pool import KvPool


class Waiter(Protocol):
    """Asks again when it is fed MemoryFreed."""

    def feed(self, event: object) -> None: ...


class Reservations:
    """The order in which handoffs get blocks. They hold none while they wait.

    `relieve`, if given, is told at every heartbeat how many blocks somebody waits for, so that a worker that
    also prefills can give up exports that nobody fetches: two such workers could hold blocks for each other.
    """

    def __init__(self, pool: KvPool, relieve: Callable[[int], object] | None = None) -> None:
        self._pool = pool
        self._waiting: dict[Waiter, int] = {}
        self._relieve = relieve
        self._scheduled = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._giving_back_in: int | None = None
        pool.add_free_listener(self._freed)

    def __len__(self) -> int:
        """How many wait."""
        return len(self._waiting)

    def may_try(self, waiter: Waiter) -> bool:
        """Whether nobody older waits; joins the queue otherwise."""
        first = next(iter(self._waiting), waiter)
        if first is not waiter:
            self._waiting.setdefault(waiter, 0)
        return first is waiter

    def wait(self, waiter: Waiter, blocks: int) -> None:
        """The pool could not deliver `blocks`: feed MemoryFreed when it may."""
        self._loop = asyncio.get_running_loop()
        self._waiting[waiter] = blocks

    def give_back(self, owner: OwnerId) -> None:
        """Release what a try took before it failed. That is no news to who waits: it would try for ever."""
        self._giving_back_in = threading.get_ident()
        try:
            self._pool.release(owner)
        finally:
            self._giving_back_in = None

    def press(self) -> None:
        """Somebody still waits: say how many blocks the oldest one wants."""
        wanted = next(iter(self._waiting.values()), 0)
        if self._relieve is not None and wanted:
            self._relieve(wanted)

    def leave(self, waiter: Waiter) -> None:
        """It has its blocks, or wants them no more. Idempotent."""
        if self._waiting.pop(waiter, None) is not None and self._waiting:
            self._schedule()

    def _freed(self) -> None:
        """In any thread: the pool has more than before."""
        if self._giving_back_in == threading.get_ident():
            return
        loop = self._loop
        if loop is not None and self._waiting and not loop.is_closed():
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
