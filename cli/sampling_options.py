"""How answers are made: the options of `generate` and `chat`, named as the client's keywords."""

import inspect
import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import typer

from pdserve.cli.gathering import option
from pdserve.core.types import SamplingParams

if TYPE_CHECKING:
    from pdserve.client import RequestOptions

_DEFAULTS = SamplingParams()


def _sampling(name: str, kind: Any, says: str, **settings: Any) -> inspect.Parameter:
    """An option that is left to the cluster where it is not given; its help shows what that does."""
    there = getattr(_DEFAULTS, name)
    if name != "seed" and isinstance(there, int | float) and not isinstance(there, bool):
        settings["show_default"] = f"{there:g}"
    return option(name, kind, says, rich_help_panel="Sampling", **settings)


_constraint = partial(option, rich_help_panel="Constraints, at most one")

SAMPLING = (
    _sampling("max_tokens", int | None, "Longest answer, in tokens."),
    _sampling("min_tokens", int | None, "Nothing ends the answer before."),
    _sampling("temperature", float | None, "0 is greedy."),
    _sampling("top_p", float | None, "Choose among the likeliest tokens that sum to this; 1 is off."),
    _sampling("top_k", int | None, "Choose among the k likeliest tokens; 0 is off."),
    _sampling(
        "min_p", float | None, "Leave out what is less likely than this share of the likeliest; 0 is off."
    ),
    _sampling("repetition_penalty", float | None, "Above 1: what was there becomes less likely."),
    _sampling("presence_penalty", float | None, "Subtracted once from what the answer has."),
    _sampling("frequency_penalty", float | None, "Subtracted as often as the answer has it."),
    _sampling(
        "logit_bias", list[str] | None, "TOKEN_ID=BIAS; -100 bans. May be repeated.", metavar="ID=BIAS"
    ),
    _sampling("seed", int | None, "The same seed gives the same answer; without one, each is its own."),
    _sampling(
        "stop",
        list[str] | None,
        "A text that ends the answer and is cut off it. May be repeated.",
        metavar="TEXT",
    ),
    _sampling(
        "stop_token_ids",
        list[int] | None,
        "A token that ends it. May be repeated.",
        metavar="TOKEN_ID",
        flags=("--stop-token",),
    ),
    _sampling("ignore_eos", bool, "Go on to --max-tokens.", default=False, flags=("--ignore-eos",)),
)
"""What holds for each answer of a conversation, too."""

CONSTRAINTS = (
    _constraint(
        "json_schema",
        str | None,
        "A JSON Schema that the answer fulfils: a file, or the JSON.",
        metavar="FILE|JSON",
    ),
    _constraint("json_object", bool, "The answer is a JSON object.", default=False, flags=("--json-object",)),
    _constraint("regex", str | None, "A regular expression that the whole answer matches."),
    _constraint(
        "choices",
        list[str] | None,
        "The answer is one of these. May be repeated.",
        metavar="TEXT",
        flags=("--choice",),
    ),
    _constraint(
        "grammar", str | None, "A file with a Lark grammar that the answer belongs to.", metavar="FILE"
    ),
)
"""What the text must be."""

REPORTS = (
    _sampling("n", int | None, "Answers to each prompt.", flags=("--n", "-n")),
    _sampling("logprobs", int | None, "With --json: logprobs of each token and of the k likeliest."),
)


def request_options(given: Mapping[str, Any]) -> "RequestOptions":
    """The client's keywords. Raises typer.BadParameter for what cannot be read."""
    # 0 is a value: a seed of 0 is not a seed that is drawn.
    options = {name: value for name, value in given.items() if value not in (None, []) and value is not False}
    constraints = [name for name in (option.name for option in CONSTRAINTS) if name in options]
    if len(constraints) > 1:
        raise typer.BadParameter(f"{' and '.join(constraints)} contradict each other: give one of them")
    if "logit_bias" in options:
        options["logit_bias"] = dict(map(_bias, options["logit_bias"]))
    if "json_schema" in options:
        options["json_schema"] = _schema(options["json_schema"])
    if "grammar" in options:
        options["grammar"] = _file(options["grammar"], "--grammar")
    return cast("RequestOptions", options)


def _bias(text: str) -> tuple[int, float]:
    token, _, bias = text.partition("=")
    try:
        return int(token), float(bias)
    except ValueError:
        raise typer.BadParameter(f"--logit-bias {text!r}: write TOKEN_ID=BIAS, such as 42=-100") from None


def _schema(text: str) -> Any:
    source = text if text.lstrip()[:1] == "{" else _file(text, "--json-schema")
    try:
        return json.loads(source)
    except ValueError as error:
        raise typer.BadParameter(f"--json-schema is not JSON: {error}") from None


def _file(name: str, flag: str) -> str:
    try:
        return Path(name).read_text("utf-8")
    except OSError as error:
        raise typer.BadParameter(f"{flag}: cannot read {name}: {error.strerror}") from None
    except ValueError:
        raise typer.BadParameter(f"{flag}: {name} is not UTF-8") from None
