"""Inference and Admin of a small pretended cluster, in grpc's threads."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc

from pdserve.proto import admin_pb2, inference_pb2
from pdserve.proto.admin_pb2_grpc import AdminServicer, add_AdminServicer_to_server
from pdserve.proto.inference_pb2_grpc import InferenceServicer, add_InferenceServicer_to_server

CONTEXT_TOKENS = 100

SEED_THAT_FAILS = 13
SEED_THAT_HANGS = 14
PROMPT_THAT_IS_REFUSED = "refuse me"


class FakeCluster(InferenceServicer, AdminServicer):
    """Answers every call; records what was asked. An unknown worker is NOT_FOUND.

    A request whose seed says so fails after its first token, or hangs there until the client leaves.
    """

    def __init__(self) -> None:
        self.asked: list[object] = []
        self.supervised = True
        self.finish_reason = "stop"
        self.prompt_tokens = 1
        """What every prompt has."""
        self.hangs = threading.Event()
        """A request has begun to hang."""
        self.left = threading.Event()
        """A client left a request that hung."""
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
        if request.text == PROMPT_THAT_IS_REFUSED or self.prompt_tokens > CONTEXT_TOKENS:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "that is\ntoo much")
        route = inference_pb2.Route(
            prefill_worker="prefill-0", decode_worker="decode-0", transport="shm", blocks_moved=3
        )
        for choice in range(request.sampling.n or 1):
            yield inference_pb2.GenerateChunk(
                request_id="r-1", choice=choice, token_ids=[1], text="Grüß ", route=route
            )
        if request.sampling.seed == SEED_THAT_FAILS:
            context.abort(grpc.StatusCode.UNAVAILABLE, "decode-0 died")
        if request.sampling.seed == SEED_THAT_HANGS:
            if not context.add_callback(self.left.set):
                self.left.set()  # gone already
            self.hangs.set()
            self.left.wait()
        usage = inference_pb2.Usage(prompt_tokens=self.prompt_tokens, completion_tokens=2)
        for choice in range(request.sampling.n or 1):
            yield inference_pb2.GenerateChunk(
                request_id="r-1",
                choice=choice,
                first_index=1,
                token_ids=[2],
                text="Gott",
                finish_reason=self.finish_reason,
                usage=usage,
            )

    def Tokenize(
        self, request: inference_pb2.TokenizeRequest, context: grpc.ServicerContext
    ) -> inference_pb2.TokenizeResponse:
        return inference_pb2.TokenizeResponse(token_ids=[7] * self.prompt_tokens)

    def ListModels(
        self, request: inference_pb2.ListModelsRequest, context: grpc.ServicerContext
    ) -> inference_pb2.ListModelsResponse:
        model = inference_pb2.Model(
            name="tiny", context_tokens=CONTEXT_TOKENS, vocab_size=257, dtype="float32"
        )
        return inference_pb2.ListModelsResponse(models=[model])

    def GetStatus(
        self, request: inference_pb2.GetStatusRequest, context: grpc.ServicerContext
    ) -> inference_pb2.GetStatusResponse:
        worker = inference_pb2.WorkerStatus(
            worker="decode-0",
            role="decode",
            pid=12,
            state="ready",
            incarnation="f" * 16,
            endpoint="127.0.0.1:40001",
            uptime_s=3700,
            preemptions=5,
            running=2,
            waiting=1,
            blocks=inference_pb2.BlockCounts(total=64, free=50, held=10, cached=4, promised=12),
            transports=[
                inference_pb2.TransportUse(
                    transport="shm", chunks=4, bytes=3_000_000, seconds=0.5, pairs=7, falls=9
                )
            ],
        )
        return inference_pb2.GetStatusResponse(
            workers=[worker],
            index="redis",
            index_available=True,
            index_use=inference_pb2.IndexUse(
                lookups=9, unanswered=1, seconds=0.004, asked_blocks=20, found_blocks=5
            ),
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
