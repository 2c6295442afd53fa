"""HTTP with bounds on what comes before the body, and JSON for what is no HTTP: uvicorn has neither."""

import json
from asyncio import TimerHandle, Transport
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from pdserve.router.openai.errors import error_body

MAX_HEAD_BYTES = 64 * 1024
"""Of the request line and all headers. What one read of the socket brings may come on top."""
HEAD_TIMEOUT_S = 30.0
"""From the connection, or a later request's first byte, to the end of the headers."""

_BAD = b"400 Bad Request"
_SLOW = b"408 Request Timeout"
_LARGE = b"431 Request Header Fields Too Large"


class BoundedHeadProtocol(HttpToolsProtocol):
    """Ends a connection whose headers never end: too many of them, or too slow."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._in_head = True
        self._head_bytes = 0
        self._heads = 0
        """Heads that have come to their end."""
        self._timer: TimerHandle | None = None

    def connection_made(self, transport: Transport) -> None:  # type: ignore[override]  # as uvicorn's
        super().connection_made(transport)
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        began_in_head, heads = self._in_head, self._heads
        if began_in_head and self._timer is None:
            self._expect_head()
        super().data_received(data)
        # A read that ends a head may hold its whole body, one that begins in a body is none of a head's.
        if began_in_head and self._heads == heads:
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES:
                self._refuse(_LARGE, f"the request's headers exceed {MAX_HEAD_BYTES} bytes: send fewer")

    def on_headers_complete(self) -> None:
        self._in_head, self._head_bytes = False, 0
        self._heads += 1
        self._stop_timer()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._in_head = True
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """Where uvicorn sends plain text."""
        self._refuse(_BAD, "this is not an HTTP request: see RFC 9112, and whether the server speaks TLS")

    def _expect_head(self) -> None:
        self._timer = self.loop.call_later(HEAD_TIMEOUT_S, self._give_up)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _give_up(self) -> None:
        self._refuse(
            _SLOW, f"the request's headers did not end within {HEAD_TIMEOUT_S:g} s: send them at once"
        )

    def _refuse(self, status: bytes, message: str) -> None:
        """The answer, and the connection's end."""
        if self.transport.is_closing():
            return
        body = json.dumps(error_body(message, "invalid_request_error")).encode()
        head = b"HTTP/1.1 %s\r\ncontent-type: application/json\r\nconnection: close\r\n" % status
        self.transport.write(head + b"content-length: %d\r\n\r\n" % len(body) + body)
        self.transport.close()
