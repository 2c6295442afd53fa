"""The members as one observer sees them, also while redis is away."""

import asyncio
import contextlib
import logging
from collections.abc import Callable

from pdserve.core.clock import Clock, MonotonicClock
from pdserve.core.errors import Unavailable
from pdserve.core.tasks import end_task
from pdserve.kvtransfer.index.base import IndexUnavailable
from pdserve.kvtransfer.index.membership import Listing, Member, Membership

_log = logging.getLogger(__name__)

Members = tuple[Member, ...]
Listener = Callable[[Members], None]


class MembershipView:
    """Polls a Membership and keeps its last answer.

    While the server does not answer nobody leaves. After an outage or a restart of the server a member that
    is not listed stays for one more time to live, so that the workers can announce themselves again: expiry
    counts only while the server answers. One task, one event loop; `current` is safe to read between awaits.
    """

    def __init__(
        self,
        membership: Membership,
        poll_s: float = 0.5,
        ttl_s: float = 3.0,
        clock: Clock | None = None,
        *,
        sweeps: bool = True,
    ) -> None:
        """`sweeps`: whether this observer also clears the index of those who left. Some should, not all."""
        self._sweeps = sweeps
        self._membership = membership
        self._poll_s = poll_s
        self._ttl_s = ttl_s
        self._clock = clock or MonotonicClock()
        self._members: Members = ()
        self._available = False
        self._run_id: str | None = None
        self._unreadable: tuple[str, ...] = ()
        self._patient_until = self._clock.now()
        self._sweep_at = self._clock.now() + ttl_s
        self._listeners: list[Listener] = []
        self._refreshed = asyncio.Event()  # a new one per refresh; the old one is set
        self._task: asyncio.Task[None] | None = None

    def current(self) -> Members:
        """The last members known, ordered by worker id. Ages and loads are those of the last answer."""
        return self._members

    @property
    def available(self) -> bool:
        """The server answered the last poll."""
        return self._available

    def subscribe(self, listener: Listener) -> Callable[[], None]:
        """Call `listener(members)` on the event loop whenever a record comes, changes or goes.

        New loads alone are no change. Returns a function that ends the subscription.
        """
        self._listeners.append(listener)

        def unsubscribe() -> None:
            with contextlib.suppress(ValueError):
                self._listeners.remove(listener)

        return unsubscribe

    async def wait_until(self, holds: Callable[[Members], bool], timeout_s: float) -> Members:
        """The members as soon as they satisfy `holds`.

        Raises Unavailable, naming the members there are, after `timeout_s`.
        """
        try:
            async with asyncio.timeout(timeout_s):
                while not holds(self._members):
                    await self._refreshed.wait()
        except TimeoutError as error:
            there = ", ".join(member.record.worker for member in self._members) or "nobody"
            reachable = "redis answers" if self._available else "redis does not answer"
            raise Unavailable(
                f"the cluster did not become as wanted within {timeout_s:g} s: {reachable}, members: {there}"
            ) from error
        return self._members

    def start(self) -> None:
        """Begin to poll, on the running event loop."""
        if self._task is None:
            self._task = asyncio.create_task(self._watch(), name="watch members")

    async def stop(self) -> None:
        """Poll no more; the last members stay readable."""
        task, self._task = self._task, None
        await end_task(task)

    async def refresh(self) -> bool:
        """Poll once. False where the server gave no answer; everything is as it was then."""
        try:
            listing = await self._membership.listing()
        except IndexUnavailable as error:
            if self._available:
                _log.warning("keeping the last %d members: %s", len(self._members), error)
            self._available = False
            self._wake()
            return False
        self._accept(listing)
        await self._sweep_when_due()
        return True

    def _accept(self, listing: Listing) -> None:
        now = self._clock.now()
        if not self._available or listing.run_id != self._run_id:
            self._patient_until = now + self._ttl_s
        if listing.unreadable and listing.unreadable != self._unreadable:
            _log.warning("members of another version, ignored: %s", ", ".join(listing.unreadable))
        self._available, self._run_id, self._unreadable = True, listing.run_id, listing.unreadable
        members = {member.record.worker: member for member in listing.members}
        if now < self._patient_until:
            members = {member.record.worker: member for member in self._members} | members
        before = [member.record for member in self._members]
        self._members = tuple(members[worker] for worker in sorted(members))
        self._wake()
        if [member.record for member in self._members] != before:
            for listener in tuple(self._listeners):
                listener(self._members)

    async def _sweep_when_due(self) -> None:
        now = self._clock.now()
        if not self._sweeps or now < self._sweep_at or now < self._patient_until:
            return
        self._sweep_at = now + self._ttl_s
        with contextlib.suppress(IndexUnavailable):  # the next poll finds out, and the next sweep does it
            await self._membership.sweep()

    async def _watch(self) -> None:
        while True:
            try:
                await self.refresh()
            except Exception:
                _log.exception("polling the members failed")
            await asyncio.sleep(self._poll_s)

    def _wake(self) -> None:
        refreshed, self._refreshed = self._refreshed, asyncio.Event()
        refreshed.set()
