"""Decode workers meet the prefill workers before a request needs them, and let go of those that left.

A first handoff would otherwise pay for a channel, a connection and a mapping while its client waits.
"""

import asyncio
import hashlib
import logging
from collections.abc import Awaitable, Callable

from pdserve.core.errors import PdserveError
from pdserve.core.tasks import end_task
from pdserve.core.types import Incarnation, WorkerId
from pdserve.core.worker_record import WorkerRecord
from pdserve.kvtransfer.handoff.ask import HandoffPeer
from pdserve.kvtransfer.index.membership_view import Members, MembershipView

_log = logging.getLogger(__name__)

AT_ONCE = 4
"""Meetings under way at one worker: a cluster that starts as a whole makes no storm of connections."""

MEETING_S = 2.0
"""Seconds for one meeting. Who takes longer is met by the first handoff instead."""

READY_WITHIN_S = 2.0
"""Seconds by which meetings may delay a worker's start."""

Start = tuple[WorkerId, Incarnation]


class PeerMeetings:
    """Follows the membership: every prefill worker of this schema is met once per incarnation, if this
    worker decodes. Failures are logged and left to the first handoff.

    `meet(peer, seconds)` connects, and returns the transport; it raises PdserveError. `part(worker,
    incarnation)` lets go of what leads to a start that the membership lists no more.
    """

    def __init__(
        self,
        *,
        record: Callable[[], WorkerRecord],
        view: MembershipView,
        meet: Callable[[HandoffPeer, float], Awaitable[str]],
        part: Callable[[WorkerId, Incarnation], Awaitable[None]],
        most: int,
    ) -> None:
        """At most `most` peers are met: more could not be kept."""
        self._record = record
        self._view = view
        self._meet = meet
        self._part = part
        self._most = most
        self._places = asyncio.Semaphore(AT_ONCE)
        self._known: set[Start] = set()
        self._tasks: dict[Start, asyncio.Task[None]] = {}
        self._parting: dict[Start, asyncio.Task[None]] = {}
        self._unsubscribe: Callable[[], None] | None = None

    async def start(self, within_s: float = READY_WITHIN_S) -> None:
        """Meet who is there, for at most `within_s` seconds, and from then on who comes."""
        self._unsubscribe = self._view.subscribe(self._follow)
        await self._view.refresh()
        self.look()
        self._view.start()
        met = [task for task in self._tasks.values() if not task.done()]
        if met:
            await asyncio.wait(met, timeout=within_s)

    async def stop(self) -> None:
        """Meet nobody any more. Idempotent."""
        if self._unsubscribe is not None:
            self._unsubscribe()
        await self._view.stop()
        for task in (*self._tasks.values(), *self._parting.values()):
            await end_task(task)

    def look(self) -> None:
        """Follow the members as they are known; also when this worker's own record changed."""
        self._follow(self._view.current())

    def _follow(self, members: Members) -> None:
        listed = {(member.record.worker, member.record.incarnation) for member in members}
        for gone in self._known - listed:
            self._leave(gone)
        self._known = listed
        me = self._record()
        if not me.decodes:
            return
        records = [member.record for member in members if _pairs(me, member.record)]
        for record in sorted(records, key=lambda record: _order(me, record))[: self._most]:
            start = record.worker, record.incarnation
            if start not in self._tasks:
                name = f"meet-{record.worker}"
                self._tasks[start] = asyncio.create_task(self._meet_one(_peer(record)), name=name)

    async def _meet_one(self, peer: HandoffPeer) -> None:
        if (parting := self._parting.get((peer.worker, peer.incarnation))) is not None:
            await asyncio.wait({parting})  # it is back: what is made now would be let go of
        async with self._places:
            try:
                transport = await self._meet(peer, MEETING_S)
            except PdserveError as error:
                _log.info("could not meet %s: %s", peer.worker, error.message)
            else:
                _log.info("met %s (%s), over %s", peer.worker, peer.incarnation, transport)

    def _leave(self, start: Start) -> None:
        meeting = self._tasks.pop(start, None)
        if start in self._parting:
            if meeting is not None:
                meeting.cancel()  # it waits for that parting, and has met nobody
            return
        task = asyncio.create_task(self._part_behind(meeting, start), name=f"part-{start[0]}")
        self._parting[start] = task
        task.add_done_callback(lambda _: self._parting.pop(start))

    async def _part_behind(self, meeting: "asyncio.Task[None] | None", start: Start) -> None:
        await end_task(meeting)
        await self._part(*start)


def _pairs(me: WorkerRecord, other: WorkerRecord) -> bool:
    return other.prefills and other.worker != me.worker and other.schema == me.schema


def _order(me: WorkerRecord, other: WorkerRecord) -> bytes:
    """Each worker's own: workers that start together begin with different peers."""
    return hashlib.blake2b(f"{me.worker}/{other.worker}".encode(), digest_size=8).digest()


def _peer(record: WorkerRecord) -> HandoffPeer:
    return HandoffPeer(record.worker, record.incarnation, record.endpoint)
