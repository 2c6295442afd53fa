"""What a client, an operator and the router learn of the choice between a handoff and the owner itself."""

import asyncio
from pathlib import Path

import pytest
from prometheus_client import generate_latest
from stack import Stack, stack, tiny_config

from pdserve.cluster.redis_server import RedisServer
from pdserve.core.config import HandoffConfig, RouterConfig, SessionConfig
from pdserve.core.types import Disaggregation, Role

PROMPT = "What costs less is done, and what was expected is told beside what came of it. " * 4
WORKERS = {"prefill-0": Role.PREFILL, "decode-0": Role.DECODE}


def metric(running: Stack, name: str, path: str) -> float:
    assert running.router is not None
    lines = generate_latest(running.router.metered.registry).decode().splitlines()
    found = [line for line in lines if line.startswith(f'pdserve_{name}{{path="{path}"}}')]
    return float(found[0].split()[-1]) if found else 0.0


@pytest.mark.parametrize("mode", Disaggregation)
async def test_both_predictions_and_the_outcome_come_with_the_answer(
    tiny_model: Path, redis: RedisServer, mode: Disaggregation
) -> None:
    config = tiny_config(
        tiny_model,
        redis,
        # On a slow machine, too, a handoff is served by the first who is asked.
        handoff=HandoffConfig(silence_s=60.0),
        session=SessionConfig(silence_s=60.0),
        router=RouterConfig(grpc_port=0, disaggregation=str(mode)),
    )
    async with stack(config, WORKERS) as running:
        client = running.client
        assert client is not None
        results = [await client.generate(f"{n} {PROMPT}", max_tokens=2, ignore_eos=True) for n in range(4)]
        handoffs = sum(bool(result.route.transport) for result in results)
        if mode is not Disaggregation.COST:
            assert handoffs == (len(results) if mode is Disaggregation.ALWAYS else 0)
        for result in results:
            local, handoff = result.route.predicted_local, result.route.predicted_handoff
            assert local is not None
            assert handoff is not None
            assert min(local.seconds, handoff.seconds) > 0.0
            ledger, inside = (
                result.ledger,
                ("retry", "prefill_queue", "prefill", "exposed_transfer", "first_step"),
            )
            assert sum(ledger.parts()[part] for part in inside) <= result.route.measured_s + 1e-6
            assert result.route.measured_s <= result.ttft_s
        counts = [
            metric(running, "prefill_prediction_error_ratio_count", path) for path in ("local", "handoff")
        ]
        assert counts == [len(results) - handoffs, handoffs]
        alone = await client.generate(token_ids=[1, 2, 3], max_tokens=2, ignore_eos=True)
        assert (alone.route.predicted_local, alone.route.predicted_handoff) == (None, None)
        assert metric(running, "prefill_prediction_error_ratio_count", "local") == counts[0]


async def test_the_router_hears_what_a_handoff_taught(tiny_model: Path, redis: RedisServer) -> None:
    async with stack(tiny_config(tiny_model, redis), WORKERS) as running:
        client, router = running.client, running.router
        assert client is not None
        assert router is not None
        result = await client.generate(PROMPT, max_tokens=2, ignore_eos=True)
        transport = result.route.transport
        async with asyncio.timeout(20):
            while True:
                view = router.pool.view(router.pool.records())
                owner, prefill = (
                    next(w for w in view if w.worker == name) for name in ("decode-0", "prefill-0")
                )
                if owner.load.ways == {"prefill-0": transport} and prefill.load.prefills == 1:
                    break
                await asyncio.sleep(0.02)
        assert f"handoff/{transport}/fixed_seconds" in owner.perf.snapshot()
        assert prefill.load.prefill_busy_s > 0.0
        assert prefill.load.queued_prefills == 0
        assert owner.record.block_bytes == running.workers["decode-0"].storage.layout.block_bytes
