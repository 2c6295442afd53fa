"""What OpenAI's own client reads: text, tools, log probabilities, usage and choices, streamed and whole."""

import json
from collections.abc import AsyncIterator, Iterable, Iterator
from typing import Any

import httpx
import openai
import pytest
import pytest_asyncio
from scripted_intake import MODEL, ScriptedIntake, served

from pdserve.core.types import ConstraintKind
from pdserve.router.openai.logprobs import TokenTexts

pytestmark = pytest.mark.asyncio(loop_scope="module")

USER = {"role": "user", "content": "hi"}
PARAMETERS = {"type": "object", "properties": {"city": {"$ref": "#/$defs/city"}}, "$defs": {"city": {}}}
TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {"name": "weather", "description": "Of a city", "parameters": PARAMETERS},
    },
    {"type": "function", "function": {"name": "noon"}},
]
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server() -> AsyncIterator[tuple[ScriptedIntake, openai.AsyncOpenAI, str]]:
    intake = ScriptedIntake()
    async with served(intake) as url, openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="-") as client:
        yield intake, client, url


@pytest.fixture
def intake(server: tuple[ScriptedIntake, openai.AsyncOpenAI, str]) -> Iterator[ScriptedIntake]:
    vars(server[0]).update(vars(ScriptedIntake()))
    yield server[0]
    assert server[0].running == 0


@pytest.fixture
def client(
    server: tuple[ScriptedIntake, openai.AsyncOpenAI, str], intake: ScriptedIntake
) -> openai.AsyncOpenAI:
    return server[1]


@pytest.fixture
def url(server: tuple[ScriptedIntake, openai.AsyncOpenAI, str], intake: ScriptedIntake) -> str:
    return server[2]


def cut(text: str, size: int = 3) -> list[str]:
    return [text[i : i + size] for i in range(0, len(text), size)]


class Streamed:
    """A chat stream, put together again."""

    def __init__(self) -> None:
        self.content = ""
        self.calls: list[list[str]] = []
        self.ids: list[str] = []
        self.reason: str | None = None
        self.roles: list[str] = []

    async def read(self, stream: Any) -> "Streamed":
        async for chunk in stream:
            (choice,) = chunk.choices
            if choice.delta.role:
                self.roles.append(choice.delta.role)
            self.content += choice.delta.content or ""
            for call in choice.delta.tool_calls or ():
                if call.id:
                    assert call.index == len(self.calls)
                    self.ids.append(call.id)
                    self.calls.append([call.function.name, ""])
                self.calls[call.index][1] += call.function.arguments or ""
            if choice.finish_reason:
                assert self.reason is None
                self.reason = choice.finish_reason
        return self


async def test_a_completion_is_the_same_in_both_forms(client: openai.AsyncOpenAI) -> None:
    whole = await client.completions.create(model=MODEL, prompt="a")
    assert whole.object == "text_completion"
    assert (whole.choices[0].text, whole.choices[0].finish_reason) == ("Hello", "stop")
    stream = await client.completions.create(model=MODEL, prompt="a", stream=True)
    chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].text for chunk in chunks) == "Hello"
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None, "stop"]
    assert all(chunk.usage is None for chunk in chunks)
    assert len({chunk.id for chunk in chunks}) == 1


async def test_usage_counts_the_prompt_once_and_every_choice(client: openai.AsyncOpenAI) -> None:
    usage = (await client.completions.create(model=MODEL, prompt=["a", "b"], n=3)).usage
    assert usage is not None
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (20, 30, 50)
    assert usage.prompt_tokens_details is not None
    assert usage.prompt_tokens_details.cached_tokens == 8


async def test_usage_comes_in_one_more_chunk_where_it_is_asked_for(client: openai.AsyncOpenAI) -> None:
    options: Any = {"include_usage": True}
    for stream in (
        await client.completions.create(model=MODEL, prompt="a", stream=True, stream_options=options),
        await client.chat.completions.create(
            model=MODEL, messages=[USER], stream=True, stream_options=options
        ),
    ):
        *chunks, last = [chunk async for chunk in stream]
        assert last.choices == []
        assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (10, 5)
        assert all(chunk.usage is None and chunk.choices for chunk in chunks)


async def test_choices_of_a_batch_are_numbered_through(
    client: openai.AsyncOpenAI, intake: ScriptedIntake
) -> None:
    whole = await client.completions.create(model=MODEL, prompt=[[1, 2], [3]], n=2)
    assert [choice.index for choice in whole.choices] == [0, 1, 2, 3]
    assert [list(request.token_ids.ids) for request in intake.requests] == [[1, 2], [3]]
    assert {request.request_id for request in intake.requests} == {f"{whole.id}-0", f"{whole.id}-1"}
    seen: dict[int, str] = {}
    async for chunk in await client.completions.create(model=MODEL, prompt=["a", "b"], n=2, stream=True):
        (choice,) = chunk.choices
        seen[choice.index] = seen.get(choice.index, "") + choice.text
    assert seen == dict.fromkeys(range(4), "Hello")


async def test_echo_puts_the_prompt_before_each_choice(client: openai.AsyncOpenAI) -> None:
    whole = await client.completions.create(model=MODEL, prompt=["ab", "cd"], echo=True, n=2)
    assert [choice.text for choice in whole.choices] == ["abHello", "abHello", "cdHello", "cdHello"]
    stream = await client.completions.create(model=MODEL, prompt=[104, 105], echo=True, stream=True)
    assert [chunk.choices[0].text async for chunk in stream] == ["hiHel", "lo"]


async def test_text_of_every_kind_survives_the_events(
    client: openai.AsyncOpenAI, intake: ScriptedIntake
) -> None:
    intake.script = ['"quoted"\\', "line\r\n\n\x00\x1f", "grüß 漢字 \U0001f600 \u2028 ", "data: [DONE]"]
    text = "".join(map(str, intake.script))
    stream = await client.completions.create(model=MODEL, prompt="a", stream=True)
    assert "".join([chunk.choices[0].text async for chunk in stream]) == text
    chat = await client.chat.completions.create(model=MODEL, messages=[USER], stream=True)  # type: ignore[list-item]
    assert (await Streamed().read(chat)).content == text
    assert (await client.completions.create(model=MODEL, prompt="a")).choices[0].text == text


async def test_every_sampling_field_reaches_the_intake(
    client: openai.AsyncOpenAI, intake: ScriptedIntake
) -> None:
    await client.completions.create(
        model=MODEL,
        prompt="a",
        max_tokens=7,
        temperature=0.5,
        top_p=0.25,
        seed=-1,
        n=2,
        stop=["x", "y"],
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        logit_bias={"5": -100},
        logprobs=3,
        extra_body={
            "top_k": 4,
            "min_p": 0.125,
            "repetition_penalty": 1.5,
            "min_tokens": 2,
            "ignore_eos": True,
            "stop_token_ids": [9],
            "timeout": 3.5,
        },
    )
    (request,) = intake.requests
    sampling = request.sampling
    shown = (sampling.max_tokens, sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p)
    assert shown == (7, 0.5, 0.25, 4, 0.125)
    assert (sampling.seed, sampling.n, sampling.min_tokens, sampling.ignore_eos) == (2**63 - 1, 2, 2, True)
    assert (list(sampling.stop), list(sampling.stop_token_ids)) == (["x", "y"], [9])
    penalties = (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty)
    assert penalties == (1.5, 0.5, -0.5)
    assert dict(sampling.logit_bias) == {5: -100}
    assert sampling.logprobs == 3
    assert intake.remaining[0] == pytest.approx(3.5, abs=0.5)


async def test_defaults_are_those_of_openai(client: openai.AsyncOpenAI, intake: ScriptedIntake) -> None:
    await client.completions.create(model=MODEL, prompt="a")
    await client.chat.completions.create(model=MODEL, messages=[USER])  # type: ignore[list-item]
    completion, chat = (request.sampling for request in intake.requests)
    assert (completion.max_tokens, completion.temperature) == (16, 1.0)
    assert (chat.HasField("max_tokens"), chat.temperature) == (False, 1.0)
    assert not completion.HasField("seed")
    assert not completion.HasField("logprobs")


@pytest.mark.parametrize(
    ("extra", "kind", "source"),
    [
        ({"response_format": {"type": "json_object"}}, ConstraintKind.JSON_OBJECT, None),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"a": 1}}}},
            ConstraintKind.JSON_SCHEMA,
            {"a": 1},
        ),
        ({"guided_json": '{"a": 1}'}, ConstraintKind.JSON_SCHEMA, {"a": 1}),
        ({"guided_choice": ["a", "b"]}, ConstraintKind.CHOICE, ["a", "b"]),
        ({"guided_regex": "[0-9]"}, ConstraintKind.REGEX, None),
        ({"structured_outputs": {"grammar": "start: A"}}, ConstraintKind.GRAMMAR, None),
        ({"structured_outputs": {"json": {}}}, ConstraintKind.JSON_SCHEMA, {}),
    ],
)
async def test_each_way_to_constrain_an_answer_arrives(
    client: openai.AsyncOpenAI, intake: ScriptedIntake, extra: Any, kind: str, source: object
) -> None:
    await client.chat.completions.create(model=MODEL, messages=[USER], extra_body=extra)  # type: ignore[list-item]
    constraint = intake.requests[0].sampling.constraint
    assert constraint.kind == kind
    assert source is None or json.loads(constraint.source) == source


async def test_log_probabilities_of_a_completion(client: openai.AsyncOpenAI) -> None:
    whole = (await client.completions.create(model=MODEL, prompt="a", logprobs=2)).choices[0].logprobs
    assert whole is not None
    assert whole.tokens == list("Hello")
    assert whole.token_logprobs == [-0.5] * 5
    assert whole.text_offset == [0, 1, 2, 3, 4]
    assert whole.top_logprobs is not None
    assert whole.top_logprobs[0] == {"a": 0.0, "b": -1.0, "H": -0.5}
    pieces = [
        chunk.choices[0].logprobs
        async for chunk in await client.completions.create(model=MODEL, prompt="a", logprobs=2, stream=True)
    ]
    assert [token for piece in pieces if piece for token in piece.tokens or ()] == list("Hello")
    assert [o for piece in pieces if piece for o in piece.text_offset or ()] == [0, 1, 2, 3, 4]


async def test_log_probabilities_of_a_chat(client: openai.AsyncOpenAI, intake: ScriptedIntake) -> None:
    intake.script = ["ü"]
    asked: Any = {"model": MODEL, "messages": [USER], "logprobs": True, "top_logprobs": 1}
    logprobs = (await client.chat.completions.create(**asked)).choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    (position,) = logprobs.content
    assert (position.token, position.logprob, position.bytes) == ("ü", -0.5, list("ü".encode()))
    assert [(top.token, top.logprob) for top in position.top_logprobs] == [("a", 0.0)]
    async for chunk in await client.chat.completions.create(**asked, stream=True):
        piece = chunk.choices[0].logprobs
        assert piece is not None
        assert piece.content == logprobs.content


async def test_the_space_that_begins_a_token_is_shown() -> None:
    class DropsFirstSpace:
        """As tokenizers in the manner of Llama 2 do."""

        def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
            return "".join({1: " a", 2: "b"}[token] for token in ids).removeprefix(" ")

    texts = TokenTexts(DropsFirstSpace())
    assert [texts.text(1), texts.text(2), texts.text(1)] == [" a", "b", " a"]


async def test_a_conversation_with_calls_becomes_the_models_chat(
    client: openai.AsyncOpenAI, intake: ScriptedIntake
) -> None:
    called = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city":"x"}'}}
    messages: list[Any] = [
        {"role": "developer", "content": "Be short."},
        {"role": "user", "name": "Ada", "content": [{"type": "text", "text": t} for t in ("one", "two")]},
        {"role": "assistant", "content": None, "tool_calls": [called]},
        {"role": "tool", "tool_call_id": "1", "content": "rain"},
    ]
    await client.chat.completions.create(model=MODEL, messages=messages, tools=TOOLS)
    chat = intake.requests[0].chat
    assert [m.role for m in chat.messages] == ["system", "user", "assistant", "tool"]
    assert [m.content for m in chat.messages] == ["Be short.", "one\ntwo", "", "rain"]
    assert (chat.messages[1].name, chat.messages[3].tool_call_id) == ("Ada", "1")
    assert json.loads(chat.messages[2].tool_calls_json) == [called]
    assert json.loads(chat.tools_json) == TOOLS


async def test_calls_are_found_in_both_forms(client: openai.AsyncOpenAI, intake: ScriptedIntake) -> None:
    intake.script = cut("Let me see.\n" + CALL + "\n" + CALL + "\n")
    asked: Any = {"model": MODEL, "messages": [USER], "tools": TOOLS}
    choice = (await client.chat.completions.create(**asked)).choices[0]
    assert (choice.message.content, choice.finish_reason) == ("Let me see.", "tool_calls")
    called = choice.message.tool_calls or []
    found = [(call.type, call.function.name, call.function.arguments) for call in called]  # type: ignore[union-attr]
    assert found == [("function", "weather", '{"city": "Paris"}')] * 2
    assert len({call.id for call in called}) == 2
    streamed = await Streamed().read(await client.chat.completions.create(**asked, stream=True))
    assert (streamed.content, streamed.reason, streamed.roles) == ("Let me see.", "tool_calls", ["assistant"])
    assert streamed.calls == [["weather", '{"city": "Paris"}']] * 2
    assert len(set(streamed.ids)) == 2


async def test_without_parallel_calls_there_is_one(
    client: openai.AsyncOpenAI, intake: ScriptedIntake
) -> None:
    intake.script = cut(CALL + CALL)
    asked: Any = {"model": MODEL, "messages": [USER], "tools": TOOLS, "parallel_tool_calls": False}
    message = (await client.chat.completions.create(**asked)).choices[0].message
    assert (message.content, len(message.tool_calls or ())) == (None, 1)


async def test_tool_choice_none_shows_no_tools_and_looks_for_no_calls(
    client: openai.AsyncOpenAI, intake: ScriptedIntake
) -> None:
    intake.script = [CALL]
    asked: Any = {"model": MODEL, "messages": [USER], "tools": TOOLS, "tool_choice": "none"}
    choice = (await client.chat.completions.create(**asked)).choices[0]
    assert (choice.message.content, choice.message.tool_calls, choice.finish_reason) == (CALL, None, "stop")
    assert intake.requests[0].chat.tools_json == ""


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "weather"}}], ids=["any", "named"]
)
async def test_a_demanded_call_is_a_constraint_and_the_whole_answer(
    client: openai.AsyncOpenAI, intake: ScriptedIntake, choice: Any
) -> None:
    intake.script = cut('{"name":"weather","arguments":{"city":1}}')
    asked: Any = {"model": MODEL, "messages": [USER], "tools": TOOLS, "tool_choice": choice}
    streamed = await Streamed().read(await client.chat.completions.create(**asked, stream=True))
    assert (streamed.calls, streamed.content, streamed.reason) == (
        [["weather", '{"city":1}']],
        "",
        "tool_calls",
    )
    constraint = intake.requests[0].sampling.constraint
    assert constraint.kind == ConstraintKind.JSON_SCHEMA
    schema = json.loads(constraint.source)
    assert schema["$defs"] == {"city": {}}
    calls = schema.get("anyOf", [schema])
    names = [call["properties"]["name"]["const"] for call in calls]
    assert names == (["weather", "noon"] if choice == "required" else ["weather"])
    assert all(call["properties"]["arguments"]["type"] == "object" for call in calls)


async def test_a_call_cut_off_by_the_length_says_so(
    client: openai.AsyncOpenAI, intake: ScriptedIntake
) -> None:
    intake.script, intake.finish_reason = cut(CALL[:60]), "length"
    choice = (
        await client.chat.completions.create(model=MODEL, messages=[USER], tools=TOOLS)  # type: ignore[list-item]
    ).choices[0]
    assert choice.finish_reason == "length"
    (call,) = choice.message.tool_calls or ()
    assert call.function.arguments == '{"city": "Paris'  # type: ignore[union-attr]


async def test_models_version_and_metrics(client: openai.AsyncOpenAI, url: str) -> None:
    assert [model.id async for model in client.models.list()] == [MODEL]
    assert (await client.models.retrieve(MODEL)).id == MODEL
    await client.completions.create(model=MODEL, prompt="a")
    async with httpx.AsyncClient(base_url=url) as http:
        assert (await http.get("/version")).json()["version"]
        await http.post("/v1/completions", json={})
        text = (await http.get("/metrics")).text
    lines = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(lines['pdserve_requests_total{code="200"}']) >= 1
    assert float(lines['pdserve_requests_total{code="400"}']) >= 1
    assert float(lines["pdserve_requests_in_flight"]) == 0
    assert float(lines["pdserve_time_to_first_token_seconds_count"]) >= 1
    assert float(lines['pdserve_kv_cache_usage_ratio{worker="decode-0"}']) == 1 / 8
    assert float(lines['pdserve_kv_cache_blocks{state="free",worker="decode-0"}']) == 5


async def test_the_only_model_need_not_be_named(url: str, intake: ScriptedIntake) -> None:
    async with httpx.AsyncClient(base_url=url) as http:
        answer = (await http.post("/v1/completions", json={"prompt": "a"})).json()
    assert (answer["model"], intake.requests[0].model) == (MODEL, MODEL)


async def test_chunks_are_one_event_each_and_end_with_done(url: str, intake: ScriptedIntake) -> None:
    async with httpx.AsyncClient(base_url=url) as http:
        response = await http.post("/v1/completions", json={"prompt": "a", "stream": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["x-request-id"] == intake.requests[0].request_id
    *events, done, rest = response.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    for event in events:
        chunk = json.loads(event.removeprefix("data: "))
        assert set(chunk) == {"id", "object", "created", "model", "choices"}
