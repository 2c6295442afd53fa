"""Which replica of a kv head is read by whom: fair to the sources, then near."""

from collections.abc import Iterator
from itertools import accumulate, groupby, pairwise
from typing import NamedTuple

from pdserve.kvtransfer.reshard.sharding import Sharding, Span


class HeadRun(NamedTuple):
    """Adjacent kv heads that one tensor rank of P sends to one of D. Tensor ranks, not ranks."""

    source: int
    destination: int
    heads: Span


class _Path(NamedTuple):
    """The best way to divide the needs before `cuts[-1]` among the ranks so far."""

    squares: int
    distance: int
    cuts: tuple[int, ...]


def assign_heads(source: Sharding, destination: Sharding) -> tuple[HeadRun, ...]:
    """Every head of every tensor rank of D, once, from a tensor rank of P that keeps it.

    A *need* is one (D rank, head). Ordered by rank, they are ordered by head too, because two ranks share at
    most the head on their border; and the first and last rank of P that keep a head never fall from one head
    to the next. So some best division is a list of cuts: P's rank p serves the needs from cut p to cut p + 1.
    Where a cut may lie is an interval, and one pass over the ranks finds the best cuts: those of the least
    sum of squared loads (which are also the lexicographically least loads), among them those of the least
    distance between partners, then the first. At most P_tp + D_tp - 1 runs.
    """
    needs = [
        (rank, head)
        for rank in range(destination.tp)
        for head in range(destination.heads_of(rank).first, destination.heads_of(rank).end)
    ]
    paths = [_Path(0, 0, (0,))]
    for rank, (earliest, latest) in enumerate(_cut_intervals(source, needs)):
        gaps = (abs((2 * rank + 1) * destination.tp - (2 * other + 1) * source.tp) for other, _ in needs)
        far = list(accumulate(gaps, initial=0))
        paths = [_best_path_to(cut, paths, far) for cut in range(earliest, latest + 1)]
    (best,) = paths
    return tuple(
        HeadRun(rank, other, Span(heads[0], heads[-1] + 1))
        for rank, (start, end) in enumerate(pairwise(best.cuts))
        for other, served in groupby(needs[start:end], key=lambda need: need[0])
        if (heads := [head for _, head in served])
    )


def _cut_intervals(source: Sharding, needs: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """For each rank of P, how many needs are served when it and those before it are done: least and most.

    The least: all whose head no later rank keeps. The most: all whose head one of these ranks keeps.
    """
    for rank in range(source.tp):
        later = source.heads_of(rank + 1).first if rank + 1 < source.tp else source.num_kv_heads
        end = source.heads_of(rank).end
        yield sum(head < later for _, head in needs), sum(head < end for _, head in needs)


def _best_path_to(cut: int, paths: list[_Path], far: list[int]) -> _Path:
    """The best of `paths`, with one more rank that serves all up to `cut`. `far` sums distances of needs."""
    return min(
        _Path(
            path.squares + (cut - path.cuts[-1]) ** 2,
            path.distance + far[cut] - far[path.cuts[-1]],
            (*path.cuts, cut),
        )
        for path in paths
        if path.cuts[-1] <= cut
    )
