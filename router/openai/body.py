"""A request's JSON body: read up to a limit, parsed and checked in one pass."""

import asyncio
from typing import TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import Request

from pdserve.core.errors import InvalidRequest
from pdserve.router.openai.errors import BadField, BodyTooLarge, BodyTooSlow, ClientLeft, WrongContentType
from pdserve.router.openai.fields import BRANCH

BODY_TIMEOUT_S = 60.0
"""From the end of the headers to that of the body."""

Model = TypeVar("Model", bound=BaseModel)


async def parse_body(request: Request, kind: type[Model], max_bytes: int) -> Model:
    """The body as a `kind`.

    Raises WrongContentType, BodyTooSlow, InvalidRequest, BadField, and as `read_body`.
    """
    media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media != "application/json" and not (media.startswith("application/") and media.endswith("+json")):
        raise WrongContentType(f"the content type is {media!r}: send application/json")
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            data = await read_body(request, max_bytes)
    except TimeoutError:
        raise BodyTooSlow(f"the body did not end within {BODY_TIMEOUT_S:g} s: send it faster") from None
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        raise _readable(error) from None


async def read_body(request: Request, max_bytes: int) -> bytes:
    """All bytes. Raises BodyTooLarge as soon as it is clear, ClientLeft for a client that does not wait."""
    said = request.headers.get("content-length", "")
    if said.isdecimal() and int(said) > max_bytes:
        raise BodyTooLarge(f"the body has {said} bytes, the limit is {max_bytes}: send a shorter one")
    parts: list[bytes] = []
    size = 0
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientLeft("the client left before its body was whole")
        part = message.get("body", b"")
        size += len(part)
        if size > max_bytes:
            raise BodyTooLarge(f"the body has more than {max_bytes} bytes, the limit: send a shorter one")
        parts.append(part)
        if not message.get("more_body", False):
            return parts[0] if len(parts) == 1 else b"".join(parts)


def _readable(error: ValidationError) -> InvalidRequest:
    """The first thing that is wrong, by its path and without the value, which may be large."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    if first["type"] == "json_invalid":
        return InvalidRequest(f"the body is not JSON: {first['msg'].removeprefix('Invalid JSON: ')}")
    if not first["loc"]:
        return InvalidRequest("the body must be a JSON object")
    parts = [str(part) for part in first["loc"]]
    param = ".".join(part for part in parts if not part.startswith(BRANCH) and part != "[key]")
    said = first["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    if first["type"] == "missing":
        return BadField(param, f"{param} is missing: send it")
    return BadField(param, f"{param}: it must be {said}" if said != first["msg"] else f"{param}: {said}")
