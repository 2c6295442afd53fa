"""The sessions of one router: they follow the membership, and together they are the router's view."""

import asyncio
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from pdserve.core.clock import Clock
from pdserve.core.config import EngineConfig, SessionConfig
from pdserve.core.security.tls import ClientTls
from pdserve.core.types import Incarnation, WorkerId
from pdserve.core.worker_record import WorkerRecord
from pdserve.proto import inference_pb2
from pdserve.router import wire
from pdserve.router.bookings import Bookings
from pdserve.router.sessions import SessionState, WorkerSession
from pdserve.router.view import ClusterView, WorkerView, informed


class MemberLike(Protocol):
    """A member as the pool needs it."""

    @property
    def record(self) -> WorkerRecord: ...


class MembershipSource(Protocol):
    """Who belongs to the cluster now; answers from memory."""

    @property
    def available(self) -> bool:
        """Whether the source of the membership, redis, answers."""
        ...

    def current(self) -> Sequence[MemberLike]: ...


class SessionPool:
    """One session per (worker, incarnation) of the membership.

    A worker that leaves the membership takes no new requests; its session ends with its last request. A new
    incarnation ends the session of the old one at once, for what that one promised is void.
    """

    def __init__(
        self,
        membership: MembershipSource,
        bookings: Bookings,
        router: str,
        config: SessionConfig,
        engine: EngineConfig,
        clock: Clock,
        export_share: float = 1.0,
        tls: ClientTls | None = None,
    ) -> None:
        self._tls = tls
        self._membership = membership
        self._bookings = bookings
        self._router = router
        self._config = config
        self._engine = engine
        self._export_share = export_share
        self._clock = clock
        self._sessions: dict[WorkerId, WorkerSession] = {}
        self._leaving: list[WorkerSession] = []
        self._stopping: set[asyncio.Task[None]] = set()
        self._task: asyncio.Task[None] | None = None

    @property
    def membership_available(self) -> bool:
        """Whether redis answered last time; without it, the last membership stays."""
        return self._membership.available

    def start(self, on_change: Callable[[], None]) -> None:
        """Follow the membership in the background; calls `on_change` whenever workers may have changed."""
        self._follow()
        self._task = asyncio.create_task(self._run(on_change))

    async def stop(self) -> None:
        """End all sessions; requests still on them fail as retriable."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        sessions = [*self._sessions.values(), *self._leaving]
        self._sessions, self._leaving = {}, []
        await asyncio.gather(*(session.stop("the router stops") for session in sessions))
        await asyncio.gather(*self._stopping)

    def session(self, worker: WorkerId) -> WorkerSession:
        """The session with a member. Raises KeyError for others."""
        return self._sessions[worker]

    def records(self) -> tuple[WorkerRecord, ...]:
        """All members as they describe themselves now, in order of name."""
        return tuple(session.record for _, session in sorted(self._sessions.items()))

    def view(self, records: Iterable[WorkerRecord]) -> ClusterView:
        """The picture of these workers that a placement sees, without those that have left since."""
        found = (self._sessions.get(record.worker) for record in records)
        return informed(self._view_of(session) for session in found if session is not None)

    def statuses(self) -> list[inference_pb2.WorkerStatus]:
        """All members for a status page, in order of name."""
        return [
            wire.worker_status(session.record, session.report.message, _state(session))
            for _, session in sorted(self._sessions.items())
        ]

    def _view_of(self, session: WorkerSession) -> WorkerView:
        worker, report, now = session.record.worker, session.report, self._clock.now()
        return WorkerView(
            record=session.record,
            load=report.load,
            perf=report.perf,
            chunk_tokens=self._engine.chunk_tokens,
            token_budget=self._engine.token_budget,
            traffic=report.traffic.now,
            age_s=now - report.at,
            ended=report.ended,
            charged=self._bookings.charged(worker, now),
            fresh=self._bookings.charged(worker, now, since=report.at),
            suspect=session.suspect,
            export_share=self._export_share,
        )

    async def _run(self, on_change: Callable[[], None]) -> None:
        while True:
            on_change()
            await asyncio.sleep(self._config.heartbeat_s)
            self._follow()

    def _follow(self) -> None:
        """Bring the sessions in line with the membership."""
        members = {member.record.worker: member.record for member in self._membership.current()}
        for worker, session in list(self._sessions.items()):
            record = members.get(worker)
            if record is None:
                self._leaving.append(self._sessions.pop(worker))
            elif record.incarnation != session.record.incarnation:
                del self._sessions[worker]
                self._end(session, f"incarnation {record.incarnation} took its place")
        for worker, record in members.items():
            if worker not in self._sessions:
                self._sessions[worker] = self._adopt(worker, record)
        for session in [session for session in self._leaving if session.idle]:
            self._leaving.remove(session)
            self._end(session, "it left the cluster")

    def _adopt(self, worker: WorkerId, record: WorkerRecord) -> WorkerSession:
        """The leaving session of a member, if that start of it came back, else a new one."""
        for session in self._leaving:
            if _key(session.record) == (worker, record.incarnation):
                self._leaving.remove(session)
                return session
        session = WorkerSession(record, self._router, self._config, self._clock, self._tls)
        session.start()
        return session

    def _end(self, session: WorkerSession, reason: str) -> None:
        session.lose(reason)
        task = asyncio.create_task(session.stop(reason))
        self._stopping.add(task)
        task.add_done_callback(self._stopping.discard)


def _key(record: WorkerRecord) -> tuple[WorkerId, Incarnation]:
    return record.worker, record.incarnation


def _state(session: WorkerSession) -> str:
    if session.record.draining:
        return "draining"
    return "suspect" if session.suspect or session.state is not SessionState.UP else "ready"
