"""Greedy and seeded output is the same however it is served, and equal to transformers'."""

import dataclasses
import time
from collections.abc import Iterator

import pytest
from bare_cluster import BareCluster, bare_cluster
from parity import assert_equal_to_references, in_flight, one_at_a_time, sampled
from references import QUICK, QUICK_TOKENS, references

from pdserve.client import AsyncClient
from pdserve.core.config import HandoffConfig
from pdserve.core.types import Role

SAMPLED: dict[str, list[tuple[int, ...]]] = {}
FULL_SAMPLED: dict[str, list[tuple[int, ...]]] = {}

DEPLOYMENTS = {
    "aggregated": ({"mixed-0": Role.MIXED}, HandoffConfig()),
    "shm": ({"prefill-0": Role.PREFILL, "decode-0": Role.DECODE}, HandoffConfig(transport="shm")),
    "tcp": ({"prefill-0": Role.PREFILL, "decode-0": Role.DECODE}, HandoffConfig(transport="tcp")),
}


@pytest.fixture(scope="module", params=list(DEPLOYMENTS))
def deployment(request: pytest.FixtureRequest) -> Iterator[tuple[str, BareCluster]]:
    workers, handoff = DEPLOYMENTS[request.param]
    with bare_cluster(workers, handoff=handoff) as cluster:
        yield request.param, cluster


async def test_greedy_tokens_equal_transformers_alone_in_flight_and_from_reused_blocks(
    deployment: tuple[str, BareCluster],
) -> None:
    name, cluster = deployment
    cases = references(QUICK)
    async with AsyncClient(cluster.target, timeout=120) as client:
        first = await one_at_a_time(client, cases, QUICK_TOKENS)
        assert_equal_to_references(first, cases, QUICK_TOKENS)
        again = await in_flight(client, cases, QUICK_TOKENS)
        assert_equal_to_references(again, cases, QUICK_TOKENS)
    long = next(result for result, case in zip(first, cases, strict=True) if case.name == "long-1600")
    if name == "aggregated":
        assert long.route.blocks_moved == 0
        assert long.route.transport == ""
    else:
        assert long.route.transport == name
        assert long.route.blocks_moved == 101  # 1,615 positions
        assert long.route.prefill_pid != long.route.decode_pid
    assert sum(result.route.blocks_reused for result in again) > 0
    cluster.assert_settled(*DEPLOYMENTS[name][0])


async def test_seeded_sampling_is_the_same_in_every_deployment(deployment: tuple[str, BareCluster]) -> None:
    name, cluster = deployment
    cases = references(QUICK[:3])
    async with AsyncClient(cluster.target, timeout=120) as client:
        tokens = await sampled(client, cases, QUICK_TOKENS)
        assert tokens[:1] == await sampled(client, cases[:1], QUICK_TOKENS)  # whoever else is in the batch
    greedy = [tuple(case.completion[:QUICK_TOKENS]) for case in cases]
    assert tokens != greedy, "temperature 0.8 changed nothing"
    SAMPLED[name] = tokens
    assert all(other == tokens for other in SAMPLED.values()), f"{name} differs from {sorted(SAMPLED)}"


async def test_the_ledger_explains_the_time_to_first_token(deployment: tuple[str, BareCluster]) -> None:
    name, cluster = deployment
    prompt = [7, *references(("long-700",))[0].prompt]  # another first token: nothing of it is cached
    async with AsyncClient(cluster.target, timeout=120) as client:
        result = await client.generate(token_ids=prompt, max_tokens=2, ignore_eos=True)
    parts = result.ledger.parts()
    assert min(parts.values()) >= 0, parts
    assert sum(parts.values()) == pytest.approx(result.ttft_s, abs=1e-3)
    assert parts["prefill"] > 0
    assert (parts["exposed_transfer"] > 0) == (name != "aggregated")
    assert dataclasses.asdict(result.usage)["prompt_tokens"] == len(prompt)


@pytest.mark.full
@pytest.mark.timeout(1200)
async def test_the_full_matrix_of_prompts_equals_transformers(deployment: tuple[str, BareCluster]) -> None:
    """24 prompts x 64 tokens: one at a time, 16 in flight on reused blocks, and seeded sampling."""
    name, cluster = deployment
    cases = references()
    tokens = 64
    async with AsyncClient(cluster.target, timeout=600) as client:
        started = time.monotonic()
        first = await one_at_a_time(client, cases, tokens)
        assert_equal_to_references(first, cases, tokens)
        again = await in_flight(client, cases, tokens)
        assert_equal_to_references(again, cases, tokens)
        reused = sum(result.route.blocks_reused for result in again)
        assert reused > 0
        FULL_SAMPLED[name] = await sampled(client, cases, tokens)
        assert all(other == FULL_SAMPLED[name] for other in FULL_SAMPLED.values()), sorted(FULL_SAMPLED)
    moved = sum(result.route.blocks_moved for result in first)
    print(
        f"\n{name}: {len(cases)} prompts x {tokens} tokens equal transformers, alone and in flight; "
        f"{moved} blocks moved, {reused} reused; sampled equal to {sorted(FULL_SAMPLED)}; "
        f"{time.monotonic() - started:.0f} s"
    )
    cluster.assert_settled(*DEPLOYMENTS[name][0])
