"""The supervisor keeps its own redis alive, on the same port (invariant 10)."""

import asyncio
import os
import signal
from pathlib import Path

from pdserve.cluster.cluster import Cluster
from pdserve.cluster.redis_server import start_redis
from pdserve.core.config import ServeConfig
from pdserve.core.tasks import end_task


async def test_a_killed_redis_is_started_again_where_it_was(tiny_model: Path) -> None:
    server = await asyncio.to_thread(start_redis)
    cluster = Cluster(ServeConfig(model=str(tiny_model)))
    watch = asyncio.create_task(cluster._keep_redis(server))
    try:
        url = server.url
        for _ in range(2):
            old = server.pid
            assert old is not None
            os.kill(old, signal.SIGKILL)
            async with asyncio.timeout(20):
                while server.pid == old or not server.alive():
                    await asyncio.sleep(0.02)
            assert server.url == url
    finally:
        await end_task(watch)
        await asyncio.to_thread(server.stop)
    assert not server.alive()
