"""Members come, go and change under load, and sessions break: no stream notices."""

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stack import Stack, stack, tiny_config

from pdserve.client import AsyncClient
from pdserve.cluster.redis_server import RedisServer
from pdserve.core.types import Role
from pdserve.workers.seams import Seams

STREAMS = 8
TOKENS = 48


def prompt(number: int) -> str:
    return f"Story {number}: " + "once upon a time there was a block. " * (number % 4 + 1)


async def completion(client: AsyncClient, number: int) -> tuple[int, ...]:
    result = await client.generate(prompt(number), max_tokens=TOKENS, ignore_eos=True)
    assert len(result.token_ids) == TOKENS
    return result.token_ids


class Load:
    """STREAMS streams at any time, each followed by another, every one compared with its undisturbed run."""

    def __init__(self, client: AsyncClient, expected: dict[int, tuple[int, ...]]) -> None:
        self._client = client
        self._expected = expected
        self._stopping = False
        self.finished = 0

    async def run(self) -> None:
        await asyncio.gather(*(self._stream(number) for number in range(STREAMS)))

    def stop(self) -> None:
        self._stopping = True

    async def progressed(self, streams: int) -> None:
        """Wait until that many more streams have ended."""
        target = self.finished + streams
        async with asyncio.timeout(60):
            while self.finished < target:
                await asyncio.sleep(0.01)

    async def _stream(self, number: int) -> None:
        while not self._stopping:
            assert await completion(self._client, number) == self._expected[number]
            self.finished += 1


async def role_weight(client: AsyncClient, name: str) -> float:
    """As the router knows it."""
    return next(w.role_weight for w in (await client.status()).workers if w.worker == name)


def decoders(running: Stack) -> Callable[[str], int]:
    return lambda name: running.workers[name].decode.counters.get("opened", 0)


async def test_drain_remove_add_and_role_change_fail_no_stream(tiny_model: Path, redis: RedisServer) -> None:
    workers = {
        "prefill-0": Role.PREFILL,
        "decode-0": Role.DECODE,
        "decode-1": Role.DECODE,
        "mixed-0": Role.MIXED,
    }
    async with stack(tiny_config(tiny_model, redis), workers) as running:
        client = running.client
        assert client is not None
        expected = {number: await completion(client, number) for number in range(STREAMS)}
        load = Load(client, expected)
        streams = asyncio.create_task(load.run())
        await load.progressed(STREAMS)

        assert await running.workers["decode-0"].drain(30.0) == 0
        await running.remove_worker("decode-0")
        await load.progressed(STREAMS)

        await running.add_worker("decode-2", Role.DECODE)
        opened = decoders(running)
        await load.progressed(2 * STREAMS)
        assert opened("decode-2") > 0, "the new worker got nothing"

        await running.workers["mixed-0"].set_role_weight(1.0)
        async with asyncio.timeout(20):
            while await role_weight(client, "mixed-0") != 1.0:
                await asyncio.sleep(0.01)
        await load.progressed(STREAMS)
        before = opened("mixed-0")
        await load.progressed(2 * STREAMS)
        assert opened("mixed-0") == before, "a prefill-only worker was given a request to decode"

        load.stop()
        await streams
        status = await client.status()
        assert {worker.worker for worker in status.workers} == {
            "prefill-0",
            "decode-1",
            "decode-2",
            "mixed-0",
        }


class Paced:
    """A runner that is never more than AHEAD steps in front of what the client has read."""

    AHEAD = 30

    def __init__(self) -> None:
        self.permits = threading.Semaphore(self.AHEAD)
        self.held = False
        self._inner: Any = None

    def around(self, inner: Any) -> "Paced":
        self._inner = inner
        return self

    def run(self, batch: Any) -> Any:
        if self.held:
            assert self.permits.acquire(timeout=60), "the client reads nothing"
        return self._inner.run(batch)


async def test_a_broken_session_is_attached_again_and_no_token_is_lost_or_doubled(
    tiny_model: Path, redis: RedisServer
) -> None:
    workers = {"prefill-0": Role.PREFILL, "decode-0": Role.DECODE}
    paced = Paced()
    seams = {"decode-0": Seams(runner=paced.around)}
    async with stack(tiny_config(tiny_model, redis), workers, seams=seams) as running:
        client = running.client
        assert client is not None
        expected = await client.generate(prompt(3), max_tokens=200, ignore_eos=True)
        paced.held = True
        stream = await client.generate(prompt(3), max_tokens=200, ignore_eos=True, stream=True)
        decode = running.workers["decode-0"]
        tokens: list[int] = []
        text = ""
        breaks = 0
        async for chunk in stream:
            assert chunk.first_index == len(tokens)
            tokens += chunk.token_ids
            paced.permits.release(len(chunk.token_ids))
            text += chunk.text
            if len(tokens) // 40 > breaks:
                breaks += 1
                decode.break_sessions()
        assert breaks >= 3
        assert tuple(tokens) == expected.token_ids
        assert text == expected.text
        assert decode.decode.counters["attached"] >= 3


async def test_a_request_whose_router_never_returns_ends_after_the_grace(
    tiny_model: Path, redis: RedisServer
) -> None:
    config = tiny_config(tiny_model, redis)
    workers = {"prefill-0": Role.PREFILL, "decode-0": Role.DECODE}
    async with stack(config, workers) as running:
        client = running.client
        assert client is not None
        assert running.router is not None
        stream = await client.generate(prompt(1), max_tokens=1500, ignore_eos=True, stream=True)
        await stream.read()
        await running.router.pool.stop()
        decode = running.workers["decode-0"].decode
        async with asyncio.timeout(config.session.reattach_s + 10):
            while decode.in_flight():
                await asyncio.sleep(0.05)
        assert decode.counters["aborted"] == 1
        await running.settled()
