"""A fenced worker is another one: what the old incarnation said is void, what its pool holds is not."""

import asyncio
from pathlib import Path

import pytest
from stack import stack, tiny_config

from pdserve.client import AsyncChunkStream
from pdserve.cluster.redis_server import RedisServer
from pdserve.core.errors import WorkerLost
from pdserve.core.types import Role
from pdserve.kvtransfer.index.base import Holder
from pdserve.kvtransfer.index.link import RedisLink
from pdserve.kvtransfer.index.redis_index import RedisIndex

PROMPT = "What was said before the fence is void, what is held is not. " * 2


async def read_on(stream: AsyncChunkStream) -> None:
    while await stream.read() is not None:
        pass


async def test_a_fenced_worker_fails_its_streams_and_announces_its_cache_anew(
    tiny_model: Path, redis: RedisServer
) -> None:
    config = tiny_config(tiny_model, redis)
    async with stack(config, {"mixed-0": Role.MIXED}) as running:
        client, worker = running.client, running.workers["mixed-0"]
        assert client is not None
        expected = await client.generate(PROMPT, max_tokens=8, ignore_eos=True)
        stream = await client.generate(PROMPT, max_tokens=1500, ignore_eos=True, stream=True)
        assert await stream.read() is not None
        old = worker.incarnation

        await worker.fence("a test")

        assert worker.incarnation != old
        with pytest.raises(WorkerLost) as lost:
            await read_on(stream)
        assert lost.value.retriable
        await running.settled()
        link = RedisLink(redis.url, config.index.cluster)
        try:
            index = RedisIndex(link)
            holder = Holder(worker.spec.worker_id, worker.incarnation)
            async with asyncio.timeout(10):
                while (held := await index.dump()).get(holder) is None or held[holder].names != set(
                    worker.pool.names()
                ):
                    await asyncio.sleep(0.01)
            assert list(held) == [holder]  # nothing of the old incarnation is left
            assert held[holder].names
        finally:
            await link.close()
        await running.until_ready(["mixed-0"])
        again = await client.generate(PROMPT, max_tokens=8, ignore_eos=True)
        assert again.token_ids == expected.token_ids
        assert again.route.decode_incarnation == worker.incarnation
        assert again.usage.cached_tokens > 0  # the memory outlived the name
