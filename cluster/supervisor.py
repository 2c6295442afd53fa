"""Starts workers, keeps them alive as new incarnations, and changes who belongs to the cluster."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc

from pdserve.cluster.hosted import Hosted
from pdserve.cluster.kept import Kept
from pdserve.cluster.members import Member, MemberState, MemberTable
from pdserve.core.channel_options import CHANNEL_OPTIONS
from pdserve.core.errors import InvalidRequest, Unavailable, WorkerLost
from pdserve.core.security.tls import ClientTls
from pdserve.core.types import Role, WorkerId
from pdserve.core.worker_record import WorkerRecord
from pdserve.proto import worker_pb2, worker_pb2_grpc
from pdserve.proto.connections import connect

log = logging.getLogger(__name__)

CALL_TIMEOUT_S = 10.0


class Supervisor:
    """Owns the workers' processes. Runs on the driver's event loop.

    What an operator asked of a member (a role weight, a drain) holds for its later incarnations too.
    """

    def __init__(self, launch: Callable[[Member], Hosted], tls: ClientTls | None = None) -> None:
        """`launch` makes a worker's process, `tls` is for calls to workers."""
        self.members = MemberTable()
        self._launch = launch
        self._tls = tls
        self._kept: dict[WorkerId, Kept] = {}
        self._stopping = False

    async def add(self, role: Role, model: str) -> Member:
        """Start a worker and wait until it is ready. Raises what its start raised."""
        if self._stopping:
            raise Unavailable("the cluster is ending: no worker can be added")
        member = self.members.add(role, model)
        kept = Kept(
            member.worker,
            launch=lambda: self._launch(member),
            on_start=lambda fields: self._started(member, fields),
            on_loss=lambda: _lost(member),
        )
        self._kept[member.worker] = kept
        try:
            await kept.start()
        except BaseException:
            self._forget(member)
            raise
        return member

    async def drain(self, worker: str, grace_s: float) -> int:
        """No new placements; returns how many requests outlived the grace and failed as retriable.

        A member that is restarting comes back drained. Raises WorkerLost if it dies under the drain.
        """
        if not grace_s >= 0:
            raise InvalidRequest(f"drain grace {grace_s} s: it must be at least 0")
        member = self.members.get(worker)
        member.draining = True
        if member.record is None:
            return 0
        member.state = MemberState.DRAINING
        return await self._call_drain(member, grace_s)

    async def remove(self, worker: str, grace_s: float) -> int:
        """Drain, then end the worker and forget it; returns as `drain` does, 0 if it died meanwhile."""
        member = self.members.get(worker)
        try:
            failed = await self.drain(worker, grace_s)
        except WorkerLost as lost:
            log.warning("%s is removed all the same: %s", worker, lost.message)
            failed = 0
        # Whoever asked may hang up; what was begun is done to its end.
        await asyncio.shield(asyncio.create_task(self._end(member)))
        return failed

    async def set_role_weight(self, worker: str, role_weight: float) -> None:
        """Change what a worker's token budget is spent on; its running sequences stay."""
        if not 0.0 <= role_weight <= 1.0:
            raise InvalidRequest(f"role weight {role_weight}: it must be from 0 (decode) to 1 (prefill)")
        member = self.members.get(worker)
        if member.record is not None:
            await self._call_role_weight(member, role_weight)
        member.role_weight = role_weight

    async def stop(self) -> None:
        """End all workers, together, those that are just starting too."""
        self._stopping = True
        await asyncio.gather(*(self._end(member) for member in self.members.all()))

    async def _end(self, member: Member) -> None:
        kept = self._kept.get(member.worker)
        if kept is not None:
            await kept.stop()
        self._forget(member)

    def _forget(self, member: Member) -> None:
        self._kept.pop(member.worker, None)
        self.members.discard(member.worker)

    async def _started(self, member: Member, fields: dict[str, Any]) -> None:
        record = WorkerRecord.from_dict(fields)
        member.record = record
        try:
            if member.role_weight is not None:
                await self._call_role_weight(member, member.role_weight)
            if member.draining:
                await self._call_drain(member, 0.0)
        except BaseException:
            member.record = None
            raise
        member.state = MemberState.DRAINING if member.draining else MemberState.READY
        log.info("%s is ready: incarnation %s, pid %d", member.worker, record.incarnation, record.pid)

    async def _call_drain(self, member: Member, grace_s: float) -> int:
        async with _stub(member, self._tls) as stub:
            request = worker_pb2.DrainRequest(grace_s=grace_s)
            response = await stub.Drain(request, timeout=grace_s + CALL_TIMEOUT_S)
        return int(response.failed_requests)

    async def _call_role_weight(self, member: Member, role_weight: float) -> None:
        async with _stub(member, self._tls) as stub:
            request = worker_pb2.SetRoleWeightRequest(role_weight=role_weight)
            await stub.SetRoleWeight(request, timeout=CALL_TIMEOUT_S)


def _lost(member: Member) -> None:
    member.state = MemberState.RESTARTING
    member.record = None
    member.restarts += 1


@contextlib.asynccontextmanager
async def _stub(member: Member, tls: ClientTls | None) -> AsyncIterator[Any]:
    """Calls to a member's present incarnation. Raises WorkerLost, for whatever the call failed of."""
    assert member.record is not None
    try:
        async with connect(member.record.endpoint, CHANNEL_OPTIONS, tls) as channel:
            yield worker_pb2_grpc.WorkerStub(channel)
    except grpc.aio.AioRpcError as error:
        raise WorkerLost(
            f"{member.worker} did not do it ({error.code().name}: {error.details()}): "
            "look at `pdserve members list` and ask again"
        ) from error
