"""The one place where errors become gRPC status, and workers' failures become errors."""

import logging
from typing import NoReturn, Protocol

import grpc

from pdserve.core.errors import RETRIABLE_KEY, RETRY_AFTER_KEY, PdserveError, from_foreign, from_wire
from pdserve.proto import worker_pb2

log = logging.getLogger(__name__)


class Abortable(Protocol):
    """The part of a servicer context that ends a call."""

    async def abort(
        self, code: grpc.StatusCode, details: str = "", trailing_metadata: tuple[tuple[str, str], ...] = ()
    ) -> NoReturn: ...


async def abort(context: Abortable, error: Exception) -> NoReturn:
    """End the call with the status, message and trailing metadata that `error` stands for."""
    known = from_foreign(error)
    if known is not error:
        log.error("a call ended with an error that nobody mapped", exc_info=error)
    await context.abort(status_code(known), known.message, trailing_metadata(known))


def status_code(error: PdserveError) -> grpc.StatusCode:
    """gRPC's canonical code of an error."""
    number = int(error.grpc_code)
    return next(code for code in grpc.StatusCode if code.value[0] == number)


def trailing_metadata(error: PdserveError) -> tuple[tuple[str, str], ...]:
    """`retriable`: "true" or "false"; `retry-after-s`: seconds, where the error knows them."""
    metadata = [(RETRIABLE_KEY, "true" if error.retriable else "false")]
    if error.retry_after_s is not None:
        metadata.append((RETRY_AFTER_KEY, f"{error.retry_after_s:g}"))
    return tuple(metadata)


def from_failure(failure: worker_pb2.Failure) -> PdserveError:
    """The error that a worker's Failure stands for; the worker decides whether a retry can help."""
    retry_after_s = failure.retry_after_s if failure.HasField("retry_after_s") else None
    error = from_wire(failure.code, failure.message, retry_after_s)
    error.retriable = failure.retriable
    return error
