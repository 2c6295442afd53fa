"""`POST /v1/chat/completions`: from its fields to a generation request, and from chunks to its answers."""

import json
import secrets
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from json.encoder import encode_basestring as quote
from typing import Any

from starlette.responses import Response

from pdserve.core.request_limits import RANGES
from pdserve.proto import inference_pb2 as pb
from pdserve.router.openai.answers import EventAnswer, WholeAnswer
from pdserve.router.openai.chat_prompt import chat_of
from pdserve.router.openai.chat_schema import ChatRequest
from pdserve.router.openai.errors import BadField
from pdserve.router.openai.gateway import Gateway
from pdserve.router.openai.heading import Heading
from pdserve.router.openai.logprobs import ChatLogprobs
from pdserve.router.openai.sampling import check_range, set_constraint, to_sampling
from pdserve.router.openai.tool_calls import CallDelta, Delta, ToolCallParser
from pdserve.router.openai.tool_choice import call_constraint, demanded, may_call

CHUNK = "chat.completion.chunk"
WHOLE = "chat.completion"


def answer_chat(gateway: Gateway, fields: ChatRequest) -> Response:
    """Raises InvalidRequest for what can be told before anything runs."""
    if fields.top_logprobs is not None and not fields.logprobs:
        raise BadField("top_logprobs", "top_logprobs is set and logprobs is not: set logprobs to true")
    most = fields.max_tokens
    if fields.max_completion_tokens is not None:
        most = fields.max_completion_tokens
        check_range("max_completion_tokens", most, dict(RANGES)["max_tokens"])
    logprobs = (fields.top_logprobs or 0) if fields.logprobs else None
    sampling = to_sampling(fields, max_tokens=most, logprobs=logprobs)
    must_call = demanded(fields)
    if must_call:
        set_constraint(sampling, call_constraint(must_call))
    heading = gateway.heading("chatcmpl", fields.model)
    request = gateway.request(heading, 0, 1, sampling, pb.GenerateRequest(chat=chat_of(fields)))
    generation = gateway.generation([request], fields.timeout)
    form = _Form(heading, _parser_of(fields, bool(must_call)), _logprobs_of(gateway, heading, logprobs))
    if fields.stream:
        usage = bool(fields.stream_options and fields.stream_options.include_usage)
        return EventAnswer(generation, ChatEvents(form, usage), heading.id)
    return WholeAnswer(generation, ChatWhole(form, fields.n or 1), heading.id)


def _parser_of(fields: ChatRequest, must_call: bool) -> Callable[[], ToolCallParser] | None:
    if not may_call(fields):
        return None
    parallel = fields.parallel_tool_calls is not False
    return lambda: ToolCallParser(bare=must_call, parallel=parallel)


def _logprobs_of(gateway: Gateway, heading: Heading, asked: int | None) -> ChatLogprobs | None:
    return None if asked is None else ChatLogprobs(gateway.token_texts(heading.model))


@dataclass(frozen=True, slots=True)
class _Form:
    """What both kinds of answers have to know."""

    heading: Heading
    parser: Callable[[], ToolCallParser] | None
    """Makes one for each choice; None where no call can come."""
    logprobs: ChatLogprobs | None

    def positions(self, chunk: pb.GenerateChunk) -> str:
        return self.logprobs.piece(chunk.logprobs) if self.logprobs is not None else ""

    def logprobs_json(self, pieces: Iterable[str]) -> str:
        return "null" if self.logprobs is None else self.logprobs.join(pieces)


class _Calls:
    """The parser of one choice, and the names of its calls."""

    def __init__(self, parser: ToolCallParser) -> None:
        self._parser = parser

    def take(self, chunk: pb.GenerateChunk) -> Delta:
        delta = self._parser.push(chunk.text)
        if chunk.finish_reason:
            rest = self._parser.finish()
            delta.content += rest.content
            delta.calls += rest.calls
        return delta

    def reason(self, finish_reason: str) -> str:
        return "tool_calls" if finish_reason == "stop" and self._parser.calls else finish_reason


def _call_id() -> str:
    return f"call_{secrets.token_hex(12)}"


class ChatEvents:
    """Events of a stream. What does not change between chunks is encoded once."""

    def __init__(self, form: _Form, include_usage: bool) -> None:
        self._form = form
        self._head = f"data: {form.heading.opening(CHUNK)},"
        self._tail = '],"usage":null}\n\n' if include_usage else "]}\n\n"
        self._include_usage = include_usage
        self._begun: set[int] = set()
        self._calls: dict[int, _Calls] = {}

    def event(self, prompt: int, chunk: pb.GenerateChunk) -> bytes:
        """The role comes with a choice's first event."""
        form, index, reason = self._form, chunk.choice, chunk.finish_reason
        if form.parser is None:
            delta = f'"content":{quote(chunk.text)}'
        else:
            calls = self._calls.get(index)
            if calls is None:
                calls = self._calls[index] = _Calls(form.parser())
            delta = _delta_json(calls.take(chunk))
            reason = calls.reason(reason)
            if not delta and not reason and form.logprobs is None:
                return b""
        if index not in self._begun:
            self._begun.add(index)
            delta = f'"role":"assistant"{"," if delta else ""}{delta}'
        logprobs = form.logprobs_json([form.positions(chunk)])
        finish = f'"{reason}"' if reason else "null"
        choice = f'{{"index":{index},"delta":{{{delta}}},"logprobs":{logprobs},"finish_reason":{finish}}}'
        return f'{self._head}"choices":[{choice}{self._tail}'.encode()

    def usage_event(self, usage: Mapping[str, Any]) -> bytes:
        if not self._include_usage:
            return b""
        return f'{self._head}"choices":[],"usage":{json.dumps(usage)}}}\n\n'.encode()


def _delta_json(delta: Delta) -> str:
    """The inside of the delta's object."""
    parts = [f'"content":{quote(delta.content)}'] if delta.content else []
    if delta.calls:
        parts.append(f'"tool_calls":{json.dumps([_call_delta(call) for call in delta.calls])}')
    return ",".join(parts)


def _call_delta(call: CallDelta) -> dict[str, Any]:
    if call.name is None:
        return {"index": call.index, "function": {"arguments": call.arguments}}
    function = {"name": call.name, "arguments": call.arguments}
    return {"index": call.index, "id": _call_id(), "type": "function", "function": function}


class _Choice:
    """One choice of an answer that is given at the end."""

    def __init__(self, parser: ToolCallParser | None) -> None:
        self.content: list[str] = []
        self.calls: list[CallDelta] = []
        self.positions: list[str] = []
        """JSON of the log probabilities, piece by piece."""
        self.reason: str | None = None
        self._calls = None if parser is None else _Calls(parser)

    def add(self, chunk: pb.GenerateChunk) -> None:
        if chunk.finish_reason:
            self.reason = chunk.finish_reason
        if self._calls is None:
            self.content.append(chunk.text)
            return
        delta = self._calls.take(chunk)
        self.content.append(delta.content)
        for call in delta.calls:
            if call.name is not None:
                self.calls.append(call)
            else:
                self.calls[call.index].arguments += call.arguments
        if chunk.finish_reason:
            self.reason = self._calls.reason(chunk.finish_reason)

    def message(self) -> dict[str, Any]:
        content = "".join(self.content)
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if self.calls:
            message["content"] = content or None
            message["tool_calls"] = [
                {
                    "id": _call_id(),
                    "type": "function",
                    "function": {"name": call.name, "arguments": call.arguments},
                }
                for call in self.calls
            ]
        return message


class ChatWhole:
    """The one answer without a stream."""

    def __init__(self, form: _Form, choices: int) -> None:
        self._form = form
        make = form.parser
        self._choices = [_Choice(None if make is None else make()) for _ in range(choices)]

    def add(self, prompt: int, chunk: pb.GenerateChunk) -> None:
        choice = self._choices[chunk.choice]
        choice.add(chunk)
        choice.positions.append(self._form.positions(chunk))

    def answer(self, usage: Mapping[str, Any]) -> bytes:
        choices = ",".join(self._choice(index, choice) for index, choice in enumerate(self._choices))
        head = self._form.heading.opening(WHOLE)
        return f'{head},"choices":[{choices}],"usage":{json.dumps(usage)}}}'.encode()

    def _choice(self, index: int, choice: _Choice) -> str:
        message = json.dumps(choice.message(), ensure_ascii=False)
        logprobs = self._form.logprobs_json(choice.positions)
        finish = json.dumps(choice.reason)
        return f'{{"index":{index},"message":{message},"logprobs":{logprobs},"finish_reason":{finish}}}'
