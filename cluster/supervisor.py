"""Starts workers as Ray actors, watches them, and starts those that die again, as new incarnations."""

import asyncio
import contextlib
import logging
from collections.abc import Callable
from typing import Any

import grpc
import ray

from pdserve.cluster.actors import start_worker_actor
from pdserve.cluster.members import Member, MemberState, MemberTable
from pdserve.core.channel_options import CHANNEL_OPTIONS
from pdserve.core.errors import InvalidRequest, Unavailable
from pdserve.core.tasks import end_task
from pdserve.core.types import Role, WorkerId
from pdserve.core.worker_record import WorkerRecord
from pdserve.proto import worker_pb2, worker_pb2_grpc
from pdserve.workers.spec import WorkerSpec

log = logging.getLogger(__name__)

START_TIMEOUT_S = 300.0
STOP_TIMEOUT_S = 10.0
FIRST_BACKOFF_S = 0.1
LAST_BACKOFF_S = 10.0


class Supervisor:
    """Owns the worker actors. Runs on the driver's event loop."""

    def __init__(self, spec_for: Callable[[Member], WorkerSpec]) -> None:
        self.members = MemberTable()
        self._spec_for = spec_for
        self._actors: dict[WorkerId, Any] = {}
        self._watchers: dict[WorkerId, asyncio.Task[None]] = {}

    async def add(self, role: Role, model: str) -> Member:
        """Start a worker and wait until it is ready. Raises what its start raised."""
        member = self.members.add(role, model)
        try:
            await self._start(member)
        except BaseException:
            self.members.discard(member.worker)
            self._kill(member.worker)
            raise
        self._watchers[member.worker] = asyncio.create_task(
            self._watch(member), name=f"watch-{member.worker}"
        )
        return member

    async def drain(self, worker: str, grace_s: float) -> int:
        """No new placements; returns how many requests outlived the grace and failed as retriable."""
        member = self.members.get(worker)
        member.state = MemberState.DRAINING
        async with self._stub(member) as stub:
            request = worker_pb2.DrainRequest(grace_s=grace_s)
            response = await stub.Drain(request, timeout=grace_s + STOP_TIMEOUT_S)
        return int(response.failed_requests)

    async def remove(self, worker: str, grace_s: float) -> int:
        """Drain, then end the worker and forget it."""
        member = self.members.get(worker)
        failed = await self.drain(worker, grace_s) if member.record is not None else 0
        await self._end(member.worker)
        self.members.discard(member.worker)
        return failed

    async def set_role_weight(self, worker: str, role_weight: float) -> None:
        """Change what a worker's token budget is spent on; its running sequences stay."""
        if not 0.0 <= role_weight <= 1.0:
            raise InvalidRequest(f"role weight {role_weight}: it must be from 0 (decode) to 1 (prefill)")
        member = self.members.get(worker)
        async with self._stub(member) as stub:
            request = worker_pb2.SetRoleWeightRequest(role_weight=role_weight)
            await stub.SetRoleWeight(request, timeout=STOP_TIMEOUT_S)
        member.role_weight = role_weight

    async def stop(self) -> None:
        """End all workers, together. Their watchers end first, so that nobody starts them again."""
        await asyncio.gather(*(self._end(worker) for worker in list(self._actors)))

    async def _start(self, member: Member) -> None:
        actor = start_worker_actor(self._spec_for(member))
        self._actors[member.worker] = actor
        fields = await asyncio.wait_for(_result(actor.start.remote()), START_TIMEOUT_S)
        member.record = WorkerRecord.from_dict(fields)
        member.state = MemberState.READY
        if member.role_weight is not None:
            await self.set_role_weight(member.worker, member.role_weight)
        log.info(
            "%s is ready: incarnation %s, pid %d", member.worker, member.record.incarnation, member.record.pid
        )

    async def _watch(self, member: Member) -> None:
        """Sleep on the actor's death, then start it again, with a growing pause if it keeps dying."""
        loop = asyncio.get_running_loop()
        backoff = FIRST_BACKOFF_S
        while True:
            alive_since = loop.time()
            with contextlib.suppress(ray.exceptions.RayError):
                await _result(self._actors[member.worker].wait.remote())
            log.warning("%s died: starting it again", member.worker)
            member.state = MemberState.RESTARTING
            member.record = None
            if loop.time() - alive_since > LAST_BACKOFF_S:
                backoff = FIRST_BACKOFF_S
            while member.record is None:
                member.restarts += 1
                try:
                    await self._start(member)
                except Exception:
                    log.exception("%s did not start; next try in %.1f s", member.worker, backoff)
                    self._kill(member.worker)
                    await asyncio.sleep(backoff)
                    backoff = min(backoff * 2, LAST_BACKOFF_S)

    async def _end(self, worker: WorkerId) -> None:
        watcher = self._watchers.pop(worker, None)
        await end_task(watcher)
        actor = self._actors.get(worker)
        if actor is not None:
            with contextlib.suppress(TimeoutError, ray.exceptions.RayError):
                await asyncio.wait_for(_result(actor.stop.remote()), STOP_TIMEOUT_S)
        self._kill(worker)

    def _kill(self, worker: WorkerId) -> None:
        actor = self._actors.pop(worker, None)
        if actor is not None:
            with contextlib.suppress(ray.exceptions.RayError):
                ray.kill(actor)

    @contextlib.asynccontextmanager
    async def _stub(self, member: Member) -> Any:
        if member.record is None:
            raise Unavailable(f"{member.worker} is {member.state}: try again when it is ready")
        async with grpc.aio.insecure_channel(member.record.endpoint, options=CHANNEL_OPTIONS) as channel:
            yield worker_pb2_grpc.WorkerStub(channel)


async def _result(reference: Any) -> Any:
    """Await a Ray object reference as a coroutine, so that asyncio's tools take it."""
    return await reference
