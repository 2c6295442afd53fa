"""pdserve.v1.Admin: the supervisor's face, on loopback."""

from collections.abc import Awaitable, Callable, Sequence

import grpc

from pdserve.cluster.members import Member
from pdserve.cluster.supervisor import Supervisor
from pdserve.core.errors import InvalidRequest, UnknownModel
from pdserve.core.types import Role
from pdserve.proto import admin_pb2, admin_pb2_grpc
from pdserve.router.status import abort
from pdserve.workers.spec import ROLE_WEIGHTS

Context = grpc.aio.ServicerContext[object, object]


class AdminServicer(admin_pb2_grpc.AdminServicer):
    """Membership changes at run time."""

    def __init__(
        self,
        supervisor: Supervisor,
        model: str,
        drain_grace_s: float,
        until_seen: Callable[[Sequence[Member]], Awaitable[None]],
    ) -> None:
        """`until_seen` returns when the router would place on these members."""
        self._supervisor = supervisor
        self._model = model
        self._grace_s = drain_grace_s
        self._until_seen = until_seen

    async def ListMembers(
        self, request: admin_pb2.ListMembersRequest, context: Context
    ) -> admin_pb2.ListMembersResponse:
        members = [_member(member) for member in self._supervisor.members.all()]
        return admin_pb2.ListMembersResponse(members=members)

    async def AddMember(
        self, request: admin_pb2.AddMemberRequest, context: Context
    ) -> admin_pb2.AddMemberResponse:
        try:
            member = await self._supervisor.add(_role(request.role), self._served(request.model))
            try:
                await self._until_seen([member])
            except BaseException:
                await self._supervisor.remove(member.worker, 0.0)  # or each try would leave one more
                raise
        except Exception as error:
            await abort(context, error)
        return admin_pb2.AddMemberResponse(member=_member(member))

    async def DrainMember(
        self, request: admin_pb2.DrainMemberRequest, context: Context
    ) -> admin_pb2.DrainMemberResponse:
        grace = request.grace_s if request.HasField("grace_s") else self._grace_s
        try:
            failed = await self._supervisor.drain(request.worker, grace)
        except Exception as error:
            await abort(context, error)
        return admin_pb2.DrainMemberResponse(failed_requests=failed)

    async def RemoveMember(
        self, request: admin_pb2.RemoveMemberRequest, context: Context
    ) -> admin_pb2.RemoveMemberResponse:
        grace = request.grace_s if request.HasField("grace_s") else self._grace_s
        try:
            failed = await self._supervisor.remove(request.worker, grace)
        except Exception as error:
            await abort(context, error)
        return admin_pb2.RemoveMemberResponse(failed_requests=failed)

    async def SetMemberRoleWeight(
        self, request: admin_pb2.SetMemberRoleWeightRequest, context: Context
    ) -> admin_pb2.SetMemberRoleWeightResponse:
        try:
            await self._supervisor.set_role_weight(request.worker, request.role_weight)
        except Exception as error:
            await abort(context, error)
        return admin_pb2.SetMemberRoleWeightResponse()

    def _served(self, model: str) -> str:
        """A worker of a model that the router does not know could never be asked."""
        if model and model != self._model:
            raise UnknownModel(f"model {model!r} is not served here: served is {self._model!r}")
        return self._model


def _role(name: str) -> Role:
    try:
        return Role(name)
    except ValueError:
        raise InvalidRequest(f"role {name!r}: it must be one of {', '.join(Role)}") from None


def _member(member: Member) -> admin_pb2.Member:
    message = admin_pb2.Member(
        worker=member.worker,
        role=str(member.role),
        model=member.model,
        state=str(member.state),
        restarts=member.restarts,
        role_weight=ROLE_WEIGHTS[member.role] if member.role_weight is None else member.role_weight,
    )
    if member.record is not None:
        message.incarnation = member.record.incarnation
        message.endpoint = member.record.endpoint
        message.pid = member.record.pid
    return message
