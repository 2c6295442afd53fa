"""Workers that can serve one model together: same model, same logical schema. Pure."""

from collections import defaultdict
from collections.abc import Iterable

from pdserve.core.errors import Unavailable
from pdserve.core.worker_record import WorkerRecord


def pool_of(records: Iterable[WorkerRecord], model: str) -> tuple[WorkerRecord, ...]:
    """The workers among which a request for `model` is placed.

    During a rolling update a model has workers of two schemas, which never mix: the larger decode side wins.
    Raises Unavailable when no worker could own a request.
    """
    by_schema: defaultdict[str, list[WorkerRecord]] = defaultdict(list)
    for record in records:
        if record.model == model:
            by_schema[record.schema].append(record)
    if not by_schema:
        raise Unavailable(f"no worker for model {model!r} has joined yet: retry when one is ready")
    best = max(sorted(by_schema), key=lambda schema: sum(record.decodes for record in by_schema[schema]))
    pool = tuple(by_schema[best])
    if not any(record.decodes for record in pool):
        states = ", ".join(f"{r.worker} ({'draining' if r.draining else r.role})" for r in pool)
        raise Unavailable(f"no worker for model {model!r} can decode now, there are only {states}: retry")
    return pool


def any_per_model(records: Iterable[WorkerRecord]) -> dict[str, WorkerRecord]:
    """Model name to one of its workers, the first in the given order."""
    found: dict[str, WorkerRecord] = {}
    for record in records:
        found.setdefault(record.model, record)
    return found
