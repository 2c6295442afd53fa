"""A step that takes longer than peers bear silence shows progress: the worker is slow, and not lost."""

import asyncio
import threading
from pathlib import Path
from typing import Any

from stack import stack, tiny_config

from pdserve.cluster.redis_server import RedisServer
from pdserve.core.types import Role
from pdserve.workers.attention.torch_paged import TorchPagedAttention


class HeldAttention(TorchPagedAttention):
    """Each layer waits for a permit."""

    def __init__(self) -> None:
        super().__init__()
        self.entered = threading.Semaphore(0)
        self.permits = threading.Semaphore(0)

    def write(self, *args: Any) -> None:
        self.entered.release()
        self.permits.acquire()
        super().write(*args)


async def test_a_step_shows_progress_with_every_layer(tiny_model: Path, redis: RedisServer) -> None:
    async with stack(tiny_config(tiny_model, redis), {"mixed-0": Role.MIXED}) as running:
        client, worker = running.client, running.workers["mixed-0"]
        assert client is not None
        attention = worker._decoder._attention = HeldAttention()
        answer = asyncio.create_task(client.generate("One long step.", max_tokens=1))
        seen = []
        for _ in worker._decoder.config.layers:
            await asyncio.to_thread(attention.entered.acquire)
            seen.append((worker.engine.stats().progress, worker.load().progress))
            attention.permits.release()
        attention.permits.release(1000)
        assert (await answer).token_ids
        steps, moved = zip(*seen, strict=True)
        assert len(set(steps)) == 1, "it was one step"
        assert len(set(moved)) == len(seen) > 1
