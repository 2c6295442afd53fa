"""What a placement sees: a frozen picture of the workers, with the router's own decisions in it."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property

from pdserve.core.perfmodel import PerfModel
from pdserve.core.types import BLOCK_TOKENS, WorkerId
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
    token_budget: int = 512
    """Tokens per engine step."""
    colleague: PerfModel | None = None
    """Of another worker of the same model that has measured prefills, where this one has not."""

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
    def streams(self) -> int:
        """Sequences that decode here: each step of a prefill here delays them all."""
        load = self.load
        return max(load.running + load.waiting - load.queued_prefills, self.charged.streams)

    @property
    def prefills_ahead(self) -> int:
        """Prompts that are to be computed here before one that is asked for now."""
        return max(self.load.queued_prefills + self.fresh.prefills, self.charged.prefills)

    @property
    def wait_s(self) -> float:
        """Predicted seconds until a prefill that is asked for now would start."""
        reported = self.service_s(self.load.queued_prefill_tokens, 0)
        return max(reported + self.fresh.prefill_s, self.charged.prefill_s)

    @property
    def promised_blocks(self) -> int:
        """Blocks promised to whole requests."""
        return max(self.load.promised_blocks + self.fresh.blocks, self.charged.blocks)

    @property
    def step_tokens(self) -> int:
        """Prompt tokens of one sequence per step now: beside running streams, prefill has only its share."""
        if not self.streams:
            return self.chunk_tokens
        share = max(BLOCK_TOKENS, round(self.token_budget * self.record.role_weight))
        return min(self.chunk_tokens, share)

    def compute_s(self, new: int, cached: int) -> float:
        """Predicted seconds that `new` prompt tokens behind `cached` ones add to this worker's steps."""
        known = self.colleague or self.perf
        return known.prefill_seconds(new, cached, self.step_tokens).seconds

    def service_s(self, new: int, cached: int) -> float:
        """Predicted seconds from the start to the end of such a prefill: its steps carry the streams, too."""
        steps = -(-new // self.step_tokens)
        if not steps or not self.streams:
            return self.compute_s(new, cached)
        # Each stream grows by a token per step.
        context = self.load.context_tokens + self.streams * (steps - 1) // 2
        return self.compute_s(new, cached) + steps * self.decode_step_s(context=context)

    def decode_step_s(self, joining: int = 0, context: int | None = None) -> float:
        """Predicted seconds of a step of its streams, of `joining` more, with `context` tokens in all."""
        context = self.load.context_tokens if context is None else context
        return self.perf.decode_step_seconds(self.streams + joining, context).seconds


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


def informed(workers: Iterable[WorkerView]) -> ClusterView:
    """A view in which nobody is judged by a guess who has a colleague with measurements.

    All workers of a view run one model. Beside each other's measured speed a prior would be a verdict: a new
    worker might never be asked, so never measured.
    """
    known = tuple(workers)
    experienced = [worker for worker in sorted(known, key=lambda w: w.worker) if worker.perf.knows_prefill]

    def with_colleague(worker: WorkerView) -> WorkerView:
        if worker.perf.knows_prefill or not experienced:
            return worker
        alike = [other for other in experienced if other.record.role == worker.record.role]
        return replace(worker, colleague=(alike or experienced)[0].perf)

    return ClusterView(tuple(map(with_colleague, known)))
