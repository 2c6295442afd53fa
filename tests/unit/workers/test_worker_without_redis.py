"""Redis vanishes under a running cluster (invariant 10): nobody fails, nobody is fenced, all comes back."""

import asyncio
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from stack import Stack, stack, tiny_config

from pdserve.cluster.redis_server import RedisServer, start_redis
from pdserve.core.types import Role
from pdserve.kvtransfer.index.base import Holder
from pdserve.kvtransfer.index.link import RedisLink
from pdserve.kvtransfer.index.redis_index import RedisIndex

PROMPT = "The server is gone, the words go on. " * 3
WORKERS = {"prefill-0": Role.PREFILL, "decode-0": Role.DECODE}


@pytest.fixture
def own_redis() -> Iterator[RedisServer]:
    """One that may be killed."""
    server = start_redis()
    yield server
    server.stop()


async def until_noticed(running: Stack) -> None:
    assert running.client is not None
    async with asyncio.timeout(20):
        while (await running.client.status()).index_available:
            await asyncio.sleep(0.02)


async def until_announced(running: Stack, server: RedisServer) -> None:
    """Every worker's whole cache is in the index again, under the incarnation that it has now."""
    link = RedisLink(server.url, running.config.index.cluster)
    try:
        index = RedisIndex(link)
        async with asyncio.timeout(20):
            while True:
                held = await index.dump()
                if all(
                    (holding := held.get(Holder(worker.spec.worker_id, worker.incarnation))) is not None
                    and holding.names == set(worker.pool.names())
                    for worker in running.workers.values()
                ):
                    return
                await asyncio.sleep(0.02)
    finally:
        await link.close()


async def test_a_cluster_serves_on_without_redis_and_announces_itself_to_a_new_one(
    tiny_model: Path, own_redis: RedisServer
) -> None:
    async with stack(tiny_config(tiny_model, own_redis), WORKERS) as running:
        client = running.client
        assert client is not None
        expected = await client.generate(PROMPT, max_tokens=120, ignore_eos=True)
        incarnations = {name: worker.incarnation for name, worker in running.workers.items()}

        stream = await client.generate(PROMPT, max_tokens=120, ignore_eos=True, stream=True)
        assert await stream.read() is not None
        assert own_redis.pid is not None
        os.kill(own_redis.pid, signal.SIGKILL)
        await until_noticed(running)
        while await stream.read() is not None:
            pass
        assert stream.result().token_ids == expected.token_ids

        # A request that begins in the outage: members are known, the ring places it, blocks still move.
        cold = await client.generate("Another " + PROMPT, max_tokens=4, ignore_eos=True)
        assert cold.route.prefill_worker == "prefill-0"
        assert (cold.route.blocks_moved or 0) > 0

        await asyncio.to_thread(own_redis.restart)
        await running.until_ready(list(WORKERS))
        await until_announced(running, own_redis)
        assert {name: worker.incarnation for name, worker in running.workers.items()} == incarnations
        again = await client.generate(PROMPT, max_tokens=120, ignore_eos=True)
        assert again.token_ids == expected.token_ids
