"""The HTTP application: routes, and errors in OpenAI's shape."""

from collections.abc import Callable
from typing import Any, Final

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from pdserve import __version__
from pdserve.core.errors import PdserveError
from pdserve.router.openai.answers import LingeringAnswer
from pdserve.router.openai.body import parse_body
from pdserve.router.openai.chat import answer_chat
from pdserve.router.openai.chat_schema import ChatAnswer, ChatRequest
from pdserve.router.openai.completion_schema import CompletionAnswer, CompletionRequest
from pdserve.router.openai.completions import answer_completion
from pdserve.router.openai.document import describe, request_body
from pdserve.router.openai.errors import (
    BodyTooLarge,
    BodyTooSlow,
    ClientLeft,
    ErrorAnswer,
    WrongContentType,
    body_of,
    error_body,
    headers_of,
    known,
    status_of,
)
from pdserve.router.openai.gateway import Gateway
from pdserve.router.openai.service_routes import add_service_routes

_ERRORS: Final[dict[int | str, dict[str, Any]]] = {
    400: {"model": ErrorAnswer, "description": "A field is wrong, or the request can never fit."},
    404: {"model": ErrorAnswer, "description": "No such model."},
    408: {"model": ErrorAnswer, "description": "The body came too slowly."},
    413: {"model": ErrorAnswer, "description": "The body is larger than router.max_body_bytes."},
    415: {"model": ErrorAnswer, "description": "The body is not application/json."},
    429: {"model": ErrorAnswer, "description": "Shed; Retry-After says when to try again."},
    503: {"model": ErrorAnswer, "description": "Nobody can serve this now; see Retry-After."},
    504: {"model": ErrorAnswer, "description": "The request's `timeout` is over."},
    "4XX": {"model": ErrorAnswer, "description": "The request was refused."},
}
_EVENTS: Final[dict[str, Any]] = {
    "text/event-stream": {
        "schema": {
            "type": "object",
            "properties": {"data": {"type": "string"}},
            "required": ["data"],
            "description": "With stream: true. Events `data: {chunk}`, then `data: [DONE]`; where it fails "
            'midway, `data: {"error": …}` and the end.',
        }
    }
}


def create_app(gateway: Gateway) -> FastAPI:
    """The whole API. What guards it (tokens) is an ASGI middleware around it, see HttpServer."""
    app = FastAPI(
        title="pdserve",
        version=__version__,
        description="The OpenAI-compatible API of a pdserve cluster.",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    _add_generation_routes(app, gateway)
    add_service_routes(app, gateway)
    # The most special one is found first, whatever their order.
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _error)
    app.add_exception_handler(PdserveError, _error)
    app.add_exception_handler(ClientLeft, _left)
    describe(app, [CompletionRequest, ChatRequest])
    return app


def _add_generation_routes(app: FastAPI, gateway: Gateway) -> None:
    def route(path: str, request: str, answer: type) -> Callable[[Any], Any]:
        return app.post(
            path,
            response_model=answer,
            responses={200: {"content": _EVENTS}, **_ERRORS},
            openapi_extra=request_body(request),
        )

    @route("/v1/completions", CompletionRequest.__name__, CompletionAnswer)
    async def create_completion(request: Request) -> Response:
        """Continue one prompt or several."""
        with gateway.intake.metrics.refusals():
            fields = await parse_body(request, CompletionRequest, gateway.max_body_bytes)
            return answer_completion(gateway, fields)

    @route("/v1/chat/completions", ChatRequest.__name__, ChatAnswer)
    async def create_chat_completion(request: Request) -> Response:
        """Answer a conversation."""
        with gateway.intake.metrics.refusals():
            fields = await parse_body(request, ChatRequest, gateway.max_body_bytes)
            return answer_chat(gateway, fields)


async def _error(request: Request, error: Exception) -> Response:
    ours = known(error)
    kind = (
        LingeringAnswer if isinstance(ours, BodyTooLarge | BodyTooSlow | WrongContentType) else JSONResponse
    )
    return kind(body_of(ours), status_of(ours), headers_of(ours))


async def _left(request: Request, error: Exception) -> Response:
    """Nobody reads it."""
    return Response(status_code=499)


async def _http_error(request: Request, error: Exception) -> Response:
    """What the routing itself refuses."""
    assert isinstance(error, HTTPException)
    what = f"{request.method} {request.url.path[:256]}"
    match error.status_code:
        case 404:
            body = error_body(f"{what} is not known here: see /openapi.json", "invalid_request_error")
        case 405:
            allowed = (error.headers or {}).get("Allow", "")
            body = error_body(f"{what} is not allowed: use {allowed}", "invalid_request_error")
        case _:
            body = error_body(str(error.detail), "invalid_request_error")
    return JSONResponse(body, error.status_code, error.headers)
