"""A model's own chat template, rendered in a sandbox as its authors' tools render it."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser

from pdserve.core.errors import ConfigError, InvalidRequest
from pdserve.core.text.render_budget import BudgetedEnvironment


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One turn of a conversation. `role` is what the model's template knows: system, user, assistant, …"""

    role: str
    content: str
    name: str = ""
    tool_call_id: str = ""
    """Of a `tool` message: the call that it answers."""
    tool_calls_json: str = ""
    """Of an `assistant` message: a JSON array of OpenAI tool calls, arguments as JSON text."""

    def to_template(self) -> dict[str, object]:
        """What templates see: fields that the message does not have are absent.

        Tool calls' arguments become objects, as templates want them. Raises InvalidRequest for bad JSON.
        """
        fields: dict[str, object] = {"role": self.role, "content": self.content}
        if self.name:
            fields["name"] = self.name
        if self.tool_call_id:
            fields["tool_call_id"] = self.tool_call_id
        if self.tool_calls_json:
            fields["tool_calls"] = _tool_calls(self.tool_calls_json)
        return fields


class _GenerationBlock(Extension):
    """`{% generation %} … {% endgeneration %}` marks training targets; in serving it is only its body."""

    tags: set[str] = {"generation"}  # noqa: RUF012 - jinja's own signature

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """A compiled template. Templates come with a model from outside, so they run in jinja's sandbox.

    `special_tokens` are the names that templates use (`bos_token`, `eos_token`, …) with their texts.
    `now` is what `strftime_now` shows, local wall-clock time by default.
    Raises ConfigError when the source does not compile.
    """

    def __init__(
        self,
        source: str,
        special_tokens: Mapping[str, str],
        now: Callable[[], datetime] = datetime.now,
    ) -> None:
        self.source = source
        self._special_tokens = dict(special_tokens)
        environment = BudgetedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_GenerationBlock, "jinja2.ext.loopcontrols"],
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda layout: now().strftime(layout)
        try:
            self._template = environment.template(source)
        except Exception as error:  # what jinja makes of it must compile as Python, too
            raise ConfigError(f"the model's chat template does not compile: {error}") from error

    def render(self, messages: Sequence[ChatMessage], tools_json: str = "") -> str:
        """The prompt text of `messages`, ending where the assistant's answer begins.

        `tools_json` is a JSON array of OpenAI tool definitions, empty for none.
        Raises InvalidRequest with the template's own words when it refuses the messages, and where it takes
        more steps or writes more than a rendering may (core/text/render_budget.py).
        """
        if not messages:
            raise InvalidRequest("a chat needs at least one message; the request has none")
        tools = _json_array(tools_json, "tools") if tools_json else None
        turns = [message.to_template() for message in messages]
        try:
            return self._template.render(
                messages=turns,
                add_generation_prompt=True,
                tools=tools,
                documents=None,
                **self._special_tokens,
            )
        except InvalidRequest:
            raise
        except Exception as error:  # the model's own code on the caller's data may raise anything
            raise InvalidRequest(f"the model's chat template refused the messages: {error}") from error


def _json_array(text: str, what: str) -> list[Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise InvalidRequest(f"{what} is not JSON: {error}") from error
    if not isinstance(value, list):
        raise InvalidRequest(f"{what} is a JSON {type(value).__name__}: send an array")
    return value


def _tool_calls(text: str) -> list[Any]:
    calls = _json_array(text, "tool_calls")
    for call in calls:
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict):
            raise InvalidRequest("tool_calls: each must be an object with `function`")
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            try:
                function["arguments"] = json.loads(arguments)
            except ValueError as error:
                raise InvalidRequest(f"tool_calls: the arguments are not JSON: {error}") from error
    return calls


def _raise_exception(message: str) -> str:
    raise jinja2.TemplateError(message)


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON: jinja's own filter escapes HTML characters, which models were not trained on."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
