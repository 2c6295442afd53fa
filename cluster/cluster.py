"""A whole cluster: redis, Ray, workers, router, admin, started in that order and ended in the other."""

import asyncio
import contextlib
import dataclasses
import logging
import os
import secrets
import socket
from collections.abc import Callable, Sequence
from typing import Any

import grpc

from pdserve.cluster.actors import ANY_ADDRESS, ActorHandle, launch_router, launch_worker
from pdserve.cluster.admin import AdminServicer
from pdserve.cluster.kept import Kept
from pdserve.cluster.members import Member
from pdserve.cluster.ray_runtime import RayRuntime
from pdserve.cluster.redis_server import RedisServer, start_redis
from pdserve.cluster.signals import take_signals_back
from pdserve.cluster.supervisor import Supervisor
from pdserve.core.channel_options import CHANNEL_OPTIONS, FRONT_SERVER_OPTIONS
from pdserve.core.config import IndexConfig, RouterConfig, ServeConfig, require
from pdserve.core.errors import ConfigError, PdserveError, Unavailable, from_foreign
from pdserve.core.security.cluster_tls import FrontTls, WorkerTls
from pdserve.core.security.exposure import exposures
from pdserve.core.security.tokens import TokenTable
from pdserve.core.tasks import end_task
from pdserve.core.types import Role
from pdserve.proto import admin_pb2_grpc, inference_pb2, inference_pb2_grpc
from pdserve.proto.connections import connect, listen
from pdserve.router.process import RouterSpec
from pdserve.router.token_gate import TokenGate
from pdserve.workers.models.fit import require_fit
from pdserve.workers.spec import WorkerSpec

log = logging.getLogger(__name__)

READY_TIMEOUT_S = 60.0
READY_POLL_S = 0.05
REDIS_WATCH_S = 0.2
LOOPBACK = "127.0.0.1"


class Cluster:
    """Everything that `pdserve serve` runs. Use once, as `async with Cluster(config) as cluster`."""

    def __init__(self, config: ServeConfig) -> None:
        """Raises ConfigError, before anything starts, for a model or security file that will not do."""
        require_fit(config)
        self.config = config
        self._front_tls = FrontTls.load(config.security)
        worker_tls = WorkerTls.load(config.security)
        self._own_token = secrets.token_hex(32)
        self._tokens: TokenTable | None = None
        if config.security.tokens_file is not None:
            table = TokenTable.load(config.security.tokens_file)
            self._tokens = table.with_token("supervisor", self._own_token)
        for warning in exposures(config):
            log.warning("%s", warning)
        self.supervisor = Supervisor(self._launch_worker, None if worker_tls is None else worker_tls.client)
        self.router_endpoint = ""
        self.http_endpoint: str | None = None
        """Of the router's HTTP API; None: it is not served."""
        self.router_pid = 0
        self.admin_endpoint = ""
        self._ray = RayRuntime(config.ray_address)
        self._redis: RedisServer | None = None
        self._router = Kept("router", self._launch_router, self._router_started, lambda: None)
        self._owned = contextlib.AsyncExitStack()

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
        """Returns when every worker is ready and the router sees it; if it raises, `stop` has to follow."""
        _require_free_ports(self.config.router)
        own = self._owned
        own.push_async_callback(self._stop_redis)
        await _in_thread(self._start_redis)
        redis = self._redis
        if redis is not None and redis.owned:
            own.push_async_callback(end_task, asyncio.create_task(self._keep_redis(redis), name="keep-redis"))
        own.push_async_callback(asyncio.to_thread, self._ray.stop)
        try:
            await _in_thread(self._ray.start)
        finally:
            take_signals_back()
        own.push_async_callback(self.supervisor.stop)
        own.push_async_callback(self._router.stop)
        await self._start_admin()
        config = self.config
        roles = [Role.PREFILL] * config.prefill + [Role.DECODE] * config.decode + [Role.MIXED] * config.mixed
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._router.start())
                for role in roles:
                    group.create_task(self.supervisor.add(role, config.model))
        except ExceptionGroup as group_error:
            raise from_foreign(group_error.exceptions[0]) from group_error
        await self._until_seen(self.supervisor.members.all())

    async def stop(self) -> None:
        """End whatever was started, the last first; safe after a start that failed half way."""
        await self._owned.aclose()

    def remove_files(self) -> None:
        """For a process that ends without `stop`: the kernel ends the others, but removes no file."""
        self._ray.remove_files()

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
            "http": self.http_endpoint,
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

    def _launch_worker(self, member: Member) -> ActorHandle:
        config = self.config
        spec = WorkerSpec(
            worker=member.worker,
            role=str(member.role),
            model=member.model,
            dtype=config.dtype,
            # With a Ray of our own, everybody who calls a worker is on this machine.
            host=LOOPBACK if config.ray_address is None else config.router.host,
            engine=config.engine,
            handoff=config.handoff,
            session=config.session,
            index=self._index_config(),
            security=config.security,
        )
        # An own redis, and any host but the unspecified one, can be reached on this machine only.
        own_redis = self._redis is not None and self._redis.owned
        return launch_worker(spec, pinned=own_redis or config.router.host not in ANY_ADDRESS)

    def _launch_router(self) -> ActorHandle:
        router = self.config.router
        if self.router_endpoint:
            # One that is started again listens where its clients know it.
            port = int(self.router_endpoint.rpartition(":")[2])
            router = dataclasses.replace(router, grpc_port=port)
        if self.http_endpoint is not None:
            router = dataclasses.replace(router, http_port=int(self.http_endpoint.rpartition(":")[2]))
        config = dataclasses.replace(self.config, index=self._index_config(), router=router)
        return launch_router(RouterSpec(config=config, admin=self.admin_endpoint, own_token=self._own_token))

    async def _router_started(self, said: dict[str, Any]) -> None:
        self.router_endpoint = said["grpc"]
        self.http_endpoint = said["http"]
        self.router_pid = said["pid"]

    async def _start_admin(self) -> None:
        gates = () if self._tokens is None else (TokenGate(self._tokens),)
        server = grpc.aio.server(interceptors=gates, options=FRONT_SERVER_OPTIONS)
        servicer = AdminServicer(
            self.supervisor, self.config.model, self.config.drain_grace_s, self._until_seen
        )
        admin_pb2_grpc.add_AdminServicer_to_server(servicer, server)
        port = listen(server, f"{LOOPBACK}:0", None if self._front_tls is None else self._front_tls.server)
        await server.start()
        self._owned.push_async_callback(server.stop, None)
        self.admin_endpoint = f"{LOOPBACK}:{port}"

    async def _until_seen(self, members: Sequence[Member]) -> None:
        """Wait until the router would place on the present incarnations of `members`."""
        seen = "the router does not answer"
        with contextlib.suppress(TimeoutError):
            async with (
                asyncio.timeout(READY_TIMEOUT_S),
                self._connect_to_router() as channel,
            ):
                stub = inference_pb2_grpc.InferenceStub(channel)
                while True:
                    try:
                        status = await stub.GetStatus(inference_pb2.GetStatusRequest())
                    except grpc.aio.AioRpcError as error:
                        seen = f"the router answers {error.code().name}"
                    else:
                        ready = {w.incarnation for w in status.workers if w.state == "ready"}
                        if all(member.record and member.record.incarnation in ready for member in members):
                            return
                        known = ", ".join(f"{worker.worker} ({worker.state})" for worker in status.workers)
                        seen = f"the router sees {known or 'no worker'}"
                    await asyncio.sleep(READY_POLL_S)
        asked = ", ".join(member.worker for member in members)
        raise Unavailable(f"{seen} after {READY_TIMEOUT_S:.0f} s; it was to see {asked}")

    def _connect_to_router(self) -> grpc.aio.Channel:
        tls = None if self._front_tls is None else self._front_tls.client
        return connect(self.router_endpoint, CHANNEL_OPTIONS, tls, self._own_token if self._tokens else None)

    def _start_redis(self) -> None:
        self._redis = start_redis(self.config.index.redis_url)

    async def _stop_redis(self) -> None:
        if self._redis is not None:
            await asyncio.to_thread(self._redis.stop)


def _require_free_ports(router: RouterConfig) -> None:
    """The router runs on this machine: a port that is taken is found before anything starts."""
    _require_free_port(router.host, router.grpc_port, "router.grpc_port")
    if router.http_port is not None:
        _require_free_port(router.host, router.http_port, "router.http_port")
        require(
            router.http_port == 0 or router.http_port != router.grpc_port,
            "router.http_port",
            router.http_port,
            "another one than router.grpc_port",
        )


def _require_free_port(host: str, port: int, key: str) -> None:
    address = (host, port)
    try:
        family = socket.getaddrinfo(*address, type=socket.SOCK_STREAM)[0][0]
        socket.create_server(address, family=family).close()
    except OSError as error:
        # A host that cannot be resolved has a number of getaddrinfo's.
        of_system = error.errno is not None and not isinstance(error, socket.gaierror)
        why = os.strerror(error.errno or 0) if of_system else error.strerror
        raise ConfigError(
            f"cannot listen on {host}:{port} ({why}): choose another router.host or {key}; port 0 picks a "
            "free one"
        ) from error


async def _in_thread(call: Callable[[], None]) -> None:
    """Run a blocking call to its end, also when cancelled: what it starts must be known, to be ended."""
    task = asyncio.create_task(asyncio.to_thread(call))
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait({task})
        raise
