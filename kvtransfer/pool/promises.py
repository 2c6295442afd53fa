"""How many blocks are promised to whom, against one limit. KvPool locks."""

from pdserve.core.types import OwnerId
from pdserve.kvtransfer.pool.errors import IntegrityError, PoolError


class Promises:
    """Claims on blocks that are not taken yet. Nobody gets a new one while their sum exceeds `limit` blocks;
    only what an owner is owed already may take it there."""

    def __init__(self, limit: float) -> None:
        self._limit = limit
        self._by_owner: dict[OwnerId, int] = {}
        self._total = 0

    @property
    def total(self) -> int:
        return self._total

    def owners(self) -> tuple[OwnerId, ...]:
        return tuple(self._by_owner)

    def of(self, owner: OwnerId) -> int:
        return self._by_owner.get(owner, 0)

    def add(self, owner: OwnerId, blocks: int) -> bool:
        """False, and no change, where the sum would exceed the limit."""
        if blocks < 0:
            raise PoolError(f"{owner} asked for a promise of {blocks} blocks; ask for 0 or more")
        if self._total + blocks > self._limit:
            return False
        if blocks:
            self._by_owner[owner] = self.of(owner) + blocks
            self._total += blocks
        return True

    def raise_to(self, owner: OwnerId, blocks: int) -> None:
        """The owner is owed `blocks` in all, also beyond the limit. Never lowers a promise."""
        more = max(0, blocks - self.of(owner))
        if more:
            self._by_owner[owner] = self.of(owner) + more
            self._total += more

    def drop(self, owner: OwnerId) -> int:
        """Take the whole promise back; returns how many blocks it was."""
        blocks = self._by_owner.pop(owner, 0)
        self._total -= blocks
        return blocks

    def check_integrity(self) -> None:
        if sum(self._by_owner.values()) != self._total:
            raise IntegrityError(f"promises {self._by_owner} do not sum to {self._total}")
