"""Several choices of one prompt, and stop strings, through a whole cluster: the tokens of single runs."""

import asyncio
import dataclasses
import threading
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from stack import Stack, stack, tiny_config

from pdserve.cluster.redis_server import RedisServer
from pdserve.core.request_limits import promise_blocks
from pdserve.core.seed import derive_seed
from pdserve.core.types import Role, blocks_for, hit_limit
from pdserve.proto import inference_pb2, inference_pb2_grpc
from pdserve.workers.engine.runner import BatchSpec, ModelRunner
from pdserve.workers.seams import Seams

PD = {"prefill-0": Role.PREFILL, "decode-0": Role.DECODE}
DEPLOYMENTS = {"disaggregated": PD, "aggregated": {"decode-0": Role.MIXED}}
SAMPLED = {"temperature": 0.9, "top_p": 0.95, "seed": 31}


@dataclasses.dataclass
class Answer:
    """One choice as a client puts it together."""

    tokens: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[int] = dataclasses.field(default_factory=list)
    """The tokens that they are of."""
    text: str = ""
    finish: str = ""
    usage: inference_pb2.Usage | None = dataclasses.field(default=None, compare=False)


def prompt_of(length: int, salt: int = 0) -> list[int]:
    return [(37 * i + 11 * salt + i * i) % 250 for i in range(length)]


@asynccontextmanager
async def stub_of(running: Stack) -> AsyncIterator[inference_pb2_grpc.InferenceStub]:
    assert running.router is not None
    async with grpc.aio.insecure_channel(f"127.0.0.1:{running.router.port}") as channel:
        yield inference_pb2_grpc.InferenceStub(channel)


def ask(prompt: Sequence[int], **sampling: Any) -> inference_pb2.GenerateRequest:
    fields = {"max_tokens": 20, "temperature": 0.0, "ignore_eos": True, **sampling}
    ids = inference_pb2.TokenIds(ids=prompt)
    return inference_pb2.GenerateRequest(token_ids=ids, sampling=inference_pb2.Sampling(**fields))


class Reader:
    """Checks every chunk against those before it."""

    def __init__(self, call: Any) -> None:
        self._chunks = call.__aiter__()
        self._first = True
        self.answers: dict[int, Answer] = {}

    async def read(self) -> bool:
        """One chunk; False at the end."""
        try:
            chunk = await anext(self._chunks)
        except StopAsyncIteration:
            return False
        assert chunk.HasField("ledger") == chunk.HasField("route") == self._first
        self._first = False
        answer = self.answers.setdefault(chunk.choice, Answer())
        assert not answer.finish, "a choice went on after its end"
        assert chunk.first_index == len(answer.tokens)
        answer.tokens += chunk.token_ids
        answer.logprobs += [position.sampled.token_id for position in chunk.logprobs]
        answer.text += chunk.text
        answer.finish = chunk.finish_reason
        if chunk.finish_reason:
            answer.usage = chunk.usage
        return True

    async def until_begun(self, choices: int) -> None:
        while len(self.answers) < choices:
            assert await self.read()

    async def rest(self) -> list[Answer]:
        while await self.read():
            pass
        answers = [self.answers[choice] for choice in range(len(self.answers))]
        for answer in answers:
            assert answer.finish
            assert answer.usage is not None
            assert answer.usage.completion_tokens == len(answer.tokens)
        return answers


async def answers_to(
    stub: inference_pb2_grpc.InferenceStub, prompt: Sequence[int], **sampling: Any
) -> list[Answer]:
    async with asyncio.timeout(60):
        return await Reader(stub.Generate(ask(prompt, **sampling))).rest()


class Watched:
    """A runner that keeps the blocks of each step's sampling sequences, and may be held up."""

    def __init__(self) -> None:
        self.sampled: list[list[tuple[int, ...]]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()

    def around(self, runner: ModelRunner) -> "Watched":
        self._runner = runner
        return self

    def run(self, batch: BatchSpec) -> Any:
        self.entered.set()
        assert self.gate.wait(30)
        self.sampled.append([chunk.blocks for chunk in batch.chunks if chunk.sampling is not None])
        return self._runner.run(batch)


@pytest.mark.parametrize("deployment", list(DEPLOYMENTS))
async def test_n_streams_equal_n_single_runs_with_the_derived_seeds(
    tiny_model: Path, redis: RedisServer, deployment: str
) -> None:
    """Prompts that end within a block, with one, one past it, and that have no block to share."""
    workers: Mapping[str, Role] = DEPLOYMENTS[deployment]
    async with stack(tiny_config(tiny_model, redis), workers) as running, stub_of(running) as stub:
        for length, sampling in ((70, SAMPLED), (64, {}), (65, SAMPLED), (1, SAMPLED)):
            prompt = prompt_of(length, salt=length)
            together = await answers_to(stub, prompt, n=3, **sampling)
            seeds = [{"seed": derive_seed(31, choice)} if sampling else {} for choice in range(3)]
            alone = [await answers_to(stub, prompt, **{**sampling, **seed}) for seed in seeds]
            assert [[answer] for answer in together] == alone
            assert len({tuple(answer.tokens) for answer in together}) == (3 if sampling else 1)
        counters = (await running.workers["decode-0"].inspect()).counters
        assert (counters.get("fetch_handoffs_committed", 0) > 0) == (deployment == "disaggregated")


@pytest.mark.parametrize("deployment", list(DEPLOYMENTS))
async def test_eight_choices_of_a_long_prompt_hold_it_once(
    tiny_model: Path, redis: RedisServer, deployment: str
) -> None:
    watched = Watched()
    seams = {"decode-0": Seams(runner=watched.around)}
    config = tiny_config(tiny_model, redis)
    async with (
        stack(config, DEPLOYMENTS[deployment], seams=seams) as running,
        stub_of(running) as stub,
    ):
        reader = Reader(stub.Generate(ask(prompt_of(900), n=8, max_tokens=40, **SAMPLED)))
        await reader.until_begun(8)
        promised = running.workers["decode-0"].pool.counts().promised
        await reader.rest()
        assert promised == promise_blocks(900, 40, config.engine.headroom_tokens, 8)
        assert promised == hit_limit(900) + 8 * (blocks_for(900 + 39) - hit_limit(900))
    full = [tables for tables in watched.sampled if len(tables) == 8]
    assert full
    for tables in full:
        own = sum(len(table) - hit_limit(900) for table in tables)
        assert len({block for table in tables for block in table}) == hit_limit(900) + own <= promised


async def test_a_cancel_in_the_middle_ends_all_choices(tiny_model: Path, redis: RedisServer) -> None:
    async with stack(tiny_config(tiny_model, redis), PD) as running, stub_of(running) as stub:
        call = stub.Generate(ask(prompt_of(70), n=3, max_tokens=300, **SAMPLED))
        await Reader(call).until_begun(3)
        call.cancel()
        await running.settled()
        (again,) = await answers_to(stub, prompt_of(70))
        assert len(again.tokens) == 20


async def test_choices_of_a_prefill_worker_that_went_are_prefilled_here(
    tiny_model: Path, redis: RedisServer
) -> None:
    held = Watched()
    async with (
        stack(tiny_config(tiny_model, redis), PD, seams={"prefill-0": Seams(runner=held.around)}) as running,
        stub_of(running) as stub,
    ):
        held.gate.clear()
        asked = asyncio.create_task(answers_to(stub, prompt_of(91), n=3, **SAMPLED))
        assert await asyncio.to_thread(held.entered.wait, 20)
        stopping = asyncio.create_task(running.workers.pop("prefill-0").stop())
        answers = await asked
        held.gate.set()
        await stopping
        for choice, answer in enumerate(answers):
            seed = derive_seed(31, choice)
            assert await answers_to(stub, prompt_of(91), **{**SAMPLED, "seed": seed}) == [answer]
        assert len(answers) == 3


async def test_a_broken_session_costs_no_choice_a_token(tiny_model: Path, redis: RedisServer) -> None:
    async with stack(tiny_config(tiny_model, redis), PD) as running, stub_of(running) as stub:
        expected = await answers_to(stub, prompt_of(40), n=3, max_tokens=120, **SAMPLED)
        reader = Reader(stub.Generate(ask(prompt_of(40), n=3, max_tokens=120, **SAMPLED)))
        await reader.until_begun(3)
        worker = running.workers["decode-0"]
        worker.break_sessions()
        for _ in range(6):
            await reader.read()
        worker.break_sessions()
        assert await reader.rest() == expected
        assert worker.decode.counters["attached"] > 0


async def test_preemption_changes_no_choice(tiny_model: Path, redis: RedisServer) -> None:
    config = tiny_config(tiny_model, redis)
    tight = dataclasses.replace(config.engine, pool_blocks=14, headroom_tokens=16)
    async with stack(config, {"mixed-0": Role.MIXED}) as running, stub_of(running) as stub:
        expected = await answers_to(stub, prompt_of(60), n=2, max_tokens=100, stop=["\x00\x01"], **SAMPLED)
    async with (
        stack(config, {"mixed-0": Role.MIXED}, engines={"mixed-0": tight}) as running,
        stub_of(running) as stub,
    ):
        assert (
            await answers_to(stub, prompt_of(60), n=2, max_tokens=100, stop=["\x00\x01"], **SAMPLED)
            == expected
        )
        counters = (await running.workers["mixed-0"].inspect()).counters
        assert counters["engine_preemptions"] > 0


@pytest.mark.parametrize("deployment", list(DEPLOYMENTS))
async def test_a_stop_cuts_the_text_of_its_choice_and_ends_it(
    tiny_model: Path, redis: RedisServer, deployment: str
) -> None:
    """The tiny model has a token per byte, so every stop lies across tokens."""
    async with (
        stack(tiny_config(tiny_model, redis), DEPLOYMENTS[deployment]) as running,
        stub_of(running) as stub,
    ):
        free = await answers_to(stub, prompt_of(50), n=2, max_tokens=60, **SAMPLED)
        for start, size in ((0, 3), (20, 4), (40, 2)):
            stop = free[0].text[start : start + size]
            decoys = [f"{stop}{stop}{number}" for number in range(60)]
            stopped = await answers_to(
                stub, prompt_of(50), n=2, max_tokens=60, stop=[*decoys, stop], logprobs=1, **SAMPLED
            )
            for whole, cut in zip(free, stopped, strict=True):
                at = whole.text.find(stop)
                assert cut.tokens == cut.logprobs == whole.tokens[: len(cut.tokens)]
                if at < 0:
                    assert (cut.text, cut.finish) == (whole.text, "length")
                else:
                    assert (cut.text, cut.finish) == (whole.text[:at], "stop")
            assert stopped[0].finish == "stop"
            assert len(stopped[0].tokens) < 60
        banned = free[0].tokens[7]
        (ended,) = await answers_to(stub, prompt_of(50), max_tokens=60, stop_token_ids=[banned], **SAMPLED)
        assert ended.tokens == free[0].tokens[: free[0].tokens.index(banned) + 1]
        assert ended.finish == "stop"
