"""Whatever is wrong, the answer has OpenAI's error shape and tells nothing of the server's inside."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import pytest
import pytest_asyncio
from scripted_intake import ScriptedIntake, served

from pdserve.core.errors import (
    ConfigError,
    ContextTooLong,
    DeadlineExceeded,
    InternalError,
    InvalidRequest,
    Overloaded,
    PdserveError,
    Unavailable,
    UnknownModel,
    WorkerLost,
)

pytestmark = pytest.mark.asyncio(loop_scope="module")

GOOD = {"prompt": "hi"}
CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}]}
TOOL = {"type": "function", "function": {"name": "f"}}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server() -> AsyncIterator[tuple[ScriptedIntake, httpx.AsyncClient]]:
    """One for all tests of this file: a start and a stop take longer than a test."""
    intake = ScriptedIntake()
    async with (
        served(intake, max_body_bytes=4096, max_in_flight=8) as url,
        httpx.AsyncClient(base_url=url) as client,
    ):
        yield intake, client


@pytest.fixture
def intake(server: tuple[ScriptedIntake, httpx.AsyncClient]) -> Iterator[ScriptedIntake]:
    """As new. At the end of each test nothing runs."""
    vars(server[0]).update(vars(ScriptedIntake()))
    yield server[0]
    assert server[0].running == 0


@pytest.fixture
def http(server: tuple[ScriptedIntake, httpx.AsyncClient], intake: ScriptedIntake) -> httpx.AsyncClient:
    return server[1]


def error_of(response: httpx.Response) -> dict[str, Any]:
    assert response.headers["content-type"] == "application/json"
    (error,) = response.json().values()
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    return dict(error)


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"prompt": 5}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt.0"),
        ({"prompt": [1, "a"]}, "prompt.1"),
        ({"prompt": [-1]}, "prompt.0"),
        ({"prompt": [2**40]}, "prompt.0"),
        ({"prompt": ["x"] * 9}, "prompt"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": 2**33}, "max_tokens"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"min_p": 2}, "min_p"),
        ({"n": 0}, "n"),
        ({"n": 10**6}, "n"),
        ({"seed": 2**64}, "seed"),
        ({"stop": 5}, "stop"),
        ({"stop": [5]}, "stop.0"),
        ({"stop": ["x"] * 65}, "stop"),
        ({"logit_bias": {"a": 1}}, "logit_bias.a"),
        ({"logit_bias": {"1": 101}}, "logit_bias.1"),
        ({"logprobs": 21}, "logprobs"),
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 2}, "best_of"),
        ({"echo": True, "logprobs": 1}, "echo"),
        ({"timeout": 0}, "timeout"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"guided_json": "{"}, "guided_json"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
    ],
)
async def test_a_wrong_field_of_a_completion_is_named(
    http: httpx.AsyncClient, intake: ScriptedIntake, change: dict[str, Any], param: str
) -> None:
    response = await http.post("/v1/completions", json={**GOOD, **change})
    error = error_of(response)
    assert (response.status_code, error["type"], error["param"]) == (400, "invalid_request_error", param)
    assert intake.requests == []


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"content": "hi"}]}, "messages.0.role"),
        ({"messages": [{"role": "king", "content": "hi"}]}, "messages.0.role"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content.0"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages.0.content.0"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": 2}, "logprobs"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"max_completion_tokens": 2**33}, "max_completion_tokens"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": "maybe", "tools": [TOOL]}, "tool_choice"),
        ({"tool_choice": {"function": {"name": "g"}}, "tools": [TOOL]}, "tool_choice"),
        ({"tools": [{"type": "function"}]}, "tools.0.function"),
        (
            {"tools": [TOOL], "tool_choice": "required", "response_format": {"type": "json_object"}},
            "response_format",
        ),
    ],
)
async def test_a_wrong_field_of_a_chat_is_named(
    http: httpx.AsyncClient, intake: ScriptedIntake, change: dict[str, Any], param: str
) -> None:
    response = await http.post("/v1/chat/completions", json={**CHAT, **change})
    assert (response.status_code, error_of(response)["param"]) == (400, param)
    assert intake.requests == []


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"x"',
        b"\xff\xfe",
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "\xff"}',
        b"[" * 3000,
        b'{"prompt": "a", "temperature": NaN}',
        b'{"prompt": "a", "temperature": 1e999}',
    ],
)
async def test_what_is_not_json_is_a_bad_request(http: httpx.AsyncClient, body: bytes) -> None:
    response = await http.post("/v1/completions", content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400
    assert error_of(response)["type"] == "invalid_request_error"


async def test_only_json_is_read(http: httpx.AsyncClient, intake: ScriptedIntake) -> None:
    for media in ("text/plain", "application/x-www-form-urlencoded", ""):
        response = await http.post(
            "/v1/completions", content=b'{"prompt":"a"}', headers={"content-type": media}
        )
        assert response.status_code == 415
        assert "application/json" in error_of(response)["message"]
    assert intake.requests == []


async def test_unknown_fields_are_ignored(http: httpx.AsyncClient) -> None:
    response = await http.post("/v1/completions", json={**GOOD, "store": True, "metadata": {"a": "b"}})
    assert response.status_code == 200


async def test_a_large_body_is_refused_before_it_is_sent(http: httpx.AsyncClient) -> None:
    response = await http.post("/v1/completions", json={"prompt": "x" * 5000})
    assert response.status_code == 413
    assert "4096" in error_of(response)["message"]
    assert response.headers["connection"] == "close"


async def test_a_client_that_sends_a_large_body_to_its_end_reads_why(http: httpx.AsyncClient) -> None:
    async def chunked() -> AsyncIterator[bytes]:
        for _ in range(64):
            yield b"x" * (1 << 16)

    for content in (chunked(), b"x" * (1 << 22)):
        response = await http.post(
            "/v1/completions", content=content, headers={"content-type": "application/json"}
        )
        assert response.status_code == 413
        error_of(response)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nowhere", 404),
        ("POST", "/v1/embeddings", 404),
        ("GET", "/v1/completions", 405),
        ("DELETE", "/v1/models", 405),
        ("GET", "/v1/models/other", 404),
        ("GET", "/v1/models/../../etc/passwd", 404),
        ("GET", "/docs", 404),
    ],
)
async def test_what_is_not_there_is_said_in_the_same_shape(
    http: httpx.AsyncClient, method: str, path: str, status: int
) -> None:
    response = await http.request(method, path)
    assert response.status_code == status
    error_of(response)
    assert ("allow" in response.headers) == (status == 405)


@pytest.mark.parametrize(
    ("error", "status", "code", "retry_after"),
    [
        (InvalidRequest("wrong"), 400, None, None),
        (ContextTooLong("too long"), 400, "context_length_exceeded", None),
        (UnknownModel("unknown"), 404, "model_not_found", None),
        (Overloaded("busy", retry_after_s=1.2), 429, "rate_limit_exceeded", "2"),
        (Unavailable("starting"), 503, None, "1"),
        (WorkerLost("gone"), 503, None, "1"),
        (DeadlineExceeded("late"), 504, "deadline_exceeded", None),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_an_error_before_the_first_token_is_a_status(
    http: httpx.AsyncClient,
    intake: ScriptedIntake,
    error: PdserveError,
    status: int,
    code: str | None,
    retry_after: str | None,
    stream: bool,
) -> None:
    intake.script = (error,)
    response = await http.post("/v1/completions", json={**GOOD, "stream": stream})
    assert response.status_code == status
    assert (error_of(response)["message"], error_of(response)["code"]) == (error.message, code)
    assert response.headers.get("retry-after") == retry_after


SECRET = "/srv/secret/place.py"


@pytest.mark.parametrize(
    "error", [RuntimeError(SECRET), InternalError(SECRET), ConfigError(SECRET), KeyError(SECRET)]
)
@pytest.mark.parametrize("begun", [False, True])
async def test_nothing_of_the_servers_inside_reaches_the_client(
    http: httpx.AsyncClient, intake: ScriptedIntake, error: Exception, begun: bool
) -> None:
    intake.script = ("a", error) if begun else (error,)
    for path, body in (("/v1/completions", GOOD), ("/v1/chat/completions", CHAT)):
        for stream in (False, True):
            response = await http.post(path, json={**body, "stream": stream})
            assert response.status_code == (200 if stream and begun else 500)
            assert "secret" not in response.text
            assert "Traceback" not in response.text
            assert "server_error" in response.text


async def test_an_error_after_the_first_token_is_the_last_event(
    http: httpx.AsyncClient, intake: ScriptedIntake
) -> None:
    intake.script = ("a", WorkerLost("the worker died: retry"))
    response = await http.post("/v1/completions", json={**GOOD, "stream": True})
    events = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert response.status_code == 200
    assert len(events) == 2
    assert json.loads(events[0])["choices"][0]["text"] == "a"
    assert json.loads(events[1])["error"]["message"] == "the worker died: retry"


async def test_one_failing_prompt_fails_its_batch_and_ends_the_others(
    http: httpx.AsyncClient, intake: ScriptedIntake
) -> None:
    intake.script = ("a", Overloaded("busy"))
    response = await http.post("/v1/completions", json={"prompt": ["a", "b", "c"]})
    assert response.status_code == 429
    assert intake.running == 0


async def test_a_client_that_leaves_ends_its_requests_at_once_and_is_no_error(
    http: httpx.AsyncClient, intake: ScriptedIntake, caplog: pytest.LogCaptureFixture
) -> None:
    intake.hold = asyncio.Event()
    for body in ({"prompt": "a"}, {"prompt": ["a", "b"]}, {"prompt": "a", "n": 2}):
        for stream in (False, True):
            call = asyncio.create_task(http.post("/v1/completions", json={**body, "stream": stream}))
            async with asyncio.timeout(5):
                while intake.running < (2 if isinstance(body["prompt"], list) else 1):
                    await asyncio.sleep(0.001)
                call.cancel()
                while intake.running:
                    await asyncio.sleep(0.001)
    # The server is as before.
    intake.hold.set()
    assert (await http.post("/v1/completions", json=GOOD)).status_code == 200
    assert [record for record in caplog.records if record.levelname in ("WARNING", "ERROR")] == []


async def test_not_ready_is_a_503_and_health_is_not_concerned(
    http: httpx.AsyncClient, intake: ScriptedIntake
) -> None:
    assert (await http.get("/ready")).status_code == 200
    intake.ready = False
    response = await http.get("/ready")
    assert response.status_code == 503
    assert response.headers["retry-after"] == "1"
    error_of(response)
    assert (await http.get("/health")).json() == {"status": "ok"}
