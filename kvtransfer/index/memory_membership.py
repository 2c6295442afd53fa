"""Membership in one process: for unit tests and the simulator."""

from dataclasses import dataclass

from pdserve.core.clock import Clock
from pdserve.core.types import Incarnation, WorkerId
from pdserve.core.worker_record import WorkerLoad, WorkerRecord
from pdserve.kvtransfer.index.membership import Listing, Member, Standing
from pdserve.kvtransfer.index.memory import MemoryIndex


@dataclass(slots=True)
class _Seat:
    record: WorkerRecord
    load: WorkerLoad
    beat_at: float


class MemoryMembership:
    """Membership as a dict. Give it the index of the same cluster, so that dead holders leave that too."""

    def __init__(self, index: MemoryIndex, clock: Clock, ttl_s: float = 3.0) -> None:
        self._index = index
        self._clock = clock
        self._ttl_s = ttl_s
        self._seats: dict[WorkerId, _Seat] = {}
        self._last: dict[WorkerId, Incarnation] = {}
        self._void: set[tuple[WorkerId, Incarnation]] = set()

    async def announce(self, record: WorkerRecord, load: WorkerLoad) -> Standing:
        worker, incarnation = record.worker, record.incarnation
        if (worker, incarnation) in self._void:
            return Standing.FENCED
        before = self._last.get(worker)
        if before != incarnation:
            if before is not None:
                self._void.add((worker, before))
            for holder in await self._index.dump():
                if holder.worker == worker and holder.incarnation != incarnation:
                    await self._index.drop(worker, holder.incarnation)
            self._last[worker] = incarnation
        self._seats[worker] = _Seat(record, load, self._clock.now())
        return Standing.CURRENT

    async def heartbeat(self, worker: WorkerId, incarnation: Incarnation, load: WorkerLoad) -> Standing:
        seat = self._alive().get(worker)
        if seat is not None and seat.record.incarnation == incarnation:
            seat.load, seat.beat_at = load, self._clock.now()
            return Standing.CURRENT
        if seat is not None or (worker, incarnation) in self._void:
            return Standing.FENCED
        return Standing.UNKNOWN

    async def withdraw(self, worker: WorkerId, incarnation: Incarnation) -> None:
        await self._index.drop(worker, incarnation)
        self._void.add((worker, incarnation))
        seat = self._seats.get(worker)
        if seat is not None and seat.record.incarnation == incarnation:
            del self._seats[worker]
        if self._last.get(worker) == incarnation:
            del self._last[worker]

    async def listing(self) -> Listing:
        now = self._clock.now()
        seats = sorted(self._alive().items())
        members = tuple(Member(seat.record, seat.load, now - seat.beat_at) for _, seat in seats)
        return Listing(members, run_id=f"memory-{id(self):x}")

    async def members(self) -> tuple[Member, ...]:
        return (await self.listing()).members

    async def sweep(self, limit: int = 64) -> int:
        alive = self._alive()
        swept = 0
        for holder in await self._index.dump():
            seat = alive.get(holder.worker)
            if swept < limit and (seat is None or seat.record.incarnation != holder.incarnation):
                await self._index.drop(holder.worker, holder.incarnation)
                swept += 1
        return swept

    def _alive(self) -> dict[WorkerId, _Seat]:
        oldest = self._clock.now() - self._ttl_s
        return {worker: seat for worker, seat in self._seats.items() if seat.beat_at > oldest}
