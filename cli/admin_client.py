"""A caller of pdserve.v1.Admin, with errors of our tree."""

from collections.abc import Callable
from types import TracebackType
from typing import Any, Self, TypeVar

import grpc

from pdserve.client import Client, Tls
from pdserve.client.channel import CHANNEL_OPTIONS, check_target
from pdserve.client.errors import from_rpc_error
from pdserve.client.security import check_token, load_tls
from pdserve.core.errors import Unavailable
from pdserve.proto import admin_pb2 as pb
from pdserve.proto.admin_pb2_grpc import AdminStub
from pdserve.proto.connections import connect_blocking

Response = TypeVar("Response")

FIND_TIMEOUT_S = 10.0
ANSWER_TIMEOUT_S = 15.0
"""For what the supervisor does at once."""
START_TIMEOUT_S = 400.0
"""For a worker that loads its model."""
GRACE_TIMEOUT_S = 3600.0
"""For a drain, whose grace the server bounds; keepalive notices a server that is gone."""


def find_admin(target: str, tls: Tls | bool = False, token: str | None = None) -> str:
    """host:port of the membership service of the cluster whose router is at `target`."""
    with Client(target, timeout=FIND_TIMEOUT_S, tls=tls, token=token) as client:
        admin = client.status().admin
    if not admin:
        raise Unavailable(f"the cluster at {target} has no membership service: nobody supervises it")
    return admin


class AdminClient:
    """One connection to the membership service; a context manager. Raises PdserveError.

    It shows the router's certificate and asks for the same tokens.
    """

    def __init__(self, admin: str, tls: Tls | bool = False, token: str | None = None) -> None:
        self._channel = connect_blocking(
            check_target(admin), CHANNEL_OPTIONS, load_tls(tls), check_token(token)
        )
        self._stub = AdminStub(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._channel.close()

    def list_members(self) -> tuple[pb.Member, ...]:
        return tuple(_call(self._stub.ListMembers, pb.ListMembersRequest(), ANSWER_TIMEOUT_S).members)

    def add(self, role: str, model: str) -> pb.Member:
        """Start a worker; returns once it is ready."""
        request = pb.AddMemberRequest(role=role, model=model)
        return _call(self._stub.AddMember, request, START_TIMEOUT_S).member

    def drain(self, worker: str, grace_s: float | None) -> int:
        """No new placements; returns how many requests outlived the grace and failed."""
        request = pb.DrainMemberRequest(worker=worker, grace_s=grace_s)
        return _call(self._stub.DrainMember, request, GRACE_TIMEOUT_S).failed_requests

    def remove(self, worker: str, grace_s: float | None) -> int:
        """Drain, then end the worker; returns how many requests outlived the grace and failed."""
        request = pb.RemoveMemberRequest(worker=worker, grace_s=grace_s)
        return _call(self._stub.RemoveMember, request, GRACE_TIMEOUT_S).failed_requests

    def set_role_weight(self, worker: str, role_weight: float) -> None:
        """1 prefills only, 0 decodes only; running sequences stay."""
        request = pb.SetMemberRoleWeightRequest(worker=worker, role_weight=role_weight)
        _call(self._stub.SetMemberRoleWeight, request, ANSWER_TIMEOUT_S)


def _call(method: Callable[..., Response], request: Any, timeout_s: float) -> Response:
    try:
        return method(request, timeout=timeout_s)
    except grpc.RpcError as error:
        raise from_rpc_error(error) from error
