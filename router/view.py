"""What a placement sees: a frozen picture of the workers, with the router's own decisions in it."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property

from pdserve.core.perfmodel import PerfModel
from pdserve.core.types import BLOCK_TOKENS, WorkerId
from pdserve.core.worker_record import WorkerLoad, WorkerRecord
from pdserve.router.bookings import Charge
from pdserve.router.prefill_traffic import Traffic


@dataclass(frozen=True)
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
    traffic: Traffic = field(default_factory=Traffic)
    """Prompts that come here, of this and other routers."""
    age_s: float = 0.0
    """Since `load` came."""
    ended: int = 0
    """Requests of this router that ended since then: `load` still counts their streams."""
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

    @cached_property
    def streams(self) -> int:
        """Sequences that decode here: each step of a prefill here delays them all."""
        load = self.load
        reported = load.running + load.waiting - load.queued_prefills - self.ended
        return max(reported, self.charged.streams)

    @cached_property
    def wait_s(self) -> float:
        """Predicted seconds until a prefill that is asked for now would start."""
        reported = self.service_s(self.load.queued_prefill_tokens, 0)
        queued = self.traffic.expected_s(reported, self.age_s)
        return max(queued + self.fresh.prefill_s, self.charged.prefill_s)

    def delay_s(self, new: int) -> float:
        """Predicted seconds by which the prompts ahead delay the end of a prefill of `new` tokens.

        Not all that they take: a step has room for `token_budget` tokens and takes at most `chunk_tokens` of
        each, so that one or a few prompts ahead leave room for one that comes now, and run on beside it.
        """
        queue, ahead = self.wait_s, self.prefills_ahead
        if not queue:
            return 0.0
        tokens = max(self.load.queued_prefill_tokens + self.fresh.prefill_tokens, self.charged.prefill_tokens)
        tokens = tokens or ahead * max(1, new)
        each = min(self.step_tokens, max(1, tokens // ahead))
        beside = min(ahead, -(-self.step_budget // each) - 1)
        # The step that runs now ends in half its time, on average.
        running_s = queue * min(1.0, min(ahead * each, self.step_budget) / tokens)
        before_s = (queue - running_s) * (ahead - beside) / ahead
        carried_s = queue * -(-new // self.step_tokens) * beside * each / tokens
        return 0.5 * running_s + min(queue - running_s, before_s + carried_s)

    @property
    def prefills_ahead(self) -> int:
        """Prompts that are computed before one that is asked for now, or beside it; at least one."""
        return max(1, self.load.queued_prefills + self.fresh.prefills, self.charged.prefills)

    def queue_harm_s(self, new: int, cached: int) -> float:
        """What a prefill of `new` more tokens makes all later ones here wait, summed, in seconds.

        Its own time, of each that comes before the queue is empty again: the externality of a customer of one
        server, first come, first served, with Poisson arrivals (Haviv and Ritov 1998). Where other prompts
        fill the steps, that time is without the cost of steps of its own.
        """
        alone = self.service_s(new, cached)
        packed = self.model.packed_prefill_seconds(new, cached, self.step_budget).seconds
        busy = 0.0 if self.streams else self.traffic.busy
        service = busy * packed + (1.0 - busy) * alone
        followers = self.traffic.prefills_per_s * (self.wait_s + 0.5 * service) / self.traffic.quiet
        return followers * service

    @property
    def promised_blocks(self) -> int:
        """Blocks promised to whole requests."""
        return max(self.load.promised_blocks + self.fresh.blocks, self.charged.blocks)

    @property
    def model(self) -> PerfModel:
        """What predicts its prefills."""
        return self.colleague or self.perf

    @cached_property
    def step_budget(self) -> int:
        """Prompt tokens per step now: beside running streams, prefill has only its share."""
        share = max(BLOCK_TOKENS, round(self.token_budget * self.record.role_weight))
        return min(self.token_budget, share) if self.streams else self.token_budget

    @property
    def step_tokens(self) -> int:
        """Those of one sequence."""
        return min(self.chunk_tokens, self.step_budget)

    def compute_s(self, new: int, cached: int) -> float:
        """Predicted seconds that `new` prompt tokens behind `cached` ones add to this worker's steps."""
        return self.model.prefill_seconds(new, cached, self.step_tokens).seconds

    def service_s(self, new: int, cached: int) -> float:
        """Predicted seconds from the start to the end of such a prefill: its steps carry the streams, too."""
        if not new or not self.streams:
            return self.compute_s(new, cached)
        steps = -(-new // self.step_tokens)
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
