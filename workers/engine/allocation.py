"""The policy of whom to give blocks to. The pool owns them; nothing here holds a block itself."""

from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import Protocol

from pdserve.core.types import BLOCK_TOKENS, BlockId, BlockName, OwnerId, blocks_for, hit_limit
from pdserve.workers.engine.sequence import Sequence


class BlockCounts(Protocol):
    """The part of a pool's counts that an engine reads."""

    @property
    def total(self) -> int: ...


class BlockPool(Protocol):
    """The part of `KvPool` that an engine uses. It may be shared with other threads: any answer about room is
    old when it arrives, so only `allocate` decides."""

    def counts(self) -> BlockCounts: ...

    def available(self) -> int:
        """Free and cached blocks."""

    def acquire(self, owner: OwnerId, names: Items[BlockName], blocks: int) -> int | None:
        """`blocks` in all, of which as many leading `names` as are present; how many those are, or None."""

    def allocate(self, owner: OwnerId, n: int) -> tuple[BlockId, ...] | None:
        """`n` fresh blocks or, where there are fewer, None."""

    def name(self, owner: OwnerId, block: BlockId, name: BlockName) -> None: ...

    def table(self, owner: OwnerId) -> tuple[BlockId, ...]: ...

    def raise_promise(self, owner: OwnerId, blocks: int) -> None:
        """The owner's promise is at least `blocks` from now on."""

    def release(self, owner: OwnerId) -> None: ...

    def add_free_listener(self, listener: Callable[[], None]) -> None: ...

    def check_integrity(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Admission:
    """Blocks for all tokens of a sequence; the first `computed` positions came from the prefix cache."""

    blocks: tuple[BlockId, ...]
    computed: int


class AllocationPolicy:
    """`can_x` is cheap and may be wrong by the time of `x`; `x` gives all or nothing."""

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool

    def admit(self, sequence: Sequence) -> Admission | None:
        """The longest cached prefix and fresh blocks for all other tokens, or nothing."""
        hits = self._pool.acquire(sequence.owner, _reusable(sequence), blocks_for(len(sequence.tokens)))
        if hits is None:
            return None
        return Admission(self._pool.table(sequence.owner), hits * BLOCK_TOKENS)

    def can_grow(self, sequence: Sequence) -> bool:
        """Whether `sequence` has room for its last token, or a block for it is there."""
        return not sequence.needs_block or self._pool.available() >= 1

    def grow(self, sequence: Sequence) -> tuple[BlockId, ...] | None:
        """The block that the last token needs: one, none where it has room, None where there is none."""
        return self._pool.allocate(sequence.owner, 1) if sequence.needs_block else ()

    def can_preempt(self, sequence: Sequence) -> bool:
        """A prefill-only sequence never yields: readers may be copying its blocks, and it never grows."""
        return sequence.samples and bool(sequence.blocks)

    def preempt(self, sequence: Sequence) -> None:
        """Give all blocks back. Named ones stay findable until somebody needs the room.

        First its debt is booked: a newcomer must not be promised what it will need again.
        """
        debt = sequence.spec.debt
        if debt is not None:
            self._pool.raise_promise(debt.owner, debt.blocks(sequence.completion_tokens))
        self._pool.release(sequence.owner)


def _reusable(sequence: Sequence) -> list[BlockName]:
    """Names that a hit may cover: the last position of a sampling sequence runs in a block of its own."""
    tokens = len(sequence.tokens)
    return sequence.names[: hit_limit(tokens) if sequence.samples else tokens // BLOCK_TOKENS]
