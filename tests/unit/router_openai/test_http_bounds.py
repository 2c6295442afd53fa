"""What comes before a request is one, or never becomes one, takes bounded time and memory."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
from pydantic import ValidationError
from scripted_intake import ScriptedIntake, served

from pdserve.router.openai import answers, body, bounded_head
from pdserve.router.openai.chat_schema import ChatRequest
from pdserve.router.openai.completion_schema import CompletionRequest

pytestmark = pytest.mark.asyncio(loop_scope="module")

CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}]}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def port() -> AsyncIterator[int]:
    async with served(ScriptedIntake(), max_body_bytes=4096) as url:
        yield int(url.rpartition(":")[2])


async def test_what_is_no_http_is_told_so_in_the_same_shape(port: int) -> None:
    for sent in (
        b"\x16\x03\x01 a TLS hello\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\n\r\n",
    ):
        status, error = await raw(port, sent)
        assert (status, error["type"]) == (400, "invalid_request_error")


async def test_headers_that_do_not_end_are_waited_for_only_so_long(
    port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bounded_head, "HEAD_TIMEOUT_S", 0.05)
    whole = b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n"
    for sent in (b"", whole[:-2]):
        status, error = await raw(port, sent)
        assert status == 408
        assert "0.05 s" in error["message"]
    # A later request of a connection has its own time; between two, a connection may be idle.
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    async with asyncio.timeout(5):
        for _ in range(2):
            writer.write(whole)
            assert b" 200 " in await reader.readuntil(b'{"status":"ok"}')
            await asyncio.sleep(0.1)
        writer.write(whole[:-2])
        assert b" 408 " in await reader.read()
    writer.close()


async def test_a_body_that_does_not_end_is_waited_for_only_so_long(
    port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(body, "BODY_TIMEOUT_S", 0.05)
    monkeypatch.setattr(answers, "LINGER_S", 0.05)
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    status, error = await raw(port, head + b"content-length: 9\r\n\r\n{")
    assert status == 408
    assert "0.05 s" in error["message"]


async def raw(port: int, sent: bytes) -> tuple[int, dict[str, Any]]:
    """Status and error of what the server answers before it ends the connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(sent)
    async with asyncio.timeout(5):
        answer = await reader.read()
    writer.close()
    head, _, rest = answer.partition(b"\r\n\r\n")
    assert b"connection: close" in head
    found = rest[rest.index(b"{") : rest.rindex(b"}") + 1]  # whole, or in one chunk
    return int(head.split()[1]), json.loads(found)["error"]


@pytest.mark.parametrize(
    "kind_and_body",
    [
        (CompletionRequest, {"prompt": [-1] * 200_000}),
        (CompletionRequest, {"prompt": ["a"] * 200_000}),
        (CompletionRequest, {"prompt": "a", "logit_bias": {str(n): "x" for n in range(100_000)}}),
        (ChatRequest, {"messages": [{}] * 200_000}),
        (ChatRequest, {**CHAT, "tools": [{}] * 200_000}),
    ],
    ids=["ids", "texts", "biases", "messages", "tools"],
)
async def test_a_large_bad_body_makes_one_error_and_no_list_of_them(kind_and_body: tuple[Any, Any]) -> None:
    kind, sent = kind_and_body
    with pytest.raises(ValidationError) as caught:
        kind.model_validate_json(json.dumps(sent))
    assert caught.value.error_count() <= 2


async def test_an_endless_body_is_refused_at_the_limit_and_cut_off(port: int) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        b"transfer-encoding: chunked\r\n\r\n" + b"1000\r\n" + b"x" * 4096 + b"\r\n1\r\nx\r\n"
    )
    async with asyncio.timeout(10):
        assert b" 413 " in await reader.readline()
        with pytest.raises(ConnectionError):
            await _send_for_ever(writer)
    writer.close()


async def _send_for_ever(writer: asyncio.StreamWriter) -> None:
    while True:
        writer.write(b"1000\r\n" + b"x" * 4096 + b"\r\n")
        await writer.drain()
