"""The SDK: what a program needs to use a cluster. Depends on grpcio and protobuf only."""

from pdserve.client.async_client import AsyncClient
from pdserve.client.async_stream import AsyncChunkStream
from pdserve.client.errors import StreamLost
from pdserve.client.retry import RetryPolicy
from pdserve.client.sync_client import ChunkStream, Client
from pdserve.client.values import (
    ChatMessage,
    Chunk,
    ClusterStatus,
    ModelInfo,
    Partial,
    Result,
    Route,
    WorkerStatus,
)

__all__ = [
    "AsyncChunkStream",
    "AsyncClient",
    "ChatMessage",
    "Chunk",
    "ChunkStream",
    "Client",
    "ClusterStatus",
    "ModelInfo",
    "Partial",
    "Result",
    "RetryPolicy",
    "Route",
    "StreamLost",
    "WorkerStatus",
]
