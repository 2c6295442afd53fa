"""What completion and chat requests share: sampling, constraints, streaming. Unknown fields are ignored.

Besides OpenAI's fields these are vLLM's, by its names. Clients send, and nothing here depends on: `user`,
`store`, `metadata`, `service_tier`, `safety_identifier`, `prompt_cache_key`, `modalities`, `verbosity`.
"""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, Tag

from pdserve.core.request_limits import BIAS_RANGE, MAX_LOGIT_BIASES, MAX_STOPS, RANGES

BRANCH = "~"
"""Begins the tags of unions' branches, which are part of pydantic's paths and of no client's."""

UINT32 = 2**32 - 1
"""Most that counts and token ids may be on the wire."""
MAX_ITEMS = 8192
"""Of a list in a body. A body is checked in one go, while every stream waits: what is in it is bounded, and
the first wrong item ends the check (fail_fast)."""


class Schema(BaseModel):
    """Strict: a number in quotes is no number, true is no 1."""

    model_config = ConfigDict(
        strict=True, extra="ignore", allow_inf_nan=False, frozen=True, use_attribute_docstrings=True
    )


class Shown(BaseModel):
    """Part of an answer, for the OpenAPI document only: answers are built as plain dicts."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


def _encodable(text: str) -> str:
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError("text with a lone surrogate is not valid Unicode") from None
    return text


Text = Annotated[str, AfterValidator(_encodable)]
TokenId = Annotated[int, Field(ge=0, le=UINT32)]


def ranged(name: str) -> Any:
    """An optional number; the document says its range, `sampling.py` checks it in core's words."""
    allowed = dict(RANGES)[name]
    shown: dict[str, Any] = {"exclusiveMinimum" if allowed.above else "minimum": allowed.low}
    shown["maximum"] = min(allowed.high, UINT32)

    def show(schema: dict[str, Any]) -> None:
        schema["anyOf"][0].update(shown)

    return Field(default=None, json_schema_extra=show)


def _keyed_by_ids(schema: dict[str, Any]) -> None:
    """JSON has texts for keys only."""
    schema["oneOf"][0] |= {"propertyNames": {"pattern": "^[0-9]{1,9}$"}, "maxProperties": MAX_LOGIT_BIASES}


def _biases_kind(value: object) -> str | None:
    """Looked at before each of many entries is."""
    if value is None:
        return "~none"
    return "~biases" if isinstance(value, dict) and len(value) <= MAX_LOGIT_BIASES else None


LogitBias = Annotated[
    Annotated[dict[TokenId, Annotated[float, Field(ge=BIAS_RANGE.low, le=BIAS_RANGE.high)]], Tag("~biases")]
    | Annotated[None, Tag("~none")],
    Discriminator(
        _biases_kind,
        custom_error_type="logit_bias",
        custom_error_message=f"Input should be an object with at most {MAX_LOGIT_BIASES} token ids",
    ),
]


def _stop_kind(value: object) -> str | None:
    if isinstance(value, str):
        return "~text"
    return "~texts" if isinstance(value, list) else None


Stop = Annotated[
    Annotated[Text, Tag("~text")]
    | Annotated[list[Text], Field(max_length=MAX_STOPS, fail_fast=True), Tag("~texts")],
    Discriminator(
        _stop_kind, custom_error_type="stop", custom_error_message="Input should be a text or a list of texts"
    ),
]


Choices = Annotated[list[Text], Field(min_length=1, max_length=MAX_ITEMS, fail_fast=True)]


class StreamOptions(Schema):
    include_usage: bool | None = None
    """One more chunk before the end, without choices and with the whole request's usage."""


class JsonSchemaFormat(Schema):
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | bool | None = Field(default=None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Schema):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None


class StructuredOutputs(Schema):
    """vLLM's: exactly one of these."""

    json_: dict[str, Any] | str | None = Field(default=None, alias="json")
    regex: Text | None = None
    choice: Choices | None = None
    grammar: Text | None = None
    """In Lark's notation."""


class SamplingFields(Schema):
    model: Text | None = None
    """None: the only model that is served."""
    max_tokens: int | None = ranged("max_tokens")
    temperature: float | None = ranged("temperature")
    """None: 1; 0 is greedy."""
    top_p: float | None = ranged("top_p")
    top_k: int | None = Field(default=None, ge=-1, le=UINT32)
    """-1 and 0 are off."""
    min_p: float | None = ranged("min_p")
    n: int | None = ranged("n")
    seed: int | None = Field(default=None, ge=-(2**63), le=2**63 - 1)
    """None: drawn for each request."""
    stop: Stop | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_STOPS, fail_fast=True)] | None = None
    min_tokens: int | None = ranged("min_tokens")
    ignore_eos: bool | None = None
    presence_penalty: float | None = ranged("presence_penalty")
    frequency_penalty: float | None = ranged("frequency_penalty")
    repetition_penalty: float | None = ranged("repetition_penalty")
    logit_bias: LogitBias = Field(default=None, json_schema_extra=_keyed_by_ids)
    """Token id, in decimal digits, to what is added to its logit."""
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: Text | None = None
    guided_choice: Choices | None = None
    guided_grammar: Text | None = None
    timeout: float | None = Field(default=None, gt=0)
    """Seconds that the whole request may take; past them it ends with 504. None: no limit of its own."""
    user: Text | None = None
    """Ignored."""


class PromptTokensDetails(Shown):
    cached_tokens: int


class UsageShown(Shown):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
