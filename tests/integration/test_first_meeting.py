"""Decode workers have met the prefill workers when a request comes, and forget them when they leave."""

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest
from stack import stack, tiny_config

from pdserve.cluster.redis_server import RedisServer
from pdserve.core.types import Role
from pdserve.kvtransfer.transports import importers

PROMPT = [(37 * i + i * i) % 250 for i in range(70)]


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not holds():
            await asyncio.sleep(0.01)


async def test_the_first_request_pays_for_no_connection_and_who_leaves_is_let_go_of(
    tiny_model: Path, redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    workers = {"prefill-0": Role.PREFILL, "decode-0": Role.DECODE}
    async with stack(tiny_config(tiny_model, redis), workers) as running:
        rungs = running.workers["decode-0"].use
        assert rungs().transports["inproc"].pairs == 1, "prefill-0 was met before decode-0 was ready"
        await running.add_worker("prefill-1", Role.PREFILL)
        await until(lambda: rungs().transports["inproc"].pairs == 2)

        def unexpected(*_: object, **__: object) -> None:
            raise AssertionError("a handoff made an importer")

        monkeypatch.setattr(importers, "make_importer", unexpected)
        assert running.client is not None
        result = await running.client.generate(token_ids=PROMPT, max_tokens=4, temperature=0.0)
        assert result.route.prefill_worker.startswith("prefill-")
        assert result.route.transport == "inproc"

        for name in ("prefill-0", "prefill-1"):
            await running.remove_worker(name)
        await until(lambda: rungs().transports["inproc"].pairs == 0)
