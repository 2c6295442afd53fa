"""What a placement sees: a frozen picture of the workers, with the router's own decisions in it."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

from pdserve.core.perfmodel import PerfModel
from pdserve.core.types import WorkerId
from pdserve.core.worker_record import WorkerLoad, WorkerRecord
from pdserve.router.bookings import Charge


@dataclass(frozen=True, slots=True)
class WorkerView:
    """One worker.

    A heartbeat already contains decisions older than itself, so the two are not simply added: the work is the
    larger of (heartbeat + decisions after it) and (all open decisions of this router).
    """

    record: WorkerRecord
    load: WorkerLoad
    perf: PerfModel
    chunk_tokens: int
    """Prompt tokens of one sequence per engine step."""
    charged: Charge = field(default_factory=Charge)
    """All open decisions of this router."""
    fresh: Charge = field(default_factory=Charge)
    """Those of them that are younger than `load`."""
    suspect: bool = False
    export_share: float = 1.0
    """Share of its pool that it lends to handoffs, see HandoffConfig."""

    @property
    def worker(self) -> WorkerId:
        return self.record.worker

    @property
    def available(self) -> bool:
        """May be placed on at all."""
        return not self.suspect and not self.record.draining

    @property
    def prefills(self) -> bool:
        """May be asked to prefill for others."""
        return self.available and self.record.prefills

    @property
    def dedicated(self) -> bool:
        """Prefills and never owns requests."""
        return self.prefills and not self.record.decodes

    @property
    def decodes(self) -> bool:
        """May own requests."""
        return self.available and self.record.decodes

    @property
    def lends_blocks(self) -> int:
        """Blocks that one handoff may have here, as the worker counts them: more is refused for ever."""
        return max(1, int(self.record.pool_blocks * self.export_share))

    @property
    def wait_s(self) -> float:
        """Predicted seconds until a prefill that is asked for now would start."""
        reported = self.service_s(self.load.queued_prefill_tokens, 0)
        return max(reported + self.fresh.prefill_s, self.charged.prefill_s)

    @property
    def promised_blocks(self) -> int:
        """Blocks promised to whole requests."""
        return max(self.load.promised_blocks + self.fresh.blocks, self.charged.blocks)

    def service_s(self, new: int, cached: int) -> float:
        """Predicted seconds to compute `new` prompt tokens behind `cached` ones, alone."""
        return self.perf.prefill_seconds(new, cached, self.chunk_tokens).seconds


@dataclass(frozen=True)
class ClusterView:
    """The workers of one pool: same model, same logical schema, so that any two of them can pair."""

    workers: tuple[WorkerView, ...]

    def __iter__(self) -> Iterator[WorkerView]:
        return iter(self.workers)

    def __getitem__(self, worker: WorkerId) -> WorkerView:
        return self._by_id[worker]

    @cached_property
    def ids(self) -> tuple[WorkerId, ...]:
        """In order of name."""
        return tuple(sorted(self._by_id))

    @cached_property
    def _by_id(self) -> dict[WorkerId, WorkerView]:
        return {view.worker: view for view in self.workers}
