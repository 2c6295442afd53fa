"""Block states, reference counts, generations and the free list of one pool. Not locked: KvPool locks."""

from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from pdserve.core.types import BlockId
from pdserve.kvtransfer.pool.errors import IntegrityError, PoolError


class BlockState(StrEnum):
    """Exactly one of these holds for every block."""

    FREE = "free"
    HELD = "held"
    RESERVED = "reserved"
    LOADING = "loading"
    CACHED = "cached"
    QUARANTINED = "quarantined"


_LEGAL = frozenset(
    {
        (BlockState.FREE, BlockState.HELD),
        (BlockState.FREE, BlockState.RESERVED),
        (BlockState.RESERVED, BlockState.LOADING),
        (BlockState.LOADING, BlockState.RESERVED),
        (BlockState.RESERVED, BlockState.HELD),
        (BlockState.HELD, BlockState.CACHED),
        (BlockState.CACHED, BlockState.HELD),
        (BlockState.HELD, BlockState.FREE),
        (BlockState.RESERVED, BlockState.FREE),
        (BlockState.CACHED, BlockState.FREE),
        (BlockState.LOADING, BlockState.QUARANTINED),
        (BlockState.QUARANTINED, BlockState.FREE),
    }
)


class Blocks:
    """Every block's state, each move checked against one table.

    A block's generation is odd while it is taken and even while it is free: it is bumped when the block is
    taken for new content, before anyone can write that content, and again when the content is discarded.

    A reader of another process compares the generation before and after its copy with the one that it was
    granted, as with a seqlock whose writer never goes back; equal both times means that the bytes between are
    the granted content. Generations are aligned 8-byte words, stored and loaded whole.
    """

    def __init__(self, num_blocks: int, generations: NDArray[np.uint64]) -> None:
        if num_blocks < 1 or generations.shape != (num_blocks,) or generations.dtype != np.uint64:
            raise PoolError(
                f"a pool of {num_blocks} blocks needs at least one block and uint64 generations of shape "
                f"({num_blocks},), got {generations.dtype} of shape {generations.shape}"
            )
        self.total = num_blocks
        self._generations = generations
        self._states = [BlockState.FREE] * num_blocks
        self._references = [0] * num_blocks
        # A stack: the block freed last is warmest in the caches.
        self._free = [BlockId(block) for block in reversed(range(num_blocks))]
        self._counts = dict.fromkeys(BlockState, 0)
        self._counts[BlockState.FREE] = num_blocks

    def state(self, block: BlockId) -> BlockState:
        if not 0 <= block < self.total:
            raise PoolError(f"block {block} does not exist: this pool has blocks 0 to {self.total - 1}")
        return self._states[block]

    def count(self, state: BlockState) -> int:
        return self._counts[state]

    def references(self, block: BlockId) -> int:
        return self._references[block]

    def generation(self, block: BlockId) -> int:
        self.state(block)
        return int(self._generations[block])

    def take(self, state: BlockState) -> BlockId:
        """A free block for new content, with one reference. The caller has checked that there is one."""
        block = self._free.pop()
        self._generations[block] += np.uint64(1)
        self._move(block, state)
        self._references[block] = 1
        return block

    def discard(self, block: BlockId) -> None:
        """Give up the content of a block that nobody refers to."""
        self._move(block, BlockState.FREE)
        self._generations[block] += np.uint64(1)
        self._free.append(block)

    def move(self, block: BlockId, state: BlockState) -> None:
        """Any legal move except from and to FREE."""
        if BlockState.FREE in (state, self._states[block]):
            raise PoolError(
                f"block {block} goes from {self._states[block]} to {state} by take or discard only"
            )
        self._move(block, state)

    def refer(self, block: BlockId) -> None:
        self._references[block] += 1

    def unrefer(self, block: BlockId) -> int:
        """Drop one reference; returns how many are left."""
        if self._references[block] < 1:
            raise PoolError(f"block {block} ({self._states[block]}) has no reference to drop")
        self._references[block] -= 1
        return self._references[block]

    def _move(self, block: BlockId, state: BlockState) -> None:
        before = self._states[block]
        if (before, state) not in _LEGAL:
            raise PoolError(f"block {block} cannot go from {before} to {state}")
        self._states[block] = state
        self._counts[before] -= 1
        self._counts[state] += 1

    def in_state(self, state: BlockState) -> set[BlockId]:
        """All blocks of a state; O(total), for checks."""
        return {BlockId(block) for block, held in enumerate(self._states) if held is state}

    def check_integrity(self) -> None:
        """Conservation, the free list, and the parity of generations."""
        for state in BlockState:
            found = len(self.in_state(state))
            if found != self._counts[state]:
                raise IntegrityError(f"{found} blocks are {state}, the count says {self._counts[state]}")
        if sum(self._counts.values()) != self.total:
            raise IntegrityError(f"counts {self._counts} do not sum to {self.total}")
        free = set(self._free)
        if len(free) != len(self._free):
            raise IntegrityError(f"the free list has {len(self._free) - len(free)} blocks twice")
        if free != self.in_state(BlockState.FREE):
            raise IntegrityError(
                f"free list and free state differ in {free ^ self.in_state(BlockState.FREE)}"
            )
        for block, state in enumerate(self._states):
            taken = bool(int(self._generations[block]) & 1)
            if taken is (state is BlockState.FREE):
                raise IntegrityError(
                    f"block {block} is {state} but its generation is {self._generations[block]}"
                )
