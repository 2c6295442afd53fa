"""One prefill and one decode worker in virtual time, whose true speeds the policy only knows by learning.

What a run costs is what the policy weighs: every request's time to its first token, what the running streams
lose by prefills beside them, and what other routers' requests at P lose by ours. Seconds, summed.
"""

import copy
import heapq
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache, partial

from router_views import record

from pdserve.core.exploration import PrefillPath
from pdserve.core.handoff_overhead import movement
from pdserve.core.perfmodel import PerfModel, StepRecord, TransferRecord, prefill_attention
from pdserve.core.types import BLOCK_TOKENS, Disaggregation, RequestId, Role, WorkerId, blocks_for
from pdserve.core.worker_record import WorkerLoad
from pdserve.router.bookings import Booking, Bookings
from pdserve.router.policies.base import PlacementRequest, Policy
from pdserve.router.policies.conditional import STREAM_WEIGHT
from pdserve.router.policies.hybrid import HybridPolicy
from pdserve.router.prefill_traffic import PrefillTraffic
from pdserve.router.view import ClusterView, WorkerView, informed

P, D = WorkerId("prefill-0"), WorkerId("decode-0")
HEARTBEAT_S = 0.25
LEAD_S = 20.0
"""Other routers' requests have been coming for so long before ours."""
STREAM_CONTEXT = 600
OTHERS_TOKENS = 512
WAY = "way"


@dataclass(frozen=True)
class Machine:
    """True seconds, and sizes."""

    prefill: tuple[float, float, float]
    """Per step, per token, per unit of `prefill_attention`."""
    decode: tuple[float, float, float]
    """Per step, per stream, per token of context."""
    chunk_tokens: int
    token_budget: int
    block_bytes: int
    message_s: float = 2e-3
    """Round trips and checks of one handoff."""
    noise: float = 0.05

    def prefill_s(self, tokens: int, attention: int) -> float:
        step, token, unit = self.prefill
        return step + token * tokens + unit * attention if tokens else 0.0

    def decode_s(self, streams: int) -> float:
        step, each, context = self.decode
        return step + streams * (each + context * STREAM_CONTEXT) if streams else 0.0

    def cold_s(self, tokens: int) -> float:
        """Of a whole prompt, alone."""
        steps = -(-tokens // self.chunk_tokens)
        return self.prefill_s(tokens, tokens**2) + (steps - 1) * self.prefill[0]


CPU = Machine((8e-3, 5e-4, 1e-8), (6e-3, 1.5e-3, 1.5e-6), 256, 512, 737_280)
"""A small model on a few cores."""
GPU = Machine((2e-2, 1 / 12_000, 1.4e-9), (1.2e-2, 1e-4, 1e-7), 2048, 2048, 5_120_000)
"""A large one on an accelerator."""


@dataclass(frozen=True)
class Point:
    """One load that is held for a run."""

    machine: Machine
    tokens: int
    streams: int
    """Running at D."""
    others: float
    """Share of P's time that other routers' requests take."""
    held_p: float
    """Share of the prompt that P holds; the same at D."""
    held_d: float
    bytes_per_s: float
    load: float = 0.25
    """Share of P's time that the run's own requests would take, cold."""

    def depths(self) -> dict[WorkerId, int]:
        blocks = self.tokens // BLOCK_TOKENS
        return {P: int(self.held_p * blocks), D: int(self.held_d * blocks)}


@dataclass(eq=False)
class Job:
    """A prompt, or what is left of it. `parts`: (end of step, tokens computed) for each step."""

    cached: int
    left: int
    done: Callable[[float], None]
    started: float = 0.0
    parts: list[tuple[float, int]] = field(default_factory=list)


class Engine:
    """Steps as the scheduler plans them: streams first, then prompts in order, chunked, within the budget."""

    def __init__(self, run: "Run", machine: Machine, streams: int, weight: float, perf: PerfModel) -> None:
        self._perf = perf
        self._run, self._machine, self.streams = run, machine, streams
        self._share = max(BLOCK_TOKENS, round(machine.token_budget * weight))
        self.jobs: list[Job] = []
        self._entries: list[Callable[[float], None]] = []
        self._stepping = False
        self._boundary = 0.0
        self.stalled_s = 0.0
        self._prefills = 0
        self._busy_s = 0.0

    def add(self, job: Job) -> None:
        self.jobs.append(job)
        self._wake()

    def enter(self, done: Callable[[float], None]) -> None:
        """A sequence whose KV is there samples its first token in the next step."""
        self._entries.append(done)
        self._wake()

    def _wake(self) -> None:
        if self._stepping:
            return
        self._stepping = True
        now, period = self._run.now, self._machine.decode_s(self.streams)
        waits = -(now - self._boundary) % period if period else 0.0
        self._run.at(now + waits, self._step)

    def _step(self) -> None:
        batch = self.streams + len(self._entries)
        budget = self._machine.token_budget - batch
        budget = min(budget, self._share) if batch else budget
        taken: list[tuple[Job, int]] = []
        tokens = attention = 0
        for job in self.jobs:
            count = min(job.left, self._machine.chunk_tokens, budget - tokens)
            if count > 0:
                if not job.parts:
                    job.started = self._run.now
                    self._prefills += 1
                taken.append((job, count))
                tokens += count
                attention += prefill_attention(count, job.cached)
        noise = self._run.noise()
        extra = self._machine.prefill_s(tokens, attention) * noise
        seconds = extra + self._machine.decode_s(batch) * noise
        self.stalled_s += self.streams * extra
        self._busy_s += seconds if tokens else 0.0
        if self._run.learns and tokens:
            self._perf.observe_step(StepRecord(seconds, tokens, attention, batch, batch * STREAM_CONTEXT))
        entries, self._entries = self._entries, []
        self._run.at(self._run.now + seconds, lambda: self._end(taken, entries))

    def _end(self, taken: list[tuple[Job, int]], entries: list[Callable[[float], None]]) -> None:
        now = self._run.now
        for done in entries:
            done(now)
        for job, count in taken:
            job.cached, job.left = job.cached + count, job.left - count
            job.parts.append((now, count))
        for job in [job for job, _ in taken if not job.left]:
            self.jobs.remove(job)
            job.done(now)
        self._stepping, self._boundary = False, now
        if self.jobs or self._entries:
            self._stepping = True
            self._step()

    def load(self, ways: dict[str, str]) -> WorkerLoad:
        return WorkerLoad(
            queued_prefill_tokens=sum(job.left for job in self.jobs),
            queued_prefills=len(self.jobs),
            prefills=self._prefills,
            prefill_busy_s=self._busy_s,
            running=self.streams + len(self.jobs),
            context_tokens=self.streams * STREAM_CONTEXT,
            ways=ways,
        )


class Run:
    """`count` requests through one point, arriving at random times that only the seed decides."""

    def __init__(
        self,
        point: Point,
        policy: Policy | None,
        models: tuple[PerfModel, PerfModel],
        count: int,
        seed: int,
        *,
        met: bool = True,
        learns: bool = False,
    ) -> None:
        """Without a policy the requests go away at once. `met`: D knows the way to P. `learns`: the models
        hear of every step that prefills, which takes its time."""
        self.point, self._policy = point, policy
        self.perf_p, self.perf_d = models
        machine = point.machine
        self.now = 0.0
        self._noise = random.Random(f"noise {seed}")
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._serial = 0
        self.p = Engine(self, machine, 0, 1.0, self.perf_p)
        self.d = Engine(self, machine, point.streams, 0.0, self.perf_d)
        self._ways = {str(P): WAY} if met else {}
        self.learns = learns
        self._bookings = Bookings()
        self._traffic = {P: PrefillTraffic(), D: PrefillTraffic()}
        self._loads = {P: self.p.load({}), D: self.d.load(self._ways)}
        self._loaded_at = 0.0
        self._link_free = 0.0
        self.spent_s = 0.0
        self.others_s = 0.0
        self.handed_off: list[bool] = []
        self.times: list[float] = []
        self.errors: list[float] = []
        self.left = count
        self._arrive(count, seed)
        self.at(0.0, self._beat)

    def at(self, time: float, action: Callable[[], None]) -> None:
        self._serial += 1
        heapq.heappush(self._events, (time, self._serial, action))

    def noise(self) -> float:
        return self._noise.lognormvariate(0.0, self.point.machine.noise)

    def play(self) -> "Run":
        while self._events:
            self.now, _, action = heapq.heappop(self._events)
            action()
        assert not self.left, "a request was lost"
        assert not len(self._bookings), "a booking was left"
        return self

    def _arrive(self, count: int, seed: int) -> None:
        machine, point = self.point.machine, self.point
        times, gap = random.Random(f"ours {seed}"), machine.cold_s(point.tokens) / point.load
        time = LEAD_S
        for number in range(count):
            time += times.expovariate(1 / gap)
            self.at(time, partial(self._place, RequestId(f"r{number}")))
        if point.others:
            rest, gap = random.Random(f"others {seed}"), machine.cold_s(OTHERS_TOKENS) / point.others
            other = rest.expovariate(1 / gap)
            while other < time + 10 * gap:
                self.at(other, lambda born=other: self.p.add(self._other(born)))
                other += rest.expovariate(1 / gap)

    def _other(self, born: float) -> Job:
        def done(now: float) -> None:
            self.others_s += now - born

        return Job(0, OTHERS_TOKENS, done)

    def _view(self) -> ClusterView:
        workers = (self._worker(P, Role.PREFILL, self.perf_p), self._worker(D, Role.DECODE, self.perf_d))
        return informed(workers)

    def _beat(self) -> None:
        self._loads = {P: self.p.load({}), D: self.d.load(self._ways)}
        self._loaded_at = self.now
        for worker, load in self._loads.items():
            self._traffic[worker].beat(self.now, load.prefills, load.prefill_busy_s)
        if self.left:
            self.at(self.now + HEARTBEAT_S, self._beat)

    def _worker(self, worker: WorkerId, role: Role, perf: PerfModel) -> WorkerView:
        machine = self.point.machine
        return WorkerView(
            record(worker, role, pool_blocks=4096, block_bytes=machine.block_bytes),
            self._loads[worker],
            perf,
            machine.chunk_tokens,
            self._bookings.charged(worker, self.now),
            self._bookings.charged(worker, self.now, since=self._loaded_at),
            token_budget=machine.token_budget,
            traffic=self._traffic[worker].now,
            age_s=self.now - self._loaded_at,
        )

    def _place(self, name: RequestId) -> None:
        point = self.point
        if self._policy is None:
            self.left -= 1
            return
        blocks = blocks_for(point.tokens)
        asked = PlacementRequest(point.tokens, blocks, name.encode().ljust(16), point.depths())
        placement = self._policy.place(self._view(), asked, self.now)
        assert placement is not None
        first = placement.prefill[0]
        cost = placement.prefill_tokens, placement.prefill_s
        self._bookings.charge(name, Booking(placement.decode, blocks, first, *cost, self.now))
        born, local = self.now, first == D
        expected = placement.local if local else placement.handoff

        def answered(now: float) -> None:
            seconds = now - born
            self.spent_s += seconds
            self.times.append(seconds)
            self.left -= 1
            self._bookings.settle(name)
            self.perf_d.observe_path(PrefillPath.LOCAL if local else PrefillPath.HANDOFF, seconds)
            if expected is not None:
                self.errors.append((expected.seconds - seconds) / seconds)

        self.handed_off.append(not local)
        if local:
            cached = asked.cached_tokens(D)
            self.d.add(Job(cached, point.tokens - cached, answered))
        else:
            self._hand_off(asked, answered)

    def _hand_off(self, asked: PlacementRequest, answered: Callable[[float], None]) -> None:
        born, cached = self.now, asked.cached_tokens(P)
        job = Job(
            cached, asked.prompt_tokens - 1 - cached, lambda now: self._fetch(asked, job, born, answered)
        )
        if job.left:
            self.p.add(job)
        else:
            job.done(self.now)

    def _fetch(
        self, asked: PlacementRequest, job: Job, born: float, answered: Callable[[float], None]
    ) -> None:
        """P is done. Its chunks travelled as they came, one after the other on the only way."""
        machine, positions = self.point.machine, asked.prompt_tokens - 1
        held, cached = asked.held_blocks(D), asked.cached_tokens(P)
        start = job.parts[0][0] if job.parts else born
        ends = [(start, cached), *job.parts] if cached else job.parts
        sent, free, filled = held, max(self._link_free, born), self.now
        computed = 0
        for when, tokens in ends:
            computed += tokens
            whole = blocks_for(positions) if computed >= positions else computed // BLOCK_TOKENS
            if whole <= sent:
                continue
            size = (whole - sent) * machine.block_bytes
            seconds = (1e-3 + size / self.point.bytes_per_s) * self.noise()
            self.perf_d.observe_transfer(TransferRecord(seconds, size, WAY))
            free, sent = max(free, when) + seconds, whole
        self._link_free = free
        committed = max(filled, free) + machine.message_s
        moved = movement(
            positions=positions,
            cached=cached,
            held_blocks=held,
            chunk_tokens=machine.chunk_tokens,
            block_bytes=machine.block_bytes,
            prefill_s=filled - job.started if job.parts else 0.0,
        )
        self.perf_d.observe_handoff(moved, WAY, committed - filled)
        self._ways = {str(P): WAY}
        self.at(committed, lambda: self.d.enter(answered))

    def cost_s(self) -> float:
        """Without what other routers' requests would have taken anyway."""
        return self.spent_s + STREAM_WEIGHT * self.d.stalled_s + self.others_s

    def predicted_within(self, share: float) -> float:
        """Share of the requests whose predicted seconds were at most that far off."""
        return sum(abs(error) <= share for error in self.errors) / len(self.errors)


def costs(point: Point, count: int, seeds: int) -> dict[Disaggregation, float]:
    """What `count` requests cost under each mode, over so many runs that differ in nothing else."""
    totals = dict.fromkeys(Disaggregation, 0.0)
    for seed in range(seeds):
        alone = others_alone_s(point, count, seed)
        for mode in Disaggregation:
            models = trained_models(point.machine, point.bytes_per_s)
            totals[mode] += Run(point, HybridPolicy(mode), models, count, seed).play().cost_s() - alone
    return totals


def regret(point: Point, count: int = 40, seeds: int = 3) -> float:
    """Cost of the policy's choices over the better of always and never."""
    found = costs(point, count, seeds)
    return found[Disaggregation.COST] / min(found[Disaggregation.ALWAYS], found[Disaggregation.NEVER])


def fresh_models() -> tuple[PerfModel, PerfModel]:
    return PerfModel(), PerfModel()


@cache
def _trained(machine: Machine, bytes_per_s: float) -> tuple[PerfModel, PerfModel]:
    models, rng = fresh_models(), random.Random(1)
    for number in range(300):
        for perf in models:
            streams = rng.choice([0, 0, 1, 4, 16]) if perf is models[1] else 0
            count, cached = rng.randint(1, machine.chunk_tokens), rng.randint(0, 6000)
            tokens = 0 if streams and number % 2 else count
            attention = prefill_attention(tokens, cached) if tokens else 0
            seconds = machine.prefill_s(tokens, attention) + machine.decode_s(streams)
            seconds *= rng.lognormvariate(0.0, machine.noise)
            perf.observe_step(StepRecord(seconds, tokens, attention, streams, streams * STREAM_CONTEXT))
    for tokens in (24, 128, 512, 2048, 8192):
        point = Point(machine, tokens, 0, 0.0, 0.0, 0.0, bytes_per_s, load=0.05)
        Run(point, HybridPolicy(Disaggregation.ALWAYS), models, 8, tokens).play()
    models[1].observe_path(PrefillPath.LOCAL, 1e-3)  # no credit is left of this: only the point's own counts
    return models


def trained_models(machine: Machine, bytes_per_s: float) -> tuple[PerfModel, PerfModel]:
    """P's and D's, after some hundred noisy records of each kind."""
    return copy.deepcopy(_trained(machine, bytes_per_s))


def others_alone_s(point: Point, count: int, seed: int) -> float:
    """What other routers' requests take when ours are not there."""
    aside = replace(point, streams=0)
    return Run(aside, None, fresh_models(), count, seed).play().others_s
