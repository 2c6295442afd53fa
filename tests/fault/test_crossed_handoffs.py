"""Two workers that hold blocks for each other, and both want more than they have left: both get on."""

import asyncio
import dataclasses
import time
from collections.abc import Iterator

import pytest
from bare_cluster import BareCluster
from direct_request import direct_request
from fault_cases import HANDOFF, INDEX, SESSION, STEP_S
from greedy_reference import GreedyReference

from pdserve.core.config import EngineConfig
from pdserve.core.types import Role

NAMES = ("mixed-0", "mixed-1")
PROMPT_TOKENS = 320
"""20 blocks, of pools of 30: one is exported and one wanted in each, which is 10 too many."""
TOKENS = 8
DEADLINE_S = 20.0
ROUNDS = 3


@pytest.fixture(params=["shm", pytest.param("tcp", marks=pytest.mark.full)])
def pair(request: pytest.FixtureRequest, reference: GreedyReference) -> Iterator[BareCluster]:
    cluster = BareCluster(
        model=str(reference.model),
        engine=EngineConfig(pool_blocks=30, chunk_tokens=32, token_budget=64, headroom_tokens=16),
        handoff=dataclasses.replace(HANDOFF, export_share=1.0, transport=request.param),
        session=SESSION,
        index=INDEX,
    )
    try:
        for name in NAMES:
            arguments = ("--step-s", str(STEP_S))
            cluster.start_worker(name, Role.MIXED, module="fault_worker", arguments=arguments)
        for name in NAMES:
            cluster.processes[name].wait_ready()
        yield cluster
    finally:
        for process in cluster.processes.values():
            process.kill()  # all is checked: nothing is learnt from an orderly end
        cluster.close()


async def test_two_workers_that_hold_for_each_other_make_progress(
    pair: BareCluster, reference: GreedyReference
) -> None:
    records = [pair.processes[name].ready for name in NAMES]

    async def crossed(number: int, side: int) -> str:
        """`side` decodes what the other one prefills, or itself if need be."""
        owner, other = records[side], records[1 - side]
        prompt = reference.prompt(f"crossed {number} {side}", PROMPT_TOKENS)
        tokens, prefilled_by = await direct_request(
            owner, (other, owner), prompt, name=f"r{number}-{side}", tokens=TOKENS, within_s=DEADLINE_S
        )
        assert len(tokens) == TOKENS
        assert reference.first_wrong(prompt, tokens) is None
        return prefilled_by

    for number in range(ROUNDS):
        held = number == 0  # the first time for certain, then as it comes
        if held:
            for name in NAMES:
                pair.processes[name].ask({"arm": [{"point": "fill", "action": "hold"}]})
        both = [asyncio.create_task(crossed(number, side)) for side in range(2)]
        if held:
            await asyncio.to_thread(until_all_hold, pair)
            for name in NAMES:
                pair.processes[name].ask({"release": True})
        await asyncio.gather(*both)
        await asyncio.to_thread(pair.assert_settled, *NAMES)
    gave_up = [pair.inspect(name).counters.get("serve_downgraded", 0) for name in NAMES]
    assert sum(gave_up) > 0, "nobody had to give anything up: nothing was tried"


def until_all_hold(pair: BareCluster) -> None:
    """Both have computed a chunk for the other, in blocks that the other's own request needs."""
    until = time.monotonic() + DEADLINE_S
    while not all(pair.processes[name].ask({})["fired"] for name in NAMES):
        assert time.monotonic() < until, "somebody was asked for nothing"
        time.sleep(0.02)
