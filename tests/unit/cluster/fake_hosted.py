"""Processes that only pretend, and a worker's control calls over real gRPC."""

import asyncio
from typing import Any

import grpc

from pdserve.core.errors import PdserveError, WorkerLost
from pdserve.core.types import Incarnation, Role, WorkerId
from pdserve.core.worker_record import WorkerRecord
from pdserve.proto import worker_pb2, worker_pb2_grpc


class FakeHosted:
    """Starts with `said`, raises `failure`, or, held, starts when `release` is set; dies when told to."""

    def __init__(
        self, said: dict[str, Any] | None = None, failure: PdserveError | None = None, *, held: bool = False
    ) -> None:
        self.said = said or {}
        self.failure = failure
        self.release = asyncio.Event()
        if not held:
            self.release.set()
        self.starting = asyncio.Event()
        self.dead = asyncio.Event()
        self.stopped = False
        self.killed = False

    async def start(self) -> dict[str, Any]:
        self.starting.set()
        await self.release.wait()
        if self.failure is not None:
            raise self.failure
        return self.said

    async def wait(self) -> None:
        await self.dead.wait()
        raise WorkerLost("the process died")

    async def stop(self) -> None:
        self.stopped = True

    def kill(self) -> None:
        self.killed = True


class ControlCalls(worker_pb2_grpc.WorkerServicer):
    """Answers Drain and SetRoleWeight; records them as (name, value). `lost`: fails instead."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, float]] = []
        self.lost = False
        self.failed_requests = 0

    async def Drain(self, request: worker_pb2.DrainRequest, context: Any) -> worker_pb2.DrainResponse:
        self.calls.append(("drain", request.grace_s))
        if self.lost:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "socket closed")
        return worker_pb2.DrainResponse(failed_requests=self.failed_requests)

    async def SetRoleWeight(
        self, request: worker_pb2.SetRoleWeightRequest, context: Any
    ) -> worker_pb2.SetRoleWeightResponse:
        self.calls.append(("weight", request.role_weight))
        if self.lost:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "socket closed")
        return worker_pb2.SetRoleWeightResponse()


def record_fields(endpoint: str, incarnation: str, worker: str = "decode-0") -> dict[str, Any]:
    """What a worker says of itself."""
    return WorkerRecord(
        worker=WorkerId(worker),
        incarnation=Incarnation(incarnation),
        role=Role.DECODE,
        model="m",
        schema="00",
        endpoint=endpoint,
        pid=1,
        context_tokens=64,
        vocab_size=8,
        dtype="float32",
        pool_blocks=4,
        role_weight=0.0,
    ).to_dict()


async def until(condition: Any) -> None:
    """Let other tasks run until `condition()` holds."""
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0)
