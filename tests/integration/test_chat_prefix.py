"""A chat's second turn finds the first one's answer where it was decoded, whoever prefills now."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from stack import RouterSeams, Stack, stack, tiny_config

from pdserve.cluster.redis_server import RedisServer
from pdserve.core.types import BLOCK_TOKENS, Role, WorkerId, hit_limit
from pdserve.kvtransfer.index.base import Holder
from pdserve.kvtransfer.names import chain, namespace
from pdserve.router.policies.base import Placement

QUESTION = [(37 * i + i * i) % 250 for i in range(70)]
FOLLOW_UP = [(91 * i + 5) % 250 for i in range(40)]
ANSWER_TOKENS = 64
HELD_BLOCKS = (len(QUESTION) + ANSWER_TOKENS - 1) // BLOCK_TOKENS
"""Of question and answer, at the worker that decoded it: the last token has no KV yet."""

PERF = {
    "prefill/step_seconds": 100.0,
    **{f"transfer/{way}/latency_seconds": 20.0 for way in ("inproc", "shm", "tcp")},
}
"""By this model a fetch pays, and has a minute, which no pause of a busy machine lasts."""

WORKERS = {"prefill-0": Role.PREFILL, "decode-0": Role.DECODE, "decode-1": Role.DECODE}


class Placed:
    """A policy that does as the test says."""

    def __init__(self) -> None:
        self.decode = "decode-0"
        self.prefill: tuple[str, ...] = ("prefill-0", "decode-0")

    def place(self, view: Any, request: Any, now: float) -> Placement:
        prefill = tuple(WorkerId(worker) for worker in self.prefill)
        return Placement(WorkerId(self.decode), prefill, prefill_tokens=1, prefill_s=0.0)


class Remembering:
    """An index that can be made to repeat its last answer, however old."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self._last: Any = None
        self.frozen = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    async def locate(self, names: Any, holders: Any) -> Any:
        if not self.frozen:
            self._last = await self._inner.locate(names, holders)
        return self._last


class Chat:
    """Two turns of greedy decoding through a running stack."""

    def __init__(self, running: Stack, placed: Placed, index: Remembering) -> None:
        self.stack = running
        self.index = index
        self._placed = placed

    async def ask(self, prompt: Sequence[int], decode: str, prefill: Sequence[str]) -> Any:
        self._placed.decode, self._placed.prefill = decode, tuple(prefill)
        for worker in self.stack.workers.values():
            worker._perf.restore(PERF)
        assert self.stack.client is not None
        result = await self.stack.client.generate(
            token_ids=list(prompt), max_tokens=ANSWER_TOKENS, temperature=0.0, ignore_eos=True
        )
        parts = result.ledger.parts()
        assert min(parts.values()) >= 0, parts
        assert sum(parts.values()) == pytest.approx(result.ttft_s, abs=1e-3)
        return result

    async def until_located(self, tokens: Sequence[int], worker: str, blocks: int) -> None:
        """Wait until the index knows that `worker` holds so many leading blocks."""
        record = self.stack.workers[worker].record()
        names = chain(namespace(bytes.fromhex(record.schema)), tokens)[: hit_limit(len(tokens))]
        async with asyncio.timeout(20):
            while True:
                found = await self.index.locate(names, [Holder(record.worker, record.incarnation)])
                if record.worker in found and found[record.worker].depth >= blocks:
                    return
                await asyncio.sleep(0.01)

    def fetched(self, worker: str) -> dict[str, int]:
        return self.stack.workers[worker].prefixes.counters


@asynccontextmanager
async def chat(tiny_model: Path, redis: RedisServer) -> AsyncIterator[Chat]:
    placed = Placed()
    made: list[Remembering] = []

    def remember(index: Any) -> Remembering:
        made.append(Remembering(index))
        return made[0]

    router = RouterSeams(policy=lambda policy: placed, index=remember)
    async with stack(tiny_config(tiny_model, redis), WORKERS, router=router) as running:
        yield Chat(running, placed, made[0])


@pytest.fixture(scope="module")
def answers(tiny_model: Path, redis: RedisServer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Both turns' tokens, each by a worker of its own that holds nothing before it."""
    return asyncio.run(said_alone(tiny_model, redis))


async def said_alone(tiny_model: Path, redis: RedisServer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    said: list[tuple[int, ...]] = []
    prompt = list(QUESTION)
    for _ in range(2):
        async with stack(tiny_config(tiny_model, redis), {"mixed-0": Role.MIXED}) as alone:
            assert alone.client is not None
            result = await alone.client.generate(
                token_ids=prompt, max_tokens=ANSWER_TOKENS, temperature=0.0, ignore_eos=True
            )
        said.append(result.token_ids)
        prompt += [*result.token_ids, *FOLLOW_UP]
    return said[0], said[1]


async def test_p_fetches_the_answers_blocks_from_the_worker_that_decoded_it(
    tiny_model: Path, redis: RedisServer, answers: tuple[tuple[int, ...], tuple[int, ...]]
) -> None:
    async with chat(tiny_model, redis) as talk:
        first = await talk.ask(QUESTION, "decode-0", ["prefill-0", "decode-0"])
        assert first.token_ids == answers[0]
        assert first.route.prefix_blocks_fetched == 0
        conversation = [*QUESTION, *first.token_ids, *FOLLOW_UP]
        second = await talk.ask(conversation, "decode-0", ["prefill-0", "decode-0"])
        assert second.token_ids == answers[1]
        at_p = (len(QUESTION) - 1) // BLOCK_TOKENS
        route = second.route
        assert (route.prefix_worker, route.prefix_blocks_fetched) == ("decode-0", HELD_BLOCKS - at_p)
        assert route.blocks_reused == HELD_BLOCKS
        assert second.usage.cached_tokens == HELD_BLOCKS * BLOCK_TOKENS
        assert talk.fetched("prefill-0") == {"asked": 1, "fetched": 1, "blocks": HELD_BLOCKS - at_p}


async def test_the_router_names_the_holder_to_whoever_prefills(
    tiny_model: Path, redis: RedisServer, answers: tuple[tuple[int, ...], tuple[int, ...]]
) -> None:
    """The second turn is decoded elsewhere: only the index knows where the answer is."""
    async with chat(tiny_model, redis) as talk:
        first = await talk.ask(QUESTION, "decode-0", ["prefill-0", "decode-0"])
        conversation = [*QUESTION, *first.token_ids, *FOLLOW_UP]
        await talk.until_located(conversation, "decode-0", HELD_BLOCKS)
        second = await talk.ask(conversation, "decode-1", ["prefill-0", "decode-1"])
        assert second.token_ids == answers[1]
        assert second.route.prefix_worker == "decode-0"
        assert second.route.prefill_worker == "prefill-0"
        assert second.route.blocks_reused == 0


async def test_who_computes_for_itself_fetches_too(
    tiny_model: Path, redis: RedisServer, answers: tuple[tuple[int, ...], tuple[int, ...]]
) -> None:
    async with chat(tiny_model, redis) as talk:
        first = await talk.ask(QUESTION, "decode-0", ["decode-0"])
        conversation = [*QUESTION, *first.token_ids, *FOLLOW_UP]
        await talk.until_located(conversation, "decode-0", HELD_BLOCKS)
        second = await talk.ask(conversation, "decode-1", ["decode-1"])
        assert second.token_ids == answers[1]
        route = second.route
        assert (route.prefill_worker, route.transport) == ("decode-1", "")
        assert (route.prefix_worker, route.prefix_blocks_fetched) == ("decode-0", HELD_BLOCKS)
        assert second.usage.cached_tokens == HELD_BLOCKS * BLOCK_TOKENS
        assert second.ledger.exposed_transfer == 0.0


async def test_a_holder_that_has_forgotten_costs_the_tokens_nothing(
    tiny_model: Path, redis: RedisServer, answers: tuple[tuple[int, ...], tuple[int, ...]]
) -> None:
    """The index has not heard of it: what it says is a hint."""
    async with chat(tiny_model, redis) as talk:
        first = await talk.ask(QUESTION, "decode-0", ["prefill-0", "decode-0"])
        conversation = [*QUESTION, *first.token_ids, *FOLLOW_UP]
        await talk.until_located(conversation, "decode-0", HELD_BLOCKS)
        talk.index.frozen = True
        talk.stack.workers["decode-0"].pool.clear_cache()
        second = await talk.ask(conversation, "decode-1", ["prefill-0", "decode-1"])
        assert second.token_ids == answers[1]
        assert second.route.prefix_blocks_fetched == 0
        assert talk.fetched("prefill-0") == {"asked": 1, "failed_rejected": 1}
