"""HTTP with a bound on what comes before the body: httptools and uvicorn have none."""

import json
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from pdserve.router.openai.errors import error_body

MAX_HEAD_BYTES = 64 * 1024
"""Of the request line and all headers. What one read of the socket brings may come on top."""

_BODY = json.dumps(
    error_body(f"the request's headers exceed {MAX_HEAD_BYTES} bytes: send fewer", "invalid_request_error")
).encode()
_REFUSAL = (
    b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-type: application/json\r\n"
    b"connection: close\r\ncontent-length: " + str(len(_BODY)).encode() + b"\r\n\r\n" + _BODY
)


class BoundedHeadProtocol(HttpToolsProtocol):
    """Ends a connection whose headers never end."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._in_head = True
        self._head_bytes = 0
        self._heads = 0
        """Heads that have come to their end."""

    def data_received(self, data: bytes) -> None:
        began_in_head, heads = self._in_head, self._heads
        super().data_received(data)
        # A read that ends a head may hold its whole body, one that begins in a body is none of a head's.
        if began_in_head and self._heads == heads:
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
                self.transport.write(_REFUSAL)
                self.transport.close()

    def on_headers_complete(self) -> None:
        self._in_head, self._head_bytes = False, 0
        self._heads += 1
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._in_head = True
        super().on_message_complete()
