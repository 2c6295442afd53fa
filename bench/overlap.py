"""What overlapping saves: the exposed transfer of a long prompt, beside the same without overlap.

Processes as in production: redis, a router, one prefill and one decode worker. Prompts are random and of one
length, so that nothing is cached; runs with and without overlap alternate, and in those without, D's first
fetch is held until P is FILLED (bench/fetch_hold.py). The exposed transfer is the ledger's: from the moment
when D reads that P is FILLED to COMMITTED, both on D's clock.
"""

import asyncio
import dataclasses
import random
import statistics
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass

from pdserve.bench.host_process import HostProcess, run_router, run_worker
from pdserve.client import AsyncClient, Result
from pdserve.cluster.redis_server import start_redis
from pdserve.core.catalog import DEMO_MODEL
from pdserve.core.config import ServeConfig
from pdserve.core.errors import Unavailable
from pdserve.core.types import Disaggregation, Role, blocks_for
from pdserve.router.process import RouterSpec
from pdserve.workers.spec import WorkerSpec

TRANSPORTS = ("shm", "tcp")
PROMPT_TOKENS = 4000
PAIRS = 10
_PATIENCE_S = 600.0
"""Nobody gives up on a fetch that is held: neither D, whose way to P takes so long, nor the client."""
_READY_S = 60.0


@dataclass(frozen=True, slots=True)
class OverlapFigure:
    """One transport. Exposed transfers in milliseconds: medians, and of all runs in order."""

    transport: str
    overlapped_ms: float
    held_ms: float
    """Without overlap."""
    ratio: float
    prefill_s: float
    """The median of all runs."""
    bytes: int
    overlapped_runs_ms: tuple[float, ...]
    held_runs_ms: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class OverlapReport:
    """One run of the benchmark."""

    model: str
    dtype: str
    prompt_tokens: int
    chunk_tokens: int
    pairs: int
    results: tuple[OverlapFigure, ...]

    def to_dict(self) -> dict[str, object]:
        """As plain values, for JSON."""
        return dataclasses.asdict(self)


async def measure_overlap(
    config: ServeConfig | None = None,
    *,
    prompt_tokens: int = PROMPT_TOKENS,
    pairs: int = PAIRS,
    transports: Sequence[str] = TRANSPORTS,
    tell: Callable[[str], object] = lambda line: None,
) -> OverlapReport:
    """Measure. `config` is a cluster's; without it, what `pdserve serve` runs by default, the demo model.

    `tell` hears how it goes. Raises PdserveError, also where a run was not a handoff of the whole prompt.
    """
    base = config or ServeConfig(model=DEMO_MODEL)
    figures = []
    for transport in transports:
        handoff = dataclasses.replace(
            base.handoff, transport=transport, silence_s=_PATIENCE_S, request_deadline_s=_PATIENCE_S
        )
        chosen = dataclasses.replace(base, handoff=handoff)
        async with _cluster(chosen, transport) as course:
            figures.append(await course.measure(prompt_tokens, pairs, tell))
    return OverlapReport(
        base.model, base.dtype, prompt_tokens, base.engine.chunk_tokens, pairs, tuple(figures)
    )


@asynccontextmanager
async def _cluster(config: ServeConfig, transport: str) -> AsyncIterator["_Course"]:
    with ExitStack() as stack:
        redis = await asyncio.to_thread(start_redis)
        stack.callback(redis.stop)
        index = dataclasses.replace(config.index, redis_url=redis.url)
        router = dataclasses.replace(config.router, grpc_port=0, disaggregation=str(Disaggregation.ALWAYS))
        config = dataclasses.replace(config, index=index, router=router)
        prefill, decode = (
            HostProcess(f"the {role} worker", run_worker, _worker_spec(config, role))
            for role in (Role.PREFILL, Role.DECODE)
        )
        front = HostProcess("the router", run_router, RouterSpec(config))
        for process in (prefill, decode, front):
            await asyncio.to_thread(stack.enter_context, process)
        async with AsyncClient(front.address, timeout=_PATIENCE_S) as client:
            await _until_ready(client)
            yield _Course(config, transport, client, decode)


def _worker_spec(config: ServeConfig, role: Role) -> WorkerSpec:
    return WorkerSpec(
        worker=f"{role}-0",
        role=str(role),
        model=config.model,
        dtype=config.dtype,
        engine=config.engine,
        handoff=config.handoff,
        session=config.session,
        index=config.index,
    )


async def _until_ready(client: AsyncClient) -> None:
    deadline = time.monotonic() + _READY_S
    while time.monotonic() < deadline:
        if sum(worker.state == "ready" for worker in (await client.status()).workers) == 2:
            return
        await asyncio.sleep(0.05)
    raise Unavailable(f"the router does not see both workers after {_READY_S:g} s")


class _Course:
    """The runs over one transport."""

    def __init__(self, config: ServeConfig, transport: str, client: AsyncClient, decode: HostProcess) -> None:
        self._config = config
        self._transport = transport
        self._client = client
        self._decode = decode
        self._chance = random.Random(0)
        self._vocabulary = 0

    async def measure(self, tokens: int, pairs: int, tell: Callable[[str], object]) -> OverlapFigure:
        self._vocabulary = (await self._client.models())[0].vocab_size
        # Each takes blocks that nobody has used, until D's whole pool is mapped.
        warm_ups = -(-self._config.engine.pool_blocks // blocks_for(tokens))
        tell(f"{self._transport}: {warm_ups} prompts of {tokens} tokens to warm up, then {pairs} pairs")
        for _ in range(warm_ups):
            await self._run(tokens, hold=False)
        runs: list[tuple[Result, Result]] = []
        for number in range(pairs):
            pair = await self._run(tokens, hold=False), await self._run(tokens, hold=True)
            runs.append(pair)
            overlapped, held = (_exposed_ms(result) for result in pair)
            tell(f"{self._transport} {number + 1}/{pairs}: {overlapped:.2f} ms, {held:.2f} ms held")
        overlapped_ms = tuple(_exposed_ms(result) for result, _ in runs)
        held_ms = tuple(_exposed_ms(result) for _, result in runs)
        medians = statistics.median(overlapped_ms), statistics.median(held_ms)
        return OverlapFigure(
            transport=self._transport,
            overlapped_ms=medians[0],
            held_ms=medians[1],
            ratio=medians[0] / medians[1],
            prefill_s=statistics.median(result.ledger.prefill for pair in runs for result in pair),
            bytes=runs[0][0].route.bytes_moved,
            overlapped_runs_ms=overlapped_ms,
            held_runs_ms=held_ms,
        )

    async def _run(self, tokens: int, *, hold: bool) -> Result:
        """One request with a prompt that nobody has seen."""
        prompt = tuple(self._chance.randrange(self._vocabulary) for _ in range(tokens))
        self._decode.ask(hold)
        result = await self._client.generate(token_ids=prompt, max_tokens=1, temperature=0.0)
        route = result.route
        moved = blocks_for(tokens - 1)
        if (route.transport, route.blocks_moved) != (self._transport, moved):
            raise Unavailable(
                f"{route.blocks_moved} blocks came over {route.transport or 'no transport'}, and not {moved} "
                f"over {self._transport}: this run shows nothing"
            )
        return result


def _exposed_ms(result: Result) -> float:
    return result.ledger.exposed_transfer * 1e3
