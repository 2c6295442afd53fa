"""The index in one process: for unit tests, the simulator and as the oracle of the redis index."""

from collections.abc import Sequence

from pdserve.core.types import BlockName, Incarnation, WorkerId
from pdserve.kvtransfer.index.base import LOCATE_LIMIT, Holder, Holding, Location, Update


class _Entry:
    """One holder's names. Mutable, private to MemoryIndex."""

    __slots__ = ("names", "representation", "seq")

    def __init__(self, representation: str) -> None:
        self.seq = 0
        self.representation = representation
        self.names: set[BlockName] = set()


class MemoryIndex:
    """LocationIndex as a dict of sets. One event loop, no locks."""

    def __init__(self) -> None:
        self._entries: dict[Holder, _Entry] = {}

    async def locate(self, names: Sequence[BlockName], holders: Sequence[Holder]) -> dict[WorkerId, Location]:
        found: dict[WorkerId, Location] = {}
        for holder in holders:
            entry = self._entries.get(holder)
            depth = _depth(entry.names, names) if entry is not None else 0
            if entry is not None and depth > 0:
                found[holder.worker] = Location(depth, entry.representation)
        return found

    async def add(
        self,
        worker: WorkerId,
        incarnation: Incarnation,
        seq: int,
        names: Sequence[BlockName],
        representation: str,
    ) -> Update:
        holder = Holder(worker, incarnation)
        entry = self._entries.get(holder) or _Entry(representation)
        verdict = _verdict(entry, seq)
        if verdict is Update.APPLIED and entry.representation != representation:
            verdict = Update.GAP
        if verdict is Update.APPLIED:
            self._entries[holder] = entry
            entry.seq = seq
            entry.names.update(names)
        return verdict

    async def remove(
        self, worker: WorkerId, incarnation: Incarnation, seq: int, names: Sequence[BlockName]
    ) -> Update:
        entry = self._entries.get(Holder(worker, incarnation))
        if entry is None:  # even number 1: a holder begins by saying what it has, and how
            return Update.GAP
        verdict = _verdict(entry, seq)
        if verdict is Update.APPLIED:
            entry.seq = seq
            entry.names.difference_update(names)
        return verdict

    async def replace(
        self,
        worker: WorkerId,
        incarnation: Incarnation,
        seq: int,
        names: Sequence[BlockName],
        representation: str,
    ) -> Update:
        holder = Holder(worker, incarnation)
        old = self._entries.get(holder)
        if old is not None and seq <= old.seq:
            return Update.STALE
        entry = _Entry(representation)
        entry.seq = seq
        entry.names.update(names)
        self._entries[holder] = entry
        return Update.APPLIED

    async def drop(self, worker: WorkerId, incarnation: Incarnation) -> None:
        self._entries.pop(Holder(worker, incarnation), None)

    async def dump(self) -> dict[Holder, Holding]:
        return {
            holder: Holding(entry.seq, entry.representation, frozenset(entry.names))
            for holder, entry in self._entries.items()
        }


def _depth(held: set[BlockName], names: Sequence[BlockName]) -> int:
    for depth, name in enumerate(names[:LOCATE_LIMIT]):
        if name not in held:
            return depth
    return min(len(names), LOCATE_LIMIT)


def _verdict(entry: _Entry, seq: int) -> Update:
    if seq <= entry.seq:
        return Update.STALE
    return Update.APPLIED if seq == entry.seq + 1 else Update.GAP
