"""Inference and Admin of a small pretended cluster, in grpc's threads."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc

from pdserve.proto import admin_pb2, inference_pb2
from pdserve.proto.admin_pb2_grpc import AdminServicer, add_AdminServicer_to_server
from pdserve.proto.inference_pb2_grpc import InferenceServicer, add_InferenceServicer_to_server


class FakeCluster(InferenceServicer, AdminServicer):
    """Answers every call; records what was asked. An unknown worker is NOT_FOUND."""

    def __init__(self) -> None:
        self.asked: list[object] = []
        self.supervised = True
        self._server = grpc.server(ThreadPoolExecutor(4))
        add_InferenceServicer_to_server(self, self._server)
        add_AdminServicer_to_server(self, self._server)
        self.target = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()

    def stop(self) -> None:
        self._server.stop(0).wait()

    def Generate(
        self, request: inference_pb2.GenerateRequest, context: grpc.ServicerContext
    ) -> Iterator[inference_pb2.GenerateChunk]:
        self.asked.append(request)
        yield inference_pb2.GenerateChunk(request_id="r-1", token_ids=[1], text="Grüß ")
        if request.sampling.seed == 13:
            context.abort(grpc.StatusCode.UNAVAILABLE, "decode-0 died")
        usage = inference_pb2.Usage(prompt_tokens=1, completion_tokens=2)
        yield inference_pb2.GenerateChunk(
            request_id="r-1", first_index=1, token_ids=[2], text="Gott", finish_reason="stop", usage=usage
        )

    def Tokenize(
        self, request: inference_pb2.TokenizeRequest, context: grpc.ServicerContext
    ) -> inference_pb2.TokenizeResponse:
        return inference_pb2.TokenizeResponse()

    def ListModels(
        self, request: inference_pb2.ListModelsRequest, context: grpc.ServicerContext
    ) -> inference_pb2.ListModelsResponse:
        return inference_pb2.ListModelsResponse()

    def GetStatus(
        self, request: inference_pb2.GetStatusRequest, context: grpc.ServicerContext
    ) -> inference_pb2.GetStatusResponse:
        worker = inference_pb2.WorkerStatus(worker="decode-0", role="decode", pid=12, state="ready")
        return inference_pb2.GetStatusResponse(
            workers=[worker],
            index="redis",
            requests_in_flight=3,
            admin=self.target if self.supervised else "",
        )

    def ListMembers(
        self, request: admin_pb2.ListMembersRequest, context: grpc.ServicerContext
    ) -> admin_pb2.ListMembersResponse:
        return admin_pb2.ListMembersResponse(members=[self._member("decode-0", "decode")])

    def AddMember(
        self, request: admin_pb2.AddMemberRequest, context: grpc.ServicerContext
    ) -> admin_pb2.AddMemberResponse:
        self.asked.append(request)
        return admin_pb2.AddMemberResponse(member=self._member("prefill-7", request.role))

    def DrainMember(
        self, request: admin_pb2.DrainMemberRequest, context: grpc.ServicerContext
    ) -> admin_pb2.DrainMemberResponse:
        self.asked.append(request)
        self._known(request.worker, context)
        return admin_pb2.DrainMemberResponse(failed_requests=2)

    def RemoveMember(
        self, request: admin_pb2.RemoveMemberRequest, context: grpc.ServicerContext
    ) -> admin_pb2.RemoveMemberResponse:
        self.asked.append(request)
        self._known(request.worker, context)
        return admin_pb2.RemoveMemberResponse()

    def SetMemberRoleWeight(
        self, request: admin_pb2.SetMemberRoleWeightRequest, context: grpc.ServicerContext
    ) -> admin_pb2.SetMemberRoleWeightResponse:
        self.asked.append(request)
        self._known(request.worker, context)
        return admin_pb2.SetMemberRoleWeightResponse()

    def _member(self, worker: str, role: str) -> admin_pb2.Member:
        return admin_pb2.Member(worker=worker, role=role, state="ready", pid=12)

    def _known(self, worker: str, context: grpc.ServicerContext) -> None:
        if worker != "decode-0":
            context.abort(grpc.StatusCode.NOT_FOUND, f"no worker {worker!r}")
