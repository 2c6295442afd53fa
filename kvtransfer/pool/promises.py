"""How many blocks are promised to whom, against one limit. KvPool locks."""

from pdserve.core.types import OwnerId
from pdserve.kvtransfer.pool.errors import IntegrityError, PoolError


class Promises:
    """Claims on blocks that are not taken yet; their sum never exceeds `limit` blocks."""

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

    def drop(self, owner: OwnerId) -> int:
        """Take the whole promise back; returns how many blocks it was."""
        blocks = self._by_owner.pop(owner, 0)
        self._total -= blocks
        return blocks

    def move(self, source: OwnerId, target: OwnerId) -> None:
        """Add the source's promise to the target's."""
        if source in self._by_owner:
            self._by_owner[target] = self.of(target) + self._by_owner.pop(source)

    def check_integrity(self) -> None:
        if sum(self._by_owner.values()) != self._total:
            raise IntegrityError(f"promises {self._by_owner} do not sum to {self._total}")
