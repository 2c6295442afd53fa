"""Bad input never gets past the door: one table, over gRPC and HTTP, while good streams run undisturbed."""

import asyncio
import dataclasses
import re
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
import pytest_asyncio
from bad_input import DECODE_BLOCKS, MAX_BODY_BYTES, MAX_PROMPT_BYTES, PREFILL_BLOCKS, TABLE, Bad
from stack import Stack, stack, tiny_config

from pdserve.cluster.redis_server import RedisServer
from pdserve.core.config import EngineConfig
from pdserve.core.errors import RETRIABLE_KEY
from pdserve.core.types import Role

pytestmark = pytest.mark.asyncio(loop_scope="module")

GOOD = 8
TOKENS = 40
GENERATE = "/pdserve.v1.Inference/Generate"


@dataclasses.dataclass
class Door:
    """A running cluster, good streams that never rest, and how often each came to its end."""

    running: Stack
    channel: grpc.aio.Channel
    http: httpx.AsyncClient
    streams: list["asyncio.Task[None]"]
    rounds: list[int]

    def assert_undisturbed(self) -> None:
        for task in self.streams:
            if task.done():
                task.result()  # raises what disturbed it
                raise AssertionError("a good stream ended")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def door(tiny_model: Path, redis: RedisServer) -> AsyncIterator[Door]:
    config = tiny_config(tiny_model, redis)
    router = dataclasses.replace(
        config.router, http_port=0, max_prompt_bytes=MAX_PROMPT_BYTES, max_body_bytes=MAX_BODY_BYTES
    )
    engine = dataclasses.replace(config.engine, pool_blocks=DECODE_BLOCKS)
    config = dataclasses.replace(config, engine=engine, router=router)
    engines: dict[str, EngineConfig] = {"prefill-0": dataclasses.replace(engine, pool_blocks=PREFILL_BLOCKS)}
    workers = {"prefill-0": Role.PREFILL, "decode-0": Role.DECODE}
    async with stack(config, workers, engines=engines) as running:
        assert running.router is not None
        rounds = [0] * GOOD
        streams = [asyncio.create_task(go_on(running, number, rounds)) for number in range(GOOD)]
        async with (
            grpc.aio.insecure_channel(f"127.0.0.1:{running.router.port}") as channel,
            httpx.AsyncClient(base_url=f"http://127.0.0.1:{running.router.http_port}") as http,
        ):
            yield Door(running, channel, http, streams, rounds)
            await ended(streams)


async def ended(streams: list["asyncio.Task[None]"]) -> None:
    for task in streams:
        task.cancel()
    await asyncio.gather(*streams, return_exceptions=True)


async def go_on(running: Stack, number: int, rounds: list[int]) -> None:
    """Stream the same completion again and again; it is the same every time."""
    client = running.client
    assert client is not None
    expected: tuple[int, ...] | None = None
    while True:
        stream = await client.generate(
            f"{number} is a good prompt, longer than two blocks",
            max_tokens=TOKENS,
            temperature=0.8,
            seed=number,
            ignore_eos=True,
            stream=True,
        )
        tokens = tuple([token async for piece in stream for token in piece.token_ids])
        assert len(tokens) == TOKENS
        assert expected in (None, tokens)
        expected = tokens
        rounds[number] += 1


def rows(said: Callable[[Bad], bytes | None]) -> Any:
    """Those of the table that can be said over one API."""
    return pytest.mark.parametrize(
        "bad", [pytest.param(bad, id=bad.name) for bad in TABLE if said(bad) is not None]
    )


@rows(lambda bad: bad.grpc)
async def test_bad_input_over_grpc(door: Door, bad: Bad) -> None:
    call = door.channel.unary_stream(GENERATE)(bad.grpc, timeout=20)
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await anext(aiter(call))
    assert refused.value.code() is bad.code, refused.value.details()
    details = refused.value.details() or ""
    assert re.search(bad.says, details), details
    assert "Traceback" not in details
    trailing = dict(refused.value.trailing_metadata() or ())
    assert trailing.get(RETRIABLE_KEY, "false") == "false"
    door.assert_undisturbed()


@rows(lambda bad: bad.http)
async def test_bad_input_over_http(door: Door, bad: Bad) -> None:
    headers = {"content-type": "application/json"}
    answer = await door.http.post("/v1/completions", content=bad.http, headers=headers, timeout=20)
    assert answer.status_code == bad.status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert re.search(bad.http_says or bad.says, error["message"]), error["message"]
    assert "Traceback" not in answer.text
    door.assert_undisturbed()


async def test_good_streams_went_on_and_every_block_is_accounted_for(door: Door) -> None:
    before = list(door.rounds)
    async with asyncio.timeout(20):
        while not all(now > then for now, then in zip(door.rounds, before, strict=True)):
            door.assert_undisturbed()
            await asyncio.sleep(0.02)
    await ended(door.streams)
    await door.running.settled()
    assert door.running.router is not None
    assert door.running.router.gate.admission.in_flight == 0
    # Each was refused at the router's door: no worker has ever heard of one.
    opened = sum(
        worker.decode.counters["opened"] for worker in door.running.workers.values() if worker.decode.counters
    )
    served = sum(door.rounds)
    assert served <= opened <= served + GOOD
