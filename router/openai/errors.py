"""Errors as OpenAI's clients know them: `{"error": {"message", "type", "param", "code"}}` and a status."""

import json
import logging
import math
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from pdserve.core.errors import (
    Cancelled,
    ContextTooLong,
    DeadlineExceeded,
    InvalidRequest,
    Overloaded,
    PdserveError,
    PermissionDenied,
    Unauthenticated,
    UnknownModel,
    from_foreign,
)

log = logging.getLogger(__name__)

INTERNAL_MESSAGE = "the server failed on this request: its log says why"
"""All that a client is told of our own defects."""

_CODES: tuple[tuple[type[PdserveError], str, str | None], ...] = (
    (ContextTooLong, "invalid_request_error", "context_length_exceeded"),
    (UnknownModel, "invalid_request_error", "model_not_found"),
    (InvalidRequest, "invalid_request_error", None),
    (Unauthenticated, "authentication_error", "invalid_api_key"),
    (PermissionDenied, "permission_error", None),
    (Overloaded, "rate_limit_error", "rate_limit_exceeded"),
    (DeadlineExceeded, "timeout_error", "deadline_exceeded"),
)
"""First match: (class, type, code). All others are `server_error`."""


class BadField(InvalidRequest):
    """A field of the body is wrong. `param` is its path: `messages.0.content`."""

    def __init__(self, param: str, message: str) -> None:
        super().__init__(message)
        self.param = param


class BodyTooLarge(InvalidRequest):
    """More bytes than `router.max_body_bytes`."""

    http_status = 413


class BodyTooSlow(InvalidRequest):
    """The body did not come to its end in time."""

    http_status = 408


class WrongContentType(InvalidRequest):
    """The body is not said to be JSON. A web page could post any other kind across origins."""

    http_status = 415


class ClientLeft(Cancelled):
    """Nobody is there to read an answer."""


class ErrorBody(BaseModel):
    """OpenAI's error object."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    """Body of every answer that is not a success."""

    error: ErrorBody


def known(error: Exception) -> PdserveError:
    """What an error is to a client. Foreign errors are logged with their trace, which stays here."""
    ours = from_foreign(error)
    if ours.http_status == 500 or ours is not error:
        log.error("a request ended with an error of the server's own", exc_info=error)
    return ours


def status_of(error: PdserveError) -> int:
    return error.http_status


def body_of(error: PdserveError) -> dict[str, Any]:
    """The JSON of an error. Nothing of the server's inside is in it."""
    kind, code = next(
        ((kind, code) for cls, kind, code in _CODES if isinstance(error, cls)), ("server_error", None)
    )
    message = INTERNAL_MESSAGE if error.http_status == 500 else error.message
    param = error.param if isinstance(error, BadField) else None
    return error_body(message, kind, code, param)


def error_body(message: str, kind: str, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def headers_of(error: PdserveError) -> Mapping[str, str]:
    """`Retry-After` in whole seconds, where the same request may do better later; what RFC 6750 asks for."""
    headers: dict[str, str] = {}
    if error.retriable and error.http_status in (429, 503):
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after_s or 1.0)))
    if isinstance(error, Unauthenticated):
        headers["www-authenticate"] = "Bearer"
    return headers


def event_of(error: PdserveError) -> bytes:
    """The last event of a stream that fails after it has begun."""
    return b"data: " + json.dumps(body_of(error)).encode() + b"\n\n"
