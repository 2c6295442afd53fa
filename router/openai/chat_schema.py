"""`POST /v1/chat/completions`: what comes in and what goes out."""

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from pdserve.router.openai.fields import MAX_ITEMS, SamplingFields, Schema, Shown, Text, UsageShown, ranged
from pdserve.router.openai.logprobs import ChatLogprobsShown


class ContentPart(Schema):
    type: Text = Field(json_schema_extra={"enum": ["text", "refusal"]})
    """Text, or what the assistant said in refusing. Images and sounds are refused."""
    text: Text | None = None
    refusal: Text | None = None


def _content_kind(value: object) -> str | None:
    if isinstance(value, str):
        return "~text"
    return "~parts" if isinstance(value, list) else None


Content = Annotated[
    Annotated[Text, Tag("~text")]
    | Annotated[list[ContentPart], Field(min_length=1, max_length=MAX_ITEMS, fail_fast=True), Tag("~parts")],
    Discriminator(
        _content_kind,
        custom_error_type="content",
        custom_error_message="Input should be a text or a list of text parts",
    ),
]


class CalledFunction(Schema):
    name: Text
    arguments: Text
    """JSON."""


class ToolCall(Schema):
    id: Text
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(Schema):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Content | None = None
    name: Text | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_ITEMS, fail_fast=True)] | None = None
    """Of the assistant: what it called."""
    tool_call_id: Text | None = None
    """Of a tool: the call that it answers."""


class Function(Schema):
    name: Annotated[Text, Field(min_length=1, max_length=256)]
    description: Text | None = None
    parameters: dict[str, Any] | None = None
    """A JSON Schema of an object; None: no parameters."""
    strict: bool | None = None


class Tool(Schema):
    type: Literal["function"]
    function: Function


class NamedFunction(Schema):
    name: Text


class NamedTool(Schema):
    type: Literal["function"] = "function"
    function: NamedFunction


def _choice_kind(value: object) -> str | None:
    if isinstance(value, str):
        return "~mode"
    return "~named" if isinstance(value, dict) else None


ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("~mode")] | Annotated[NamedTool, Tag("~named")],
    Discriminator(
        _choice_kind,
        custom_error_type="tool_choice",
        custom_error_message="Input should be none, auto, required or an object with a function's name",
    ),
]


class ChatRequest(SamplingFields):
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_ITEMS, fail_fast=True)]
    max_completion_tokens: int | None = ranged("max_tokens")
    """OpenAI's newer name of max_tokens; where both are given, this one counts."""
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    """Needs logprobs."""
    tools: Annotated[list[Tool], Field(max_length=MAX_ITEMS, fail_fast=True)] | None = None
    tool_choice: ToolChoice | None = None
    """None: auto where there are tools."""
    parallel_tool_calls: bool | None = None
    """False: at most one call."""


class CalledFunctionShown(Shown):
    name: str
    arguments: str


class ToolCallShown(Shown):
    id: str
    type: Literal["function"]
    function: CalledFunctionShown


class AnswerMessageShown(Shown):
    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: list[ToolCallShown] = Field(default=[])


class ChatChoiceShown(Shown):
    index: int
    message: AnswerMessageShown
    logprobs: ChatLogprobsShown | None
    finish_reason: Literal["stop", "length", "tool_calls", "abort"]


class ChatAnswer(Shown):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoiceShown]
    usage: UsageShown
