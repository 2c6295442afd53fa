"""gRPC's errors become those of core/errors.py; here and nowhere else in the client."""

from typing import Any

import grpc

from pdserve.client.values import Partial
from pdserve.core.errors import (
    RETRIABLE_KEY,
    RETRY_AFTER_KEY,
    InternalError,
    PdserveError,
    WorkerLost,
    from_wire,
)

_UNREACHABLE = ("failed to connect to all addresses", "errors resolving", "DNS resolution failed")
"""How gRPC's own messages begin where there is no connection."""


class StreamLost(WorkerLost):
    """The completion broke after its first token. `partial` holds what had arrived, all of it true."""

    def __init__(self, message: str, partial: Partial, *, retry_after_s: float | None = None) -> None:
        super().__init__(message, retry_after_s=retry_after_s)
        self.partial = partial


def from_rpc_error(error: grpc.RpcError) -> PdserveError:
    """Map a failed call; works for grpc's and for grpc.aio's errors."""
    if not isinstance(error, grpc.Call | grpc.aio.AioRpcError):
        return InternalError(f"{type(error).__name__}: {error}")
    number = int(error.code().value[0])
    pairs: Any = error.trailing_metadata() or ()  # The stubs do not know that these are (key, value) pairs.
    trailing = {key: value for key, value in pairs if isinstance(value, str)}
    details = _explained(error.details() or error.code().name)
    mapped = from_wire(number, details, _seconds(trailing.get(RETRY_AFTER_KEY)))
    if RETRIABLE_KEY in trailing:
        mapped.retriable = trailing[RETRIABLE_KEY].lower() in ("true", "1")
    return mapped


def _explained(details: str) -> str:
    """What gRPC itself says of a server that it cannot reach, with what to do about it."""
    if not details.startswith(_UNREACHABLE):
        return details
    last = details.rpartition("last error: ")[2].removeprefix("UNKNOWN: ")
    return f"no cluster answers ({last}): is the address right, does it run, and do both or neither use TLS?"


def _seconds(text: str | None) -> float | None:
    """None for what is absent or no number: a broken hint must not hide the error that carries it."""
    try:
        return None if text is None else max(0.0, float(text))
    except ValueError:
        return None
