"""A session ends when it is told to, whatever its connection attempts are doing at that moment."""

import asyncio
from typing import Any

import pytest
from router_views import record

from pdserve.core.clock import MonotonicClock
from pdserve.core.config import SessionConfig
from pdserve.core.types import Role
from pdserve.proto.worker_pb2_grpc import WorkerStub
from pdserve.router import sessions
from pdserve.router.sessions import WorkerSession


async def test_a_stop_in_the_moment_of_a_failed_connect_ends_the_session(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """gRPC swallows a cancel between a call's end and the end of its set-up."""

    async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    server = await asyncio.start_server(hang_up, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    member = record("decode-0", Role.DECODE, endpoint=f"127.0.0.1:{port}")
    session = WorkerSession(member, "router", SessionConfig(), MonotonicClock())
    stops: list[asyncio.Task[None]] = []
    begun = asyncio.Event()

    def stop(call: object) -> None:
        if not stops:
            stops.append(asyncio.create_task(session.stop("a test")))
            begun.set()

    class Stub:
        def __init__(self, channel: Any) -> None:
            self._inner = WorkerStub(channel)

        def Session(self) -> Any:
            call: Any = self._inner.Session()
            call.add_done_callback(stop)
            return call

    monkeypatch.setattr(sessions, "WorkerStub", Stub)
    session.start()
    async with asyncio.timeout(20):
        await begun.wait()
        await stops[0]
    assert all(task.done() for task in session._tasks)
    server.close()
