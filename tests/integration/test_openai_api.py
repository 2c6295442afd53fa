"""The official `openai` client, unmodified, on a whole cluster: sync and async, good and bad requests."""

import asyncio
import contextlib
import dataclasses
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import pytest_asyncio
from stack import Stack, stack, tiny_config

from pdserve.cluster.redis_server import RedisServer
from pdserve.core.types import Role

pytestmark = pytest.mark.asyncio(loop_scope="module")

LONG = "A prompt of several blocks, which a prefill worker computes and a decode worker fetches. " * 2
USER: Any = [{"role": "user", "content": "hello"}]
TEMPLATE = (
    "{% if tools %}tools: {{ tools | tojson }}{{ '\\n' }}{% endif %}"
    "{% for m in messages %}{{ m.role }}: {{ m.content }}"
    "{% for call in m.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}"
    "{{ '\\n' }}{% endfor %}assistant: "
)
TOOLS: Any = [
    {
        "type": "function",
        "function": {
            "name": "pick",
            "parameters": {
                "type": "object",
                "properties": {"digit": {"enum": [1, 2]}},
                "required": ["digit"],
                "additionalProperties": False,
            },
        },
    }
]


@pytest.fixture(scope="module")
def chat_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a chat template that shows tools and calls."""
    folder = tmp_path_factory.mktemp("openai") / "model"
    folder.mkdir()
    for file in tiny_model.iterdir():
        (folder / file.name).symlink_to(file)
    settings = json.loads((tiny_model / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": TEMPLATE}))
    return folder


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster(chat_model: Path, redis: RedisServer) -> AsyncIterator[Stack]:
    """One prefill and one decode worker; at the end nobody holds anything."""
    config = tiny_config(chat_model, redis)
    config = dataclasses.replace(config, router=dataclasses.replace(config.router, http_port=0))
    async with stack(config, {"prefill-0": Role.PREFILL, "decode-0": Role.DECODE}) as running:
        yield running


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client(cluster: Stack) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=url_of(cluster), api_key="none", max_retries=0) as made:
        yield made


def url_of(cluster: Stack) -> str:
    assert cluster.router is not None
    return f"http://127.0.0.1:{cluster.router.http_port}/v1"


async def test_the_model_is_listed(cluster: Stack, client: openai.AsyncOpenAI) -> None:
    (model,) = [model async for model in client.models.list()]
    assert model.id == cluster.config.model
    assert (await client.models.retrieve(model.id)).id == model.id


async def test_text_and_token_ids_give_what_grpc_gives(cluster: Stack, client: openai.AsyncOpenAI) -> None:
    assert cluster.client is not None
    reference = await cluster.client.generate(LONG, max_tokens=24, ignore_eos=True)
    asked: Any = {"model": cluster.config.model, "max_tokens": 24, "temperature": 0}
    asked["extra_body"] = {"ignore_eos": True}
    for prompt in (LONG, list(await cluster.client.tokenize(LONG))):
        whole = await client.completions.create(prompt=prompt, **asked)
        assert (whole.choices[0].text, whole.choices[0].finish_reason) == (reference.text, "length")
        streamed = await client.completions.create(prompt=prompt, stream=True, **asked)
        assert "".join([chunk.choices[0].text async for chunk in streamed]) == reference.text


async def test_a_second_time_the_prompt_is_cached(cluster: Stack, client: openai.AsyncOpenAI) -> None:
    asked: Any = {"model": cluster.config.model, "prompt": "cached? " + LONG, "max_tokens": 4}
    for least in (0, 16):
        usage = (await client.completions.create(**asked)).usage
        assert usage is not None
        assert usage.prompt_tokens == len("cached? " + LONG)
        assert usage.prompt_tokens_details is not None
        assert (usage.prompt_tokens_details.cached_tokens or 0) >= least


async def test_a_batch_answers_each_prompt_as_alone(cluster: Stack, client: openai.AsyncOpenAI) -> None:
    asked: Any = {"model": cluster.config.model, "max_tokens": 6, "temperature": 0}
    prompts = [f"{number}: {LONG}" for number in range(6)]
    together = await client.completions.create(prompt=prompts, **asked)
    for choice, prompt in zip(together.choices, prompts, strict=True):
        assert choice.text == (await client.completions.create(prompt=prompt, **asked)).choices[0].text


async def test_a_chat_is_the_models_template_completed(cluster: Stack, client: openai.AsyncOpenAI) -> None:
    asked: Any = {"model": cluster.config.model, "max_tokens": 12, "temperature": 0}
    as_text = await client.completions.create(prompt="user: hello\nassistant: ", **asked)
    whole = await client.chat.completions.create(messages=USER, **asked)
    assert whole.choices[0].message.content == as_text.choices[0].text
    assert whole.choices[0].message.role == "assistant"
    options: Any = {"include_usage": True}
    stream = await client.chat.completions.create(messages=USER, stream=True, stream_options=options, **asked)
    *chunks, last = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == as_text.choices[0].text
    assert last.usage == whole.usage


async def test_the_same_seed_gives_the_same_text(cluster: Stack, client: openai.AsyncOpenAI) -> None:
    asked: Any = {"model": cluster.config.model, "prompt": LONG, "max_tokens": 16, "temperature": 1.5}
    first, again, other = [
        (await client.completions.create(seed=seed, **asked)).choices[0].text for seed in (7, 7, 8)
    ]
    assert first == again
    assert first != other


async def test_choices_differ_and_each_says_its_tokens(cluster: Stack, client: openai.AsyncOpenAI) -> None:
    asked: Any = {"model": cluster.config.model, "prompt": LONG, "max_tokens": 16, "temperature": 1.5}
    asked["extra_body"] = {"ignore_eos": True}
    whole = await client.completions.create(n=3, seed=1, **asked)
    assert len({choice.text for choice in whole.choices}) == 3
    assert whole.usage is not None
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (len(LONG), 48)
    texts = dict.fromkeys(range(3), "")
    async for chunk in await client.completions.create(n=3, seed=1, stream=True, **asked):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert [texts[choice.index] for choice in whole.choices] == [choice.text for choice in whole.choices]


async def test_a_stop_text_is_cut_off(cluster: Stack, client: openai.AsyncOpenAI) -> None:
    asked: Any = {"model": cluster.config.model, "prompt": LONG, "max_tokens": 24, "temperature": 0}
    asked["extra_body"] = {"ignore_eos": True}
    text = (await client.completions.create(**asked)).choices[0].text
    stop = text[8:11]
    stopped = (await client.completions.create(stop=[stop], **asked)).choices[0]
    assert (stopped.text, stopped.finish_reason) == (text[: text.index(stop)], "stop")


async def test_log_probabilities_say_that_greedy_takes_the_likeliest(
    cluster: Stack, client: openai.AsyncOpenAI
) -> None:
    asked: Any = {"model": cluster.config.model, "messages": USER, "max_tokens": 8, "temperature": 0}
    choice = (await client.chat.completions.create(logprobs=True, top_logprobs=3, **asked)).choices[0]
    assert choice.logprobs is not None
    assert choice.logprobs.content
    for position in choice.logprobs.content:
        assert position.logprob <= 0
        assert len(position.top_logprobs) == 3
        assert position.top_logprobs[0].logprob == position.logprob


async def test_a_json_schema_is_kept(cluster: Stack, client: openai.AsyncOpenAI) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"]}
    schema["additionalProperties"] = False
    wanted: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    asked: Any = {"model": cluster.config.model, "messages": USER, "max_tokens": 400, "seed": 1}
    answer = await client.chat.completions.create(response_format=wanted, **asked)
    assert answer.choices[0].finish_reason == "stop"
    assert json.loads(answer.choices[0].message.content or "")["a"] in (1, 2)


async def test_an_answer_in_a_chat_may_fill_the_context(cluster: Stack, client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(
        model=cluster.config.model,
        messages=[{"role": "user", "content": "x" * 1800}],
        extra_body={"ignore_eos": True},
    )
    (model,) = [model async for model in client.models.list()]
    assert answer.usage is not None
    assert answer.usage.total_tokens == model.model_extra["max_model_len"]  # type: ignore[index]
    assert answer.choices[0].finish_reason == "length"


@pytest.mark.parametrize("stream", [False, True])
async def test_a_required_call_is_a_call(cluster: Stack, client: openai.AsyncOpenAI, stream: bool) -> None:
    asked: Any = {
        "model": cluster.config.model,
        "messages": USER,
        "max_tokens": 400,
        "seed": 1,
        "tools": TOOLS,
    }
    answer: Any = await client.chat.completions.create(tool_choice="required", stream=stream, **asked)
    if stream:
        name, arguments, reason = "", "", None
        async for chunk in answer:
            for call in chunk.choices[0].delta.tool_calls or ():
                name += call.function.name or ""
                arguments += call.function.arguments or ""
            reason = chunk.choices[0].finish_reason or reason
    else:
        (call,) = answer.choices[0].message.tool_calls
        name, arguments, reason = call.function.name, call.function.arguments, answer.choices[0].finish_reason
    assert (name, reason) == ("pick", "tool_calls")
    assert json.loads(arguments)["digit"] in (1, 2)


async def test_the_models_own_call_is_found(cluster: Stack, client: openai.AsyncOpenAI) -> None:
    pattern = r'so: <tool_call>\{"name": "pick", "arguments": \{"digit": [12]\}\}</tool_call>'
    asked: Any = {
        "model": cluster.config.model,
        "messages": USER,
        "max_tokens": 400,
        "seed": 1,
        "tools": TOOLS,
    }
    answer = await client.chat.completions.create(extra_body={"guided_regex": pattern}, **asked)
    message = answer.choices[0].message
    assert message.content == "so:"
    (call,) = message.tool_calls or ()
    arguments = call.function.arguments  # type: ignore[union-attr]
    assert json.loads(arguments)["digit"] in (1, 2)
    history = [*USER, message.model_dump(exclude_none=True)]
    history.append({"role": "tool", "tool_call_id": call.id, "content": "ok"})
    again = await client.chat.completions.create(**{**asked, "messages": history, "max_tokens": 4})
    assert again.usage is not None
    assert answer.usage is not None
    assert again.usage.prompt_tokens > answer.usage.prompt_tokens


BAD: dict[str, tuple[dict[str, Any], type[openai.APIStatusError]]] = {
    "unknown model": ({"model": "other", "prompt": "a"}, openai.NotFoundError),
    "too long": ({"prompt": "a" * 3000}, openai.BadRequestError),
    "too many tokens": ({"prompt": "a", "max_tokens": 5000}, openai.BadRequestError),
    "unknown token": ({"prompt": [70000]}, openai.BadRequestError),
    "temperature": ({"prompt": "a", "temperature": -1}, openai.BadRequestError),
    "schema": (
        {"prompt": "a", "extra_body": {"guided_json": {"type": "no such type"}}},
        openai.BadRequestError,
    ),
    "time": (
        {"prompt": "a", "max_tokens": 1500, "extra_body": {"timeout": 0.05, "ignore_eos": True}},
        openai.InternalServerError,
    ),
}


@pytest.mark.parametrize("case", BAD)
async def test_a_bad_request_raises_the_clients_own_exception(
    cluster: Stack, client: openai.AsyncOpenAI, case: str
) -> None:
    asked, kind = BAD[case]
    with pytest.raises(kind) as caught:
        await client.completions.create(**{"model": cluster.config.model, **asked})
    assert caught.value.type
    assert "Traceback" not in caught.value.message


async def test_the_sync_client_does_all_of_this_in_a_thread(cluster: Stack) -> None:
    def calls() -> tuple[str, str, str]:
        with openai.OpenAI(base_url=url_of(cluster), api_key="none", max_retries=0) as client:
            asked: Any = {"model": cluster.config.model, "max_tokens": 8, "temperature": 0}
            whole = client.completions.create(prompt=LONG, **asked).choices[0].text
            streamed = "".join(
                chunk.choices[0].text
                for chunk in client.completions.create(prompt=LONG, stream=True, **asked)
            )
            chat = client.chat.completions.create(messages=USER, **asked).choices[0].message.content
            with pytest.raises(openai.NotFoundError):
                client.completions.create(model="other", prompt="a")
            return whole, streamed, str(chat)

    whole, streamed, chat = await asyncio.to_thread(calls)
    assert whole == streamed
    assert chat


async def test_closing_a_stream_frees_every_block(cluster: Stack, client: openai.AsyncOpenAI) -> None:
    asked: Any = {"model": cluster.config.model, "prompt": LONG, "max_tokens": 1500}
    asked["extra_body"] = {"ignore_eos": True}
    for n in (1, 2):
        stream = await client.completions.create(stream=True, n=n, **asked)
        async for _ in stream:
            break
        await stream.close()
        await cluster.settled()
    # Without a stream, and a batch: whoever waits for the whole answer and leaves.
    for prompt in (LONG, [LONG, "b" + LONG]):
        call = asyncio.create_task(client.completions.create(**{**asked, "prompt": prompt}))
        worker = cluster.workers["decode-0"]
        async with asyncio.timeout(20):
            while not worker.decode.in_flight():
                await asyncio.sleep(0.005)
        call.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await call
        await cluster.settled()
    assert cluster.router is not None
    assert cluster.router.gate.admission.in_flight == 0
    async with httpx.AsyncClient() as http, asyncio.timeout(20):
        while busy_gauges((await http.get(url_of(cluster).removesuffix("/v1") + "/metrics")).text):
            await asyncio.sleep(cluster.config.session.heartbeat_s)  # they are of the last heartbeat


def busy_gauges(text: str) -> list[str]:
    """What shows a request that runs, or memory that one holds."""
    names = ("_in_flight", "num_requests", "kv_cache_usage", 'state="held"', 'state="reserved"')
    found = [line for line in text.splitlines() if any(name in line for name in names) and line[0] != "#"]
    assert len(found) >= len(names)
    return [line for line in found if float(line.rsplit(" ", 1)[1])]


async def test_a_taken_port_is_a_configuration_error_by_its_name(cluster: Stack) -> None:
    from pdserve.core.errors import ConfigError
    from pdserve.router.openai.http_server import HttpServer

    assert cluster.router is not None
    port = cluster.router.http_port
    assert port is not None

    async def app(scope: object, receive: object, send: object) -> None: ...

    with pytest.raises(ConfigError, match=r"router\.http_port"):
        await HttpServer(app, "127.0.0.1", port, grace_s=1).start()
