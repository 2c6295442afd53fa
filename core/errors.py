"""One tree of errors, mapped once to gRPC status and once to HTTP.

    PdserveError
    ├── InvalidRequest          the caller must change the request
    │   ├── ContextTooLong      it can never fit: context, prefill pool or decode pool
    │   └── UnknownModel
    ├── Unauthenticated         no token, or not one of this cluster's
    ├── PermissionDenied        known, but not allowed to do this
    ├── Overloaded              shed at the door; retry after `retry_after_s`
    ├── DeadlineExceeded
    ├── Cancelled
    ├── WorkerLost              a worker died or left while it served the request; retriable
    ├── Unavailable             nobody can serve this now: starting, draining, index or cluster away
    ├── ConfigError             a file, flag or model folder is wrong; found before anything starts
    └── InternalError           a defect of ours, incl. every foreign error that nobody mapped

A message says what was asked, what the limit is, and what to do.
"""

from enum import IntEnum

RETRIABLE_KEY = "retriable"
"""gRPC trailing metadata, `true` or `false`: whether the same request may succeed when sent again."""

RETRY_AFTER_KEY = "retry-after-s"
"""gRPC trailing metadata: seconds to wait before the next attempt."""


class GrpcCode(IntEnum):
    """The numbers of gRPC's canonical status codes (this layer does not import grpc)."""

    CANCELLED = 1
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    INTERNAL = 13
    UNAVAILABLE = 14
    UNAUTHENTICATED = 16


class PdserveError(Exception):
    """Root of everything that pdserve raises on purpose."""

    grpc_code: GrpcCode = GrpcCode.INTERNAL
    http_status: int = 500
    retriable: bool = False

    def __init__(self, message: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.retry_after_s = retry_after_s


class InvalidRequest(PdserveError):
    """The request is wrong and will stay wrong."""

    grpc_code = GrpcCode.INVALID_ARGUMENT
    http_status = 400


class ContextTooLong(InvalidRequest):
    """The request can never fit; the message names the limit that it breaks."""


class UnknownModel(InvalidRequest):
    """No pool serves that model; the message lists those that are served."""

    grpc_code = GrpcCode.NOT_FOUND
    http_status = 404


class Unauthenticated(PdserveError):
    """Nobody knows who asks: there is no token, or a wrong one. The message never repeats it."""

    grpc_code = GrpcCode.UNAUTHENTICATED
    http_status = 401


class PermissionDenied(PdserveError):
    """The caller is known, and may not do this."""

    grpc_code = GrpcCode.PERMISSION_DENIED
    http_status = 403


class Overloaded(PdserveError):
    """Shed before any work was done for it."""

    grpc_code = GrpcCode.RESOURCE_EXHAUSTED
    http_status = 429
    retriable = True


class DeadlineExceeded(PdserveError):
    """The request's own time ran out."""

    grpc_code = GrpcCode.DEADLINE_EXCEEDED
    http_status = 504


class Cancelled(PdserveError):
    """The client left, or asked to stop."""

    grpc_code = GrpcCode.CANCELLED
    http_status = 499


class WorkerLost(PdserveError):
    """A worker died or was removed under the request. Tokens already sent stay true; a retry may go on."""

    grpc_code = GrpcCode.UNAVAILABLE
    http_status = 503
    retriable = True


class Unavailable(PdserveError):
    """No worker can take the request now."""

    grpc_code = GrpcCode.UNAVAILABLE
    http_status = 503
    retriable = True


class ConfigError(PdserveError):
    """Configuration or model files are wrong."""

    grpc_code = GrpcCode.FAILED_PRECONDITION
    http_status = 500


class InternalError(PdserveError):
    """A defect of pdserve."""


def from_foreign(error: BaseException) -> PdserveError:
    """The one place where an error of somebody else becomes ours."""
    if isinstance(error, PdserveError):
        return error
    if isinstance(error, TimeoutError):
        return DeadlineExceeded(f"timed out: {error}")
    if isinstance(error, ConnectionError):
        return Unavailable(f"connection lost: {error}")
    if isinstance(error, MemoryError):
        return Overloaded("out of memory: send a shorter prompt or add workers")
    return InternalError(f"{type(error).__name__}: {error}")


def from_wire(code: int, message: str, retry_after_s: float | None = None) -> PdserveError:
    """Rebuild an error from a gRPC code number and its message."""
    kinds: dict[int, type[PdserveError]] = {
        GrpcCode.CANCELLED: Cancelled,
        GrpcCode.INVALID_ARGUMENT: InvalidRequest,
        GrpcCode.DEADLINE_EXCEEDED: DeadlineExceeded,
        GrpcCode.NOT_FOUND: UnknownModel,
        GrpcCode.PERMISSION_DENIED: PermissionDenied,
        GrpcCode.RESOURCE_EXHAUSTED: Overloaded,
        GrpcCode.FAILED_PRECONDITION: ConfigError,
        GrpcCode.UNAVAILABLE: Unavailable,
        GrpcCode.UNAUTHENTICATED: Unauthenticated,
    }
    return kinds.get(code, InternalError)(message, retry_after_s=retry_after_s)
