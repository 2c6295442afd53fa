"""The two forms of an answer: server-sent events as they come, or one JSON object at the end.

Both run the generation while they are sent, end it when the client leaves, and leave every error that comes
before the first byte to the application's handlers, which make a status of it.
"""

import asyncio
import contextlib
from collections.abc import Mapping
from typing import Any, Protocol

from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from pdserve.proto import inference_pb2 as pb
from pdserve.router.openai.departure import UntilClientLeaves
from pdserve.router.openai.errors import ClientLeft, event_of, known
from pdserve.router.openai.generation import Generation

DONE = b"data: [DONE]\n\n"

_EVENT_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}

LINGER_S = 1.0
"""How long a client may go on sending a body that was refused."""


class Events(Protocol):
    """Makes the events of one kind of answer."""

    def event(self, prompt: int, chunk: pb.GenerateChunk) -> bytes:
        """What to send for a chunk; empty: nothing yet."""
        ...

    def usage_event(self, usage: Mapping[str, Any]) -> bytes:
        """Empty where the client did not ask for it."""
        ...


class Whole(Protocol):
    """Collects one answer."""

    def add(self, prompt: int, chunk: pb.GenerateChunk) -> None: ...

    def answer(self, usage: Mapping[str, Any]) -> bytes:
        """As JSON."""
        ...


class EventAnswer(Response):
    """`data: {…}` per chunk, one write each, then `data: [DONE]`; or, in its place, an error."""

    media_type = "text/event-stream"

    def __init__(self, generation: Generation, events: Events, request_id: str) -> None:
        self.status_code = 200
        self.background = None
        self.init_headers({**_EVENT_HEADERS, "x-request-id": request_id})
        self._generation = generation
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun = False

        async def begin() -> None:
            nonlocal begun
            begun = True
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})

        async def sink(prompt: int, chunk: pb.GenerateChunk) -> None:
            event = self._events.event(prompt, chunk)
            if event:
                if not begun:
                    await begin()
                await send({"type": "http.response.body", "body": event, "more_body": True})

        with contextlib.suppress(ClientLeft):
            async with UntilClientLeaves(receive):
                try:
                    await self._generation.run(sink)
                    last = self._events.usage_event(self._generation.usage()) + DONE
                except Exception as error:
                    if not begun:
                        raise
                    last = event_of(known(error))
                if not begun:
                    await begin()
                await send({"type": "http.response.body", "body": last, "more_body": False})


class WholeAnswer(Response):
    """One JSON object."""

    media_type = "application/json"

    def __init__(self, generation: Generation, whole: Whole, request_id: str) -> None:
        self.status_code = 200
        self.background = None
        self.body = b""
        self._generation = generation
        self._whole = whole
        self._request_id = request_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with UntilClientLeaves(receive):
            await self._generation.run(self._add)
        self.body = self._whole.answer(self._generation.usage())
        self.init_headers({"x-request-id": self._request_id})
        await super().__call__(scope, receive, send)

    async def _add(self, prompt: int, chunk: pb.GenerateChunk) -> None:
        self._whole.add(prompt, chunk)


class LingeringAnswer(JSONResponse):
    """For a request whose body was not read. The connection ends with it, but not at once: closed in the
    middle of a body it would be reset, and the client would lose the answer.
    """

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.headers["connection"] = "close"
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self.body, "more_body": True})
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LINGER_S):
                while (await receive()).get("more_body", False):
                    pass
        await send({"type": "http.response.body", "body": b"", "more_body": False})
