"""What clients call: the gRPC servicer of pdserve.v1.Inference."""

from collections.abc import AsyncGenerator
from contextlib import aclosing

import grpc

from pdserve.proto import inference_pb2
from pdserve.proto.inference_pb2_grpc import InferenceServicer
from pdserve.router.metered_intake import MeteredIntake
from pdserve.router.status import abort

GenerateContext = grpc.aio.ServicerContext[inference_pb2.GenerateRequest, inference_pb2.GenerateChunk]


class InferenceService(InferenceServicer):
    """gRPC in front of the intake: errors become statuses, deadlines and cancels go in."""

    def __init__(self, intake: MeteredIntake) -> None:
        self._intake = intake

    async def Generate(
        self, request: inference_pb2.GenerateRequest, context: GenerateContext
    ) -> AsyncGenerator[inference_pb2.GenerateChunk, None]:
        """One prompt in, a stream of chunks out."""
        generated = self._intake.generate(
            request,
            context.time_remaining(),
            lambda end: context.add_done_callback(lambda ctx: end()),  # type: ignore[arg-type]  # stub wants a class
        )
        try:
            async with aclosing(generated) as chunks:
                async for chunk in chunks:
                    yield chunk
        except Exception as error:
            await abort(context, error)

    async def Tokenize(
        self,
        request: inference_pb2.TokenizeRequest,
        context: grpc.aio.ServicerContext[inference_pb2.TokenizeRequest, inference_pb2.TokenizeResponse],
    ) -> inference_pb2.TokenizeResponse:
        """The ids that Generate would use for the same prompt."""
        try:
            return await self._intake.tokenize(request)
        except Exception as error:
            await abort(context, error)

    async def ListModels(
        self,
        request: inference_pb2.ListModelsRequest,
        context: grpc.aio.ServicerContext[inference_pb2.ListModelsRequest, inference_pb2.ListModelsResponse],
    ) -> inference_pb2.ListModelsResponse:
        """The models of the workers that are members now."""
        return self._intake.models()

    async def GetStatus(
        self,
        request: inference_pb2.GetStatusRequest,
        context: grpc.aio.ServicerContext[inference_pb2.GetStatusRequest, inference_pb2.GetStatusResponse],
    ) -> inference_pb2.GetStatusResponse:
        """The cluster as this router sees it."""
        return self._intake.status()
