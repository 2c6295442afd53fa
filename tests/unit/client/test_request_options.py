"""From keywords to the message: every option reaches its field, contradictions are refused before a call."""

import json
import typing
from typing import Any

import pytest

from pdserve.client import ChatMessage, RequestOptions
from pdserve.client.request import generate_request
from pdserve.core.errors import InvalidRequest
from pdserve.core.types import ConstraintKind
from pdserve.proto.sampling import decode

PLAIN: dict[str, Any] = {
    "max_tokens": 9,
    "min_tokens": 2,
    "temperature": 0.5,
    "top_p": 0.25,
    "top_k": 4,
    "min_p": 0.125,
    "repetition_penalty": 1.5,
    "presence_penalty": -0.5,
    "frequency_penalty": 0.75,
    "seed": 2**63,
    "n": 3,
    "logprobs": 0,
    "ignore_eos": True,
}


@pytest.mark.parametrize("name", sorted(PLAIN))
def test_a_number_reaches_its_field_and_no_other(name: str) -> None:
    options: Any = {name: PLAIN[name]}
    assert getattr(decode(generate_request("a", **options).sampling), name) == PLAIN[name]
    fields = generate_request("a", **options).sampling.ListFields()
    assert [field.name for field, _ in fields] == [name]


def test_lists_reach_their_fields() -> None:
    sampling = decode(
        generate_request("a", logit_bias={7: -100, 3: 1.5}, stop=["x", "yz"], stop_token_ids=[5]).sampling
    )
    assert sampling.logit_bias == ((3, 1.5), (7, -100))
    assert sampling.stop == ("x", "yz")
    assert sampling.stop_token_ids == (5,)
    assert decode(generate_request("a", stop="word").sampling).stop == ("word",)


SCHEMA = {"type": "object", "properties": {"ü": {"type": "integer"}}}


@pytest.mark.parametrize(
    ("options", "kind", "source"),
    [
        ({"json_schema": SCHEMA}, ConstraintKind.JSON_SCHEMA, json.dumps(SCHEMA, ensure_ascii=False)),
        ({"json_schema": "{}"}, ConstraintKind.JSON_SCHEMA, "{}"),
        ({"json_object": True}, ConstraintKind.JSON_OBJECT, ""),
        ({"regex": "a+"}, ConstraintKind.REGEX, "a+"),
        ({"choices": ("yes", "no")}, ConstraintKind.CHOICE, '["yes", "no"]'),
        ({"grammar": 'start: "a"'}, ConstraintKind.GRAMMAR, 'start: "a"'),
    ],
)
def test_a_keyword_becomes_the_constraint(options: Any, kind: ConstraintKind, source: str) -> None:
    constraint = decode(generate_request("a", **options).sampling).constraint
    assert constraint is not None
    assert (constraint.kind, constraint.source) == (kind, source)


def test_a_chat_carries_tools_and_what_they_answered() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "time", "arguments": "{}"}}
    tool = {"type": "function", "function": {"name": "time"}}
    messages: list[Any] = [
        {"role": "user", "content": "what time is it?", "name": "ann"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        ChatMessage("tool", "noon", tool_call_id="c1"),
    ]
    chat = generate_request(messages=messages, tools=[tool]).chat
    user, assistant, answer = chat.messages
    assert (user.name, user.content) == ("ann", "what time is it?")
    assert (assistant.content, json.loads(assistant.tool_calls_json)) == ("", [call])
    assert (answer.role, answer.content, answer.tool_call_id) == ("tool", "noon", "c1")
    assert json.loads(chat.tools_json) == [tool]


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"prompt": "a", "regex": "a", "choices": ["a"]}, "regex and choice: give at most one"),
        ({"prompt": "a", "choices": "yes"}, "choices is one text"),
        ({"prompt": "a", "tools": []}, "tools without messages"),
        ({"messages": [{"role": "assistant"}]}, "role and content"),
        ({"messages": [{"role": "user", "content": "a", "mood": "good"}]}, "mood"),
        ({"prompt": "a", "logit_bias": {-1: 1.0}}, "cannot be encoded"),
        ({"prompt": "a", "stop": ["\ud800"]}, "cannot be encoded"),
        ({"prompt": "a", "json_schema": {"enum": {1, 2}}}, "cannot be encoded"),
    ],
)
def test_a_contradiction_is_refused(options: Any, complaint: str) -> None:
    with pytest.raises(InvalidRequest, match=complaint):
        generate_request(**options)


def test_the_documented_options_are_the_accepted_ones() -> None:
    accepted = typing.get_type_hints(generate_request)
    assert set(RequestOptions.__annotations__) == set(accepted) - {"prompt", "return"}
