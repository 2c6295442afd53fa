"""Who is named beside the candidates: the worker that whoever prefills may fetch leading blocks from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pdserve.core.types import WorkerId
from pdserve.router.view import ClusterView


@dataclass(frozen=True, slots=True)
class Holding:
    """So many leading blocks of a prompt, as far as the index knows."""

    worker: WorkerId
    blocks: int


def prefix_holder(
    view: ClusterView, depths: Mapping[WorkerId, int], candidates: Sequence[WorkerId]
) -> Holding | None:
    """The deepest holder that can be asked; None where every candidate has as much.

    Of equal ones the first candidate, which then needs nobody, and else who has the least to do. Whether a
    fetch pays is not decided here: each candidate knows its own pool and its way to the holder.
    """
    first = candidates[:1]
    able = [worker for worker in view if worker.available and depths.get(worker.worker, 0) > 0]
    if not able:
        return None
    best = min(
        able,
        key=lambda worker: (
            -depths[worker.worker],
            worker.worker not in first,
            worker.load.running + worker.load.waiting,
            worker.worker,
        ),
    )
    deepest = depths[best.worker]
    if all(depths.get(worker, 0) >= deepest for worker in candidates):
        return None
    return Holding(best.worker, deepest)
