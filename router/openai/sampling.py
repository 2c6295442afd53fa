"""OpenAI's sampling fields to ours on the wire. Raises BadField in the words of core/request_limits.py."""

import json
from typing import Any, Final

from pdserve.core.request_limits import RANGES, Range
from pdserve.core.types import Constraint, ConstraintKind
from pdserve.proto import inference_pb2 as pb
from pdserve.router.openai.errors import BadField
from pdserve.router.openai.fields import UINT32, ResponseFormat, SamplingFields

_COPIED: Final = (
    "max_tokens",
    "temperature",
    "top_p",
    "min_p",
    "n",
    "min_tokens",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
)
DEFAULT_TEMPERATURE: Final = 1.0
"""OpenAI's; the gRPC API is greedy unless told otherwise."""


def to_sampling(fields: SamplingFields, *, max_tokens: int | None, logprobs: int | None) -> pb.Sampling:
    """`max_tokens` and `logprobs` as the request's kind of API means them. Raises BadField."""
    given: dict[str, Any] = {name: getattr(fields, name) for name in _COPIED}
    given["max_tokens"] = max_tokens
    if given["temperature"] is None:
        given["temperature"] = DEFAULT_TEMPERATURE
    if fields.stream_options is not None and not fields.stream:
        raise BadField("stream_options", "stream_options is set and stream is not: set stream to true")
    check_ranges(given | {"logprobs": logprobs})
    stop = [fields.stop] if isinstance(fields.stop, str) else fields.stop
    message = pb.Sampling(
        **given,
        top_k=None if fields.top_k is None else max(0, fields.top_k),
        seed=None if fields.seed is None else fields.seed % 2**63,
        ignore_eos=bool(fields.ignore_eos),
        stop=stop,
        stop_token_ids=fields.stop_token_ids,
        logit_bias=fields.logit_bias,
        logprobs=logprobs,
    )
    constraint = constraint_of(fields)
    if constraint is not None:
        set_constraint(message, constraint)
    return message


def check_ranges(given: dict[str, Any]) -> None:
    """Raises BadField for the first number that is out of its range."""
    for name, allowed in RANGES:
        value = given.get(name)
        if value is not None:
            check_range(name, value, allowed)


def check_range(name: str, value: float, allowed: Range) -> None:
    """Raises BadField for a number that is not allowed, or that no field on the wire can hold."""
    if value not in allowed:
        raise BadField(name, f"{name} is {value:g}: it must be {allowed}")
    if isinstance(value, int) and value > UINT32:
        raise BadField(name, f"{name} is {value}: it must be at most {UINT32}")


def set_constraint(message: pb.Sampling, constraint: Constraint) -> None:
    """Raises BadField where there is one already."""
    if message.HasField("constraint"):
        raise BadField("response_format", "two constraints on one answer: send one of them")
    message.constraint.kind = constraint.kind
    message.constraint.source = constraint.source


def constraint_of(fields: SamplingFields) -> Constraint | None:
    """The one constraint that is asked for, in whichever of the ways. Raises BadField for two."""
    outputs = fields.structured_outputs
    ways: dict[str, Constraint | None] = {
        "response_format": _of_format(fields.response_format),
        "guided_json": _json(fields.guided_json, "guided_json"),
        "guided_regex": _some(ConstraintKind.REGEX, fields.guided_regex),
        "guided_choice": _choice(fields.guided_choice),
        "guided_grammar": _some(ConstraintKind.GRAMMAR, fields.guided_grammar),
    }
    if outputs is not None:
        ways |= {
            "structured_outputs.json": _json(outputs.json_, "structured_outputs.json"),
            "structured_outputs.regex": _some(ConstraintKind.REGEX, outputs.regex),
            "structured_outputs.choice": _choice(outputs.choice),
            "structured_outputs.grammar": _some(ConstraintKind.GRAMMAR, outputs.grammar),
        }
    found = [(name, constraint) for name, constraint in ways.items() if constraint is not None]
    if len(found) > 1:
        names = " and ".join(name for name, _ in found)
        raise BadField(found[1][0], f"{names} constrain the same answer: send one of them")
    return found[0][1] if found else None


def _of_format(wanted: ResponseFormat | None) -> Constraint | None:
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_object":
        return Constraint(ConstraintKind.JSON_OBJECT, "")
    if wanted.json_schema is None or wanted.json_schema.schema_ is None:
        place = "response_format.json_schema" + (".schema" if wanted.json_schema else "")
        raise BadField(place, f"{place} is missing: response_format of type json_schema needs it")
    return Constraint(ConstraintKind.JSON_SCHEMA, json.dumps(wanted.json_schema.schema_))


def _json(schema: dict[str, Any] | str | None, param: str) -> Constraint | None:
    if schema is None:
        return None
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except ValueError as error:
            raise BadField(param, f"{param} is a text that is not JSON: {error}") from None
    return Constraint(ConstraintKind.JSON_SCHEMA, json.dumps(schema))


def _choice(choices: list[str] | None) -> Constraint | None:
    return None if choices is None else Constraint(ConstraintKind.CHOICE, json.dumps(choices))


def _some(kind: ConstraintKind, source: str | None) -> Constraint | None:
    return None if source is None else Constraint(kind, source)
