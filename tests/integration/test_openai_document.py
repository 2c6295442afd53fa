"""The served OpenAPI document is true: what it allows never breaks the server, what it forbids is refused."""

import asyncio
import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import hypothesis
import pytest
import schemathesis
from schemathesis import GenerationMode
from schemathesis.checks import (
    content_type_conformance,
    negative_data_rejection,
    not_a_server_error,
    response_schema_conformance,
    status_code_conformance,
)
from stack import Stack, stack, tiny_config

from pdserve.cluster.redis_server import RedisServer
from pdserve.core.types import Role

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    negative_data_rejection,
]
HANG_S = 20.0
"""Far longer than any of these requests takes."""
MOST_TOKENS = 8
MODES = (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)


CONSTRAINTS = (
    "response_format",
    "structured_outputs",
    "guided_json",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
)


def likely(body: Any, model: str) -> Any:
    """A body that the schema allows, with most of what no schema can say set right, and cheap to answer.

    `timeout` goes, as it ends in 504 by right. JSON Schema takes 1.0 for an integer; OpenAI and we do not.
    """
    body = integers(body)
    if not isinstance(body, dict):
        return body
    for name, most in (("max_tokens", MOST_TOKENS), ("max_completion_tokens", MOST_TOKENS), ("n", 2)):
        if body.get(name):
            body[name] = min(body[name], most)
    if "messages" in body:
        body.setdefault("max_tokens", MOST_TOKENS)
        body["messages"] = [{**message, "content": "text"} for message in body["messages"]]
        if body.get("top_logprobs") is not None:
            body["logprobs"] = True
    for name in ("timeout", "best_of", "suffix", "min_tokens"):
        body.pop(name, None)
    for name in [name for name in CONSTRAINTS if body.get(name)][1:]:
        del body[name]
    if body.get("logit_bias"):
        body["logit_bias"] = {str(int(key) % 256): bias for key, bias in body["logit_bias"].items()}
    if isinstance(body.get("prompt"), list):
        body["prompt"] = in_vocabulary(body["prompt"])
    if len(body.get("model") or "") % 4 != 3:
        body["model"] = model
    return body


def in_vocabulary(prompt: Any) -> Any:
    """Token ids below 256, in whatever they are nested."""
    if isinstance(prompt, list):
        return [in_vocabulary(part) for part in prompt]
    return prompt % 256 if isinstance(prompt, int) else prompt


def integers(value: Any) -> Any:
    """1 for 1.0, everywhere."""
    match value:
        case dict():
            return {key: integers(inner) for key, inner in value.items()}
        case list():
            return [integers(inner) for inner in value]
        case float() if value.is_integer():
            return int(value)
        case _:
            return value


def attack(document: dict[str, Any], url: str, model: str, examples: int) -> Counter[int]:
    """Calls every operation with `examples` generated cases of each mode; the statuses that came back."""
    statuses: Counter[int] = Counter()
    for operation in (
        result.ok() for result in schemathesis.openapi.from_dict(document).get_all_operations()
    ):
        for mode in MODES if operation.body else MODES[:1]:
            positive = mode is GenerationMode.POSITIVE
            statuses += attack_one(operation, positive, url, model, examples)
    return statuses


def attack_one(operation: Any, positive: bool, url: str, model: str, examples: int) -> Counter[int]:
    """One operation; `positive`: with what the document allows, else with what it forbids."""
    statuses: Counter[int] = Counter()
    mode = GenerationMode.POSITIVE if positive else GenerationMode.NEGATIVE

    @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
    @hypothesis.settings(
        max_examples=examples,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    def call(case: schemathesis.Case) -> None:
        if positive and operation.body:
            case.body = likely(case.body, model)
        response = case.call(base_url=url, timeout=HANG_S)
        statuses[response.status_code] += 1
        assert "Traceback" not in response.text
        case.validate_response(response, checks=CHECKS)

    call()
    return statuses


async def document_of(cluster: Stack) -> tuple[dict[str, Any], str]:
    assert cluster.router is not None
    url = f"http://127.0.0.1:{cluster.router.http_port}"
    async with httpx.AsyncClient(base_url=url) as http:
        return dict((await http.get("/openapi.json")).json()), url


async def survives(model: Path, redis: RedisServer, examples: int) -> None:
    config = tiny_config(model, redis)
    config = dataclasses.replace(config, router=dataclasses.replace(config.router, http_port=0))
    async with stack(config, {"prefill-0": Role.PREFILL, "decode-0": Role.DECODE}) as cluster:
        document, url = await document_of(cluster)
        assert set(document["paths"]) >= {"/v1/completions", "/v1/chat/completions", "/v1/models", "/ready"}
        statuses = await asyncio.to_thread(attack, document, url, config.model, examples)
        # It went deep: some were served, and every kind of refusal is one that the document names.
        assert min(statuses[200], statuses[400]) >= examples
        assert set(statuses) <= {200, 400, 404, 405, 413, 415, 429}
        # The cluster goes on, and at the end of the stack every block is accounted for.
        assert cluster.client is not None
        assert (await cluster.client.generate("still here", max_tokens=2, ignore_eos=True)).token_ids


async def test_generated_requests_never_break_the_server(tiny_model: Path, redis: RedisServer) -> None:
    await survives(tiny_model, redis, 20)


@pytest.mark.full
@pytest.mark.timeout(1200)
async def test_many_generated_requests_never_break_the_server(tiny_model: Path, redis: RedisServer) -> None:
    await survives(tiny_model, redis, 500)
