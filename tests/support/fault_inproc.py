"""The fault matrix where P and D live in one process, so that blocks move inproc: a cluster per case."""

import asyncio
import contextlib
import dataclasses
from collections.abc import Iterator

from fault_cases import ENGINE, HANDOFF, INDEX, NAMES, PROMPT_TOKENS, ROLES, SESSION, STEP_S, Case, Kind, Pids
from fault_points import FaultPoints
from fault_request import Ended, ask_for, judge, judge_calm, row
from fault_seams import fault_seams
from fault_table import Row
from fault_worker import SlowRunner
from greedy_reference import GreedyReference
from stack import Stack, stack, tiny_config

from pdserve.cluster.redis_server import RedisServer, start_redis
from pdserve.core.tasks import end_task
from pdserve.core.types import BlockId
from pdserve.workers.seams import Seams

TRANSPORT = "inproc"
SETTLE_S = 20.0


async def play_inproc(reference: GreedyReference, case: Case) -> Row:
    """Start a request, strike it, and check all that must hold then."""
    server = await asyncio.to_thread(start_redis)
    points = {side: FaultPoints() for side in NAMES}
    running: Stack | None = None

    @contextlib.contextmanager
    def flipped(pid: int, block: BlockId) -> Iterator[None]:
        assert running is not None
        at = running.workers[NAMES["P"]].storage.bytes_view[block]
        at[0] ^= 1
        try:
            yield
        finally:
            at[0] ^= 1

    def seams(side: str) -> Seams:
        around = fault_seams(points[side], flipped)
        return dataclasses.replace(around, runner=lambda runner: SlowRunner(runner, STEP_S))

    try:
        base = tiny_config(reference.model, server, engine=ENGINE, handoff=HANDOFF, session=SESSION)
        index = dataclasses.replace(INDEX, redis_url=server.url, cluster=base.index.cluster)
        config = dataclasses.replace(base, index=index)
        roles = {NAMES[side]: ROLES[side] for side in NAMES}
        async with stack(config, roles, seams={NAMES[side]: seams(side) for side in NAMES}) as running:
            return await _play(reference, case, running, points, server)
    finally:
        await asyncio.to_thread(server.stop)


async def _play(
    reference: GreedyReference,
    case: Case,
    running: Stack,
    points: dict[str, FaultPoints],
    server: RedisServer,
) -> Row:
    assert running.router is not None
    target = f"127.0.0.1:{running.router.port}"

    async def serve(why: str) -> None:
        prompt = reference.prompt(f"{TRANSPORT} {why} {case.name}", PROMPT_TOKENS)
        judge_calm(reference, prompt, await ask_for(target, prompt), TRANSPORT, why)

    prompt = reference.prompt(f"{TRANSPORT} {case.name}", PROMPT_TOKENS)
    for side, faults in case.faults(Pids(P=0, D=0, redis=server.pid or 0)).items():
        points[side].arm(faults)
    ended = await _struck(case, target, prompt, points, server)
    fired = [fault for armed in points.values() for fault in armed.fired]
    for armed in points.values():
        armed.release()
    judge(reference, case, prompt, ended, case.bound_s(0.0))
    assert fired, "the fault never struck"
    counters = (await running.workers[NAMES["D"]].inspect()).counters
    assert counters.get("fetch_digest_mismatches", 0) == (case.kind is Kind.CORRUPT)
    if case.kind is Kind.REDIS:
        await serve("without redis")
        await asyncio.to_thread(server.restart)
    await serve("afterwards")
    return row(TRANSPORT, case, ended, case.bound_s(0.0))


async def _struck(
    case: Case, target: str, prompt: list[int], points: dict[str, FaultPoints], server: RedisServer
) -> Ended:
    request = asyncio.create_task(ask_for(target, prompt))
    try:
        if case.kind is Kind.REDIS:
            async with asyncio.timeout(SETTLE_S):
                while server.alive():
                    await asyncio.sleep(0.01)
            for side in points.values():
                side.release()  # a state that was held goes on without redis
        return await request
    finally:
        await end_task(request)
