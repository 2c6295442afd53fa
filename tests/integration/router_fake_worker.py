"""A worker that only speaks the Session protocol: tests say what it answers."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

import grpc

from pdserve.core.types import Incarnation, Role, WorkerId
from pdserve.core.worker_record import WorkerRecord
from pdserve.proto import inference_pb2, worker_pb2
from pdserve.proto.worker_pb2_grpc import WorkerServicer, add_WorkerServicer_to_server

SCHEMA = "ab" * 16
POOL_BLOCKS = 64
VOCABULARY = 512
CONTEXT = 600
BEAT_S = 0.02
WEIGHTS = {Role.PREFILL: 1.0, Role.DECODE: 0.0, Role.MIXED: 0.5}


class FakeWorker(WorkerServicer):
    """What the router said is in queues by kind; what the router hears, the test sends."""

    def __init__(self, name: str, role: Role, incarnation: str = "one") -> None:
        self.name = name
        self.role = role
        self.incarnation = incarnation
        self.hellos: asyncio.Queue[worker_pb2.SessionHello] = asyncio.Queue()
        self.opens: asyncio.Queue[worker_pb2.OpenRequest] = asyncio.Queue()
        self.attaches: asyncio.Queue[worker_pb2.AttachRequest] = asyncio.Queue()
        self.cancels: asyncio.Queue[worker_pb2.CancelRequest] = asyncio.Queue()
        self.acks: asyncio.Queue[worker_pb2.AckRequest] = asyncio.Queue()
        self.load = worker_pb2.WorkerLoad(
            role_weight=WEIGHTS[role],
            blocks=inference_pb2.BlockCounts(total=POOL_BLOCKS, free=POOL_BLOCKS),
        )
        self.progress = 0
        self.beating = True
        self._outbox: asyncio.Queue[worker_pb2.SessionResponse | None] = asyncio.Queue()
        self._server: grpc.aio.Server | None = None
        self._port = 0

    async def start(self) -> None:
        """Listen; again after `stop` on the same port, as the same process would."""
        self._server = grpc.aio.server()
        add_WorkerServicer_to_server(self, self._server)
        self._port = self._server.add_insecure_port(f"127.0.0.1:{self._port}")
        await self._server.start()

    async def stop(self) -> None:
        if self._server is not None:
            await self._server.stop(None)

    def record(self, **changes: Any) -> WorkerRecord:
        fields: dict[str, Any] = {
            "worker": WorkerId(self.name),
            "incarnation": Incarnation(self.incarnation),
            "role": self.role,
            "model": "tiny",
            "schema": SCHEMA,
            "endpoint": f"127.0.0.1:{self._port}",
            "pid": 1,
            "context_tokens": CONTEXT,
            "vocab_size": VOCABULARY,
            "dtype": "float32",
            "pool_blocks": POOL_BLOCKS,
            "role_weight": WEIGHTS[self.role],
        }
        return WorkerRecord(**{**fields, **changes})

    # --- what the test makes it say ---

    def say(self, request: str, first: int, ids: Sequence[int], text: str = "", finish: str = "") -> None:
        """One item of a frame, with all that a first and a last item have."""
        item = worker_pb2.FrameItem(
            request_id=request, first_index=first, token_ids=ids, text=text, finish_reason=finish
        )
        if first == 0:
            item.ledger.CopyFrom(inference_pb2.Ledger(prefill=0.25, first_step=0.5))
            item.route.CopyFrom(inference_pb2.Route(decode_worker=self.name))
        if finish:
            item.usage.CopyFrom(inference_pb2.Usage(prompt_tokens=1, completion_tokens=first + len(ids)))
        self._frame(item)

    def fail(self, request: str, failure: worker_pb2.Failure) -> None:
        self._frame(worker_pb2.FrameItem(request_id=request, failure=failure))

    def refuse(self, request: str, retry_after_s: float | None = None) -> None:
        replace = worker_pb2.Replace(request_id=request, reason="pool is full", retry_after_s=retry_after_s)
        self._outbox.put_nowait(worker_pb2.SessionResponse(replace=replace))

    def break_session(self) -> None:
        """The stream ends; nothing else happens to the worker."""
        self._outbox.put_nowait(None)

    def _frame(self, item: worker_pb2.FrameItem) -> None:
        self._outbox.put_nowait(worker_pb2.SessionResponse(frame=worker_pb2.Frame(items=[item])))

    # --- the protocol ---

    async def Session(
        self, request_iterator: AsyncIterator[worker_pb2.SessionRequest], context: Any
    ) -> AsyncIterator[worker_pb2.SessionResponse]:
        outbox = self._outbox = asyncio.Queue()
        hello = worker_pb2.WorkerHello(worker=self.name, incarnation=self.incarnation)
        yield worker_pb2.SessionResponse(hello=hello)
        tasks = [asyncio.create_task(self._read(request_iterator)), asyncio.create_task(self._beat(outbox))]
        try:
            while (response := await outbox.get()) is not None:
                yield response
        finally:
            for task in tasks:
                task.cancel()

    async def _read(self, requests: AsyncIterator[worker_pb2.SessionRequest]) -> None:
        kinds: dict[str, asyncio.Queue[Any]] = {
            "hello": self.hellos,
            "open": self.opens,
            "attach": self.attaches,
            "cancel": self.cancels,
            "ack": self.acks,
        }
        async for message in requests:
            kind = message.WhichOneof("message")
            assert kind is not None
            kinds[kind].put_nowait(getattr(message, kind))

    async def _beat(self, outbox: asyncio.Queue[worker_pb2.SessionResponse | None]) -> None:
        while True:
            if self.beating:
                beat = worker_pb2.WorkerHeartbeat(progress=self.progress, load=self.load)
                outbox.put_nowait(worker_pb2.SessionResponse(heartbeat=beat))
            await asyncio.sleep(BEAT_S)

    async def Inspect(self, request: Any, context: Any) -> Any:
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, "a fake")

    async def Drain(self, request: Any, context: Any) -> Any:
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, "a fake")

    async def SetRoleWeight(self, request: Any, context: Any) -> Any:
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, "a fake")
