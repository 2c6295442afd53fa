"""Tokens on a gRPC server: everything but health needs one."""

import logging
from collections.abc import Awaitable, Callable
from typing import Any

import grpc

from pdserve.core.errors import PdserveError, Unauthenticated
from pdserve.core.security.tokens import TokenTable
from pdserve.proto.connections import AUTHORIZATION
from pdserve.router.status import abort

OPEN_PREFIX = "/grpc.health.v1.Health/"
"""Probes have no secrets to send, and are told nothing but that the cluster serves."""

log = logging.getLogger(__name__)


class TokenGate(grpc.aio.ServerInterceptor):
    """Answers UNAUTHENTICATED, before it reads a message, to calls without a token of the table."""

    def __init__(self, tokens: TokenTable) -> None:
        self._tokens = tokens

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None or method.startswith(OPEN_PREFIX):
            return handler
        try:
            self._tokens.check(_authorization(handler_call_details))
        except Unauthenticated as error:
            return _refusal(handler, method, error)
        return handler


def _authorization(details: grpc.HandlerCallDetails) -> str | None:
    """The first one; a caller that sends two is judged by it alone."""
    for key, value in details.invocation_metadata or ():
        if key == AUTHORIZATION and isinstance(value, str):
            return value
    return None


def _refusal(handler: "grpc.RpcMethodHandler[Any, Any]", method: str, error: PdserveError) -> Any:
    """A handler of the same kind that only refuses."""

    async def refuse(request: object, context: Any) -> None:
        log.info("%s of %s is refused: %s", method, context.peer(), error.message)
        await abort(context, error)

    if handler.request_streaming:
        if handler.response_streaming:
            return grpc.stream_stream_rpc_method_handler(refuse)
        return grpc.stream_unary_rpc_method_handler(refuse)
    if handler.response_streaming:
        return grpc.unary_stream_rpc_method_handler(refuse)
    return grpc.unary_unary_rpc_method_handler(refuse)
