"""A whole cluster inside one event loop: real gRPC, redis and engine threads, parts that a test may wrap."""

import asyncio
import contextlib
import dataclasses
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pdserve.client import AsyncClient
from pdserve.cluster.redis_server import RedisServer
from pdserve.core.config import (
    EngineConfig,
    HandoffConfig,
    IndexConfig,
    RouterConfig,
    SecurityConfig,
    ServeConfig,
    SessionConfig,
)
from pdserve.core.text.tokenizer import Tokenizer
from pdserve.core.types import Disaggregation, Role
from pdserve.kvtransfer.index.link import RedisLink
from pdserve.kvtransfer.index.membership_view import MembershipView
from pdserve.kvtransfer.index.redis_index import RedisIndex
from pdserve.kvtransfer.index.redis_membership import RedisMembership
from pdserve.router.policies.base import Policy
from pdserve.router.policies.hybrid import HybridPolicy
from pdserve.router.server import RouterServer
from pdserve.workers.model_host import ModelHost
from pdserve.workers.seams import Seams
from pdserve.workers.spec import WorkerSpec
from pdserve.workers.worker import Worker

SETTLE_S = 20.0


@dataclasses.dataclass
class RouterSeams:
    """What a test puts around the router's parts."""

    tokenizer: Any = lambda tokenizer: tokenizer
    index: Any = lambda index: index
    policy: Any = lambda policy: policy


class Stack:
    """Workers by name, one router, one client. Made by `stack`."""

    def __init__(self, config: ServeConfig, credentials: Mapping[str, Any] | None = None) -> None:
        self.config = config
        self.credentials = dict(credentials or {})
        """What clients need: `tls` and `token`."""
        self.workers: dict[str, Worker] = {}
        self.router: RouterServer | None = None
        self.view: MembershipView | None = None
        self.client: AsyncClient | None = None
        self._closing = contextlib.AsyncExitStack()

    async def add_worker(
        self,
        name: str,
        role: Role,
        seams: Seams | None = None,
        engine: EngineConfig | None = None,
        security: SecurityConfig | None = None,
        *,
        seen: bool = True,
    ) -> Worker:
        """Start a worker and wait until the router sees it, unless `seen` is False.

        `engine`, `security`: instead of what all workers have.
        """
        config = self.config
        spec = WorkerSpec(
            worker=name,
            role=str(role),
            model=config.model,
            dtype=config.dtype,
            engine=engine or config.engine,
            handoff=config.handoff,
            session=config.session,
            index=config.index,
            security=security or config.security,
        )
        model = await asyncio.to_thread(ModelHost.load, spec)
        worker = Worker(spec, model, seams=seams)
        await worker.start()
        self.workers[name] = worker
        if self.client is not None and seen:
            await self.until_ready([name])
        return worker

    async def remove_worker(self, name: str) -> None:
        await self.workers.pop(name).stop()

    async def start_router(self, seams: RouterSeams) -> None:
        config = self.config
        tokenizer = seams.tokenizer(Tokenizer.load(Path(config.model)))
        link = RedisLink(str(config.index.redis_url), config.index.cluster)
        self._closing.push_async_callback(link.close)
        index = seams.index(RedisIndex(link, config.index.timeout_s))
        self.view = MembershipView(RedisMembership(link, config.index.ttl_s), 0.05, config.index.ttl_s)
        await self.view.refresh()
        self.view.start()
        self._closing.push_async_callback(self.view.stop)
        policy: Policy = seams.policy(HybridPolicy(Disaggregation(config.router.disaggregation)))
        self.router = RouterServer(config, index, self.view, {config.model: tokenizer}, policy=policy)
        await self.router.start()
        self._closing.push_async_callback(self.router.stop, 0.2)
        self.client = AsyncClient(f"127.0.0.1:{self.router.port}", timeout=60, **self.credentials)
        self._closing.push_async_callback(self.client.close)

    async def until_ready(self, names: Sequence[str]) -> None:
        """Wait until the router would place on these workers under their present incarnations."""
        assert self.client is not None
        wanted = {(name, self.workers[name].incarnation) for name in names}
        async with asyncio.timeout(SETTLE_S):
            while True:
                status = await self.client.status()
                seen = {(w.worker, w.incarnation) for w in status.workers if w.state == "ready"}
                if wanted <= seen:
                    return
                await asyncio.sleep(0.02)

    async def settled(self) -> None:
        """Wait until nobody holds anything. Raises AssertionError saying who still does."""
        for worker in self.workers.values():
            try:
                async with asyncio.timeout(SETTLE_S):
                    while left := busy(worker):
                        await asyncio.sleep(0.02)
            except TimeoutError:
                raise AssertionError(f"{worker.spec.worker} is not at rest: {left}") from None
            report = await worker.inspect()
            assert not report.integrity_error, report.integrity_error

    async def close(self) -> None:
        await self._closing.aclose()
        for name in list(self.workers):
            await self.remove_worker(name)


def busy(worker: Worker) -> dict[str, int]:
    """What is not zero although it should be when nothing runs."""
    counts = worker.pool.counts()
    found = {
        name: getattr(counts, name) for name in ("held", "reserved", "loading", "quarantined", "promised")
    }
    found["in_flight"] = worker.decode.in_flight()
    found["fetching"] = worker.handoffs.in_flight()
    found["serving"] = worker.prefill.in_flight()
    return {name: count for name, count in found.items() if count}


def tiny_config(model: Path, redis: RedisServer, **changes: Any) -> ServeConfig:
    """Small pools and chunks, so that everything happens often; and a handoff for every prompt that is worth
    one, whatever it costs."""
    base = ServeConfig(
        model=str(model),
        dtype="float32",
        engine=EngineConfig(pool_blocks=128, chunk_tokens=32, token_budget=64, headroom_tokens=64),
        handoff=HandoffConfig(),
        session=SessionConfig(),
        index=IndexConfig(
            redis_url=redis.url, cluster=f"t{uuid.uuid4().hex}", timeout_s=1.0, heartbeat_s=0.1, ttl_s=3.0
        ),
        router=RouterConfig(grpc_port=0, disaggregation="always"),
    )
    return dataclasses.replace(base, **changes)


@contextlib.asynccontextmanager
async def stack(
    config: ServeConfig,
    workers: Mapping[str, Role],
    *,
    seams: Mapping[str, Seams] | None = None,
    router: RouterSeams | None = None,
    engines: Mapping[str, EngineConfig] | None = None,
    credentials: Mapping[str, Any] | None = None,
) -> AsyncIterator[Stack]:
    """A running stack; everything is stopped, and was at rest, at the end of the block."""
    running = Stack(config, credentials)
    try:
        for name, role in workers.items():
            await running.add_worker(name, role, (seams or {}).get(name), (engines or {}).get(name))
        await running.start_router(router or RouterSeams())
        await running.until_ready(list(workers))
        yield running
        await running.settled()
    finally:
        await running.close()
