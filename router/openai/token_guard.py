"""Tokens on the HTTP API: an ASGI middleware around the application."""

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from pdserve.core.errors import Unauthenticated
from pdserve.core.security.tokens import TokenTable
from pdserve.router.openai.errors import body_of, headers_of

OPEN_PATHS = frozenset({"/health", "/ready"})
"""Probes have no secrets to send, and are told nothing but that the cluster serves."""


class TokenGuard:
    """Answers 401, before the body is read, to requests without a token of the table."""

    def __init__(self, app: ASGIApp, tokens: TokenTable) -> None:
        self._app = app
        self._tokens = tokens

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS:
            try:
                self._tokens.check(Headers(scope=scope).get("authorization"))
            except Unauthenticated as error:
                # The body was not read: what follows it on this connection is not to be trusted.
                headers = {**headers_of(error), "connection": "close"}
                await JSONResponse(body_of(error), error.http_status, headers)(scope, receive, send)
                return
        await self._app(scope, receive, send)
