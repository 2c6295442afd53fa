"""A grant's segments as columns, so that a thousand blocks are checked in a few calls."""

import itertools
from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

_COLUMNS: Final = 4


class SegmentTable:
    """Columns of int64, one entry per segment, contiguous each. Immutable by agreement."""

    __slots__ = ("destinations", "generations", "sources", "valid_tokens")

    def __init__(self, segments: Sequence[tuple[int, int, int, int]]) -> None:
        """`segments`: (source, generation, destination, valid tokens) each, below 2**63."""
        numbers = itertools.chain.from_iterable(segments)
        rows = np.fromiter(numbers, np.int64, _COLUMNS * len(segments)).reshape(-1, _COLUMNS)
        columns = np.ascontiguousarray(rows.T)
        self.sources: NDArray[np.int64] = columns[0]
        self.generations: NDArray[np.int64] = columns[1]
        self.destinations: NDArray[np.int64] = columns[2]
        self.valid_tokens: NDArray[np.int64] = columns[3]

    def __len__(self) -> int:
        return len(self.sources)

    def outside(self, *, sources: int | None, destinations: int | None, block_tokens: int) -> str | None:
        """What does not lie in pools of these sizes (None: not this side's to check); None if all does."""
        if not len(self):
            return None
        if sources is not None and (bad := _outside(self.sources, 0, sources - 1)) is not None:
            return f"source block {bad} is not in a pool of {sources} blocks"
        if destinations is not None and (bad := _outside(self.destinations, 0, destinations - 1)) is not None:
            return f"destination block {bad} is not in a pool of {destinations} blocks"
        if (bad := _outside(self.valid_tokens, 1, block_tokens)) is not None:
            return f"{bad} valid tokens in a block of {block_tokens}"
        return None

    def stale(self, generations: NDArray[np.uint64]) -> str | None:
        """Which source block is no longer what was granted, None if all still are.

        `generations` is [num_blocks] of the source's pool. Readers ask before and after they copy (see
        blocks.Blocks). x86-64 keeps the two loads and the copy in order, and a native copy orders its writes;
        on machines that do not, the digest over what landed is what catches a torn read.
        """
        found = generations[self.sources]
        changed = np.flatnonzero(found != self.generations.view(np.uint64))
        if not len(changed):
            return None
        first = changed[0]
        said = f"source block {self.sources[first]} is of generation {found[first]}"
        return f"{said}, granted was {self.generations[first]}"


def _outside(numbers: NDArray[np.int64], least: int, most: int) -> int | None:
    """A number that is not in [least, most], None if all are."""
    # Unsigned, what is below `least` is above everything; for few numbers, each reduction counts.
    above = (numbers - least).view(np.uint64)
    worst = int(above.argmax())
    return int(numbers[worst]) if int(above[worst]) > most - least else None
