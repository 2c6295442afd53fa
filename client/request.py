"""From the keywords of `generate` to the request message."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypedDict

from pdserve.client.values import ChatMessage
from pdserve.core.errors import InvalidRequest
from pdserve.core.types import ConstraintKind
from pdserve.proto import inference_pb2 as pb

Messages = Sequence[ChatMessage | Mapping[str, Any]]
"""A chat: ChatMessage values, or mappings with the keys that OpenAI's messages have: `role` and `content`,
and where they apply `name`, `tool_call_id` and `tool_calls`."""

_MESSAGE_KEYS = frozenset({"role", "content", "name", "tool_call_id", "tool_calls"})


@dataclass(frozen=True, slots=True)
class Prompt:
    """What is to be completed: exactly one of the three is not None."""

    text: str | None
    messages: Messages | None
    token_ids: Sequence[int] | None

    def __post_init__(self) -> None:
        forms = {"prompt": self.text, "messages": self.messages, "token_ids": self.token_ids}
        given = [name for name, value in forms.items() if value is not None]
        if len(given) != 1:
            got = " and ".join(given) or "none of them"
            raise InvalidRequest(f"got {got}: give exactly one of prompt, messages and token_ids")


class RequestOptions(TypedDict, total=False):
    """The keywords of `generate`; what is absent or None is the server's choice."""

    messages: Messages | None
    """A chat that the model's template turns into text."""
    tools: Sequence[Mapping[str, Any]] | None
    """OpenAI tool definitions, for the model's template; only with `messages`."""
    token_ids: Sequence[int] | None
    model: str
    """Needed only where the cluster serves several."""
    max_tokens: int | None
    min_tokens: int | None
    """Neither the end of the sequence nor a stop ends it before."""
    temperature: float | None
    """0 is greedy."""
    top_p: float | None
    top_k: int | None
    min_p: float | None
    """Tokens less likely than this share of the likeliest one are out."""
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    logit_bias: Mapping[int, float] | None
    """Token id to what is added to its logit; -100 bans it."""
    seed: int | None
    n: int | None
    """Choices over the same prompt."""
    stop: str | Sequence[str] | None
    """Texts that end the completion and are cut off it."""
    stop_token_ids: Sequence[int] | None
    ignore_eos: bool
    """Go on to max_tokens also past the model's end-of-sequence token."""
    logprobs: int | None
    """Report each sampled token's logprob and those of this many of the likeliest tokens."""
    json_schema: Mapping[str, Any] | str | None
    """A JSON Schema that the text must fulfil. Of this and the next four, at most one is given."""
    json_object: bool
    """The text must be a JSON object."""
    regex: str | None
    choices: Sequence[str] | None
    """The text must be one of these."""
    grammar: str | None
    """The text must belong to a Lark grammar."""
    request_id: str | None
    """A name to ask about the request by; the cluster makes one where none is given."""


def generate_request(
    prompt: str | None = None,
    *,
    messages: Messages | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
    token_ids: Sequence[int] | None = None,
    model: str = "",
    max_tokens: int | None = None,
    min_tokens: int | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    presence_penalty: float | None = None,
    frequency_penalty: float | None = None,
    logit_bias: Mapping[int, float] | None = None,
    seed: int | None = None,
    n: int | None = None,
    stop: str | Sequence[str] | None = None,
    stop_token_ids: Sequence[int] | None = None,
    ignore_eos: bool = False,
    logprobs: int | None = None,
    json_schema: Mapping[str, Any] | str | None = None,
    json_object: bool = False,
    regex: str | None = None,
    choices: Sequence[str] | None = None,
    grammar: str | None = None,
    request_id: str | None = None,
) -> pb.GenerateRequest:
    """Build the request. Ranges are the server's to check.

    Raises InvalidRequest for values that no field can hold, such as negative counts, and for contradictions.
    """
    given = Prompt(prompt, messages, token_ids)
    if tools is not None and messages is None:
        raise InvalidRequest("got tools without messages: only a chat's template can show tools to the model")
    with _encoding():
        request = pb.GenerateRequest(
            request_id=request_id or "",
            model=model,
            sampling=pb.Sampling(
                max_tokens=max_tokens,
                min_tokens=min_tokens,
                temperature=temperature,
                top_p=top_p,
                top_k=top_k,
                min_p=min_p,
                repetition_penalty=repetition_penalty,
                presence_penalty=presence_penalty,
                frequency_penalty=frequency_penalty,
                logit_bias=logit_bias or {},
                seed=seed,
                n=n,
                stop=(stop,) if isinstance(stop, str) else stop or (),
                stop_token_ids=stop_token_ids or (),
                ignore_eos=ignore_eos,
                logprobs=logprobs,
                constraint=_constraint(json_schema, json_object, regex, choices, grammar),
            ),
        )
        if given.text is not None:
            request.text = given.text
        elif given.messages is not None:
            request.chat.CopyFrom(_chat(given.messages, tools))
        else:
            request.token_ids.CopyFrom(pb.TokenIds(ids=given.token_ids or ()))
    return request


def tokenize_request(prompt: Prompt, model: str) -> pb.TokenizeRequest:
    """Build the request; token ids are refused, they are the answer."""
    if prompt.token_ids is not None:
        raise InvalidRequest("tokenize takes prompt or messages, token_ids are what it returns")
    with _encoding():
        if prompt.messages is not None:
            return pb.TokenizeRequest(model=model, chat=_chat(prompt.messages, None))
        return pb.TokenizeRequest(model=model, text=prompt.text or "")


@contextmanager
def _encoding() -> Iterator[None]:
    """Values that no field can hold are the caller's mistake."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise InvalidRequest(f"the request cannot be encoded: {error}") from error


def _constraint(
    json_schema: Mapping[str, Any] | str | None,
    json_object: bool,
    regex: str | None,
    choices: Sequence[str] | None,
    grammar: str | None,
) -> pb.Constraint | None:
    """The one constraint among the keywords. Raises InvalidRequest where there are several."""
    sources = {
        ConstraintKind.JSON_SCHEMA: json_schema if isinstance(json_schema, str) else _json(json_schema),
        ConstraintKind.JSON_OBJECT: "" if json_object else None,
        ConstraintKind.REGEX: regex,
        ConstraintKind.CHOICE: _json(None if choices is None else list(choices)),
        ConstraintKind.GRAMMAR: grammar,
    }
    if isinstance(choices, str):
        raise InvalidRequest("choices is one text: give a list of texts")
    given = {kind: source for kind, source in sources.items() if source is not None}
    if len(given) > 1:
        raise InvalidRequest(f"got {' and '.join(given)}: give at most one of {', '.join(ConstraintKind)}")
    for kind, source in given.items():
        return pb.Constraint(kind=kind, source=source)
    return None


def _json(value: object) -> str | None:
    return None if value is None else json.dumps(value, ensure_ascii=False)


def _chat(messages: Messages, tools: Sequence[Mapping[str, Any]] | None) -> pb.ChatMessages:
    if not messages:
        raise InvalidRequest("messages is empty: give at least one")
    return pb.ChatMessages(
        messages=[_chat_message(message) for message in messages],
        tools_json=_json(list(tools)) if tools else "",
    )


def _chat_message(message: ChatMessage | Mapping[str, Any]) -> pb.ChatMessage:
    if isinstance(message, ChatMessage):
        fields: Mapping[str, Any] = {
            "role": message.role,
            "content": message.content,
            "name": message.name,
            "tool_call_id": message.tool_call_id,
            "tool_calls": message.tool_calls,
        }
    else:
        fields = message
        if not isinstance(message, Mapping):
            raise InvalidRequest(f"a message is a {type(message).__name__}: give ChatMessage or a mapping")
        says_something = "content" in message or bool(message.get("tool_calls"))
        if not set(message) <= _MESSAGE_KEYS or "role" not in message or not says_something:
            raise InvalidRequest(
                f"a message has the keys {sorted(message)}: it must have role and content (or tool_calls), "
                "and may have name and tool_call_id, no others"
            )
    calls = fields.get("tool_calls")
    return pb.ChatMessage(
        role=fields["role"],
        content=fields.get("content") or "",
        name=fields.get("name") or "",
        tool_call_id=fields.get("tool_call_id") or "",
        tool_calls_json=_json(list(calls)) if calls else "",
    )
