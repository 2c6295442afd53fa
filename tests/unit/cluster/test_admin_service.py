"""The Admin service over real gRPC: defaults, and errors as the status that they are."""

from collections.abc import AsyncIterator, Sequence

import grpc
import pytest
from fake_hosted import ControlCalls, FakeHosted, record_fields

from pdserve.cluster.admin import AdminServicer
from pdserve.cluster.members import Member
from pdserve.cluster.supervisor import Supervisor
from pdserve.core.errors import Unavailable
from pdserve.proto import admin_pb2, admin_pb2_grpc

GRACE_S = 7.5


class Cluster:
    """A supervisor of pretended workers, its Admin service and a stub."""

    def __init__(self, endpoint: str) -> None:
        self.seen: list[str] = []
        self.blind = False
        self._endpoint = endpoint
        self._supervisor = Supervisor(self._launch)
        self._server = grpc.aio.server()
        servicer = AdminServicer(self._supervisor, "m", GRACE_S, self._until_seen)
        admin_pb2_grpc.add_AdminServicer_to_server(servicer, self._server)
        self._channel = grpc.aio.insecure_channel(
            f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        )
        self.stub: admin_pb2_grpc.AdminAsyncStub = admin_pb2_grpc.AdminStub(self._channel)  # type: ignore[assignment]

    async def start(self) -> None:
        await self._server.start()

    async def stop(self) -> None:
        await self._channel.close()
        await self._server.stop(None)
        await self._supervisor.stop()

    def _launch(self, member: Member) -> FakeHosted:
        return FakeHosted(record_fields(self._endpoint, "i0", member.worker))

    async def _until_seen(self, members: Sequence[Member]) -> None:
        if self.blind:
            raise Unavailable("the router does not answer")
        self.seen += [member.worker for member in members]


@pytest.fixture
async def cluster(control: tuple[ControlCalls, str]) -> AsyncIterator[Cluster]:
    made = Cluster(control[1])
    await made.start()
    yield made
    await made.stop()


async def test_add_answers_once_the_router_sees_the_worker(cluster: Cluster) -> None:
    added = (await cluster.stub.AddMember(admin_pb2.AddMemberRequest(role="prefill"))).member
    assert (added.worker, added.role, added.model, added.state) == ("prefill-0", "prefill", "m", "ready")
    assert (added.incarnation, added.role_weight, added.pid) == ("i0", 1.0, 1)
    assert cluster.seen == ["prefill-0"]
    listed = (await cluster.stub.ListMembers(admin_pb2.ListMembersRequest())).members
    assert list(listed) == [added]


async def test_an_absent_grace_is_the_configured_one_and_zero_is_zero(
    cluster: Cluster, control: tuple[ControlCalls, str]
) -> None:
    for _ in range(2):
        await cluster.stub.AddMember(admin_pb2.AddMemberRequest(role="decode"))
    await cluster.stub.DrainMember(admin_pb2.DrainMemberRequest(worker="decode-0"))
    await cluster.stub.RemoveMember(admin_pb2.RemoveMemberRequest(worker="decode-0", grace_s=0.0))
    await cluster.stub.RemoveMember(admin_pb2.RemoveMemberRequest(worker="decode-1"))
    assert control[0].calls == [("drain", GRACE_S), ("drain", 0.0), ("drain", GRACE_S)]


async def test_a_role_weight_that_was_set_is_listed(cluster: Cluster) -> None:
    await cluster.stub.AddMember(admin_pb2.AddMemberRequest(role="mixed"))
    request = admin_pb2.SetMemberRoleWeightRequest(worker="mixed-0", role_weight=0.75)
    await cluster.stub.SetMemberRoleWeight(request)
    listed = (await cluster.stub.ListMembers(admin_pb2.ListMembersRequest())).members
    assert [member.role_weight for member in listed] == [0.75]


async def test_what_is_refused_says_why_in_its_status(
    cluster: Cluster, control: tuple[ControlCalls, str]
) -> None:
    stub = cluster.stub
    await stub.AddMember(admin_pb2.AddMemberRequest(role="decode"))
    control[0].lost = True
    cluster.blind = True
    calls = (
        (
            stub.AddMember(admin_pb2.AddMemberRequest(role="oracle")),
            "INVALID_ARGUMENT",
            "prefill, decode, mixed",
        ),
        (stub.AddMember(admin_pb2.AddMemberRequest(role="decode", model="x")), "NOT_FOUND", "served is 'm'"),
        (stub.AddMember(admin_pb2.AddMemberRequest(role="decode")), "UNAVAILABLE", "router"),
        (stub.DrainMember(admin_pb2.DrainMemberRequest(worker="d")), "INVALID_ARGUMENT", "decode-0"),
        (stub.RemoveMember(admin_pb2.RemoveMemberRequest(worker="d")), "INVALID_ARGUMENT", "decode-0"),
        (stub.DrainMember(admin_pb2.DrainMemberRequest(worker="decode-0")), "UNAVAILABLE", "socket closed"),
        (
            stub.SetMemberRoleWeight(admin_pb2.SetMemberRoleWeightRequest(worker="decode-0", role_weight=2)),
            "INVALID_ARGUMENT",
            "role weight 2",
        ),
    )
    for call, code, words in calls:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await call
        assert refused.value.code().name == code
        assert words in (refused.value.details() or "")
