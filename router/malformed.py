"""Messages that are no protobuf: the caller's fault, said so. grpc itself would call it INTERNAL."""

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from pdserve.core.errors import InvalidRequest
from pdserve.router.status import abort


class _Malformed:
    """Stands for a message that could not be read."""

    def __init__(self, error: DecodeError) -> None:
        self.error = InvalidRequest(
            f"the message cannot be read ({error}): send a protobuf of the method's request type, with text "
            "in UTF-8"
        )


class RefuseMalformed(grpc.aio.ServerInterceptor):
    """Answers INVALID_ARGUMENT to a message that does not parse, be it only for bytes that are no UTF-8."""

    def __init__(self, service: str) -> None:
        """`service`: full name of the one that is guarded; its streaming methods are generators."""
        self._prefix = f"/{service}/"

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = await continuation(handler_call_details)
        guarded = handler_call_details.method.startswith(self._prefix)
        if handler is None or handler.request_streaming or not guarded:
            return handler
        parse, serialize = _tolerant(handler.request_deserializer), handler.response_serializer
        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(_streaming(handler.unary_stream), parse, serialize)
        return grpc.unary_unary_rpc_method_handler(_answering(handler.unary_unary), parse, serialize)


def _tolerant(parse: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    def parse_or_mark(data: bytes) -> Any:
        try:
            return parse(data)
        except DecodeError as error:
            return _Malformed(error)

    return parse_or_mark


def _answering(inner: Callable[[Any, Any], Awaitable[Any]]) -> Callable[[Any, Any], Awaitable[Any]]:
    async def behaviour(request: Any, context: Any) -> Any:
        if isinstance(request, _Malformed):
            await abort(context, request.error)
        return await inner(request, context)

    return behaviour


def _streaming(
    inner: Callable[[Any, Any], AsyncGenerator[Any, None]],
) -> Callable[[Any, Any], AsyncGenerator[Any, None]]:
    async def behaviour(request: Any, context: Any) -> AsyncGenerator[Any, None]:
        if isinstance(request, _Malformed):
            await abort(context, request.error)
        async with aclosing(inner(request, context)) as responses:
            async for response in responses:
                yield response

    return behaviour
