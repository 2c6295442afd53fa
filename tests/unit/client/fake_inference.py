"""An Inference service that plays a script. It runs in grpc's threads, so that it disturbs no event loop."""

import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc

from pdserve.proto import inference_pb2 as pb
from pdserve.proto.inference_pb2_grpc import InferenceServicer, add_InferenceServicer_to_server

Play = Callable[[pb.GenerateRequest, grpc.ServicerContext], Iterator[pb.GenerateChunk]]

LEDGER = pb.Ledger(
    queue=1e-5, locate=2e-5, place=3e-5, retry=0.0, prefill_queue=4e-5, prefill=5e-5, exposed_transfer=6e-5
)
ROUTE = pb.Route(
    prefill_worker="prefill-0",
    decode_worker="decode-0",
    prefill_pid=11,
    decode_pid=12,
    transport="shm",
    blocks_moved=3,
    bytes_moved=3000,
)


def chunk(first: int, ids: list[int], finish: str = "", **more: object) -> pb.GenerateChunk:
    """A chunk whose text spells its token ids."""
    made = pb.GenerateChunk(
        request_id="r-1", first_index=first, token_ids=ids, text="".join(f"<{i}>" for i in ids), **more
    )
    if finish:
        made.finish_reason = finish
        made.usage.CopyFrom(pb.Usage(prompt_tokens=5, completion_tokens=first + len(ids), cached_tokens=2))
    return made


def first_chunk(ids: list[int]) -> pb.GenerateChunk:
    return chunk(0, ids, ledger=LEDGER, route=ROUTE)


def well(request: pb.GenerateRequest, context: grpc.ServicerContext) -> Iterator[pb.GenerateChunk]:
    """Four tokens in three chunks."""
    yield first_chunk([7])
    yield chunk(1, [8, 9])
    yield chunk(3, [10], "length")


def playing(*chunks: pb.GenerateChunk) -> Play:
    """Send these chunks and end well."""

    def play(request: pb.GenerateRequest, context: grpc.ServicerContext) -> Iterator[pb.GenerateChunk]:
        yield from chunks

    return play


def failing(code: grpc.StatusCode, *chunks: pb.GenerateChunk, **trailing: str) -> Play:
    """Send these chunks, then fail; underscores in the names of trailing metadata become hyphens."""

    def play(request: pb.GenerateRequest, context: grpc.ServicerContext) -> Iterator[pb.GenerateChunk]:
        yield from chunks
        context.set_trailing_metadata([(key.replace("_", "-"), value) for key, value in trailing.items()])
        context.abort(code, f"played {code.name}")

    return play


def hanging(*chunks: pb.GenerateChunk) -> Play:
    """Send these chunks and then nothing until the call ends."""

    def play(request: pb.GenerateRequest, context: grpc.ServicerContext) -> Iterator[pb.GenerateChunk]:
        yield from chunks
        over = threading.Event()
        if context.add_callback(over.set):
            over.wait(30)

    return play


class FakeInference(InferenceServicer):
    """Plays the queued scripts in order, then `well`. Records what was asked and which calls ended."""

    def __init__(self) -> None:
        self.plays: deque[Play] = deque()
        self.unary_failures: deque[grpc.StatusCode] = deque()
        self.requests: list[pb.GenerateRequest] = []
        self.time_left: list[float | None] = []
        self.ended = threading.Semaphore(0)
        self._server = grpc.server(ThreadPoolExecutor(8))
        add_InferenceServicer_to_server(self, self._server)
        self.target = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()

    def stop(self) -> None:
        self._server.stop(0).wait()

    def Generate(
        self, request: pb.GenerateRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.GenerateChunk]:
        self.requests.append(request)
        self.time_left.append(context.time_remaining())
        context.add_callback(self.ended.release)
        play = self.plays.popleft() if self.plays else well
        yield from play(request, context)

    def Tokenize(self, request: pb.TokenizeRequest, context: grpc.ServicerContext) -> pb.TokenizeResponse:
        self._fail_if_told(context)
        if request.WhichOneof("prompt") == "chat":
            return pb.TokenizeResponse(token_ids=[len(m.content) for m in request.chat.messages])
        return pb.TokenizeResponse(token_ids=list(request.text.encode()))

    def ListModels(
        self, request: pb.ListModelsRequest, context: grpc.ServicerContext
    ) -> pb.ListModelsResponse:
        self._fail_if_told(context)
        model = pb.Model(name="tiny", context_tokens=64, vocab_size=99, dtype="float32")
        return pb.ListModelsResponse(models=[model])

    def GetStatus(self, request: pb.GetStatusRequest, context: grpc.ServicerContext) -> pb.GetStatusResponse:
        self._fail_if_told(context)
        worker = pb.WorkerStatus(
            worker="decode-0", role="decode", pid=12, state="ready", blocks=pb.BlockCounts(total=8, free=8)
        )
        return pb.GetStatusResponse(workers=[worker], index="redis", index_available=True, admin="h:1")

    def _fail_if_told(self, context: grpc.ServicerContext) -> None:
        if self.unary_failures:
            context.abort(self.unary_failures.popleft(), "played")
