from collections.abc import AsyncIterator

import grpc
import pytest
from fake_hosted import ControlCalls

from pdserve.proto import worker_pb2_grpc


@pytest.fixture
async def control() -> AsyncIterator[tuple[ControlCalls, str]]:
    """A worker's control service and its endpoint."""
    calls = ControlCalls()
    server = grpc.aio.server()
    worker_pb2_grpc.add_WorkerServicer_to_server(calls, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield calls, f"127.0.0.1:{port}"
    await server.stop(None)
