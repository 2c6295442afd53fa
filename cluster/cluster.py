"""A whole cluster: redis, Ray, workers, router, admin, started in that order and ended in the other."""

import asyncio
import contextlib
import dataclasses
import logging
import os
from typing import Any

import grpc
import ray

from pdserve.cluster.actors import start_router_actor
from pdserve.cluster.admin import AdminServicer
from pdserve.cluster.members import Member
from pdserve.cluster.ray_runtime import RayRuntime
from pdserve.cluster.redis_server import RedisServer, start_redis
from pdserve.cluster.supervisor import STOP_TIMEOUT_S, Supervisor
from pdserve.core.catalog import resolve_model
from pdserve.core.channel_options import CHANNEL_OPTIONS, SERVER_OPTIONS
from pdserve.core.config import IndexConfig, ServeConfig
from pdserve.core.errors import PdserveError, Unavailable, from_foreign
from pdserve.core.tasks import end_task
from pdserve.core.types import Role
from pdserve.proto import admin_pb2_grpc, inference_pb2, inference_pb2_grpc
from pdserve.router.process import RouterSpec
from pdserve.workers.spec import WorkerSpec

log = logging.getLogger(__name__)

READY_TIMEOUT_S = 60.0
REDIS_WATCH_S = 0.2


class Cluster:
    """Everything that `pdserve serve` runs. Use as `async with Cluster(config) as cluster`."""

    def __init__(self, config: ServeConfig) -> None:
        self.config = config
        resolve_model(config.model)  # a wrong name is found before anything starts
        self.supervisor = Supervisor(self._worker_spec)
        self.router_endpoint = ""
        self.router_pid = 0
        self.admin_endpoint = ""
        self._ray = RayRuntime(config.ray_address)
        self._redis: RedisServer | None = None
        self._router: Any = None
        self._redis_watch: asyncio.Task[None] | None = None
        self._admin: grpc.aio.Server | None = None

    async def __aenter__(self) -> "Cluster":
        try:
            await self.start()
        except BaseException:
            await self.stop()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def start(self) -> None:
        """Returns when every worker is ready and the router sees it."""
        self._redis = await asyncio.to_thread(start_redis, self.config.index.redis_url)
        if self._redis.owned:
            self._redis_watch = asyncio.create_task(self._keep_redis(self._redis), name="watch-redis")
        await asyncio.to_thread(self._ray.start)
        await self._start_admin()
        config = self.config
        roles = [Role.PREFILL] * config.prefill + [Role.DECODE] * config.decode + [Role.MIXED] * config.mixed
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._start_router())
                for role in roles:
                    group.create_task(self.supervisor.add(role, config.model))
        except ExceptionGroup as group_error:
            raise from_foreign(group_error.exceptions[0]) from group_error
        await self._until_ready(len(roles))

    async def stop(self) -> None:
        """Ends whatever was started; safe after a start that failed half way."""
        if self._admin is not None:
            await self._admin.stop(None)
            self._admin = None
        if self._router is not None:
            with contextlib.suppress(TimeoutError, ray.exceptions.RayError):
                await asyncio.wait_for(_result(self._router.stop.remote()), STOP_TIMEOUT_S)
            with contextlib.suppress(ray.exceptions.RayError):
                ray.kill(self._router)
            self._router = None
        await self.supervisor.stop()
        await asyncio.to_thread(self._ray.stop)
        await end_task(self._redis_watch)
        if self._redis is not None:
            await asyncio.to_thread(self._redis.stop)
            self._redis = None

    def ready_record(self) -> dict[str, Any]:
        """What the ready file says: where to connect, what is served, which processes there are."""
        pids: dict[str, list[int]] = {"router": [self.router_pid]}
        for member in self.supervisor.members.all():
            if member.record is not None:
                pids.setdefault(str(member.role), []).append(member.record.pid)
        if self._redis is not None and self._redis.pid is not None:
            pids["redis"] = [self._redis.pid]
        pids["supervisor"] = [os.getpid()]
        return {
            "grpc": self.router_endpoint,
            "admin": self.admin_endpoint,
            "model": self.config.model,
            "pids": pids,
        }

    async def _keep_redis(self, redis: RedisServer) -> None:
        """Start an own redis again on its port when it dies; the workers announce themselves to it anew."""
        while True:
            await asyncio.sleep(REDIS_WATCH_S)
            if redis.alive():
                continue
            log.warning("redis died: starting it again at %s", redis.url)
            try:
                await asyncio.to_thread(redis.restart)
            except PdserveError as error:
                log.warning("redis did not start: %s", error)

    def _index_config(self) -> IndexConfig:
        url = self._redis.url if self._redis is not None else self.config.index.redis_url
        return dataclasses.replace(self.config.index, redis_url=url)

    def _worker_spec(self, member: Member) -> WorkerSpec:
        config = self.config
        return WorkerSpec(
            worker=member.worker,
            role=str(member.role),
            model=member.model,
            dtype=config.dtype,
            host=config.router.host,
            engine=config.engine,
            handoff=config.handoff,
            session=config.session,
            index=self._index_config(),
        )

    async def _start_router(self) -> None:
        config = dataclasses.replace(self.config, index=self._index_config())
        spec = RouterSpec(config=config, admin=self.admin_endpoint)
        self._router = start_router_actor(spec)
        started = await _result(self._router.start.remote())
        self.router_endpoint = started["grpc"]
        self.router_pid = started["pid"]

    async def _start_admin(self) -> None:
        server = grpc.aio.server(options=SERVER_OPTIONS)
        servicer = AdminServicer(self.supervisor, self.config.model, self.config.drain_grace_s)
        admin_pb2_grpc.add_AdminServicer_to_server(servicer, server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        self._admin = server
        self.admin_endpoint = f"127.0.0.1:{port}"

    async def _until_ready(self, workers: int) -> None:
        """Wait until the router's own view has every worker."""
        async with grpc.aio.insecure_channel(self.router_endpoint, options=CHANNEL_OPTIONS) as channel:
            stub = inference_pb2_grpc.InferenceStub(channel)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(READY_TIMEOUT_S):
                    while True:
                        status = await stub.GetStatus(
                            inference_pb2.GetStatusRequest(), timeout=READY_TIMEOUT_S
                        )
                        if sum(1 for worker in status.workers if worker.state == "ready") >= workers:
                            return
                        await asyncio.sleep(0.05)
        seen = ", ".join(f"{worker.worker} ({worker.state})" for worker in status.workers) or "none"
        raise Unavailable(f"the router sees {seen} after {READY_TIMEOUT_S:.0f} s; {workers} were started")


async def _result(reference: Any) -> Any:
    return await reference
