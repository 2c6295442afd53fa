"""The worker's gRPC face towards routers and the supervisor."""

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

import grpc

from pdserve.core.errors import PdserveError, from_foreign
from pdserve.core.types import RequestId
from pdserve.proto import worker_pb2, worker_pb2_grpc
from pdserve.workers.convert import decode_ask
from pdserve.workers.decode_request import describe_failure
from pdserve.workers.session_link import SessionLink

if TYPE_CHECKING:
    from pdserve.workers.worker import Worker

log = logging.getLogger(__name__)

SessionContext = grpc.aio.ServicerContext[worker_pb2.SessionRequest, worker_pb2.SessionResponse]
SetRoleWeightContext = grpc.aio.ServicerContext[
    worker_pb2.SetRoleWeightRequest, worker_pb2.SetRoleWeightResponse
]


class WorkerServicer(worker_pb2_grpc.WorkerServicer):
    """pdserve.v1.Worker."""

    def __init__(self, worker: "Worker") -> None:
        self._worker = worker
        self._links: set[SessionLink] = set()

    async def Session(
        self,
        request_iterator: AsyncIterator[worker_pb2.SessionRequest],
        context: SessionContext,
    ) -> AsyncIterator[worker_pb2.SessionResponse]:
        """One router's stream. When it ends, for whatever reason, its requests wait to be attached."""
        link = SessionLink(router=context.peer())
        self._links.add(link)
        worker = self._worker
        hello = worker_pb2.WorkerHello(worker=worker.spec.worker, incarnation=worker.incarnation)
        link.send(worker_pb2.SessionResponse(hello=hello))
        tasks = [
            asyncio.create_task(self._read(link, request_iterator)),
            asyncio.create_task(self._beat(link)),
        ]

        def end(done: object = None) -> None:
            link.cut()
            self._links.discard(link)
            for task in tasks:
                task.cancel()
            worker.decode.detach(link)

        # A call whose peer left can leave this generator suspended in its yield, without its `finally`.
        context.add_done_callback(end)  # type: ignore[arg-type]  # the stub wants a class
        try:
            while (message := await link.next_message()) is not None:
                yield message
        finally:
            end()

    async def Inspect(
        self, request: worker_pb2.InspectRequest, context: object
    ) -> worker_pb2.InspectResponse:
        return await self._worker.inspect()

    async def Drain(self, request: worker_pb2.DrainRequest, context: object) -> worker_pb2.DrainResponse:
        failed = await self._worker.drain(request.grace_s)
        return worker_pb2.DrainResponse(failed_requests=failed)

    async def SetRoleWeight(
        self,
        request: worker_pb2.SetRoleWeightRequest,
        context: SetRoleWeightContext,
    ) -> worker_pb2.SetRoleWeightResponse:
        if not 0.0 <= request.role_weight <= 1.0:
            await context.abort(
                grpc.StatusCode.INVALID_ARGUMENT,
                f"role weight {request.role_weight}: it must be from 0 (decode only) to 1 (prefill only)",
            )
        await self._worker.set_role_weight(request.role_weight)
        return worker_pb2.SetRoleWeightResponse()

    def close_sessions(self) -> None:
        """End every session once its queue is written; routers reconnect and read the incarnation anew."""
        for link in list(self._links):
            link.close()

    def break_sessions(self) -> None:
        """End every session as a failing network would: what is queued is lost."""
        for link in list(self._links):
            link.cut()

    async def _read(self, link: SessionLink, messages: AsyncIterator[worker_pb2.SessionRequest]) -> None:
        try:
            async for message in messages:
                if link.broken:
                    return  # what it says was meant for a session, maybe an incarnation, that is over
                self._handle(link, message)
        except grpc.RpcError as error:
            log.info("the session with %s broke: %s", link.router, error)
        finally:
            link.close()

    def _handle(self, link: SessionLink, message: worker_pb2.SessionRequest) -> None:
        decode = self._worker.decode
        kind = message.WhichOneof("message")
        if kind == "open":
            self._open(link, message.open)
        elif kind == "attach":
            self._attach(link, message.attach)
        elif kind == "cancel":
            decode.cancel(RequestId(message.cancel.request_id), tell=False)
        elif kind == "ack":
            decode.acknowledge(RequestId(message.ack.request_id))
        elif kind == "hello":
            link.router = message.hello.router

    def _open(self, link: SessionLink, message: worker_pb2.OpenRequest) -> None:
        """Whatever is wrong with one Open is said to its sender, and is nobody else's business."""
        try:
            ask = decode_ask(message, self._worker.clock)
            self._worker.limits.check(ask)
            replace = self._worker.decode.open(link, ask)
        except Exception as error:
            if not isinstance(error, PdserveError):
                log.exception("request %s could not be opened", message.request_id)
            failure = describe_failure(from_foreign(error))
            link.add_item(worker_pb2.FrameItem(request_id=message.request_id, failure=failure))
            link.flush()
            return
        if replace is not None:
            link.send(worker_pb2.SessionResponse(replace=replace))

    def _attach(self, link: SessionLink, message: worker_pb2.AttachRequest) -> None:
        # An attach to another incarnation finds nothing here, and the role says so.
        known = message.incarnation == self._worker.incarnation
        request_id = RequestId(message.request_id)
        if known:
            self._worker.decode.attach(link, request_id, message.next_index)
        else:
            self._worker.decode.refuse_attach(link, request_id)

    async def _beat(self, link: SessionLink) -> None:
        while not link.broken:
            link.send(worker_pb2.SessionResponse(heartbeat=self._worker.heartbeat()))
            await asyncio.sleep(self._worker.spec.session.heartbeat_s)
