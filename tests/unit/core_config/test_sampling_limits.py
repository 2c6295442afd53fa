"""Ranges of sampling: both ends pass, the next value outside is refused with the value and the limit."""

import dataclasses
import math
from typing import Any

import pytest

from pdserve.core.errors import InvalidRequest
from pdserve.core.request_limits import RANGES, check_sampling, check_sampling_tokens
from pdserve.core.types import Constraint, ConstraintKind, SamplingParams

SCHEMA = Constraint(ConstraintKind.JSON_SCHEMA, "{}")
FLOATS = [field.name for field in dataclasses.fields(SamplingParams) if isinstance(field.default, float)]

ENDS = [
    ("max_tokens", 1, None, 0, None),
    ("temperature", 0.0, 100.0, -0.001, 100.01),
    ("top_p", 1e-6, 1.0, 0.0, 1.01),
    ("top_k", 0, 2**32 - 1, -1, None),
    ("min_p", 0.0, 1.0, -0.01, 1.01),
    ("n", 1, 128, 0, 129),
    ("repetition_penalty", 0.01, 100.0, 0.009, 101.0),
    ("presence_penalty", -2.0, 2.0, -2.01, 2.01),
    ("frequency_penalty", -2.0, 2.0, -2.01, 2.01),
    ("min_tokens", 0, 128, -1, 129),
    ("logprobs", 0, 20, -1, 21),
    ("seed", 0, 2**64 - 1, -1, 2**64),
]
"""(field, lowest, highest, too low, too high); the default of max_tokens bounds min_tokens."""


def sampling(name: str, value: Any) -> SamplingParams:
    return SamplingParams(**{name: value})


@pytest.mark.parametrize(("name", "low", "high", "below", "above"), ENDS)
def test_a_range_ends_where_it_says(name: str, low: Any, high: Any, below: Any, above: Any) -> None:
    for value in (low, high):
        if value is not None:
            check_sampling(sampling(name, value))
    for value in (below, above):
        if value is not None:
            with pytest.raises(
                InvalidRequest,
                match=f"{name} is {value:g}" if isinstance(value, float) else f"{name} is {value}",
            ) as refused:
                check_sampling(sampling(name, value))
            assert "must be" in refused.value.message or "raise max_tokens" in refused.value.message


def test_every_number_has_its_ends_tested() -> None:
    tested = {name for name, *_ in ENDS}
    assert tested == {name for name, _ in RANGES} | {"seed"}
    numbers = {f.name for f in dataclasses.fields(SamplingParams) if type(f.default) in (int, float)}
    assert tested == numbers | {"logprobs"}


@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused_everywhere(name: str, value: float) -> None:
    with pytest.raises(InvalidRequest, match=rf"{name} is (nan|inf|-inf): it must be"):
        check_sampling(sampling(name, value))


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"min_tokens": 9, "max_tokens": 8}, "min_tokens is 9, max_tokens 8"),
        ({"logit_bias": ((1, 100.5),)}, "token 1 is 100.5: it must be from -100 to 100"),
        ({"logit_bias": ((1, math.nan),)}, "token 1 is nan"),
        ({"logit_bias": tuple((i, 1.0) for i in range(1025))}, "1025 entries, the limit is 1024"),
        ({"stop": ("a",) * 10_000}, "stop has 10000 entries, the limit is 64"),
        ({"stop": ("a", "")}, r"stop\[1\] is empty"),
        ({"stop": ("é" * 513,)}, r"stop\[0\] has 1026 bytes, the limit is 1024"),
        ({"stop_token_ids": tuple(range(65))}, "stop_token_ids has 65 entries, the limit is 64"),
        ({"constraint": SCHEMA, "min_tokens": 1}, "leave out min_tokens or the constraint"),
        ({"constraint": SCHEMA, "ignore_eos": True}, "leave out ignore_eos or the constraint"),
    ],
)
def test_what_is_too_much_or_contradicts_itself_is_refused(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidRequest, match=says):
        check_sampling(SamplingParams(**fields))


def test_everything_at_its_limit_passes_together() -> None:
    check_sampling(
        SamplingParams(
            logit_bias=tuple((token, -100.0) for token in range(1024)),
            stop=("a" * 1024,) * 64,
            stop_token_ids=tuple(range(64)),
            min_tokens=128,
        )
    )
    check_sampling(SamplingParams(constraint=SCHEMA, stop=("b",)))


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"logit_bias": ((512, 1.0),)}, "logit_bias has token id 512, out of the vocabulary: .* 0 to 511"),
        ({"stop_token_ids": (3, 600)}, "stop_token_ids has token id 600, out of the vocabulary"),
        ({"logit_bias": tuple((token, -100.0) for token in range(512))}, "bans all 512 tokens"),
    ],
)
def test_token_ids_are_held_to_the_vocabulary(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidRequest, match=says):
        check_sampling_tokens(SamplingParams(**fields), 512)
    check_sampling_tokens(SamplingParams(logit_bias=((511, -100.0),), stop_token_ids=(0,)), 512)
