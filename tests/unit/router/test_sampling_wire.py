"""Sampling parameters on the wire: nothing is lost, and what was not said has its default."""

import dataclasses
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdserve.core.errors import InvalidRequest
from pdserve.core.types import Constraint, ConstraintKind, SamplingParams, TokenLogprobs
from pdserve.proto import inference_pb2
from pdserve.proto.sampling import decode, decode_logprobs, encode, encode_logprobs

COUNTS = st.integers(0, 2**32 - 1)
FLOATS = st.floats(width=32, allow_nan=False)
"""What the wire's fields can hold; ranges are for check_sampling."""
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)

FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "max_tokens": COUNTS,
    "temperature": FLOATS,
    "top_p": FLOATS,
    "top_k": COUNTS,
    "min_p": FLOATS,
    "seed": st.integers(0, 2**64 - 1),
    "n": COUNTS,
    "repetition_penalty": FLOATS,
    "presence_penalty": FLOATS,
    "frequency_penalty": FLOATS,
    "logit_bias": st.dictionaries(COUNTS, FLOATS, max_size=4).map(lambda d: tuple(sorted(d.items()))),
    "stop": st.lists(TEXTS, max_size=3).map(tuple),
    "stop_token_ids": st.lists(COUNTS, max_size=3).map(tuple),
    "min_tokens": COUNTS,
    "ignore_eos": st.booleans(),
    "logprobs": st.none() | COUNTS,
    "constraint": st.none() | st.builds(Constraint, st.sampled_from(ConstraintKind), TEXTS),
}


def test_every_field_is_known_to_the_codec_and_to_this_test() -> None:
    names = {field.name for field in dataclasses.fields(SamplingParams)}
    assert names == set(FIELDS)
    assert names == {field.name for field in inference_pb2.Sampling.DESCRIPTOR.fields}


@settings(max_examples=200, deadline=None)
@given(st.builds(SamplingParams, **FIELDS))
def test_what_was_encoded_is_decoded(sampling: SamplingParams) -> None:
    data = encode(sampling).SerializeToString()
    assert decode(inference_pb2.Sampling.FromString(data)) == sampling


@settings(max_examples=50, deadline=None)
@given(
    st.lists(
        st.builds(
            TokenLogprobs,
            token_id=COUNTS,
            logprob=FLOATS,
            rank=COUNTS,
            top=st.lists(st.tuples(COUNTS, FLOATS), max_size=3).map(tuple),
        ),
        max_size=4,
    ).map(tuple)
)
def test_logprobs_come_back_as_they_were(positions: tuple[TokenLogprobs, ...]) -> None:
    assert decode_logprobs(encode_logprobs(positions)) == positions


def test_what_is_sent_on_does_not_depend_on_the_receivers_defaults() -> None:
    sent = {field.name for field, _ in encode(SamplingParams()).ListFields()}
    optional = {field.name for field in inference_pb2.Sampling.DESCRIPTOR.fields if field.has_presence}
    assert sent == optional - {"logprobs", "constraint"}


@pytest.mark.parametrize(
    "wrong", [{"max_tokens": -1}, {"n": 2**32}, {"seed": 2**64}, {"logit_bias": ((-1, 1.0),)}]
)
def test_what_no_field_can_hold_is_a_value_error(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        encode(SamplingParams(**wrong))


def test_a_kind_of_constraint_that_does_not_exist_is_refused() -> None:
    asked = inference_pb2.Sampling(constraint=inference_pb2.Constraint(kind="haiku"))
    with pytest.raises(InvalidRequest, match="'haiku': it must be one of json_schema"):
        decode(asked)


def test_a_seed_that_was_not_given_is_another_one_each_time() -> None:
    seeds = {decode(inference_pb2.Sampling(temperature=0.8)).seed for _ in range(20)}
    assert len(seeds) == 20
    assert min(seeds) >= 0
    assert max(seeds) < 2**63


def test_what_was_given_is_kept_and_the_rest_has_its_defaults() -> None:
    given = decode(inference_pb2.Sampling(max_tokens=7, seed=0, ignore_eos=True))
    assert given == SamplingParams(max_tokens=7, seed=0, ignore_eos=True)
