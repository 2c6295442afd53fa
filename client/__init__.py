"""The SDK: what a program needs to use a cluster. Depends on grpcio and protobuf only."""

from pdserve.client.async_client import AsyncClient
from pdserve.client.async_stream import AsyncChunkStream
from pdserve.client.errors import StreamLost
from pdserve.client.request import RequestOptions
from pdserve.client.retry import RetryPolicy
from pdserve.client.security import Tls
from pdserve.client.sync_client import ChunkStream, Client
from pdserve.client.values import (
    ChatMessage,
    Choice,
    Chunk,
    ClusterStatus,
    ModelInfo,
    Partial,
    PrefillCost,
    Result,
    Route,
    WorkerStatus,
)

__all__ = [
    "AsyncChunkStream",
    "AsyncClient",
    "ChatMessage",
    "Choice",
    "Chunk",
    "ChunkStream",
    "Client",
    "ClusterStatus",
    "ModelInfo",
    "Partial",
    "PrefillCost",
    "RequestOptions",
    "Result",
    "RetryPolicy",
    "Route",
    "StreamLost",
    "Tls",
    "WorkerStatus",
]
