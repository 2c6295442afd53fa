"""A worker that is killed at a named moment loses nothing that was promised, and leaks nothing."""

from collections.abc import Iterator

import pytest
from bare_cluster import BareCluster
from references import QUICK_TOKENS, references

from pdserve.client import AsyncClient
from pdserve.core.config import EngineConfig
from pdserve.core.errors import WorkerLost
from pdserve.core.types import Role


@pytest.fixture
def cluster() -> Iterator[BareCluster]:
    # 64-token chunks: a 705-token prompt is 11 of them.
    bare = BareCluster(engine=EngineConfig(pool_blocks=256, chunk_tokens=64, token_budget=128))
    try:
        yield bare
    finally:
        bare.close()


async def test_a_prefill_worker_killed_at_its_second_chunk_costs_no_token(cluster: BareCluster) -> None:
    case = references(("long-700",))[0]
    cluster.start_worker(
        "prefill-0", Role.PREFILL, module="fault_worker", arguments=("--die", "chunk_ready:2")
    )
    cluster.start_worker("decode-0", Role.DECODE)
    cluster.start_router()
    cluster.wait_ready("prefill-0", "decode-0")
    old = cluster.processes["prefill-0"].ready["incarnation"]
    async with AsyncClient(cluster.target, timeout=60) as client:
        result = await client.generate(token_ids=case.prompt, max_tokens=QUICK_TOKENS, ignore_eos=True)
        assert list(result.token_ids) == case.completion[:QUICK_TOKENS]
        assert result.route.prefill_worker == "decode-0"
        assert result.route.candidates_tried == 1
        assert cluster.processes["prefill-0"].popen.wait(10) == -9
        cluster.assert_settled("decode-0")

        cluster.start_worker("prefill-0", Role.PREFILL)
        cluster.wait_ready("prefill-0")
        other = references(("digits",))[0]
        result = await client.generate(token_ids=other.prompt, max_tokens=8, ignore_eos=True)
        assert list(result.token_ids) == other.completion[:8]
        assert result.route.prefill_worker == "prefill-0"
        assert result.route.prefill_incarnation != old
    cluster.assert_settled("prefill-0", "decode-0")


async def test_a_decode_worker_killed_at_token_five_fails_the_stream_as_retriable_with_its_tokens(
    cluster: BareCluster,
) -> None:
    case = references(("chat-advice",))[0]
    cluster.start_worker("prefill-0", Role.PREFILL)
    cluster.start_worker("decode-0", Role.DECODE, module="fault_worker", arguments=("--die", "token:6"))
    cluster.start_router()
    cluster.wait_ready("prefill-0", "decode-0")
    old = cluster.processes["decode-0"].ready["incarnation"]
    async with AsyncClient(cluster.target, timeout=60) as client:
        with pytest.raises(WorkerLost) as lost:
            await client.generate(token_ids=case.prompt, max_tokens=64, ignore_eos=True)
        assert lost.value.retriable
        tokens = list(lost.value.partial.token_ids)
        assert len(tokens) == 5
        assert tokens == case.completion[:5]
        cluster.assert_settled("prefill-0")

        cluster.start_worker("decode-0", Role.DECODE)
        cluster.wait_ready("decode-0")
        result = await client.generate(token_ids=case.prompt, max_tokens=QUICK_TOKENS, ignore_eos=True)
        assert list(result.token_ids) == case.completion[:QUICK_TOKENS]
        assert result.route.decode_incarnation != old
    cluster.assert_settled("prefill-0", "decode-0")
