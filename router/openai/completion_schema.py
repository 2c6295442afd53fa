"""`POST /v1/completions`: what comes in and what goes out."""

from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag

from pdserve.router.openai.fields import MAX_ITEMS, SamplingFields, Shown, Text, TokenId, UsageShown
from pdserve.router.openai.logprobs import CompletionLogprobsShown

DEFAULT_MAX_TOKENS = 16
"""OpenAI's, for completions only."""


def _prompt_kind(value: object) -> str | None:
    if isinstance(value, str):
        return "~text"
    if not isinstance(value, list) or not value:
        return None
    match value[0]:
        case str():
            return "~texts"
        case list():
            return "~id_lists"
        case _:
            return "~ids"


MAX_PROMPT_IDS = 2**20
"""Of one prompt: more than any context has."""

_Ids = Annotated[list[TokenId], Field(min_length=1, max_length=MAX_PROMPT_IDS, fail_fast=True)]
CompletionPrompt = Annotated[
    Annotated[Text, Field(min_length=1), Tag("~text")]
    | Annotated[
        list[Annotated[Text, Field(min_length=1)]],
        Field(min_length=1, max_length=MAX_ITEMS, fail_fast=True),
        Tag("~texts"),
    ]
    | Annotated[_Ids, Tag("~ids")]
    | Annotated[list[_Ids], Field(min_length=1, max_length=MAX_ITEMS, fail_fast=True), Tag("~id_lists")],
    Discriminator(
        _prompt_kind,
        custom_error_type="prompt",
        custom_error_message="Input should be a text, a list of texts, a list of token ids or a list of such "
        "lists, and not empty",
    ),
]


class CompletionRequest(SamplingFields):
    prompt: CompletionPrompt
    logprobs: int | None = Field(default=None, ge=0, le=20)
    """Report the sampled token's log probability and those of this many of the likeliest."""
    echo: bool | None = None
    """The prompt before the completion. Not together with logprobs."""
    best_of: int | None = Field(default=None, ge=1)
    """Only as large as n."""
    suffix: Text | None = None
    """Refused: models here do not insert."""


class CompletionChoiceShown(Shown):
    index: int
    text: str
    logprobs: CompletionLogprobsShown | None
    finish_reason: Literal["stop", "length", "abort"]


class CompletionAnswer(Shown):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoiceShown]
    usage: UsageShown
